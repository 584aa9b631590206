"""A shard as a file, wherever it lies: a path of this machine, or an address that a store reads by ranges."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from dit_video.data.errors import BadDataError
from dit_video.data.remote import scheme_of, shown
from dit_video.data.sources import Store, expand

HEADER_BUFFER = 2**16  # bytes that are asked for at once where headers are looked through


@dataclass(frozen=True)
class RemoteFile:
    """A file at an http, s3 or gs address; two are equal where their addresses are."""

    address: str
    store: Store = field(compare=False)

    def __str__(self) -> str:
        return shown(self.address)

    @property
    def name(self) -> str:
        return self.address.partition("?")[0].rpartition("/")[2]

    def with_name(self, name: str) -> "RemoteFile":
        """The file of another name beside this one."""
        path, mark, query = self.address.partition("?")
        return RemoteFile(f"{path.rpartition('/')[0]}/{name}{mark}{query}", self.store)


ShardFile = Path | RemoteFile


class _Ranges(io.RawIOBase):
    """A remote file, read by ranges."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence)
        self.place = offset + (size_of(self.file) if start is None else start)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        length = max(min(len(buffer), size_of(self.file) - self.place), 0)
        buffer[:length] = self.file.store.read(self.file.address, self.place, length) if length else b""
        self.place += length
        return length


def open_file(file: ShardFile, buffer: int = HEADER_BUFFER) -> BinaryIO:
    """The file, open for reading; OSError where a local one cannot be opened, BadDataError where a remote one cannot be read."""
    if isinstance(file, Path):
        return open(file, "rb")
    return io.BufferedReader(_Ranges(file), buffer)  # type: ignore[return-value]


def read_ranges(file: ShardFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, length), fewer where the file ends before; errors as open_file's."""
    if isinstance(file, Path):
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # a file object costs more than reading a clip does
        try:
            return [_read_at(handle, offset, length) for offset, length in ranges]
        finally:
            os.close(handle)
    size = size_of(file)
    inside = [(min(offset, size), max(min(length, size - offset), 0)) for offset, length in ranges]
    return file.store.read_many(file.address, inside)


def _read_at(handle: int, offset: int, length: int) -> bytes:
    """So many bytes, or those until the end; a system may give fewer at a time."""
    os.lseek(handle, offset, os.SEEK_SET)
    data = os.read(handle, length)
    while data and len(data) < length and (more := os.read(handle, length - len(data))):
        data += more
    return data


def size_of(file: ShardFile) -> int:
    """Bytes in the file; errors as open_file's."""
    return file.stat().st_size if isinstance(file, Path) else file.store.size(file.address)


def version_of(file: ShardFile) -> str:
    """What changes when the file does; errors as open_file's."""
    if isinstance(file, Path):
        stat = file.stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"
    return file.store.version(file.address)


def exists(file: ShardFile) -> bool:
    """Whether there is such a file to be read."""
    if isinstance(file, Path):
        return file.exists()
    try:
        file.store.size(file.address)
    except BadDataError:
        return False
    return True


def expand_shards(urls: str | Sequence[str], store: Store | None = None) -> list[ShardFile]:
    """The tar files that addresses with braces and wildcards stand for, each once, in the order given; errors as `sources.expand`.

    A local file is one, however many names and links lead to it; the first of them is kept.
    """
    store = store or Store()
    found: dict[str, ShardFile] = {}
    for address in expand(urls, store):
        remote = bool(scheme_of(address))
        found.setdefault(
            address if remote else os.path.realpath(address), RemoteFile(address, store) if remote else Path(address)
        )
    return list(found.values())
