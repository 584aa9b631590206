"""What follows given frames: whether they are kept, and how the made frames compare with real footage and simple baselines."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import cast

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.data.decode import Decoder, decode_clip
from dit_video.data.files import expand_shards
from dit_video.data.index import records_of
from dit_video.data.reader import caption_members, captions_of, find_member
from dit_video.data.shards import ClipRecord, read_members
from dit_video.eval.estimate import Estimate, bootstrap, bootstrap_mean, fraction
from dit_video.eval.judge import Metric, Suite
from dit_video.sampler.generate import Request

Video = UInt8[np.ndarray, "T H W 3"]

PREFIX_TASKS = ("image_to_video", "extend")  # whose given frames are the clip's first ones
MAX_CAPTION_CHARS = 2000
ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to 8 bits: PSNR ends at 58.9 dB, so that a mean over clips stays finite

log = logging.getLogger(__name__)


@dataclass
class Continuation(Request):
    """A request whose given frames are the first ones of a real clip, which is known in full."""

    real: Video | None = None  # T H W 3, of the asked size


@dataclass
class ContinuationSuite(Suite):
    """Held-out real clips from tar shards, of which the model gets the first num_given frames and the caption, if there is one.

    Clips are taken in an order drawn from the seed, each cut at a place drawn from the seed, until there are `count`; what does
    not decode is left out with a warning. ValueError where no clip is left, and as `expand_shards` and `records_of`.
    """

    shards: str | Sequence[str]
    count: int
    seed: int
    num_given: int
    num_frames: int
    height: int
    width: int
    fps: float
    decoder: Decoder = "pyav"  # few clips are read here, and it takes every size
    protocol: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a suite needs at least one clip, got {self.count}; set eval.suites.<name>.count")
        if not 1 <= self.num_given < self.num_frames:
            raise ValueError(
                f"of {self.num_frames} frames 1 to {self.num_frames - 1} can be given, got {self.num_given}; "
                f"set eval.suites.<name>.num_given"
            )

    def requests(self) -> list[Continuation]:
        """The first frames to be continued, with the real clips beside them."""
        shards = [self.shards] if isinstance(self.shards, str) else list(self.shards)
        records = records_of(expand_shards(shards))
        rng = np.random.default_rng(self.seed)
        found: list[Continuation] = []
        for index in rng.permutation(len(records)):
            try:
                found.append(self._ask(records[index], len(found), np.random.default_rng([self.seed, int(index)])))
            except ValueError as error:
                log.warning("%s is left out of the evaluation: %s", records[index].name, error)
            if len(found) == self.count:
                break
        if not found:
            raise ValueError(f"none of the {len(records)} clips can be read; change eval.suites.<name>.shards")
        self.protocol = (
            f"{self.num_given} given of {self.num_frames} frames of {self.height}x{self.width} (height x width) at {self.fps:g} "
            f"fps, {len(found)} real clips, one window each, seed {self.seed}; intervals take the clips as independent"
        )
        return found

    def _ask(self, record: ClipRecord, number: int, rng: np.random.Generator) -> Continuation:
        member = find_member(record, self.num_frames)
        if member is None:
            raise ValueError(f"no video among {sorted(record.members)}")
        captions = caption_members(record, ["txt"], MAX_CAPTION_CHARS) if "txt" in record.members else []
        members = read_members(record, [member, *captions])
        real = decode_clip(
            members[member],
            num_frames=self.num_frames,
            fps=self.fps,
            height=self.height,
            width=self.width,
            start_seconds=lambda slack: float(rng.uniform(0, slack)),
            decoder=self.decoder,
        ).video
        return Continuation(
            prompt=captions_of(members, ["txt"], MAX_CAPTION_CHARS)["txt"] if captions else "",
            seed=self.seed * 10_000 + number,
            num_frames=self.num_frames,
            height=self.height,
            width=self.width,
            fps=self.fps,
            task="image_to_video" if self.num_given == 1 else "extend",
            given=real[: self.num_given],
            real=real,
        )


def psnr(made: Video, real: Video) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB, at most 58.9 (the rounding error of 8 bits)."""
    error = np.square(made.astype(np.float32) - real.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(float(error), ROUNDING_ERROR)))


def optical_flow(first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 2"]:
    """Where each pixel of the first frame goes in the second, (x, y) in pixels (Farneback 2003, as OpenCV computes it)."""
    cv2 = _opencv()
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    flow = cv2.calcOpticalFlowFarneback(
        *grey, None, pyr_scale=0.5, levels=3, winsize=9, iterations=5, poly_n=5, poly_sigma=1.1, flags=0
    )
    return cast(np.ndarray, flow)


def motion(video: Video) -> float:
    """The mean magnitude of the optical flow between neighbouring frames, in pixels a frame."""
    return float(np.mean([np.linalg.norm(optical_flow(*pair), axis=-1).mean() for pair in zip(video, video[1:], strict=False)]))


def frozen(given: Video, num_frames: int) -> Video:
    """The baseline that repeats the last given frame, `num_frames` frames in all."""
    return np.concatenate([given, np.repeat(given[-1:], num_frames - len(given), axis=0)])


def linear_flow(given: Video, num_frames: int) -> Video:
    """The baseline that goes on as the last two given frames moved; one given frame has no motion, so there it is `frozen`.

    Frame k after the last is the last frame looked up at x - k * flow(x), with flow from the last but one to the last frame.
    """
    if len(given) < 2:
        return frozen(given, num_frames)
    cv2 = _opencv()
    flow = -optical_flow(given[-1], given[-2])  # on the pixels of the last frame, turned forward
    rows, columns = np.mgrid[: given.shape[1], : given.shape[2]].astype(np.float32)
    made = [
        cv2.remap(
            given[-1],
            columns - step * flow[..., 0],
            rows - step * flow[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        for step in range(1, num_frames - len(given) + 1)
    ]
    return np.concatenate([given, np.stack(made)]) if made else given


class GivenFrames(Metric):
    """Whether the frames that were given come back unchanged."""

    protocol = (
        "Given frames compared with the same frames of the sampled video. exact: fraction of clips in which no pixel value "
        "changed, Wilson interval; largest_difference: the largest change of a pixel value (0 to 255), and psnr in dB, at most "
        "58.9: means over clips, bootstrap intervals."
    )

    def __init__(self, suites: Sequence[str] | None = None) -> None:
        self.suites = suites

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether the given frames are the clips' first ones."""
        return all(request.given is not None and request.task in PREFIX_TASKS for request in requests)

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields exact, largest_difference and psnr."""
        pairs = [(_given(request), video[: len(_given(request))]) for request, video in zip(requests, videos, strict=True)]
        differences = [float(np.abs(given.astype(int) - found).max()) for given, found in pairs]
        return {
            "exact": fraction([difference == 0 for difference in differences]),
            "largest_difference": bootstrap_mean(differences, seed=0),
            "psnr": bootstrap_mean([psnr(found, given) for given, found in pairs], seed=0),
        }


class MotionAmount(Metric):
    """How much moves in made frames beside the real ones: not whether it is right, but whether the clip is frozen or wild."""

    protocol = (
        "Mean magnitude of Farneback optical flow (OpenCV, winsize 9, 3 levels) between neighbouring frames from the last given "
        "one on, in pixels a frame. ratio: mean over sampled clips / mean over the real continuations of the same given frames; "
        "paired bootstrap over clips."
    )

    def __init__(self, suites: Sequence[str] | None = None) -> None:
        self.suites = suites

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether the real clips are known."""
        return _known(requests)

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields ratio, sampled and real. ValueError where nothing moves in the real clips."""
        amounts = np.array(
            [
                (motion(video[len(_given(request)) - 1 :]), motion(_real(request)[len(_given(request)) - 1 :]))
                for request, video in zip(requests, videos, strict=True)
            ]
        )
        if amounts[:, 1].mean() <= 0:
            raise ValueError("nothing moves in the real clips, so there is no ratio of motion; choose other clips")
        return {
            "ratio": bootstrap(amounts, lambda rows: float(rows[:, 0].mean() / max(rows[:, 1].mean(), 1e-6)), seed=0),
            "sampled": bootstrap_mean(amounts[:, 0], seed=0),
            "real": bootstrap_mean(amounts[:, 1], seed=0),
        }


class Fidelity(Metric):
    """How close made frames come to what really followed, beside two baselines that know no model."""

    protocol = (
        "PSNR in dB (at most 58.9) of the made frames against the real ones, over all made frames of a clip, mean over clips, "
        "bootstrap intervals. frozen repeats the last given frame; linear_flow goes on with the optical flow between the last "
        "two given frames, and equals frozen where only one is given. over_frozen, over_linear_flow: paired differences in dB. "
        "The future is uncertain: PSNR favours blur and stillness over another sharp future."
    )

    def __init__(self, suites: Sequence[str] | None = None) -> None:
        self.suites = suites

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether the real clips are known."""
        return _known(requests)

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields model, frozen, linear_flow, over_frozen and over_linear_flow."""
        rows = []
        for request, video in zip(requests, videos, strict=True):
            given, real = _given(request), _real(request)
            rivals = (video, frozen(given, len(real)), linear_flow(given, len(real)))
            rows.append([psnr(rival[len(given) :], real[len(given) :]) for rival in rivals])
        model, still, flow = np.array(rows).T
        values = {
            "model": model,
            "frozen": still,
            "linear_flow": flow,
            "over_frozen": model - still,
            "over_linear_flow": model - flow,
        }
        return {name: bootstrap_mean(each, seed=0) for name, each in values.items()}


def _known(requests: Sequence[Request]) -> bool:
    return all(
        isinstance(request, Continuation) and request.real is not None and request.given is not None for request in requests
    )


def _given(request: Request) -> Video:
    assert request.given is not None
    return request.given


def _real(request: Request) -> Video:
    assert isinstance(request, Continuation) and request.real is not None
    return request.real


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "optical flow needs OpenCV: pip install 'dit-video[data]', or drop the metric from eval.metrics"
        ) from error
    return cv2
