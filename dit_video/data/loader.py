"""Captioned clips from shards as batches: order from the plan, bytes by offset, frames from the decoders, bad clips on record."""

import hashlib
import itertools
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_video.data.audio import AudioFormat
from dit_video.data.buckets import LEFT_OUT, NO_SHAPE, NOT_FETCHED, TOO_SHORT, ClipShape, assign, level
from dit_video.data.decode import DECODERS, Decoder, why_no_torchcodec
from dit_video.data.encoded import EncodedReader
from dit_video.data.encoding import IMAGE, LATENTS, NOTHING, Encoding, one_encoding
from dit_video.data.errors import BadDataError
from dit_video.data.files import exists, expand_shards, open_file
from dit_video.data.index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Clips
from dit_video.data.ledger import BadClip, Ledger
from dit_video.data.plan import Plan, Step
from dit_video.data.pool import DecodePool, Failure
from dit_video.data.reader import ClipReader, Job, RawStates
from dit_video.data.report import DataReport, SourceReport
from dit_video.data.shards import ClipRecord
from dit_video.data.sources import Store
from dit_video.seeding import fraction
from dit_video.shapes import Batch, Encoded

log = logging.getLogger(__name__)

AHEAD_BYTES = 2**28
"""Decoded clips that wait for their step, at the most; and no more than AHEAD_CLIPS for every worker."""
AHEAD_CLIPS = 8
FILLER = "filler"  # the key of a micro-batch without a clip


@dataclass
class _Entry:
    """A clip of the stream on its way into a batch."""

    number: int  # of the clip among all
    record: ClipRecord
    slot: int
    bucket: int
    cached: "_Cached | None"


@dataclass
class _Planned:
    """A rank's part of a step."""

    step: Step
    parts: list[range]
    entries: list[_Entry]
    idle: bool = False  # a job was asked for that reads nothing


@dataclass(frozen=True)
class _Cached:
    """A clip that is the same at every visit."""

    video: torch.Tensor
    captions: dict[str, str]
    audio: torch.Tensor | None = None
    has_audio: bool = False
    start: float = 0.0
    states: dict[str, Encoded] = field(default_factory=dict)  # of its captions, by field


def _check_keys(given: Mapping[str, Any], known: Collection[str], name: str) -> None:
    """ValueError for a key that says nothing."""
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{name} has no {unknown[0]}; it has {', '.join(known)}")


class ClipLoader:
    """Endless batches of captioned clips from tar shards, in an order that depends on the seed and the step alone.

    Every clip goes to one of the buckets, and a step holds clips of one; without buckets there is the one of num_frames, height, width
    and fps. A clip that is broken, too short or without a usable caption keeps its slot: zeros for pixels, no caption, weight 0, and one
    line in `skipped_path`. BadDataError, naming the key to change: shards that hold no usable clip, 16 bad clips in a row, or more
    than max_bad_fraction of a window of 100 to 1000 clips. Sources longer than the clip are cut at a place drawn from (seed, slot),
    unless random_start is off. Of clips that are stored as latents, states of captions and of first frames are read where they are wanted
    (`states`, `images`). Clips that are the same at every visit are decoded once and kept, up to cache_bytes.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | None,
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
        micro_batches: int = 1,
        buckets: Sequence[Mapping[str, Any]] | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        captions: Mapping[str, float] | None = None,
        timeout_seconds: float = 30.0,
        worker_bytes: int = 4 * 2**30,
        remote_cache: Path | str | None = None,
        remote_cache_bytes: int = 2**34,
        cost: Callable[[ClipShape], float] | None = None,
        tokens: Callable[[ClipShape], int] | None = None,
        audio_rate: int | None = None,
        audio_channels: int = 1,
        states: bool = True,
        images: bool = True,
        look: bool = False,
    ) -> None:
        if decoder not in DECODERS:
            raise ValueError(f"there is no decoder {decoder!r}; set data.decoder to one of {', '.join(DECODERS)}")
        if decoder == "torchcodec" and (cause := why_no_torchcodec()):
            raise ValueError(f"torchcodec cannot be used here ({cause}); set data.decoder to decord or pyav")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}; set data.num_workers")
        for name, value in {"batch_size": batch_size, "micro_batches": micro_batches}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; set data.{name}")
        if max_clips is not None and max_clips < 1:
            raise ValueError(f"max_clips must be positive or null, got {max_clips}; set data.max_clips")
        if seed < 0:
            raise ValueError(f"a seed is 0 or more, got {seed}; set data.seed")
        fields = dict(captions or {caption_ext: 1.0})
        if not all(weight >= 0 for weight in fields.values()) or not sum(fields.values()) > 0:
            raise ValueError(f"captions are fields with weights of 0 or more, some above it, got {fields}; set data.captions")
        self.fields = {name: weight for name, weight in fields.items() if weight}
        default = {"num_frames": num_frames, "height": height, "width": width, "fps": float(fps)}
        for bucket in buckets or []:
            _check_keys(bucket, default, "data.buckets")
        self.shapes = [ClipShape(**default | dict(bucket)) for bucket in buckets or [{}]]
        if len({*self.shapes}) < len(self.shapes):
            raise ValueError(f"two buckets are the same, of {', '.join(map(str, self.shapes))}; set data.buckets")
        self.batch_size, self.micro_batches, self.seed, self.num_workers = batch_size, micro_batches, seed, num_workers
        self.timeout_seconds, self.worker_bytes, self.cache_bytes = timeout_seconds, worker_bytes, cache_bytes
        self.audio = AudioFormat(audio_rate, audio_channels) if audio_rate is not None else None
        costs = [cost(shape) if cost else float(shape.num_frames * shape.height * shape.width) for shape in self.shapes]

        named = sources or {"shards": {"shards": shards, "weight": 1.0}}
        for name, each in named.items():
            _check_keys(each, ("shards", "weight"), f"data.sources.{name}")
            if not each.get("shards"):
                raise ValueError(f"no shards are named; set data.{f'sources.{name}.' if sources else ''}shards")
        store = Store(remote_cache, remote_cache_bytes, seed=seed)
        paths = {name: expand_shards(source["shards"], store) for name, source in named.items()}
        weights = [float(source.get("weight", 1.0)) for source in named.values()]
        self.clips = Clips([path for each in paths.values() for path in each], look=look or len(self.shapes) > 1)
        try:
            self.encoding = one_encoding([(str(shard), index.encoding) for shard, index in self.clips.indices() if len(index)])
        except ValueError as error:
            raise BadDataError(f"{error}; set data.shards to shards that were made alike") from error
        if self.encoding is not None:
            self._check_captions()
        if self.encoding is not None and self.audio is not None:
            raise ValueError("shards of latents hold no sound; set data.audio_rate=null, or data.shards to videos")
        self.reader: ClipReader | EncodedReader = (
            ClipReader(seed, decoder, tuple(self.fields), max_caption_chars, random_start, self.audio)
            if self.encoding is None else EncodedReader(self.encoding, tuple(self.fields), max_caption_chars, states, images)
        )  # fmt: skip
        self._check_members(caption_ext if captions is None else None)
        owner = np.repeat(np.arange(len(paths)), [len(each) for each in paths.values()])
        source = np.repeat(owner, np.diff(self.clips.starts))
        chosen = self._assign()
        empty = [
            name for number, name in enumerate(paths) if weights[number] > 0 and not ((chosen >= 0) & (source == number)).any()
        ]
        if max_clips is not None:
            chosen[np.flatnonzero(chosen >= 0)[max_clips:]] = LEFT_OUT
            weights = [weight * bool(((chosen >= 0) & (source == number)).any()) for number, weight in enumerate(weights)]
        in_use = [number for number in range(len(self.shapes)) if (chosen == number).any()]
        self.report = DataReport(
            self.shapes, level(costs, batch_size, in_use[0] if in_use else 0), costs,
            [tokens(shape) if tokens else 0 for shape in self.shapes],
            [SourceReport(name, weight, len(paths[name])) for name, weight in zip(paths, weights, strict=True)],
            chosen, source, self.clips.problems(),
        )  # fmt: skip
        if not self.num_clips:
            raise BadDataError(
                f"{self.clips.shards[0]}: none of {len(self.clips)} clips is usable ({self.report.refused()}); change data.shards"
            )
        if empty:
            raise BadDataError(
                f"source {empty[0]} has a weight and no usable clip; set data.sources.{empty[0]}.weight=0, or mend it"
            )
        records = [
            [np.flatnonzero((chosen == bucket) & (source == number)) for number in range(len(paths))]
            for bucket in range(len(self.shapes))
        ]
        self.plan = Plan(records, self.report.sizes, weights, seed)
        self.ledger = Ledger(self.num_clips, max_bad_fraction, Path(skipped_path) if skipped_path else None)
        self._cache: dict[tuple[int, int], _Cached] = {}
        self._cached_bytes = 0

    @property
    def num_clips(self) -> int:
        """How many clips can come up; those of a source without weight never do."""
        used = np.array([source.weight > 0 for source in self.report.sources])
        return int(((self.report.bucket >= 0) & used[self.report.source]).sum())

    @property
    def fingerprint(self) -> str:
        """Changes when another clip would come up in any step: with the clips, their buckets and sources, and the sizes of steps."""
        digest = hashlib.sha256()
        for shard, index in self.clips.indices():
            digest.update(f"{shard.name} {len(index)} ".encode())
            digest.update("\0".join(index.keys).encode())
        digest.update(np.stack([self.report.bucket, self.report.source]).astype(np.int32).tobytes())
        digest.update(repr((self.plan.sizes, self.plan.weights, self.plan.seed, self.shapes)).encode())
        return digest.hexdigest()[:16]

    def nothing(self) -> Encoded | None:
        """The states of the empty caption, where they lie beside the shards."""
        path = self.clips.shards[0].with_name(NOTHING)
        if not isinstance(self.reader, EncodedReader) or not self.reader.with_states or not exists(path):
            return None
        try:
            with open_file(path) as file:
                return self._states(self.reader.states_in(file.read(), ["nothing"]))["nothing"]
        except ValueError as error:
            raise ValueError(f"{path}: {error}; write it anew with `dit-video data encode`, or bring it back") from error

    def write_report(self, path: Path) -> None:
        """What the data is, as JSON; a run that goes on compares its fingerprint. Other ranks may be reading it, so it appears whole."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(self.report.about() | {"fingerprint": self.fingerprint}, indent=2) + "\n")
        os.replace(draft, path)

    def _assign(self) -> np.ndarray:
        """The bucket of every clip; with one bucket, what the index does not know is left for the decoder to find out."""
        columns = self.clips.columns()
        chosen = assign(self.shapes, columns["frames"], columns["fps"], columns["height"], columns["width"])
        if len(self.shapes) == 1 and self.encoding is None:
            chosen[chosen == NO_SHAPE] = 0
        chosen[~columns["fetched"]] = NOT_FETCHED
        if self.encoding is not None:
            self._check_encoded(columns, chosen)
        return chosen

    def _check_encoded(self, columns: Mapping[str, np.ndarray], chosen: np.ndarray) -> None:
        """ValueError where clips would have to be cut or resized, which latents cannot be."""
        same = np.zeros(len(chosen), bool)
        for number, shape in enumerate(self.shapes):
            rate = (np.abs(columns["fps"] - shape.fps) < 1e-6) | (shape.num_frames == 1)
            size = [
                columns[name] == getattr(shape, own) for name, own in (("frames", "num_frames"), ("height",) * 2, ("width",) * 2)
            ]
            same |= (chosen == number) & rate & np.all(size, axis=0)
        for first in np.flatnonzero(~same & ((chosen >= 0) | (chosen == TOO_SHORT)))[:1]:
            frames, height, width = (int(columns[name][first]) for name in ("frames", "height", "width"))
            found = ClipShape(frames, height, width, float(columns["fps"][first]))
            raise ValueError(
                f"{self.clips.record(int(first)).name} was encoded as {found}, and is to be trained on as "
                f"{' or '.join(map(str, self.shapes))}; set data.buckets, or data.num_frames, height, width and fps, to what was encoded"
            )

    def _check_captions(self) -> None:
        """ValueError for a field that no shard was encoded with, and that would not be missed."""
        told = [
            Encoding.from_json(note).captions for note in {index.encoding for _, index in self.clips.indices() if index.encoding}
        ]
        known = {name for each in told for name in each}
        lacking = [name for name in self.fields if name not in known]
        if lacking and all(told):
            raise ValueError(
                f"{self.clips.shards[0]} was encoded with the captions {', '.join(sorted(known))}, and without {lacking[0]}; set "
                "data.captions, or encode it again with all of them"
            )

    def _check_members(self, caption_ext: str | None) -> None:
        found = sorted({extension for _, index in self.clips.indices() for extension in index.extensions})
        shards = self.clips.shards
        where = f"{shards[0]}" + (f" and {len(shards) - 1} more shards" if len(shards) > 1 else "")
        if not len(self.clips):
            problems = self.clips.problems()
            raise BadDataError(problems[0] if problems else f"{where}: a tar without samples; change data.shards")
        wanted = (LATENTS, *VIDEO_EXTENSIONS) + (IMAGE_EXTENSIONS if any(shape.num_frames == 1 for shape in self.shapes) else ())
        if not set(found) & set(wanted):
            raise BadDataError(
                f"{where}: no video in {len(self.clips)} samples, their members are {found[:20]} (the key of a sample ends at the first "
                "dot of its name); change data.shards"
            )
        if caption_ext is not None and caption_ext not in found:
            raise BadDataError(f"{where}: no caption .{caption_ext}, the members are {found}; change data.caption_ext")

    def batches(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches from start_step on, without end; rank r of w gets micro-batches r, r + w, ... of each step.

        ValueError, at once, where micro_batches do not divide over the ranks.
        """
        if not 0 <= rank < world_size or start_step < 0:
            raise ValueError(f"there is no step {start_step} for rank {rank} of {world_size}")
        if self.micro_batches % world_size:
            raise ValueError(
                f"{self.micro_batches} micro-batches a step do not divide over {world_size} ranks; set data.micro_batches"
            )
        return self._batches(start_step, rank, world_size)

    def one_pass(self) -> Iterator[Batch]:
        """Every clip once: a clip that comes up again in the last steps has weight 0."""
        seen: set[int] = set()
        for number, batch in enumerate(self.batches()):
            step = self.plan.step(number)
            for row, (key, slot) in enumerate(zip(batch.keys, batch.slots.tolist(), strict=True)):
                if key != FILLER:
                    record = int(step.records[slot - step.first_slot])
                    batch.weights[row] *= record not in seen
                    seen.add(record)
            yield batch
            if len(seen) == self.plan.num_clips:
                return

    def _batches(self, start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        planned: deque[_Planned] = deque()
        numbers = itertools.count(start_step)

        def plan_next() -> _Planned:
            step = self.plan.step(next(numbers))
            parts = step.micro_batches(self.micro_batches)[rank::world_size]
            entries = [
                _Entry(
                    number, self.clips.record(number), step.first_slot + place, step.bucket, self._cache.get((step.bucket, number))
                )
                for part in parts for place, number in zip(part, step.records[part.start : part.stop].tolist(), strict=True)
            ]  # fmt: skip
            planned.append(_Planned(step, parts, entries))
            return planned[-1]

        def jobs() -> Iterator[Job | None]:
            # When all are in the cache no decoder is needed, and asking for one more job would never end.
            while len(self._cache) < self.plan.num_clips:
                here = plan_next()
                wanted = [entry for entry in here.entries if entry.cached is None]
                for entry in wanted:
                    yield Job(entry.record, entry.slot, self.shapes[entry.bucket])
                here.idle = not wanted
                if here.idle:  # without a job the steps that this rank has nothing to read for would all be planned at once
                    yield None

        largest = max(self.reader.num_bytes(shape) for shape in self.shapes)
        ahead = min(AHEAD_CLIPS * self.num_workers, max(AHEAD_BYTES // largest, self.num_workers))
        pool: DecodePool[Job | None, Any] = DecodePool(
            self.reader,
            self.num_workers,
            largest,
            timeout_seconds=self.timeout_seconds,
            memory_bytes=self.worker_bytes,
            ahead=ahead,
        )
        outcomes = pool.map(jobs())
        early: list[Any] = []  # an outcome that had to be asked for before its step was planned

        def next_outcome() -> Any:
            return early.pop() if early else next(outcomes)

        try:
            while True:
                if not planned:
                    early += itertools.islice(outcomes, 1)
                if not planned:
                    plan_next()
                here = planned.popleft()
                if here.idle:
                    next_outcome()
                yield self._gather(here, next_outcome)
        finally:
            outcomes.close()
            if not sys.is_finalizing():  # then files can no longer be written
                self.clips.save_learned()

    def _gather(self, planned: _Planned, next_outcome: Callable[[], Any]) -> Batch:
        """A rank's part of a step; a micro-batch without a clip is one filler of weight 0."""
        step, parts, entries = planned.step, planned.parts, planned.entries
        shape = self.shapes[step.bucket]
        fillers = sum(not part for part in parts)
        count = len(entries) + fillers
        video = self._blank(count, shape)
        audio = torch.zeros(count, self.audio.channels, self.audio.num_samples(shape.seconds)) if self.audio else None
        has_audio = torch.zeros(count, dtype=torch.bool)
        encoded: list[Encoded | None] = [None] * count
        images: list[Encoded | None] = [None] * count
        captions, keys, weights, starts = [""] * count, [FILLER] * count, torch.zeros(count), torch.zeros(count)
        slots = torch.full((count,), step.first_slot)
        rows = itertools.count()
        places = iter(entries)
        for part in parts:
            if not part:
                next(rows)
            for row, entry in zip(itertools.islice(rows, len(part)), places, strict=False):
                slots[row], keys[row] = entry.slot, entry.record.name
                clip, bad = entry.cached, None
                if clip is None:
                    outcome = next_outcome()
                    if isinstance(outcome, Failure):
                        bad = BadClip(entry.record, outcome.reason)
                    else:
                        content, waveform = self._content(shape, outcome.pixels)
                        video[row], starts[row] = content, outcome.value.start
                        clip = _Cached(
                            video[row],
                            outcome.value.captions,
                            start=outcome.value.start,
                            states=self._states(outcome.value.states),
                        )
                        if audio is not None and waveform is not None:
                            audio[row], has_audio[row] = torch.from_numpy(waveform), outcome.value.has_audio
                            clip = replace(clip, audio=audio[row], has_audio=outcome.value.has_audio)
                        if outcome.value.fixed:
                            self._keep(entry, clip)
                        if outcome.value.checksums:
                            self.clips.learn(entry.number, outcome.value.checksums)
                else:
                    video[row], has_audio[row], starts[row] = clip.video, clip.has_audio, clip.start
                    if audio is not None and clip.audio is not None:
                        audio[row] = clip.audio
                self.ledger.account(bad)
                if clip is not None:
                    chosen = self._caption(clip.captions, entry.slot)
                    captions[row], weights[row] = clip.captions[chosen], 1
                    encoded[row], images[row] = clip.states.get(chosen), clip.states.get(IMAGE)
        sizes = [max(len(part), 1) for part in parts]
        batch = Batch(None, captions, keys, slots, shape.fps, weights, sizes, len(step.records), starts)
        if isinstance(self.reader, EncodedReader) and self.reader.with_states:
            batch.encoded = encoded
        if self.encoding is not None and isinstance(self.reader, EncodedReader) and self.reader.with_images:
            blank = torch.zeros(self.encoding.image_size)
            batch.image = torch.stack([blank if each is None else each.states.float() for each in images])
        if self.audio is not None:
            batch = replace(batch, audio=audio, audio_rate=self.audio.rate, has_audio=has_audio)
        if video.dtype == torch.uint8:  # whether it was stored as a video or as its frames
            return replace(batch, video=video.reshape(count, *video.shape[-4:]))
        assert self.encoding is not None
        stored = dict(zip(self.encoding.parts, video.float().unbind(1), strict=True))
        return replace(batch, latents=stored["mean"], logvar=stored.get("logvar"), known=stored.get("known"))

    def _blank(self, count: int, shape: ClipShape) -> torch.Tensor:
        """Zeros for so many clips, as they are stored."""
        if self.encoding is None:
            return torch.zeros(count, shape.num_frames, shape.height, shape.width, 3, dtype=torch.uint8)
        return torch.zeros(count, *self.encoding.size(shape), dtype=getattr(torch, self.encoding.dtype))

    def _content(self, shape: ClipShape, out: np.ndarray) -> tuple[torch.Tensor, np.ndarray | None]:
        """Frames and sound, or latents, of a clip that was read."""
        if isinstance(self.reader, EncodedReader):
            stored = torch.from_numpy(out[: self.reader.num_bytes(shape)])
            return stored.view(self._blank(0, shape).dtype).reshape(self._blank(1, shape).shape[1:]), None
        pixels, waveform = self.reader.layout(shape, out)
        return torch.from_numpy(pixels), waveform

    @staticmethod
    def _states(raw: Mapping[str, RawStates]) -> dict[str, Encoded]:
        def encoded(found: RawStates) -> Encoded:
            dtype = getattr(torch, found.dtype)
            pooled = None if found.pooled is None else torch.frombuffer(bytearray(found.pooled), dtype=dtype)
            states = torch.frombuffer(bytearray(found.states), dtype=dtype).reshape(found.shape)
            return Encoded(states, pooled, tuple(map(encoded, found.others)))

        return {name: encoded(found) for name, found in raw.items()}

    def _keep(self, entry: _Entry, clip: _Cached) -> None:
        size = self.reader.num_bytes(self.shapes[entry.bucket])
        size += sum(states.num_bytes for states in clip.states.values())
        if self._cached_bytes + size <= self.cache_bytes and (entry.bucket, entry.number) not in self._cache:
            self._cache[entry.bucket, entry.number] = replace(
                clip, video=clip.video.clone(), audio=None if clip.audio is None else clip.audio.clone()
            )
            self._cached_bytes += size

    def _caption(self, captions: dict[str, str], slot: int) -> str:
        """The field of one of a clip's captions, drawn by the fields' weights from (seed, slot)."""
        weights = [self.fields[name] for name in captions]
        if len(captions) == 1 or not sum(weights):
            return next(iter(captions))
        point, reached = fraction(self.seed, slot, "caption") * sum(weights), 0.0
        for name, weight in zip(captions, weights, strict=True):
            reached += weight
            if point < reached:
                return name
        return max(captions, key=lambda name: self.fields[name])  # rounding
