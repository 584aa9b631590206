"""The clip stream beside decoding alone and beside a plain WebDataset pipeline that does the same decoding without any guarantee.

    .venv/bin/python experiments/benchmarks/loader.py 'data/footage/train/*.tar'

One process and one thread each, interleaved in rounds over the same clips; frames a second of CPU time, and ratios of the medians.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import webdataset  # type: ignore[import-untyped]

from dit_video.data.decode import decode_clip
from dit_video.data.files import expand_shards
from dit_video.data.index import Clips
from dit_video.data.loader import ClipLoader

ROUNDS, BATCH = 7, 32
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


def main(shards: str) -> None:
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
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, batches in running.items():
            started, clips = time.process_time(), 0
            while clips < count:  # a pass, so that each meets the same clips
                clips += next(batches)
            rates[name].append(clips * SHAPE["num_frames"] / (time.process_time() - started))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name}: {middle[name]:.0f} frames a second of CPU time (least {min(found):.0f}, most {max(found):.0f})")
    print(f"clip stream over decoding alone: {middle['clip stream'] / middle['decoding alone']:.3f}")
    print(f"clip stream over plain webdataset: {middle['clip stream'] / middle['plain webdataset']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
