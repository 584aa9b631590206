import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dit_video.world.render import render
from dit_video.world.state import (
    ATTRIBUTES,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    Scene,
    combinations,
    conditional,
    is_held_out,
    sample_scene,
)

FRAMES = [(32, 32, 9), (48, 32, 5), (24, 40, 17), (64, 64, 33), (25, 71, 2), (32, 32, 3), (24, 24, 1)]


def draw(index: int, height: int = 32, width: int = 32, num_frames: int = 9, fps: float = 8, **rest: str) -> Scene:
    rng = np.random.default_rng([11, index])
    return sample_scene(rng, num_frames=num_frames, height=height, width=width, fps=fps, **rest)  # type: ignore[arg-type]


def test_a_split_leaves_every_word_common_in_training() -> None:
    assert len(HELD_OUT_PAIRS) == 2 and len(HELD_OUT_TRIPLES) == 18
    assert not any((colour, shape) in HELD_OUT_PAIRS for colour, shape, _ in HELD_OUT_TRIPLES)
    train, held_out = combinations("train"), combinations("held_out")
    assert len(train) + len(held_out) == len(combinations("any")) == 2 * 6 * 3 * 6
    assert all(is_held_out(each["colour"], each["shape"], each["motion"]) for each in held_out)
    for name, words in ATTRIBUTES.items():
        counts = Counter(each[name] for each in train)
        assert min(counts[word] for word in words) >= 0.6 * len(train) / len(words)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_come_from_their_split(split: str) -> None:
    scenes = [draw(index, split=split) for index in range(500)]
    assert all(is_held_out(each.colour, each.shape, each.motion) == (split == "held_out") for each in scenes)


@pytest.mark.parametrize(("height", "width", "num_frames"), FRAMES)
def test_objects_are_inside_the_frame_and_move_as_said(height: int, width: int, num_frames: int) -> None:
    for index in range(150):
        scene = draw(index, height, width, num_frames, fps=4 + index % 21, split="any")
        video = render(scene).astype(int) - np.array(scene.background)
        covered = np.abs(video).sum(-1) > 0
        assert covered.sum((1, 2)).min() > 0.9 * np.pi * scene.radius**2  # nothing is cut off
        assert np.ptp(covered.sum((1, 2))) <= 0.3 * covered[0].sum() + 4
        moved = scene.centres()[-1] - scene.centres()[0]
        if num_frames > 1 and scene.motion in ("left", "right", "up", "down"):
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[scene.motion]
            assert moved[axis] * sign > 0.2 * scene.side and moved[1 - axis] == 0
        if scene.motion == "still":
            assert np.ptp(scene.centres(), axis=0).max() == 0


def test_a_bounce_turns_once_and_at_the_edge() -> None:
    for index in range(100):
        scene = draw(index, num_frames=33, split="any", motion="bounce")
        centres = scene.centres()
        axis = int(np.ptp(centres, axis=0).argmax())
        steps = np.sign(np.diff(centres[:, axis]).round(6))
        assert np.count_nonzero(np.diff(steps)) in (1, 2)  # the turn may lie within a step
        assert set(steps) >= {-1, 1}
        frame = render(scene)
        border = (frame[:, 0], frame[:, -1]) if axis else (frame[:, :, 0], frame[:, :, -1])
        assert max(int(np.ptp(edge)) for edge in border) > 20


def test_the_state_survives_json_and_gives_the_same_clip() -> None:
    for index in range(20):
        scene = draw(index)
        again = Scene.from_dict(json.loads(json.dumps(scene.to_dict())))
        assert again == scene
        assert np.array_equal(render(again), render(scene))
    assert np.allclose(scene.to_dict()["centres"], scene.centres(), atol=1e-4)


def test_the_conditional_is_what_sampling_gives() -> None:
    stated: dict[str, Any] = {"shape": "square", "motion": "left"}
    truth = conditional(stated)
    assert sum(truth.values()) == pytest.approx(1)
    assert ("small", "purple") not in truth and ("small", "yellow") not in truth and len(truth) == 8
    drawn: Counter[tuple[str, ...]] = Counter(
        (each.size, each.colour) for each in (draw(index, **stated) for index in range(2000))
    )
    assert drawn.keys() == truth.keys()
    assert all(abs(drawn[key] / 2000 - share) < 0.04 for key, share in truth.items())
    assert conditional({"size": "small", "colour": "red", "shape": "circle", "motion": "left"}) == {(): 1.0}


def test_bounces_are_drawn_twice_as_often_as_other_motions() -> None:
    stated: dict[str, Any] = {"size": "small", "colour": "red", "shape": "circle"}
    truth = conditional(stated)  # right is held out
    assert truth == {("left",): 1 / 6, ("up",): 1 / 6, ("down",): 1 / 6, ("bounce",): 1 / 3, ("still",): 1 / 6}
    drawn = Counter(draw(index, **stated).motion for index in range(2000))
    assert all(abs(drawn[motion] / 2000 - share) < 0.04 for (motion,), share in truth.items())


def test_short_clips_do_not_bounce() -> None:
    assert all(draw(index, num_frames=2).motion != "bounce" for index in range(200))
    with pytest.raises(ValueError, match="bounce"):
        draw(0, num_frames=2, motion="bounce")


@pytest.mark.parametrize(
    "wrong",
    [{"colour": "pink"}, {"mood": "calm"}, {"split": "test"}, {"height": 16}, {"num_frames": 0}, {"fps": 0},
     {"colour": "yellow", "shape": "triangle"}],
)  # fmt: skip
def test_what_the_world_does_not_know_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        draw(0, **wrong)


def test_a_state_that_lacks_a_value_is_refused() -> None:
    state = draw(0).to_dict()
    del state["velocity"]
    with pytest.raises(ValueError, match="velocity"):
        Scene.from_dict(state)
