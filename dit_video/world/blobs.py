"""Connected components of all frames at once."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Blobs:
    """Connected groups of pixels (corners touch too), in no order; boxes are half open."""

    frame: Int[np.ndarray, " k"]
    pixels: Int[np.ndarray, " k"]
    left: Int[np.ndarray, " k"]
    top: Int[np.ndarray, " k"]
    right: Int[np.ndarray, " k"]
    bottom: Int[np.ndarray, " k"]


def find_blobs(mask: Bool[np.ndarray, "T H W"]) -> Blobs:
    """Every connected component of each frame, found over runs of pixels rather than pixels."""
    num_frames, height, width = mask.shape
    stride = width + 2  # a free column at both ends, so that runs of neighbouring rows never touch
    padded = np.zeros((num_frames * (height + 1), stride), np.int8)
    padded.reshape(num_frames, height + 1, stride)[:, 1:, 1:-1] = mask
    change = np.diff(padded.reshape(-1), prepend=np.int8(0))
    start, end = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    # A run touches the runs of the row below that overlap it, widened by one pixel for corners; frames have an empty row between.
    first = np.searchsorted(end, start + stride, side="left")
    last = np.searchsorted(start, end + stride, side="right")
    counts = np.maximum(last - first, 0)
    above = np.repeat(np.arange(len(start)), counts)
    below = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    label = _join(len(start), above, below)
    roots, index = np.unique(label, return_inverse=True)
    row, column = start // stride, start % stride - 1
    size = end - start
    return Blobs(
        frame=row[roots] // (height + 1),
        pixels=np.bincount(index, size, len(roots)).astype(int),
        left=_extreme(np.minimum, index, column, len(roots)),
        top=_extreme(np.minimum, index, row % (height + 1) - 1, len(roots)),
        right=_extreme(np.maximum, index, column + size, len(roots)),
        bottom=_extreme(np.maximum, index, row % (height + 1), len(roots)),
    )


def _join(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The least member of each connected group of nodes, per node."""
    label = np.arange(count)
    while True:
        least = np.minimum(label[one], label[other])
        previous = label.copy()
        np.minimum.at(label, previous[one], least)
        np.minimum.at(label, previous[other], least)
        label = label[label]
        if np.array_equal(label, previous):
            return label


def _extreme(ufunc: np.ufunc, index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    found = np.full(count, np.iinfo(int).max if ufunc is np.minimum else np.iinfo(int).min)
    ufunc.at(found, index, values)
    return found
