"""Runs the fault matrix and prints its table: real processes, real signals, the whole training program.

    python experiments/faults/run.py                      # all rows, ours and the baseline's
    python experiments/faults/run.py 1 2 --system ours    # some rows
    python experiments/faults/run.py 1 --trials 5 --keep  # fewer trials, whose folders stay

results.jsonl beside this file gets a line a trial, in place of those of the rows and systems that are run; table.md is made of it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from harness import ROOT, Ours, Outcome, world  # noqa: E402
from rows import ROWS, Bench  # noqa: E402

STAMP: dict[str, str] = {}  # of the code that was imported


def main() -> int:
    """Runs what the command line asks for; exit status 1 where a trial of ours came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, help=f"of 1 to {len(ROWS)}; none: all")
    parser.add_argument("--system", choices=["ours", "baseline", "both"], default="both")
    parser.add_argument("--trials", type=int, help="so many of a row at the most")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.jsonl and table.md go")
    parser.add_argument("--keep", action="store_true", help="leave the trials' folders")
    asked = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    STAMP.update(commit=git.stdout.strip(), date=time.strftime("%Y-%m-%d"))
    with _folder(asked.keep) as name:
        out = Path(name)
        shards = world(out)
        failed = 0
        for system in ("ours", "baseline") if asked.system == "both" else (asked.system,):
            failed += _run(system, shards, out / system, asked)
    return 1 if failed else 0


class _folder:
    """A temporary folder that may stay."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.path = keep, tempfile.mkdtemp(prefix="faults-")

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        import shutil

        if self.keep:
            print(f"the trials' folders are in {self.path}")
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def _run(name: str, shards: str, out: Path, asked: argparse.Namespace) -> int:
    """The rows of one system; gives how many trials of ours were wrong."""
    out.mkdir()
    if name == "ours":
        system, rows = Ours(shards), {number: row for number, (_, row) in ROWS.items()}
        trials = dict.fromkeys(ROWS, asked.trials)
    else:
        from baseline import ROWS_OF_BASELINE, TRIALS, Baseline

        system, rows = Baseline(shards), ROWS_OF_BASELINE
        trials = {number: asked.trials or TRIALS.get(number) for number in rows}
    failed = 0
    for number in [number for number in asked.rows or ROWS if number in rows]:
        bench = Bench(system, out, trials[number], asked.keep)
        began, lines = time.monotonic(), []
        try:
            for trial, outcome in rows[number](bench):
                lines.append(_line(name, number, trial, outcome))
        except Exception as error:
            import traceback

            traceback.print_exc()
            lines.append(_line(name, number, "the row itself", Outcome(False, f"broke off: {error!r}"[:300])))
        right = sum(line["right"] for line in lines)
        failed += (len(lines) - right) * (name == "ours")
        print(f"{name} row {number}: {right} of {len(lines)} right in {time.monotonic() - began:.0f} s", flush=True)
        _store(asked.out, name, number, lines)
    return failed


def _line(system: str, row: int, trial: str, outcome: Outcome) -> dict[str, Any]:
    print(f"  {'right' if outcome.right else 'WRONG'}  {row}. {trial}: {outcome.told}", flush=True)
    return {"system": system, "row": row, "trial": trial, "right": outcome.right, "told": plainly(outcome.told)}


def plainly(told: str) -> str:
    """Without what differs from one machine or start to the next: folders, process numbers, times."""
    told = re.sub(r"(/[\w.@=+-]+)+/(?=[\w.@=+-])", "", told)
    return re.sub(r"process \d+ on \S+ since \S+", "process ...", told)


def _store(folder: Path, system: str, row: int, lines: list[dict[str, Any]]) -> None:
    """Puts a row's lines in place of its earlier ones, and makes the table anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = [line for line in old if (line["system"], line["row"]) != (system, row)] + [line | STAMP for line in lines]
    new.sort(key=lambda line: (line["row"], line["system"] != "ours"))
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
    (folder / "table.md").write_text(table(new))


def table(lines: list[dict[str, Any]]) -> str:
    """The matrix with its counts, and below it every trial that came out wrong."""
    stamps = sorted({(line["commit"], line["date"]) for line in lines})
    out = ["| # | fault | dit_video | Lightning + webdataset |", "|---|---|---|---|"]
    for number, (title, _) in ROWS.items():
        cells = []
        for system in ("ours", "baseline"):
            mine = [line for line in lines if (line["row"], line["system"]) == (number, system)]
            cells.append(f"{sum(line['right'] for line in mine)} of {len(mine)}" if mine else "not run")
        out.append(f"| {number} | {title} | {cells[0]} | {cells[1]} |")
    for system, title in (("ours", "dit_video"), ("baseline", "Lightning + webdataset")):
        wrong = [line for line in lines if line["system"] == system and not line["right"]]
        out += ["", f"{title}: {'what came out wrong' if wrong else 'nothing came out wrong'}", ""]
        counted = Counter((line["row"], _short(line["told"])) for line in wrong)
        out += [f"- {row}: {count} x {told}" for (row, told), count in sorted(counted.items())]
    out += ["", f"Commits and dates: {', '.join(f'{commit} on {date}' for commit, date in stamps)}.", ""]
    return "\n".join(out)


def _short(told: str) -> str:
    return told if len(told) < 160 else told[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
