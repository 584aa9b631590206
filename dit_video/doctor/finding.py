"""What a check is told, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "FAIL"]


@dataclass(frozen=True)
class Settings:
    """What the checks are told; plain values, as they go to other processes."""

    runs: str  # the folder of runs, or the nearest one above it that is there
    beside: str  # a folder in it that checks may make, and the doctor removes
    shards: list[str]
    devices: int
    scratch: str  # a temporary folder of the doctor's
    temporary: str  # the folder in which it lies
    asked_temporary: str = ""  # the folder that TMPDIR names for that


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it."""

    status: Status
    text: str
    advice: str = ""

    @classmethod
    def of(cls, text: str, warnings: Sequence[str] = (), failures: Sequence[str] = ()) -> "Finding":
        """FAIL where anything fails, a warning where anything is to be known, else ok."""
        status: Status = "FAIL" if failures else "warning" if warnings else "ok"
        return cls(status, text, "; ".join([*failures, *warnings]))


def size(num_bytes: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.4g} TiB"


def one_line(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
