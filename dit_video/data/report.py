"""What the data is, before the first step: clips of every bucket and source, what a step costs, and what was refused."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.data.buckets import LEFT_OUT, NO_SHAPE, NOT_FETCHED, TOO_SHORT, ClipShape, spread

log = logging.getLogger(__name__)

REASONS = {
    TOO_SHORT: "shorter than every bucket", NO_SHAPE: "of unknown size", LEFT_OUT: "beyond max_clips",
    NOT_FETCHED: "not fetched by the tool that downloaded them",
}  # fmt: skip


@dataclass(frozen=True)
class SourceReport:
    """A source as it was asked for."""

    name: str
    weight: float
    num_shards: int


@dataclass(frozen=True)
class DataReport:
    """The clips of a loader by bucket and source."""

    shapes: Sequence[ClipShape]
    sizes: list[int]  # clips of a step, of each bucket
    costs: Sequence[float]  # of a clip of each bucket, in any unit
    tokens: Sequence[int]  # of a clip of each bucket, as the model counts them; 0 where nothing says
    sources: Sequence[SourceReport]
    bucket: np.ndarray  # of every clip; below 0 where it was refused
    source: np.ndarray  # of every clip
    problems: list[str]  # of shards

    def count(self, bucket: int, source: int | None = None) -> int:
        """Clips of a bucket, of one source or of all."""
        mine = self.bucket == bucket
        return int((mine if source is None else mine & (self.source == source)).sum())

    def refused(self) -> str:
        """How many clips are in no bucket, and why."""
        counts = Counter(self.bucket[self.bucket < 0].tolist())
        return ", ".join(f"{count} {REASONS[kind]}" for kind, count in sorted(counts.items())) or "none"

    def lines(self) -> list[str]:
        """The report in words, a line a bucket."""
        used = [number for number in range(len(self.shapes)) if self.count(number)]
        found = [
            f"{int((self.bucket >= 0).sum())} clips in {len(used)} of {len(self.shapes)} buckets; left out: {self.refused()}"
        ]
        for number, (shape, size) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            by_source = ", ".join(f"{source.name} {self.count(number, i)}" for i, source in enumerate(self.sources))
            cost = self.costs[number] * size / (self.costs[0] * self.sizes[0])
            tokens = f" of {self.tokens[number]} tokens" if self.tokens[number] else ""
            found.append(f"  {shape}: {self.count(number)} clips{tokens} ({by_source}), {size} a step, cost of a step {cost:.3f}")
        if len(used) > 1:
            share = spread([self.costs[number] for number in used], [self.sizes[number] for number in used])
            found.append(f"  steps cost the same within {share:.1%}")
        return found

    def log(self) -> None:
        """Says the report in the log, and warns of damaged shards."""
        for line in self.lines():
            log.info(line)
        for problem in self.problems:
            log.warning("damaged: %s", problem)

    def about(self) -> dict[str, Any]:
        """The report as what JSON can hold."""
        buckets = [
            {
                "shape": vars(shape), "clips": {source.name: self.count(number, i) for i, source in enumerate(self.sources)},
                "clips_per_step": self.sizes[number], "tokens_per_clip": self.tokens[number], "cost_per_clip": self.costs[number],
            }
            for number, shape in enumerate(self.shapes)
        ]  # fmt: skip
        refused = {REASONS[kind]: int((self.bucket == kind).sum()) for kind in REASONS}
        return {
            "buckets": buckets,
            "sources": [vars(each) for each in self.sources],
            "refused": refused,
            "problems": self.problems,
        }
