"""How far what was generated is from the true distribution of what a caption left open."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Outcome = TypeVar("Outcome", bound=Hashable)


def total_variation(p: Mapping[Outcome, float], q: Mapping[Outcome, float]) -> float:
    """Half the sum of absolute differences of two distributions, in [0, 1]; what is absent has probability 0.

    ValueError where either does not sum to 1.
    """
    for each in (p, q):
        if abs(sum(each.values()) - 1) > 1e-6:
            raise ValueError(f"a distribution sums to 1, got {sum(each.values())}")
    return sum(abs(p.get(key, 0) - q.get(key, 0)) for key in p.keys() | q.keys()) / 2


def frequencies(outcomes: Iterable[Outcome]) -> dict[Outcome, float]:
    """The share of each outcome; ValueError where there is none."""
    counts = Counter(outcomes)
    if not counts:
        raise ValueError("frequencies need at least one outcome")
    return {outcome: count / counts.total() for outcome, count in counts.items()}
