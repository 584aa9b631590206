"""A number, how sure it is, and from how many samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured value with the ends of its confidence interval and the number of independent samples behind it."""

    value: float
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, self.low, self.high)):
            raise ValueError(f"an estimate must be finite, got {self.value} in [{self.low}, {self.high}]")
        if self.count < 1:
            raise ValueError(f"an estimate needs at least one sample, got {self.count}")

    def to_dict(self) -> dict[str, float | int]:
        """Value, low, high and count as plain numbers for JSON."""
        return asdict(self)


def wilson(successes: int, count: int, level: float = 0.95) -> Estimate:
    """The fraction successes / count with Wilson's score interval (Wilson 1927), which holds near 0 and 1 as well.

    Raises ValueError for no samples or successes outside [0, count].
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a fraction needs 0 <= successes <= count and count >= 1, got {successes} of {count}")
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    value = successes / count
    middle = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    return Estimate(value, max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half)), count)


def fraction(outcomes: Sequence[bool], level: float = 0.95) -> Estimate:
    """How often an outcome was true, see `wilson`."""
    return wilson(sum(bool(outcome) for outcome in outcomes), len(outcomes), level)


def bootstrap(
    values: np.ndarray | Sequence[float],
    statistic: Callable[[np.ndarray], float],
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """A statistic of n independent samples (rows) with its percentile bootstrap interval (Efron 1979).

    Raises ValueError for no samples or a value that is not finite. One sample gives an interval of width zero: look at the count.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("cannot estimate from no samples; raise the suite's count")
    if not np.isfinite(rows).all():
        broken = int((~np.isfinite(rows)).any(axis=tuple(range(1, rows.ndim))).sum())
        raise ValueError(f"cannot estimate from values that are not finite: {broken} of {len(rows)}")
    tail = (1 - _checked(level)) / 2
    rng = np.random.default_rng(seed)
    draws = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(statistic(rows)), float(low), float(high), len(rows))


def bootstrap_mean(values: np.ndarray | Sequence[float], seed: int, level: float = 0.95) -> Estimate:
    """The mean of independent samples with its percentile bootstrap interval, see `bootstrap`."""
    return bootstrap(values, lambda rows: float(rows.mean()), seed, level)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return level
