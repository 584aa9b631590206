"""World clips broken as video models break them, to test the checker with: none of them is what its scene's attributes say."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.world.render import coverage, render
from dit_video.world.state import COLOURS, MOTIONS, SHAPES, SIZES, Scene, centre_box, sample_scene

Video = UInt8[np.ndarray, "T H W 3"]
Breaker = Callable[[np.random.Generator, Scene], Video]

BREAKERS: dict[str, Breaker] = {}  # by name; a clip that one cannot break (a frozen still object) it refuses with ValueError


def _breaker(breaker: Breaker) -> Breaker:
    BREAKERS[breaker.__name__.strip("_")] = breaker
    return breaker


def paint(
    scene: Scene,
    centres: np.ndarray | None = None,
    radius: np.ndarray | None = None,
    shapes: list[str] | None = None,
    colours: np.ndarray | None = None,
    opacity: np.ndarray | None = None,
) -> Float[np.ndarray, "T H W 3"]:
    """The scene in floating point with some of its object's traits given per frame."""
    centres = scene.centres() if centres is None else centres
    radius = np.full(scene.num_frames, scene.radius) if radius is None else radius
    rows, columns = np.arange(scene.height)[None], np.arange(scene.width)[None]
    shapes = shapes or [scene.shape] * scene.num_frames
    frames = [coverage(shape, centres[i : i + 1], radius[i : i + 1], columns, rows)[0] for i, shape in enumerate(shapes)]
    covered = np.stack(frames)[..., None]
    if opacity is not None:
        covered = covered * opacity[:, None, None, None]
    colours = np.tile(COLOURS[scene.colour], (scene.num_frames, 1)) if colours is None else colours
    return np.array(scene.background) + covered * (colours[:, None, None] - np.array(scene.background))


def to_pixels(video: np.ndarray) -> Video:
    """Rounded and clipped to uint8."""
    return np.clip(np.round(video), 0, 255).astype(np.uint8)


def _other(rng: np.random.Generator, words: object, word: str) -> str:
    return str(rng.choice([each for each in words if each != word]))  # type: ignore[attr-defined]


def _needs(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"this breaks only clips {what}")


def _instead(rng: np.random.Generator, scene: Scene, **other: str) -> Video:
    """Another clip that differs in some attributes."""
    return render(
        sample_scene(rng, num_frames=scene.num_frames, height=scene.height, width=scene.width, fps=scene.fps, split="any",
                     **{**scene.attributes, **other})
    )  # fmt: skip


def _moved(scene: Scene) -> float:
    return float(np.ptp(scene.centres(), axis=0).max())


@_breaker
def other_colour(rng: np.random.Generator, scene: Scene) -> Video:
    return _instead(rng, scene, colour=_other(rng, COLOURS, scene.colour))


@_breaker
def other_shape(rng: np.random.Generator, scene: Scene) -> Video:
    return _instead(rng, scene, shape=_other(rng, SHAPES, scene.shape))


@_breaker
def other_size(rng: np.random.Generator, scene: Scene) -> Video:
    return _instead(rng, scene, size=_other(rng, SIZES, scene.size))


@_breaker
def other_motion(rng: np.random.Generator, scene: Scene) -> Video:
    _needs(scene.num_frames > 1, "of two frames or more")
    motions = MOTIONS if scene.num_frames > 2 else [each for each in MOTIONS if each != "bounce"]
    return _instead(rng, scene, motion=_other(rng, motions, scene.motion))


@_breaker
def reversed_(rng: np.random.Generator, scene: Scene) -> Video:
    _needs(scene.motion in ("left", "right", "up", "down") and scene.num_frames > 1, "that move in a direction")
    return render(scene)[::-1]


@_breaker
def shuffled(rng: np.random.Generator, scene: Scene) -> Video:
    """Out of order by a pixel at least: a bounce played backwards, or with two frames of one place exchanged, is not broken."""
    _needs(_moved(scene) > 0 and scene.num_frames > 3, "that move, of four frames or more")
    centres = scene.centres()
    for _ in range(100):
        order = rng.permutation(scene.num_frames)
        straight, backwards = centres[order] - centres, centres[order] - centres[::-1]
        if min(np.abs(straight).max(), np.abs(backwards).max() if scene.motion == "bounce" else np.inf) > scene.side / 32:
            return render(scene)[order]
    raise ValueError("this clip's frames are all alike")


@_breaker
def frozen(rng: np.random.Generator, scene: Scene) -> Video:
    _needs(_moved(scene) > 0, "that move")
    return np.repeat(render(scene)[[rng.integers(scene.num_frames)]], scene.num_frames, axis=0)


@_breaker
def vanished(rng: np.random.Generator, scene: Scene) -> Video:
    hidden = rng.permutation(scene.num_frames) < rng.integers(1, scene.num_frames + 1)
    return to_pixels(paint(scene, opacity=1.0 - hidden))


@_breaker
def second(rng: np.random.Generator, scene: Scene) -> Video:
    """A second object of any kind, clear of the first, in all frames or in a run of them."""
    video, centres = paint(scene), scene.centres()
    other = Scene(
        **{**{name: str(rng.choice(list(words))) for name, words in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES))}},
        motion="still", start=(0.0, 0.0), velocity=(0.0, 0.0), background=scene.background,
        height=scene.height, width=scene.width, fps=scene.fps, num_frames=scene.num_frames,
    )  # fmt: skip
    low, high = centre_box(other.shape, other.size, scene.height, scene.width)
    first = int(rng.integers(scene.num_frames)) if rng.random() < 0.5 else 0
    for _ in range(500):
        place = rng.uniform(low, high) * scene.side
        if (np.linalg.norm(centres[first:] - place, axis=1) > 1.2 * (scene.radius + other.radius)).all():
            layer = paint(other, np.tile(place, (scene.num_frames, 1)))
            video[first:] += (layer - np.array(scene.background))[first:]
            return to_pixels(video)
    raise ValueError("there is no room for a second object")


@_breaker
def overlapping(rng: np.random.Generator, scene: Scene) -> Video:
    """A second object partly over the first, moving with it."""
    angle, distance = rng.uniform(0, 2 * np.pi), scene.radius * rng.uniform(1.1, 1.6)
    other = scene.centres() + distance * np.array([np.cos(angle), np.sin(angle)])
    colour = np.tile(COLOURS[_other(rng, COLOURS, scene.colour)], (scene.num_frames, 1))
    layer = paint(scene, other, colours=colour)
    video, background = paint(scene), np.array(scene.background)
    return to_pixels(np.where(np.abs(layer - background).max(-1, keepdims=True) > 0, layer, video))


@_breaker
def noise(rng: np.random.Generator, scene: Scene) -> Video:
    return rng.integers(0, 256, (scene.num_frames, scene.height, scene.width, 3), dtype=np.uint8)


@_breaker
def blurred(rng: np.random.Generator, scene: Scene) -> Video:
    """So strongly that the shape is lost: sigma 0.08 to 0.12 sides."""
    return to_pixels(blur(paint(scene), rng.uniform(0.08, 0.12) * scene.side))


@_breaker
def recoloured(rng: np.random.Generator, scene: Scene) -> Video:
    """Another colour from some frame on."""
    _needs(scene.num_frames > 1, "of two frames or more")
    colours = np.tile(COLOURS[scene.colour], (scene.num_frames, 1))
    colours[rng.integers(1, scene.num_frames) :] = COLOURS[_other(rng, COLOURS, scene.colour)]
    return to_pixels(paint(scene, colours=colours))


@_breaker
def fading_colour(rng: np.random.Generator, scene: Scene) -> Video:
    """Blending into another colour over the clip."""
    _needs(scene.num_frames > 1, "of two frames or more")
    share = np.linspace(0, 1, scene.num_frames)[:, None]
    other = np.array(COLOURS[_other(rng, COLOURS, scene.colour)])
    return to_pixels(paint(scene, colours=(1 - share) * np.array(COLOURS[scene.colour]) + share * other))


@_breaker
def reshaped(rng: np.random.Generator, scene: Scene) -> Video:
    """Another shape from some frame on, for two frames at least."""
    _needs(scene.num_frames > 3, "of four frames or more")
    turn = int(rng.integers(2, scene.num_frames - 1))
    other = _other(rng, SHAPES, scene.shape)
    return to_pixels(paint(scene, shapes=[scene.shape] * turn + [other] * (scene.num_frames - turn)))


@_breaker
def teleported(rng: np.random.Generator, scene: Scene) -> Video:
    """Jumps by 0.15 sides or more, once, somewhere in the middle."""
    _needs(scene.num_frames > 4, "of five frames or more")
    low, high = (edge * scene.side for edge in centre_box(scene.shape, scene.size, scene.height, scene.width))
    centres, turn = scene.centres(), int(rng.integers(2, scene.num_frames - 1))
    for _ in range(500):
        jump = rng.uniform(-0.5, 0.5, 2) * scene.side
        after = centres[turn:] + jump
        if np.linalg.norm(jump) > 0.15 * scene.side and (after > low).all() and (after < high).all():
            return to_pixels(paint(scene, np.concatenate([centres[:turn], after])))
    raise ValueError("there is no room to jump")


@_breaker
def jittered(rng: np.random.Generator, scene: Scene) -> Video:
    """Off its place by about 0.03 sides (one pixel of 32) in each direction, anew in every frame."""
    _needs(scene.num_frames > 4, "of five frames or more")
    return to_pixels(paint(scene, scene.centres() + rng.normal(0, 0.035 * scene.side, (scene.num_frames, 2))))


@_breaker
def growing(rng: np.random.Generator, scene: Scene) -> Video:
    _needs(scene.num_frames > 1, "of two frames or more")
    factor = np.linspace(1, rng.uniform(1.4, 1.8), scene.num_frames)
    return to_pixels(paint(scene, radius=scene.radius * (factor if scene.size == "small" else 1 / factor)))


@_breaker
def noisy(rng: np.random.Generator, scene: Scene) -> Video:
    """Gaussian noise of 25 to 60 grey levels on the clip."""
    video = paint(scene)
    return to_pixels(video + rng.normal(0, rng.uniform(25, 60), video.shape))


@_breaker
def flickering(rng: np.random.Generator, scene: Scene) -> Video:
    """The object's brightness changes from frame to frame."""
    _needs(scene.num_frames > 3, "of four frames or more")
    opacity = rng.choice((0.5, 1.0), scene.num_frames)
    opacity[rng.permutation(scene.num_frames)[:2]] = 0.5, 1.0
    return to_pixels(paint(scene, opacity=opacity))


@_breaker
def halting(rng: np.random.Generator, scene: Scene) -> Video:
    """Stops half way."""
    _needs(scene.motion in ("left", "right", "up", "down") and scene.num_frames > 4, "that move in a direction, of five frames")
    centres = scene.centres()
    return to_pixels(paint(scene, centres[np.minimum(np.arange(scene.num_frames), scene.num_frames // 2)]))


@_breaker
def slanting(rng: np.random.Generator, scene: Scene) -> Video:
    """Drifts across its direction by as much as it moves, or anywhere if it should be still."""
    _needs(scene.num_frames > 2, "of three frames or more")
    low, high = (edge * scene.side for edge in centre_box(scene.shape, scene.size, scene.height, scene.width))
    ends = np.sort(rng.uniform(low, high, (2, 2)), axis=0)
    centre, reach = ends.mean(0), max(0.2 * scene.side, float(np.ptp(ends, axis=0).min())) / 2
    way = np.linspace(-1, 1, scene.num_frames)[:, None] * reach * rng.choice((-1, 1), 2)
    return to_pixels(paint(scene, np.clip(centre + way, low, high)))


@_breaker
def turning_early(rng: np.random.Generator, scene: Scene) -> Video:
    """Turns round in the middle of the frame, without an edge to bounce off."""
    _needs(scene.motion == "bounce" and scene.num_frames > 4, "that bounce, of five frames or more")
    centres = scene.centres()
    axis = int(np.ptp(centres, axis=0).argmax())
    inwards = np.sign(centres[0, axis] - centres[scene.num_frames // 2, axis])
    centres[:, axis] += inwards * rng.uniform(0.15, 0.3) * scene.side
    return to_pixels(paint(scene, centres))


@_breaker
def leaving(rng: np.random.Generator, scene: Scene) -> Video:
    """Goes out of the frame by its half or more."""
    _needs(scene.num_frames > 2, "of three frames or more")
    centres = scene.centres()
    gone = -centres[-1] if rng.random() < 0.5 else np.array([scene.width, scene.height]) - centres[-1]
    gone[rng.integers(2)] = 0
    return to_pixels(paint(scene, centres + np.linspace(0, 1, scene.num_frames)[:, None] * gone))


@_breaker
def torn(rng: np.random.Generator, scene: Scene) -> Video:
    """The frame's lower or right half is shifted by 0.2 sides where it cuts the object."""
    video = render(scene)
    for frame, (_, y) in zip(video, scene.centres(), strict=True):
        frame[int(y) :] = np.roll(frame[int(y) :], round(0.2 * scene.side), axis=1)
    return video


@_breaker
def hollow(rng: np.random.Generator, scene: Scene) -> Video:
    """Only an outline is left."""
    inner = paint(scene, radius=np.full(scene.num_frames, 0.7 * scene.radius))
    return to_pixels(paint(scene) - inner + np.array(scene.background))


@_breaker
def ghosting(rng: np.random.Generator, scene: Scene) -> Video:
    """Every frame blended with the clip's other end."""
    _needs(scene.motion in ("left", "right", "up", "down"), "that move in a direction")
    video = paint(scene)
    return to_pixels(0.5 * video + 0.5 * video[::-1])


@_breaker
def two_coloured(rng: np.random.Generator, scene: Scene) -> Video:
    """One half of the object has another colour."""
    video, centres = paint(scene), scene.centres()
    other = paint(scene, colours=np.tile(COLOURS[_other(rng, COLOURS, scene.colour)], (scene.num_frames, 1)))
    right = np.arange(scene.width)[None, None, :, None] > centres[:, 0, None, None, None]
    return to_pixels(np.where(right, other, video))


@_breaker
def grey(rng: np.random.Generator, scene: Scene) -> Video:
    """An object without colour."""
    return to_pixels(paint(scene, colours=np.full((scene.num_frames, 3), rng.uniform(120, 250))))


@_breaker
def empty(rng: np.random.Generator, scene: Scene) -> Video:
    return to_pixels(paint(scene, opacity=np.zeros(scene.num_frames)))


def blur(video: Float[np.ndarray, "T H W 3"], sigma: float) -> Float[np.ndarray, "T H W 3"]:
    """Convolved with a Gaussian of sigma pixels, edges repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        width = [(reach, reach) if each == axis else (0, 0) for each in range(4)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(video, width, mode="edge"), len(kernel), axis=axis)
        video = windows @ kernel
    return video
