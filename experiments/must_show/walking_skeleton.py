"""Prints every line that the walking skeleton must show, measured here and now; it trains five models: allow two hours.

    make setup && .venv/bin/python experiments/must_show/walking_skeleton.py            # everything
    .venv/bin/python experiments/must_show/walking_skeleton.py 2 7                      # some of the lines

A line ends in PASS or FAIL. Runs that exist already under runs/ are not trained again; remove them to start afresh.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from shown import ROOT, line, show

BIN = ROOT / ".venv" / "bin"
QUICK_SEEDS = (0, 1, 2)


def shell(*words: str) -> float:
    """Runs a command from the repository's root and gives its wall seconds; its output goes to standard error."""
    print("$", " ".join(words), file=sys.stderr, flush=True)
    started = time.perf_counter()
    subprocess.run(words, cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def metric(run: str, name: str) -> dict[str, float]:
    return read_json(ROOT / "runs" / run / "evaluation.json")["metrics"][name]


def told(found: dict[str, float]) -> str:
    return f"{found['value']:.4f} (95% interval {found['low']:.4f} to {found['high']:.4f}, n={found['count']})"


def budgets() -> None:
    """Line 1: adherence under the two budgets."""
    if not (ROOT / "runs/demo/evaluation.json").is_file():
        shell("make", "demo")
    names = ["demo"]
    for seed in QUICK_SEEDS[1:]:
        names.append(f"demo-seed{seed}")
        if not (ROOT / "runs" / names[-1] / "evaluation.json").is_file():
            shell(f"{BIN}/dit-video", "train", "experiment=world_quick", f"name={names[-1]}", f"seed={seed}")
            shell(f"{BIN}/dit-video", "evaluate", f"run=runs/{names[-1]}", "eval=world_prompts")
    for name in names:
        summary = read_json(ROOT / "runs" / name / "summary.json")
        core = summary["training_core_seconds"]
        line(
            1,
            f"{name} training",
            f"{core:.0f} core-seconds, {summary['training_wall_seconds']:.0f} s, {summary['clips']} clips",
            core <= 480,
        )
        for field in ("all", "size", "colour", "shape", "motion", "strict"):
            seen, held_out = (metric(name, f"adherence.{split}.{field}") for split in ("seen", "held_out"))
            line(1, f"{name} {field}, seen | held out", f"{told(seen)} | {told(held_out)}")
    for split, wanted in (("seen", 0.95), ("held_out", 0.88)):
        values = [metric(name, f"adherence.{split}.all")["value"] for name in names]
        shown = ", ".join(f"{value:.4f}" for value in values)
        line(
            1,
            f"world_quick {split}, mean of {len(values)} seeds",
            f"{np.mean(values):.4f} ({shown})",
            float(np.mean(values)) >= wanted,
        )
    if not (ROOT / "runs/demo-good/evaluation.json").is_file():
        shell("make", "demo-good")
    core = read_json(ROOT / "runs/demo-good/summary.json")["training_core_seconds"]
    line(1, "world_good training", f"{core:.0f} core-seconds", core <= 1200)
    for split, wanted in (("seen", 0.97), ("held_out", 0.95)):
        found = metric("demo-good", f"adherence.{split}.all")
        line(1, f"world_good {split}", told(found), found["low"] >= wanted)


def checker() -> None:
    """Line 2: the checker on true and on broken clips."""
    from dit_video.data.video_file import encode_mp4, read_video
    from dit_video.world.broken import BREAKERS
    from dit_video.world.checker import judge, read
    from dit_video.world.render import render
    from dit_video.world.state import sample_scene

    sizes = list(product([(32, 32), (48, 32), (32, 48), (48, 48), (64, 64), (24, 40)], [1, 2, 5, 9, 12, 16, 24, 33]))

    def scene(seed: int, index: int, least: int = 1) -> tuple[np.random.Generator, Any]:
        rng = np.random.default_rng([seed, index])
        usable = [size for size in sizes if size[1] >= least]
        (height, width), frames = usable[index % len(usable)]
        return rng, sample_scene(rng, num_frames=frames, height=height, width=width, fps=int(rng.integers(4, 25)), split="any")

    def passes(video: np.ndarray, drawn: Any, crf: int) -> bool:
        return judge(read(read_video(encode_mp4(video, drawn.fps, crf=crf))[0], drawn.fps), drawn.attributes).all

    right = []
    for index in range(2000):
        rng, drawn = scene(11, index)
        right.append(passes(render(drawn), drawn, int(rng.integers(12, 19))))
    line(
        2,
        "true clips that pass after H.264",
        f"{np.mean(right):.4f} of 2000, {len(sizes)} sizes and lengths",
        float(np.mean(right)) >= 0.995,
    )
    for name, breaker in BREAKERS.items():
        wrong, index = [], 0
        while len(wrong) < 200 and index < 2000:
            rng, drawn = scene(12, index, least=5)
            index += 1
            try:
                broken = breaker(rng, drawn)
            except ValueError:  # nothing to break in this scene
                continue
            wrong.append(passes(broken, drawn, 14))
        line(2, f"false passes, {name}", f"{np.mean(wrong):.4f} of {len(wrong)}", float(np.mean(wrong)) <= 0.01)


def tests() -> None:
    """Line 3: every test."""
    seconds = shell("make", "test")
    line(3, "make test", f"passed in {seconds / 60:.1f} minutes", seconds <= 15 * 60)


def image_to_video() -> None:
    """Line 4: the checkpoint of line 1 goes on from a given frame."""
    exact = metric("demo", "given_frames.image_to_video.exact")
    line(4, "first frame exact", told(exact), exact["value"] == 1.0)
    for suite in ("image_to_video", "image_to_video_held_out"):
        right = metric("demo", f"adherence.{suite}.motion")
        line(4, f"{suite}, motion as captioned", told(right), right["value"] >= 0.95)
        line(4, f"{suite}, everything right", told(metric("demo", f"adherence.{suite}.all")))
    changed = metric("demo", "caption_change.changed_caption.motion")
    line(4, "a changed caption changes the motion, both of a pair right", told(changed), changed["value"] >= 0.9)


def sizes() -> None:
    """Line 5: the checkpoint of line 1 at sizes it was not trained at."""
    line(5, "12 frames", told(metric("demo", "adherence.frames_12.all")))
    for suite in ("tall_48x32", "wide_32x48"):
        found = metric("demo", f"adherence.{suite}.all")
        line(5, suite, told(found), found["value"] >= 0.9)


def footage() -> None:
    """Line 6: real footage."""
    if not (ROOT / "runs/demo-real/evaluation.json").is_file():
        shell("make", "demo-real")
    summary = read_json(ROOT / "runs/demo-real/summary.json")
    line(6, "training", f"{summary['training_core_seconds']:.0f} core-seconds, {summary['clips']} clips")
    for suite in ("first_frame", "three_frames"):
        exact, ratio = metric("demo-real", f"given_frames.{suite}.exact"), metric("demo-real", f"motion.{suite}.ratio")
        line(6, f"{suite}, given frames exact", told(exact), exact["value"] == 1.0)
        line(6, f"{suite}, optical flow over the real clips'", told(ratio), 0.5 <= ratio["value"] <= 2)
        for name in ("model", "frozen", "linear_flow"):
            line(6, f"{suite}, PSNR of {name}", told(metric("demo-real", f"fidelity.{suite}.{name}")))


def extensions() -> None:
    """Line 7: three extensions, each a file and a YAML."""
    shell(f"{BIN}/python", "-m", "pytest", "-q", "tests/test_extensions.py")
    line(7, "attention pattern, metric and alignment loss", "tests/test_extensions.py passes", True)


LINES: dict[int, Callable[[], None]] = {
    1: budgets, 2: checker, 3: tests, 4: image_to_video, 5: sizes, 6: footage, 7: extensions,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(show(LINES))
