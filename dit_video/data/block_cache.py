"""Blocks of remote shards on the local disk: one folder for many processes, bounded, checked, least recently used out first.

It is ours because fsspec's caches give none of this: they have no bound, check no bytes, and keep one table of blocks that the
processes overwrite for each other.
"""

import contextlib
import logging
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO

CHECKSUM_BYTES = 4

_BLOCK_FILE = re.compile(r"[0-9a-f]{32}-\d+\.block(\.partial)?")  # anything else in the folder is not ours to remove

log = logging.getLogger(__name__)


def _checksum(name: str, data: bytes | memoryview) -> bytes:
    """Over the name too, so that a block under the name of another is damaged."""
    return zlib.crc32(data, zlib.crc32(name.encode())).to_bytes(CHECKSUM_BYTES, "little")


class BlockCache:
    """Blocks by name (32 hexadecimal digits, "-", a number), each whole and undamaged or absent; the folder is a local disk's."""

    def __init__(self, folder: Path | str, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def get(self, name: str) -> memoryview | None:
        """The bytes kept under a name; None where there are none, or they are damaged."""
        path = self.folder / f"{name}.block"
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        with contextlib.suppress(OSError):  # another process may just have removed it, or own it
            os.utime(path)  # its time is when it was last of use
        data = content[CHECKSUM_BYTES:]
        return data if content[:CHECKSUM_BYTES] == _checksum(name, data) else None

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keeps bytes under a name, one process at a time; a disk that is full or read-only costs the cache, not the training."""
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "used_bytes", "a+b") as book:
                fcntl.flock(book, fcntl.LOCK_EX)
                try:
                    self._put(name, data, book)
                finally:
                    fcntl.flock(book, fcntl.LOCK_UN)  # closing is not enough where a forked process holds the file too
        except OSError as error:
            log.warning(
                f"{self.folder}: a block of a shard could not be kept ({error}); free some space, or set another cache_dir"
            )

    def _put(self, name: str, data: bytes | memoryview, book: BinaryIO) -> None:
        path, size = self.folder / f"{name}.block", len(data) + CHECKSUM_BYTES
        book.seek(0)
        text = book.read()
        used = int(text) if text.isdigit() else self.max_bytes
        if used + size > self.max_bytes:
            used = self._make_room(size)
        if path.exists():
            used -= path.stat().st_size
        book.truncate(0)
        book.write(str(used + size).encode())
        book.flush()  # before the block: who dies in between leaves a count that is too high, and counted anew before long
        partial = path.with_name(f"{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(_checksum(name, data))
                file.write(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> int:
        """Removes old blocks until `size` more bytes fit and a tenth stays free, so that it is rare; the bytes that are left."""
        blocks = []
        for path in self.folder.iterdir():
            if _BLOCK_FILE.fullmatch(path.name) is None:
                continue
            if path.suffix == ".partial":
                path.unlink()  # its writer died; who lives waits for the lock
            else:
                stat = path.stat()
                blocks.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(block_size for _, block_size, _ in blocks)
        for _, block_size, path in sorted(blocks):
            if used + size <= 0.9 * self.max_bytes:
                break
            path.unlink()
            used -= block_size
        return used
