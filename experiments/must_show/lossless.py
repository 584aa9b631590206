"""Prints what training that cannot lose work must show, measured here and now with real processes on gloo; allow two hours on two cores.

    make setup && .venv/bin/python experiments/must_show/lossless.py            # everything; line 3 alone takes an hour
    .venv/bin/python experiments/must_show/lossless.py 1 5                      # some of the lines

A line ends in PASS or FAIL. Line 7 needs a CUDA device and says so where there is none.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shown import ROOT, line, show

sys.path[:0] = [str(ROOT / "tests" / "trainer"), str(ROOT / "tests")]


def same_mathematics() -> None:
    """Line 1: twenty steps on every layout beside one process."""
    from layout_work import furthest, run_ranks, training
    from test_layouts import ADAMW, LAYOUTS, MUON

    from dit_video.trainer.layout import Layout

    for recipe, name in ((ADAMW, "AdamW"), (MUON, "Muon")):
        alone = run_ranks(1, training, {}, recipe)[0]
        line(1, f"{name}, float64, one process", f"loss {alone[0][0][0]:.6f} to {alone[0][-1][0]:.6f} in {len(alone[0])} steps")
        line(
            1,
            f"{name}, one process again",
            "bit-equal" if furthest(run_ranks(1, training, {}, recipe)[0], alone) == 0 else "differs",
        )
        for layout, sizes in LAYOUTS.items():
            ranks = run_ranks(Layout(**sizes).world_size, training, sizes, recipe)
            far = max(furthest(rank, alone) for rank in ranks)
            line(1, f"{name}, float64, {layout}", f"furthest relative difference {far:.1e}", far < 1e-9)
        again = [run_ranks(2, training, LAYOUTS["fsdp 2"], recipe)[0] for _ in range(2)]
        same = furthest(*again) == 0
        line(1, f"{name}, fsdp 2 twice", "bit-equal" if same else "differs", same)
    alone = run_ranks(1, training, {}, ADAMW)[0]
    for what, options in (
        ("full checkpointing", {"recompute": "full"}), ("selective checkpointing", {"recompute": "selective"}),
        ("compile", {"compile": True}),
        ("compile and full checkpointing", {"compile": True, "recompute": "full"}),
    ):  # fmt: skip
        for layout in ({}, {"shard": 2}, {"shard": 2, "context": 2}):
            found = run_ranks(Layout(**layout).world_size, partial(training, layout, ADAMW, **options))[0]
            far = furthest(found, alone)
            line(1, f"AdamW, float64, {what}, {layout or 'one process'}", f"furthest relative difference {far:.1e}", far < 1e-9)
    for recipe, name, most in ((ADAMW, "AdamW", None), ({"muon_precision": "float32"}, "Muon, float32 iterations", 1e-5)):
        alone = run_ranks(1, partial(training, {}, recipe, "float32"))[0]
        for layout in ("fsdp 2", "context 2"):
            found = run_ranks(2, partial(training, LAYOUTS[layout], recipe, "float32"))[0]
            steps = max(
                abs(a - b) / abs(b)
                for one, other in zip(found[0], alone[0], strict=True)
                for a, b in zip(one, other, strict=True)
            )
            line(
                1, f"{name}, float32, {layout}", f"losses and gradient norms {steps:.1e}", None if most is None else steps < most
            )


def by_pytest(number: int, what: str, file: str, words: str) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"tests/{file}", "-k", words]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
    line(number, f"{what} (tests/{file})", done.stdout.strip().splitlines()[-1], not done.returncode)


def elastic() -> None:
    """Line 2: other numbers of ranks after every resume."""
    by_pytest(2, "2, then 1, then 3, then 2 ranks with resumes", "trainer/test_layouts.py", "any_number")


def faults() -> None:
    """Line 3: the fault matrix, beside plain Lightning + webdataset."""
    with tempfile.TemporaryDirectory() as folder:
        for system in ("ours", "baseline"):
            command = [sys.executable, "experiments/faults/run.py", "--system", system, "--out", folder]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for told in done.stdout.splitlines():
                print(f"[3] {system} {told}", flush=True)
            line(3, f"all rows, {system}", f"exit status {done.returncode}", done.returncode == 0 if system == "ours" else None)


def looking() -> None:
    """Line 4: sampling and evaluation leave training as it is; prompts are split over ranks."""
    by_pytest(4, "state hash with sampling, validation and evaluation on and off, one process", "test_train.py", "leave_training")
    by_pytest(4, "the same on two ranks, FSDP2", "trainer/test_launch.py", "looking_at")
    from layout_work import run_ranks, sampled

    alone, _ = run_ranks(1, sampled, {}, True)[0]
    for layout in ({"shard": 2}, {"shard": 3}, {"replicate": 2}, {"context": 2}):
        size = list(layout.values())[0]
        for gather in (True, False):
            ranks = run_ranks(size, sampled, layout, gather)
            far = max(float((a - b).abs().max()) for clips, _ in ranks for a, b in zip(clips, alone, strict=True))
            same = all(moved == 0 for _, moved in ranks)
            how = "weights whole" if gather else "weights cut"
            told = f"furthest value of a clip {far:.1e}, weights afterwards {'bit-equal' if same else 'changed'}"
            line(4, f"seven prompts over {layout}, {how}, float32", told, far < 1e-4 and same)


def shares() -> None:
    """Line 5, the first half: what a rank holds."""
    from layout_work import held, run_ranks

    whole = run_ranks(1, held, {})[0]
    for size in (2, 3):
        for rank, mine in enumerate(run_ranks(size, held, {"shard": size})):
            told = ", ".join(f"{name} {mine[name] / whole[name]:.3f}" for name in whole)
            right = all(abs(mine[name] / whole[name] - 1 / size) < 0.1 / size for name in whole)
            line(5, f"fsdp {size}, rank {rank} holds of", told, right)


COMMON = (
    "logger=none", "model.width=32", "model.heads=2", "text.dim=32", "text.buckets=64", "data.batch_size=8", "max_clips=48",
    "every.record=8", "every.save=24", "every.sample=0", "every.validate=0", "every.monitor=0", "trainer.precision=32-true",
    "optimisers.warmup_clips=16", "trainer.devices=2", "trainer.layout.shard=2",
)  # fmt: skip


def prediction() -> None:
    """Line 5, the second half: what the plan says a rank will hold, beside what two real steps hold there."""
    from layout_work import errors, planned, run_ranks

    small = ("model=small", "data.batch_size=2", "model.depth=6")
    configs = {
        "tiny, bf16, written-out attention, Muon": (),
        "small, float32, sdpa, recompute full": (*small, "trainer.precision=32-true", "model/attention=sdpa", "trainer.recompute=full"),
        "tiny, cross-attention, AdamW, a bucket of 17 frames, 3 micro-batches": (
            "model.text=cross", "optimisers=adamw", "data.buckets=[{num_frames: 1}, {num_frames: 17, height: 48}]", "data.micro_batches=3",
        ),
        "tiny, fsdp 2, recompute selective": ("trainer.devices=2", "trainer.layout.shard=2", "trainer.recompute=selective"),
    }  # fmt: skip
    for name, words in configs.items():
        for predicted, found in run_ranks(2 if "fsdp 2" in name else 1, planned, words):
            off = errors(predicted, found)
            part = max(off, key=lambda part: abs(off[part]))
            told = f"{predicted.peak / 1e6:.2f} MB at the peak, measured {found.peak / 1e6:.2f}, error {off['peak']:+.2%}"
            line(5, f"plan of {name}", f"{told}; furthest off: {part} {off[part]:+.2%}", max(map(abs, off.values())) < 0.1)


def memory() -> None:
    """Line 5: a rank's memory, held and predicted."""
    shares()
    prediction()


def launchers() -> None:
    """Line 6: the README's commands under torchrun, submitit's local executor and as a sweep, on small data and a small model."""
    program = str(ROOT / ".venv/bin/dit-video") if (ROOT / ".venv/bin/dit-video").exists() else "dit-video"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", program]
    submitit = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [program, "data", "world", f"out={folder}/world", "clips=64", "shard_size=32", "num_prompts=8"],
            check=True,
            capture_output=True,
        )
        common = [*COMMON, f"data.shards={folder}/world/*.tar", f"runs={folder}/runs"]
        for name, command, trials in (
            ("two processes of its own", [program, "train", "model.depth=2"], 1),
            ("torchrun", [*torchrun, "train", "model.depth=2"], 1),
            ("submitit local, 2 trials", [program, "train", "-m", *submitit, "model.depth=1,2"], 2),
            ("sweep of 3 trials, two processes each", [program, "train", "-m", "model.depth=1,2,3"], 3),
            ("torchrun, sweep of 3 trials", [*torchrun, "train", "-m", "model.depth=1,2,3"], 3),
        ):
            run = name.split(",")[0].replace(" ", "_") + str(trials)
            done = subprocess.run([*command, f"name={run}", *common], cwd=ROOT, capture_output=True, text=True, env=environment())
            where = Path(folder, "runs", run)
            depth = {len(path.relative_to(where).parts) - 1 for path in where.rglob("summary.json")}
            whole = [json.loads(path.read_text())["clips"] == 48 for path in where.rglob("summary.json")]
            right = not done.returncode and len(whole) == trials and all(whole) and depth == {int(trials > 1)}
            told = f"exit status {done.returncode}, {len(whole)} runs of 48 clips in folders {sorted(depth)} deep"
            line(6, name, told + ("" if right else f"; {done.stderr[-500:]}"), right)


def environment() -> dict[str, str]:
    """This shell's, without what a launcher may have left there."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"OMP_NUM_THREADS": "1"}


def gpu() -> None:
    """Line 7: one GPU."""
    import torch

    if not torch.cuda.is_available():
        line(7, "1.3b at 32,760 tokens on one GPU", "unmeasured, there is none here; experiments/benchmarks/gpu.sh prints it")
        return
    done = subprocess.run(["bash", "experiments/benchmarks/gpu.sh"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for told in done.stdout.splitlines():
        print(f"[7] {told}", flush=True)
    line(7, "gpu.sh", f"exit status {done.returncode}", not done.returncode)


LINES: dict[int, Callable[[], None]] = {
    1: same_mathematics, 2: elastic, 3: faults, 4: looking, 5: memory, 6: launchers, 7: gpu,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(show(LINES))
