"""The heartbeat of every rank, in memory that a supervisor process shares with the ranks of its machine.

A rank writes what it is doing and when it began; the supervisor (supervisor.py) stops all ranks of its machine when one has been at the
same thing for too long, and says which one the others are waiting for.
"""

import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dit_video.trainer import supervisor
from dit_video.trainer.layout import all_gathered


class Heart:
    """One rank's record among those of its machine."""

    def __init__(self, path: Path, place: int, places: int, stacks: Path) -> None:
        self.path, self.place, self.stacks = path, place, stacks
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.file = stacks.open("w")
        faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True)
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), places * supervisor.RECORD.size)
        self.step = 0
        self.process: subprocess.Popen | None = None

    def beat(self, phase: str, step: int | None = None) -> None:
        """Says that this rank begins something."""
        self.step = self.step if step is None else step
        record = (os.getpid(), self.step, time.monotonic(), phase.encode()[:24])
        supervisor.RECORD.pack_into(self.memory, self.place * supervisor.RECORD.size, *record)


_heart: Heart | None = None


def beat(phase: str, step: int | None = None) -> None:
    """Says that this rank begins something, to the supervisor, where there is one."""
    if _heart is not None:
        _heart.beat(phase, step)


def start(folder: Path, seconds: float, rank: int = 0, place: int = 0, places: int = 1) -> None:
    """Starts this machine's supervisor; `place` is this rank's number among the `places` ranks of the machine.

    Its reports and the ranks' stacks go to `folder`. All ranks must call it.
    """
    global _heart
    stop()
    path = None
    if place == 0:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        handle, name = tempfile.mkstemp(prefix="dit_video-", suffix=".beat", dir=shared)
        os.truncate(handle, places * supervisor.RECORD.size)
        os.close(handle)
        path = name
    path = all_gathered(path)[rank - place]  # of the machine's first rank
    assert path is not None
    _heart = Heart(Path(path), place, places, folder / f"rank-{rank}.stack")
    _heart.beat("starting")
    all_gathered(None)  # nobody is watched before all are there
    if place == 0:
        words = [sys.executable, "-S", supervisor.__file__, path, str(seconds), str(folder), str(rank)]
        _heart.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)


def stop() -> None:
    """Ends this machine's supervision, as a run ends."""
    global _heart
    if _heart is None:
        return
    if _heart.process is not None:
        _heart.process.terminate()
        _heart.process.wait()
    with suppress(OSError):
        _heart.path.unlink()
    faulthandler.unregister(signal.SIGUSR2)
    _heart.file.close()
    with suppress(OSError):  # what has nothing to say goes
        if not _heart.stacks.stat().st_size:
            _heart.stacks.unlink()
            _heart.stacks.parent.rmdir()
    _heart = None
