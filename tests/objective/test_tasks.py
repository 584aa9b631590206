"""Tasks: which tokens are given in training, and where a user's frames go in sampling."""

import pytest
import torch

from dit_video.objective.tasks import FirstFrames, InBetween, Task, TextToVideo, check_tasks, draw_task, given_tokens
from dit_video.seeding import seeded
from dit_video.shapes import Grid

EVERY = [TextToVideo(), FirstFrames(), FirstFrames(1, 2, 3), FirstFrames(1, 1, 100), InBetween()]


def drawn(task: Task, token_frames: int) -> set[tuple[int, ...]]:
    return {tuple(task.draw(token_frames, seeded(i))) for i in range(50)}


def test_what_is_given_in_training() -> None:
    assert drawn(TextToVideo(), 5) == {()}
    assert drawn(FirstFrames(), 5) == {(0,)}
    assert drawn(FirstFrames(1, 2, 3), 5) == {(0, 1), (0, 1, 2)}
    assert drawn(FirstFrames(1, 2, 3), 3) == {(0, 1)}
    assert drawn(FirstFrames(1, 0, 1), 5) == {(), (0,)}
    assert drawn(InBetween(), 5) == {(0, 4)} and drawn(InBetween(), 2) == {()}


@pytest.mark.parametrize("task", EVERY)
@pytest.mark.parametrize("token_frames", [1, 2, 3, 5])
def test_something_is_always_left_to_make(task: Task, token_frames: int) -> None:
    for places in drawn(task, token_frames):
        assert len(set(places)) == len(places) < token_frames and all(0 <= place < token_frames for place in places)


@pytest.mark.parametrize("task", EVERY)
def test_one_frame_is_made_from_text_alone(task: Task) -> None:
    assert drawn(task, 1) == {()}


@pytest.mark.parametrize("pt", [1, 2, 4])
def test_where_given_frames_go(pt: int) -> None:
    assert TextToVideo().places(0, 5, pt) == []
    assert FirstFrames().places(1, 5, pt) == [0]
    assert FirstFrames().places(1 + 2 * pt, 5, pt) == [0, 1, 2]
    assert InBetween().places(1 + pt, 5, pt) == [0, 4]


@pytest.mark.parametrize(
    ("task", "num_given", "token_frames", "said"),
    [
        (TextToVideo(), 1, 5, "takes no given frames, got 1"),
        (FirstFrames(), 0, 5, "1 \\+ k \\* 2, got 0"),
        (FirstFrames(), 2, 5, "1 \\+ k \\* 2, got 2"),
        (FirstFrames(), 9, 5, "leave nothing to make"),
        (FirstFrames(), 1, 1, "leave nothing to make"),
        (InBetween(), 2, 5, "3 given frames, got 2"),
        (InBetween(), 3, 2, "set num_frames to a longer clip"),
    ],
)
def test_wrong_numbers_of_frames_are_refused(task: Task, num_given: int, token_frames: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task.places(num_given, token_frames, 2)


def test_given_tokens_are_whole_token_frames() -> None:
    mask = given_tokens([0, 2], Grid(3, 2, 2))
    assert mask.dtype == torch.bool and mask.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert not given_tokens([], Grid(3, 2, 2)).any()


def test_tasks_are_drawn_by_their_probabilities() -> None:
    tasks: dict[str, Task] = {
        "text": TextToVideo(6.0),
        "never": TextToVideo(0.0),
        "image": FirstFrames(3),
        "between": InBetween(1.0),
    }
    names = [draw_task(tasks, seeded(i)) for i in range(2000)]
    for name, share in {"text": 0.6, "never": 0.0, "image": 0.3, "between": 0.1}.items():
        assert names.count(name) / 2000 == pytest.approx(share, abs=0.03)


def test_probabilities_that_cannot_be_are_refused() -> None:
    for tasks, key in (({"image": FirstFrames(-1)}, "image"), ({"image": FirstFrames(float("nan"))}, "image"), ({}, "<task>")):
        with pytest.raises(ValueError, match=f"set objective.tasks.{key}.probability"):
            check_tasks(tasks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task has a probability above 0"):
        check_tasks({"text": TextToVideo(0.0)})

    with pytest.raises(ValueError, match="set objective.tasks.<task>.max_token_frames"):
        FirstFrames(1, 3, 2)
