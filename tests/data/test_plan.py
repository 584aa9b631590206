"""The sequence of steps: nothing lost, nothing twice, in proportion, and the same from wherever it is asked for."""

from collections import Counter

import numpy as np
import pytest

from dit_video.data.plan import CHUNK, PATTERN, Plan, permutation


def plan_of(counts: list[list[int]], sizes: list[int], weights: list[float] | None = None, seed: int = 3) -> Plan:
    """A plan over counts[bucket][source] clips, numbered through."""
    numbers = iter(range(10**9))
    records = [[np.array([next(numbers) for _ in range(count)], np.int64) for count in bucket] for bucket in counts]
    return Plan(records, sizes, weights or [1.0] * len(counts[0]), seed)


def taken(plan: Plan, bucket: int, clips: int, source: int = 0) -> list[int]:
    """The first clips that a bucket takes from a source."""
    own, found, number = set(plan.records[bucket][source].tolist()), [], 0
    while len(found) < clips:
        found += [record for record in plan.step(number).records.tolist() if record in own]
        number += 1
    return found[:clips]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 8), (7, 3), (100, 32), (32, 32)])
def test_each_pass_has_every_clip_once(count: int, size: int) -> None:
    plan = plan_of([[count]], [size])
    order = taken(plan, 0, 3 * count)
    for start in range(0, 3 * count, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert plan.step(5).slots == range(5 * size, 6 * size)


def test_what_is_rare_is_never_dropped() -> None:
    """Buckets with fewer clips than a step holds, or with a remainder, keep their turn."""
    plan = plan_of([[1000], [3], [17], [1]], [16, 8, 4, 2])
    for bucket, count in enumerate([1000, 3, 17, 1]):
        order = taken(plan, bucket, 3 * count)
        for start in range(0, 3 * count, count):
            assert sorted(order[start : start + count]) == sorted(plan.records[bucket][0].tolist())


def test_all_buckets_advance_alike_through_their_passes() -> None:
    counts, sizes = [640, 96, 40, 250], [16, 8, 4, 5]
    plan = plan_of([[count] for count in counts], sizes)
    steps = sum(count * 3 / size for count, size in zip(counts, sizes, strict=True))
    seen = plan.clips_before(round(steps))[:, 0]
    assert all(abs(clips - 3 * count) <= 2 * size for clips, count, size in zip(seen, counts, sizes, strict=True))


def test_slots_count_the_clips_of_all_steps_before() -> None:
    plan = plan_of([[300], [50]], [12, 5])
    slot = 0
    for number in range(2 * CHUNK + 50):
        step = plan.step(number)
        assert step.slots == range(slot, slot + len(step.records)) and len(step.records) == plan.sizes[step.bucket]
        slot += len(step.records)
        if number % 97 == 0:
            assert plan.clips_before(number + 1).sum() == slot


def test_a_step_is_the_same_from_wherever_it_is_asked_for() -> None:
    def fresh() -> Plan:
        return plan_of([[300, 20], [50, 0], [7, 90]], [12, 5, 3], [0.7, 0.3])

    order = [fresh().step(number) for number in (5000, 3, 4999, 0, 2048)]
    straight = fresh()
    steps = {number: straight.step(number) for number in range(5001)}
    for step in order:
        other = steps[step.number]
        assert (step.bucket, step.slots, step.records.tolist()) == (other.bucket, other.slots, other.records.tolist())


def test_sources_are_mixed_by_their_weights_whatever_their_sizes() -> None:
    plan = plan_of([[900, 30, 500], [100, 10, 0]], [16, 8], [0.5, 0.3, 0.2])
    seen = plan.clips_before(4000)
    assert np.allclose(seen.sum(0) / seen.sum(), [0.5, 0.3, 0.2], atol=0.002)
    assert np.allclose(seen[0, :2] / seen[1, :2], [9, 3], rtol=0.02)  # a source's buckets advance alike
    owners = [sorted(plan.step(number).records.tolist()) for number in range(50)]
    assert all(any(900 <= record < 930 for record in step) for step in owners if len(step) == 16)  # in every step, not in turns
    order = taken(plan, 0, 90, source=1)
    assert all(sorted(order[start : start + 30]) == list(range(900, 930)) for start in (0, 30, 60))


def test_a_source_of_weight_zero_is_left_out() -> None:
    plan = plan_of([[40, 40]], [8], [1.0, 0.0])
    assert max(record for number in range(100) for record in plan.step(number).records.tolist()) < 40


def test_tiny_shares_are_dealt_out_too() -> None:
    plan = plan_of([[10, 10]], [8], [1.0, 1e-6])
    seen = plan.clips_before(10 * PATTERN // 8)
    assert seen[0].tolist() == [10 * (PATTERN - 1), 10]


def test_order_depends_on_seed_bucket_source_and_pass() -> None:
    orders = {key: tuple(permutation(50, *key)) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(set(orders.values())) == 5 and orders[0, 0, 0, 0] == tuple(permutation(50, 0, 0, 0, 0))


def test_buckets_take_turns_evenly() -> None:
    plan = plan_of([[800], [200]], [8, 8])
    buckets = [plan.step(number).bucket for number in range(1000)]
    assert all(abs(Counter(buckets[start : start + 50])[1] - 10) <= 1 for start in range(950))


def test_the_order_is_pinned() -> None:
    """A resumed run must meet the same clips under any version of numpy."""
    plan = plan_of([[8], [4]], [4, 2], seed=0)
    assert [(step.bucket, step.first_slot, step.records.tolist()) for step in map(plan.step, range(6))] == PINNED


PINNED = [
    (1, 0, [9, 10]), (0, 2, [3, 2, 1, 6]), (1, 6, [8, 11]), (0, 8, [0, 7, 4, 5]), (1, 12, [8, 9]), (0, 14, [6, 2, 4, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("count", "parts"), [(1, [10]), (3, [3, 3, 4]), (4, [2, 3, 2, 3]), (12, [0, *[1] * 5, 0, *[1] * 5])])
def test_micro_batches_are_even_parts_of_a_step(count: int, parts: list[int]) -> None:
    ranges = plan_of([[30]], [10]).step(4).micro_batches(count)
    assert [len(part) for part in ranges] == parts and [place for part in ranges for place in part] == list(range(10))


@pytest.mark.parametrize(
    ("counts", "sizes", "weights", "seed", "key"),
    [
        ([[0]], [4], [1.0], 0, "data.shards"), ([[4]], [0], [1.0], 0, "data.batch_size"), ([[4]], [4], [1.0], -1, "data.seed"),
        ([[4]], [4], [0.0], 0, "data.sources"), ([[4]], [4], [-1.0], 0, "data.sources"), ([[4, 0]], [4], [1.0, 1.0], 0, "source 1"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_work_are_refused(
    counts: list[list[int]], sizes: list[int], weights: list[float], seed: int, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        plan_of(counts, sizes, weights, seed)
