"""A new metric: how much brightness jumps from frame to frame."""

from collections.abc import Sequence

import numpy as np

from dit_video.eval.estimate import Estimate, bootstrap_mean
from dit_video.eval.judge import Metric
from dit_video.sampler.generate import Request


class Flicker(Metric):
    """The mean absolute change of a frame's mean brightness to the next, in grey levels; 0 is steady."""

    protocol = (
        "mean over clips of the mean absolute change of mean brightness between neighbouring frames, bootstrap 95% interval"
    )

    def __init__(self, suites: Sequence[str] | None = None) -> None:
        self.suites = suites

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        changes = [float(np.abs(np.diff(video.mean(axis=(1, 2, 3)))).mean()) for video in videos]
        return {"grey_levels": bootstrap_mean(changes, seed=0)}
