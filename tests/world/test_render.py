import numpy as np
import pytest

from dit_video.world.render import coverage, render
from dit_video.world.state import COLOURS, EXTENTS, SHAPES, sample_scene

PIXELS = np.arange(32)[None]


def inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Whether points belong to a shape, from its corners alone."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    left, up, right, down = (extent * radius for extent in EXTENTS[shape])
    corners = (
        [(-left, -up), (right, -up), (right, down), (-left, down)]
        if shape == "square"
        else [(0, -up), (right, down), (-left, down)]
    )
    result = np.ones(np.broadcast(x, y).shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        result &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_agrees_with_counting_points(shape: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        centre, radius = rng.uniform(14, 18, 2), rng.uniform(3, 8)
        fine = (np.arange(32 * 16) + 0.5) / 16
        points = inside(shape, fine[None] - centre[0], fine[:, None] - centre[1], radius)
        truth = points.reshape(32, 16, 32, 16).mean((1, 3))
        found = coverage(shape, centre[None], np.array([radius]), PIXELS, PIXELS)[0]
        assert (
            np.abs(found - truth).mean() < 0.003 and np.abs(found - truth).max() < 0.35
        )  # corners of a triangle are approximate
        assert found.sum() == pytest.approx(np.pi * radius**2, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_shift_is_seen(shape: str) -> None:
    centres = np.array([[16.0, 16.0], [16.05, 16.0], [16.0, 15.95]])
    found = coverage(shape, centres, np.full(3, 5.0), PIXELS, PIXELS)
    middle = np.stack([found.sum(1) @ (PIXELS[0] + 0.5), found.sum(2) @ (PIXELS[0] + 0.5)], axis=1) / found.sum((1, 2))[:, None]
    assert np.allclose(middle - middle[0], centres - centres[0], atol=0.02)


def test_colours_are_exact_and_the_background_is_plain() -> None:
    for index in range(30):
        scene = sample_scene(np.random.default_rng(index), num_frames=5, height=48, width=32, fps=8)
        video = render(scene)
        assert video.dtype == np.uint8 and video.shape == (5, 48, 32, 3)
        pixels = video.reshape(-1, 3)
        assert (pixels == COLOURS[scene.colour]).all(1).any()
        share = (pixels == scene.background).all(1).mean()
        assert share > 0.75


def test_a_larger_frame_shows_the_same_clip() -> None:
    one, two = (
        sample_scene(np.random.default_rng(3), num_frames=5, height=side, width=side, fps=8, colour="red", motion="up")
        for side in (32, 64)
    )
    assert np.allclose(2 * one.centres(), two.centres())
    halved = render(two).reshape(5, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(halved - render(one)).max() < 25
