"""What to ask a model of the world for: prompts, under-specified prompts, first frames, changed captions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import combinations as combine
from typing import Literal, get_args

import numpy as np

from dit_video.eval.judge import Suite
from dit_video.sampler.generate import Request
from dit_video.world.captions import prompts, underspecified, word
from dit_video.world.paraphrases import Words, paraphrase
from dit_video.world.render import render
from dit_video.world.state import ATTRIBUTES, MARGIN, TRAVEL, Scene, centre_box, combinations, sample_scene

Choice = tuple[dict[str, str], tuple[str, str]]  # an object and two motions
Split = Literal["seen", "held_out"]
MAX_TRIES = 20_000  # draws of a scene from whose first frame both motions fit; the rarest pair needs about 100
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}  # axis (x, y) and sign


@dataclass
class WorldSuite(Suite):
    """Clips of one size asked of a model of the world; noise seeds are seed * 10,000 + number of the clip."""

    count: int
    seed: int
    _: KW_ONLY
    num_frames: int
    height: int
    width: int
    fps: float
    protocol: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a suite needs at least one clip, got {self.count}; set eval.suites.<name>.count")
        size = f"{self.num_frames} frames of {self.height}x{self.width} (height x width) at {self.fps:g} fps"
        self.protocol = f"{self.describe()}, {size}, seed {self.seed}"

    def describe(self) -> str:
        """What is asked for and how often, for the protocol."""
        raise NotImplementedError

    def ask(self, number: int, prompt: str, attributes: dict[str, str], first_frame: np.ndarray | None = None) -> Request:
        """The request for clip `number`: from a prompt alone or as the continuation of a first frame (uint8 H W 3)."""
        return Request(
            prompt=prompt,
            seed=self.seed * 10_000 + number,
            num_frames=self.num_frames,
            height=self.height,
            width=self.width,
            fps=self.fps,
            task="text_to_video" if first_frame is None else "image_to_video",
            given=None if first_frame is None else first_frame[None],
            attributes=dict(attributes),
        )

    def scene(self, rng: np.random.Generator, attributes: dict[str, str]) -> Scene:
        """A scene of the suite's size with these attributes, whether or not they occur in training."""
        size = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        return sample_scene(rng, **size, fps=self.fps, split="any", **attributes)  # type: ignore[arg-type]


@dataclass
class PromptSuite(WorldSuite):
    """Fully specified prompts: of combinations that occur in training (seen) or never do (held_out)."""

    split: Split = "seen"

    def describe(self) -> str:
        return f"text to video: {self.count} prompts of split {self.split}, every combination equally often, one seed each"

    def requests(self) -> list[Request]:
        asked = prompts(self.split, self.count, self.seed, self.num_frames)
        return [self.ask(number, caption.text, caption.attributes) for number, caption in enumerate(asked)]


@dataclass
class ParaphraseSuite(PromptSuite):
    """Fully specified prompts in sentences of a split of `world.paraphrases`, of which none but those of training is in any caption.

    So many of the attributes, size, colour, shape and motion, are said in phrases that no caption has either; None: all.
    """

    words: Words = "unseen"
    new_words: int | None = None

    def describe(self) -> str:
        count = "all" if self.new_words is None else self.new_words
        new = "" if self.words == "training" else f", {count} of its attributes in phrases never told"
        return f"{super().describe()}, paraphrased in a sentence of split {self.words}{new}"

    def requests(self) -> list[Request]:
        new_words = len(ATTRIBUTES) if self.new_words is None else self.new_words
        rng = np.random.default_rng([self.seed, 5, get_args(Words).index(self.words), new_words])
        asked = prompts(self.split, self.count, self.seed, self.num_frames)
        said = [paraphrase(rng, caption.attributes, self.words, new_words) for caption in asked]
        return [
            self.ask(number, text, caption.attributes) for number, (text, caption) in enumerate(zip(said, asked, strict=True))
        ]


@dataclass
class CoverageSuite(WorldSuite):
    """A few prompts that leave attributes open, each with many seeds: `count` prompts times `num_seeds` clips."""

    num_seeds: int = 64

    def describe(self) -> str:
        return f"text to video: {self.count} prompts that leave one or two attributes open, {self.num_seeds} seeds each"

    def requests(self) -> list[Request]:
        asked = underspecified(self.count, self.seed, self.num_frames)
        repeated = [caption for caption in asked for _ in range(self.num_seeds)]
        return [self.ask(number, caption.text, caption.attributes) for number, caption in enumerate(repeated)]


@dataclass
class ImageToVideoSuite(WorldSuite):
    """The true first frame of a scene and a prompt that says how it goes on."""

    split: Split = "seen"

    def describe(self) -> str:
        return f"image to video: {self.count} true first frames with their full captions, split {self.split}"

    def requests(self) -> list[Request]:
        found = []
        for number, caption in enumerate(prompts(self.split, self.count, self.seed, self.num_frames)):
            scene = self.scene(np.random.default_rng([self.seed, 3, number]), caption.attributes)
            found.append(self.ask(number, caption.text, caption.attributes, render(scene)[0]))
        return found


@dataclass
class ChangedCaptionSuite(WorldSuite):
    """Pairs of requests with the same first frame, from which both motions fit, and captions that differ in the motion alone.

    `count` pairs of neighbours, which share their noise seed too; every other pair has opposite motions.
    """

    split: Split = "seen"

    def describe(self) -> str:
        return f"image to video: {self.count} true first frames, each with captions of two different motions, split {self.split}"

    def requests(self) -> list[Request]:
        opposite, other = self._choices()
        rng = np.random.default_rng([self.seed, 4])
        found = []
        for number in range(self.count):
            choices = opposite if opposite and (number % 2 == 0 or not other) else other
            attributes, motions = choices[rng.integers(len(choices))]
            both = rng.permutation(motions).tolist()
            first_frame = render(self._scene_for_both(rng, attributes, both))[0]
            for motion in both:
                stated = word({**attributes, "motion": motion}, 0, self.num_frames)
                found.append(self.ask(number, stated.text, stated.attributes, first_frame))
        return found

    def _choices(self) -> tuple[list[Choice], list[Choice]]:
        """Objects with two motions of the split that go in opposite directions, and with two others."""
        motions: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for each in combinations("train" if self.split == "seen" else "held_out", self.num_frames):
            if each["motion"] != "bounce":  # which needs a start of its own
                motions[each["size"], each["colour"], each["shape"]].append(each["motion"])
        opposite: list[Choice] = []
        other: list[Choice] = []
        for (size, colour, shape), known in motions.items():
            low, high = centre_box(shape, size, self.height, self.width)
            for pair in combine(known, 2):
                room = high - low - 2 * MARGIN
                if set(pair) not in ({"left", "right"}, {"up", "down"}):
                    other.append(({"size": size, "colour": colour, "shape": shape}, pair))
                elif room[_DIRECTIONS[pair[0]][0]] > 2 * TRAVEL[0] + 0.01:  # a large triangle has no room both ways
                    opposite.append(({"size": size, "colour": colour, "shape": shape}, pair))
        return opposite, other

    def _scene_for_both(self, rng: np.random.Generator, attributes: dict[str, str], motions: Sequence[str]) -> Scene:
        for _ in range(MAX_TRIES):
            scene = self.scene(rng, {**attributes, "motion": motions[0]})
            if has_room(scene, motions[1]):
                return scene
        raise ValueError(
            f"no first frame of {self.height}x{self.width} has room for both {motions[0]} and {motions[1]}; set another size"
        )


def has_room(scene: Scene, motion: str) -> bool:
    """Whether the world could have drawn this motion (any but bounce) from the scene's first frame."""
    low, high = centre_box(scene.shape, scene.size, scene.height, scene.width)
    start = np.array(scene.start)
    if (start < low + MARGIN - 1e-9).any() or (start > high - MARGIN + 1e-9).any():
        return False
    if motion == "still":
        return True
    axis, sign = _DIRECTIONS[motion]
    room = high[axis] - MARGIN - start[axis] if sign > 0 else start[axis] - low[axis] - MARGIN
    return bool(room >= TRAVEL[0])
