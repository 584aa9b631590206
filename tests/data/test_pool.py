import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pool_work
import pytest
from pool_work import MEGABYTE, FailingPickle, Heavy

from dit_video.data.pool import DecodePool, Failure, PoolError, Result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and processes are looked at through /proc")

Jobs = list[tuple[int, str]]
Outcome = tuple[Any, Any, bytes | None]


def pool(work: Callable[..., Any] = pool_work.work, num_workers: int = 2, slot_bytes: int = 1000, **limits: Any) -> DecodePool:
    return DecodePool(work, num_workers, slot_bytes, **{"timeout_seconds": 20, "memory_bytes": 256 * MEGABYTE} | limits)


def outcomes(results: Iterable[Result | Failure]) -> list[Outcome]:
    """Job, value and the pixels that were written; job, reason and None for a failure."""
    return [
        (result.job, result.reason, None)
        if isinstance(result, Failure)
        else (result.job, result.value, result.pixels[: result.value["size"]].tobytes())
        for result in results
    ]


def expect(jobs: Jobs, failing: dict[str, str]) -> list[Outcome]:
    """What this process itself makes of the jobs whose deed is not a failing one."""
    whole = DecodePool(pool_work.work, 0, 1000).map([job for job in jobs if job[1] not in failing])
    good = {outcome[0]: outcome for outcome in outcomes(whole)}
    return [good.get(job, (job, failing.get(job[1]), None)) for job in jobs]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def children() -> set[str]:
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()  # what an earlier test of this process left for the collector is none of this one's
    before = children(), num_descriptors()
    yield
    gc.collect()  # an error's traceback holds what it passed through
    assert (children(), num_descriptors()) == before


@pytest.mark.parametrize(("num_workers", "ahead"), [(1, None), (3, None), (2, 0), (3, 40)])
def test_results_come_in_the_order_of_the_jobs(num_workers: int, ahead: int | None) -> None:
    jobs = [(number, "nap") for number in range(30)]
    assert outcomes(pool(num_workers=num_workers, ahead=ahead).map(jobs)) == expect(jobs, {})


def test_no_jobs_give_no_results() -> None:
    assert list(pool().map([])) == []


FATAL = {
    "hang": "no answer in 4 s",
    "crash": "the decoder was killed by SIGSEGV",
    "abort": "the decoder was killed by SIGABRT",
    "kill": "the decoder was killed by SIGKILL, as when memory runs out",
    "exit": "the decoder ended by itself with exit code 3",
    "leave": "the decoder ended by itself with exit code 3",
    "leak": "used more than 0.2 GiB",
    "swell": "used more than 0.2 GiB",
}


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["hang", "crash", "abort", "leak", "swell"])
def test_a_fatal_job_costs_itself_and_nothing_else(deed: str) -> None:
    jobs = [(number, deed if number % 5 == 2 else "nap") for number in range(25)]
    limits = {"timeout_seconds": 4} if deed == "hang" else {}
    assert outcomes(pool(**limits).map(jobs)) == expect(jobs, FATAL)


def test_fatal_jobs_at_once_in_a_row_and_at_the_ends() -> None:
    deeds = ["crash", "leave", "exit", "hang", "kill", "nap", "hang", "abort", "nap", "nap", "exit"]
    jobs = list(enumerate(deeds))
    assert outcomes(pool(num_workers=3, timeout_seconds=4).map(jobs)) == expect(jobs, FATAL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_fails_its_job_and_keeps_the_worker(num_workers: int) -> None:
    jobs: list[Any] = [(1, "nap"), (2, "bad clip"), (3, "fault"), (4, "nap")]
    found = outcomes(pool(num_workers=num_workers).map(jobs))
    assert found[1] == ((2, "bad clip"), "clip 2 is cut off", None)
    assert found[2] == ((3, "fault"), "ZeroDivisionError: of something", None)
    assert [found[0], found[3]] == expect([jobs[0], jobs[3]], {})


def test_what_cannot_be_pickled_fails_its_job_and_keeps_the_worker() -> None:
    broken = FailingPickle(pool_work.raise_error, "missing")
    first, second, third = pool(pool_work.echo, num_workers=1).map([os.getpid, broken, "good"])
    assert isinstance(first, Result) and isinstance(third, Result) and first.value is os.getpid
    assert second == Failure(broken, "ImportError: missing")
    local, _ = pool(pool_work.work, num_workers=1).map([(1, "unsendable"), (2, "nap")])
    assert isinstance(local, Failure) and "lambda" in local.reason


def test_workers_import_the_work_and_not_the_program() -> None:
    (result,) = pool(pool_work.whereabouts).map([0])
    assert "torch" in sys.modules and isinstance(result, Result)
    assert result.value["torch"] is False and result.value["threads"] == "1" and result.value["pid"] != os.getpid()


def test_a_worker_serves_many_jobs() -> None:
    results = pool(pool_work.whereabouts, num_workers=1).map(range(50))
    assert len({result.value["pid"] for result in results if isinstance(result, Result)}) == 1


@pytest.mark.slow
def test_a_slow_leak_replaces_workers_and_fails_no_job() -> None:
    jobs = [(number, "leak a little") for number in range(24)]  # 720 MB where 256 MB are allowed
    assert all(isinstance(result, Result) for result in pool(num_workers=1).map(jobs))


def test_a_worker_that_dies_idle_costs_no_job() -> None:
    results = pool(pool_work.whereabouts, num_workers=1, ahead=0).map(range(6))
    pids = []
    for result in results:
        assert isinstance(result, Result)
        pids.append(result.value["pid"])
        os.kill(pids[-1], signal.SIGKILL)  # at once, so the next job meets it dying or dead
    assert len(set(pids)) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_endless_jobs_are_read_so_far_ahead_and_no_further(num_workers: int) -> None:
    read = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = pool(pool_work.nothing, num_workers=num_workers, ahead=5).map(endless())
    time.sleep(0.05)
    assert read == []
    for count, result in enumerate(itertools.islice(results, 50), start=1):
        assert result.job == count - 1 and len(read) == count + (5 if num_workers else 0)
    results.close()


def test_pixels_stay_while_they_are_held_and_results_may_be_large() -> None:
    size = 40 * MEGABYTE
    results = pool(slot_bytes=size, ahead=1).map([(number, "fill") for number in range(1, 8)])
    for number, result in enumerate(results, start=1):
        assert isinstance(result, Result) and result.pixels.shape == (size,) and (result.pixels == number).all()
        time.sleep(0.02)  # in which the others are written
        assert (result.pixels == number).all()
    assert (result.pixels == 7).all()  # also when the pool is gone
    (long,) = pool().map([(1, "long answer")])
    assert isinstance(long, Result) and len(long.value["text"]) == MEGABYTE
    job = bytes(range(256)) * 8192
    (large,) = pool(pool_work.echo).map([job])
    assert isinstance(large, Result) and large.value == job


def test_closing_early_ends_hanging_workers_at_once() -> None:
    results = pool(timeout_seconds=600).map(itertools.chain([(0, "nap")], ((number, "hang") for number in itertools.count())))
    assert next(results).job == (0, "nap") and children()
    results.close()
    assert not children() and list(results) == []


def test_an_error_of_the_consumer_or_of_the_jobs_ends_the_workers() -> None:
    with pytest.raises(RuntimeError, match="consumer"):
        for _ in pool().map((number, "nap") for number in itertools.count()):
            raise RuntimeError("consumer")
    with pytest.raises(ZeroDivisionError):
        list(pool().map((1 // (3 - number), "nap") for number in itertools.count()))


def test_a_pool_serves_twice_and_twice_at_once() -> None:
    jobs = [(number, "nap") for number in range(12)]
    twice = pool(num_workers=1)
    for _ in range(2):
        assert outcomes(twice.map(jobs)) == expect(jobs, {})
    for one, other in zip(twice.map(jobs), twice.map(jobs[::-1]), strict=True):
        assert outcomes([one, other]) == expect([one.job, other.job], {})


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda job, out: None, "cannot be sent to a worker"),
        (FailingPickle(pool_work.raise_error, "no decord here"), "ImportError: no decord here.*importable"),
        (FailingPickle(os._exit, 4), "3 workers in a row.*exit code 4"),
        (FailingPickle(os.abort), "3 workers in a row.*SIGABRT"),
        (Heavy(bytes(200 * MEGABYTE)), "before its first job.*raise memory_bytes"),
    ],
)
def test_work_that_cannot_start_is_an_error_that_says_what_to_change(work: Any, reason: str) -> None:
    with pytest.raises(PoolError, match=reason):
        list(pool(work).map([1, 2, 3]))


@pytest.mark.parametrize(
    "wrong", [{"num_workers": -1}, {"slot_bytes": 0}, {"timeout_seconds": 0}, {"memory_bytes": 0}, {"ahead": -1}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pool(**wrong)


PROGRAM = """
import itertools, pool_work, sys
from dit_video.data.pool import DecodePool
results = DecodePool(pool_work.sleep, 3, 100, timeout_seconds=600).map(itertools.chain([0], itertools.repeat(900)))
print(next(results).job, flush=True)
"""


def start_program(code: str) -> "subprocess.Popen[str]":
    """A program in a process group of its own, when it has written its first line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # tests that a shell runs in the background ignore it, and so would the program
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert program.stdout is not None and program.stdout.readline()
    return program


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about in 20 s")


@pytest.mark.parametrize(
    ("end", "sent", "status"),
    [
        ("next(results)", signal.SIGKILL, -signal.SIGKILL),
        ("next(results)", signal.SIGINT, -signal.SIGINT),
        ("next(results)", signal.SIGTERM, -signal.SIGTERM),
        ("sys.stdin.readline(); sys.exit(4)", None, 4),
        ("sys.stdin.readline(); 1 / 0", None, 1),
    ],
)
def test_workers_go_with_their_program_however_it_ends(end: str, sent: signal.Signals | None, status: int) -> None:
    program = start_program(PROGRAM + end)
    listing = Path(f"/proc/{program.pid}/task")
    workers: set[int] = set()

    def three() -> bool:
        workers.update(int(pid) for path in listing.glob("*/children") for pid in path.read_text().split())
        return len(workers) == 3

    wait_until(three)
    assert all(is_running(pid) for pid in workers)
    if sent is not None:
        program.send_signal(sent)
    _, said = program.communicate("\n", timeout=20)
    assert program.returncode == status, said
    wait_until(lambda: not any(is_running(pid) for pid in workers))


def test_signals_to_the_whole_group_are_for_the_parent_to_judge() -> None:
    code = """
import os, pool_work, signal
from dit_video.data.pool import DecodePool, Result
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: seen.append(number))
print("ready", flush=True)
results = DecodePool(pool_work.sleep, 2, 100).map([0.02] * 40)
for count, result in enumerate(results):
    if count % 10 == 0:
        os.killpg(0, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[count // 10 % 3])
    assert isinstance(result, Result), result
print(len(seen), count + 1)
"""
    said, problem = start_program(code).communicate(timeout=20)
    assert said == "4 40\n" and problem == ""
