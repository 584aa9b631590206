"""What the world's checker sees in sampled clips: prompt adherence, diversity, drift, and obedience to a changed caption."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from dit_video.data.video_file import encode_mp4, read_video
from dit_video.eval.estimate import Estimate, bootstrap_mean, fraction
from dit_video.eval.judge import Judgement, Metric
from dit_video.sampler.generate import Request
from dit_video.world.checker import Reading, Verdict, judge, read
from dit_video.world.coverage import frequencies, total_variation
from dit_video.world.render import render
from dit_video.world.state import ATTRIBUTES, WORLD_VERSION, conditional, sample_scene

CHECKER = f"Checker of world version {WORLD_VERSION}"
NUM_REFERENCES = 128  # true clips that drift is compared with
NUM_SIMULATIONS = 1000  # of a perfect model, and of the sampled one, for coverage

MAX_KNOWN = 4096  # readings that are remembered

T = TypeVar("T")
Outcome = Hashable  # the values of the open attributes; None where nothing true was shown


class WorldMetric(Metric):
    """A metric that reads clips with the world's checker, so every request must say what its prompt states."""

    def __init__(self, suites: Sequence[str] | None = None) -> None:
        self.suites = suites

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether every prompt states attributes of the world and no others."""
        return all(request.attributes and set(request.attributes) <= set(ATTRIBUTES) for request in requests)


class Adherence(WorldMetric):
    """Whether clips show what their prompts state, in all and attribute by attribute."""

    protocol = (
        f"{CHECKER}, fraction of clips: all (every stated attribute right, and one object in every frame), each attribute over "
        "the prompts that state it, present (an object in every frame), consistent (one clear unchanging object on a plain "
        "background, within a 32nd of the frame's side of a law of motion that turns at the frame's edge), strict (all and "
        "consistent); 95% Wilson intervals."
    )

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields all, those of size, colour, shape and motion that some prompt states, present, consistent and strict."""
        names = ("all", *ATTRIBUTES, "present", "consistent", "strict")
        outcomes: dict[str, list[bool]] = {name: [] for name in names}
        for reading, verdict in _readings(requests, videos):
            outcomes["all"].append(verdict.as_told)
            outcomes["strict"].append(verdict.all)
            outcomes["present"].append(not reading.disappeared)
            outcomes["consistent"].append(verdict.consistent)
            for name, right in verdict.right.items():
                outcomes[name].append(right)
        return {name: fraction(found) for name, found in outcomes.items() if found}

    def judgements(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> list[Judgement]:
        """What is wrong with each clip, in the checker's words."""
        return [
            Judgement(verdict.as_told, "; ".join(verdict.reasons) or _stated(request))
            for request, (_, verdict) in zip(requests, _readings(requests, videos), strict=True)
        ]


class CaptionChange(WorldMetric):
    """Whether two captions make one first frame go on in two ways, each as its caption says."""

    protocol = (
        f"{CHECKER}, fraction of pairs (one first frame and noise seed, two captions of different motions) of which both "
        "clips have their own motion (motion) or are right in everything (all); 95% Wilson intervals over pairs."
    )

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether neighbours share their given frames and differ in the motion stated."""
        return super().suits(requests) and len(requests) % 2 == 0 and all(_is_pair(*pair) for pair in _pairs(requests))

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields motion and all."""
        pairs = list(_pairs([verdict for _, verdict in _readings(requests, videos)]))
        return {
            "motion": fraction([one.right["motion"] and two.right["motion"] for one, two in pairs]),
            "all": fraction([one.as_told and two.as_told for one, two in pairs]),
        }


class Drift(WorldMetric):
    """How much the object changes and strays within a clip, beside true clips of the same prompts."""

    protocol = (
        f"{CHECKER}, mean over clips with an object in every frame: colour (greatest distance of a frame's colour from the "
        "clip's median, 0 to 442 in RGB), area (greatest change of area from the clip's median, as a share), residual "
        "(root mean square distance from the closest law of motion, pixels); reference: the same of true clips of the "
        f"first {NUM_REFERENCES} prompts after H.264 (crf 12); bootstrap intervals over clips."
    )

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields colour, area and residual where some clip has an object, and each with _reference."""
        readings = [reading for reading, _ in _readings(requests, videos)]
        truths = [
            _true_reading(tuple(sorted(each.attributes.items())), number, *_size(each))
            for number, each in enumerate(requests[:NUM_REFERENCES])
        ]
        kinds: dict[str, Callable[[Reading], float]] = {
            "colour": lambda reading: reading.colour_drift,
            "area": lambda reading: reading.area_drift,
            "residual": lambda reading: reading.residual,
        }
        found = {}
        for name, kind in kinds.items():
            values = [kind(reading) for reading in readings if not reading.disappeared]
            if values:
                found[name] = bootstrap_mean(values, seed=0)
            found[f"{name}_reference"] = bootstrap_mean([kind(reading) for reading in truths], seed=0)
        return found


class Coverage(WorldMetric):
    """How far the frequencies of what prompts leave open are from the true ones of the training distribution."""

    protocol = (
        f"{CHECKER}. Per prompt, over its seeds, joint outcomes of the attributes left open (a clip that is inconsistent "
        "or wrong in a stated attribute counts as an outcome of its own). distance: total variation from the training "
        "distribution given the prompt, mean over prompts; it is biased upwards, the more the fewer seeds: floor is a "
        "perfect model's mean at the same counts, with the central 95% of its results. modes: share of true outcomes that "
        "occur at least once, beside a perfect model's (modes_expected). outside: share of clips with no true outcome, "
        "Wilson. Intervals of distance and modes: spread of resamples within prompts around the value."
    )

    def suits(self, requests: Sequence[Request]) -> bool:
        """Whether every prompt leaves something open, for clips of several frames, and is asked for with more than one seed."""
        if not super().suits(requests) or any(not _open(request) or request.num_frames == 1 for request in requests):
            return False
        return min(map(len, _groups(requests).values())) > 1

    def __call__(self, requests: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Estimate]:
        """Fields distance, floor, modes, modes_expected and outside."""
        outcomes: list[Outcome] = [
            tuple(getattr(reading, name) for name in _open(request)) if verdict.all else None
            for request, (reading, verdict) in zip(requests, _readings(requests, videos), strict=True)
        ]
        prompts: list[_Prompt] = []
        outside = []
        for numbers in _groups(requests).values():
            first, shown = requests[numbers[0]], [outcomes[number] for number in numbers]
            expected = conditional(first.attributes, "train", first.num_frames)
            truth: dict[Outcome, float] = {outcome: probability for outcome, probability in expected.items()}
            prompts.append(_Prompt(truth, frequencies(shown), len(shown)))
            outside += [outcome not in truth for outcome in shown]
        distances, modes = _simulate(prompts)
        floor, modes_expected = _simulate([_Prompt(prompt.truth, prompt.truth, prompt.count) for prompt in prompts])
        distance = float(np.mean([total_variation(prompt.truth, prompt.shown) for prompt in prompts]))
        found = float(np.mean([np.mean([outcome in prompt.shown for outcome in prompt.truth]) for prompt in prompts]))
        return {
            "distance": _around(distance, distances, len(requests)),
            "floor": _around(float(floor.mean()), floor, len(requests)),
            "modes": _around(found, modes, len(requests)),
            "modes_expected": _around(float(modes_expected.mean()), modes_expected, len(requests)),
            "outside": fraction(outside),
        }


@dataclass(frozen=True)
class _Prompt:
    truth: Mapping[Outcome, float]
    shown: Mapping[Outcome, float]
    count: int


def _simulate(prompts: Sequence[_Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Mean distance and mean share of modes over prompts, of draws of the shown distributions with as many clips."""
    rng = np.random.default_rng(0)
    distances, modes = np.zeros(NUM_SIMULATIONS), np.zeros(NUM_SIMULATIONS)
    for prompt in prompts:
        outcomes = sorted({*prompt.truth, *prompt.shown}, key=str)
        truth, shown = (np.array([each.get(outcome, 0.0) for outcome in outcomes]) for each in (prompt.truth, prompt.shown))
        counts = rng.multinomial(prompt.count, shown / shown.sum(), size=NUM_SIMULATIONS)
        distances += np.abs(counts / prompt.count - truth).sum(1) / 2 / len(prompts)
        modes += (counts[:, truth > 0] > 0).mean(1) / len(prompts)
    return distances, modes


def _around(value: float, draws: np.ndarray, count: int) -> Estimate:
    """The value with the central 95% of the draws, moved to have their mean there."""
    low, high = np.quantile(draws, [0.025, 0.975]) - draws.mean() + value
    return Estimate(value, max(0.0, min(value, float(low))), min(1.0, max(value, float(high))), count)


def _readings(requests: Sequence[Request], videos: Sequence[np.ndarray]) -> Iterator[tuple[Reading, Verdict]]:
    for request, video in zip(requests, videos, strict=True):
        reading = _read(video, request.fps)
        yield reading, judge(reading, request.attributes)


_known: dict[bytes, Reading] = {}  # several metrics look at the same clips


def _read(video: np.ndarray, fps: float) -> Reading:
    """What the checker reads, remembered by the clip's content."""
    key = hashlib.sha256(repr((video.shape, fps)).encode() + video.tobytes()).digest()
    if key not in _known:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[key] = read(video, fps)
    return _known[key]


@lru_cache(maxsize=MAX_KNOWN)
def _true_reading(
    attributes: tuple[tuple[str, str], ...], seed: int, num_frames: int, height: int, width: int, fps: float
) -> Reading:
    """What the checker reads in a true clip after H.264."""
    rng = np.random.default_rng([seed, 5])
    scene = sample_scene(rng, num_frames=num_frames, height=height, width=width, fps=fps, split="any", **dict(attributes))
    return read(read_video(encode_mp4(render(scene), fps))[0], fps)


def _size(request: Request) -> tuple[int, int, int, float]:
    return request.num_frames, request.height, request.width, request.fps


def _stated(request: Request) -> str:
    return "as asked: " + ", ".join(str(value) for value in request.attributes.values())


def _open(request: Request) -> list[str]:
    """The attributes that the prompt leaves open, in the order of ATTRIBUTES."""
    return [name for name in ATTRIBUTES if name not in request.attributes]


def _groups(requests: Sequence[Request]) -> dict[str, list[int]]:
    """The numbers of the requests for each prompt."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[request.prompt].append(number)
    return groups


def _pairs(items: Sequence[T]) -> Iterator[tuple[T, T]]:
    return zip(items[::2], items[1::2], strict=True)


def _is_pair(one: Request, two: Request) -> bool:
    if one.given is None or two.given is None or not np.array_equal(one.given, two.given):
        return False
    return "motion" in one.attributes and "motion" in two.attributes and one.attributes["motion"] != two.attributes["motion"]
