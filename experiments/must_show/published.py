"""Prints what published weights, latents and text must show, measured here and now; allow an hour and a half on two cores.

    make setup && .venv/bin/python experiments/must_show/published.py         # everything; line 3 trains two models at once, an hour
    .venv/bin/python experiments/must_show/published.py 1 2                      # some of the lines

A line ends in PASS or FAIL. Line 7 needs a CUDA device and says so where there is none.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from shown import ROOT, line, show

PROGRAM = [sys.executable, "-m", "dit_video.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def by_pytest(number: int, what: str, file: str, words: str = "") -> None:
    """Runs tests and prints the numbers that they note, a line for each test that notes any, and how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        chosen = ["-k", words] if words else []
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        tests = [sys.executable, "-m", "pytest", *options, f"tests/{file}", *chosen]
        done = subprocess.run(tests, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            noted = ", ".join(f"{each.get('name')} {each.get('value')}" for each in case.iter("property"))
            if noted:
                wrong = case.find("failure") is not None or case.find("error") is not None
                line(number, f"{what}, {case.get('name', '').removeprefix('test_')}", noted, not wrong)
        last = (done.stdout.strip().splitlines() or ["nothing was run"])[-1]
        line(number, f"{what} (tests/{file})", last, not done.returncode and " skipped" not in last)


def wan() -> None:
    """Line 1: Wan in and out, beside diffusers."""
    by_pytest(1, "relative difference from diffusers' transformer", "model/test_wan.py", "those_of_diffusers")
    by_pytest(1, "two experts by noise level", "model/test_wan.py", "expert")
    by_pytest(1, "loaded and exported, bit for bit, both layouts", "model/test_published.py", "to_the_bit or own_converter")
    by_pytest(1, "five steps, export, reload in diffusers", "model/test_published.py", "five_steps")
    by_pytest(1, "latents beside diffusers' pipelines", "sampler/test_wan_pipeline.py")
    by_pytest(1, "clips of a whole pipeline's folder beside diffusers'", "test_pipeline.py")
    by_pytest(1, "Wan 2.1 looks at first frames: online, from a cache, sampled", "test_published_training.py", "first_frames")
    by_pytest(1, "its image encoder beside transformers'", "model/test_pretrained_image.py")
    by_pytest(1, "trained by the program, exported, reloaded in diffusers", "test_published_training.py", "go_back")


def autoencoders() -> None:
    """Line 2: every autoencoder beside diffusers."""
    by_pytest(2, "differences in deviations", "model/test_autoencoders.py", "those_of_the_library")
    by_pytest(2, "odd sizes, frame rules, refusals, the rest", "model/test_autoencoders.py", "not those_of_the_library")


def paraphrases() -> None:
    """Line 3: the world told by MiniLM, judged on paraphrases never seen, beside the learned encoder; both at once, a core each."""
    with tempfile.TemporaryDirectory() as folder:
        world = f"{folder}/world"
        run_program("data", "world", "paraphrases=4", f"out={world}")

        def trained_and_judged(experiment: str) -> None:
            shards = [f"data.shards={world}/*.tar", f"validation.shards={world}/validation/*.tar"]
            run_program("train", f"experiment={experiment}", f"name={experiment}", f"runs={folder}/runs", "logger=none", *shards)
            run_program("evaluate", f"run={folder}/runs/{experiment}", "eval=world_paraphrases")

        experiments = ("world_minilm", "world_words")
        with ThreadPoolExecutor() as pool:
            list(pool.map(trained_and_judged, experiments))  # which raises what they raise
        for experiment in experiments:
            run = Path(folder, "runs", experiment)
            spent = json.loads((run / "summary.json").read_text())
            line(3, f"{experiment}, budget", f"{spent['clips']:,} clips, {spent['training_core_seconds']:,.0f} core-seconds")
            metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
            for suite, what, bound in (
                ("seen", "seen combinations, plain", 0.95),
                ("paraphrases_seen", "told phrases and sentences", None),
                ("paraphrases", "unseen paraphrases: a sentence never told", 0.90),
                ("paraphrases_held_out", "the same, combinations never told", None),
                ("one_new_word", "and one of four phrases never told", None),
                ("four_new_words", "and no phrase ever told", None),
            ):
                each = metrics[f"adherence.{suite}.all"]
                told = f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f}) of {each['count']}"
                parts = (
                    f"{part} {metrics[f'adherence.{suite}.{part}']['value']:.3f}"
                    for part in ("size", "colour", "shape", "motion")
                )
                told += f": {', '.join(parts)}"
                bounded = bound is not None and experiment == "world_minilm"
                line(3, f"{experiment}, {what}", told, each["value"] >= bound if bounded else None)


def run_program(*words: str) -> None:
    """The program, which is to succeed."""
    done = subprocess.run([*PROGRAM, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"dit-video {' '.join(words)}: {done.stderr[-2000:]}")


def caches() -> None:
    """Line 4: training from a cache, online and raw."""
    by_pytest(4, "cached, online and raw; again; cut off; other weights", "data_tools/test_encode.py")
    with tempfile.TemporaryDirectory() as folder:
        world, latents, weights = (f"{folder}/{name}" for name in ("world", "latents", "wan"))
        common = [
            "data=shards", "data.num_frames=9", "data.height=64", "data.width=64", "data.random_start=false", "data.batch_size=4",
            f"autoencoder.folder={weights}", "autoencoder.dtype=float32", "text=minilm", "model=base", "logger=none",
        ]  # fmt: skip
        quiet = [f"every.{name}=0" for name in ("save", "sample", "validate", "monitor")]
        for words in (
            ["data", "world", f"out={world}", "clips=64", "height=64", "width=64", "num_prompts=8"],
            ["data", "random_autoencoder", f"out={weights}"],
            ["data", "encode", *common, f"data.shards={world}/*.tar", f"out={latents}"],
            ["train", *common, f"data.shards={latents}/*.tar", f"runs={folder}/runs", "name=base", "max_clips=48", "every.record=8",
             *quiet, "data.cache_bytes=0", "trainer.precision=32-true"],
        ):  # fmt: skip
            subprocess.run([*PROGRAM, *words], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        run = Path(folder, "runs", "base")
        lines = [json.loads(each) for each in (run / "metrics.jsonl").read_text().splitlines()]
        shares = [each["perf/share_in_steps"] for each in lines if "perf/share_in_steps" in each][1:]  # the first holds the start
        parameters = json.loads((run / "summary.json").read_text())["parameters"]
        waited = 1 - sum(shares) / len(shares)
        line(
            4,
            f"share of time outside of steps, {parameters:,} parameters, nothing kept in memory",
            f"{waited:.2%}",
            waited < 0.01,
        )


def adapters() -> None:
    """Line 5: LoRA beside diffusers."""
    by_pytest(5, "adapters alone learn, and start as nothing", "model/test_lora.py", "alone_learn or meta_device")
    by_pytest(5, "relative difference, loaded by diffusers", "model/test_lora.py", "diffusers_does_the_same or both_experts")
    by_pytest(5, "relative difference, merged", "model/test_lora.py", "merged_is_not_merged")
    by_pytest(
        5, "trained by the program, stopped, resumed, loaded by diffusers", "test_published_training.py", "adapters_are_trained"
    )


def hostile() -> None:
    """Line 6: what cannot be used is refused in a line, and nothing is executed."""
    by_pytest(6, "transformers", "model/test_published.py", "clear_line or none or refused")
    by_pytest(6, "adapters", "model/test_lora.py", "clear_line or not_opened or refused")
    by_pytest(6, "autoencoders", "model/test_autoencoders.py", "cannot_be or unpickled")
    by_pytest(6, "text encoders", "model/test_pretrained_text.py", "refused or executed or folder")
    by_pytest(6, "image encoders", "model/test_pretrained_image.py", "refused")
    by_pytest(6, "bases of a training", "test_published_training.py", "refused")


def gpu() -> None:
    """Line 7: one GPU."""
    import torch

    if not torch.cuda.is_available():
        line(
            7,
            "Wan 1.3B at 32,760 tokens on one GPU",
            "there is none here; experiments/benchmarks/gpu-2026-11-27.txt is what one printed",
        )
        return
    done = subprocess.run(["bash", "experiments/benchmarks/gpu.sh"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for told in done.stdout.splitlines():
        print(f"[7] {told}", flush=True)
    line(7, "gpu.sh", f"exit status {done.returncode}", not done.returncode)


LINES: dict[int, Callable[[], None]] = {
    1: wan, 2: autoencoders, 3: paraphrases, 4: caches, 5: adapters, 6: hostile, 7: gpu,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(show(LINES))
