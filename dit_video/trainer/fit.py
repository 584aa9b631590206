"""Puts a module, its batches and its callbacks into Lightning's trainer and runs it."""

import ctypes
import logging
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger

from dit_video.trainer.layout import Layout, MeshStrategy
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.parallel import Parallel, Precision, Recompute


@dataclass
class Hardware:
    """What training runs on; the keys are those of Lightning's Trainer, and the number of CPU threads."""

    accelerator: str = "cpu"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "bf16-mixed"
    threads: int | None = None  # of a CPU; none: one a core
    layout: Layout | dict[str, int | None] = field(default_factory=Layout)  # of all devices on all nodes
    recompute: Recompute = "none"
    compile: bool = False
    gather_to_sample: bool = True
    gather_precision: Precision = "float32"
    offload_ema: bool = False
    max_hours: float | None = None
    hang_seconds: float | None = None
    restarts: int = 0

    @property
    def parallel(self) -> Parallel:
        """How the networks are laid out over the devices."""
        assert isinstance(self.layout, Layout)
        return Parallel(self.layout, self.recompute, self.compile, self.gather_to_sample, self.gather_precision)

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            if not str(getattr(self, name)).isdecimal() or int(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}; set trainer.{name}")
        sizes = vars(self.layout) if isinstance(self.layout, Layout) else self.layout
        self.layout = Layout.of(int(self.devices) * self.num_nodes, **sizes)
        _ = self.parallel  # which refuses what it cannot do
        if self.precision not in ("32-true", "bf16-mixed"):  # float16 would need its losses scaled
            raise ValueError(f"precision must be 32-true or bf16-mixed, got {self.precision!r}; set trainer.precision")
        if self.gather_precision == "bfloat16" and self.precision != "bf16-mixed":
            raise ValueError("weights in bfloat16 need trainer.precision=bf16-mixed; set it, or trainer.gather_precision=float32")
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads >= 1):
            raise ValueError(f"threads must be a whole number of at least 1, or null, got {self.threads!r}; set trainer.threads")
        for name in ("max_hours", "hang_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, or null, got {value!r}; set trainer.{name}")
        if not isinstance(self.restarts, int) or self.restarts < 0:
            raise ValueError(f"restarts must be a whole number of at least 0, got {self.restarts!r}; set trainer.restarts")
        if self.accelerator not in ("cpu", "gpu", "cuda", "mps", "auto"):
            raise ValueError(f"accelerator must be cpu, gpu, mps or auto, got {self.accelerator!r}; set trainer.accelerator")


class Spent:
    """What a piece of work has taken since this was made, and what earlier parts of it took."""

    def __init__(self) -> None:
        self._wall, self._core = time.perf_counter(), _core_seconds()

    def add(self, wall_seconds: float, core_seconds: float) -> None:
        """Counts an earlier part."""
        self._wall, self._core = self._wall - wall_seconds, self._core - core_seconds

    @property
    def wall_seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def core_seconds(self) -> float:
        """Of this process and the children it has waited for, on all cores."""
        return _core_seconds() - self._core


def fit(
    module: VideoDiffusion,
    batches: Any,
    callbacks: Sequence[L.Callback],
    loggers: list[Logger],
    hardware: Hardware,
    **options: Any,
) -> None:
    """Trains until the batches end; `options` go to Lightning's Trainer as they are, such as a profiler."""
    _be_quiet()
    keep_memory()
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    layout = hardware.parallel.layout
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=hardware.strategy if layout.world_size == 1 else MeshStrategy(layout),
        precision=hardware.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()]
        if layout.world_size == 1
        else None,  # or it would take a job of one process in SLURM for many
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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*is a wrapped model.*",
        ".*IterableDataset.*",
        ".*in eval mode.*",
        ".*LeafSpec.*",
        ".*all_gather_into_tensor. is deprecated.*",  # what takes its place is not in torch 2.11
        "FSDP2-wrapped module .* returned a view tensor.*",  # which nobody writes into
    ):
        warnings.filterwarnings("ignore", message)
