"""Suites ask for videos, metrics look at them: every number with its protocol, count and interval."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.eval.estimate import Estimate
from dit_video.sampler.generate import Request

Generate = Callable[[list[Request]], list[np.ndarray]]  # uint8 T H W 3 of exactly the asked size, in order


@dataclass(frozen=True)
class Judgement:
    """Whether one clip is right, and why not, in words for the gallery."""

    right: bool
    reason: str


class Suite(ABC):
    """A fixed list of requests that knows the truth about each; the same arguments always give the same list."""

    protocol: str  # what is asked for, how often and from which seeds, in one sentence

    @abstractmethod
    def requests(self) -> Sequence[Request]:
        """The clips to sample, all of one size."""


class Metric(ABC):
    """Numbers read off the videos of one suite.

    A new metric is one subclass and one entry under `metrics` in the eval config.
    """

    protocol: str  # what is measured, how, and with what interval, in one sentence
    suites: Sequence[str] | None = None  # names of the suites it looks at; None is all that suit it

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether these requests carry what the metric needs to know."""
        return True

    @abstractmethod
    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """The metric's fields, by name, from videos (uint8 T H W 3) in the order of their requests."""

    def judgements(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> list[Judgement] | None:
        """A verdict for each clip, if the metric has one."""
        return None


@dataclass(frozen=True)
class Clip:
    """One sampled video with the request it answers and what was found about it."""

    suite: str
    request: Request
    video: np.ndarray  # uint8 T H W 3
    judgement: Judgement | None = None


@dataclass
class Evaluation:
    """What was measured, under which protocol, and the clips it was measured on."""

    protocol: dict[str, str] = field(default_factory=dict)  # of every suite and metric, by name
    metrics: dict[str, Estimate] = field(default_factory=dict)  # "<metric>.<suite>.<field>"
    clips: list[Clip] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Protocol and metrics as JSON data."""
        return {"protocol": self.protocol, "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()}}

    def write(self, path: Path) -> None:
        """Writes evaluation.json; an earlier file stays whole until the new one is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(path.suffix + ".part")
        unfinished.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def evaluate(suites: Mapping[str, Suite], metrics: Mapping[str, Metric], generate: Generate, batch_size: int) -> Evaluation:
    """Samples every suite once, in batches, and applies to its videos all metrics that look at it.

    Raises ValueError, before the first sample, for a metric that names an unknown suite and a suite that asks for nothing or
    for several sizes; and where `generate` returns something else than asked for.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one clip, got {batch_size}; set eval.batch_size")
    asked = {name: list(suite.requests()) for name, suite in suites.items()}
    plan = _plan(asked, metrics)
    evaluation = Evaluation({f"suite.{name}": suite.protocol for name, suite in suites.items()})
    for name, requests in asked.items():
        videos: list[np.ndarray] = []
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            videos += _checked(name, part, generate(part))
        judgements: list[Judgement] | None = None
        for metric_name in plan[name]:
            metric = metrics[metric_name]
            evaluation.protocol[f"metric.{metric_name}"] = metric.protocol
            for label, estimate in metric(requests, videos).items():
                evaluation.metrics[f"{metric_name}.{name}.{label}"] = estimate
            judgements = judgements or metric.judgements(requests, videos)
        verdicts: Sequence[Judgement | None] = judgements or [None] * len(requests)
        evaluation.clips += [Clip(name, *clip) for clip in zip(requests, videos, verdicts, strict=True)]
    return evaluation


def gallery(clips: Sequence[Clip], per_suite: int = 6, wrong: int = 2) -> list[Clip]:
    """The first clips of every suite for people to look at, the last of them replaced by up to `wrong` later failures.

    First clips alone would hide a rare failure; how rare it is, the numbers beside the gallery say.
    """
    shown: list[Clip] = []
    for suite in dict.fromkeys(clip.suite for clip in clips):
        own = [clip for clip in clips if clip.suite == suite]
        failed = [clip for clip in own[per_suite:] if clip.judgement and not clip.judgement.right][:wrong]
        shown += own[: per_suite - len(failed)] + failed
    return shown


def _plan(asked: Mapping[str, list[Request]], metrics: Mapping[str, Metric]) -> dict[str, list[str]]:
    """The names of the metrics to apply to each suite."""
    for name, requests in asked.items():
        sizes = {(request.num_frames, request.height, request.width) for request in requests}
        if len(sizes) != 1:
            raise ValueError(f"a suite asks for clips of one size, got {sorted(sizes)}; change eval.suites.{name}")
    for name, metric in metrics.items():
        for suite in metric.suites or []:
            if suite not in asked:
                raise ValueError(f"eval.metrics.{name}.suites names {suite!r}, but the suites are {', '.join(asked)}")
            if not metric.suits(asked[suite]):
                raise ValueError(f"metric {name} needs more than suite {suite} knows; change eval.metrics.{name}.suites")
    return {
        suite: [name for name, metric in metrics.items() if (suite in metric.suites if metric.suites else metric.suits(requests))]
        for suite, requests in asked.items()
    }


def _checked(suite: str, requests: Sequence[Request], videos: list[np.ndarray]) -> list[np.ndarray]:
    if len(videos) != len(requests):
        raise ValueError(f"suite {suite}: asked for {len(requests)} videos, got {len(videos)}")
    for request, video in zip(requests, videos, strict=True):
        expected = (request.num_frames, request.height, request.width, 3)
        if video.shape != expected or video.dtype != np.uint8:
            raise ValueError(f"suite {suite}: asked for uint8 {expected}, got {video.dtype} {video.shape}")
    return videos
