"""One range of one remote object: asked for once, and what the answer means: bytes of a known version, another try, or the end.

http(s) goes over requests: plain sockets, opened anew in each process, with status, range and tag of every reply in sight, where
fsspec's file system for http notices neither a server that ignores Range at the start of a file nor a changed tag. Buckets go
through fsspec, which makes its event loop and s3fs or gcsfs anew in a forked process; both use the credentials that they find.
"""

import email.utils
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from dit_video.data.errors import BadDataError

if TYPE_CHECKING:
    import requests

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_SCHEMES = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "gcs": "gs"}
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}  # what reads it, and the extra that installs that
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

_mine = threading.local()
_systems: dict[tuple[int, str, float], Any] = {}
"""Those of the parent of a forked process stay here, unused: to be rid of them it would talk over the parent's own connections,
take them out of the list (epoll) that both wait on, and wait a second for a thread that it does not have."""


class TemporaryError(Exception):
    """What another try may mend, and the seconds that the server asks to wait for it."""

    def __init__(self, cause: str, wait_seconds: float = 0) -> None:
        super().__init__(cause)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, slots=True)
class Seen:
    """What an object was like when it was looked at."""

    size: int
    version: str


def shown(text: object) -> str:
    """An address, or a message with one, without the passwords and signatures that may be in it, and not too long."""
    return re.sub(r"\?[^\s'\")]*=[^\s'\")]*", "?...", re.sub(r"//[^/@\s]*@", "//...@", str(text)))[:300]


def scheme_of(address: str) -> str:
    """One of http, s3 and gs, or nothing for a local path; BadDataError for every other scheme, before anything is opened."""
    match = _SCHEME.match(address)
    if match is None:
        return ""
    name, rest = match[1], address[match.end() :]
    scheme = _SCHEMES.get(name.lower())
    host, _, path = rest.partition("/")
    if scheme is None:
        raise BadDataError(
            f"{shown(address)}: {name}: is not read; change data.shards to local paths, http(s)://, s3:// or gs:// addresses"
        )
    if "::" in (path if scheme == "http" else rest):  # a host may be the number of one: http://[::1]/a.tar
        raise BadDataError(f"{shown(address)}: chains of addresses (::) are not read; change data.shards")
    if match[2] is None or not host or not path.strip("/"):
        raise BadDataError(f"{shown(address)}: names no shard, as {name}://host/folder/a.tar does; change data.shards")
    return scheme


def _wait_seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, in seconds or as a date."""
    try:
        if retry_after is None or retry_after.strip().isdecimal():
            return float(retry_after or 0)
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _judge_reply(address: str, status: int, headers: Mapping[str, str], start: int, stop: int, cause: str = "") -> Seen:
    """What the reply to a request for a range tells of the object; an error, for a while or for good, for any other reply."""
    name, answer = shown(address), shown(f"HTTP {status} {cause}".strip())
    if status in (408, 429) or status >= 500:
        raise TemporaryError(answer, _wait_seconds(headers.get("retry-after")))
    if status in (401, 403):
        raise BadDataError(f"{name}: access is refused ({answer}); check the credentials, or change data.shards")
    if status in (404, 410):
        raise BadDataError(f"{name}: there is no such shard ({answer}); change data.shards")
    if status == 416:
        raise BadDataError(f"{name}: is empty, or was replaced by a shard without byte {start} ({answer}); change data.shards")
    if status == 200:  # its body, which may be gigabytes, is not read
        raise BadDataError(
            f"{name}: its server ignores Range and sends whole files; serve it with ranges, or copy it and change data.shards"
        )
    if status != 206:
        raise BadDataError(f"{name}: cannot be read ({answer}); change data.shards")
    encoding, content_range = headers.get("content-encoding", "identity"), headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or int(match[1]) != start or int(match[2]) >= stop or encoding not in ("identity", ""):
        raise BadDataError(
            f"{name}: its server answers {content_range or 'no range'} in {encoding} encoding where bytes {start} to {stop} were "
            f"asked for as they are; serve it with ranges, or copy it and change data.shards"
        )
    tag = headers.get("etag") or headers.get("last-modified")
    if not tag:
        raise BadDataError(
            f"{name}: its server sends neither ETag nor Last-Modified, so that it could be replaced unnoticed; change data.shards"
        )
    return Seen(int(match[3]), f"{tag} {match[3]}")


def _judge_error(address: str, error: Exception, start: int = 0, stop: int = 0) -> NoReturn:
    """Raises what an error of s3fs or gcsfs means."""
    cause = shown(f"{type(error).__name__}: {error}".removesuffix(": "))
    if scheme_of(address) == "s3":
        from s3fs.core import S3_RETRYABLE_ERRORS as temporary  # type: ignore[import-untyped, import-not-found]
    else:
        from gcsfs.retry import RETRIABLE_EXCEPTIONS as temporary  # type: ignore[import-untyped, import-not-found]
    if isinstance(error, (*temporary, ConnectionError, TimeoutError)):
        raise TemporaryError(cause) from error
    # gcsfs's HttpError has a code; s3fs translates errors, and keeps the one of botocore with the reply as their cause
    reply = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    meta = reply.get("ResponseMetadata", {}) if isinstance(reply, dict) else {}
    status = meta.get("HTTPStatusCode", getattr(error, "code", None))
    if isinstance(status, int) and status >= 300:
        _judge_reply(address, status, meta.get("HTTPHeaders", {}), start, stop, cause)
    if isinstance(error, FileNotFoundError):
        raise BadDataError(f"{shown(address)}: there is no such shard; change data.shards") from error
    raise BadDataError(
        f"{shown(address)}: cannot be read ({cause}); check the credentials in the environment (FSSPEC_S3_ANON=true reads public "
        f"buckets without any), or change data.shards"
    ) from error


def _session() -> "requests.Session":
    """The connections of this thread of this process; those of a parent process are left alone."""
    import requests

    if getattr(_mine, "pid", None) != os.getpid():
        _mine.pid, _mine.session = os.getpid(), requests.Session()
    return _mine.session


def _bucket_system(address: str, timeout_seconds: float) -> Any:
    """The file system of fsspec for a bucket, one in each process."""
    import fsspec  # type: ignore[import-untyped]

    scheme = scheme_of(address)
    known = _systems.get((os.getpid(), scheme, timeout_seconds))
    if known is not None:
        return known
    options: dict[str, Any] = {"use_listings_cache": False}  # a listing kept would hide that an object was replaced
    if scheme == "s3":
        options["config_kwargs"] = {
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
            "connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": {"total_max_attempts": 1},
        }  # fmt: skip
    else:
        # gcsfs would ask over gRPC, whose threads do not survive a fork, what sort of bucket it is; only zonal ones need that
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package, extra = _PACKAGES[scheme]
        raise BadDataError(
            f"{address}: reading {scheme}:// needs {package} ({error}): pip install 'dit-video[{extra}]', or change data.shards"
        ) from error
    system.retries = 1  # of s3fs: the tries are counted in one place
    return _systems.setdefault((os.getpid(), scheme, timeout_seconds), system)


def _read_http(address: str, start: int, stop: int, timeout_seconds: float, limit_seconds: float) -> tuple[Seen, bytes]:
    import requests
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + limit_seconds
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    try:
        with _session().get(address, headers=headers, stream=True, timeout=timeout_seconds) as reply:
            seen = _judge_reply(address, reply.status_code, reply.headers, start, stop, reply.reason)
            while len(data) < stop - start and (chunk := reply.raw.read1(2**18, decode_content=False)):
                data += chunk
                if time.monotonic() > deadline:  # the timeout of a socket begins again with every byte
                    raise TemporaryError(f"{len(data)} of {stop - start} bytes arrived in {limit_seconds:.3g} s")
    except (HTTPError, requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError) as error:
        raise TemporaryError(shown(f"{type(error).__name__}: {error}")) from error
    except requests.RequestException as error:
        raise BadDataError(f"{shown(address)}: cannot be read ({shown(error)}); change data.shards") from error
    return seen, bytes(data)


def _read_s3(address: str, start: int, stop: int, timeout_seconds: float, limit_seconds: float) -> tuple[Seen, bytes]:
    from fsspec.asyn import sync  # type: ignore[import-untyped]

    bucket, _, key = address.partition("://")[2].partition("/")
    system = _bucket_system(address, timeout_seconds)

    async def read_body(reply: dict[str, Any]) -> tuple[Seen, bytes]:
        try:
            meta = reply["ResponseMetadata"]
            return _judge_reply(address, meta["HTTPStatusCode"], meta["HTTPHeaders"], start, stop), await reply["Body"].read()
        finally:
            reply["Body"].close()

    try:
        reply = system.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        return sync(system.loop, read_body, reply, timeout=limit_seconds)
    except (BadDataError, TemporaryError):
        raise
    except Exception as error:
        _judge_error(address, error, start, stop)


def _read_gs(address: str, start: int, stop: int, timeout_seconds: float, limit_seconds: float) -> tuple[Seen, bytes]:
    path = address.partition("://")[2]
    system = _bucket_system(address, timeout_seconds)
    try:
        data = system.cat_file(path, start=start, end=stop, timeout=limit_seconds)
        info = system.info(path)  # after the bytes: where it tells what was known before them, they are of that version
    except Exception as error:
        _judge_error(address, error, start, stop)
    return Seen(info["size"], f"{info.get('generation') or info['etag']} {info['size']}"), data


_READERS = {"http": _read_http, "s3": _read_s3, "gs": _read_gs}


def read_range(address: str, start: int, stop: int, timeout_seconds: float, limit_seconds: float) -> tuple[Seen, bytes]:
    """The object as it is now, and its bytes from start to stop (fewer where the connection ended early).

    TemporaryError where another try may help: also for no byte in timeout_seconds, and for fewer than all in limit_seconds.
    BadDataError where none does: no access, no such object, or a server that sends another range, the whole file (which is not
    read), a compressed one, or nothing by which a replaced object would be noticed.
    """
    return _READERS[scheme_of(address)](address, start, stop, timeout_seconds, limit_seconds)


def list_matches(pattern: str, timeout_seconds: float) -> dict[str, bool]:
    """The objects and folders of a bucket that a pattern matches, by address, sorted, and whether each is an object."""
    head, _, path = pattern.partition("://")
    system = _bucket_system(pattern, timeout_seconds)
    try:
        found = system.glob(path, detail=True)
    except Exception as error:
        _judge_error(pattern, error)
    return {f"{head}://{name}": info["type"] != "directory" for name, info in sorted(found.items())}
