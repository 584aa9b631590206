"""Work for a decode pool, in a module of its own so that workers can import it: a job is a number and a deed."""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

MEGABYTE = 2**20
kept: list[np.ndarray] = []
pixels_of = np.random.default_rng


def touch(megabytes: int) -> None:
    kept.append(np.ones(megabytes * MEGABYTE, np.uint8))


def work(job: tuple[int, str], out: np.ndarray) -> dict[str, Any]:
    """Fills the first bytes of `out` with noise that follows from the number, and does the deed."""
    number, deed = job
    size = min(out.size, 1 + number % 7 * 100)
    out[:size] = pixels_of(number).integers(0, 256, size, np.uint8)
    match deed:
        case "nap":
            time.sleep(pixels_of(number).uniform(0, 0.03))
        case "hang":
            ctypes.PyDLL(None).pause()  # with the interpreter locked
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "leave":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            out[:] = 255
            ctypes.string_at(0)
        case "leak":
            touch(300)
        case "leak a little":
            touch(30)
        case "swell":
            touch(300)
            time.sleep(900)
        case "bad clip":
            raise ValueError(f"clip {number} is cut off")
        case "fault":
            raise ZeroDivisionError("of something")
        case "unsendable":
            return {"number": number, "what": lambda: None}
        case "long answer":
            return {"number": number, "size": size, "text": "x" * MEGABYTE}
        case "fill":
            out[:] = number
    return {"number": number, "size": size}


def whereabouts(job: int, out: np.ndarray) -> dict[str, Any]:
    return {"pid": os.getpid(), "torch": "torch" in sys.modules, "threads": os.environ["OMP_NUM_THREADS"]}


def sleep(job: float, out: np.ndarray) -> int:
    time.sleep(job)
    return os.getpid()


def nothing(job: int, out: np.ndarray) -> None:
    return None


class FailingPickle:
    """Pickled as a call that fails where it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments

    def __call__(self, job: int, out: np.ndarray) -> None:
        return None


def raise_error(text: str) -> None:
    raise ImportError(text)


@dataclass
class Heavy:
    """A work that is large before its first job."""

    data: bytes

    def __call__(self, job: int, out: np.ndarray) -> int:
        return len(self.data)


def echo(job: Any, out: np.ndarray) -> Any:
    return job
