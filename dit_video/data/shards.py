"""WebDataset tar shards on disk: found, looked through by their headers, read by offset, and written.

A shard is a plain tar; files that share a name up to the first dot of the last path part are one sample. Data is never executed:
no `pipe:` addresses, no compression, no pickles, only bytes at an offset.
"""

import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from dit_video.data.errors import BadDataError
from dit_video.data.files import RemoteFile, ShardFile, open_file, read_ranges, size_of, version_of

MAX_JSON_BYTES = 2**20
AFTER_END = 2**16  # bytes that are looked at after a tar's end mark; tar itself fills up to 10 KiB with zeros

log = logging.getLogger(__name__)

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


class BadClipError(ValueError):
    """One clip that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one file of a sample lie, and what they should add up to."""

    offset: int
    size: int
    checksum: int | None = None  # CRC-32; None where it was never taken


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """Where the members of one sample lie."""

    shard: ShardFile
    key: str
    members: dict[str, Member]  # by lower-case extension
    version: str = ""  # of the shard when it was indexed; for members without a checksum it is all that tells of a change

    @property
    def name(self) -> str:
        return f"{self.shard.name}:{self.key}"


def scan(path: ShardFile) -> tuple[list[tarfile.TarInfo], str | None]:
    """The headers of a plain tar as far as they can be read, and what is wrong with it; None where it is whole up to its end mark.

    BadDataError where it is missing, empty, compressed, or no tar at all.
    """
    try:
        with open_file(path) as file:
            magic = file.read(8)
    except OSError as error:
        raise BadDataError(f"{path}: cannot be read ({error.strerror}); change data.shards") from error
    for prefix, kind in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise BadDataError(f"{path}: is a {kind} file, not a plain tar; decompress it first or change data.shards")
    if not magic:
        raise BadDataError(f"{path}: is empty (0 bytes); change data.shards")
    headers: list[tarfile.TarInfo] = []
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (header := tar.next()) is not None:
                headers.append(header)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        if not headers:
            raise BadDataError(f"{path}: is not a tar that can be read ({error}); change data.shards") from error
        return _whole(path, headers), f"cannot be read after {len(headers)} members ({error})"
    # tarfile takes a broken header, or a file cut between two members, for the end; a real end is a block of zeros
    with open_file(path) as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            return _whole(path, headers), f"is cut off or damaged after {len(headers)} members, at byte {end}"
        if file.read(AFTER_END).strip(b"\0"):
            return headers, f"goes on after its end mark at byte {end}, as when tars are joined by cat; only the first is read"
    return headers, None


def _whole(path: ShardFile, headers: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """Those whose bytes are all there."""
    size = size_of(path)
    return [header for header in headers if header.offset_data + header.size <= size]


def split_name(header: tarfile.TarInfo) -> tuple[str, str] | None:
    """The key and extension of a member, None for what is no sample member (a folder, a hidden file, a name without a dot).

    ValueError for names that lead elsewhere, and for members that are no plain files.
    """
    name = header.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/") or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise ValueError(f"refuses the member name {name!r}: absolute, with '..', or with control characters")
    if not name.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise ValueError(f"refuses the member name {name!r}: it is not UTF-8")
    if header.isdir():
        return None
    if not header.isreg() or header.sparse is not None:
        raise ValueError(f"the member {name!r} is not a plain file (a link, a device or sparse)")
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def members_of(shard: ShardFile) -> tuple[list[tuple[str, str, Member]], list[str]]:
    """Key, extension and place of every member of a shard, as its headers say, and what is wrong with others; errors as `scan`."""
    headers, problem = scan(shard)
    found, problems = [], [problem] if problem else []
    for header in headers:
        try:
            name = split_name(header)
        except ValueError as error:
            problems.append(str(error))
            continue
        if name is not None:
            found.append((*name, Member(header.offset_data, header.size)))
    return found, problems


def read_member(record: ClipRecord, extension: str) -> bytes:
    """The bytes of one member; errors as `read_members`."""
    return read_members(record, [extension])[extension]


def read_members(record: ClipRecord, extensions: Sequence[str]) -> dict[str, bytes]:
    """The bytes of members of a sample (KeyError where it never had one), as their checksums say they were when the shard was indexed.

    The shard is opened once, and what lies close together in a remote one is asked for at once. A shard that was changed since is looked
    through for the same members; BadClipError where their bytes are no longer there. BadDataError where the shard itself is gone.
    """
    members = {extension: record.members[extension] for extension in extensions}
    found = {}
    for (extension, member), data in zip(members.items(), _read(record.shard, list(members.values())), strict=True):
        found[extension] = data if data is not None else _find(record, extension, member)
    if (
        record.version
        and any(member.checksum is None for member in members.values())
        and version_of(record.shard) != record.version
    ):
        raise BadClipError(f"the shard was replaced after it was indexed, and has no checksums that tell what {record.key} was")
    return found


def _find(record: ClipRecord, extension: str, member: Member) -> bytes:
    """A member's bytes, which are not where they were."""
    if member.checksum is not None:
        for other in _elsewhere(record.shard, version_of(record.shard)).get((record.key, extension), []):
            (data,) = _read(record.shard, [Member(other.offset, other.size, member.checksum)])
            if data is not None:
                _say_moved(record.shard)
                return data
    ended = size_of(record.shard) < member.offset + member.size
    what = "ends before it" if ended else "no longer holds it as it was indexed"
    raise BadClipError(f"the shard {what}: {record.key}.{extension} at byte {member.offset}")


def _read(shard: ShardFile, members: Sequence[Member]) -> list[bytes | None]:
    """The bytes of members; None for those that are not all there, or not what they were."""
    try:
        read = read_ranges(shard, [(member.offset, member.size) for member in members])
    except OSError as error:
        raise BadDataError(f"{shard}: cannot be read any more ({error}); it was indexed at the start") from error
    right = [
        len(data) == member.size and member.checksum in (None, zlib.crc32(data))
        for member, data in zip(members, read, strict=True)
    ]
    return [data if whole else None for data, whole in zip(read, right, strict=True)]


@lru_cache(maxsize=1024)
def _say_moved(shard: ShardFile) -> None:
    """Once a shard and process."""
    log.warning("%s was changed after it was indexed: members lie elsewhere in it now, and are taken from there", shard)


@lru_cache(maxsize=16)
def _elsewhere(shard: ShardFile, version: str) -> dict[tuple[str, str], list[Member]]:
    """Where a shard's members lie now, by key and extension; a new version is looked at anew."""
    found: dict[tuple[str, str], list[Member]] = {}
    try:
        members, _ = members_of(shard)
    except BadDataError:
        return found
    for key, extension, member in members:
        found.setdefault((key, extension), []).append(member)
    return found


@overload
def sidecar(shard: Path) -> Path: ...
@overload
def sidecar(shard: RemoteFile) -> RemoteFile: ...
def sidecar(shard: ShardFile) -> ShardFile:
    """The place of a shard's index, see index.py."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.safetensors")


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value).encode()


def write_shard(path: Path | str, samples: Iterable[dict[str, Any]]) -> int:
    """Writes samples (`__key__`, and extension -> bytes, text, or anything JSON can hold) as a tar; returns how many.

    The same samples give the same bytes, and the shard appears complete or not at all.
    """
    from webdataset import TarWriter  # type: ignore[import-untyped]

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with open(partial, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
                for sample in samples:
                    key = sample["__key__"]
                    members = {name: _to_bytes(value) for name, value in sample.items() if name != "__key__"}
                    writer.write({"__key__": key, **members})
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        sidecar(path).unlink(missing_ok=True)  # that of the shard that was here before
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count
