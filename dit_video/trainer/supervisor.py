"""Watches the heartbeats of one machine's ranks, from a process of its own: no stopped rank and no held interpreter lock can stop it.

Run by heart.py as a script; it imports nothing but the standard library, so that it starts at once and costs nothing.
"""

import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RECORD = struct.Struct("=qqd24s")
"""Process, steps done, when the phase began (monotonic seconds, one clock for all processes of a machine), and the phase."""

POLL_SECONDS, STACK_SECONDS = 0.5, 3.0
EXPLAINED = 60
"""Frames of a stack that are looked at for a wait on other ranks."""
WAITING = ("torch/distributed/", "dit_video/trainer/layout.py", "dit_video/trainer/context.py")
"""Files whose functions wait for other ranks."""


@dataclass
class Rank:
    """What is known of one rank."""

    number: int
    pid: int
    step: int
    began: float
    phase: str
    state: str  # as the kernel says: R running, S sleeping, D in the kernel, T stopped, and - for gone
    stack: str = ""

    @property
    def waits(self) -> bool:
        """Whether its main thread is inside something that waits for other ranks."""
        main = self.stack.split("Current thread")[-1] if "Current thread" in self.stack else self.stack
        frames = [line for line in main.splitlines() if line.lstrip().startswith("File ")]
        return any(part in frame for frame in frames[:3] for part in WAITING)


def main(path: str, seconds: float, folder: str, first: int) -> None:
    """Watches until no rank is left, or until one has hung for so many seconds and all of them were stopped."""
    beats = Path(path)
    while True:
        time.sleep(POLL_SECONDS)
        ranks = read(beats, first)
        if not ranks or all(rank.state == "-" for rank in ranks):
            beats.unlink(missing_ok=True)
            return
        now = time.monotonic()
        if any(rank.phase not in ("", "starting") and now - rank.began > seconds for rank in ranks):
            time.sleep(POLL_SECONDS)
            # A rank that goes on for its stack may come to its end meanwhile, and would end this untold.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stop(read(beats, first), seconds, Path(folder))
            beats.unlink(missing_ok=True)
            return


def read(beats: Path, first: int) -> list[Rank]:
    """The ranks that have begun to beat."""
    try:
        content = beats.read_bytes()
    except OSError:
        return []
    ranks = []
    for place, (pid, step, began, phase) in enumerate(RECORD.iter_unpack(content)):
        if pid:
            ranks.append(Rank(first + place, pid, step, began, phase.rstrip(b"\0").decode(errors="replace"), state_of(pid)))
    return ranks


def state_of(pid: int) -> str:
    """The kernel's letter for a process; - where it is gone, ? where the system does not say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "-"
    except PermissionError:
        return "?"
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "-" if letter in "ZX" else letter
    except (OSError, IndexError):
        return "?"


def stop(ranks: list[Rank], seconds: float, folder: Path) -> None:
    """Asks every rank for its stacks, tells which one hangs, and kills all."""
    files = {rank.number: folder / f"rank-{rank.number}.stack" for rank in ranks}
    for rank in ranks:
        signalled(rank, signal.SIGUSR2)
        if rank.state == "T":
            signalled(rank, signal.SIGCONT)  # or it could not answer
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline and not all(size(files[rank.number]) or rank.state == "-" for rank in ranks):
        time.sleep(0.1)
    time.sleep(0.2)  # to the end of what is being written
    for rank in ranks:
        rank.stack = files[rank.number].read_text(errors="replace") if files[rank.number].exists() else ""
    told = report(ranks, seconds)
    name = folder / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    name.write_text(
        told + "\n\n" + "\n\n".join(f"rank {rank.number}\n{rank.stack or 'no stack: it did not answer'}" for rank in ranks)
    )
    print(
        f"dit-video: {told}\ndit-video: stacks of all ranks are in {name}; all ranks of this machine are stopped", file=sys.stderr
    )
    sys.stderr.flush()
    for rank in ranks:
        signalled(rank, signal.SIGKILL)


def report(ranks: list[Rank], seconds: float) -> str:
    """Which rank hangs, why it is thought so, and what every rank was doing."""
    hung, why = culprits(ranks)
    now = time.monotonic()
    who = f"rank {', '.join(str(rank.number) for rank in hung)} hangs ({why})" if hung else why
    every = "; ".join(
        f"rank {rank.number}: {rank.phase} after {rank.step} steps, for {now - rank.began:.0f} s, {STATES.get(rank.state, rank.state)}"
        for rank in ranks
    )
    return f"no progress for {seconds:g} s: {who}. {every}"


STATES = {
    "-": "gone",
    "T": "stopped by a signal",
    "R": "running",
    "S": "sleeping",
    "D": "waiting in the kernel",
    "?": "state unknown",
}


def culprits(ranks: list[Rank]) -> tuple[list[Rank], str]:
    """The ranks that the others wait for, with the evidence; none where all of this machine wait for another machine."""
    for why, test in (
        ("its process is gone", lambda rank: rank.state == "-"),
        ("its process was stopped by a signal", lambda rank: rank.state == "T"),
        ("it is behind the others", lambda rank: rank.step < max(other.step for other in ranks)),
        ("it is not waiting for the others, which wait", lambda rank: not rank.waits),
    ):
        found = [rank for rank in ranks if test(rank)]
        if found and (len(found) < len(ranks) or len(ranks) == 1):
            return found, why if len(ranks) > 1 else "it is the only one"
    if all(rank.waits for rank in ranks):
        return [], "all ranks of this machine wait for one of another"
    return list(ranks), "none of them waits for another"


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def signalled(rank: Rank, number: int) -> None:
    try:
        os.kill(rank.pid, number)
    except OSError:
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what the user stops are the ranks
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
