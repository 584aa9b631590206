"""Real servers, real processes, real files: what is read is what was written, or an error that names the shard."""

import gc
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
import requests
from range_server import Fault, RangeServer, collect_and_read, read_in_child, read_over_and_over, serving

from dit_video.data import sources
from dit_video.data.shards import BadDataError
from dit_video.data.sources import GAP_BYTES, Store, expand

BLOCK = 2**14
SHARD = random.Random(0).randbytes(20 * BLOCK + 123)
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with serving() as server:
        server.files["/a.tar"] = SHARD
        yield server


@pytest.fixture
def address(server: RangeServer) -> str:
    return f"{server.url}/a.tar"


@pytest.fixture(scope="module")
def bucket() -> Iterator[RangeServer]:
    """An S3 server in a process of its own, behind a server of ours that can fail; its bucket holds two shards and a folder."""
    words = [sys.executable, "-c", MOTO]
    with (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as moto,
        serving() as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert moto.stdin is not None and moto.stdout is not None and moto.stderr is not None
        port = next((line.split()[1] for line in moto.stdout if line.startswith("port ")), None)
        if port is None:
            pytest.fail(f"no S3 server for the tests: pip install -e '.[dev]' brings moto and flask\n{moto.stderr.read()[-500:]}")
        server.upstream = "127.0.0.1", int(port)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.url, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        requests.put(f"http://127.0.0.1:{port}/shards").raise_for_status()
        for key in ("train/0.tar", "train/1.tar", "train/deep/2.tar"):
            put(server, key, SHARD)
        yield server
        moto.stdin.close()


def put(bucket: RangeServer, key: str, data: bytes) -> None:
    import boto3  # comes with moto

    assert bucket.upstream is not None
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{bucket.upstream[1]}")
    client.put_object(Bucket="shards", Key=key, Body=data, ACL="public-read")


@pytest.fixture
def s3(bucket: RangeServer) -> Iterator[RangeServer]:
    bucket.log.clear()
    yield bucket
    bucket.faults.clear()


def impatient(**settings: object) -> Store:
    return Store(**{"backoff_seconds": 0.01, "timeout_seconds": 5} | settings)  # type: ignore[arg-type]


# Addresses


def test_local_addresses(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar", "[odd].tar", "a b.tar"):
        (tmp_path / name).write_bytes(SHARD)
    both = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    for urls in (str(tmp_path / "{0..1}.tar"), [*both, both[0]], str(tmp_path / "[01].tar"), f"file://{tmp_path}/{{0,1}}.tar"):
        assert expand(urls) == both
    assert expand(f"{tmp_path}//./1.tar") == both[1:]
    assert expand(str(tmp_path / "[odd].tar")) == [str(tmp_path / "[odd].tar")]
    assert expand(f"FILE://{tmp_path}/a%20b.tar") == [str(tmp_path / "a b.tar")]
    assert len(expand(str(tmp_path / "*.tar"))) == 4 and len(expand(f"{tmp_path.parent}/**/{tmp_path.name}/*.tar")) == 4


def test_remote_addresses_are_expanded_without_a_request(server: RangeServer) -> None:
    assert expand("https://host/{00..02}.tar") == [f"https://host/0{number}.tar" for number in range(3)]
    mixed = ["s3://bucket/{a,b}.tar", f"{server.url}/a.tar?part=1", "http://[::1]:80/a.tar", "gcs://bucket/a.tar", "gs://b/a.tar"]
    assert expand([*mixed, mixed[0]]) == ["s3://bucket/a.tar", "s3://bucket/b.tar", *mixed[1:]]
    assert not server.log


@pytest.mark.parametrize(
    ("urls", "what"),
    [
        ([], "no shards"),
        ("missing.tar", "no such shard"),
        ("none*.tar", "no such shard"),
        ("{0..1", "braces"),
        (".", r"is a folder.*\*\.tar"),
        ("/dev/null", "not a plain file"),
        ("http://host/*.tar", "no wildcards.*braces"),
        ("http://host", "names no shard"),
        ("s3://bucket/", "names no shard"),
        ("s3:bucket/a.tar", "names no shard"),
        ("file://host/a.tar", "is not read"),
    ],
)
def test_addresses_that_cannot_be(urls: str | list[str], what: str) -> None:
    with pytest.raises(BadDataError, match=f"{what}.*data\\.shards|{what}"):
        expand(urls)


def test_no_address_runs_or_opens_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    canary, secret = tmp_path / "canary", tmp_path / "secret.tar"
    secret.write_bytes(SHARD)
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    touch = f"touch {canary}"
    evil = [
        f"pipe:{touch}", f"PIPE:{touch}", f"pipe: {touch}", f"{{pipe:,x:}}{touch}", f" pipe:{touch}", f"|{touch}", f"`{touch}`.tar",
        f"$({touch}).tar", f"simplecache::pipe:{touch}", f"simplecache::file://{secret}", f"filecache::file://{secret}",
        f"s3://bucket/a.tar::file://{secret}", f"gs://bucket/a.tar::pipe:{touch}", f"http://host/a.tar::file://{secret}",
        f"zip://a.tar::{secret}", f"reference://x::{secret}", "github://owner:repo@main/a.tar", "ssh://host/a.tar",
        "sftp://host/a.tar", "python://evil", f"python:{tmp_path}/evil.py", "ftp://host/a.tar", "memory://a.tar",
        f"local://{secret}", "data:;base64,AAAA", f"dir::{secret}", "hdfs://host/a.tar", "s3a://bucket/a.tar", "abfs://c/a.tar",
        "javascript:1", "ipfs://a", f"file:{secret}", f"file://localhost{secret}", "git://x", "gdrive://x", "jupyter://x",
    ]  # fmt: skip
    for url in evil:
        with pytest.raises(BadDataError, match=r"data\.shards"):
            expand(url)
        for call in (Store().size, Store().version, lambda address: Store().read(address, 0, 1)):
            with pytest.raises(BadDataError, match=r"data\.shards"):
                call(url)
    (tmp_path / f"pipe:{touch.replace('/', '|')}.tar").write_bytes(b"")
    with pytest.raises(BadDataError):
        Store().read(f"pipe:{touch.replace('/', '|')}.tar", 0, 0)
    with pytest.raises(BadDataError, match="opened as files"):
        Store().size(f"{tmp_path}/a.tar")
    assert not canary.exists()


def test_passwords_and_signatures_stay_out_of_messages(server: RangeServer) -> None:
    address = f"http://user:secret1@127.0.0.1:{server.server_address[1]}/none.tar?X-Signature=secret2&b=secret3"
    closed = "http://user:secret1@127.0.0.1:1/a.tar?X-Signature=secret2"
    for url, what in ((address, "no such shard"), (closed, "cannot be read"), (f"pipe:{closed}", "is not read")):
        with pytest.raises(BadDataError, match=what) as caught:
            impatient(retries=0).read(url, 0, 1)
        assert "secret" not in str(caught.value) and ("a.tar" in str(caught.value) or "none.tar" in str(caught.value))


# Ranges over http


def test_ranges_over_http(server: RangeServer, address: str) -> None:
    store = Store()
    assert store.size(address) == len(SHARD)
    assert store.read(address, 100, 50) == SHARD[100:150]
    assert store.read(address, 0, len(SHARD)) == SHARD
    assert server.log[1:] == [("/a.tar", "bytes=100-149"), ("/a.tar", f"bytes=0-{len(SHARD) - 1}")]
    assert store.read_many(address, []) == [] and store.read(address, 7, 0) == b""
    for offset, length in ((0, len(SHARD) + 1), (len(SHARD), 1), (-1, 1), (0, -1)):
        with pytest.raises(BadDataError, match=rf"bytes {offset} to {offset + length} .*index it again.*data\.shards"):
            store.read(address, offset, length)
    assert len(server.log) == 3 and server.connections == 1


def test_close_ranges_are_one_request(server: RangeServer, address: str) -> None:
    server.files["/a.tar"] = shard = random.Random(1).randbytes(4 * GAP_BYTES)
    store = Store()
    store.size(address)
    server.log.clear()
    far = 3 * GAP_BYTES
    ranges = [(far, 100), (0, 10), (20, 10), (5, 20), (30 + GAP_BYTES, 1), (far + 100, 5), (0, 10), (7, 0)]
    assert store.read_many(address, ranges) == [shard[offset : offset + length] for offset, length in ranges]
    assert [wanted for _, wanted in server.log] == [f"bytes=0-{30 + GAP_BYTES}", f"bytes={far}-{far + 104}"]


def test_long_ranges_are_several_requests(server: RangeServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "REQUEST_BYTES", 6 * BLOCK)
    store = impatient()
    store.size(address)
    server.faults.extend([Fault(), Fault(), Fault(cut=True)])
    assert store.read_many(address, [(1, len(SHARD) - 1), (6 * BLOCK, 3)]) == [SHARD[1:], SHARD[6 * BLOCK : 6 * BLOCK + 3]]
    assert len(server.log) == 1 + 4 + 1


def test_requests_follow_redirects(server: RangeServer, address: str) -> None:
    with serving() as other:
        other.faults.extend([Fault(302, {"Location": address})] * 2)
        assert Store().read(f"{other.url}/a.tar", 3, 4) == SHARD[3:7]
        other.faults.extend([Fault(302, {"Location": "file:///etc/hostname"})])
        with pytest.raises(BadDataError, match="cannot be read"):
            Store().read(f"{other.url}/a.tar", 3, 4)


# What fails for a moment, and what fails for good

MOMENTS = [
    Fault(500), Fault(502), Fault(503), Fault(504), Fault(429), Fault(408), Fault(cut=True), Fault(reset=True), Fault(late_seconds=1),
    Fault(byte_seconds=0.1), Fault(short=True),
]  # fmt: skip


@pytest.mark.parametrize("fault", MOMENTS, ids=str)
def test_what_fails_for_a_moment_is_tried_again(server: RangeServer, address: str, fault: Fault) -> None:
    store = impatient(timeout_seconds=0.5)
    store.size(address)
    server.faults.extend([fault] * 2)
    assert store.read(address, 1000, 20) == SHARD[1000:1020]
    assert len(server.log) == 4


@pytest.mark.parametrize("fault", [Fault(503), Fault(cut=True), Fault(reset=True)], ids=str)
def test_the_tries_are_counted(server: RangeServer, address: str, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    store = impatient(retries=2)
    store.size(address)
    server.faults.extend([fault] * 10)
    with caplog.at_level(logging.INFO), pytest.raises(BadDataError) as caught:
        store.read(address, 1000, 20)
    message = str(caught.value)
    assert message.startswith(f"{address}: bytes 1000 to 1020 cannot be read (tries: 3, the last: ") and "data.shards" in message
    assert len(server.log) == 4 and len(caplog.records) == 2
    if fault.status:
        assert "HTTP 503" in message
    server.faults.clear()
    assert store.read(address, 1000, 20) == SHARD[1000:1020]


def test_no_server_and_no_name_are_tried_again() -> None:
    with pytest.raises(BadDataError, match=r"http://127.0.0.1:1/a.tar.*tries: 3.*refused"):
        impatient(retries=2).size("http://127.0.0.1:1/a.tar")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Fault(401), "access is refused"),
        (Fault(403), "access is refused.*credentials"),
        (Fault(404), "no such shard"),
        (Fault(410), "no such shard"),
        (Fault(400), "HTTP 400"),
        (Fault(416), "without byte 1000"),
        (Fault(0, {"Content-Encoding": "gzip"}), "gzip"),
        (Fault(0, {"Content-Range": "bytes 0-19/9999"}), "answers bytes 0-19/9999"),
        (Fault(0, {"Content-Range": "bytes 1000-1020/*"}), "answers bytes"),
        (Fault(0, {"ETag": ""}), "neither ETag nor Last-Modified"),
    ],
    ids=str,
)
def test_what_fails_for_good_is_asked_for_once(server: RangeServer, address: str, fault: Fault, what: str) -> None:
    store = impatient()
    store.size(address)
    server.faults.append(fault)
    with pytest.raises(BadDataError, match=rf"a\.tar.*{what}.*data\.shards"):
        store.read(address, 1000, 20)
    assert len(server.log) == 2


def test_an_empty_shard_and_a_missing_one(server: RangeServer) -> None:
    server.files["/empty.tar"] = b""
    for name, what in (("empty", "is empty"), ("missing", "no such shard")):
        with pytest.raises(BadDataError, match=rf"{name}\.tar: .*{what}.*data\.shards"):
            Store().size(f"{server.url}/{name}.tar")


def test_a_server_that_ignores_range_is_refused_without_reading_on(server: RangeServer, address: str) -> None:
    store = Store()
    store.size(address)
    server.ignores_range, server.sent_bytes = True, 0
    for attempt in (store, Store()):
        with pytest.raises(BadDataError, match=r"ignores Range.*data\.shards"):
            attempt.read(address, 0, 20)
    time.sleep(0.2)
    assert server.sent_bytes < 2**25  # what the sockets hold, of 64 GiB each
    assert len(server.log) == 3


def test_retry_after_is_obeyed(server: RangeServer, address: str) -> None:
    store = impatient(retries=1)
    store.size(address)
    for in_seconds in (False, True):
        start = time.monotonic()
        server.faults.append(Fault(429, {"Retry-After": "1" if in_seconds else formatdate(time.time() + 2, usegmt=True)}))
        assert store.read(address, 1000, 20) == SHARD[1000:1020]
        assert 0.9 < time.monotonic() - start < 20
    server.faults.append(Fault(503, {"Retry-After": "soon"}))
    assert store.read(address, 1000, 20) == SHARD[1000:1020]
    server.log.clear()
    server.faults.append(Fault(429, {"Retry-After": "3600"}))
    with pytest.raises(BadDataError, match=r"tries: 1, .*asked to wait 3600 s"):
        store.read(address, 1000, 20)
    assert len(server.log) == 1


def test_waits_double_and_differ_between_ranks(address: str, server: RangeServer, caplog: pytest.LogCaptureFixture) -> None:
    def waits(seed: int) -> list[float]:
        store = Store(backoff_seconds=0.1, retries=2, seed=seed)
        store.size(address)
        server.faults.extend([Fault(503)] * 2)
        caplog.clear()
        start = time.monotonic()
        with caplog.at_level(logging.INFO):
            store.read(address, 0, 1)
        told = [float(record.message.rsplit(" ", 2)[1]) for record in caplog.records]
        assert sum(told) - 0.1 <= time.monotonic() - start < sum(told) + 10
        return told

    first, second = waits(1)
    assert 0.1 <= first <= 0.15 and 0.2 <= second <= 0.3 and waits(1) == [first, second] != waits(2)


# Replaced while it is read


@pytest.mark.parametrize("headers", [{"ETag": '"2"'}, {"Last-Modified": "Tue, 24 Nov 2026 00:00:00 GMT"}], ids=str)
def test_a_replaced_shard_is_an_error_and_never_a_mix(
    server: RangeServer, address: str, headers: dict[str, str], tmp_path: Path
) -> None:
    if "Last-Modified" in headers:
        server.headers = {"Last-Modified": "Mon, 23 Nov 2026 00:00:00 GMT"}
    store, cached = impatient(), impatient(cache_dir=tmp_path, block_bytes=BLOCK)
    version = store.version(address)
    assert cached.read(address, 0, 10) == SHARD[:10] and cached.version(address) == version
    server.headers, server.files["/a.tar"] = headers, SHARD[::-1]
    for held in (store, cached, pickle.loads(pickle.dumps(store))):
        with pytest.raises(BadDataError, match=r"a\.tar: was replaced.*data\.shards"):
            held.read_many(address, [(10, 5), (15 * BLOCK, 10)])
    assert cached.read(address, 5, 5) == SHARD[5:10]  # of the version that it began with
    fresh = impatient(cache_dir=tmp_path, block_bytes=BLOCK)
    assert fresh.version(address) != version and fresh.read(address, 0, 10) == SHARD[::-1][:10]


def test_a_shard_of_another_length_is_replaced_too(server: RangeServer, address: str) -> None:
    store = impatient()
    store.size(address)
    server.files["/a.tar"] = SHARD[:-1]
    with pytest.raises(BadDataError, match="was replaced"):
        store.read(address, 0, 10)
    server.files["/a.tar"] = SHARD[:5]
    with pytest.raises(BadDataError, match="replaced by a shard without byte 10"):
        store.read(address, 10, 10)


# The cache


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.block*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_blocks_are_fetched_once_and_neighbours_together(server: RangeServer, address: str, tmp_path: Path) -> None:
    cached = Store(tmp_path, block_bytes=BLOCK)
    ranges = [(BLOCK - 5, 10), (3 * BLOCK, 1), (len(SHARD) - 1, 1), (BLOCK, 0)]
    expected = [SHARD[offset : offset + length] for offset, length in ranges]
    assert cached.read_many(address, ranges) == expected
    last = len(SHARD) // BLOCK * BLOCK
    assert [wanted for _, wanted in server.log[1:]] == [
        f"bytes=0-{2 * BLOCK - 1}", f"bytes={3 * BLOCK}-{4 * BLOCK - 1}", f"bytes={last}-{len(SHARD) - 1}",
    ]  # fmt: skip
    assert cached.read_many(address, ranges) == expected and len(server.log) == 4
    other = Store(tmp_path, block_bytes=BLOCK)
    assert other.read_many(address, ranges) == expected and len(server.log) == 5  # it looks, and finds all blocks there
    assert other.read(address, 0, len(SHARD)) == SHARD
    assert len(server.log) == 7  # blocks 2 and 4 to 19
    assert Store(tmp_path, block_bytes=2 * BLOCK).read(address, 0, len(SHARD)) == SHARD


def test_long_reads_fill_whole_blocks(server: RangeServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (BLOCK // 2, 3 * BLOCK - 1):  # a request is whole blocks, whatever its limit
        monkeypatch.setattr(sources, "REQUEST_BYTES", most)
        for _ in range(2):
            assert Store(tmp_path / str(most), block_bytes=BLOCK).read(address, 0, len(SHARD)) == SHARD
    assert len(server.log) == 4 + 21 + 11


def test_the_cache_is_bounded_and_keeps_what_is_used(server: RangeServer, address: str, tmp_path: Path) -> None:
    limit = 8 * BLOCK
    cached = Store(tmp_path, cache_bytes=limit, block_bytes=BLOCK)
    (tmp_path / "notes.txt").write_bytes(bytes(10 * BLOCK))
    (tmp_path / "upload.partial").write_bytes(b"not of the cache")
    orphan = tmp_path / f"{'a' * 32}-7.block.partial"
    orphan.write_bytes(b"its writer died")
    for number in range(20):
        for block in (0, number):
            assert cached.read(address, block * BLOCK, BLOCK) == SHARD[block * BLOCK : (block + 1) * BLOCK]
            assert disk_bytes(tmp_path) <= limit
    assert len(server.log) == 1 + 20  # block 0 was always among the last that were used
    assert disk_bytes(tmp_path) > limit // 2
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "upload.partial").exists() and not orphan.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "swapped", "gone", "a folder"])
def test_a_damaged_block_is_fetched_again(server: RangeServer, address: str, tmp_path: Path, damage: str) -> None:
    cached = Store(tmp_path, block_bytes=BLOCK)
    assert cached.read(address, 0, 4 * BLOCK) == SHARD[: 4 * BLOCK]
    first, second = (next(tmp_path.glob(f"*-{number}.block")) for number in (0, 1))
    content = bytearray(first.read_bytes())
    if damage == "truncated":
        first.write_bytes(content[:-100])
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "flipped":
        content[BLOCK // 2] ^= 1
        first.write_bytes(content)
    elif damage == "swapped":
        other = second.read_bytes()
        second.write_bytes(first.read_bytes())
        first.write_bytes(other)
    else:
        first.unlink()
        if damage == "a folder":
            first.mkdir()
    server.log.clear()
    assert cached.read(address, 0, 4 * BLOCK) == SHARD[: 4 * BLOCK]
    assert len(server.log) == 1
    assert cached.read(address, 0, 4 * BLOCK) == SHARD[: 4 * BLOCK]
    assert len(server.log) == (2 if damage == "a folder" else 1)
    if damage in ("flipped", "swapped"):
        assert int((tmp_path / "used_bytes").read_text()) == disk_bytes(tmp_path)


@pytest.mark.parametrize("book", [b"", b"nonsense", b"0", b"999999999999"])
def test_a_wrong_count_of_bytes_is_counted_anew(server: RangeServer, address: str, tmp_path: Path, book: bytes) -> None:
    limit = 8 * BLOCK
    cached = Store(tmp_path, cache_bytes=limit, block_bytes=BLOCK)
    cached.read(address, 0, 5 * BLOCK)
    (tmp_path / "used_bytes").write_bytes(book)
    assert cached.read(address, 0, len(SHARD)) == SHARD
    # a count of 0 is a lie that the cache itself never tells; it costs what was there once, and no more
    assert disk_bytes(tmp_path) <= limit + (5 * BLOCK + 100 if book == b"0" else 0)


def test_without_room_on_the_disk_reading_goes_on(
    server: RangeServer, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cached = Store(tmp_path / "file" / "cache", block_bytes=BLOCK)
    assert cached.read(address, 0, 10) == SHARD[:10]
    assert "could not be kept" in caplog.text
    cached, soft_hard = Store(tmp_path / "cache", block_bytes=BLOCK), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK // 2, soft_hard[1]))
    try:
        assert cached.read(address, 0, 10) == SHARD[:10]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert caplog.text.count("could not be kept") == 2 and disk_bytes(tmp_path / "cache") == 0
    assert cached.read(address, 0, 10) == SHARD[:10] and disk_bytes(tmp_path / "cache") > BLOCK


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_bytes"):
        Store(tmp_path, cache_bytes=2**20)
    for settings in ({"retries": -1}, {"timeout_seconds": 0}, {"backoff_seconds": -1}, {"block_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Store(**settings)  # type: ignore[arg-type]


def run_child(method: str, target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.process.BaseProcess, object]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(*arguments, theirs), daemon=True)  # type: ignore[attr-defined]
    child.start()
    theirs.close()
    return child, ours


def test_processes_share_a_bounded_cache_and_may_be_killed(server: RangeServer, address: str, tmp_path: Path) -> None:
    limit = 6 * BLOCK
    cached = Store(tmp_path, cache_bytes=limit, block_bytes=BLOCK)
    cached.size(address)
    draw = random.Random(0)
    children = []
    for _ in range(3):
        ranges = [(draw.randrange(len(SHARD) - 2 * BLOCK), draw.randrange(2 * BLOCK)) for _ in range(80)]
        children.append((*run_child("fork", read_over_and_over, cached, address, ranges), ranges))
    for number in range(80):
        for child, pipe, ranges in children:
            if not child.is_alive() and number > 30 and child is children[0][0]:
                continue
            offset, length = ranges[number]
            assert pipe.recv() == SHARD[offset : offset + length]
            assert disk_bytes(tmp_path) <= limit + BLOCK
        if number == 30:
            os.kill(children[0][0].pid, signal.SIGKILL)
            children[0][0].join()
    for child, pipe, _ in children[1:]:
        assert pipe.recv() is None
        child.join(30)
        assert child.exitcode == 0
    assert cached.read(address, 0, len(SHARD)) == SHARD and disk_bytes(tmp_path) <= limit
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_process_finds_the_blocks_of_the_first(server: RangeServer, address: str, tmp_path: Path) -> None:
    cached = Store(tmp_path, block_bytes=BLOCK)
    child, pipe = run_child("fork", read_in_child, cached, [address], [(0, len(SHARD))])
    assert pipe.recv() == [[SHARD]]  # type: ignore[attr-defined]
    child.join(30)
    assert [wanted for _, wanted in server.log] == ["bytes=0-0", f"bytes=0-{len(SHARD) - 1}"]
    assert cached.read(address, 0, len(SHARD)) == SHARD and len(server.log) == 3  # only the look


# Buckets


def test_ranges_and_wildcards_in_a_bucket(s3: RangeServer, tmp_path: Path) -> None:
    names = ["s3://shards/train/0.tar", "s3://shards/train/1.tar"]
    assert (
        expand("s3://shards/train/*.tar") == names == expand("s3://shards/train/{0..1}.tar") == expand("s3://shards/t*/[01].tar")
    )
    for pattern, what in (
        ("s3://shards/none*.tar", "no such shard"),
        ("s3://none/*.tar", "no such shard"),
        ("s3://shards/*", "folder"),
    ):
        with pytest.raises(BadDataError, match=rf"{what}.*data\.shards"):
            expand(pattern)
    put(s3, "late/0.tar", SHARD)
    assert expand("s3://shards/late/*.tar") == ["s3://shards/late/0.tar"]
    put(s3, "late/1.tar", SHARD)
    assert len(expand("s3://shards/late/*.tar")) == 2  # no listing is remembered
    s3.log.clear()
    for store in (Store(), Store(tmp_path, block_bytes=BLOCK)):
        assert store.size(names[0]) == len(SHARD)
        assert store.read_many(names[0], [(100, 50), (5, 7)]) == [SHARD[100:150], SHARD[5:12]]
    assert [wanted for _, wanted in s3.log] == ["bytes=0-0", "bytes=5-149", "bytes=0-0", f"bytes=0-{BLOCK - 1}"]
    assert store.read(names[0], 0, len(SHARD)) == SHARD == Store().read(names[0], 0, len(SHARD))


@pytest.mark.parametrize("fault", [fault for fault in MOMENTS if not fault.byte_seconds and not fault.short], ids=str)
def test_buckets_fail_for_a_moment(s3: RangeServer, fault: Fault) -> None:
    store = impatient(timeout_seconds=0.5)
    store.size("s3://shards/train/0.tar")
    s3.faults.extend([fault] * 2)
    assert store.read("s3://shards/train/0.tar", 1000, 20) == SHARD[1000:1020]
    assert len(s3.log) == 4


def test_buckets_fail_for_good(s3: RangeServer) -> None:
    store, address = impatient(retries=2, timeout_seconds=0.5), "s3://shards/train/0.tar"
    for missing in ("s3://shards/none.tar", "s3://none/a.tar", "s3://shards/train"):
        with pytest.raises(BadDataError, match=rf"{missing}: there is no such shard.*data\.shards"):
            store.size(missing)
    store.size(address)
    for fault, count, what in (
        (Fault(403), 1, "access is refused"),
        (Fault(503), 3, "tries: 3.*HTTP 503"),
        (Fault(429, {"Retry-After": "3600"}), 1, "asked to wait 3600"),
        (Fault(late_seconds=1), 3, "tries: 3.*Timeout"),
    ):
        s3.log.clear()
        s3.faults.extend([fault] * count)
        with pytest.raises(BadDataError, match=rf"train/0\.tar.*{what}"):
            store.read(address, 1000, 20)
        assert len(s3.log) == count


def test_an_object_that_is_replaced(s3: RangeServer) -> None:
    address, store = "s3://shards/changing.tar", impatient()
    put(s3, "changing.tar", SHARD)
    version = store.version(address)
    assert store.read(address, 0, 5) == SHARD[:5]
    put(s3, "changing.tar", SHARD[::-1])
    with pytest.raises(BadDataError, match="changing.tar: was replaced"):
        store.read(address, 0, 5)
    assert Store().version(address) != version and Store().read(address, 0, 5) == SHARD[::-1][:5]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_read_after_their_parent(
    s3: RangeServer, server: RangeServer, address: str, tmp_path: Path, method: str
) -> None:
    addresses = [address, "s3://shards/train/1.tar"]
    for store in (Store(), Store(tmp_path / "cache", block_bytes=BLOCK)):
        expected = [store.read_many(address, [(5, 10), (10 * BLOCK, BLOCK)]) for address in addresses]
        assert len(pickle.dumps(store)) < 2000
        child, pipe = run_child(method, read_in_child, store, addresses, [(5, 10), (10 * BLOCK, BLOCK)])
        assert pipe.poll(60) and pipe.recv() == expected  # type: ignore[attr-defined]
        child.join(30)
        assert child.exitcode == 0
        assert store.read(address, 100, 50) == SHARD[100:150] == store.read(addresses[1], 100, 50)


def test_a_forked_child_leaves_the_connections_of_its_parent_alone(s3: RangeServer) -> None:
    store, address = Store(timeout_seconds=4), "s3://shards/train/0.tar"
    assert store.read(address, 5, 10) == SHARD[5:15]
    gc.collect()  # what earlier tests have left behind is not this store's
    for _ in range(3):
        child, pipe = run_child("fork", collect_and_read, store, address, (5, 10))
        assert pipe.poll(60)  # type: ignore[attr-defined]
        data, waits = pipe.recv()  # type: ignore[attr-defined]
        assert data == SHARD[5:15] and waits == 0  # a file system that is let go of waits a second for a thread that is not there
        child.join(30)
        assert child.exitcode == 0
        s3.log.clear()
        assert store.read(address, 5, 10) == SHARD[5:15] and len(s3.log) == 1


def test_a_bucket_without_credentials_names_them(bucket: RangeServer) -> None:
    code = "from dit_video.data.sources import Store; Store().size('s3://shards/train/0.tar')"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    start = time.monotonic()
    refused = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "BadDataError: s3://shards/train/0.tar: cannot be read" in refused.stderr and "credentials" in refused.stderr
    assert time.monotonic() - start < 20
    public = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"FSSPEC_S3_ANON": "true"}, capture_output=True, text=True
    )
    assert public.returncode == 0, public.stderr


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("gcs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_package_names_its_extra(scheme: str, package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None  # as if it was not installed
from dit_video.data.sources import Store, expand
for call in (lambda: Store().size("{scheme}://bucket/a.tar"), lambda: expand("{scheme}://bucket/*.tar")):
    try:
        call()
    except ValueError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all(line.startswith("BadDataError ") and f"pip install 'dit-video[{extra}]'" in line for line in lines)
