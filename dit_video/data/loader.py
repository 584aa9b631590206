"""Captioned clips from shards as batches: order from the plan, bytes by offset, frames from the decoder, bad clips on record."""

import json
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset

from dit_video.data.decode import DecodeError, Decoder, decode_clip
from dit_video.data.plan import Plan
from dit_video.data.shards import BadDataError, ClipRecord, expand_shards, index_shards, read_member
from dit_video.data.video_file import Video, read_image
from dit_video.shapes import Batch

VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
BAD_IN_A_ROW = 16
BAD_WINDOW = (100, 1000)
"""The share of bad clips is judged over as many clips as the data has, but at least and at most so many."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used, by the index of its record."""

    index: int
    reason: str


@dataclass(frozen=True)
class ClipShape:
    """What every clip of a loader is made into."""

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"a clip needs a positive {name}, got {value}; set data.{name}")

    @property
    def num_bytes(self) -> int:
        return self.num_frames * self.height * self.width * 3


def find_member(record: ClipRecord, num_frames: int) -> str | None:
    """The extension of the member that holds the pictures of a sample; an image will do where one frame is wanted."""
    wanted = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if num_frames == 1 else ())
    return next((extension for extension in wanted if extension in record.members), None)


def read_caption(record: ClipRecord, extension: str, max_chars: int) -> str:
    """The caption of a sample, stripped; ValueError where it is missing, empty, too long, not UTF-8, or has a NUL."""
    if extension not in record.members:
        raise ValueError(f"no caption: no .{extension} among {sorted(record.members)}")
    size = record.members[extension][1]
    if size > 4 * max_chars + 16:
        raise ValueError(f"the caption of {size} bytes is longer than max_caption_chars={max_chars}")
    try:
        caption = read_member(record, extension).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from error
    if len(caption) > max_chars:
        raise ValueError(f"the caption of {len(caption)} characters is longer than max_caption_chars={max_chars}")
    if not caption or "\0" in caption:
        raise ValueError("the caption has a NUL in it" if caption else "the caption is empty")
    return caption


def _shared_bytes(num_bytes: int) -> UInt8[torch.Tensor, " bytes"]:
    """Zeros that forked worker processes share; memory is taken when it is written to, and not from a bounded /dev/shm."""
    return torch.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=torch.uint8)[:num_bytes]


class ClipReader(Dataset[tuple[Batch, list[BadClip]]]):
    """Slots in, a batch out, the same in any process; decoded clips stay in memory that worker processes share."""

    def __init__(
        self, records: list[ClipRecord], plan: Plan, shape: ClipShape, *, decoder: Decoder, caption_extension: str,
        max_caption_chars: int, random_start: bool, cache_bytes: int,
    ) -> None:  # fmt: skip
        self.records, self.plan, self.shape = records, plan, shape
        self.decoder, self.random_start = decoder, random_start
        self.caption_extension, self.max_caption_chars = caption_extension, max_caption_chars
        num_cached = min(len(records), cache_bytes // shape.num_bytes)
        size = (num_cached, shape.num_frames, shape.height, shape.width, 3)
        self.videos = _shared_bytes(num_cached * shape.num_bytes).view(size)
        self.filled = _shared_bytes(num_cached).view(torch.bool)
        self.captions: dict[int, str] = {}

    def __getitem__(self, slots: list[int]) -> tuple[Batch, list[BadClip]]:
        indices = [self.plan.record_index(slot) for slot in slots]
        keys = [self.records[index].name for index in indices]
        if max(indices) < len(self.videos) and self.filled[indices].all():
            video = self.videos.index_select(0, torch.tensor(indices))
            captions = [self._caption(index) for index in indices]
            return Batch(video, captions, keys, torch.tensor(slots), self.shape.fps), []
        video = torch.zeros(len(slots), *self.videos.shape[1:], dtype=torch.uint8)
        captions, weights, bad = [""] * len(slots), torch.zeros(len(slots)), []
        for row, (slot, index) in enumerate(zip(slots, indices, strict=True)):
            try:
                caption = self._caption(index)
                video[row] = self._video(index, slot)
            except BadDataError:
                raise  # the shard itself is gone, not one clip
            except ValueError as error:
                bad.append(BadClip(index, str(error)))
            else:
                captions[row], weights[row] = caption, 1
        return Batch(video, captions, keys, torch.tensor(slots), self.shape.fps, weights), bad

    def _caption(self, index: int) -> str:
        caption = self.captions.get(index)
        if caption is None:
            caption = read_caption(self.records[index], self.caption_extension, self.max_caption_chars)
            if index < len(self.videos):
                self.captions[index] = caption
        return caption

    def _video(self, index: int, slot: int) -> torch.Tensor:
        cached = index < len(self.videos)
        if cached and self.filled[index]:
            return self.videos[index]
        pixels, fixed = self._decode(self.records[index], slot)
        video = torch.from_numpy(pixels)
        if cached and fixed:
            self.videos[index] = video
            self.filled[index] = True  # after the pixels, so that no other process sees half a clip
        return video

    def _decode(self, record: ClipRecord, slot: int) -> tuple[Video, bool]:
        """The frames of a record for a slot, and whether every slot would get the same ones."""
        shape = self.shape
        extension = find_member(record, shape.num_frames)
        if extension is None:
            raise DecodeError(f"no video: none of {', '.join(VIDEO_EXTENSIONS)} among {sorted(record.members)}")
        data = read_member(record, extension)
        if extension in IMAGE_EXTENSIONS:
            return read_image(data, shape.height, shape.width)[None], True
        fixed = True

        def choose_start(slack: float) -> float:
            nonlocal fixed
            if not self.random_start or slack < 0.5 / shape.fps:
                return 0.0
            fixed = False
            return np.random.default_rng([self.plan.seed, slot]).uniform(0, slack)

        pixels = decode_clip(
            data, num_frames=shape.num_frames, fps=shape.fps, height=shape.height, width=shape.width,
            start_seconds=choose_start, decoder=self.decoder,
        )  # fmt: skip
        return pixels, fixed


class Quarantine:
    """Bad clips on record, once each; BadDataError when there are too many of them."""

    def __init__(self, records: list[ClipRecord], max_bad_fraction: float, path: Path | None) -> None:
        self.records, self.max_bad_fraction, self.path = records, max_bad_fraction, path
        least, most = BAD_WINDOW
        self.window: deque[bool] = deque(maxlen=max(least, min(most, len(records))))
        self.in_a_row = 0
        self.known: set[tuple[str, str]] = set()
        if path is not None and path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            self.known = {(line["shard"], line["key"]) for line in lines}

    def account(self, batch: Batch, bad: list[BadClip]) -> None:
        """Takes note of one batch."""
        for clip in bad:
            self._write(clip)
        for weight in batch.weights.tolist():
            self.window.append(weight == 0)
            self.in_a_row = self.in_a_row + 1 if weight == 0 else 0
            count, limit = sum(self.window) if weight == 0 else 0, self.max_bad_fraction * (self.window.maxlen or 0)
            if self.in_a_row >= BAD_IN_A_ROW or count > limit:
                last = self.records[bad[-1].index]
                raise BadDataError(
                    f"{last.shard}: {count} of the last {len(self.window)} clips are bad ({self.in_a_row} in a row); the last is "
                    f"{last.key}: {bad[-1].reason}; mend data.shards"
                    + (f" (all are listed in {self.path})" if self.path else "")
                    + f" or raise data.max_bad_fraction={self.max_bad_fraction:g}"
                )

    def _write(self, clip: BadClip) -> None:
        record = self.records[clip.index]
        if (str(record.shard), record.key) in self.known:
            return
        self.known.add((str(record.shard), record.key))
        log.warning("%s is left out: %s", record.name, clip.reason)
        if self.path is None:
            return
        offset = min((offset for offset, _ in record.members.values()), default=0)
        line = {"key": record.key, "shard": str(record.shard), "offset": offset, "reason": clip.reason}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _as_is(sample: Any) -> Any:
    return sample


class ClipLoader:
    """Endless batches of captioned clips from tar shards, in an order that depends on the seed and the step alone.

    A clip that is broken, too short or without a usable caption keeps its slot: zeros for pixels, no caption, weight 0, and one
    line in `skipped_path`. BadDataError, naming the key to change: shards that cannot be indexed or hold no captioned video, 16
    bad clips in a row, or more than max_bad_fraction of a window of 100 to 1000 clips. Sources longer than the clip are cut at a
    place drawn from (seed, slot), unless random_start is off. Clips that are the same at every visit are decoded once and kept,
    up to cache_bytes.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        seed: int = 0,
        num_workers: int = 0,
        decoder: Decoder = "decord",
        cache_bytes: int = 2**31,
        caption_ext: str = "txt",
        max_caption_chars: int = 2000,
        max_bad_fraction: float = 0.01,
        skipped_path: Path | str | None = None,
        random_start: bool = True,
        max_clips: int | None = None,
    ) -> None:
        if decoder not in ("decord", "pyav"):
            raise ValueError(f"there is no decoder {decoder!r}; set data.decoder to decord or pyav")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}; set data.num_workers")
        if max_clips is not None and max_clips < 1:
            raise ValueError(f"max_clips must be positive or null, got {max_clips}; set data.max_clips")
        self.shape = ClipShape(num_frames, height, width, float(fps))
        Plan(1, batch_size, seed)  # refuses its numbers before gigabytes are indexed
        paths = expand_shards(shards)
        self.records = index_shards(paths)[:max_clips]
        self._check_members(paths, caption_ext)
        self.plan = Plan(len(self.records), batch_size, seed)
        self.num_workers = num_workers
        self.reader = ClipReader(
            self.records, self.plan, self.shape, decoder=decoder, caption_extension=caption_ext,
            max_caption_chars=max_caption_chars, random_start=random_start, cache_bytes=cache_bytes,
        )  # fmt: skip
        self.quarantine = Quarantine(self.records, max_bad_fraction, Path(skipped_path) if skipped_path else None)

    @property
    def num_clips(self) -> int:
        """How many clips one pass over the data has."""
        return len(self.records)

    def _check_members(self, paths: list[Path], caption_ext: str) -> None:
        found = sorted({extension for record in self.records for extension in record.members})
        where = f"{paths[0]}" + (f" and {len(paths) - 1} more shards" if len(paths) > 1 else "")
        if not any(find_member(record, self.shape.num_frames) for record in self.records):
            raise BadDataError(f"{where}: no video in {len(self.records)} samples, their members are {found}; change data.shards")
        if caption_ext not in found:
            raise BadDataError(f"{where}: no caption .{caption_ext}, the members are {found}; change data.caption_ext")

    def batches(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches from start_step on, without end; rank r of w gets the clips r, r + w, ... of each.

        ValueError, at once, where world_size does not divide the batch.
        """
        if self.plan.batch_size % world_size:
            size = self.plan.batch_size
            raise ValueError(f"a batch of {size} clips does not divide over {world_size} ranks; set data.batch_size")
        if not 0 <= rank < world_size or start_step < 0:
            raise ValueError(f"there is no step {start_step} for rank {rank} of {world_size}")
        return self._batches(start_step, rank, world_size)

    def _batches(self, start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        order = _SlotSampler(self.plan, start_step, rank, world_size)
        loader = DataLoader(self.reader, batch_size=None, sampler=order, num_workers=self.num_workers, collate_fn=_as_is)
        for batch, bad in loader:
            self.quarantine.account(batch, bad)
            yield batch


@dataclass(frozen=True)
class _SlotSampler:
    """Lists of slots, one per step, without end."""

    plan: Plan
    start_step: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.plan.slots(step)[self.rank :: self.world_size]
            step += 1
