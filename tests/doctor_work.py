"""Checks that go wrong in every way, for the doctor to survive, and the processes in which a limit is set before a check."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from dit_video.doctor.finding import Finding, Settings


def sound(settings: Settings) -> Finding:
    print("a library that talks")
    return Finding.of("sound")


def raising(settings: Settings) -> Finding:
    raise RuntimeError("no such\nluck")


def crashing(settings: Settings) -> Finding:
    print("about to go", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return Finding.of("never")


def leaving(settings: Settings) -> Finding:
    os._exit(3)


def crashing_at_its_end(settings: Settings) -> Finding:
    import atexit

    atexit.register(os.kill, os.getpid(), signal.SIGABRT)
    return Finding.of("done")


def hanging(settings: Settings) -> Finding:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(settings.scratch) / "pid").write_text(str(child.pid))
    time.sleep(600)
    return Finding.of("never")


def under(preparation: str, where: str, settings: Settings) -> Finding:
    """What a check finds in a process where some lines of Python ran before."""
    module, _, function = where.rpartition(".")
    code = f"""
import json, os, resource, signal, sys
sys.path[:] = {sys.path!r}
from dit_video.doctor.finding import Settings
import {module} as module
{preparation}
found = module.{function}(Settings(**json.loads(sys.argv[1])))
print(json.dumps([found.status, found.text, found.advice]))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(asdict(settings))], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Finding(*json.loads(done.stdout.splitlines()[-1]))
