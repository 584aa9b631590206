"""Where a step's time goes: a table and a trace by torch's profiler."""

from pathlib import Path

from lightning.pytorch.profilers import PyTorchProfiler
from torch.profiler import schedule


def step_profiler(folder: Path) -> PyTorchProfiler:
    """Profiles ten steps after five of warm-up into profile/fit-steps.txt and profile/*.json, a trace for a browser to show."""
    out = folder / "profile"
    out.mkdir(parents=True, exist_ok=True)
    return PyTorchProfiler(
        dirpath=out,
        filename="steps",
        export_to_chrome=True,
        sort_by_key="cpu_time_total",
        row_limit=40,
        schedule=schedule(wait=3, warmup=2, active=10, repeat=1),
    )
