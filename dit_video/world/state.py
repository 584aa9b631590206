"""The state of level 1: one object of some colour, shape and size that moves over a plain background by a known law.

Lengths are in *sides*, a side being min(height, width) pixels; places are (x, y) of the object's centroid from the frame's top
left corner, y pointing down, with pixel i covering [i, i + 1). All shapes of one size have the same area, so that size can be
read from area.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

WORLD_VERSION = 2  # raise it whenever the same seed gives other clips or captions

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 50, 50),
    "green": (60, 180, 60),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 60),
    "purple": (180, 70, 210),
    "cyan": (70, 210, 220),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.14, "large": 0.21}  # radius in sides of the circle with the object's area
MOTIONS = ("left", "right", "up", "down", "bounce", "still")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
}
Split = Literal["train", "held_out", "any"]

# Never in training, with any motion or size.
HELD_OUT_PAIRS = frozenset({("yellow", "triangle"), ("purple", "square")})
# Never in training, with any size: three for every colour, six for every shape, three for every motion.
HELD_OUT_TRIPLES = frozenset(
    {
        ("red", "circle", "right"), ("red", "square", "down"), ("red", "triangle", "still"),
        ("green", "circle", "up"), ("green", "square", "bounce"), ("green", "triangle", "left"),
        ("blue", "circle", "down"), ("blue", "square", "still"), ("blue", "triangle", "right"),
        ("yellow", "circle", "bounce"), ("yellow", "square", "left"), ("yellow", "square", "up"),
        ("purple", "circle", "still"), ("purple", "triangle", "down"), ("purple", "triangle", "right"),
        ("cyan", "circle", "left"), ("cyan", "square", "up"), ("cyan", "triangle", "bounce"),
    }
)  # fmt: skip

MIN_SIDE = 24  # pixels; in a smaller frame the small shapes cannot be told apart after video coding
MIN_BOUNCE_FRAMES = 3  # out and back cannot be seen in fewer
MARGIN = 0.02  # sides between the frame's edge and an object that does not bounce
TRAVEL = (0.22, 0.5)  # sides from first to last frame, whatever the clip's duration, as far as the frame has room
BOUNCE_WEIGHT = 2.0  # bounces drawn for every clip of another motion: there are four laws of bouncing, one for each edge
BOUNCE_PATH = (0.4, 0.65)  # sides along the path, there and back
BOUNCE_TIME = (0.35, 0.65)  # of the clip's duration: when the object meets the edge
BACKGROUND = (24, 48)  # grey levels

# Left, up, right, down from the centroid, in radii of the circle of equal area.
_SQUARE = math.sqrt(math.pi) / 2
_TRIANGLE = 2 * math.sqrt(math.pi / 3**1.5)  # circumradius of the equilateral triangle of area pi
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE, _SQUARE),
    "triangle": (_TRIANGLE * math.sqrt(0.75), _TRIANGLE, _TRIANGLE * math.sqrt(0.75), _TRIANGLE / 2),
}
OUTLINES = {"circle": 2 * math.pi, "square": 8 * _SQUARE, "triangle": 6 * _TRIANGLE * math.sqrt(0.75)}  # length in radii


@dataclass(frozen=True)
class Scene:
    """The full state of one clip: its object, the law that moves it, and the frame.

    The centre goes from `start` (sides) at `velocity` (sides a second) and is reflected where the object touches the frame's
    edge, so it is inside the frame at any time. ValueError for a word that the world does not know, a frame under MIN_SIDE, no
    frames or no rate.
    """

    colour: str
    shape: str
    size: str
    motion: str
    start: tuple[float, float]
    velocity: tuple[float, float]
    background: tuple[int, int, int]
    height: int
    width: int
    fps: float
    num_frames: int

    def __post_init__(self) -> None:
        check_attributes(self.attributes)
        check_frame(self.num_frames, self.height, self.width, self.fps)

    @property
    def attributes(self) -> dict[str, str]:
        """What a caption may state."""
        return {"size": self.size, "colour": self.colour, "shape": self.shape, "motion": self.motion}

    @property
    def side(self) -> int:
        """Pixels in a side."""
        return min(self.height, self.width)

    @property
    def radius(self) -> float:
        """Pixels in the radius of the circle with the object's area."""
        return SIZES[self.size] * self.side

    def centres(self) -> Float[np.ndarray, "T 2"]:
        """The centroid (x, y) in pixels in each frame."""
        low, high = centre_box(self.shape, self.size, self.height, self.width)
        seconds = np.arange(self.num_frames)[:, None] / self.fps
        return (low + _reflect(np.array(self.start) + seconds * np.array(self.velocity) - low, high - low)) * self.side

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-safe values, with the radius and the centre per frame in pixels beside it."""
        return asdict(self) | {"radius": self.radius, "centres": self.centres().round(4).tolist(), "world_version": WORLD_VERSION}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Scene":
        """The scene of `to_dict`, less what follows from it (centres, radius); ValueError where a value is missing or unknown."""
        missing = [field.name for field in fields(cls) if field.name not in state]
        if missing:
            raise ValueError(f"this is not the state of a world clip: it lacks {', '.join(missing)}")
        values: dict[str, Any] = {field.name: state[field.name] for field in fields(cls)}
        return cls(**values | {name: tuple(value) for name, value in values.items() if isinstance(value, list)})


def check_frame(num_frames: int, height: int, width: int, fps: float) -> None:
    """ValueError where the world cannot draw such a clip."""
    if num_frames < 1:
        raise ValueError(f"a world clip needs at least 1 frame, got {num_frames}; set num_frames")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"a world clip needs at least {MIN_SIDE} pixels a side, got {height}x{width}; set height and width")
    if not 0 < fps < float("inf"):
        raise ValueError(f"a world clip needs a frame rate above 0, got {fps}; set fps")


def check_attributes(attributes: Mapping[str, str]) -> None:
    """ValueError where an attribute or its value is not one of the world's."""
    for name, value in attributes.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"the world has no attribute {name!r}, only {', '.join(ATTRIBUTES)}")
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"the world has no {name} {value!r}, only {', '.join(ATTRIBUTES[name])}")


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination never occurs in training, with either size."""
    return (colour, shape) in HELD_OUT_PAIRS or (colour, shape, motion) in HELD_OUT_TRIPLES


def combinations(split: Split, num_frames: int | None = None, **fixed: str) -> list[dict[str, str]]:
    """All attributes of a split that agree with the fixed ones, in a fixed order; `conditional` says how often clips take each.

    ValueError where there is none: clips of 1 or 2 frames have no bounce, and the held-out ones are no train ones.
    """
    if split not in ("train", "held_out", "any"):
        raise ValueError(f"the world's splits are train, held_out and any, got {split!r}; set split")
    check_attributes(fixed)
    too_short = num_frames is not None and num_frames < MIN_BOUNCE_FRAMES
    found = _combinations(split, too_short, frozenset(fixed.items()))
    if not found:
        raise ValueError(f"no {num_frames or ''} frames of split {split} show {fixed}; set other attributes or split=any")
    return [dict(each) for each in found]


@cache
def _combinations(split: Split, too_short: bool, fixed: frozenset[tuple[str, str]]) -> list[dict[str, str]]:
    found = []
    for values in product(*ATTRIBUTES.values()):
        each = dict(zip(ATTRIBUTES, values, strict=True))
        held_out = is_held_out(each["colour"], each["shape"], each["motion"])
        wanted = split == "any" or held_out == (split == "held_out")
        if wanted and fixed <= each.items() and not (too_short and each["motion"] == "bounce"):
            found.append(each)
    return found


def conditional(
    attributes: Mapping[str, str], split: Split = "train", num_frames: int | None = None
) -> dict[tuple[str, ...], float]:
    """The true joint distribution of the attributes left open, given those stated; keys are values in the order of ATTRIBUTES."""
    found = combinations(split, num_frames, **attributes)
    open_values = [tuple(value for name, value in each.items() if name not in attributes) for each in found]
    return dict(zip(open_values, _shares(found).tolist(), strict=True))


def _shares(found: list[dict[str, str]]) -> np.ndarray:
    """How often each of these combinations is drawn."""
    weights = np.array([BOUNCE_WEIGHT if each["motion"] == "bounce" else 1.0 for each in found])
    return weights / weights.sum()


def sample_scene(
    rng: np.random.Generator,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    split: Split = "train",
    **fixed_attributes: str,
) -> Scene:
    """Draws a scene: attributes from the split's combinations (see `conditional`), then place, speed and background.

    The way from first to last frame does not depend on the duration, so a longer clip is slower. ValueError as `combinations`.
    """
    check_frame(num_frames, height, width, fps)
    choices = combinations(split, num_frames, **fixed_attributes)
    attributes = choices[rng.choice(len(choices), p=_shares(choices))]
    low, high = centre_box(attributes["shape"], attributes["size"], height, width)
    start, path = _draw_path(rng, attributes["motion"], low, high, num_frames)
    velocity = path * fps / max(num_frames - 1, 1)
    grey = int(rng.integers(BACKGROUND[0], BACKGROUND[1] + 1))
    return Scene(
        **attributes,
        start=(float(start[0]), float(start[1])),
        velocity=(float(velocity[0]), float(velocity[1])),
        background=(grey, grey, grey),
        height=height,
        width=width,
        fps=fps,
        num_frames=num_frames,
    )


def centre_box(shape: str, size: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest (x, y) in sides that an object's centre can have inside the frame."""
    side, radius = min(height, width), SIZES[size]
    left, up, right, down = EXTENTS[shape]
    return np.array([left, up]) * radius, np.array([width / side - right * radius, height / side - down * radius])


def _draw_path(
    rng: np.random.Generator, motion: str, low: np.ndarray, high: np.ndarray, num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first centre and the way from there to the last frame's, unreflected, in sides."""
    low_free, high_free = low + MARGIN, high - MARGIN
    start, path = rng.uniform(low_free, high_free), np.zeros(2)
    if motion == "still":
        return start, path
    if motion == "bounce":
        axis, direction = int(rng.integers(2)), int(rng.choice((-1, 1)))
        # In a very short clip the edge is met near the middle, so that both ways are seen.
        spread = min((num_frames - MIN_BOUNCE_FRAMES) / 4, 1)
        before = 0.5 + spread * (rng.uniform(*BOUNCE_TIME) - 0.5)
        room = (high - low)[axis] / max(before, 1 - before)
        length = rng.uniform(BOUNCE_PATH[0], min(BOUNCE_PATH[1], room))
        start[axis] = high[axis] - before * length if direction > 0 else low[axis] + before * length
    else:
        axis, direction = (0 if motion in ("left", "right") else 1), (1 if motion in ("right", "down") else -1)
        length = rng.uniform(TRAVEL[0], min(TRAVEL[1], (high_free - low_free)[axis]))
        first = rng.uniform(low_free[axis], high_free[axis] - length)
        start[axis] = first if direction > 0 else first + length
    path[axis] = direction * length
    return start, path


def _reflect(offset: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Folds a straight line into [0, room] as an elastic bounce does."""
    return room - np.abs(room - np.mod(offset, 2 * room))
