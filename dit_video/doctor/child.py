"""Runs a check in a fresh process with a time limit; however that process ends, there is a Finding."""

import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from dit_video.doctor.finding import Finding, Settings, one_line

START = "import sys; sys.path[:] = sys.argv[3:]; from dit_video.doctor.child import serve; serve(*sys.argv[1:3])"
TRACEBACK = "DIT_VIDEO_TRACEBACK"  # as of the command line
REPORT = f"{TRACEBACK}=1 shows more; report it"


def run(where: str, settings: Settings, seconds: float) -> Finding:
    """What the function `module.function` finds; FAIL where it raises, crashes, or takes longer than `seconds`."""
    log = Path(settings.scratch) / "said.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", START, where, json.dumps(asdict(settings)), *sys.path],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None if os.environ.get(TRACEBACK) == "1" else said,
            env=os.environ | {"TMPDIR": settings.scratch}, start_new_session=True,
        )  # fmt: skip
    answer: bytes | None = None
    try:
        answer, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Finding("FAIL", f"gave no answer in {seconds:g} s and was cut off{_last(log)}", REPORT)
    finally:
        if answer is None or process.returncode:  # with what it started, which a sound check has seen to itself
            _kill(process)
    if process.returncode == 0 and answer:
        return Finding(**json.loads(answer))
    code = process.returncode
    how = f"was killed by {_name(-code)}" if code < 0 else f"ended with exit status {code}"
    return Finding("FAIL", f"its process {how}{' after its work' if answer else ''}{_last(log)}", REPORT)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if hasattr(os, "killpg"):
        with suppress(OSError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _last(log: Path) -> str:
    """The last line of what a process said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""


def serve(where: str, settings: str) -> None:
    """The life of a check's process: its answer is all that goes to its output, as the disk may be what is broken."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, function = where.rpartition(".")
    try:
        found = getattr(import_module(module), function)(Settings(**json.loads(settings)))
    except Exception as error:
        traceback.print_exc()
        found = Finding("FAIL", one_line(error), REPORT)
    answer.write(json.dumps(asdict(found)))
    answer.close()
