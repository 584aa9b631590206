"""Every way in which a shard comes to harm is found, and costs exactly the clips whose bytes are gone."""

import json
import os
from pathlib import Path

import pytest
from clip_files import clip_sample, frame_numbers
from corruptions import CORRUPTIONS

from dit_video.data.index import write_index
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import BadDataError, sidecar, write_shard
from dit_video.data_tools.check import check_shards

COUNT = 8


def shards_of(folder: Path, index: bool) -> tuple[Path, Path]:
    """The shard that will come to harm, and one that will not."""
    harmed, whole = folder / "0.tar", folder / "1.tar"
    write_shard(harmed, [clip_sample(number) for number in range(COUNT)])
    write_shard(whole, [clip_sample(number) for number in range(COUNT, 2 * COUNT)])
    for path in (harmed, whole):
        if index:
            write_index(path)
    return harmed, whole


def one_pass(folder: Path) -> tuple[set[int], set[int], list[dict]]:
    """The clips of a pass that were trained on, those that were not, and the ledger."""
    ledger = folder / "skipped.jsonl"
    loader = ClipLoader(f"{folder}/*.tar", 4, 3, 16, 16, 8, decoder="pyav", max_bad_fraction=1, skipped_path=ledger)
    trained, lost = set(), set()
    for batch in loader.one_pass():
        for video, caption, key, weight in zip(
            batch.video.numpy(), batch.captions, batch.keys, batch.weights.tolist(), strict=True
        ):
            number = int(key.split(":")[1])
            if weight:
                assert frame_numbers(video) == [number, number + 1, number + 2] and caption == f"clip number {number}"
                trained.add(number)
            else:
                lost.add(number)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return trained, lost - trained, lines


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_with_an_index_exactly_the_lost_clips_are_left_out(
    tmp_path: Path, name: str, at: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed, _ = shards_of(tmp_path, index=True)
    CORRUPTIONS[name].change(harmed, at)
    expected = CORRUPTIONS[name].lost(at, COUNT)
    trained, lost, ledger = one_pass(tmp_path)
    assert lost == expected and trained == set(range(2 * COUNT)) - expected
    assert {int(line["key"]) for line in ledger} == expected and all(line["shard"] == str(harmed) for line in ledger)
    with pytest.raises(BadDataError, match="clips are bad|shards are damaged"):
        check_shards(f"{tmp_path}/*.tar", workers=0)
    assert "0.tar" in capsys.readouterr().out


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_without_an_index_what_can_be_found_is_and_no_partial_clip_is_trained_on(
    tmp_path: Path, name: str, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    harmed, _ = shards_of(tmp_path, index=False)
    CORRUPTIONS[name].change(harmed, at)
    if name.startswith("bit flipped"):  # nothing tells what the bytes were; the frames or the words may just be others
        return
    trained, lost, _ = one_pass(tmp_path)
    whole = set(range(COUNT, 2 * COUNT))
    expected = {"duplicate key": {at}, "../ key": {at}, "header overwritten": set(range(at, COUNT))}.get(
        name, CORRUPTIONS[name].lost(at, COUNT)
    )
    assert trained == whole | (set(range(COUNT)) - expected)


@pytest.mark.parametrize("name", ["bit flipped in video", "cut inside a member", "caption missing", "gzip disguised as tar"])
def test_repair_writes_the_clips_that_are_right(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    harmed, _ = shards_of(tmp_path, index=True)
    CORRUPTIONS[name].change(harmed, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadDataError, match="use .*clean"):
        check_shards(f"{tmp_path}/*.tar", workers=0, repair=str(tmp_path / "clean"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    expected = CORRUPTIONS[name].lost(3, COUNT)
    assert f"0.tar: {COUNT - len(expected)} clips kept, {len(expected)} dropped" in capsys.readouterr().out
    check_shards(f"{tmp_path}/clean/*.tar", workers=0)
    trained, lost, _ = one_pass(tmp_path / "clean")
    assert trained == set(range(2 * COUNT)) - expected and not lost


def test_checksums_are_taken_at_the_first_read(tmp_path: Path) -> None:
    """So that what comes to harm later is found."""
    harmed, _ = shards_of(tmp_path, index=False)
    assert len(one_pass(tmp_path)[0]) == 2 * COUNT and sidecar(harmed).exists()
    times = harmed.stat()
    CORRUPTIONS["bit flipped in video"].change(harmed, 4)
    os.utime(harmed, ns=(times.st_atime_ns, times.st_mtime_ns))  # a disk that rots changes no time
    trained, lost, ledger = one_pass(tmp_path)
    assert lost == {4} and "no longer holds it" in ledger[0]["reason"]


def test_repair_never_writes_where_the_shards_lie(tmp_path: Path) -> None:
    shards_of(tmp_path, index=True)
    with pytest.raises(ValueError, match="set repair"):
        check_shards(f"{tmp_path}/*.tar", repair=str(tmp_path))


def test_checksums_alone_find_a_flipped_bit_and_are_not_made_up(tmp_path: Path) -> None:
    harmed, whole = shards_of(tmp_path, index=True)
    check_shards(f"{tmp_path}/*.tar", workers=0, frames=False)
    CORRUPTIONS["bit flipped in video"].change(harmed, 2)
    with pytest.raises(BadDataError, match="1 of 16 clips are bad"):
        check_shards(f"{tmp_path}/*.tar", workers=0, frames=False)
    sidecar(whole).unlink()
    with pytest.raises(ValueError, match="frames=true"):
        check_shards(str(whole), workers=0, frames=False)
