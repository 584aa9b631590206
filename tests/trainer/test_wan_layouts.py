"""Wan's two experts on several ranks: the same mathematics, and ranks without clips for an expert call it all the same."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from layout_work import furthest, run_ranks  # noqa: E402
from wan_work import compared, training_experts  # noqa: E402

from dit_video.model.lora import is_adapter  # noqa: E402
from dit_video.trainer.layout import Layout  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"shard": 2}, {"context": 2}])
def test_experts_on_two_ranks_are_those_on_one(layout: dict[str, int]) -> None:
    found = same_as_alone(layout, adapted=False)
    calls = [each[2] for each in found]
    assert len(calls[0]) == len(calls[1]) and 0 in calls[0] and 0 in calls[1]
    assert ([count > 0 for count in calls[0]] != [count > 0 for count in calls[1]]) == ("shard" in layout)


@pytest.mark.slow
def test_adapters_on_two_ranks_are_those_on_one() -> None:
    """Frozen weights beside trained ones in what is cut."""
    pytest.importorskip("peft")
    weights = same_as_alone({"shard": 2}, adapted=True)[0][1]
    assert sum(is_adapter(name) and bool(value.any()) for name, value in weights.items()) == 2 * 2 * 10 * 2


def same_as_alone(layout: dict[str, int], adapted: bool) -> list[Any]:
    alone = run_ranks(1, training_experts, {}, adapted)[0]
    found = run_ranks(Layout(**layout).world_size, training_experts, layout, adapted)
    assert all(furthest(compared(each), compared(found[0])) == 0 for each in found[1:])
    assert furthest(compared(found[0]), compared(alone)) < 1e-9
    return found
