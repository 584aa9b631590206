import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import clip_sample, frame_numbers
from omegaconf import OmegaConf
from PIL import Image

from dit_video.data.decode import Decoder
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import BadDataError, write_shard
from dit_video.shapes import Batch

MakeShards = Callable[..., str]


def loader(shards: str, **changes: Any) -> ClipLoader:
    arguments: dict[str, Any] = {
        "batch_size": 4,
        "num_frames": 3,
        "height": 16,
        "width": 16,
        "fps": 8,
        "seed": 5,
        "decoder": "pyav",
    } | changes
    return ClipLoader(shards, **arguments)


def take(clips: ClipLoader, steps: int, start_step: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    return list(itertools.islice(clips.batches(start_step, rank, world_size), steps))


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.slots, b.slots) and torch.equal(a.weights, b.weights)
        assert (a.captions, a.keys, a.fps) == (b.captions, b.keys, b.fps)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("cache_bytes", [2**30, 5 * 3 * 16 * 16 * 3, 0])
def test_pixels_captions_and_keys_belong_together(make_shards: MakeShards, decoder: Decoder, cache_bytes: int) -> None:
    clips = loader(make_shards(), decoder=decoder, cache_bytes=cache_bytes)
    assert clips.num_clips == 12
    seen = []
    for step, batch in enumerate(take(clips, 9)):  # three passes
        assert batch.video.shape == (4, 3, 16, 16, 3) and batch.video.dtype == torch.uint8 and batch.fps == 8
        assert batch.slots.tolist() == list(range(4 * step, 4 * step + 4)) and batch.weights.tolist() == [1] * 4
        for video, caption, key in zip(batch.video.numpy(), batch.captions, batch.keys, strict=True):
            number = int(caption.removeprefix("clip number "))
            assert frame_numbers(video) == [number, number + 1, number + 2]
            assert key == f"{number // 6}.tar:{number:05d}"
            seen.append(number)
    assert all(sorted(seen[start : start + 12]) == list(range(12)) for start in (0, 12, 24))


def test_order_and_content_do_not_depend_on_workers(make_shards: MakeShards) -> None:
    shards = make_shards(num_frames=9)  # longer than the clip, so starts are drawn
    alone = take(loader(shards), 8)
    for num_workers in (1, 2):
        assert_same(alone, take(loader(shards, num_workers=num_workers), 8))
    assert_same(alone[5:], take(loader(shards), 3, start_step=5))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_steps(make_shards: MakeShards, world_size: int) -> None:
    shards = make_shards(num_frames=9)
    whole = take(loader(shards), 6)
    parts = [take(loader(shards, micro_batches=4), 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            part = parts[rank][step]
            assert torch.equal(part.video, batch.video[rank::world_size]) and part.parts == [1] * (4 // world_size)
            assert torch.equal(part.slots, batch.slots[rank::world_size]) and part.keys == batch.keys[rank::world_size]


def test_a_micro_batch_without_a_clip_is_a_filler(make_shards: MakeShards) -> None:
    batch = take(loader(make_shards(), batch_size=2, micro_batches=4), 1)[0]
    assert batch.parts == [1] * 4 and batch.weights.tolist() == [0, 1, 0, 1] and batch.keys[0] == "filler"
    assert [part.weights.tolist() for part in batch.micro_batches()] == [[0], [1], [0], [1]]


def test_starts_in_long_sources_differ_by_visit_and_repeat_by_seed(make_shards: MakeShards) -> None:
    shards = make_shards(num_clips=2, num_frames=30)
    firsts = [frame_numbers(video)[0] for batch in take(loader(shards), 6) for video in batch.video.numpy()]
    assert len(set(firsts)) > 6 and max(firsts) <= 28
    assert firsts == [frame_numbers(video)[0] for batch in take(loader(shards), 6) for video in batch.video.numpy()]
    fixed = take(loader(shards, random_start=False), 3)
    assert {frame_numbers(video)[0] for batch in fixed for video in batch.video.numpy()} == {0, 1}


def broken(number: int, sample: dict[str, Any]) -> dict[str, Any]:
    """One sample for each way to be bad."""
    half = len(sample["mp4"]) // 2
    match number:
        case 20:
            sample["mp4"] = sample["mp4"][:half]
        case 21:
            sample["mp4"] = b""
        case 22:
            sample["mp4"] = clip_sample(number, num_frames=1)["mp4"]
        case 23:
            del sample["mp4"]
        case 24:
            del sample["txt"]
        case 25:
            sample["txt"] = "  \n"
        case 26:
            sample["txt"] = "word " * 2000
        case 27:
            sample["txt"] = b"\xff\xfe caption"
        case 28:
            sample["txt"] = "null\0byte"
    return sample


REASONS = {
    20: "no video stream", 21: "not a video", 22: "too short", 23: "no video", 24: "no caption", 25: "empty",
    26: "max_caption_chars", 27: "UTF-8", 28: "NUL",
}  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_bad_clips_keep_their_slots_and_are_listed_once(
    make_shards: MakeShards, tmp_path: Path, num_workers: int, decoder: Decoder
) -> None:
    ledger = tmp_path / "run" / "skipped.jsonl"
    shards = make_shards(num_clips=40, change=broken)
    for _ in range(2):  # the second loader stands for a resumed run
        clips = loader(shards, max_bad_fraction=0.3, skipped_path=ledger, num_workers=num_workers, decoder=decoder)
        for batch in take(clips, 20):
            for video, caption, key, weight in zip(batch.video, batch.captions, batch.keys, batch.weights.tolist(), strict=True):
                number = int(key.split(":")[1])
                assert weight == (number not in REASONS)
                assert caption == (f"clip number {number}" if weight else "")
                assert frame_numbers(video.numpy()) == ([number, number + 1, number + 2] if weight else [0, 0, 0])
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sorted(int(line["key"]) for line in lines) == sorted(REASONS)
    for line in lines:
        assert set(line) == {"key", "shard", "offset", "reason"} and line["offset"] > 0
        assert REASONS[int(line["key"])] in line["reason"]


def test_too_many_bad_clips_stop_with_the_keys_to_change(make_shards: MakeShards, tmp_path: Path) -> None:
    ledger = tmp_path / "skipped.jsonl"
    shards = make_shards(num_clips=40, change=broken)
    with pytest.raises(BadDataError, match=r"clips are bad.*skipped\.jsonl.*data\.max_bad_fraction=0\.01") as caught:
        take(loader(shards, skipped_path=ledger), 100)
    assert ".tar" in str(caught.value) and "\n" not in str(caught.value) and ledger.is_file()


def test_one_bad_clip_in_a_large_set_is_borne(make_shards: MakeShards) -> None:
    shards = make_shards(num_clips=120, change=lambda number, sample: sample | ({"mp4": b"x"} if number == 7 else {}))
    batches = take(loader(shards), 90)
    assert sum(float(batch.weights.sum()) for batch in batches) == 360 - 3


@pytest.mark.parametrize("num_clips", [3, 40])
def test_nothing_but_bad_clips_stops_at_once(make_shards: MakeShards, num_clips: int) -> None:
    shards = make_shards(num_clips=num_clips, change=lambda number, sample: sample | {"mp4": b"no video"})
    with pytest.raises(BadDataError, match="in a row"):
        take(loader(shards, max_bad_fraction=1), 10)


def test_shards_without_video_or_caption_are_refused_at_the_start(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "json": {}, "txt": "a"}])
    with pytest.raises(BadDataError, match=r"no video.*'json'.*data\.shards"):
        loader(str(tmp_path / "0.tar"))
    write_shard(tmp_path / "0.tar", [clip_sample(0)])
    with pytest.raises(BadDataError, match=r"no caption \.prompt.*data\.caption_ext"):
        loader(str(tmp_path / "0.tar"), caption_ext="prompt")


def test_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": out.getvalue(), "txt": "noise"}])
    batch = take(loader(str(tmp_path / "0.tar"), num_frames=1, batch_size=1), 1)[0]
    assert (batch.video.numpy() == pixels).all() and batch.captions == ["noise"]
    with pytest.raises(BadDataError, match="no video"):
        loader(str(tmp_path / "0.tar"))


def test_a_shard_that_vanishes_is_no_bad_clip(make_shards: MakeShards, tmp_path: Path) -> None:
    clips = loader(make_shards())
    (tmp_path / "0.tar").unlink()
    with pytest.raises(BadDataError, match=r"0\.tar: cannot be read any more"):
        take(clips, 3)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 0}, "batch_size"), ({"num_frames": 0}, "num_frames"), ({"height": 0}, "height"), ({"width": -2}, "width"),
        ({"fps": 0}, "fps"), ({"seed": -1}, "seed"), ({"num_workers": -1}, "num_workers"), ({"decoder": "magic"}, "decoder"),
        ({"max_clips": 0}, "max_clips"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_key(make_shards: MakeShards, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}\b"):
        loader(make_shards(2), **changes)


def test_a_batch_must_divide_over_the_ranks(make_shards: MakeShards) -> None:
    clips = loader(make_shards())
    with pytest.raises(ValueError, match=r"data\.micro_batches"):
        clips.batches(world_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        clips.batches(rank=2, world_size=2)


def test_max_clips_takes_the_first(make_shards: MakeShards) -> None:
    batch = take(loader(make_shards(), max_clips=1), 1)[0]
    assert batch.captions == ["clip number 0"] * 4


@pytest.mark.parametrize("name", ["world", "shards"])
def test_the_configs_name_arguments_of_the_loader(make_shards: MakeShards, name: str) -> None:
    path = Path(__file__).parents[2] / "conf" / "data" / f"{name}.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert config.pop("_target_") == f"{ClipLoader.__module__}.{ClipLoader.__name__}"
    ClipLoader(**(config | {"shards": make_shards(2)}))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_rank_without_a_clip_gets_fillers(make_shards: MakeShards, num_workers: int) -> None:
    """Fewer clips in a step than micro-batches; nothing is planned without end."""
    clips = loader(make_shards(num_clips=6), batch_size=1, micro_batches=2, num_workers=num_workers)
    ranks = [take(clips, 9, rank=rank, world_size=2) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert (
            sorted([float(one.weights.sum()), float(other.weights.sum())]) == [0, 1] and one.step_clips == other.step_clips == 1
        )
    assert_same(ranks[0] + ranks[1], [batch for rank in range(2) for batch in take(clips, 9, rank=rank, world_size=2)])


def test_nearly_everything_cached_is_not_planned_far_ahead(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(num_clips=40, change=lambda number, sample: sample | ({"mp4": b"x"} if number == 7 else {}))
    clips = loader(shards, num_workers=1, max_bad_fraction=0.5)
    planned = []
    step = clips.plan.step
    monkeypatch.setattr(clips.plan, "step", lambda number: planned.append(number) or step(number))
    take(clips, 200)
    assert max(planned) < 200 + 30


def test_a_pass_with_more_micro_batches_than_clips(make_shards: MakeShards) -> None:
    clips = loader(make_shards(num_clips=5), batch_size=2, micro_batches=4)
    shown = [key for batch in clips.one_pass() for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight]
    assert len(shown) == len({*shown}) == 5


def test_few_clips_may_leave_a_source_empty(make_shards: MakeShards, tmp_path: Path) -> None:
    make_shards()
    sources = {"a": {"shards": f"{tmp_path}/0.tar"}, "b": {"shards": f"{tmp_path}/1.tar", "weight": 3}}
    clips = loader(None, sources=sources, max_clips=1)  # type: ignore[arg-type]
    assert clips.num_clips == clips.plan.num_clips == 1 and {*take(clips, 2)[1].captions} == {"clip number 0"}
    weightless = loader(None, sources=sources | {"b": {"shards": f"{tmp_path}/1.tar", "weight": 0}})  # type: ignore[arg-type]
    assert weightless.num_clips == weightless.plan.num_clips == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"a": {"shards": "0.tar", "wieght": 0.9}}}, r"data\.sources\.a has no wieght; it has shards, weight"),
        ({"sources": {"a": {"weight": 0.9}}}, r"set data\.sources\.a\.shards"),
        ({"buckets": [{"num_frame": 3}]}, r"data\.buckets has no num_frame; it has num_frames"),
        ({"buckets": [{"num_frames": 3}, {"width": 16}]}, "two buckets are the same"),
        ({"shards": None}, r"set data\.shards"),
    ],
)
def test_typing_errors_in_sources_and_buckets_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**{"shards": "0.tar"} | changes)


def test_a_shard_is_one_however_it_is_named(make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards()
    (tmp_path / "link.tar").symlink_to(tmp_path / "0.tar")
    monkeypatch.chdir(tmp_path)
    assert loader(["0.tar", f"{tmp_path}/0.tar", "link.tar", "./0.tar"]).num_clips == 6  # type: ignore[arg-type]


def test_the_fingerprint_tells_whether_other_clips_would_come(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(num_clips=12)
    known = loader(shards).fingerprint
    assert loader(shards, num_workers=2, cache_bytes=0, max_caption_chars=50).fingerprint == known
    for other in (
        loader(shards, seed=6),
        loader(shards, batch_size=5),
        loader(shards, max_clips=11),
        loader(f"{tmp_path}/0.tar"),
    ):
        assert other.fingerprint != known
    make_shards(num_clips=12, change=lambda number, sample: sample | {"__key__": f"x{number}"})
    assert loader(shards).fingerprint != known


def test_steps_of_buckets_are_as_large_as_was_asked_for_the_first_in_use(make_shards: MakeShards) -> None:
    clips = loader(make_shards(), buckets=[{"num_frames": 99}, {"num_frames": 3}])
    assert clips.report.count(0) == 0 and clips.report.sizes[1] in (4, 5)  # not as many as cost what four of the first would
