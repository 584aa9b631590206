"""A web server that serves ranges, and on request fails in the ways that servers fail; and what child processes run against it."""

import gc
import http.client
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from threading import Thread

from dit_video.data.sources import Store


@dataclass
class Fault:
    """How one request goes wrong; a status of 0 serves the range, but cut off, reset, short, late, or a byte at a time."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    reset: bool = False
    short: bool = False
    late_seconds: float = 0
    byte_seconds: float = 0


class RangeServer(ThreadingHTTPServer):
    """Files by path, a log of (path, range) for each request, and faults that the next requests meet in turn."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {"ETag": '"1"'}
        self.faults: deque[Fault] = deque()
        self.log: list[tuple[str, str]] = []
        self.connections = 0
        self.sent_bytes = 0
        self.ignores_range = False
        self.upstream: tuple[str, int] | None = None
        """Where requests go on to if they are not for a file of this server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and 40 ms apart with it
    server: RangeServer

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.log.append((self.path, wanted))
        fault = server.faults.popleft() if server.faults else Fault()
        time.sleep(fault.late_seconds)
        if fault.status:
            return self._answer(fault.status, fault.headers, b"<html>not a shard</html>", Fault())
        if server.upstream is not None:
            return self._pass_on(server.upstream, fault)
        data = server.files.get(self.path.partition("?")[0])
        if data is None:
            return self._answer(404, {}, b"", fault)
        if server.ignores_range:
            return self._send_whole()
        start, stop = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
        stop = min(stop + 1 - fault.short, len(data))
        if start >= len(data):
            return self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"", fault)
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} | server.headers | fault.headers
        return self._answer(206, headers, data[start:stop], fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.cut or fault.reset:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        elif fault.byte_seconds:
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.byte_seconds)
        else:
            self.wfile.write(body)
            self.server.sent_bytes += len(body)

    def _send_whole(self) -> None:
        """A body of 64 GiB, until the client has enough."""
        self.send_response(200)
        self.send_header("Content-Length", str(2**36))
        self.end_headers()
        for _ in range(2**16):
            self.wfile.write(bytes(2**20))
            self.server.sent_bytes += 2**20

    def _pass_on(self, upstream: tuple[str, int], fault: Fault) -> None:
        connection = http.client.HTTPConnection(*upstream)
        connection.request(self.command, self.path, headers=dict(self.headers.items()))
        reply = connection.getresponse()
        kept = {name: value for name, value in reply.getheaders() if name.lower() not in ("connection", "server", "date")}
        self._answer(reply.status, kept, reply.read(), fault)
        connection.close()


@contextmanager
def serving() -> Iterator[RangeServer]:
    server = RangeServer()
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def read_in_child(store: Store, addresses: list[str], ranges: list[tuple[int, int]], pipe: Connection) -> None:
    """Sends the bytes of the same ranges of several shards, as a worker process would read them."""
    pipe.send([store.read_many(address, ranges) for address in addresses])


def read_over_and_over(store: Store, address: str, ranges: list[tuple[int, int]], pipe: Connection) -> None:
    """Sends the bytes of each range after reading it, and None at the end."""
    for offset, length in ranges:
        pipe.send(store.read(address, offset, length))
    pipe.send(None)


def collect_and_read(store: Store, address: str, where: tuple[int, int], pipe: Connection) -> None:
    """Sends the bytes of a range, and how often this process waits for a thread when it lets go of all that its parent has left behind."""
    waits = []
    wait = threading.Event.wait

    def counted(self: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait(self, timeout)

    threading.Event.wait = counted  # type: ignore[method-assign]
    gc.collect()
    threading.Event.wait = wait  # type: ignore[method-assign]
    pipe.send((store.read(address, *where), len(waits)))
