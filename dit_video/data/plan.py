"""Which clip comes when: pure functions of (seed, step), so that the state of the whole data room is one integer.

The stream is one sequence of *steps*. A step holds clips of one bucket alone, cut into micro-batches; rank r of w takes micro-batches
r, r + w, ... A *slot* is the number of a clip in the stream: the seed of everything random about it. Nothing here knows ranks, workers or
what was read before: to resume is to ask for the next step, at any number of ranks.

Every bucket walks through the clips of every source in passes, each in an order of its own, and takes up where its last step ended, so
what a pass leaves over opens the next one, and nothing is dropped for being rare. Sources share a bucket's clips, and buckets share the
steps, evenly in time and in proportion to the weights of the sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from dit_video.seeding import fraction

CHUNK = 1024  # steps whose buckets are worked out at once
PATTERN = 4096  # clips over which a bucket's sources are dealt out; a share is exact to one in so many


@dataclass(frozen=True)
class Step:
    """The clips of one step, in order."""

    number: int
    bucket: int
    first_slot: int
    records: Int[np.ndarray, " clips"]  # numbers of the clips' records, as the plan was given them

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + len(self.records))

    def micro_batches(self, count: int) -> list[range]:
        """The step's places 0, 1, ... in so many parts, which differ by one clip at the most."""
        bounds = [number * len(self.records) // count for number in range(count + 1)]
        return [range(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


class Plan:
    """The endless sequence of steps over clips that are sorted into buckets and sources.

    `records[bucket][source]` are the numbers of the records there, `sizes[bucket]` is how many clips a step of a bucket holds, and
    `weights[source]` the sources' shares of all clips. ValueError, naming the key to change, where there is nothing to plan.
    """

    def __init__(
        self, records: Sequence[Sequence[Int[np.ndarray, " clips"]]], sizes: Sequence[int], weights: Sequence[float], seed: int
    ) -> None:
        if not (isinstance(seed, int) and seed >= 0):
            raise ValueError(f"a data plan needs a seed of at least 0, got {seed}; set data.seed")
        if not all(size >= 1 for size in sizes):
            raise ValueError(f"a step holds at least 1 clip, got {list(sizes)}; set data.batch_size")
        if not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(f"sources need weights of 0 or more, some above it, got {list(weights)}; set data.sources")
        self.records, self.sizes, self.weights, self.seed = records, list(sizes), list(weights), seed
        totals = [sum(len(bucket[source]) for bucket in records) for source in range(len(weights))]
        empty = [source for source, total in enumerate(totals) if weights[source] > 0 and not total]
        if empty:
            raise ValueError(f"source {empty[0]} has a weight and no usable clip; set its weight to 0, or mend data.shards")
        # Of every clip of the stream, how much falls to a bucket's source: a source's weight, spread over its clips.
        each = [weight / sum(weights) / max(total, 1) for weight, total in zip(weights, totals, strict=True)]
        shares = [[share * len(clips) for share, clips in zip(each, bucket, strict=True)] for bucket in records]
        self.num_clips = sum(total for total, weight in zip(totals, weights, strict=True) if weight > 0)  # that ever come up
        self.patterns = [_Pattern(bucket) for bucket in shares]
        steps = np.array([sum(bucket) / size for bucket, size in zip(shares, sizes, strict=True)])
        self.rates = steps / steps.sum()  # steps of each bucket for every step
        self.starts = np.array([fraction(seed, "bucket", bucket) for bucket in range(len(sizes))])
        self._chunk = lru_cache(maxsize=4)(self._work_out)
        self._orders: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}

    def step(self, number: int) -> Step:
        """Step `number` of the stream, from 0."""
        chunk = number // CHUNK
        while self._chunk(chunk)[0] > number:  # chunks hold CHUNK steps, give or take one a bucket
            chunk -= 1
        while self._chunk(chunk + 1)[0] <= number:
            chunk += 1
        first, buckets, turns, slots = self._chunk(chunk)
        place = number - first
        bucket = int(buckets[place])
        return Step(number, bucket, int(slots[place]), self._clips(bucket, int(turns[place])))

    def clips_before(self, number: int) -> Int[np.ndarray, "buckets sources"]:
        """How many clips of each bucket and source the steps before this one hold."""
        turns = np.zeros(len(self.sizes), np.int64)
        chunk = max(number // CHUNK - 1, 0)
        while chunk > 0 and self._chunk(chunk)[0] > number:
            chunk -= 1
        turns += self._turns(chunk * CHUNK)
        while self._chunk(chunk)[0] < number:
            first, buckets, _, _ = self._chunk(chunk)
            turns += np.bincount(buckets[: number - first], minlength=len(turns))
            chunk += 1
        return np.stack(
            [
                pattern.before(int(turn) * size, len(self.weights))
                for pattern, turn, size in zip(self.patterns, turns, self.sizes, strict=True)
            ]
        )

    def _turns(self, time: int) -> Int[np.ndarray, " buckets"]:
        """How many steps of each bucket lie before a time: turn q of a bucket comes at (q + its start) / its rate."""
        return np.maximum(np.ceil(time * self.rates - self.starts), 0).astype(np.int64)

    def _work_out(self, chunk: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The number of a chunk's first step; and of each of its steps the bucket, the turn of that bucket, and the first slot."""
        before, after = self._turns(chunk * CHUNK), self._turns((chunk + 1) * CHUNK)
        counts = after - before
        buckets = np.repeat(np.arange(len(counts)), counts)
        turns = np.concatenate([np.arange(start, end) for start, end in zip(before, after, strict=True)])
        times = (turns + self.starts[buckets]) / np.maximum(self.rates[buckets], 1e-300)
        order = np.lexsort((buckets, times))
        sizes = np.array(self.sizes)
        slots = before @ sizes + np.concatenate([[0], np.cumsum(sizes[buckets[order]])[:-1]])
        return int(before.sum()), buckets[order], turns[order], slots[: len(order)]

    def _clips(self, bucket: int, turn: int) -> Int[np.ndarray, " clips"]:
        size = self.sizes[bucket]
        sources, places = self.patterns[bucket].deal(np.arange(turn * size, (turn + 1) * size))
        chosen = np.empty(size, np.int64)
        for source in np.unique(sources):
            mine, clips = sources == source, self.records[bucket][source]
            passes, offsets = np.divmod(places[mine], len(clips))
            for number in np.unique(passes):
                order = self._order(bucket, int(source), int(number), len(clips))
                chosen[np.flatnonzero(mine)[passes == number]] = clips[order[offsets[passes == number]]]
        return chosen

    def _order(self, bucket: int, source: int, number: int, count: int) -> Int[np.ndarray, " clips"]:
        """The order of one pass; of each bucket and source the last two passes are remembered."""
        kept = self._orders.setdefault((bucket, source), [])
        for known, order in kept:
            if known == number:
                return order
        kept.append((number, permutation(count, self.seed, bucket, source, number)))
        del kept[:-2]
        return kept[-1][1]


def permutation(count: int, *seed: int) -> Int[np.ndarray, " clips"]:
    """A random order; from raw bits, whose stream numpy promises never to change."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.uint32 if count < 2**32 else np.int64)


class _Pattern:
    """How the clips of a bucket are dealt to its sources: every PATTERN clips the same way, each source's spread evenly."""

    def __init__(self, shares: Sequence[float]) -> None:
        total = sum(shares)
        exact = np.array(shares) / total * PATTERN if total else np.zeros(len(shares))
        counts = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(int)
        while total and counts.sum() < PATTERN:  # the largest remainder first
            counts[int(np.argmax(exact - counts))] += 1
        while total and counts.sum() > PATTERN:  # where tiny shares were raised to 1
            counts[int(np.argmin(np.where(counts > 1, exact - counts, np.inf)))] -= 1
        owners = np.repeat(np.arange(len(counts)), counts)
        times = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        self.counts = counts
        self.owners = owners[np.lexsort((owners, times))]
        self.ranks = np.zeros(len(self.owners), np.int64)  # how many of the same source come before
        for source in range(len(counts)):
            self.ranks[self.owners == source] = np.arange(counts[source])

    def deal(self, clips: Int[np.ndarray, " clips"]) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of these clips of the bucket, and its number among all that the source gives to the bucket."""
        rounds, places = np.divmod(clips, PATTERN)
        owners = self.owners[places]
        return owners, rounds * self.counts[owners] + self.ranks[places]

    def before(self, clips: int, num_sources: int) -> Int[np.ndarray, " sources"]:
        """How many of the bucket's first so many clips each source gives."""
        rounds, rest = divmod(clips, PATTERN)
        return rounds * self.counts + np.bincount(self.owners[:rest], minlength=num_sources)
