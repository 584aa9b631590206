"""The clip stream beside decoding alone and beside a plain WebDataset pipeline that does the same decoding without any guarantee.

    .venv/bin/python experiments/benchmarks/loader.py 'data/footage/train/*.tar'

One process and one thread each, batch by batch in turns until each has met every clip equally often; frames a second of CPU time, and the
ratios of the sums, with what they would be of other draws of the batches (bootstrap, 95%). Then the making of an index and the check of
checksums beside reading the same bytes, all from a cold page cache.
"""

import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import webdataset  # type: ignore[import-untyped]

from dit_video.data.decode import decode_clip
from dit_video.data.files import expand_shards
from dit_video.data.index import Clips, write_index
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import write_shard
from dit_video.data_tools.check import check_shards

BATCH = 32
SHAPE = {"num_frames": 9, "height": 32, "width": 48, "fps": 8}


def loader(shards: str) -> Iterator[int]:
    """Clips of a batch of ours: checksums, plan, ledger, captions."""
    clips = ClipLoader(shards, BATCH, **SHAPE, decoder="pyav", cache_bytes=0, random_start=False, max_bad_fraction=1)
    for batch in clips.batches():
        yield len(batch.captions)


def decoding(shards: str) -> Iterator[int]:
    """Clips of a batch, read and decoded in the loader's order and put in a tensor, and nothing else."""
    clips = ClipLoader(shards, BATCH, **SHAPE, decoder="pyav", cache_bytes=0, random_start=False, max_bad_fraction=1)
    out = torch.zeros(BATCH, SHAPE["num_frames"], SHAPE["height"], SHAPE["width"], 3, dtype=torch.uint8)
    for number in itertools.count():
        for row, record in enumerate(clips.plan.step(number).records.tolist()):
            member = clips.clips.record(record).members["mp4"]
            with open(clips.clips.record(record).shard, "rb") as file:
                file.seek(member.offset)
                out[row] = torch.from_numpy(decode_clip(file.read(member.size), **SHAPE, decoder="pyav").video)
        yield BATCH


def plain(shards: str) -> Iterator[int]:
    """Clips of a batch of webdataset's, shuffled in a buffer, decoded by the same function."""
    paths = [str(path) for path in expand_shards(shards)]
    data = webdataset.WebDataset(paths, shardshuffle=False, resampled=False).repeat().shuffle(100)
    pairs = data.map(
        lambda sample: (torch.from_numpy(decode_clip(sample["mp4"], **SHAPE, decoder="pyav").video), sample["txt"].decode())
    )
    samples = iter(pairs)
    while True:
        videos, _ = zip(*itertools.islice(samples, BATCH), strict=True)
        torch.stack(videos)
        yield BATCH


@dataclass(frozen=True)
class Found:
    """Seconds of CPU time of every batch, by way."""

    seconds: dict[str, list[float]]

    def rate(self, way: str) -> float:
        """Frames a second."""
        return BATCH * SHAPE["num_frames"] * len(self.seconds[way]) / sum(self.seconds[way])

    def over(self, other: str) -> float:
        """How much faster the clip stream is."""
        return sum(self.seconds[other]) / sum(self.seconds["clip stream"])

    def told(self, other: str) -> str:
        ours, theirs = np.array(self.seconds["clip stream"]), np.array(self.seconds[other])
        draws = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
        low, high = np.quantile(theirs[draws].sum(1) / ours[draws].sum(1), [0.025, 0.975])
        return f"{self.over(other):.3f} (95% interval {low:.3f} to {high:.3f}, {len(ours)} batches each)"


def measure(shards: str) -> Found:
    """Batches of each way in turns, in an order that turns too; after `count` batches each has met every clip BATCH times."""
    torch.set_num_threads(1)
    count = len(Clips(expand_shards(shards)))
    ways: dict[str, Callable[[str], Iterator[int]]] = {
        "decoding alone": decoding,
        "clip stream": loader,
        "plain webdataset": plain,
    }
    running = {name: way(shards) for name, way in ways.items()}
    for batches in running.values():
        next(batches)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(count):
        for name in names[number % 3 :] + names[: number % 3]:
            started = time.process_time()
            next(running[name])
            seconds[name].append(time.process_time() - started)
    return Found(seconds)


def measure_disk(clips: int = 800, clip_bytes: int = 2**21) -> dict[str, float]:
    """Bytes a second, of wall time, of reading a shard, of making its index, and of comparing its checksums; each from a cold cache."""
    rng = np.random.default_rng(0)
    about = {"num_frames": 81, "height": 480, "width": 832, "fps": 16}

    def cold(path: Path) -> None:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(path: Path) -> None:
        with open(path, "rb") as file:
            while file.read(2**22):
                pass

    def check(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            check_shards(str(path), frames=False, workers=2)

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "0.tar"
        samples = ({"__key__": f"{i:05d}", "mp4": rng.bytes(clip_bytes), "txt": "a clip", "json": about} for i in range(clips))
        write_shard(path, samples)
        rates: dict[str, list[float]] = {}
        for _ in range(3):
            for what, call in {"read from the disk": read, "indexed": write_index, "checksums compared": check}.items():
                cold(path)
                started = time.perf_counter()
                call(path)
                rates.setdefault(what, []).append(path.stat().st_size / (time.perf_counter() - started))
    return {what: statistics.median(found) for what, found in rates.items()}


def main(shards: str) -> None:
    found = measure(shards)
    for name in found.seconds:
        print(f"{name}: {found.rate(name):.0f} frames a second of CPU time")
    for name in ("decoding alone", "plain webdataset"):
        print(f"clip stream over {name}: {found.told(name)}")
    for name, rate in measure_disk().items():
        print(f"{name}: {rate / 2**20:.0f} MiB a second")


if __name__ == "__main__":
    main(sys.argv[1])
