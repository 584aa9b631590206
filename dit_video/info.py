"""`dit-video info`: parameters, FLOPs and memory of a model by part for a given clip, without building it in memory."""

import math
from collections.abc import Mapping

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from dit_video.build import make_network
from dit_video.model.cost import TRAINING, flops_by_part, parameters_by_part
from dit_video.model.network import Network
from dit_video.shapes import valid_frames
from dit_video.trainer.optim import split_parameters


def main(config: DictConfig) -> None:
    """Prints the tables; ValueError where the clip does not fit the model."""
    _check(config)
    network = make_network(config)

    span = network.tokens.span
    num_frames = valid_frames(config.num_frames, span.t)
    grid = network.tokens.grid(num_frames, config.height, config.width)

    console = Console(highlight=False)
    seconds = (num_frames - 1) / config.fps
    console.print(f"clip           {num_frames} frames of {config.height}x{config.width}, {seconds:.3g} s at {config.fps:g} fps")
    console.print(f"tokens         {grid.num_tokens:,} ({' x '.join(map(str, grid))}), each {'x'.join(map(str, span))} pixels")
    console.print(f"caption        {config.caption_words} words")
    console.print(f"training step  {config.batch_size} clips, forward and backward\n")
    console.print(_costs(parameters_by_part(network), flops_by_part(network, grid, 1, config.caption_words), config.batch_size))
    console.print(_memory(network))


def _check(config: DictConfig) -> None:
    for name in ("batch_size", "caption_words", "fps"):
        if not config[name] > 0:
            raise ValueError(f"{name} must be more than 0, got {config[name]}; set {name}")
    check_tokens(config)


def check_tokens(config: DictConfig) -> None:
    """ValueError where the caption is longer than what is read of it."""
    if config.caption_words > (limit := config.text.get("max_words", math.inf)):
        raise ValueError(f"caption_words {config.caption_words} is more than text.max_words {limit}; set text.max_words")


def _costs(parameters: Mapping[str, int], flops: Mapping[str, int], batch_size: int) -> Table:
    title = "Parameters and FLOPs (a multiply-add counts as 2)"
    table = table_of(title, "part", "parameters", "", "forward", "", "training step")
    all_parameters, all_flops = sum(parameters.values()), sum(flops.values())
    for part in sorted({*parameters, *flops}, key=lambda part: -flops.get(part, 0)):
        count, cost = parameters.get(part, 0), flops.get(part, 0)
        share, step = cost / all_flops, with_unit(cost * TRAINING * batch_size)
        table.add_row(part, f"{count:,}", f"{count / all_parameters:.1%}", with_unit(cost), f"{share:.1%}", step)
    table.add_section()
    step = with_unit(all_flops * TRAINING * batch_size)
    table.add_row("all", f"{all_parameters:,}", "", with_unit(all_flops), "", step)
    return table


def _memory(network: Network) -> Table:
    hidden, rest = split_parameters(network)
    counts = {name: parameter.numel() for name, parameter in network.named_parameters()}
    num_hidden, num_rest = (sum(counts[name] for name in names) for names in (hidden, rest))
    num_all = sum(counts.values())
    rows = {  # bytes each, and how many; all in float32
        "weights": (4, num_all),
        "gradients": (4, num_hidden + num_rest),
        "moving average": (4, num_all),
        "Muon's momentum": (4, num_hidden),
        "AdamW's two moments": (8, num_rest),
    }
    table = table_of("Memory in training, without activations", "what", "size", "parameters")
    for name, (bytes_each, count) in rows.items():
        table.add_row(name, with_unit(bytes_each * count, "B"), f"{count:,}")
    table.add_section()
    table.add_row("all", with_unit(sum(bytes_each * count for bytes_each, count in rows.values()), "B"))
    return table


def table_of(title: str, first: str, *others: str) -> Table:
    """An empty table: a column of names, and columns of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def with_unit(amount: float, unit: str = "") -> str:
    """Three digits and a prefix of thousands."""
    step = min(int(math.log10(max(amount, 1)) / 3), 5)
    return f"{amount / 1000**step:.3g} {'KMGTP'[step - 1 : step]}{unit}".rstrip()
