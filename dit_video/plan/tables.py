"""What a plan tells, as lines and tables."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from omegaconf import DictConfig
from rich.table import Table

from dit_video.info import table_of, with_unit
from dit_video.model.autoencoders import Pixels
from dit_video.model.cost import parameters_by_part
from dit_video.model.network import Network
from dit_video.plan.step import Bucket, Device
from dit_video.trainer.fit import Hardware
from dit_video.trainer.memory import KEPT, PHASES, Memory


def head_lines(config: DictConfig, network: Network, hardware: Hardware, device: Device) -> Iterator[str]:
    """What is planned, on what, and what is taken for granted."""
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


def steps_table(buckets: Sequence[Bucket], found: Sequence[Memory], seconds: Sequence[tuple[float, str]], devices: int) -> Table:
    """The steps of each bucket: how large, how long, what bounds them, and what a rank holds at the peak."""
    columns = (
        "clips", "of a step", "tokens each", "tokens", "FLOPs", "seconds", "bound by", "peak", "device-hours per 1,000 clips",
    )  # fmt: skip
    table = table_of("Steps", *columns)
    for bucket, memory, (time, bound) in zip(buckets, found, seconds, strict=True):
        hours = time * devices / 3600 * 1000 / bucket.clips
        table.add_row(
            str(bucket.shape), f"{bucket.clips}", f"{bucket.tokens:,}", f"{bucket.tokens * bucket.clips:,}",
            with_unit(bucket.flops * bucket.clips), f"{time:.3g}", bound, with_unit(memory.peak, "B"), f"{hours:.3g}",
        )  # fmt: skip
    return table


def memory_table(memory: Memory, bucket: Bucket, beside: Mapping[str, int]) -> Table:
    """What the rank with most clips holds, by part and phase, and beside it what is frozen, in bytes."""
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


def measured_table(predicted: Memory, found: Memory, allocated: int | None) -> Table:
    """A prediction beside what was measured, and beside what torch's allocator says of a GPU."""
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
