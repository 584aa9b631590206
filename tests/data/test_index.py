"""The index of a shard: what it holds, what it survives, and what it refuses."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from clip_files import clip_sample, counting_video, mp4_at
from PIL import Image
from safetensors.numpy import load_file, save_file

from dit_video.data.index import COLUMNS, Clips, build, index_of, load, save, write_index
from dit_video.data.loader import ClipLoader
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


def test_shapes_are_those_that_the_decoder_will_see(tmp_path: Path) -> None:
    """Turned upright; and as long as the frames' own times say, whatever the header's rate."""
    plain = encode_mp4(counting_video(9, 32, 64), 8)
    matrix = plain.index(b"tkhd") + 44
    turn = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 * 65536, 0, 0x40000000)
    seconds = np.cumsum([0.0] + [0.02] * 20 + [0.3] * 3 + [0.05] * 20).tolist()
    films = {
        "turned": plain[:matrix] + turn + plain[matrix + 36 :],
        "changing": mp4_at(seconds),
        "strange": plain.replace(b"avc1", b"zzz9"),
    }
    write_shard(tmp_path / "0.tar", [{"__key__": key, "mp4": data, "txt": key} for key, data in films.items()])
    write_index(tmp_path / "0.tar")
    columns = Clips([tmp_path / "0.tar"]).columns()
    assert (columns["height"][0], columns["width"][0], columns["frames"][0]) == (64, 32, 9)
    assert columns["frames"][1] / columns["fps"][1] == pytest.approx(seconds[-1], abs=0.06)
    assert columns["frames"][2] == 0  # of an unknown codec nothing is known


def test_a_shard_of_the_same_size_that_takes_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    """Tars are filled up to 10 KiB, so that sizes tell little: between two runs, and while one reads."""
    path, clips = tmp_path / "0.tar", [clip_sample(number) for number in range(6)]
    write_shard(tmp_path / "other", clips[::-1])
    other = (tmp_path / "other").read_bytes()
    write_shard(path, clips)
    (tmp_path / "other").unlink()
    assert len(other) == path.stat().st_size

    def captions(loader: ClipLoader, steps: int) -> set[tuple[str, str]]:
        batches = loader.batches()
        found = set()
        for number in range(steps):
            batch = next(batches)
            pairs = zip(batch.keys, batch.captions, batch.weights.tolist(), strict=True)
            found |= {(key.split(":")[1], caption) for key, caption, weight in pairs if weight}
            if number == 0 and steps > 3:
                path.write_bytes(other)
        batches.close()  # type: ignore[attr-defined]
        return found

    def loader() -> ClipLoader:
        return ClipLoader(str(path), 2, 3, 16, 16, 8, decoder="pyav", max_bad_fraction=1)

    right = {(f"{number:05d}", f"clip number {number}") for number in range(6)}
    assert captions(loader(), 6) < right  # of what was read after the change nothing was believed
    assert captions(loader(), 3) == right


def test_what_a_loader_learns_takes_nothing_from_an_index_that_was_made_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, [clip_sample(number) for number in range(6)])
    batches = ClipLoader(str(path), 2, 3, 16, 16, 8, decoder="pyav").batches()
    next(batches)
    write_index(path)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    index = load(sidecar(path))
    assert index.checked and index.looked


def test_in_a_folder_that_cannot_be_written_every_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(8)]
    for number, path in enumerate(paths):
        write_shard(path, [clip_sample(number)])
    built = []

    def counted(*args: object, **kwargs: object) -> object:
        built.append(args[0])
        return build(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("dit_video.data.index.build", counted)
    monkeypatch.setattr("dit_video.data.index._can_write", lambda folder: False)
    monkeypatch.setattr("dit_video.data.index.save", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    clips = Clips(paths, kept=2)
    for _ in range(3):
        clips.columns()
    assert built == paths


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("café.mp4", "café.txt", "good.mp4", "good.txt"):
            header = tarfile.TarInfo(name)
            data = clip_sample(0)["mp4"] if name.endswith("mp4") else b"x"
            header.size = len(data)  # type: ignore[arg-type]
            tar.addfile(header, io.BytesIO(data))  # type: ignore[arg-type]
    clips = Clips([tmp_path / "0.tar"])
    assert len(clips) == 1 and clips.record(0).key == "good"
    assert any("not UTF-8" in problem and "caf" in problem for problem in clips.problems())


def test_two_tars_joined_by_cat_are_said_to_be(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}", [clip_sample(number)])
    (tmp_path / "both.tar").write_bytes((tmp_path / "0").read_bytes() + (tmp_path / "1").read_bytes())
    clips = Clips([tmp_path / "both.tar"])
    assert len(clips) == 1 and "goes on after its end mark" in clips.problems()[0]
