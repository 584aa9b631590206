"""Wan's two experts on several ranks: the same mathematics, and ranks without clips for an expert call it all the same."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from layout_work import furthest, run_ranks  # noqa: E402
from wan_work import compared, training_experts  # noqa: E402

from dit_video.trainer.layout import Layout  # noqa: E402


@pytest.fixture(scope="module")
def alone() -> Any:
    return run_ranks(1, training_experts, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"shard": 2}, {"context": 2}])
def test_experts_on_two_ranks_are_those_on_one(alone: Any, layout: dict[str, int]) -> None:
    found = run_ranks(Layout(**layout).world_size, training_experts, layout)
    assert all(furthest(compared(each), compared(found[0])) == 0 for each in found[1:])
    assert furthest(compared(found[0]), compared(alone)) < 1e-9
    calls = [each[2] for each in found]
    assert len(calls[0]) == len(calls[1]) and 0 in calls[0] and 0 in calls[1]
    assert ([count > 0 for count in calls[0]] != [count > 0 for count in calls[1]]) == ("shard" in layout)
