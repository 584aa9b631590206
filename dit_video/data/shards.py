"""WebDataset tar shards on disk: found, indexed by their headers, read by offset, and written.

A shard is a plain tar; files that share a name up to the first dot of the last path part are one sample. Data is never executed:
no `pipe:` addresses, no compression, no pickles, only bytes at an offset.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from dit_video.data.errors import BadDataError

MAX_JSON_BYTES = 2**20

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """Where the members of one sample lie."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]  # lower-case extension -> (offset, size) in bytes

    @property
    def name(self) -> str:
        return f"{self.shard.name}:{self.key}"


def expand_shards(urls: str | Sequence[str]) -> list[Path]:
    """The tar files that paths with braces and wildcards stand for, each once, in the order given (a wildcard's matches sorted).

    BadDataError for an address with a scheme, a file that is missing, and a pattern that matches nothing.
    """
    paths: dict[Path, None] = {}
    for url in [urls] if isinstance(urls, str | Path) else list(urls):
        if _SCHEME.match(str(url)):
            raise BadDataError(f"{url}: only local tar files are read, no pipes and no remote addresses; change data.shards")
        try:
            patterns = list(braceexpand(str(url)))
        except ValueError as error:
            raise BadDataError(f"{url}: its braces cannot be expanded ({error}); change data.shards") from error
        for pattern in patterns:
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise BadDataError(f"{pattern}: there is no such shard; change data.shards")
            paths.update(dict.fromkeys(map(Path, matches)))
    for path in paths:
        if path.is_dir():
            raise BadDataError(f"{path}: is a folder, not a tar; change data.shards, for example to {path}/*.tar")
    if not paths:
        raise BadDataError("no shards were named; set data.shards")
    return list(paths)


def _read_headers(path: Path) -> list[tarfile.TarInfo]:
    """All headers of a plain tar that is whole up to its end mark."""
    with open(path, "rb") as file:
        magic = file.read(8)
    for prefix, kind in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise BadDataError(f"{path}: is a {kind} file, not a plain tar; decompress it first or change data.shards")
    if not magic:
        raise BadDataError(f"{path}: is empty (0 bytes); change data.shards")
    try:
        with tarfile.open(path, "r:") as tar:
            headers = tar.getmembers()
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise BadDataError(f"{path}: is not a tar that can be read ({error}); change data.shards") from error
    # tarfile takes a broken header, or a file cut between two members, for the end; a real end is a block of zeros
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise BadDataError(
                f"{path}: is cut off or damaged after {len(headers)} members, at byte {end}; write it again or change data.shards"
            )
    return headers


def _split_name(path: Path, header: tarfile.TarInfo) -> tuple[str, str] | None:
    """The key and extension of a member, None for what is no sample member (a folder, a hidden file, a name without a dot)."""
    name = header.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/") or any(ord(letter) < 32 for letter in name):
        raise BadDataError(f"{path}: refuses the member name {name!r}: absolute, with '..', or with control characters")
    if header.isdir():
        return None
    if not header.isreg() or header.sparse is not None:
        raise BadDataError(f"{path}: the member {name!r} is not a plain file (a link, a device or sparse); write it again")
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def index_shards(paths: Iterable[Path]) -> list[ClipRecord]:
    """The samples of tar shards in their order, from headers alone; members of a key need not be neighbours.

    BadDataError, naming the file, for one that is empty, compressed, not a tar, cut off (also between two members), without
    samples, with a member twice, or with members that are links, devices or outside of it.
    """
    records: list[ClipRecord] = []
    for path in paths:
        samples: dict[str, ClipRecord] = {}
        for header in _read_headers(path):
            split = _split_name(path, header)
            if split is None:
                continue
            key, extension = split
            record = samples.setdefault(key, ClipRecord(path, key, {}))
            if extension in record.members:
                raise BadDataError(f"{path}: holds {key}.{extension} twice; write it again with one key per sample")
            record.members[extension] = (header.offset_data, header.size)
        if not samples:
            raise BadDataError(f"{path}: is a tar without samples; change data.shards")
        records += samples.values()
    return records


def read_member(record: ClipRecord, extension: str) -> bytes:
    """The bytes of one member; BadDataError where the shard no longer holds it (KeyError where it never did)."""
    offset, size = record.members[extension]
    try:
        with open(record.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise BadDataError(f"{record.shard}: cannot be read any more ({error}); it was indexed at the start") from error
    if len(data) != size:
        raise BadDataError(f"{record.shard}: ends inside {record.key}.{extension}; it was changed after it was indexed")
    return data


def read_attributes(record: ClipRecord, extension: str = "json") -> dict[str, Any]:
    """The JSON object that describes a sample, {} where there is no such member; ValueError where it is not one, or too large."""
    if extension not in record.members:
        return {}
    if record.members[extension][1] > MAX_JSON_BYTES:
        raise ValueError(f"{record.name}: its {extension} of {record.members[extension][1]} bytes exceeds {MAX_JSON_BYTES}")
    try:
        attributes = json.loads(read_member(record, extension))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{record.name}: its {extension} is not JSON: {error}") from error
    if not isinstance(attributes, dict):
        raise ValueError(f"{record.name}: its {extension} is not a JSON object")
    return attributes


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
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count
