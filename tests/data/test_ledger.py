"""When bad clips are too many, and what is left of a ledger that was torn."""

import json
from pathlib import Path

import numpy as np
import pytest

from dit_video.data.ledger import BadClip, Ledger, tail
from dit_video.data.shards import BadDataError, ClipRecord


def stops_at(ledger: Ledger, bad: np.ndarray) -> int | None:
    """The clip at which a stream, of which some are bad, is stopped."""
    for number, is_bad in enumerate(bad):
        try:
            ledger.account(BadClip(ClipRecord(Path("0.tar"), str(number), {}), "broken") if is_bad else None)
        except BadDataError:
            return number
    return None


def test_the_tail_is_that_of_the_binomial_distribution() -> None:
    rng = np.random.default_rng(0)
    for total, share, count in ((1000, 0.01, 15), (200, 0.05, 14), (50, 0.5, 30)):
        drawn = (rng.binomial(total, share, 400_000) >= count).mean()
        assert tail(count, total, share) == pytest.approx(drawn, rel=0.05)
    assert tail(0, 10, 0.1) == 1 and tail(1, 10, 0.0) == 0 and tail(10, 10, 1.0) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_share_below_the_limit_never_stops_and_one_above_it_does(seed: int) -> None:
    rng, count = np.random.default_rng(seed), 100_000
    assert stops_at(Ledger(count, 0.01, None), rng.random(count) < 0.008) is None
    stopped = stops_at(Ledger(count, 0.01, None), rng.random(count) < 0.03)
    assert stopped is not None and stopped < 5_000


def test_a_whole_pass_leaves_nothing_to_chance() -> None:
    bad = np.zeros(2000, bool)
    bad[:1000:90] = True  # 12 of 1000 clips
    assert stops_at(Ledger(1000, 0.01, None), np.concatenate([bad[:1000], bad[:1000]])) == 1000 + 0
    bad[1000:] = bad[:1000]  # the same clips again, of which each is counted once
    names = np.arange(2000) % 1000
    ledger = Ledger(1000, 0.012, None)
    for name, is_bad in zip(names, bad, strict=True):
        ledger.account(BadClip(ClipRecord(Path("0.tar"), str(name), {}), "broken") if is_bad else None)


def test_data_that_turns_bad_late_is_noticed_soon() -> None:
    rng = np.random.default_rng(0)
    bad = np.concatenate([np.zeros(200_000, bool), rng.random(20_000) < 0.05])
    stopped = stops_at(Ledger(1_000_000, 0.01, None), bad)
    assert stopped is not None and stopped < 202_000


def test_clips_in_order_are_judged_by_their_share_of_all() -> None:
    neighbours = np.arange(2000) < 20
    assert stops_at(Ledger(2000, 0.01, None, shuffled=False), neighbours) is None
    assert stops_at(Ledger(2000, 0.01, None, shuffled=False), np.arange(2000) < 21) == 20
    assert stops_at(Ledger(40, 0.01, None, shuffled=False), np.ones(40, bool)) == 15
    assert stops_at(Ledger(3, 0.01, None, shuffled=False), np.ones(3, bool)) == 2
    assert stops_at(Ledger(40, 1, None, shuffled=False), np.ones(40, bool)) is None


def test_no_bad_clip_is_borne_where_none_is_allowed() -> None:
    bad = np.zeros(500, bool)
    bad[7] = True
    assert stops_at(Ledger(500, 0.0, None), bad) == 7


@pytest.mark.parametrize("torn", ['{"key": "a", "sha', '{"key": "a", "shard": "0.tar"', "\x00\x00", "[1]", '{"key": 3}\n'])
def test_a_torn_line_costs_one_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "skipped.jsonl"
    whole = json.dumps({"key": "b", "shard": "0.tar", "offset": 0, "reason": "broken"})
    path.write_text(f"{whole}\n{torn}")
    for _ in range(3):
        ledger = Ledger(1000, 0.5, path)
        for key in ("b", "c"):
            ledger.account(BadClip(ClipRecord(Path("0.tar"), key, {}), "broken"))
            ledger.account(None)
    lines = [line for line in path.read_text().splitlines() if line]
    assert lines[0] == whole and json.loads(lines[-1])["key"] == "c" and len(lines) == 3
