"""Other ways to take a step where it does not fit, none of which changes what it computes."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from dit_video.info import with_unit
from dit_video.model.network import Network
from dit_video.plan.step import Bucket, Choice, Device, estimate_step, step_seconds
from dit_video.trainer.layout import Layout
from dit_video.trainer.memory import KEPT, Memory
from dit_video.trainer.parallel import Recompute

log = logging.getLogger(__name__)

STRONGER: tuple[Recompute, ...] = ("none", "selective", "full")  # ways to recompute, each saving more memory than the one before
CHEAP = 1.1  # a change that slows a step by no more than this is taken without looking at costlier ones


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
        self.config, self.network, self.bucket, self.choice = config, network, bucket, choice
        self.device, self.room = device, room
        self.heads = network.transformer.blocks[0].heads
        self.least: Found | None = None

    def tried(self, choice: Choice) -> Found:
        """What a choice takes."""
        words = changes(self.choice, choice)
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
                fitting[recompute] = self._fewest(choices, last)
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
