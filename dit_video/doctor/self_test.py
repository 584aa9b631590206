"""A small training from nothing to a video, by the programs themselves, in a temporary folder."""

import io
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean

from dit_video.doctor.finding import Finding, Settings

CLIPS, BATCH, STEPS = 48, 16, 48
DATA = (f"clips={CLIPS}", "num_prompts=8", "validation_clips=0", "workers=1", "out=world")
MODEL = (
    "logger=none", "name=doctor", "data.shards=world/*.tar", f"data.batch_size={BATCH}", "data.num_workers=1", "model.width=64",
    "model.depth=2", "model.heads=2", "text.dim=64", "text.buckets=256", f"optimisers.warmup_clips={4 * BATCH}", "ema_decay=0.9",
    "sample_prompts=[]", f"every.record={2 * BATCH}",
    *(f"every.{name}=0" for name in ("monitor", "sample", "evaluate", "validate", "save")),
)  # fmt: skip
PROMPT = "a small red circle moves left"


class _Broken(Exception):
    """A step of the self-test that failed, with what it said."""


def self_test(settings: Settings) -> Finding:
    """Writes clips, trains, stops, goes on, is started once more for nothing, and samples."""
    began = time.perf_counter()
    os.chdir(settings.scratch)  # where no ./conf of the user's changes what is run
    try:
        text, warnings = _run_all()
    except _Broken as error:
        return Finding.of(
            f"{error} (after {time.perf_counter() - began:.0f} s)", failures=["see which line above fails; else report it"]
        )
    return Finding.of(f"{text}, {time.perf_counter() - began:.0f} s in all", warnings)


def _run_all() -> tuple[str, list[str]]:
    import torch

    from dit_video.cli import main
    from dit_video.data.video_file import read_video
    from dit_video.trainer import checkpoint

    where = ["trainer=gpu"] if torch.cuda.is_available() else []
    run, half, full = Path("runs/doctor"), f"max_clips={STEPS // 2 * BATCH}", f"max_clips={STEPS * BATCH}"
    _do(main, "data", "world", *DATA)
    for length in (half, full):
        _do(main, "train", *where, *MODEL, length)
        if not (run / "config.yaml").is_file():
            raise _Broken("train wrote no config.yaml, as a rank other than 0 would not")
    saved = checkpoint.newest(run / "checkpoints")
    if saved is None or (problem := checkpoint.verify(saved)):
        raise _Broken(f"the checkpoint does not verify: {problem}")
    steps = checkpoint.load(saved, ["ema"]).meta["steps"]
    if steps != STEPS:
        raise _Broken(f"going on came to step {steps} of {STEPS}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    if not losses or not all(map(math.isfinite, losses)):
        raise _Broken(f"the losses are {losses}")

    before = _files(run)
    _do(main, "train", *where, *MODEL, full)
    if _files(run) != before:
        raise _Broken("started again when it was done, training changed its run")
    _do(main, "sample", f"run={run}", f"prompt={PROMPT}", "steps=4", "out=videos")
    video, _ = read_video(next(iter(Path("videos").glob("*.mp4"))))
    if video.shape != (9, 32, 32, 3):
        raise _Broken(f"the sampled video has the shape {video.shape}")

    few = max(len(losses) // 4, 1)
    first, last = mean(losses[:few]), mean(losses[-few:])
    speed = max(record["perf/clips_per_second"] for record in records if "perf/clips_per_second" in record)
    text = f"{STEPS} steps at {speed:.0f} clips/s, loss {first:.3g} to {last:.3g}, went on from a verified checkpoint, sampled a clip"
    return text, [] if last < first else ["the loss did not fall in so few steps; if it never does, report it"]


def _do(main: Callable[[list[str]], int], *words: str) -> None:
    """A command line; _Broken with the last that it said where it fails."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(list(words))
    if status:
        lines = [line for line in said.getvalue().splitlines() if line.strip()] or [f"status {status}"]
        raise _Broken(f"dit-video {words[0]} failed: {lines[-1].removeprefix('dit-video: ')}")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
