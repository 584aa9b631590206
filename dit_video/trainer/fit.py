"""Puts a module, its batches and its callbacks into Lightning's trainer and runs it."""

import ctypes
import logging
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from dit_video.trainer.module import VideoDiffusion


@dataclass
class Hardware:
    """What training runs on; the keys are those of Lightning's Trainer."""

    accelerator: str = "cpu"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "bf16-mixed"


@dataclass
class Spent:
    """What a piece of work took."""

    wall_seconds: float = 0.0
    core_seconds: float = 0.0  # of this process and the children it has waited for, on all cores


def fit(module: VideoDiffusion, batches: Any, callbacks: Sequence[L.Callback], loggers: list[Logger], hardware: Hardware, **options: Any) -> None:
    """Trains until the batches end; `options` go to Lightning's Trainer as they are, such as a profiler."""
    _be_quiet()
    keep_memory()
    trainer = L.Trainer(
        **vars(hardware),
        max_epochs=1,  # the batches are all that is left of the run
        callbacks=list(callbacks),
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, batches)


@contextmanager
def timed() -> Iterator[Spent]:
    """Measures the wall time and the core-seconds of a block."""
    spent = Spent()
    wall, core = time.perf_counter(), _core_seconds()
    try:
        yield spent
    finally:
        spent.wall_seconds, spent.core_seconds = time.perf_counter() - wall, _core_seconds() - core


def _core_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def keep_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back to the system at every step, which cost a fifth of a CPU step."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in musl
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _be_quiet() -> None:
    """Lightning's notices about what we do on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*is a wrapped model.*", ".*no `LearningRateMonitor`.*", ".*IterableDataset.*"):
        warnings.filterwarnings("ignore", message)
