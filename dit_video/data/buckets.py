"""Buckets: clips of many durations, rates, sizes and aspects, made into few shapes, each step of the stream holding one of them.

A clip goes to the bucket that keeps most of it: the nearest aspect ratio first, then the longest duration it fills, then the largest
picture it need not be enlarged for. Steps of different buckets hold so many clips that all cost about the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

TOO_SHORT, NO_SHAPE, LEFT_OUT, NOT_FETCHED = -1, -2, -3, -4  # in place of a bucket's number: why a clip is not used
MISSING_FRAMES = 0.5  # of a frame's duration may be missing at a clip's end, as in decode.py
SAME = 1e-6  # relative; nearer numbers are equal


@dataclass(frozen=True)
class ClipShape:
    """What every clip of a bucket is made into; one frame is an image, whose fps says nothing."""

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"a clip needs a positive {name}, got {value}; set data.{name}")

    @property
    def seconds(self) -> float:
        """What a source has to last."""
        return self.num_frames / self.fps if self.num_frames > 1 else 0.0

    @property
    def num_bytes(self) -> int:
        return self.num_frames * self.height * self.width * 3

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return f"{self.num_frames} frames {size} at {self.fps:g} fps" if self.num_frames > 1 else f"image {size}"


def assign(
    shapes: Sequence[ClipShape],
    frames: Int[np.ndarray, " clips"],
    fps: Float[np.ndarray, " clips"],
    height: Int[np.ndarray, " clips"],
    width: Int[np.ndarray, " clips"],
) -> Int[np.ndarray, " clips"]:
    """The number of each clip's bucket, or TOO_SHORT; sources of one frame go to buckets of images, and only they do where others exist.

    Videos go to buckets of one frame only where there is no other bucket. NO_SHAPE where the index knows no size.
    """
    known = (frames > 0) & (height > 0) & (width > 0)
    aspect = np.log(np.maximum(height, 1) / np.maximum(width, 1))
    area = height.astype(np.float64) * width
    seconds = np.where(frames > 1, frames / np.maximum(fps, 1e-9), 0.0)
    only_images = all(shape.num_frames == 1 for shape in shapes)
    chosen = np.full(len(frames), TOO_SHORT, np.int64)
    best = np.full((3, len(frames)), np.inf)  # what has been chosen so far loses in aspect, duration, enlargement
    for number, shape in enumerate(shapes):
        fits = (seconds >= shape.seconds - MISSING_FRAMES / shape.fps - SAME) if shape.num_frames > 1 else frames == 1
        if shape.num_frames == 1 and only_images:
            fits = frames >= 1
        own = shape.height * shape.width
        loss = np.stack(
            [
                np.abs(aspect - np.log(shape.height / shape.width)),
                np.full(len(frames), -shape.seconds),
                np.where(area >= own, area / own, 1e6 * own / np.maximum(area, 1)),  # enlarging is worse than any reduction
            ]
        )
        better = _earlier(loss, best) & fits & known
        chosen[better], best[:, better] = number, loss[:, better]
    return np.where(known, chosen, NO_SHAPE)


def _earlier(one: Float[np.ndarray, "3 clips"], other: Float[np.ndarray, "3 clips"]) -> np.ndarray:
    """Whether one triple comes before the other, the first difference deciding."""
    less = [a < b - SAME * np.maximum(1, np.abs(a)) for a, b in zip(one, other, strict=True)]
    more = [a > b + SAME * np.maximum(1, np.abs(a)) for a, b in zip(one, other, strict=True)]
    return less[0] | (~more[0] & (less[1] | (~more[1] & less[2])))


def level(costs: Sequence[float], batch_size: int, first: int = 0) -> list[int]:
    """How many clips a step of each bucket holds, so that steps cost alike.

    One bucket holds batch_size. Of several the first (the number of one that has clips) holds about so many: up to a fifth more or fewer
    where that levels the costs.
    ValueError where a cost is not positive.
    """
    if not all(cost > 0 for cost in costs):
        raise ValueError(f"every bucket's clips must cost something, got {list(costs)}")
    if len(costs) == 1:
        return [batch_size]
    relative = np.array(costs, np.float64) / costs[first]
    targets = batch_size * np.linspace(0.8, 1.2, 401)  # in clips of the first bucket
    counts = np.maximum(1, np.rint(targets[:, None] / relative))
    spent = counts * relative
    uneven = spent.max(1) / spent.min(1) + 0.02 * np.abs(
        targets / batch_size - 1
    )  # of equals the one nearest to what was asked for
    return counts[int(uneven.argmin())].astype(int).tolist()


def spread(costs: Sequence[float], sizes: Sequence[int]) -> float:
    """The greatest distance of a bucket's step from the middle of the costliest and the cheapest, as a share of it."""
    spent = [cost * size for cost, size in zip(costs, sizes, strict=True)]
    return (max(spent) - min(spent)) / (max(spent) + min(spent))
