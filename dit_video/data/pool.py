"""A pool of processes that decode untrusted media: a file that hangs, crashes or swells its decoder costs one job, nothing else.

In this process one thread watches over each worker, so that limits hold and workers go on while the consumer is busy elsewhere.
Jobs and small answers go through a socket, pixels through shared memory. Workers are fresh interpreters that import the work and
nothing of the program: a fork would break the threads of torch and of decoders, and what multiprocessing starts otherwise imports
the program's main module, often with torch, and leaves a server behind. It isolates from accidents; it is no sandbox.
"""

import atexit
import ctypes
import math
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import IO, Any, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

Job = TypeVar("Job")
Value = TypeVar("Value")
Pixels = UInt8[np.ndarray, " bytes"]
Slots = UInt8[np.ndarray, "slots row"]

CHECK_SECONDS = 0.1
"""How often a busy worker's memory is looked at. Time limits are counted in such waits, so that stopping the program costs no job.

Looking lets a worker exceed its limit for so long, but RLIMIT_AS also counts address space that decoders reserve and never use,
and a decoder that meets it aborts, crashes or reports damage, without saying that it was memory.
"""
START_SECONDS = 120.0
"""How long a worker may take to import its work, which can be slow on a network drive."""
MAX_STARTS = 3
KILL_SECONDS = 10.0
GIB = 2**30
START = "import sys; sys.path[:] = sys.argv[5:]; from dit_video.data.pool import _serve; _serve(*map(int, sys.argv[1:5]))"
SIGNALS_OF_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2) if os.name == "posix" else ()


class PoolError(ValueError):
    """A pool that cannot work as it is set up; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Result(Generic[Job, Value]):
    """What the work made of a job; `pixels` is the whole slot, of which the work wrote what `value` says."""

    job: Job
    value: Value
    pixels: Pixels  # valid until the next result is asked for


@dataclass(frozen=True)
class Failure(Generic[Job]):
    """A job without a result, and why, in words for a person."""

    job: Job
    reason: str


class DecodePool(Generic[Job, Value]):
    """Runs `work(job, out) -> value` in worker processes that are replaced when a job hangs, kills or swells them.

    `work`, its jobs and its values are pickled, so work is a function at the top level of an importable module or an object of a
    class of one. It writes pixels to `out`, uint8 of slot_bytes, which still hold those of an earlier job. A job fails where it
    raises (a ValueError's text is its reason), gives no answer in timeout_seconds, ends its worker, or makes it hold more than
    memory_bytes; it is never tried again, and no other job is touched. A worker that holds over half of memory_bytes after a job
    is replaced, so that a slow leak fails no job. Memory is what a process has resident for itself, without the slots, and is
    watched on Linux alone. With num_workers=0 the work runs in this process, without isolation and limits.
    """

    def __init__(
        self, work: Callable[[Job, Pixels], Value], num_workers: int, slot_bytes: int, *,
        timeout_seconds: float = 30.0, memory_bytes: int = 4 * GIB, ahead: int | None = None,
    ) -> None:  # fmt: skip
        self.work, self.num_workers, self.slot_bytes = work, num_workers, slot_bytes
        self.timeout_seconds, self.memory_bytes = timeout_seconds, memory_bytes
        self.ahead = 2 * num_workers if ahead is None else ahead
        if num_workers < 0 or self.ahead < 0:
            raise ValueError(f"num_workers and ahead must not be negative, got {num_workers} and {ahead}")
        if slot_bytes < 1 or not timeout_seconds > 0 or memory_bytes < 1:
            limits = f"{slot_bytes}, {timeout_seconds} and {memory_bytes}"
            raise ValueError(f"slot_bytes, timeout_seconds and memory_bytes must be positive, got {limits}")
        if num_workers and os.name != "posix":
            raise PoolError("worker processes need Linux or macOS; set num_workers=0")

    def map(self, jobs: Iterable[Job]) -> Generator[Result[Job, Value] | Failure[Job], None, None]:
        """Results and failures in the order of the jobs, of which at most `ahead` are read beyond the one that is given out.

        The pixels of a result are valid until the next one is asked for: copy them, as into a row of a batch, before that.
        Workers and shared memory, (ahead + 1) * slot_bytes, belong to this call: they come when the first result is asked for and
        go when the generator ends, is closed or collected, or the program ends in any way. PoolError where no worker can start. What
        `jobs` raises ends the map at once.
        """
        return self._map_here(jobs) if self.num_workers == 0 else self._map_in_workers(jobs)

    def _map_here(self, jobs: Iterable[Job]) -> Generator[Result[Job, Value] | Failure[Job], None, None]:
        out = np.zeros(self.slot_bytes, np.uint8)
        for job in jobs:
            outcome: Result[Job, Value] | Failure[Job]
            try:
                outcome = Result(job, self.work(job, out), out)
            except Exception as error:
                outcome = Failure(job, _describe(error))
            yield outcome

    def _map_in_workers(self, jobs: Iterable[Job]) -> Generator[Result[Job, Value] | Failure[Job], None, None]:
        try:
            work = pickle.dumps(self.work)
        except Exception as error:
            raise PoolError(f"the work cannot be sent to a worker ({error}); define it at the top level of a module") from error
        jobs, free = iter(jobs), list(range(self.ahead + 1))
        tasks: SimpleQueue[_Task | None] = SimpleQueue()
        pending: deque[_Task] = deque()
        with _shared_file(len(free) * _row_bytes(self.slot_bytes)) as file:
            slots = _map_slots(file.fileno(), self.slot_bytes)
            watchers = [_Watcher(self, work, file, slots, tasks) for _ in range(self.num_workers)]
            stop = partial(_stop, watchers, tasks)
            atexit.register(stop)  # a generator that is alive at the end of the program may never be closed
            try:
                for watcher in watchers:
                    watcher.start()
                while True:
                    for job in islice(jobs, len(free)):
                        pending.append(_Task(job, free.pop()))
                        tasks.put(pending[-1])
                    if not pending:
                        return
                    task = pending.popleft()
                    yield task.outcome.result()
                    free.append(task.slot)
            finally:
                stop()
                atexit.unregister(stop)


@dataclass(eq=False)
class _Task:
    job: Any
    slot: int
    outcome: "Future[Result[Any, Any] | Failure[Any]]" = field(default_factory=Future)


class _Lost(Exception):
    """A worker is gone, with the reason; there is none now."""


class _Watcher(threading.Thread):
    """Takes tasks from a queue, has its one worker process do them, and ends and replaces the worker.

    A daemon, as the end of the program must not wait for a job. The worker is started by this thread and dies with it.
    """

    def __init__(
        self, pool: DecodePool[Any, Any], work: bytes, file: IO[bytes], slots: Slots, tasks: "SimpleQueue[_Task | None]"
    ) -> None:
        super().__init__(name="decode pool", daemon=True)
        self.pool, self.work, self.file, self.slots, self.tasks = pool, work, file, slots, tasks
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # parallelism is over jobs
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket
        self.reader: IO[bytes]

    def run(self) -> None:
        # The parent decides what a signal to the whole group means; a worker inherits from this thread that it is deaf to them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_PARENT)
        try:
            while (task := self.tasks.get()) is not None and not self.stopping:
                try:
                    task.outcome.set_result(self._do(task))
                except Exception as error:  # for the consumer, who would wait for ever
                    task.outcome.set_exception(error)
        finally:
            self._end()

    def _do(self, task: _Task) -> Result[Any, Any] | Failure[Any]:
        slot, limit = self.slots[task.slot], self.pool.memory_bytes
        message = pickle.dumps((task.slot, pickle.dumps(task.job)))
        for _ in range(MAX_STARTS):
            slot[-1] = 0
            try:
                process = self.process or self._start()
                value, problem = self._ask(process, message, self.pool.timeout_seconds)
            except _Lost as lost:
                if slot[-1]:
                    return Failure(task.job, str(lost))
                reason = str(lost)  # it died at its start, or between two jobs: this job was not begun
                continue
            memory = _own_memory(process.pid)
            if memory > limit / 2:
                self._end()
            if memory > limit:
                return Failure(task.job, self._too_much())
            return Failure(task.job, problem) if problem else Result(task.job, value, slot[: self.pool.slot_bytes])
        raise PoolError(
            f"{MAX_STARTS} workers in a row ended before they began a job ({reason}); see what importing the work does"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        self.connection, theirs = socket.socketpair()
        self.reader = self.connection.makefile("rb")
        passed = (theirs.fileno(), self.file.fileno())
        numbers = (*passed, self.pool.slot_bytes, os.getpid())
        try:
            process = self.process = subprocess.Popen(
                [sys.executable, "-c", START, *map(str, numbers), *sys.path],
                stdin=subprocess.DEVNULL, pass_fds=passed, env=self.environment,
            )  # fmt: skip
        except OSError as error:
            self._disconnect()
            raise PoolError(f"no worker can be started: {error}; lower num_workers={self.pool.num_workers}") from error
        finally:
            theirs.close()
        if self.stopping:  # looked at after the process is known, as _stop looks for a process after it has set this
            raise PoolError("the pool is closed")
        problem = self._ask(process, self.work, START_SECONDS)
        if problem:
            raise PoolError(f"the work cannot be loaded in a worker ({problem}); define it and its parts in importable modules")
        memory, limit = _own_memory(process.pid), self.pool.memory_bytes
        if memory > limit / 2:
            sizes = f"{memory / GIB:.2f} GiB before its first job, over half of memory_bytes={limit} ({limit / GIB:.2f} GiB)"
            raise PoolError(f"a worker holds {sizes}; raise memory_bytes")
        return process

    def _ask(self, process: subprocess.Popen[bytes], message: bytes, seconds: float) -> Any:
        """The worker's answer to a message; _Lost where it gives none."""
        self.connection.settimeout(seconds)
        try:
            self.connection.sendall(message)
        except OSError:
            pass  # it is gone, or does not listen, as the wait for its answer will show
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        for _ in range(math.ceil(seconds / CHECK_SECONDS)):
            if poll.poll(1000 * CHECK_SECONDS):
                try:
                    return pickle.load(self.reader)
                except Exception as error:
                    raise _Lost(self._cause_of_death(process) or f"the decoder's answer cannot be read: {error!r}") from error
            if _own_memory(process.pid) > self.pool.memory_bytes:
                reason = self._too_much()
                break
        else:
            reason = f"no answer in {seconds:g} s"
        self._end()
        raise _Lost(reason)

    def _too_much(self) -> str:
        return f"used more than {self.pool.memory_bytes / GIB:.1f} GiB"

    def _cause_of_death(self, process: subprocess.Popen[bytes]) -> str | None:
        """How a worker ended whose connection is lost, None where it did not; it is gone after this."""
        try:
            code = process.wait(KILL_SECONDS / 5)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end()
        if code >= 0:
            return f"the decoder ended by itself with exit code {code}"
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return f"the decoder was killed by {name}" + (", as when memory runs out" if code == -signal.SIGKILL else "")

    def _end(self) -> None:
        """Kills the worker, if there is one, and waits until it can no longer write to a slot."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            self._disconnect()
            try:
                process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise PoolError("a worker cannot be killed, as when the drive it reads from hangs; mend that") from error

    def _disconnect(self) -> None:
        self.reader.close()
        self.connection.close()


def _stop(watchers: list[_Watcher], tasks: "SimpleQueue[_Task | None]") -> None:
    for watcher in watchers:
        watcher.stopping = True
        tasks.put(None)
    for watcher in watchers:
        if (process := watcher.process) is not None:
            process.kill()
    for watcher in watchers:
        if watcher.is_alive() and watcher is not threading.current_thread():  # a collected generator is closed in any thread
            watcher.join()


def _row_bytes(slot_bytes: int) -> int:
    """A slot and the flag after it, in whole pages."""
    return math.ceil((slot_bytes + 1) / mmap.PAGESIZE) * mmap.PAGESIZE


def _shared_file(num_bytes: int) -> IO[bytes]:
    """A file without a name that processes can map: in memory where the system has such, else in the folder for temporary files.

    Neither counts against /dev/shm, of which a container has 64 MB, and both are gone with the last process that holds them.
    """
    file = os.fdopen(os.memfd_create("decoded"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
    file.truncate(num_bytes)
    return file


def _map_slots(descriptor: int, slot_bytes: int) -> Slots:
    """The slots in a shared file, one a row; the last byte of a row says whether the job of the slot was begun."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8).reshape(-1, _row_bytes(slot_bytes))


def _own_memory(pid: int) -> int:
    """The bytes that a process holds in memory for itself, without files and shared memory; 0 where Linux does not say."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def _describe(error: Exception) -> str:
    """A ValueError is about the media and speaks for itself; any other error is named."""
    return str(error) or "ValueError" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


# --------------------------------------------------------------------------- in a worker


def _serve(connection_descriptor: int, file_descriptor: int, slot_bytes: int, parent: int) -> None:
    """The life of a worker process: loads the work, does one job after the other, and ends with its parent."""
    import resource  # there is none on Windows, where this module is imported for num_workers=0

    if sys.platform == "linux":
        set_signal_at_death_of_parent = 1
        ctypes.CDLL(None).prctl(set_signal_at_death_of_parent, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a thousand broken files shall not fill the disk with cores
    connection = socket.socket(fileno=connection_descriptor)
    reader = connection.makefile("rb")
    slots = _map_slots(file_descriptor, slot_bytes)
    try:
        work = pickle.load(reader)
    except Exception as error:
        connection.sendall(pickle.dumps(f"{type(error).__name__}: {error}"))
        return
    connection.sendall(pickle.dumps(None))
    try:
        while True:
            index, job = pickle.load(reader)
            slots[index, -1] = 1
            try:
                answer = pickle.dumps((work(pickle.loads(job), slots[index, :slot_bytes]), None))
            except Exception as error:
                answer = pickle.dumps((None, _describe(error)))
            connection.sendall(answer)
    except (EOFError, ConnectionError):  # the parent is gone
        return
