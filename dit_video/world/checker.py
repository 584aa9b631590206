"""Frames to state with no learned network: what is in a clip, and whether it is what the caption said.

The object is what differs from the frame's median colour. Its opacity in a pixel is how far the pixel lies on the way from the
background to the object's colour, so sums of opacity give area and centroid to a fraction of a pixel, sharp or slightly soft.
Shape is the closest of the three rendered in its place, motion the closest law of motion; a clip that is close to none of them
is not consistent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dit_video.world.blobs import Blobs, find_blobs
from dit_video.world.render import coverage
from dit_video.world.state import COLOURS, EXTENTS, OUTLINES, SHAPES, SIZES, check_attributes

# Gates, set on ground truth after H.264 and on the broken clips of the tests. "In sides": of min(height, width).
MIN_CONTRAST = 60.0  # distance in RGB of an object from its background
MAX_COLOUR_DISTANCE = 60.0  # of the object from the nearest colour of the world
MAX_COLOUR_DRIFT = 42.0  # of a frame's object colour from the clip's
MAX_CONTRAST_DRIFT = 0.25  # of a frame's contrast with the background from the clip's, as a share of it; samples reach 0.16
MAX_AREA_DRIFT = 0.25  # of a frame's area from the clip's, as a share of it
AREA_RANGE = (0.7, 1.35)  # of the area that the size read has
MAX_NOISE = 11.0  # grey levels, root mean square over the background
MAX_BACKGROUND_DRIFT = 20.0  # of a frame's background colour from the clip's
MAX_MISFIT = 0.16  # of the object from the shape read, as a share of the shape's energy
MAX_SHAPE_DRIFT = 0.018  # by which another shape may fit a frame better; true clips stay below 0, samples below 0.016
MAX_TINT = 95.0  # between the object's halves, in RGB; halved chroma resolution alone makes up to 50
MAX_SOFTNESS = 1.5 / 32  # sides, as the sigma of a Gaussian blur
MAX_RESIDUAL = 1.0 / 32  # sides, root mean square distance from the law of motion; less in clips of few frames, see law_limit
MIN_MOVE = 0.1  # sides from first to last frame, less is still
MAX_EDGE_GAP = 0.12  # sides between the object and the edge where it bounces

READABLE_RESIDUAL = 1.5 / 32  # sides, as MAX_RESIDUAL; beyond it no word for the motion is right

TEMPLATE_SOFTNESS = 1.6  # pixels: between a sharp outline and one that coding and sampling have softened


@dataclass(frozen=True)
class Reading:
    """What a clip shows: words are None where nothing can be read (one frame has no motion), drift is from the clip's median."""

    present: Bool[np.ndarray, " T"]
    count: Int[np.ndarray, " T"]  # objects
    centres: Float[np.ndarray, "T 2"]  # (x, y) in pixels, NaN where absent
    area: Float[np.ndarray, " T"]  # square pixels, 0 where absent
    side: int  # min(height, width) in pixels
    noise: float  # grey levels, root mean square over the background
    background_drift: float  # of any frame's background, in RGB
    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None
    speed: float = 0.0  # sides a second along the law of motion
    colour_distance: float = 0.0  # from the nearest colour of the world, in RGB
    colour_drift: float = 0.0  # of any frame's colour, in RGB
    contrast_drift: float = 0.0  # of any frame's distance from the background, as a share
    tint: float = 0.0  # distance in RGB between the object's halves
    area_ratio: float = 0.0  # to the area that the size read should have
    area_drift: float = 0.0  # of any frame's area, as a share
    misfit: float = 0.0  # 0 is exactly the shape read, 1 is nothing alike
    shape_drift: float = 0.0  # by how much another shape fits some frame better, below 0 where none does
    softness: float = 0.0  # pixels, the sigma of a Gaussian that would blur the outline as much
    residual: float = 0.0  # pixels, root mean square distance from the law of motion
    edge_gap: float = 0.0  # pixels between object and frame edge where it bounces, 0 for other motions

    @property
    def disappeared(self) -> bool:
        """Whether the object is missing in some frame."""
        return not bool(self.present.all())


@dataclass(frozen=True)
class Verdict:
    """Whether a clip is what was said."""

    right: dict[str, bool]  # of each stated attribute
    as_told: bool  # every stated attribute is right, and there is one object in every frame
    consistent: bool  # it could be a clip of the world: one clear unchanging object that keeps to its law of motion
    all: bool  # as told and consistent
    reasons: list[str]


@dataclass(frozen=True)
class _Look:
    """What the object looks like in each frame."""

    present: np.ndarray
    count: np.ndarray
    opacity: np.ndarray  # T H W, 0 away from the object
    colours: np.ndarray  # T 3
    tint: np.ndarray  # T, distance between the object's halves
    noise: float
    background: np.ndarray  # T 3


def read(video: UInt8[np.ndarray, "T H W 3"], fps: float) -> Reading:
    """Reads the state of any clip of this type; ValueError where it is another or fps is not above 0."""
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or 0 in video.shape or not fps > 0:
        raise ValueError(f"the checker reads uint8 clips of T H W 3 at some fps, got {video.dtype} {video.shape} at {fps}")
    num_frames, height, width, _ = video.shape
    side = min(height, width)
    look = _look(video, side)
    nothing = Reading(
        present=look.present,
        count=look.count,
        centres=np.full((num_frames, 2), np.nan),
        area=np.zeros(num_frames),
        side=side,
        noise=look.noise,
        background_drift=_drift(look.background),
    )
    if not look.present.any():
        return nothing
    seen, colours = look.opacity[look.present], look.colours[look.present]
    rows, columns = np.arange(height)[None], np.arange(width)[None]
    area = np.maximum(seen.sum((1, 2)), 1.0)
    places = np.stack([seen.sum(1) @ (columns[0] + 0.5), seen.sum(2) @ (rows[0] + 0.5)], axis=1) / area[:, None]
    radius = np.sqrt(area / np.pi)
    misfits = np.stack([_misfit(seen, coverage(shape, places, radius, columns, rows, TEMPLATE_SOFTNESS)) for shape in SHAPES])
    best = int(misfits.mean(1).argmin())
    areas = {size: np.pi * (share * side) ** 2 for size, share in SIZES.items()}
    usual_area, usual_colour = float(np.median(area)), np.median(colours, axis=0)
    size = min(areas, key=lambda name: abs(math.log(usual_area / areas[name])))
    distances = {name: float(np.linalg.norm(usual_colour - value)) for name, value in COLOURS.items()}
    colour = min(distances, key=lambda name: distances[name])
    contrast = np.linalg.norm(colours - look.background[look.present], axis=1)
    law = _closest_law(places, np.flatnonzero(look.present) / fps, side)
    nothing.centres[look.present], nothing.area[look.present] = places, area
    return replace(
        nothing,
        colour=colour,
        shape=SHAPES[best],
        size=size,
        motion=law.motion if num_frames > 1 and law.residual <= law_limit(READABLE_RESIDUAL, num_frames) * side else None,
        speed=law.speed / side,
        colour_distance=distances[colour],
        colour_drift=_drift(colours),
        contrast_drift=_drift(contrast[:, None] / max(float(np.median(contrast)), 1.0)),
        tint=float(np.median(look.tint[look.present])),
        area_ratio=usual_area / areas[size],
        area_drift=_drift(area[:, None] / usual_area),
        misfit=float(misfits[best].mean()),
        shape_drift=float((misfits[best] - np.delete(misfits, best, axis=0)).max()),
        softness=_softness(seen, SHAPES[best], radius),
        residual=law.residual,
        edge_gap=_edge_gap(law, SHAPES[best], math.sqrt(usual_area / math.pi), height, width),
    )


def judge(reading: Reading, attributes: Mapping[str, str]) -> Verdict:
    """Compares a reading with what a caption states; the rest may be anything consistent. ValueError for unknown words."""
    check_attributes(attributes)
    stated = {name: value for name, value in attributes.items() if name != "motion" or len(reading.present) > 1}
    right = {name: getattr(reading, name) == value for name, value in stated.items()}
    reasons = [f"{name} is {getattr(reading, name)}, not {stated[name]}" for name, is_right in right.items() if not is_right]
    one = bool((reading.count == 1).all()) and not reading.disappeared
    broken = _broken(reading)
    return Verdict(right, one and not reasons, not broken, not reasons + broken, reasons + broken)


def law_limit(sides: float, num_frames: int) -> float:
    """How far from a law a clip may be: four numbers can be fitted, so a law lies close to any five places, and to no nine."""
    return sides * min(max((num_frames - 4) / 5, 0.2), 1.0)


def _broken(reading: Reading) -> list[str]:
    """What makes a clip no clip of the world, whatever was asked for."""
    if not reading.present.any():
        return ["no object"]
    low, high = AREA_RANGE
    gates = {
        f"no object in {int((~reading.present).sum())} frames": reading.disappeared,
        f"{int(reading.count.max())} objects in {int((reading.count > 1).sum())} frames": bool((reading.count > 1).any()),
        f"the colour is {reading.colour_distance:.0f} away from any": reading.colour_distance > MAX_COLOUR_DISTANCE,
        f"the colour drifts by {reading.colour_drift:.0f}": reading.colour_drift > MAX_COLOUR_DRIFT,
        f"its contrast drifts by {reading.contrast_drift:.0%}": reading.contrast_drift > MAX_CONTRAST_DRIFT,
        f"the area is {reading.area_ratio:.2f} of a {reading.size} object's": not low <= reading.area_ratio <= high,
        f"the area drifts by {reading.area_drift:.0%}": reading.area_drift > MAX_AREA_DRIFT,
        f"no clear shape: misfit {reading.misfit:.2f}": reading.misfit > MAX_MISFIT,
        f"blurred by {reading.softness:.1f} px": reading.softness > MAX_SOFTNESS * reading.side,
        f"its halves differ by {reading.tint:.0f} in colour": reading.tint > MAX_TINT,
        "the shape changes": reading.shape_drift > MAX_SHAPE_DRIFT,
        f"the background has noise of {reading.noise:.0f} levels": reading.noise > MAX_NOISE,
        f"the background drifts by {reading.background_drift:.0f}": reading.background_drift > MAX_BACKGROUND_DRIFT,
        f"{reading.residual:.2f} px from any law of motion": reading.residual
        > law_limit(MAX_RESIDUAL, len(reading.present)) * reading.side,
        f"it turns {reading.edge_gap:.1f} px before the edge": reading.edge_gap > MAX_EDGE_GAP * reading.side,
    }
    return [reason for reason, is_broken in gates.items() if is_broken]


def _look(video: np.ndarray, side: int) -> _Look:
    """Separates object and background in each frame."""
    num_frames, height, width, _ = video.shape
    step = max(1, side // 24)  # a plain background's median needs few pixels
    background = np.median(video[:, ::step, ::step].reshape(num_frames, -1, 3), axis=1).astype(np.float32)
    offset = video - background[:, None, None]
    strength = np.sqrt(np.einsum("thwc,thwc->thw", offset, offset))
    core = max(1, round(0.5 * np.pi * (SIZES["small"] * side) ** 2))  # half of the smallest object's pixels
    brightest = -np.partition(-strength.reshape(num_frames, -1), core - 1, axis=1)[:, :core]
    usual = float(np.median(brightest))
    blobs = find_blobs(strength > max(0.4 * usual, 0.5 * MIN_CONTRAST))
    seen = blobs.pixels >= max(2, 0.1 * core)
    count = np.bincount(blobs.frame[seen], minlength=num_frames)
    near = _near_largest(blobs, num_frames, height, width, pad=2 + side // 24)
    contrast, opacity = _opacity(offset, near, core)
    power = np.square(contrast).sum(1)
    present = (count > 0) & (np.sqrt(power) > max(0.6 * usual, MIN_CONTRAST))
    noise = float(np.sqrt(np.square(offset[~near]).mean())) if not near.all() else 0.0
    tint = _tint(offset * near[..., None], opacity, contrast)
    return _Look(present, count, np.minimum(opacity, 1.2), contrast + background, tint, noise, background)


def _opacity(offset: np.ndarray, near: np.ndarray, core: int) -> tuple[np.ndarray, np.ndarray]:
    """The object's colour less the background's, T 3, and how much of it is in each pixel, T H W.

    Its direction is that of the sum over the object, which halved chroma resolution leaves as it was; its length is that of
    full pixels.
    """
    total = np.einsum("thwc,thw->tc", offset, near)
    direction = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)
    along = np.einsum("thwc,tc->thw", offset, direction) * near
    full = np.median(-np.partition(-along.reshape(len(along), -1), core - 1, axis=1)[:, :core], axis=1)
    full = np.maximum(full, 1)
    return direction * full[:, None], along / full[:, None, None]


def _tint(offset: np.ndarray, opacity: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Per frame, the distance in RGB between the object's left and right, or top and bottom, halves."""
    _, height, width = opacity.shape
    area = np.maximum(opacity.sum((1, 2)), 1)
    lever = 4 / (3 * np.pi) * np.sqrt(area / np.pi)  # mean distance of a disc's pixels from its middle line
    found = []
    for axis, pixels in ((1, np.arange(width)), (2, np.arange(height))):
        colour, share = offset.sum(axis), opacity.sum(axis)
        arm = pixels - (share @ pixels / area)[:, None]
        stray = colour - share[..., None] * contrast[:, None]
        found.append(np.linalg.norm(np.einsum("tx,txc->tc", arm, stray), axis=1) / (area * lever))
    return 2 * np.maximum(*found)


def _near_largest(blobs: Blobs, num_frames: int, height: int, width: int, pad: int) -> np.ndarray:
    """T H W: the box of each frame's largest blob and a rim around it."""
    order = np.argsort(blobs.pixels, kind="stable")
    largest = np.full(num_frames, -1)
    largest[blobs.frame[order]] = order  # the last written wins
    found = largest >= 0
    if not found.any():
        return np.zeros((num_frames, height, width), bool)
    y, x = np.arange(height), np.arange(width)
    inside_y = (y >= blobs.top[largest][:, None] - pad) & (y < blobs.bottom[largest][:, None] + pad)
    inside_x = (x >= blobs.left[largest][:, None] - pad) & (x < blobs.right[largest][:, None] + pad)
    return (inside_y & found[:, None])[:, :, None] & inside_x[:, None, :]


def _misfit(opacity: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Per frame, the energy of the difference over the energy of the template."""
    difference = opacity - template
    return np.einsum("thw,thw->t", difference, difference) / np.maximum(np.einsum("thw,thw->t", template, template), 1e-6)


def _softness(opacity: np.ndarray, shape: str, radius: np.ndarray) -> float:
    """How wide the outline is: across an edge blurred by sigma, opacity * (1 - opacity) sums to sigma / sqrt(pi)."""
    half_covered = (opacity * (1 - opacity)).sum((1, 2)).mean()
    return float(max(half_covered, 0) * np.sqrt(np.pi) / (OUTLINES[shape] * np.median(radius)))


def _drift(values: np.ndarray) -> float:
    """The greatest distance of a frame's values, T c, from their median."""
    return float(np.linalg.norm(values - np.median(values, axis=0), axis=1).max())


@dataclass(frozen=True)
class _Law:
    motion: str
    residual: float  # pixels
    speed: float  # pixels a second
    turn: float = 0.0  # the coordinate where it bounces
    axis: int = 0
    direction: int = 0  # in which it meets the edge


def _closest_law(places: np.ndarray, seconds: np.ndarray, side: int) -> _Law:
    """The law of motion with the least residual: a still point, a line along an axis, or a line reflected once."""
    still = _Law("still", _rms(places - places.mean(0)), 0.0)
    if len(places) == 1 or np.ptp(places, axis=0).max() < MIN_MOVE * side:
        return still
    laws = [_line(places, seconds, axis) for axis in (0, 1)]
    if len(places) > 2:
        laws += [_bounce(places, seconds, axis) for axis in (0, 1)]
    return min(laws, key=lambda law: law.residual)


def _line(places: np.ndarray, seconds: np.ndarray, axis: int) -> _Law:
    clock = seconds - seconds.mean()
    offset = places - places.mean(0)
    speed = float(clock @ offset[:, axis] / (clock @ clock))
    offset[:, axis] -= speed * clock
    name = (("left", "right"), ("up", "down"))[axis][speed > 0]
    return _Law(name, _rms(offset), abs(speed))


def _bounce(places: np.ndarray, seconds: np.ndarray, axis: int) -> _Law:
    """Least squares of turn + speed * |time - turning time| over a grid of turning times in the middle of the clip."""
    turning = seconds[0] + (seconds[-1] - seconds[0]) * np.linspace(0.25, 0.75, 51)
    distance = np.abs(seconds - turning[:, None])
    clock = distance - distance.mean(1, keepdims=True)
    offset = places - places.mean(0)
    speed = clock @ offset[:, axis] / np.square(clock).sum(1).clip(1e-9)
    error = np.square(offset[:, axis] - speed[:, None] * clock).sum(1)
    best = int(error.argmin())
    other = np.square(offset[:, 1 - axis]).sum()
    turn = places[:, axis].mean() - speed[best] * distance[best].mean()
    residual = float(np.sqrt((error[best] + other) / len(places)))
    return _Law("bounce", residual, abs(float(speed[best])), float(turn), axis, -1 if speed[best] > 0 else 1)


def _edge_gap(law: _Law, shape: str, radius: float, height: int, width: int) -> float:
    """How far from the frame's edge an object turns round."""
    if law.motion != "bounce":
        return 0.0
    before, after = EXTENTS[shape][law.axis] * radius, EXTENTS[shape][law.axis + 2] * radius
    return law.turn - before if law.direction < 0 else (width, height)[law.axis] - law.turn - after


def _rms(offset: np.ndarray) -> float:
    """The root mean square distance from a law, as if two frames' places had been spent on fitting it."""
    return float(np.sqrt(np.square(offset).sum() / max(len(offset) - 2, 1)))
