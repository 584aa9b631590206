"""`dit-video doctor`: does what a run relies on, piece by piece, and says what to do about what does not work.

A room of its own, as the checks share nothing but their form: each is one function of the settings that returns one Finding, and stands
in the table here. Every check runs in a process of its own (child.py), so that a library that crashes or hangs is a line and not the end.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from dit_video.doctor.child import run
from dit_video.doctor.finding import Finding, Settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

STYLES = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True)
class Check:
    """A line of the doctor's, and the function of a module beside this file that it comes from."""

    name: str
    where: str  # module.function; imported in the check's own process alone
    seconds: float = 60.0  # after which it is cut off
    gate: bool = False  # where it fails, nothing that comes after it is run


CHECKS = (
    Check("known malware", "software.known_malware", gate=True),  # before anything is imported
    Check("packages", "software.packages"),
    Check("program", "software.program", 180),  # imports, which can be slow on a network drive
    Check("environment", "software.environment"),
    Check("wandb", "software.wandb"),
    Check("processor", "devices.processor", 120),
    Check("GPU", "devices.gpu", 120),
    Check("memory", "machine.memory"),
    Check("limits", "machine.limits"),
    Check("signals", "machine.signals"),
    Check("disk", "storage.disk", 120),
    Check("temporary folder", "storage.temporary", 120),
    Check("file locking", "storage.locking"),
    Check("shared memory", "storage.shared_memory", 120),
    Check("start methods", "ranks.start_methods"),
    Check("attention", "devices.attention", 120),
    Check("flash-attn", "devices.flash_attn", 180),
    Check("pyav", "media.pyav"),
    Check("decord", "media.decord"),
    Check("torchcodec", "media.torchcodec", 120),
    Check("sound", "media.sound"),
    Check("shards", "media.shards", 120),
    Check("process group", "ranks.process_group", 180),
    Check("self-test", "self_test.self_test", 300),
)

NAME_WIDTH, STATUS_WIDTH = max(len(check.name) for check in CHECKS) + 2, max(map(len, STYLES)) + 2


class DoctorError(ValueError):
    """Something that a run relies on does not work."""


def main(config: "DictConfig") -> None:
    """Runs the checks and prints a line of each; DoctorError where one failed."""
    checks, began = chosen(config), time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    findings: dict[str, Finding] = {}
    with _settings(config) as settings:
        for check in checks:
            console.print(f"{check.name:<{NAME_WIDTH}}", end="")
            findings[check.name] = finding = run(f"dit_video.doctor.{check.where}", settings, check.seconds)
            console.print(f"{finding.status:<{STATUS_WIDTH}}", end="", style=STYLES[finding.status])
            console.print(_wrapped(finding), markup=False)
            if check.gate and finding.status == "FAIL":
                console.print("nothing else was run")
                break
    if config.json:
        Path(config.json).write_text(json.dumps({name: asdict(finding) for name, finding in findings.items()}, indent=2) + "\n")
    failed = [name for name, finding in findings.items() if finding.status == "FAIL"]
    warned = sum(finding.status == "warning" for finding in findings.values())
    counts = f"ok {len(findings) - warned - len(failed)}, warnings {warned}, failed {len(failed)}"
    console.print(f"\n{counts}, in {time.monotonic() - began:.0f} s")
    if failed:
        raise DoctorError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def chosen(config: "DictConfig") -> list[Check]:
    """The checks that a config asks for; ValueError where its keys cannot be."""
    if not isinstance(config.devices, int) or isinstance(config.devices, bool) or config.devices < 1:
        raise ValueError(f"devices must be a whole number of at least 1, got {config.devices!r}; set devices")
    names = [check.name for check in CHECKS]
    only = [config.only] if isinstance(config.only, str) else list(names if config.only is None else config.only)
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"there is no check {unknown[0]!r}; set only to some of: {', '.join(names)}")
    left_out = {name for name, wanted in (("self-test", config.train), ("shards", config.shards)) if not wanted}
    return [check for check in CHECKS if check.name in only and check.name not in left_out]


@contextmanager
def _settings(config: "DictConfig") -> Iterator[Settings]:
    """What the checks are told, with folders that are theirs alone and that go at the end, also where the doctor is stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    runs = Path(config.runs).absolute()
    runs = next(folder for folder in (runs, *runs.parents) if folder.is_dir())  # training makes what is missing
    shards = [config.shards] if isinstance(config.shards, str) else list(config.shards or [])
    beside = runs / f".doctor-{os.getpid()}"
    # A signal that is ignored stays so, as the children inherit that and one of them looks at it.
    takes_over = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if takes_over:
        signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as scratch:
            yield Settings(
                str(runs), str(beside), shards, config.devices, scratch, tempfile.gettempdir(), os.environ.get("TMPDIR", "")
            )
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if takes_over:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wrapped(finding: Finding) -> str:
    """What was found and what to do, on one line; on a terminal cut to its width, further lines under the first."""
    text = f"{finding.text}: {finding.advice}" if finding.advice else finding.text
    if not sys.stdout.isatty():
        return text
    indent = " " * (NAME_WIDTH + STATUS_WIDTH)
    width = max(shutil.get_terminal_size().columns, len(indent) + 40)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent).lstrip()
