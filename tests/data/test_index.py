"""The index of a shard: what it holds, what it survives, and what it refuses."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from clip_files import clip_sample, counting_video
from PIL import Image
from safetensors.numpy import load_file, save_file

from dit_video.data.index import COLUMNS, Clips, build, index_of, load, save, write_index
from dit_video.data.shards import BadDataError, read_member, sidecar, write_shard
from dit_video.data.video_file import encode_mp4


def mixed_samples() -> list[dict]:
    """Videos of several sizes and rates, an image, one whose json tells its shape, and one that is no video."""
    image = io.BytesIO()
    Image.new("RGB", (40, 24)).save(image, "PNG")
    told = {"num_frames": 7, "height": 30, "width": 20, "fps": 12.5}
    return [
        {"__key__": "a", "mp4": encode_mp4(counting_video(5, 32, 48), 8), "txt": "five"},
        {"__key__": "b", "mp4": encode_mp4(counting_video(12, 16, 16), 24), "txt": "zwölf"},
        {"__key__": "c", "png": image.getvalue(), "txt": ""},
        {"__key__": "d", "mp4": b"never looked into", "json": told},
        {"__key__": "e", "mp4": b"no video", "json": {"num_frames": -1, "height": 3, "width": 3, "fps": 1}},
    ]


def test_what_a_shard_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, mixed_samples())
    write_index(path)
    clips = Clips([path])
    columns = clips.columns()
    assert columns["frames"].tolist() == [5, 12, 1, 7, 0] and columns["fps"].tolist() == [8, 24, 1, 12.5, 0]
    assert columns["height"].tolist() == [32, 16, 24, 30, 0] and columns["width"].tolist() == [48, 16, 40, 20, 0]
    index = load(sidecar(path))
    assert index.caption_length.tolist() == [4, 6, 0, -1, -1] and index.checked
    for number, sample in enumerate(mixed_samples()):
        record = clips.record(number)
        assert record.key == sample["__key__"] and set(record.members) == set(sample) - {"__key__"}
        assert read_member(record, next(iter(set(record.members) - {"txt", "json"}))) == sample.get("mp4", sample.get("png"))


def test_an_index_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, mixed_samples())
    built = build(path, checksums=True, look=True)
    save(built, tmp_path / "again")
    again = load(tmp_path / "again")
    assert (again.keys, again.extensions, again.shard_bytes) == (built.keys, built.extensions, built.shard_bytes)
    for name in COLUMNS:
        assert np.array_equal(getattr(again, name), getattr(built, name)), name


def test_records_of_many_shards_are_numbered_through(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(3)]
    for number, path in enumerate(paths):
        write_shard(path, [clip_sample(10 * number + i) for i in range(number + 1)])
    clips = Clips(paths, kept=1)
    assert [clips.record(number).name for number in range(len(clips))] == [
        "0.tar:00000", "1.tar:00010", "1.tar:00011", "2.tar:00020", "2.tar:00021", "2.tar:00022",
    ]  # fmt: skip


def test_an_index_is_built_at_first_sight_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [clip_sample(0)])
    assert not index_of(path).checked and sidecar(path).exists()
    write_shard(tmp_path / "b.tar", [clip_sample(1), clip_sample(2)])
    os.replace(tmp_path / "b.tar", path)  # written anew, by other means
    os.utime(path, ns=(path.stat().st_atime_ns, sidecar(path).stat().st_mtime_ns + 1))
    assert index_of(path).keys == ["00001", "00002"]


@pytest.mark.parametrize("damage", ["truncate", "text", "version", "column", "ends", "kind"])
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, mixed_samples())
    write_index(path)
    place = sidecar(path)
    columns = load_file(place)
    told = {"version": "1", "extensions": ["json", "mp4", "png", "txt"], "shard_bytes": 1, "looked": True}
    about = {"about": json.dumps(told)}
    match damage:
        case "truncate":
            place.write_bytes(place.read_bytes()[:-40])
        case "text":
            place.write_text("no index at all")
        case "version":
            save_file(columns, place, {"about": json.dumps(told | {"version": "0"})})
        case "column":
            del columns["fps"]
            save_file(columns, place, about)
        case "ends":
            columns["member_ends"][-1] += 1
            save_file(columns, place, about)
        case "kind":
            columns["frames"] = columns["frames"].astype(np.float32)
            save_file(columns, place, about)
    with pytest.raises(BadDataError, match=r"a\.index\.safetensors.*delete it"):
        Clips([path])
