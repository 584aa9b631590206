"""Who hangs is told from what the ranks' processes and stacks say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_video.trainer import heart, supervisor
from dit_video.trainer.supervisor import Rank, culprits

WAITS = """Thread 0x01 (most recent call first):
  File "/x/concurrent/futures/thread.py", line 81 in _worker

Current thread 0x02 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3180 in all_reduce
  File "/x/dit_video/trainer/layout.py", line 108 in all_sum
  File "/x/dit_video/trainer/module.py", line 170 in take_step
"""
WORKS = """Current thread 0x02 (most recent call first):
  File "/x/dit_video/data/pool.py", line 200 in _wait
  File "/x/dit_video/data/loader.py", line 300 in _gather
"""


def rank(number: int, step: int = 5, state: str = "S", stack: str = WAITS) -> Rank:
    return Rank(number, 1000 + number, step, 0.0, "step", state, stack)


@pytest.mark.parametrize(
    ("ranks", "hung", "why"),
    [
        ([rank(0), rank(1, state="-"), rank(2, state="T")], [1], "gone"),
        ([rank(0), rank(1), rank(2, state="T")], [2], "stopped by a signal"),
        ([rank(0), rank(1, step=4), rank(2)], [1], "behind"),
        ([rank(0, stack=WORKS), rank(1), rank(2)], [0], "not waiting"),
        ([rank(0, stack=""), rank(1), rank(2)], [0], "not waiting"),  # it did not answer
        ([rank(0), rank(1)], [], "of another"),
        ([rank(0, stack=WORKS), rank(1, stack=WORKS)], [0, 1], "none of them waits"),
        ([rank(0, stack=WORKS)], [0], "the only one"),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(ranks: list[Rank], hung: list[int], why: str) -> None:
    found, told = culprits(ranks)
    assert [each.number for each in found] == hung and why in told
    assert all(f"rank {number}" in supervisor.report(ranks, 30) for number in range(len(ranks)))


def test_the_state_of_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert supervisor.state_of(process.pid) in "SRD"
    process.send_signal(signal.SIGSTOP)
    while supervisor.state_of(process.pid) != "T":
        time.sleep(0.01)
    process.kill()
    while supervisor.state_of(process.pid) != "-":  # a zombie is gone too
        time.sleep(0.01)
    process.wait()
    assert supervisor.state_of(process.pid) == "-"


HANGS = """
import sys, time
from pathlib import Path
from dit_video.trainer import heart
heart.start(Path(sys.argv[1]), 1.0)
heart.beat("step", 3)
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    "how", ["time.sleep(60)", "import ctypes; ctypes.PyDLL(None).sleep(60)", "import os; os.kill(os.getpid(), 19)"]
)
def test_a_process_that_hangs_is_told_of_and_ended(tmp_path: Path, how: str) -> None:
    """Asleep, with the interpreter's lock held, and stopped."""
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path), how], stderr=subprocess.PIPE, text=True)
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "no progress for 1 s: rank 0 hangs" in told and "step after 3 steps" in told
    (report,) = tmp_path.glob("hang-*.txt")
    assert 'File "<string>"' in report.read_text()


def test_progress_is_left_alone_and_nothing_stays(tmp_path: Path) -> None:
    code = "for _ in range(8): time.sleep(0.4); heart.beat('step')\nheart.stop()"
    subprocess.run([sys.executable, "-c", HANGS, str(tmp_path / "hangs"), code], check=True, timeout=60)
    assert not (tmp_path / "hangs").exists()
    assert heart._heart is None
    heart.beat("nobody looks")


def test_a_supervisor_ends_with_its_ranks(tmp_path: Path) -> None:
    code = "import os; print(heart._heart.process.pid, heart._heart.path, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path), code], capture_output=True, text=True, timeout=60)
    pid, path = done.stdout.split()
    deadline = time.monotonic() + 20
    while supervisor.state_of(int(pid)) != "-" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert supervisor.state_of(int(pid)) == "-" and not os.path.exists(path)
