"""dit-video data peek: the clips of one step exactly as training sees them, with their captions, given frames and noise levels."""

import itertools
from pathlib import Path

from einops import rearrange
from omegaconf import DictConfig
from rich.console import Console

from dit_video.build import check_whole, make, make_network, make_objective
from dit_video.data.loader import ClipLoader
from dit_video.data.video_file import contact_sheet
from dit_video.model.text import split_words
from dit_video.shapes import to_uint8, unpatchify
from dit_video.train import cost_of


def main(config: DictConfig) -> None:
    """Prints a step's clips and writes them as a contact sheet."""
    check_whole(config, 0, "step")
    loader: ClipLoader = make(config.data, cost=cost_of(config))
    console = Console(soft_wrap=True)
    for line in loader.report.lines():
        console.print(line, markup=False)
    batch = next(itertools.islice(loader.batches(config.step), 1))
    network = make_network(config)
    tokens, grid = network.tokens, network.grid(batch)
    batch = network.as_latents(batch)
    corrupted = make_objective(config).corrupt(batch, tokens)
    given = rearrange(corrupted.stream.given, "b (t place) -> b t place", t=grid.t).all(-1)  # of whole token frames

    labels = []
    for row, key in enumerate(batch.keys):
        words = " ".join(split_words(batch.captions[row])) if corrupted.captions[row] else "(dropped)"
        frames = _frames(given[row].tolist(), tokens.span.t)
        about = (
            f"slot {int(batch.slots[row])}, {corrupted.tasks[row]}, given frames {frames}, noise level {corrupted.time[row]:.3f}"
        )
        labels.append(f"{about}: {words}")
        console.print(f"{about}, {key} from {batch.starts[row]:.3f} s, weight {batch.weights[row]:g}: {words}", markup=False)
    decode = network.autoencoder.decode
    seen = to_uint8(decode(unpatchify(corrupted.stream.values, grid, tokens.patch))).numpy()
    clips = to_uint8(decode(batch.clean())).numpy() if batch.video is None else batch.video.numpy()
    videos = [video for pair in zip(clips, seen, strict=True) for video in pair]
    contact_sheet(videos, [text for label in labels for text in (label, "as the network gets it")], Path(config.out))
    console.print(f"{config.out}: step {config.step}, {len(batch.keys)} clips")


def _frames(given: list[bool], pt: int) -> str:
    """The numbers of the frames that given token frames cover, in words."""
    spans = [f"{1 + (t - 1) * pt}-{t * pt}" if t and pt > 1 else str(t) for t, is_given in enumerate(given) if is_given]
    return ", ".join(spans) or "none"
