import pytest

from dit_video.data.plan import Plan


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 1), (1, 8), (7, 3), (100, 32), (32, 32)])
def test_each_pass_has_every_clip_once(num_clips: int, batch_size: int) -> None:
    plan = Plan(num_clips, batch_size, seed=3)
    steps = 3 * num_clips // batch_size + 1
    slots = [slot for step in range(steps) for slot in plan.slots(step)]
    assert slots == list(range(steps * batch_size))
    order = [plan.record_index(slot) for slot in slots]
    for start in range(0, 3 * num_clips, num_clips):
        assert sorted(order[start : start + num_clips]) == list(range(num_clips))


def test_order_depends_on_seed_and_pass_alone() -> None:
    orders = {
        (seed, pass_number): [Plan(50, batch_size, seed).record_index(pass_number * 50 + i) for i in range(50)]
        for batch_size in (1, 8)
        for seed in (0, 1)
        for pass_number in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    for (seed, pass_number), order in orders.items():
        assert order == [Plan(50, 7, seed).record_index(pass_number * 50 + i) for i in range(50)]


def test_the_order_is_pinned() -> None:
    """A resumed run must meet the same clips under any version of numpy."""
    assert [Plan(8, 4, seed=0).record_index(slot) for slot in range(16)] == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


@pytest.mark.parametrize(
    ("num_clips", "batch_size", "seed", "word"), [(0, 1, 0, "num_clips"), (1, 0, 0, "batch_size"), (1, 1, -1, "seed")]
)
def test_numbers_that_cannot_work_are_refused(num_clips: int, batch_size: int, seed: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"data.{word}"):
        Plan(num_clips, batch_size, seed)
