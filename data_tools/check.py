"""Are these shards what training needs? Every clip read, its checksums compared, its frames decoded; and clean copies written."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from dit_video.data.audio import decode_all_audio
from dit_video.data.buckets import ClipShape
from dit_video.data.decode import decode_all
from dit_video.data.encoded import EncodedReader
from dit_video.data.encoding import LATENTS, NOTHING, Encoding, one_encoding, read_note
from dit_video.data.files import ShardFile, exists, expand_shards, open_file
from dit_video.data.index import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Clips,
    ShardIndex,
    build,
    load,
    save,
    shape_of,
    write_index,
)
from dit_video.data.pool import DecodePool, Failure
from dit_video.data.reader import Job, caption_members, captions_of
from dit_video.data.shards import BadDataError, ClipRecord, members_of, read_members, sidecar, write_shard
from dit_video.data.video_file import read_image

SHOWN = 20  # bad clips that are printed; the others are counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckClip:
    """Reads every member of a sample and decodes its caption and all of its frames; ValueError saying what is wrong."""

    captions: tuple[str, ...]
    max_caption_chars: int
    frames: bool  # False: frames are not decoded, but the bytes are those that were indexed
    audio: bool  # sound is decoded too
    encoding: Encoding | None = None  # of the latents of all shards; none: as each clip says

    def __call__(self, record: ClipRecord, out: UInt8[np.ndarray, " bytes"]) -> int:
        found, members = 0, read_members(record, list(record.members))
        for extension, data in members.items():
            if extension in VIDEO_EXTENSIONS:
                found += decode_all(data) if self.frames else 1
            elif extension in IMAGE_EXTENSIONS:
                found += len(read_image(data, 1, 1)) if self.frames else 1
            elif extension == LATENTS:
                self._read_encoded(record, data)
                found += 1
            if self.audio and extension in (*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS):
                decode_all_audio(data)
        if not found:
            raise ValueError(f"no video, image or latents among {sorted(record.members)}")
        caption_members(record, self.captions, self.max_caption_chars)
        captions_of(members, self.captions, self.max_caption_chars)
        return found

    def _read_encoded(self, record: ClipRecord, latents: bytes) -> None:
        """Reads latents and states as training does."""
        frames, height, width, fps = shape_of(record.shard, record.members)
        if not frames:
            raise ValueError("its json does not say of which shape its latents are")
        encoding, shape = self.encoding or Encoding.from_json(read_note(latents)[0]), ClipShape(frames, height, width, fps)
        reader = EncodedReader(encoding, encoding.captions or self.captions, self.max_caption_chars)
        if reader.num_bytes(shape) > len(latents):  # before as much is made room for
            raise ValueError(f"its json says {shape}, of which latents have more than its {len(latents)} bytes")
        reader(Job(record, 0, shape), np.empty(reader.num_bytes(shape), np.uint8))


def check_shards(
    shards: str | Sequence[str],
    captions: Sequence[str] = ("txt",),
    max_caption_chars: int = 2000,
    frames: bool = True,
    audio: bool = False,
    repair: str | None = None,
    workers: int | None = None,
    timeout_seconds: float = 60.0,
) -> None:
    """Checks every clip of tar shards in processes of their own, prints what is wrong, and raises BadDataError where anything is.

    With `repair` the clips that are right are written to new shards of the same names in that folder, indexed, and what was dropped is
    said; the shards themselves are never changed. Without `frames` the bytes are compared with their checksums, and nothing is decoded,
    which goes at the speed of the disk; ValueError where a shard has no checksums.
    """
    paths = expand_shards(shards)
    out = Path(repair) if repair else None
    if out is not None:
        _check_folder(out, paths)
    clips, console = Clips(paths), Console(soft_wrap=True)
    bare = [path for path, index in clips.indices() if not index.checked]
    if bare and not frames:
        raise ValueError(
            f"{bare[0]} has no checksums to compare with; set frames=true, or run `dit-video data index` when it is whole"
        )
    problems = clips.problems()
    for path, index in clips.indices():
        problems += [f"{path}: {problem}" for problem in _differences(path, index) if index.checked]
    encoding = None
    try:
        encoding = one_encoding([(str(path), index.encoding) for path, index in clips.indices() if len(index)])
    except ValueError as error:
        problems.append(str(error))
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fetched = clips.columns()["fetched"]
    bad: dict[int, str] = {}
    for number, outcome in _checked(
        clips,
        np.flatnonzero(fetched),
        CheckClip(tuple(captions), max_caption_chars, frames, audio, encoding),
        workers,
        timeout_seconds,
    ):
        if isinstance(outcome, Failure):
            bad[number] = outcome.reason
    absent = int((~fetched).sum())
    if absent:
        console.print(f"{absent} samples are left out: the tool that downloaded them says that it could not fetch them")
    for problem in problems:
        console.print(f"damaged: {problem}", markup=False)
    for number, reason in list(bad.items())[:SHOWN]:
        console.print(f"bad: {clips.record(number).name}: {reason}", markup=False)
    if len(bad) > SHOWN:
        console.print(f"and {len(bad) - SHOWN} more bad clips")
    if out is not None:
        for path, kept, dropped in _repair(clips, {*bad, *np.flatnonzero(~fetched).tolist()}, out):
            console.print(f"{path}: {kept} clips kept, {dropped} dropped", markup=False)
        beside = paths[0].with_name(NOTHING)  # which a training from encoded shards may need
        if exists(beside):
            with open_file(beside) as file:
                (out / NOTHING).write_bytes(file.read())
    if bare:
        console.print(f"{len(bare)} of {len(paths)} shards have no checksums: a bit flipped in a frame may go unnoticed in them")
    if bad or problems or not fetched.any():
        where = f"{len(bad)} of {len(clips)} clips are bad, {len(problems)} shards are damaged"
        raise BadDataError(
            f"{paths[0]}{' ...' if len(paths) > 1 else ''}: {where}; " + (f"use {out}" if out else "set repair=FOLDER")
        )
    console.print(f"{len(paths)} shards, {int(fetched.sum())} clips: all of them can be used")


def _differences(path: ShardFile, index: ShardIndex) -> list[str]:
    """What a shard's headers say otherwise than the index that was made before."""
    try:
        members, problems = members_of(path)
    except BadDataError as error:
        return [str(error)]
    found: dict[tuple[str, str], list[int]] = {}
    for key, extension, member in members:
        found.setdefault((key, extension), []).append(member.offset)
    known = {(key, name): member.offset for row, key in enumerate(index.keys) for name, member in index.members(row).items()}
    kinds = {
        "are there twice": [name for name, offsets in found.items() if len(offsets) > 1],
        "are missing": [name for name in known if name not in found],
        "lie elsewhere": [name for name, offset in known.items() if name in found and offset not in found[name]],
        "are not in the index": [name for name in found if name not in known],
    }
    told = {
        kind: ".".join(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for kind, names in kinds.items()
        if names
    }
    return problems + [f"members {kind}: {names}" for kind, names in told.items()]


def _checked(
    clips: Clips, numbers: Int[np.ndarray, " checked"], work: CheckClip, workers: int, timeout_seconds: float
) -> Iterator[tuple[int, object]]:
    pool: DecodePool[ClipRecord, int] = DecodePool(work, workers, 1, timeout_seconds=timeout_seconds)
    columns = (*Progress.get_default_columns()[:3], TextColumn("{task.completed} of {task.total} clips"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=len(numbers))
        outcomes = pool.map(clips.record(number) for number in numbers.tolist())
        for number, outcome in zip(numbers.tolist(), outcomes, strict=True):
            progress.advance(task)
            yield number, outcome


def _repair(clips: Clips, dropped: Set[int], out: Path) -> Iterator[tuple[Path, int, int]]:
    """Writes the clips that are right; a shard of which nothing is left is not written."""
    out.mkdir(parents=True, exist_ok=True)
    for shard, (start, end) in enumerate(zip(clips.starts[:-1].tolist(), clips.starts[1:].tolist(), strict=True)):
        good = [clips.record(number) for number in range(start, end) if number not in dropped]
        path = out / clips.shards[shard].name
        if good:
            write_shard(path, ({"__key__": each.key} | read_members(each, list(each.members)) for each in good))
            write_index(path)
        yield path, len(good), end - start - len(good)


def _check_folder(out: Path, paths: Sequence[ShardFile]) -> None:
    if any(isinstance(path, Path) and path.resolve().parent == out.resolve() for path in paths):
        raise ValueError(f"{out} is where the shards lie, which are never changed; set repair to another folder")
    names = Counter(path.name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is the name of several shards, which would be one in {out}; check one folder at a time")


def write_indices(shards: str | Sequence[str], anew: bool = False) -> None:
    """Writes the index of every shard without one that has checksums; BadDataError where a shard is damaged, the others being indexed."""
    console, damaged = Console(soft_wrap=True), 0
    paths = expand_shards(shards)
    for path in paths:
        if not isinstance(path, Path):
            raise ValueError(f"{path}: an index is written beside a local shard; index it before it is uploaded, and upload both")
        if not anew and _has_checksums(path):
            console.print(f"{path}: has an index", markup=False)
            continue
        try:
            index = build(path, checksums=True, look=True)
        except BadDataError as error:
            console.print(f"damaged: {error}", markup=False)
            damaged += 1
            continue
        for problem in index.problems:
            console.print(f"damaged: {path}: {problem}", markup=False)
        damaged += bool(index.problems)
        if not index.problems:
            save(index, sidecar(path))
            console.print(f"{path}: {len(index)} clips", markup=False)
    if damaged:
        raise BadDataError(
            f"{damaged} of {len(paths)} shards are damaged and have no index; see `dit-video data check`, repair=FOLDER"
        )


def _has_checksums(shard: Path) -> bool:
    try:
        return sidecar(shard).exists() and load(sidecar(shard)).checked
    except BadDataError:  # a damaged index, or another version's
        return False
