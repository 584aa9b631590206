"""`dit-video plan`: what a training will hold, compute and cost on given devices, and what to change where it does not fit.

Nothing of it is allocated: the real training step runs on tensors without contents (see trainer/hollow.py).
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from dit_video.build import check_whole, make, make_network, plain
from dit_video.data.buckets import ClipShape, level
from dit_video.data.errors import BadDataError
from dit_video.data.loader import ClipLoader
from dit_video.data.plan import Step
from dit_video.info import check_tokens, table_of, with_unit
from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.cost import TRAINING, flops_by_part, parameters_by_part
from dit_video.model.network import Network
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.text import TextEncoder
from dit_video.shapes import Batch, Encoded, token_grid
from dit_video.train import check as check_training
from dit_video.train import make_module
from dit_video.trainer.fit import Hardware
from dit_video.trainer.hollow import predict
from dit_video.trainer.layout import Layout
from dit_video.trainer.memory import KEPT, PHASES, Memory, along, measure
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.parallel import Recompute

log = logging.getLogger(__name__)

STRONGER: tuple[Recompute, ...] = ("none", "selective", "full")  # ways to recompute, each saving more memory than the one before
FEW = (3, 5)  # blocks from whose memory that of more is worked out where many ways are looked at
CHEAP = 1.1  # a change that slows a step by no more than this is taken without looking at costlier ones


@dataclass(frozen=True)
class Device:
    """What a step runs on, as conf/device says it."""

    name: str
    memory: float  # bytes
    bfloat16: float  # FLOP/s at the peak, dense
    float32: float
    bandwidth: float  # of its memory, bytes/s
    interconnect: float  # to other devices of its node, bytes/s in one direction

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and not value > 0:
                raise ValueError(f"a device's {name} must be more than 0, got {value!r}; set device.{name}")

    def peak(self, hardware: Hardware) -> float:
        """FLOP/s at the peak in the precision of a training."""
        return self.bfloat16 if hardware.precision == "bf16-mixed" else self.float32


@dataclass(frozen=True)
class Bucket:
    """The clips of one shape, and the steps that are made of them."""

    shape: ClipShape
    tokens: int  # of a clip
    flops: int  # of training on a clip: the forward pass and its backward
    clips: int  # of a step
    count: int | None  # clips that there are; none: the data is not there yet


@dataclass(frozen=True)
class Choice:
    """How a step is laid out: what can be changed without changing what it computes."""

    hardware: Hardware
    micro_batches: int  # of a step, over all ranks

    @property
    def parts(self) -> int:
        """Into how many micro-batches a step is really cut: every rank with clips of its own takes as many."""
        return math.lcm(self.micro_batches, self.hardware.parallel.layout.data_size)


def main(config: DictConfig) -> None:
    """Prints the plan; ValueError where the config could not be trained."""
    hardware = check(config)
    device = Device(**plain(config.device))
    network = make_network(config)
    choice, devices = Choice(hardware, config.data.micro_batches), hardware.parallel.layout.world_size
    buckets, told = find_buckets(config, network, choice)
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0", width=120)

    def say(lines: Iterable[str | Table]) -> None:
        for line in lines:
            console.print(line)

    say(_head(config, network, hardware, device))
    found = [estimate_step(config, network, bucket, choice) for bucket in buckets]
    worst = max(range(len(buckets)), key=lambda number: found[number].peak)
    found[worst] = most = predict_step(config, network, buckets[worst], choice)
    seconds = [step_seconds(config, memory, hardware, device) for memory in found]
    encoders: dict[str, Autoencoder | TextEncoder | ImageEncoder] = {
        "autoencoder": network.autoencoder,
        "text encoder": network.text,
    }
    if network.image_encoder is not None:
        encoders["image encoder"] = network.image_encoder
    beside = {name: encoder.device_bytes(devices) for name, encoder in encoders.items()}
    comes = max(encoder.device_bytes(devices, in_use=True) - beside[name] for name, encoder in encoders.items())
    say(["", _steps(buckets, found, seconds, devices), _memory(most, buckets[worst], beside)])

    room = device.memory * (1 - config.margin) - sum(beside.values())
    frozen = " and of what is frozen" if any(beside.values()) else ""
    say([
        f"{'Fits' if most.peak <= room else 'Does not fit'}: {with_unit(most.peak, 'B')} at the peak of the {most.worst}, of "
        f"{with_unit(max(room, 0), 'B')} (what the device has, less {config.margin:.0%} for its context, workspaces and fragments{frozen})"
    ])  # fmt: skip
    used = sum(most.most.get(part, 0) for part in KEPT) + comes
    if comes and used > most.peak:
        fits = "Fits" if used <= room else "Does not fit"
        say(
            [
                f"{fits}, too: {with_unit(used, 'B')} where frozen weights that lie elsewhere come to the device, beside what is kept"
            ]
        )
    if most.peak > room:
        search = Search(config, network, buckets[worst], choice, device, room)
        say(suggestion(search, Found([], most, seconds[worst][0])))
    say(["", *cost_lines(config, buckets, [time for time, _ in seconds], devices, told)])
    if config.measure:
        say(["", _measured(*measured(config, network, buckets[worst], choice))])


def check(config: DictConfig) -> Hardware:
    """What it is to run on; ValueError, before anything is worked out, where values cannot be."""
    check_whole(config, 1, "devices", "caption_words", "max_clips", "data.batch_size", "data.micro_batches")
    check_tokens(config)
    for name, right in (
        ("utilisation", 0 < config.utilisation <= 1), ("margin", 0 <= config.margin < 1), ("network", config.network > 0),
        ("price", config.price is None or config.price >= 0),
    ):  # fmt: skip
        if not right:
            said = {
                "utilisation": "a share, more than 0",
                "margin": "a share, less than 1",
                "network": "more than 0",
                "price": "0 or more",
            }
            raise ValueError(f"{name} must be {said[name]}, got {config[name]}; set {name}")
    check_training(config)
    keys = plain(config.trainer) | {"compile": False}
    if config.devices is not None:
        nodes = math.gcd(config.devices, keys["num_nodes"])
        keys |= {"devices": config.devices // nodes, "num_nodes": nodes}
        sizes = keys["layout"]
        if None not in sizes.values() and math.prod(sizes.values()) != config.devices:
            keys["layout"] = sizes | {"replicate": None}
    hardware = Hardware(**keys)
    if config.measure and hardware.parallel.layout.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"measuring takes a process a device, {hardware.parallel.layout.world_size} of them; start the plan with torchrun "
            f"--nproc-per-node={hardware.devices}, or set measure=false"
        )
    return hardware


def find_buckets(config: DictConfig, network: Network, choice: Choice) -> tuple[list[Bucket], str | None]:
    """The buckets with the clips of their steps, and why it is not known how many clips there are, where it is not."""

    def tokens(shape: ClipShape) -> int:
        return network.tokens.grid(shape.num_frames, shape.height, shape.width).num_tokens

    def flops(shape: ClipShape) -> int:
        grid = network.tokens.grid(shape.num_frames, shape.height, shape.width)
        return TRAINING * sum(flops_by_part(network, grid, 1, config.caption_words).values())

    shapes = _shapes(config.data)
    costs = [float(flops(shape)) for shape in shapes]
    counts: list[int | None] = [None] * len(shapes)
    sizes, told = level(costs, config.data.batch_size), None
    if OmegaConf.is_missing(config.data, "shards") and not config.data.sources:
        told = "data.shards is not given"
    else:
        try:
            loader: ClipLoader = make(config.data, cost=lambda shape: float(flops(shape)), micro_batches=choice.parts)
            counts, sizes = [loader.report.count(number) for number in range(len(shapes))], loader.report.sizes
        except InstantiationException as error:
            if not isinstance(error.__cause__, BadDataError | OSError):
                raise
            told = str(error.__cause__)
    found = [Bucket(*each) for each in zip(shapes, map(tokens, shapes), map(int, costs), sizes, counts, strict=True)]
    return [bucket for bucket in found if bucket.count != 0], told


def _shapes(data: DictConfig) -> list[ClipShape]:
    default = {"num_frames": data.num_frames, "height": data.height, "width": data.width, "fps": float(data.fps)}
    buckets: Any = OmegaConf.to_container(data.buckets, resolve=True) if data.buckets else [{}]
    if unknown := [key for bucket in buckets for key in bucket if key not in default]:
        raise ValueError(f"data.buckets has no {unknown[0]}; it has {', '.join(default)}")
    return [ClipShape(**default | bucket) for bucket in buckets]


# --------------------------------------------------------------------------- a step


def predict_step(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Memory:
    """What the rank with most clips holds in a step of a bucket."""
    return predict(
        partial(_module, config, choice),
        partial(_batch, config, network, bucket, choice),
        choice.hardware,
    )


def estimate_step(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Memory:
    """The same from two networks of fewer blocks where there are many, several times as fast: all blocks hold as much."""
    depth = config.model.get("depth", 0)
    if depth <= 2 * sum(FEW):
        return predict_step(config, network, bucket, choice)
    few, more = (
        predict_step(OmegaConf.merge(config, {"model": {"depth": count}}), network, bucket, choice)  # type: ignore[arg-type]
        for count in FEW
    )
    return along(few, more, (depth - FEW[0]) / (FEW[1] - FEW[0]))


def unstarted(config: DictConfig) -> DictConfig:
    """A config without the run that it starts from, whose weights need not be there yet."""
    return OmegaConf.merge(config, {"init_from": None})  # type: ignore[return-value]


def _module(config: DictConfig, choice: Choice) -> VideoDiffusion:
    module = make_module(unstarted(config), None, choice.hardware)
    if module.network.text.is_frozen and not module.network.text.is_here:
        module.network.text.take_nothing(module.network.text.imagined(1))
    return module


def _batch(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Batch:
    """Random clips and captions, as many as the rank with most of them gets of a step."""
    ranks = choice.hardware.parallel.layout.data_size
    parts = Step(0, 0, 0, np.arange(bucket.clips)).micro_batches(choice.parts)
    sizes = max(
        ([max(len(part), 1) for part in parts[rank::ranks]] for rank in range(ranks)), key=lambda each: (max(each), sum(each))
    )
    count, shape = sum(sizes), bucket.shape
    size = (
        count,
        *token_grid(shape.num_frames, shape.height, shape.width, network.autoencoder.compression),
        network.autoencoder.channels,
    )
    pixels = isinstance(network.autoencoder, Pixels)
    video = torch.randint(0, 256, size, dtype=torch.uint8) if pixels else None
    latents = None if pixels else torch.randn(size)
    own = network.image_encoder
    image = None if own is None else torch.randn(count, own.tokens, own.dim)
    caption, text = " ".join(f"word{number}" for number in range(config.caption_words)), network.text
    encoded: list[Encoded | None] | None = None
    if text.is_frozen and not text.is_here:
        encoded = [text.imagined(config.caption_words) for _ in range(count)]
    return Batch(
        video, [caption] * count, ["random"] * count, torch.arange(count), shape.fps, parts=sizes, step_clips=bucket.clips,
        latents=latents, known=torch.randn(size) if network.takes_images and not pixels else None, image=image, encoded=encoded,
    )  # fmt: skip


def step_seconds(config: DictConfig, memory: Memory, hardware: Hardware, device: Device) -> tuple[float, str]:
    """How long a step takes, and what bounds it: products at the stated utilisation, memory or the exchange at their full bandwidth."""
    bounds = {
        "products": sum(memory.flops.values()) / (device.peak(hardware) * config.utilisation),
        "memory": 2 * sum(memory.made.values()) / device.bandwidth,  # what is made is written once and read once, at the least
        "exchange": sum(memory.sent.values()) / (config.network if hardware.num_nodes > 1 else device.interconnect),
    }
    longest = max(bounds, key=lambda name: bounds[name])
    return bounds[longest], longest


# --------------------------------------------------------------------------- what fits


def alternatives(choice: Choice, clips: int, heads: int) -> Iterator[list[Choice]]:
    """Other ways to take the same step, those that cost least first; each list has more and more micro-batches."""
    hardware = choice.hardware
    now = hardware.parallel.layout
    layouts = [now]
    layouts += [
        Layout(now.replicate // k, now.shard * k, now.context) for k in range(2, now.replicate + 1) if now.replicate % k == 0
    ]
    for k in (2, 4, 8):
        for replicate, shard in (
            {(now.replicate // k, now.shard), (now.replicate, now.shard // k)} if now.context * k <= heads else ()
        ):
            if replicate * shard * k == now.replicate * now.shard:
                layouts.append(Layout(replicate, shard, now.context * k))
    for recompute in STRONGER[STRONGER.index(hardware.recompute) :]:
        for layout in layouts:
            machine = replace(hardware, layout=layout, recompute=recompute)
            parts = math.lcm(choice.micro_batches, layout.data_size)
            own = -(-clips // layout.data_size)  # of a rank
            yield [
                Choice(machine, parts * 2**double)
                for double in range(12)
                if double == 0 or parts * 2**double < 2 * layout.data_size * own
            ]


def changes(before: Choice, after: Choice) -> list[str]:
    """The overrides that make one choice the other."""
    then, now = before.hardware, after.hardware
    found = [
        f"trainer.{name}={getattr(now, name)}"
        for name in ("devices", "num_nodes", "recompute")
        if getattr(then, name) != getattr(now, name)
    ]
    if now.layout != then.layout:
        found += [f"trainer.layout.{name}={size}" for name, size in vars(now.layout).items()]
    if after.micro_batches != before.micro_batches and after.parts != replace(after, micro_batches=before.micro_batches).parts:
        found.append(f"data.micro_batches={after.micro_batches}")
    return found


@dataclass(frozen=True)
class Found:
    """A way to take a step that was tried."""

    words: list[str]  # the overrides that lead to it
    memory: Memory
    seconds: float


class Search:
    """Tries other ways to take the steps of a bucket until one fits; remembers what needs least."""

    def __init__(self, config: DictConfig, network: Network, bucket: Bucket, choice: Choice, device: Device, room: float) -> None:
        self.config, self.network, self.bucket, self.choice, self.device, self.room = (
            config,
            network,
            bucket,
            choice,
            device,
            room,
        )
        self.heads = network.transformer.blocks[0].heads
        self.least: Found | None = None

    def tried(self, choice: Choice, words: Sequence[str] = ()) -> Found:
        words = [*changes(self.choice, choice), *words]
        memory = estimate_step(self.config, self.network, self.bucket, choice)
        found = Found(words, memory, step_seconds(self.config, memory, choice.hardware, self.device)[0])
        log.info("%s: %s", " ".join(words) or "as it is", with_unit(memory.peak, "B"))
        if self.least is None or memory.peak < self.least.memory.peak:
            self.least = found
        return found

    def cheapest(self, before: Found) -> Found | None:
        """The quickest way that fits, of those tried: the first of each way to recompute."""
        fitting: dict[str, Found] = {}
        for choices in alternatives(self.choice, self.bucket.clips, self.heads):
            recompute, layout = choices[0].hardware.recompute, choices[0].hardware.parallel.layout
            if any(found.seconds <= CHEAP * before.seconds for found in fitting.values()):
                break
            if recompute in fitting or self._kept(before.memory, layout) > self.room:
                continue
            last = self.tried(choices[-1])  # which needs least
            if last.memory.peak <= self.room:
                fitting[recompute] = next(
                    (found for c in choices[:-1] if (found := self.tried(c)).memory.peak <= self.room), last
                )
        return min(fitting.values(), key=lambda found: found.seconds, default=None)

    def _fewest(self, choices: Sequence[Choice], last: Found) -> Found:
        """The choice with fewest micro-batches that fits; the last one does."""
        low, high, best = 0, len(choices) - 1, last
        while low < high:
            middle = (low + high) // 2
            found = self.tried(choices[middle])
            low, high, best = (low, middle, found) if found.memory.peak <= self.room else (middle + 1, high, best)
        return best

    def _kept(self, memory: Memory, layout: Layout) -> float:
        """What is held between steps on another layout: weights, averages and optimisers are cut over shard x context ranks."""
        now = self.choice.hardware.parallel.layout
        held = sum(size for part, size in memory.most.items() if part in KEPT)
        return held * now.shard * now.context / (layout.shard * layout.context)

    def more_devices(self) -> Found | None:
        """The same with weights cut over more devices, everything recomputed and one clip in a micro-batch."""
        hardware = self.choice.hardware
        now = hardware.parallel.layout
        for times in (2, 4, 8, 16):
            layout = Layout(1, now.shard * now.replicate * times, now.context)
            size = (
                {"num_nodes": hardware.num_nodes * times}
                if int(hardware.devices) >= 8
                else {"devices": int(hardware.devices) * times}
            )
            machine = replace(hardware, **size, layout=layout, recompute="full")  # type: ignore[arg-type]
            own = -(-self.bucket.clips // layout.data_size)
            found = self.tried(Choice(machine, layout.data_size * own))
            if found.memory.peak <= self.room:
                return found
        return None


def suggestion(search: Search, before: Found) -> Iterator[str]:
    """What to change, in words that can be typed, and what it brings."""

    def told(found: Found) -> str:
        step = found.seconds / before.seconds
        return (
            f"  {' '.join(found.words)}\n  {with_unit(found.memory.peak, 'B')} at the peak, a step takes {step:.2f} times as long"
        )

    if found := search.cheapest(before):
        yield "To make it fit, the quickest of what was tried:"
        yield told(found)
        return
    least = search.least or before
    yield f"Nothing on as many devices fits; {' '.join(least.words) or 'as it is'} needs least, {with_unit(least.memory.peak, 'B')}"
    parts = sorted(least.memory.peaks[least.memory.worst].items(), key=lambda item: -item[1])[:3]
    largest = ", ".join(f"{part} {with_unit(size, 'B')}" for part, size in parts)
    yield f"at the peak of the {least.memory.worst}: {largest}."
    if found := search.more_devices():
        yield "On more devices it fits:"
        yield told(found)
    else:
        yield "Nor on sixteen times as many devices; a smaller model, shorter clips or optimisers=adamw need less."


# --------------------------------------------------------------------------- tables


def _head(config: DictConfig, network: Network, hardware: Hardware, device: Device) -> Iterator[str]:
    layout, peak = hardware.parallel.layout, with_unit(device.peak(hardware))
    parts = parameters_by_part(network)
    yield f"parameters   {sum(parts.values()):,}, {parts.get('text encoder', 0):,} of them the text encoder's"
    yield (
        f"devices      {layout.world_size} x {device.name}: replicate {layout.replicate} x shard {layout.shard} x "
        f"context {layout.context}, {hardware.precision}, recompute {hardware.recompute}"
    )
    yield (f"assumed      {config.utilisation:.0%} of {peak}FLOP/s in products; captions of {config.caption_words} words")
    if hardware.accelerator == "cpu":
        yield "note         trainer.accelerator is cpu: the memory is that of a CPU's precision rules; trainer=gpu plans a GPU's"
    if not isinstance(network.autoencoder, Pixels):
        size = "x".join(map(str, network.autoencoder.compression))
        made = "" if network.autoencoder.can_decode else "; autoencoder.folder is null, so they come from a cache"
        yield f"note         clips are latents of {size} pixels{made}; the time of encoding is not planned"
    if config.trainer.compile:
        yield "note         trainer.compile is left out: compiled blocks keep other activations, most often fewer"


def _steps(buckets: Sequence[Bucket], found: Sequence[Memory], seconds: Sequence[tuple[float, str]], devices: int) -> Table:
    table = table_of(
        "Steps",
        "clips",
        "of a step",
        "tokens each",
        "tokens",
        "FLOPs",
        "seconds",
        "bound by",
        "peak",
        "device-hours per 1,000 clips",
    )
    for bucket, memory, (time, bound) in zip(buckets, found, seconds, strict=True):
        hours = time * devices / 3600 * 1000 / bucket.clips
        table.add_row(
            str(bucket.shape), f"{bucket.clips}", f"{bucket.tokens:,}", f"{bucket.tokens * bucket.clips:,}",
            with_unit(bucket.flops * bucket.clips), f"{time:.3g}", bound, with_unit(memory.peak, "B"), f"{hours:.3g}",
        )  # fmt: skip
    return table


def _memory(memory: Memory, bucket: Bucket, beside: Mapping[str, int]) -> Table:
    table = table_of(f"Memory of a rank at the peak of each phase, {bucket.shape}", "part", *PHASES)
    parts = dict.fromkeys(part for phase in PHASES for part in memory.peaks[phase])
    for part in sorted(parts, key=lambda part: (part not in KEPT, part)):
        table.add_row(part, *(with_unit(memory.peaks[phase].get(part, 0), "B") for phase in PHASES))
    for part, size in beside.items():
        if size:
            table.add_row(f"{part}, frozen", *[with_unit(size, "B")] * len(PHASES))
    table.add_section()
    held = sum(beside.values())
    table.add_row("all", *(with_unit(sum(memory.peaks[phase].values()) + held, "B") for phase in PHASES))
    return table


def cost_lines(
    config: DictConfig, buckets: Sequence[Bucket], seconds: Sequence[float], devices: int, told: str | None
) -> Iterator[str]:
    """What a pass over the clips and the whole run cost; where clips are not known, the run as if all buckets came equally often."""

    def cost(steps: Sequence[float]) -> str:
        time = sum(each * count for each, count in zip(seconds, steps, strict=True))
        flops = sum(bucket.flops * bucket.clips * count for bucket, count in zip(buckets, steps, strict=True))
        hours = time * devices / 3600
        money = "" if config.price is None else f", {hours * config.price:,.2f} at {config.price:g} an hour"
        return f"{sum(steps):,.0f} steps, {with_unit(flops)}FLOPs, {_time(time)}, {hours:.3g} device-hours{money}"

    counts = [bucket.count for bucket in buckets]
    known = [count for count in counts if count is not None]
    if len(known) == len(counts):
        clips = sum(known)
        per_pass = [count / bucket.clips for count, bucket in zip(known, buckets, strict=True)]
        yield f"a pass       {clips:,} clips: {cost(per_pass)}"
        run = [steps * config.max_clips / clips for steps in per_pass]
    else:
        yield f"a pass       not known yet: {told}"
        run = [config.max_clips / sum(bucket.clips for bucket in buckets)] * len(buckets)
    yield f"the run      max_clips={config.max_clips:,}: {cost(run)}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


# --------------------------------------------------------------------------- measuring


def measured(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> tuple[Memory, Memory, int | None]:
    """Predicted and measured memory of two real steps taken here, and what torch's allocator says of a GPU."""
    hardware = choice.hardware
    on_gpu = hardware.accelerator != "cpu" and torch.cuda.is_available()
    choice = replace(choice, hardware=replace(hardware, accelerator=hardware.accelerator if on_gpu else "cpu"))
    predicted = predict_step(config, network, bucket, choice)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    make_batch = partial(_batch, config, network, bucket, choice)
    found = measure(partial(_module, config, choice), make_batch, choice.hardware)
    return predicted, found, torch.cuda.max_memory_allocated() if on_gpu else None


def _measured(predicted: Memory, found: Memory, allocated: int | None) -> Table:
    where = "this CPU" if allocated is None else torch.cuda.get_device_name()
    table = table_of(f"Two steps taken on {where}", "most held", "predicted", "measured", "error")
    rows = {part: (predicted.most.get(part, 0), size) for part, size in found.most.items()}
    rows |= {f"peak of the {phase}": (sum(predicted.peaks[phase].values()), sum(found.peaks[phase].values())) for phase in PHASES}
    rows["peak"] = (predicted.peak, found.peak)
    if allocated is not None:
        rows["peak by torch's allocator"] = (predicted.peak, allocated)
    for name, (one, other) in rows.items():
        table.add_row(name, with_unit(one, "B"), with_unit(other, "B"), f"{one / other - 1:+.1%}" if other else "")
    return table
