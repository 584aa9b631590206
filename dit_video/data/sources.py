"""Where the bytes of remote shards come from: http(s), s3 and gs, read by range through one small interface; and what addresses stand for.

Every range is held to the version of the shard that was seen first, so that one replaced while it is read is an error, never a
mix. What fails for a moment is tried again here and nowhere else. Remote shards may be kept in blocks on the local disk (see
block_cache for why not by fsspec, and remote for which library reads what); two processes that miss a block both fetch it.
"""

import glob
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from braceexpand import braceexpand

from dit_video.data.block_cache import BlockCache
from dit_video.data.errors import BadDataError
from dit_video.data.remote import Seen, TemporaryError, list_matches, read_range, scheme_of, shown

GAP_BYTES = 2**18
"""Ranges of one shard with at most so many bytes between them are one request: reading past them costs less than asking again."""
REQUEST_BYTES = 2**24
"""A longer range is several requests, so that a try that fails does not throw more away."""
SLOWEST_BYTES = 2**20
"""A request that gets less than this in timeout_seconds, however steadily, is too slow."""
MAX_WAIT_SECONDS = 60.0
"""Who asks with Retry-After for a longer wait than this is not waited for."""

T = TypeVar("T")
Piece = tuple[int, bytes | memoryview]
"""Bytes of a shard, and where they begin."""

log = logging.getLogger(__name__)


def _local_matches(pattern: str) -> list[str]:
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    for path in map(Path, matches):
        if path.is_dir():
            raise BadDataError(f"{path}: is a folder, not a tar; change data.shards, for example to {path}/*.tar")
        if not path.is_file():
            raise BadDataError(f"{path}: is not a plain file; change data.shards")
    return [str(Path(match)) for match in matches]


def _matches(pattern: str, store: "Store | None") -> list[str]:
    """What an address without braces stands for."""
    if re.match("file:///", pattern, re.IGNORECASE):
        pattern = unquote(pattern[len("file://") :])
    scheme = scheme_of(pattern)
    if not scheme:
        return _local_matches(pattern)
    if scheme == "http":
        if "*" in pattern:
            raise BadDataError(
                f"{shown(pattern)}: http has no wildcards; change data.shards, for example to braces such as {{000..123}}.tar"
            )
        return [pattern]
    return (store or Store()).glob(pattern) if any(letter in pattern for letter in "*?[") else [pattern]


def expand(urls: str | Sequence[str], store: "Store | None" = None) -> list[str]:
    """The shards that addresses with braces and wildcards stand for, each once, in the order given (a wildcard's matches sorted).

    Local paths stay plain paths, and file:// addresses become such. BadDataError for a scheme that is not read, a folder, a local
    file that is missing, a pattern that matches nothing, and a wildcard over http. Remote addresses without wildcards are not
    looked up, as each would be a request; a store names one that is missing when first asked for it.
    """
    found: dict[str, None] = {}
    for url in [urls] if isinstance(urls, str | Path) else list(urls):
        try:
            patterns = list(braceexpand(str(url)))
        except ValueError as error:
            raise BadDataError(f"{shown(url)}: its braces cannot be expanded ({error}); change data.shards") from error
        for pattern in patterns:
            matches = _matches(pattern, store)
            if not matches:
                raise BadDataError(f"{shown(pattern)}: there is no such shard; change data.shards")
            found.update(dict.fromkeys(matches))
    if not found:
        raise BadDataError("no shards were named; set data.shards")
    return list(found)


def _spans(ranges: Iterable[tuple[int, int]], gap: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of requests that cover ranges (offset, length): joined over gaps, then cut into `most` bytes."""
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and offset <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], offset + length)
        else:
            joined.append((offset, offset + length))
    for start, stop in joined:
        for begin in range(start, stop, most):
            yield begin, min(begin + most, stop)


def _cut(pieces: Sequence[Piece], offset: int, length: int) -> bytes:
    """The range from pieces that cover it, in order."""
    stop = offset + length
    return b"".join(
        data[max(offset - start, 0) : stop - start] for start, data in pieces if start < stop and offset < start + len(data)
    )


def _changed(address: str) -> BadDataError:
    return BadDataError(f"{shown(address)}: was replaced since it was first looked at; start again, or change data.shards")


class Store:
    """Reads ranges of remote shards; cheap to pickle, and of use in every process, forked or not.

    What fails for a moment (a connection, a timeout, HTTP 408, 429 and 5xx, too few bytes) is tried `retries` more times, after
    waits that double from backoff_seconds on, are up to half as long again (drawn from `seed`, so give each rank its own), and
    as long as a Retry-After asks for. With cache_dir, remote shards are read in blocks of block_bytes, of which cache_bytes
    are kept there. A pickled store remembers what it has seen, so that worker processes are held to the same versions.
    """

    def __init__(
        self, cache_dir: Path | str | None = None, cache_bytes: int = 2**34, retries: int = 4, backoff_seconds: float = 0.5,
        timeout_seconds: float = 30, *, block_bytes: int = 2**22, seed: int = 0,
    ) -> None:  # fmt: skip
        if retries < 0 or backoff_seconds < 0 or timeout_seconds <= 0 or block_bytes < 1:
            raise ValueError("retries and backoff_seconds must be at least 0, timeout_seconds and block_bytes above it")
        if cache_dir is not None and cache_bytes < 2 * block_bytes:
            raise ValueError(f"cache_bytes of {cache_bytes} hold no two blocks; set them to at least {2 * block_bytes}")
        self.retries, self.backoff_seconds, self.timeout_seconds = retries, backoff_seconds, timeout_seconds
        self.block_bytes, self.seed = block_bytes, seed
        self.cache = None if cache_dir is None else BlockCache(cache_dir, cache_bytes)
        self.seen: dict[str, Seen] = {}

    def size(self, address: str) -> int:
        """The bytes of a shard, as first seen."""
        return self._look(address).size

    def version(self, address: str) -> str:
        """What this store holds every read of a shard to, and another store finds changed once the shard was replaced."""
        return self._look(address).version

    def read(self, address: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on; BadDataError where they cannot be had, or the shard was replaced."""
        return self.read_many(address, [(offset, length)])[0]

    def read_many(self, address: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length), in the order given; ranges that lie close together are one request."""
        seen = self._look(address)
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > seen.size:
                raise BadDataError(
                    f"{shown(address)}: bytes {offset} to {offset + length} lie outside of its {seen.size}; it was changed after it "
                    f"was indexed: index it again, or change data.shards"
                )
        wanted = [(offset, length) for offset, length in ranges if length]
        pieces: list[Piece]
        if self.cache is None:
            spans = _spans(wanted, GAP_BYTES, REQUEST_BYTES)
            pieces = [(start, self._fetch(address, start, stop, seen)[1]) for start, stop in spans]
        else:
            pieces = self._read_blocks(self.cache, address, wanted, seen)
        return [_cut(pieces, offset, length) for offset, length in ranges]

    def glob(self, pattern: str) -> list[str]:
        """The objects of a bucket that a pattern matches, sorted; BadDataError where a folder is among them."""
        found = self._try(f"{shown(pattern)}: its matches", lambda: list_matches(pattern, self.timeout_seconds))
        for address, is_object in found.items():
            if not is_object:
                raise BadDataError(f"{address}: is a folder, not a tar; change data.shards, for example to {address}/*.tar")
        return list(found)

    def _look(self, address: str) -> Seen:
        seen = self.seen.get(address)
        if seen is None:
            if not scheme_of(address):
                raise BadDataError(
                    f"{address}: is no address of http, s3 or gs, and local shards are opened as files; change data.shards"
                )
            # one byte, not HEAD: signed addresses allow GET alone, and a server that ignores Range is found out at once
            seen = self._fetch(address, 0, 1)[0]
            self.seen[address] = seen
        return seen

    def _read_blocks(self, cache: BlockCache, address: str, ranges: Sequence[tuple[int, int]], seen: Seen) -> list[Piece]:
        """The blocks that cover ranges, from the cache or fetched into it; neighbours that are missing are one request."""
        block = self.block_bytes
        name = hashlib.sha256(f"{address}\n{seen.version}\n{block}".encode()).hexdigest()[:32]
        pieces: list[Piece] = []
        missing: list[tuple[int, int]] = []
        for number in sorted({number for at, length in ranges for number in range(at // block, (at + length - 1) // block + 1)}):
            start, length = number * block, min(block, seen.size - number * block)
            data = cache.get(f"{name}-{number}")
            if data is None or len(data) != length:
                missing.append((start, length))
            else:
                pieces.append((start, data))
        for begin, stop in _spans(missing, 0, max(1, REQUEST_BYTES // block) * block):
            fetched = memoryview(self._fetch(address, begin, stop, seen)[1])
            for start in range(begin, stop, block):
                piece = fetched[start - begin : start - begin + block]
                cache.put(f"{name}-{start // block}", piece)
                pieces.append((start, piece))
        return sorted(pieces, key=lambda piece: piece[0])

    def _fetch(self, address: str, start: int, stop: int, expected: Seen | None = None) -> tuple[Seen, bytes]:
        """One request for bytes: exactly those, and of the version that is expected."""
        limit_seconds = self.timeout_seconds * (1 + (stop - start) / SLOWEST_BYTES)

        def fetch() -> tuple[Seen, bytes]:
            seen, data = read_range(address, start, stop, self.timeout_seconds, limit_seconds)
            if expected is not None and seen != expected:
                raise _changed(address)
            if len(data) != stop - start:
                raise TemporaryError(f"{len(data)} of {stop - start} bytes")
            return seen, data

        return self._try(f"{shown(address)}: bytes {start} to {stop}", fetch)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """What the call returns, in the end; BadDataError when the tries are used up."""
        for attempt in range(self.retries + 1):
            try:
                return call()
            except TemporaryError as error:
                last = error
            longer = random.Random(f"{self.seed} {what} {attempt}").uniform(1, 1.5)  # those that fail together come back apart
            wait_seconds = max(last.wait_seconds, self.backoff_seconds * 2**attempt * longer)
            if attempt == self.retries or wait_seconds > MAX_WAIT_SECONDS:
                break
            log.info(f"{what}: {last}; try {attempt + 2} of {self.retries + 1} in {wait_seconds:.3g} s")
            time.sleep(wait_seconds)
        asked = f", asked to wait {last.wait_seconds:.0f} s" if last.wait_seconds else ""
        raise BadDataError(
            f"{what} cannot be read (tries: {attempt + 1}, the last: {last}{asked}); check the network and the server, or change "
            f"data.shards"
        ) from last
