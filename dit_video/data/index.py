"""What lies in a shard, known before it is read: one small file beside every tar, and all of them together as one table.

The sidecar `00000.index.safetensors` of `00000.tar` holds columns, one row a sample: its key, frames, height, width, rate and length of its
caption; and one row a member: sample, extension, offset, size and checksum. It is data alone, and is mapped rather than parsed, so that
ten million clips are looked through in seconds. Where a shard has none, it is built from the tar's headers; what a damaged tar still
holds is found, and the rest is said.
"""

import hashlib
import io
import json
import logging
import os
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from dit_video.data.decode import DecodeError, probe
from dit_video.data.downloaded import not_fetched
from dit_video.data.encoding import LATENTS, encoding_of
from dit_video.data.errors import BadDataError
from dit_video.data.files import ShardFile, exists, open_file, read_ranges, size_of, version_of
from dit_video.data.shards import MAX_JSON_BYTES, ClipRecord, Member, members_of, sidecar

INDEX_VERSION = "2"
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "m4a", "ogg", "opus", "aac")  # beside a video, in place of its own sound
SHAPE_KEYS = ("num_frames", "height", "width", "fps")  # of a sample's json, believed where all are there
NO_CHECKSUM = -1
REMOTE_AT_ONCE = 16  # shards whose index is fetched, or built, at the same time
MAX_NOTE_BYTES = 65536  # in which the header of a file of latents must say what made it
SAVE_EVERY = 10_000  # checksums that are taken at a first read

log = logging.getLogger(__name__)


@dataclass
class ShardIndex:
    """The columns of one shard."""

    keys: list[str]
    frames: np.ndarray  # int32, 0 where unknown; 1 is an image
    height: np.ndarray  # int32, pixels as shown
    width: np.ndarray  # int32
    fps: np.ndarray  # float64
    caption_length: np.ndarray  # int32, bytes of the txt member, -1 where there is none
    fetched: np.ndarray  # bool, False where the tool that downloaded the shard says that it could not fetch this sample
    extensions: list[str]
    member_ends: np.ndarray  # int64: members of sample i are member_ends[i - 1] to member_ends[i]
    member_extension: np.ndarray  # uint8, into extensions
    member_offset: np.ndarray  # int64
    member_size: np.ndarray  # int64
    member_checksum: np.ndarray  # int64, NO_CHECKSUM where it was never taken
    shard_bytes: int = 0
    shard_version: str = ""  # what files.version_of said of the shard; another machine's copy has another
    encoding: str = ""  # what made the latents that the shard holds, see encoded.py; nothing where it holds videos
    looked: bool = False  # whether shapes were looked for; where they are 0 all the same they cannot be read
    problems: list[str] = field(default_factory=list)  # what the headers could not tell; not stored

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def checked(self) -> bool:
        """Whether every member had a checksum when this was first asked."""
        return bool((self.member_checksum != NO_CHECKSUM).all())

    def members(self, row: int) -> dict[str, Member]:
        """The members of a sample by extension."""
        start, end = int(self.member_ends[row - 1]) if row else 0, int(self.member_ends[row])
        found = {}
        for place in range(start, end):
            checksum = int(self.member_checksum[place])
            found[self.extensions[self.member_extension[place]]] = Member(
                int(self.member_offset[place]), int(self.member_size[place]), None if checksum == NO_CHECKSUM else checksum
            )
        return found


COLUMNS = {
    "frames": np.int32, "height": np.int32, "width": np.int32, "fps": np.float64, "caption_length": np.int32,
    "fetched": np.bool_, "member_ends": np.int64, "member_extension": np.uint8, "member_offset": np.int64, "member_size": np.int64,
    "member_checksum": np.int64,
}  # fmt: skip


def build(shard: ShardFile, checksums: bool = False, look: bool = False) -> ShardIndex:
    """The index of a shard from its headers; with checksums its members are read, and with `look` the shapes of its clips are found out.

    What cannot be indexed is left out and said in `problems`: what follows a damaged header or the end of a cut file, members that are no
    plain files, names that lead out of the folder, and members that are there twice. BadDataError where it is no tar at all.
    """
    found, problems = members_of(shard)
    samples: dict[str, dict[str, Member]] = {}
    refused: set[str] = set()
    for key, extension, member in found:
        members = samples.setdefault(key, {})
        if extension in members:
            problems.append(f"holds {key}.{extension} twice; neither is used")
            refused.add(key)
        members[extension] = member
    for key in refused:
        del samples[key]
    if checksums:
        samples = {key: _with_checksums(shard, members) for key, members in samples.items()}
    absent, lacking = not_fetched(shard, samples)
    return table(shard, samples, problems + lacking, look, absent)


def _with_checksums(shard: ShardFile, members: dict[str, Member]) -> dict[str, Member]:
    with open_file(shard) as file:
        found = {}
        for extension, member in members.items():
            file.seek(member.offset)
            found[extension] = Member(member.offset, member.size, zlib.crc32(file.read(member.size)))
    return found


def table(
    shard: ShardFile, samples: Mapping[str, Mapping[str, Member]], problems: list[str], look: bool, absent: Set[str] = frozenset()
) -> ShardIndex:
    """The columns of samples, of which some were not fetched; with `look` the shapes of their pictures are read."""
    extensions = sorted({extension for members in samples.values() for extension in members})
    if len(extensions) > 256:
        raise BadDataError(
            f"{shard}: its members have {len(extensions)} different extensions, 256 at the most (a key ends at the first dot of "
            f"a name: {extensions[0]!r} is one); change the names, or data.shards"
        )
    encoded = [members[LATENTS] for members in samples.values() if LATENTS in members]
    look = look or bool(encoded)  # latents have shapes that nobody can choose later
    shapes = np.array([shape_of(shard, members) if look else (0, 0, 0, 0.0) for members in samples.values()], np.float64)
    shapes = shapes.reshape(-1, 4)
    rows = [(extensions.index(extension), member) for members in samples.values() for extension, member in members.items()]
    return ShardIndex(
        keys=list(samples),
        frames=shapes[:, 0].astype(np.int32),
        height=shapes[:, 1].astype(np.int32),
        width=shapes[:, 2].astype(np.int32),
        fps=shapes[:, 3],
        caption_length=np.array([members["txt"].size if "txt" in members else -1 for members in samples.values()], np.int32),
        fetched=np.array([key not in absent for key in samples], np.bool_),
        extensions=extensions,
        member_ends=np.cumsum([len(members) for members in samples.values()], dtype=np.int64),
        member_extension=np.array([extension for extension, _ in rows], np.uint8),
        member_offset=np.array([member.offset for _, member in rows], np.int64),
        member_size=np.array([member.size for _, member in rows], np.int64),
        member_checksum=np.array([NO_CHECKSUM if m.checksum is None else m.checksum for _, m in rows], np.int64),
        shard_bytes=size_of(shard),
        shard_version=version_of(shard),
        encoding=_encoding(shard, encoded) if encoded else "",
        looked=look,
        problems=problems,
    )


def _encoding(shard: ShardFile, encoded: Sequence[Member]) -> str:
    """The note of the first latents that can be read; BadDataError where none can."""
    why: ValueError | None = None
    for latents in encoded:
        try:
            (first,) = read_ranges(shard, [(latents.offset, min(latents.size, MAX_NOTE_BYTES))])
            return encoding_of(first)
        except ValueError as error:
            why = why or error
    raise BadDataError(f"{shard}: {why}; encode it anew, or change data.shards") from why


def shape_of(shard: ShardFile, members: Mapping[str, Member]) -> tuple[int, int, int, float]:
    """Frames, height, width and rate of a sample: from its json where that says all four, else from the header of its video or image.

    Zeros where neither can be read; the decoder will say why.
    """
    if "json" in members and members["json"].size <= MAX_JSON_BYTES:
        try:
            about = json.loads(_bytes(shard, members["json"]))
            frames, height, width, fps = (about[key] for key in SHAPE_KEYS)
            if all(isinstance(value, int) and 0 < value < 2**31 for value in (frames, height, width)) and 0 < fps < 1e6:
                return frames, height, width, float(fps)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    extension = next((each for each in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS) if each in members), None)
    if extension is None:
        return 0, 0, 0, 0.0
    data = _bytes(shard, members[extension])
    return _image_shape(data) if extension in IMAGE_EXTENSIONS else _video_shape(data)


def _bytes(shard: ShardFile, member: Member) -> bytes:
    return read_ranges(shard, [(member.offset, member.size)])[0]


def _image_shape(data: bytes) -> tuple[int, int, int, float]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            return 1, height, width, 1.0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0, 0, 0.0


def _video_shape(data: bytes) -> tuple[int, int, int, float]:
    """As the decoder will see it: turned upright, and with the frames a second that its frames' own times make."""
    try:
        info = probe(data)
    except DecodeError:
        return 0, 0, 0, 0.0
    return len(info.times), info.height, info.width, len(info.times) / info.seconds if info.seconds > 0 else 0.0


def save(index: ShardIndex, path: Path) -> None:
    """Writes an index; it appears complete or not at all."""
    keys = [key.encode() for key in index.keys]
    # safetensors writes an array's memory as it lies, so a view with gaps would come back scrambled
    columns: dict[str, np.ndarray] = {name: np.ascontiguousarray(getattr(index, name), kind) for name, kind in COLUMNS.items()}
    columns["key_bytes"] = np.frombuffer(b"".join(keys), np.uint8)
    columns["key_ends"] = np.cumsum([len(key) for key in keys], dtype=np.int64)
    about = {"version": INDEX_VERSION, "extensions": index.extensions, "looked": index.looked}
    # checksums tell more than times do, and the same shard shall have the same index wherever and whenever it was written
    about |= {"encoding": index.encoding} if index.encoding else {}
    about |= {"shard_bytes": index.shard_bytes, "shard_version": "" if index.checked else index.shard_version}
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # machines that share a folder may share numbers of processes
    try:
        # one entry, as safetensors writes several in a random order, and the same shard shall have the same index
        partial.write_bytes(to_safetensors(columns, {"about": json.dumps(about)}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: ShardFile) -> ShardIndex:
    """Reads an index; BadDataError where it is damaged, of another version, or its columns do not fit together."""
    try:
        with open_file(path) as file:
            data = file.read()
        columns: dict[str, Any] = from_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["about"])
        if about["version"] != INDEX_VERSION:
            raise ValueError(f"its version is {about['version']}, this program's {INDEX_VERSION}")
        missing = [name for name in (*COLUMNS, "key_bytes", "key_ends") if name not in columns]
        if missing:
            raise KeyError(missing[0])
        extensions, looked, encoding = list(about["extensions"]), about["looked"] is True, str(about.get("encoding", ""))
        size, version = int(about["shard_bytes"]), str(about["shard_version"])
        raw, ends = columns.pop("key_bytes").tobytes(), columns.pop("key_ends")
        starts = [0, *ends[:-1].tolist()]
        keys = [raw[start:end].decode() for start, end in zip(starts, ends.tolist(), strict=True)] if len(ends) else []
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise BadDataError(f"{path}: is no index that can be read ({error}); delete it, and it is built anew") from error
    index = ShardIndex(
        keys=keys, extensions=extensions, shard_bytes=size, shard_version=version, encoding=encoding, looked=looked, **columns
    )
    if not _fits(index):
        raise BadDataError(f"{path}: is a damaged index; delete it, and it is built anew")
    return index


def _fits(index: ShardIndex) -> bool:
    count, members = len(index.keys), len(index.member_offset)
    rows = all(
        len(getattr(index, name)) == count
        for name in ("frames", "height", "width", "fps", "caption_length", "fetched", "member_ends")
    )
    files = all(len(getattr(index, name)) == members for name in ("member_extension", "member_size", "member_checksum"))
    return (
        rows
        and files
        and all(getattr(index, name).dtype == kind for name, kind in COLUMNS.items())
        and (not count or int(index.member_ends[-1]) == members and bool((np.diff(index.member_ends, prepend=0) >= 0).all()))
        and (not members or int(index.member_extension.max()) < len(index.extensions))
        and (not members or int(min(index.member_offset.min(), index.member_size.min())) >= 0)
    )


def index_of(shard: ShardFile, look: bool = False) -> ShardIndex:
    """A shard's index: its sidecar where there is one, else built from its headers, and kept (see kept_at) where that can be written.

    An index with checksums knows better than a shard that was changed; one without is built anew, and so is one that lacks the shapes
    where they are asked for.
    """
    path, own = find_index(shard), kept_at(shard)
    if path is not None:
        index, size = load(path), size_of(shard)
        if index.checked or index.shard_version == version_of(shard):
            if size != index.shard_bytes:
                was = f"has {size} bytes, {index.shard_bytes} when indexed"
                index.problems.append(f"{was}; if it was written anew, delete {path.name}")
            if index.looked or not look:
                return index if path == own else _keep(index, own)
            samples = {key: index.members(row) for row, key in enumerate(index.keys)}
            absent = {key for key, fetched in zip(index.keys, index.fetched.tolist(), strict=True) if not fetched}
            return _keep(table(shard, samples, index.problems, True, absent), own)
        log.info("%s was changed after %s was built, which is built anew", shard, path.name)
    try:
        return _keep(build(shard, look=look), own)
    except BadDataError as error:
        return table(shard, {}, [str(error)], look=False)


def find_index(shard: ShardFile) -> ShardFile | None:
    """The index of a shard, where there is one: kept here, or beside it."""
    own = kept_at(shard)
    if own is not None and own.exists():
        return own
    return sidecar(shard) if exists(sidecar(shard)) else None


def kept_at(shard: ShardFile) -> Path | None:
    """Where the index that was built of a shard is kept: beside a local one, in the cache of a remote one, which may have none."""
    if isinstance(shard, Path):
        return sidecar(shard)
    if shard.store.cache is None:
        return None
    name = hashlib.sha256(f"{shard.address}\n{version_of(shard)}".encode()).hexdigest()[:32]  # a new version has no index yet
    return shard.store.cache.folder / f"{name}.index.safetensors"


def _is_kept(shard: ShardFile) -> bool:
    """Whether the index of a shard is here, or will be once it is built."""
    path = kept_at(shard)
    return path is not None and (path.exists() or not isinstance(shard, Path) or _can_write(path.parent))


@lru_cache(maxsize=1024)
def _can_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def _keep(index: ShardIndex, path: Path | None) -> ShardIndex:
    try:
        if not index.problems and path is not None:  # a damaged shard's index would pass for a whole one's
            path.parent.mkdir(parents=True, exist_ok=True)
            save(index, path)
    except OSError as error:
        log.info("%s is not written (%s); the shard is indexed anew each time", path, error)
    return index


class Clips:
    """All samples of many shards, numbered through in the order of the shards."""

    def __init__(self, shards: Sequence[ShardFile], look: bool = False, kept: int = 512) -> None:
        self.shards = list(shards)
        # what cannot be kept on this machine's disk is not asked for, or built, again
        bound = None if any(not _is_kept(shard) for shard in self.shards) else kept
        self._index = lru_cache(maxsize=bound)(lambda number: index_of(self.shards[number], look))
        self._learned: dict[int, ShardIndex] = {}
        self._unsaved = 0
        self.starts = np.concatenate([[0], np.cumsum(self._look_through())]).astype(np.int64)
        self._starts: list[int] = self.starts.tolist()  # which Python looks through faster, one at a time

    def _look_through(self) -> list[int]:
        """How many samples each shard has; shards without an index are indexed."""
        remote = not all(isinstance(shard, Path) for shard in self.shards)
        with ThreadPoolExecutor(REMOTE_AT_ONCE if remote else 1) as threads:
            new = sum(found is None for found in threads.map(find_index, self.shards))
            if new > 1:
                log.info("indexing %d shards", new)
            silent = not new or not sys.stderr.isatty()
            counts = threads.map(lambda number: len(self._index(number)), range(len(self.shards)))
            told = track(
                counts, f"indexing {new} shards", len(self.shards), console=Console(stderr=True), transient=True, disable=silent
            )
            return list(told)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def record(self, number: int) -> ClipRecord:
        """Where sample `number` lies."""
        shard = bisect_right(self._starts, number) - 1
        index, row = self._index(shard), number - self._starts[shard]
        version = "" if index.checked else index.shard_version
        return ClipRecord(self.shards[shard], index.keys[row], index.members(row), version)

    def learn(self, number: int, checksums: Mapping[str, int]) -> None:
        """Takes note of checksums that were taken when members of sample `number` were read for the first time."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        index, row = self._learned.get(shard) or self._index(shard), number - int(self.starts[shard])
        start, end = int(index.member_ends[row - 1]) if row else 0, int(index.member_ends[row])
        for place in range(start, end):
            extension = index.extensions[index.member_extension[place]]
            if extension in checksums and index.member_checksum[place] == NO_CHECKSUM:
                index.member_checksum[place] = checksums[extension]
                self._learned[shard] = index
                self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save_learned()

    def save_learned(self) -> None:
        """Adds what was learned to the indices that are kept; one that another process has made since, or of another shard, stays."""
        for number, index in self._learned.items():
            shard = self.shards[number]
            path = kept_at(shard)
            try:
                if path is None or not path.exists() or version_of(shard) != index.shard_version:  # a damaged shard has none
                    continue
                there = load(path)
                if there.keys != index.keys or not np.array_equal(there.member_offset, index.member_offset):
                    continue
                unknown = there.member_checksum == NO_CHECKSUM
                there.member_checksum = np.where(unknown, index.member_checksum, there.member_checksum)
                save(there, path)
            except (OSError, BadDataError) as error:
                log.info("%s is not written: %s", path, error)
        self._learned.clear()
        self._unsaved = 0

    def indices(self) -> Iterator[tuple[ShardFile, ShardIndex]]:
        """Every shard with its index, in order."""
        for number, shard in enumerate(self.shards):
            yield shard, self._index(number)

    def problems(self) -> list[str]:
        """What is wrong with shards, as far as their indices and headers tell, each with the shard's name."""
        told = [(str(path), problem) for path, index in self.indices() for problem in index.problems]
        return [problem if path in problem else f"{path}: {problem}" for path, problem in told]

    def columns(self) -> dict[str, np.ndarray]:
        """Frames, height, width, rate, and whether it was fetched, of all samples."""
        names = ("frames", "height", "width", "fps", "fetched")
        parts = [[getattr(index, name) for name in names] for _, index in self.indices()]
        return {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


def records_of(shards: Sequence[ShardFile]) -> list[ClipRecord]:
    """Every sample of a few shards, in order; BadDataError where there is none."""
    clips = Clips(shards)
    return [clips.record(number) for number in range(len(clips))]


def write_index(shard: Path) -> None:
    """Writes the index of a shard that was just written, with checksums and the shapes of its clips."""
    save(build(shard, checksums=True, look=True), sidecar(shard))
