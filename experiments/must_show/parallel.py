"""Prints what training on several ranks must show, measured here and now with real processes on gloo; allow ten minutes.

    make setup && .venv/bin/python experiments/must_show/parallel.py            # everything that is built so far
    .venv/bin/python experiments/must_show/parallel.py 1 5                      # some of the lines

A line ends in PASS or FAIL. Not yet built, and so not shown: faults (3), the plan's prediction (half of 5), launchers but torchrun (6).
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

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


def by_pytest(number: int, what: str, words: str) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/trainer/test_layouts.py", "-k", words]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
    line(number, f"{what} (tests/trainer/test_layouts.py)", done.stdout.strip().splitlines()[-1], not done.returncode)


def elastic() -> None:
    """Line 2: other numbers of ranks after every resume."""
    by_pytest(2, "2, then 1, then 3, then 2 ranks with resumes", "any_number")


def shared_prompts() -> None:
    """Line 4, the second half: prompts split over ranks."""
    by_pytest(4, "the program under torchrun, prompts split over ranks", "torchrun")


def shares() -> None:
    """Line 5, the first half: what a rank holds."""
    from layout_work import held, run_ranks

    whole = run_ranks(1, held, {})[0]
    for size in (2, 3):
        for rank, mine in enumerate(run_ranks(size, held, {"shard": size})):
            told = ", ".join(f"{name} {mine[name] / whole[name]:.3f}" for name in whole)
            right = all(abs(mine[name] / whole[name] - 1 / size) < 0.1 / size for name in whole)
            line(5, f"fsdp {size}, rank {rank} holds of", told, right)


LINES: dict[int, Callable[[], None]] = {1: same_mathematics, 2: elastic, 4: shared_prompts, 5: shares}


if __name__ == "__main__":
    sys.exit(show(LINES))
