"""What all ranks do together fails on all of them where it fails on one, whatever they are waiting for by then."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from layout_work import run_ranks  # noqa: E402

from dit_video.trainer.layout import RankFailed, all_gathered, asked_before, together  # noqa: E402


def some_fail() -> list[str]:
    """Rank 1 fails before, between and after what the others wait for; after each, all are in step again."""
    torch.distributed.init_process_group("gloo")
    rank, told = int(os.environ["RANK"]), []
    waiting = nn.Linear(1, 1)  # a network whose forward pass waits for all ranks
    waiting.register_forward_pre_hook(lambda *_: torch.distributed.all_reduce(torch.ones(1)))

    def work(when: int) -> list[int]:
        for number in range(3):
            if rank == 1 and number == when:
                raise ValueError(f"fault {when}")
            waiting(torch.ones(1, 1))
        if rank == 1 and when == 3:
            raise KeyError("at the end")
        return all_gathered(rank)

    for when in range(4):
        try:
            with asked_before([waiting]):
                together(lambda when=when: work(when))
        except RankFailed as error:
            told.append(str(error))
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == 3
    with asked_before([waiting]):
        assert together(lambda: work(9)) == [0, 1, 2]
    return told


@pytest.mark.slow
def test_a_failure_of_one_rank_is_one_of_all() -> None:
    wanted = [*(f"rank 1: ValueError: fault {number}" for number in range(3)), "rank 1: KeyError: 'at the end'"]
    assert run_ranks(3, some_fail) == [wanted] * 3


def test_one_rank_alone_is_told_of_its_own_failure() -> None:
    assert together(lambda: 3) == 3
    with pytest.raises(RankFailed, match="^ZeroDivisionError"):
        together(lambda: 1 // 0)
