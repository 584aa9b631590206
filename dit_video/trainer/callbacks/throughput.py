"""Clips and tokens a second, the share of time spent in steps, and MFU."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from dit_video.shapes import Batch
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

# Published dense bf16 peaks in FLOP/s, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Throughput(EveryClips):
    """Records perf/clips_per_second, perf/tokens_per_second, perf/share_in_steps and perf/mfu since its last record.

    On a CUDA device perf/peak_memory_gib, too: the most that tensors held of it since then.

    MFU is the model's arithmetic in training (three times a forward pass) over the device's published bf16 peak; where none is
    known, as on a CPU, over what a large bf16 product reaches at the start of the run.
    """

    def __init__(self, every_clips: int, flops_per_clip: Callable[[VideoDiffusion, Batch], float]) -> None:
        super().__init__(every_clips)
        self.flops_per_clip = flops_per_clip
        self.in_steps = self.step_started = 0.0
        self.clips = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        self.peak = peak_flops(pl_module.device)
        self.window_started = time.perf_counter()
        self.flops: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        self.step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if pl_module.device.type == "cuda" and self.due(pl_module.clips, batch):  # once a record: the device may run behind
            torch.cuda.synchronize()
        self.in_steps += time.perf_counter() - self.step_started
        self.clips += batch.step_clips  # of all ranks
        if self.flops is None:
            self.flops = self.flops_per_clip(pl_module, batch)
            self.tokens = pl_module.network.grid(batch).num_tokens
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        now = time.perf_counter()
        speed = self.clips / self.in_steps
        metrics = {
            "perf/clips_per_second": speed,
            "perf/tokens_per_second": speed * self.tokens,
            "perf/share_in_steps": self.in_steps / (now - self.window_started),
            "perf/mfu": speed * (self.flops or 0.0) / (self.peak * trainer.world_size),
        }
        if module.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
            torch.cuda.reset_peak_memory_stats(module.device)
        record(trainer, module, metrics)
        self.in_steps, self.clips, self.window_started = 0.0, 0, now


def peak_flops(device: torch.device) -> float:
    """FLOP/s in bf16: published for known devices, else measured on a product of two 1024 x 1024 matrices, the best of five."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    x, best = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16), 1e9
    for _ in range(5):
        started = time.perf_counter()
        (x @ x).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
