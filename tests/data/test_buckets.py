"""Where clips go, and how many of them make a step."""

import numpy as np
import pytest

from dit_video.data.buckets import NO_SHAPE, TOO_SHORT, ClipShape, assign, level, spread

SHAPES = [
    ClipShape(9, 32, 32, 8), ClipShape(9, 32, 48, 8), ClipShape(9, 48, 32, 8), ClipShape(17, 32, 48, 8),
    ClipShape(9, 64, 96, 8), ClipShape(1, 32, 48, 8), ClipShape(1, 64, 64, 8),
]  # fmt: skip


def bucket_of(frames: int, fps: float, height: int, width: int, shapes: list[ClipShape] = SHAPES) -> int:
    return int(assign(shapes, *(np.array([value]) for value in (frames, fps, height, width)))[0])


@pytest.mark.parametrize(
    ("source", "bucket"),
    [
        ((9, 8, 32, 32), 0), ((90, 24, 480, 480), 0), ((27, 24, 480, 640), 4), ((26, 24, 480, 640), 4),  # half a frame may be missing
        ((25, 24, 480, 640), TOO_SHORT), ((30, 24, 360, 640), 4), ((51, 24, 360, 640), 3),  # duration goes before size
        ((30, 24, 640, 360), 2), ((9, 8, 40, 60), 1),  # the larger shape would enlarge it
        ((9, 8, 20, 30), 1), ((1, 0, 300, 300), 6), ((1, 0, 30, 40), 5), ((9, 8, 0, 0), NO_SHAPE), ((0, 8, 32, 32), NO_SHAPE),
    ],
)  # fmt: skip
def test_a_clip_goes_where_most_of_it_is_kept(source: tuple[int, float, int, int], bucket: int) -> None:
    assert bucket_of(*source) == bucket


def test_a_video_is_an_image_only_where_there_is_nothing_else() -> None:
    assert bucket_of(3, 8, 32, 48) == TOO_SHORT
    assert bucket_of(3, 8, 32, 48, [SHAPES[5]]) == 0
    assert bucket_of(1, 8, 32, 32, [SHAPES[0]]) == TOO_SHORT


def test_the_order_of_the_buckets_decides_nothing_but_their_numbers() -> None:
    rng = np.random.default_rng(0)
    sources = rng.integers(1, 60, 500), rng.uniform(5, 30, 500), rng.integers(20, 700, 500), rng.integers(20, 700, 500)
    order = rng.permutation(len(SHAPES))
    forward, shuffled = assign(SHAPES, *sources), assign([SHAPES[number] for number in order], *sources)
    assert np.array_equal(forward, np.where(shuffled < 0, shuffled, order[shuffled]))


@pytest.mark.parametrize("batch_size", [12, 32, 256])
def test_steps_cost_the_same_within_five_hundredths_where_eight_clips_fit(batch_size: int) -> None:
    rng = np.random.default_rng(batch_size)
    for _ in range(200):
        costs = [1.0, *(rng.uniform(0.02, batch_size / 10, 5))]
        sizes = level(costs, batch_size)
        assert abs(sizes[0] / batch_size - 1) <= 0.25 and min(sizes) >= 7
        assert spread(costs, sizes) < 0.05


def test_what_can_be_exact_is() -> None:
    assert level([1.0, 2.0, 0.25], 8) == [8, 4, 32] and level([3.7], 5) == [5]


def test_a_clip_too_large_for_a_step_makes_a_step_of_its_own() -> None:
    assert level([1.0, 100.0], 4)[1] == 1
    with pytest.raises(ValueError, match="cost"):
        level([1.0, 0.0], 4)
