"""State to frames: anti-aliased, with exact sub-pixel places."""

import math

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.world.state import COLOURS, EXTENTS, Scene


def render(scene: Scene) -> UInt8[np.ndarray, "T H W 3"]:
    """The clip of a scene, colours blended over the background by how much of each pixel the object covers."""
    centres, radius = scene.centres(), np.full(scene.num_frames, scene.radius)
    opacity = coverage(scene.shape, centres, radius, np.arange(scene.width)[None], np.arange(scene.height)[None])
    video = np.empty((*opacity.shape, 3), np.uint8)
    for channel, (background, colour) in enumerate(zip(scene.background, COLOURS[scene.colour], strict=True)):
        # All channels at once would take five times as long.
        video[..., channel] = opacity * np.float32(colour - background) + np.float32(background + 0.5)
    return video


def coverage(
    shape: str,
    centres: Float[np.ndarray, "T 2"],
    radius: Float[np.ndarray, " T"],
    columns: np.ndarray,
    rows: np.ndarray,
    softness: float = 1.0,
) -> Float[np.ndarray, "T H W"]:
    """How much of each pixel the object covers, in [0, 1]: a ramp `softness` pixels wide across its outline.

    `columns` is 1 W or T W and `rows` 1 H or T H: the pixels' indices, per frame if they differ. A square of softness 1 is exact.
    """
    x = (columns + 0.5 - centres[:, :1]).astype(np.float32)  # T W
    y = (rows + 0.5 - centres[:, 1:]).astype(np.float32)  # T H
    r = radius.astype(np.float32)[:, None]
    left, up, right, down = EXTENTS[shape]
    if shape == "square":
        return _overlap(y, up * r, down * r, softness)[:, :, None] * _overlap(x, left * r, right * r, softness)[:, None, :]
    if shape == "circle":
        outside = np.sqrt(np.square(y)[:, :, None] + np.square(x)[:, None, :]) - r[:, :, None]
    else:
        slanted = (np.abs(x) * math.sqrt(0.75))[:, None, :] - (y / 2 + down * r)[:, :, None]
        outside = np.maximum(slanted, (y - down * r)[:, :, None])
    return np.clip(0.5 - outside / softness, 0, 1)


def _overlap(offset: np.ndarray, before: np.ndarray, after: np.ndarray, softness: float) -> np.ndarray:
    """How much of each pixel, softened, lies between -before and after."""
    reach = np.minimum(offset + softness / 2, after) - np.maximum(offset - softness / 2, -before)
    return np.clip(reach / softness, 0, 1)
