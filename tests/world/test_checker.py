"""The checker passes what the world draws, after H.264, and fails broken clips."""

from itertools import product

import numpy as np
import pytest

from dit_video.data.video_file import encode_mp4, read_video
from dit_video.world.broken import BREAKERS, blur, paint, to_pixels
from dit_video.world.checker import Reading, Verdict, judge, read
from dit_video.world.render import render
from dit_video.world.state import Scene, sample_scene

FRAMES = [(32, 32), (48, 32), (32, 48), (48, 48), (64, 64), (24, 40), (40, 24), (24, 24), (32, 64)]
LENGTHS = [1, 2, 3, 5, 9, 12, 16, 17, 24, 33]
REQUIRED = ("other_colour", "other_shape", "other_size", "other_motion", "reversed", "shuffled", "frozen", "vanished", "second",
            "noise", "blurred")  # fmt: skip


def draw(seed: int, index: int, lengths: list[int] = LENGTHS) -> tuple[np.random.Generator, Scene]:
    """Scenes of every size and length in turn, at frame rates from 4 to 24."""
    rng = np.random.default_rng([seed, index])
    sizes = list(product(FRAMES, lengths))
    (height, width), num_frames = sizes[index % len(sizes)]
    return rng, sample_scene(rng, num_frames=num_frames, height=height, width=width, fps=int(rng.integers(4, 25)), split="any")


def coded(rng: np.random.Generator, video: np.ndarray, fps: float) -> np.ndarray:
    return read_video(encode_mp4(video, fps, crf=int(rng.integers(12, 19))))[0]


def look(scene: Scene, video: np.ndarray) -> tuple[Reading, Verdict]:
    reading = read(video, scene.fps)
    return reading, judge(reading, scene.attributes)


@pytest.mark.slow
def test_ground_truth_passes_after_coding() -> None:
    failed = []
    for index in range(2000):
        rng, scene = draw(1, index)
        reading, verdict = look(scene, coded(rng, render(scene), scene.fps))
        if not verdict.all:
            failed.append((scene, verdict.reasons))
        else:
            assert np.abs(reading.centres - scene.centres()).max() < 0.02 * scene.side
            assert reading.count.tolist() == [1] * scene.num_frames
    assert len(failed) <= 10, failed[:5]


def test_soft_and_slightly_noisy_clips_pass() -> None:
    passed = []
    for index in range(180):
        rng, scene = draw(2, index)
        soft = blur(paint(scene), 0.8 * scene.side / 32)
        video = to_pixels(soft + rng.normal(0, 5, soft.shape))
        passed.append(look(scene, coded(rng, video, scene.fps))[1].all)
    assert np.mean(passed) >= 0.98


def false_passes(name: str, count: int) -> tuple[int, int]:
    """How many broken clips pass before or after coding, of how many."""
    passed, made, index = 0, 0, 0
    while made < count and index < 4 * count:
        rng, scene = draw(3, index, [5, 9, 12, 16, 17, 24, 33])
        index += 1
        try:
            video = BREAKERS[name](rng, scene)
        except ValueError:  # this breaker has nothing to break in this scene
            continue
        made += 1
        passed += look(scene, video)[1].all or look(scene, coded(rng, video, scene.fps))[1].all
    return passed, made


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUIRED)
def test_broken_clips_fail(name: str) -> None:
    passed, made = false_passes(name, 200)
    assert made == 200 and passed <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BREAKERS if name not in REQUIRED])
def test_clips_broken_in_other_ways_fail(name: str) -> None:
    passed, made = false_passes(name, 60)
    assert made >= 30 and passed <= 1


@pytest.mark.parametrize("name", BREAKERS)
def test_every_kind_of_failure_is_caught_once(name: str) -> None:
    passed, made = false_passes(name, 5)
    assert made >= 1 and passed == 0


def test_a_wrong_caption_is_told_apart_from_a_broken_clip() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, num_frames=9, height=32, width=32, fps=8, size="small", colour="red", shape="circle", motion="left")
    reading = read(render(scene), 8)
    assert judge(reading, {}).all and judge(reading, {"colour": "red", "motion": "left"}).all
    verdict = judge(reading, {"colour": "blue", "shape": "circle"})
    assert verdict.right == {"colour": False, "shape": True}
    assert verdict.consistent and not verdict.all and verdict.reasons == ["colour is red, not blue"]
    gone = render(scene)
    gone[4] = scene.background
    verdict = judge(read(gone, 8), scene.attributes)
    assert all(verdict.right.values()) and not verdict.consistent and not verdict.all
    assert verdict.reasons == ["no object in 1 frames"]
    assert read(gone, 8).disappeared and np.isnan(read(gone, 8).centres[4]).all()


def test_speed_is_measured_in_sides_a_second() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, num_frames=17, height=48, width=64, fps=12, motion="right")
    assert read(render(scene), 12).speed == pytest.approx(np.linalg.norm(scene.velocity), rel=0.02)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (3, 2, 50, 3), (2, 33, 17, 3), (33, 8, 8, 3)])
def test_any_clip_gives_a_reading(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for video in (np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), rng.integers(0, 256, shape, dtype=np.uint8)):
        verdict = judge(read(video, 8), {"colour": "red"})
        assert not verdict.all and verdict.reasons


def test_what_is_no_clip_is_refused() -> None:
    for video, fps in ((np.zeros((2, 8, 8, 3)), 8), (np.zeros((8, 8, 3), np.uint8), 8), (np.zeros((2, 8, 8, 3), np.uint8), 0)):
        with pytest.raises(ValueError, match="uint8 clips"):
            read(video, fps)
    with pytest.raises(ValueError, match="no colour 'pink'"):
        judge(read(np.zeros((2, 8, 8, 3), np.uint8), 8), {"colour": "pink"})
