"""Which clip comes when: pure functions of (seed, slot), the seam for the exact elastic plan.

A *slot* is the number of a clip in the global stream. Step s is slots s * batch_size to (s + 1) * batch_size - 1, and a slot
names its record through a permutation of its pass over the data. Nothing here knows ranks, workers or what was read before, so
the state of the whole data room is one integer, the step: to resume is to ask for the next one, at any world size. A plan with
buckets, mixtures or weighted micro-batches takes the place of Plan by answering the same two questions, `slots` and
`record_index`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int


@lru_cache(maxsize=4)
def permutation(num_clips: int, seed: int, pass_number: int) -> Int[np.ndarray, " clips"]:
    """The order of one pass over the data; from raw bits, whose stream numpy promises never to change."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, pass_number])).random_raw(num_clips)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class Plan:
    """Every clip once per pass, in a seeded order that differs from pass to pass."""

    num_clips: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, value, least in (("num_clips", self.num_clips, 1), ("batch_size", self.batch_size, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ValueError(f"a data plan needs {name} of at least {least}, got {value}; set data.{name}")

    def slots(self, step: int) -> list[int]:
        """The slots of one step, in order."""
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))

    def record_index(self, slot: int) -> int:
        """Which of the num_clips records fills a slot."""
        pass_number, place = divmod(slot, self.num_clips)
        return int(permutation(self.num_clips, self.seed, pass_number)[place])
