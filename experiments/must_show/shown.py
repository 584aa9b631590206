"""What every proof script prints with: a line ends in PASS or FAIL where it has a bound, and the last line says whether all passed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
failed: list[str] = []


def line(number: int, what: str, value: str, passed: bool | None = None) -> None:
    verdict = "" if passed is None else "  PASS" if passed else "  FAIL"
    print(f"[{number}] {what}: {value}{verdict}", flush=True)
    if passed is False:
        failed.append(f"[{number}] {what}")


def show(lines: Mapping[int, Callable[[], None]]) -> int:
    """Prints the lines that the command line names, or all, and gives the exit status; one that breaks off has failed."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d %H:%M')}", flush=True)
    asked = [int(word) for word in sys.argv[1:]] or list(lines)
    if unknown := set(asked) - set(lines):
        sys.exit(f"there is no line {min(unknown)} here; there are {', '.join(map(str, lines))}")
    for number in asked:
        try:
            lines[number]()
        except Exception as error:
            line(number, (lines[number].__doc__ or "").strip(), f"did not finish: {error!r}", False)
    print("everything shown" if not failed else f"FAILED: {'; '.join(failed)}")
    return 1 if failed else 0
