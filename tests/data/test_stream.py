"""The stream of a mixed, bucketed data set: the same at any number of ranks and workers, from wherever it is taken up."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_files import counting_video, frame_numbers
from PIL import Image
from range_server import serving

from dit_video.data.loader import ClipLoader
from dit_video.data.shards import write_shard
from dit_video.data.video_file import encode_mp4
from dit_video.shapes import Batch

BUCKETS = [
    {"num_frames": 5, "height": 16, "width": 16}, {"num_frames": 5, "height": 16, "width": 32},
    {"num_frames": 9, "height": 16, "width": 16}, {"num_frames": 1, "height": 16, "width": 32},
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of three shapes with two captions each, and photographs, in shards of their own."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(6, 16, 16), (6, 16, 32), (14, 16, 16), (7, 20, 40)]
    films = [
        {
            "__key__": f"film{number:03d}", "mp4": encode_mp4(counting_video(*sizes[number % 4], first=number), 8),
            "txt": f"film {number}", "json": {"short": f"f{number}"},
        }
        for number in range(37)
    ]  # fmt: skip
    write_shard(folder / "films-0.tar", films[:20])
    write_shard(folder / "films-1.tar", films[20:])
    photos = []
    for number in range(11):
        out = io.BytesIO()
        Image.fromarray(counting_video(1, 24, 48, first=number)[0]).save(out, "PNG")
        photos.append({"__key__": f"photo{number:03d}", "png": out.getvalue(), "txt": f"photo {number}"})
    write_shard(folder / "photos-0.tar", photos)
    return folder


def stream(folder: Path, **changes: Any) -> ClipLoader:
    arguments: dict[str, Any] = {
        "shards": None, "batch_size": 6, "num_frames": 5, "height": 16, "width": 16, "fps": 8, "seed": 5, "decoder": "pyav",
        "buckets": BUCKETS, "micro_batches": 6, "captions": {"txt": 0.6, "json.short": 0.4},
        "sources": {
            "films": {"shards": f"{folder}/films-*.tar", "weight": 0.75}, "photos": {"shards": f"{folder}/photos-*.tar", "weight": 0.25},
        },
    }  # fmt: skip
    return ClipLoader(**arguments | changes)


Line = tuple[int, str, float, str, tuple[int, ...]]


def lines(batch: Batch) -> list[Line]:
    """Slot, key, start in seconds, caption and first frames' numbers of every clip."""
    rows = zip(batch.slots.tolist(), batch.keys, batch.starts.tolist(), batch.captions, batch.video.numpy(), strict=True)
    return [
        (slot, key, start, caption, tuple(frame_numbers(video))) for slot, key, start, caption, video in rows if key != "filler"
    ]


def steps(loader: ClipLoader, first: int, count: int, world: int = 1) -> list[list[Line]]:
    """The steps of all ranks put together, by slot."""
    ranks = [itertools.islice(loader.batches(first, rank, world), count) for rank in range(world)]
    found = [sorted(line for batch in parts for line in lines(batch)) for parts in zip(*ranks, strict=True)]
    return found


STEPS = 24  # more than two passes over the films


@pytest.fixture(scope="module")
def straight(mixed: Path) -> list[list[Line]]:
    return steps(stream(mixed), 0, STEPS)


def test_slots_are_numbered_through_and_clips_are_whole(straight: list[list[Line]]) -> None:
    found = [line for step in straight for line in step]
    assert [line[0] for line in found] == list(range(len(found)))
    for _, key, start, caption, frames in found:
        number = int(key[-3:])
        assert caption in (f"film {number}", f"f{number}", f"photo {number}")
        wanted = number + 8 * start + np.arange(len(frames))
        assert np.abs(np.array(frames) - wanted).max() <= 1.6  # half a frame of time, and what coding does to greys
    assert len({len(line[4]) for line in found}) == 3 and {line[3][:2] for line in found} > {"fi", "ph"}


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0), (3, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_ranks_and_workers_change_nothing(mixed: Path, straight: list[list[Line]], world: int, workers: int) -> None:
    assert steps(stream(mixed, num_workers=workers), 0, STEPS, world) == straight


def test_it_is_taken_up_anywhere_at_another_world_size(mixed: Path, straight: list[list[Line]]) -> None:
    at, rng, found = 0, np.random.default_rng(0), []
    while at < STEPS:
        count = min(int(rng.integers(1, 5)), STEPS - at)
        found += steps(stream(mixed), at, count, world=int(rng.choice([1, 2, 3])))
        at += count
    assert found == straight


@pytest.mark.parametrize("indexed", [True, False])
def test_it_is_the_same_over_http(
    mixed: Path, straight: list[list[Line]], indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        for path in mixed.iterdir():
            if path.suffix == ".tar" or indexed:
                server.files[f"/{path.name}"] = path.read_bytes()
        sources = {
            "films": {"shards": f"{server.url}/films-{{0..1}}.tar", "weight": 0.75},
            "photos": {"shards": f"{server.url}/photos-0.tar", "weight": 0.25},
        }
        for workers, cache in ((0, None), (1, tmp_path / "cache")):
            remote = stream(mixed, sources=sources, num_workers=workers, remote_cache=cache)
            assert steps(remote, 0, STEPS) == straight
        server.log.clear()
        again = stream(mixed, sources=sources, remote_cache=tmp_path / "cache")
        assert steps(again, 0, STEPS) == straight
        assert len(server.log) == 3  # of each shard which version it is; index and clips are here
        for name in ("tar", "index.safetensors"):
            server.files[f"/films-0.{name}"] = server.files.get(f"/films-1.{name}", b"")
        server.files = {name: data for name, data in server.files.items() if data}
        server.headers = {"ETag": '"another"'}
        replaced = stream(mixed, sources=sources, remote_cache=tmp_path / "cache").clips
        assert (
            replaced.record(0).key == "film020" and len(replaced) == 17 + 17 + 11
        )  # the index that was kept is another version's


def test_every_rank_of_a_step_has_the_same_bucket_and_as_many_micro_batches(mixed: Path) -> None:
    loader = stream(mixed)
    for parts in zip(*[itertools.islice(loader.batches(0, rank, 3), STEPS) for rank in range(3)], strict=True):
        assert len({part.video.shape[1:] for part in parts}) == 1 and {len(part.parts) for part in parts} == {2}


def test_sources_are_mixed_as_asked(mixed: Path, straight: list[list[Line]]) -> None:
    loader = stream(mixed)
    count = 400
    share = loader.plan.clips_before(count).sum(0) / loader.plan.clips_before(count).sum()
    assert np.allclose(share, [0.75, 0.25], atol=0.01)


def test_one_pass_shows_every_clip_once(mixed: Path) -> None:
    loader = stream(mixed, micro_batches=1)
    shown = [key for batch in loader.one_pass() for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight]
    assert len(shown) == len(set(shown)) == 37 + 11


def test_the_report_says_what_is_there(mixed: Path) -> None:
    text = "\n".join(stream(mixed, buckets=BUCKETS[1:]).report.lines())
    assert "films 28" in text and "photos 11" in text and "steps cost the same within" in text
    with pytest.raises(ValueError, match="source photos has a weight and no usable clip"):
        stream(mixed, buckets=BUCKETS[:3])
