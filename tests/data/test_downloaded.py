"""Shards as img2dataset and video2dataset leave them: json with a status in the tar, a table and figures beside it."""

import json
import sys
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import webdataset  # type: ignore[import-untyped]
from clip_files import clip_sample

from dit_video.data.index import Clips, index_of, write_index
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import BadDataError, sidecar
from dit_video.data_tools.check import check_shards

STATUSES = ["success", "failed_to_download", "success", "failed_to_subsample", "success", "failed_to_download"]


def downloaded(folder: Path, keep_videos: bool = False, tells: bool = True, lost: tuple[int, ...] = ()) -> Path:
    """A shard of six addresses, three fetched; as video2dataset does, those that failed have their text and json in the tar."""
    path, rows = folder / "00000.tar", []
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, status in enumerate(STATUSES):
            clip, key = clip_sample(number), f"{number:09d}"
            about = {"url": f"https://host/{number}.mp4", "caption": clip["txt"], "key": key, "error_message": None}
            rows.append(about | {"status": status})
            sample = {"__key__": key, "txt": str(clip["txt"]).encode(), "json": json.dumps(rows[-1] if tells else about).encode()}
            if status == "success" or keep_videos:
                sample["mp4"] = clip["mp4"]
            if number not in lost:
                writer.write(sample)
    columns = {name: [row[name] for row in rows] for name in ("key", "status", "url", "error_message")}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": 6, "successes": 3, "failed_to_download": 2}))
    return path


def trained(folder: Path) -> list[str]:
    loader = ClipLoader(f"{folder}/*.tar", 2, 3, 16, 16, 8, decoder="pyav", max_bad_fraction=0)  # not one may be bad
    assert loader.report.refused() == "3 not fetched by the tool that downloaded them"
    return sorted(
        caption for batch in loader.one_pass() for caption, weight in zip(batch.captions, batch.weights, strict=True) if weight
    )


@pytest.mark.parametrize("keep_videos", [False, True], ids=["without videos", "with half a video"])
@pytest.mark.parametrize("source", ["json", "table", "index"])
def test_what_was_not_fetched_is_not_planned(tmp_path: Path, source: str, keep_videos: bool) -> None:
    path = downloaded(tmp_path, keep_videos, tells=source != "table")
    if source == "json":
        (tmp_path / "00000.parquet").unlink()
    if source == "index":
        write_index(path)
        (tmp_path / "00000.parquet").unlink()
    assert trained(tmp_path) == ["clip number 0", "clip number 2", "clip number 4"]
    assert index_of(path, look=True).fetched.tolist() == [status == "success" for status in STATUSES]


def test_without_pyarrow_the_json_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    downloaded(tmp_path, keep_videos=True)
    assert trained(tmp_path) == ["clip number 0", "clip number 2", "clip number 4"]


def test_a_table_that_cannot_be_read_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    downloaded(tmp_path, keep_videos=True)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and then nothing")
    assert trained(tmp_path) == ["clip number 0", "clip number 2", "clip number 4"]
    assert "00000.parquet cannot be read" in caplog.text


def test_the_table_tells_what_the_tar_lacks(tmp_path: Path) -> None:
    path = downloaded(tmp_path, lost=(2, 4))
    (problem,) = Clips([path]).problems()
    assert problem.endswith("lacks 000000002 and 1 more, which 00000.parquet says was fetched")
    assert not sidecar(path).exists()  # with an index of its own it would pass for whole
    with pytest.raises(BadDataError, match="1 shards are damaged"):
        check_shards(str(path), workers=0)


def test_a_check_counts_what_was_not_fetched_and_repair_leaves_it_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = downloaded(tmp_path)
    check_shards(str(path), workers=0, repair=str(tmp_path / "clean"))
    assert "3 samples are left out" in capsys.readouterr().out
    assert Clips([tmp_path / "clean" / "00000.tar"]).columns()["fetched"].tolist() == [True] * 3


def test_a_status_that_means_something_else_is_not_believed(tmp_path: Path) -> None:
    """Of a shard's own json `status` may be a number, or the json no object at all."""
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, about in enumerate([b'{"status": 3}', b"[1]", b"{", b'{"status": null}', b'{"status": "reviewed"}']):
            writer.write({"__key__": str(number), "mp4": clip_sample(number)["mp4"], "txt": b"x", "json": about})
    assert index_of(path).fetched.all() and len(index_of(path)) == 5
