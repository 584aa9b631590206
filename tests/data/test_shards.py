import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset  # type: ignore[import-untyped]
from clip_files import clip_sample

from dit_video.data.files import expand_shards
from dit_video.data.index import Clips, build, records_of
from dit_video.data.shards import (
    BadClipError,
    BadDataError,
    read_member,
    scan,
    write_shard,
)  # fmt: skip


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.type = len(data), kind
            if kind != tarfile.REGTYPE:
                header.size, header.linkname = 0, "elsewhere"
            tar.addfile(header, io.BytesIO(data))
    return path


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    samples = [clip_sample(number) for number in range(5)]
    assert write_shard(tmp_path / "a.tar", samples) == 5
    records = records_of([tmp_path / "a.tar"])
    assert [record.key for record in records] == [sample["__key__"] for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        assert set(record.members) == {"mp4", "txt", "json"} and record.name == f"a.tar:{sample['__key__']}"
        assert read_member(record, "mp4") == sample["mp4"]
        assert read_member(record, "txt").decode() == sample["txt"]
        assert json.loads(read_member(record, "json")) == sample["json"]
    write_shard(tmp_path / "b.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [clip_sample(number) for number in range(4)])
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    ours = records_of([tmp_path / "a.tar"])
    assert [sample["__key__"] for sample in theirs] == [record.key for record in ours]
    assert all(sample["mp4"] == read_member(record, "mp4") for sample, record in zip(theirs, ours, strict=True))


def test_a_failing_writer_leaves_the_old_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [clip_sample(0)])
    before = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(TypeError):
        write_shard(tmp_path / "a.tar", [clip_sample(1), {"__key__": "2", "json": object()}])
    assert (tmp_path / "a.tar").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_members_group_by_the_name_up_to_the_first_dot(tmp_path: Path) -> None:
    names = ["./a.b/x.mp4", "a.b/x.txt", "y.v1.MP4", "y.txt", "z.mp4", "w.txt", "z.txt", ".hidden", "noextension"]
    records = records_of([tar_of(tmp_path / "a.tar", [(name, name.encode()) for name in names])])
    assert [(record.key, sorted(record.members)) for record in records] == [
        ("a.b/x", ["mp4", "txt"]), ("y", ["txt", "v1.mp4"]), ("z", ["mp4", "txt"]), ("w", ["txt"]),
    ]  # fmt: skip
    assert read_member(records[2], "txt") == b"z.txt"


def test_braces_and_wildcards(tmp_path: Path, make_shards: Callable[..., str]) -> None:
    pattern = make_shards()
    both = [tmp_path / "0.tar", tmp_path / "1.tar"]
    assert expand_shards(pattern) == both == expand_shards(str(tmp_path / "*.tar")) == expand_shards([pattern, str(both[0])])
    assert expand_shards([str(both[1]), str(both[0])]) == both[::-1]
    odd = tmp_path / "[odd].tar"
    os.rename(both[0], odd)
    assert expand_shards(str(odd)) == [odd]


@pytest.mark.parametrize(
    "url",
    ["pipe:cat a.tar", "ssh://host/a.tar", "http://host/*.tar", "file:a.tar", "missing.tar", "none*.tar", [], "{0..1", "."],
)
def test_what_is_no_local_shard_is_refused(url: str | list[str]) -> None:
    with pytest.raises(BadDataError, match=r"data\.shards"):
        expand_shards(url)


def damage(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def overwrite(data: bytearray, start: int, length: int) -> None:
    data[start : start + length] = b"\xaa" * length


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: data.clear(), "empty"),
        (lambda data: data.__setitem__(slice(None), b"this is not a tar " * 100), "not a tar"),
        (lambda data: data.__setitem__(slice(None), gzip.compress(bytes(data))), "gzip"),
        (lambda data: data.__setitem__(slice(None), b"PK\x03\x04" + bytes(600)), "zip"),
        (lambda data: data.__delitem__(slice(300, None)), "not a tar"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, change: Callable[[bytearray], object], what: str) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [clip_sample(number) for number in range(3)])
    damage(path, change)
    with pytest.raises(BadDataError, match=what) as caught:
        scan(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not records_of([path])


def test_every_cut_is_noticed_and_what_is_whole_is_kept(tmp_path: Path) -> None:
    """Also between two members, where tarfile and webdataset see an ordinary end."""
    path = tmp_path / "a.tar"
    write_shard(path, [clip_sample(number) for number in range(3)])
    whole = path.read_bytes()
    records = records_of([path])
    spans = [(record.key, name, m.offset, m.offset + m.size) for record in records for name, m in record.members.items()]
    boundaries = [start - 512 for _, _, start, _ in spans]
    for length in [*boundaries[1:], *range(600, max(end for *_, end in spans), 97)]:
        path.write_bytes(whole[:length])
        index = build(path)
        assert index.problems, length
        found = {(key, name) for row, key in enumerate(index.keys) for name in index.members(row)}
        assert found == {(key, name) for key, name, _, end in spans if end <= length}
    for header in boundaries[1:]:
        data = bytearray(whole)
        overwrite(data, header, 200)
        path.write_bytes(data)
        assert build(path).problems


@pytest.mark.parametrize("name", ["/etc/x.mp4", "../x.mp4", "a/../../x.mp4", "a\nb.mp4", "a\x7f.mp4"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    index = build(tar_of(tmp_path / "a.tar", [("y.mp4", b""), (name, b""), ("z.mp4", b"")]))
    assert index.keys == ["y", "z"] and "refuses the member name" in index.problems[0]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_plain_files_are_members(tmp_path: Path, kind: bytes) -> None:
    index = build(tar_of(tmp_path / "a.tar", [("x.mp4", b"")], kind))
    assert not index.keys and "not a plain file" in index.problems[0]


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    index = build(tar_of(tmp_path / "a.tar", [("x.mp4", b"1"), ("x.mp4", b"2"), ("y.mp4", b"3")]))
    assert index.keys == ["y"] and "twice" in index.problems[0]


def test_a_shard_that_changes_after_indexing_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [clip_sample(0)])
    record = Clips([path]).record(0)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadClipError, match="ends before"):
        read_member(record, "txt")
    path.unlink()
    with pytest.raises(BadDataError, match="cannot be read any more"):
        read_member(record, "txt")


def test_json_members_survive_unicode(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"__key__": "é", "json": {"text": "日本"}, "txt": "日本"}])
    record = records_of([tmp_path / "a.tar"])[0]
    assert record.key == "é" and json.loads(read_member(record, "json")) == {"text": "日本"}
    assert read_member(record, "txt").decode() == "日本"
