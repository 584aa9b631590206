"""Some trials of each row of the fault matrix, of which `make faults` runs all; experiments/faults/README.md says what they are."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "faults"))
from harness import Ours, world  # noqa: E402
from rows import ROWS, Bench  # noqa: E402

SUBSET: dict[int, tuple[int | None, tuple[str, ...]]] = {  # how many trials, of those whose names hold one of these words
    1: (2, ()),
    2: (2, ("files written", "not renamed yet")),
    3: (None, ("rank 1's part", "the record")),
    4: (2, ("SIGTERM at rank 1", "SIGUSR1 at rank 1")),
    5: (None, ()),
    6: (2, ("cut inside", "bit flipped in caption")),
    7: (2, ("truncated", "one frame")),
    8: (4, ("0)",)),  # one of each deed
    9: (2, ("'loss', 1", "'gradient', 3")),
    10: (2, ("SIGSTOP', 0", "interpreter', 1")),
    11: (2, ("fewer", "held-out")),
    12: (2, ("another save's shard", "edited")),
    13: (3, ("absent", "errors", "crashes")),  # one that hangs is waited for 30 s; tests/trainer/test_record.py does so in less
    14: (None, ("cut', 2", "evaluation raises on the last rank alone', 2")),
    15: (2, ("seed", "another")),
    16: (None, ()),
    17: (3, ("pickle as", "_target_", "symlink")),  # the others are in tests/data/test_hostile.py and tests/trainer/test_checkpoint.py
    18: (None, ()),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    out = tmp_path_factory.mktemp("faults")
    yield Bench(Ours(world(out)), out)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_fault_matrix(bench: Bench, row: int) -> None:
    bench.trials, bench.only = SUBSET[row]
    outcomes = list(ROWS[row][1](bench))
    assert outcomes
    wrong = [f"{trial}: {outcome.told}" for trial, outcome in outcomes if not outcome.right]
    assert not wrong, "\n".join(wrong)
