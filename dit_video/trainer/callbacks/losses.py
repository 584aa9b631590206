"""The loss, by task and by noise level."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from dit_video.shapes import Batch
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.layout import all_gathered
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

NUM_BINS = 5


class LossRecord(EveryClips):
    """Records means since its last record: train/loss, train/loss/task/<task>, train/loss/level/<from>-<to>, train/loss/extra/<name>."""

    def __init__(self, every_clips: int) -> None:
        super().__init__(every_clips)
        self.kept: list[Any] = []
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if self.every_clips > 0:
            self.kept += pl_module.losses
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        if any(all_gathered(bool(self.kept))):  # so that every step is in one record, also of a run that stops early
            self.act(trainer, pl_module)

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        values: dict[str, list[float]] = defaultdict(list)
        for losses, weights in self.kept:
            extra = {name: value.tolist() for name, value in losses.extra.items()}
            rows = zip(losses.velocity.tolist(), losses.time.tolist(), losses.tasks, weights.tolist(), strict=True)
            for row, (loss, level, task, weight) in enumerate(rows):
                if weight > 0:
                    values["train/loss"].append(loss)
                    values[f"train/loss/task/{task}"].append(loss)
                    values[level_name(level)].append(loss)
                    for name, of_clip in extra.items():
                        values[f"train/loss/extra/{name}"].append(of_clip[row])
        self.kept = []
        rate = next(iter(module.named_optimisers.values())).param_groups[0]
        metrics = means_over_ranks(values)
        progress = {"time": time.perf_counter() - self.started, "train/rate": rate["lr"] / rate["peak_lr"]}
        record(trainer, module, progress | metrics)


def means_over_ranks(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of every name's values, of all ranks together; all of them must ask."""
    mine = {name: (sum(found), len(found)) for name, found in values.items()}
    ranks: list[Any] = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
    totals: dict[str, tuple[float, int]] = {}
    for rank in ranks:
        for name, (total, count) in rank.items():
            before = totals.get(name, (0.0, 0))
            totals[name] = before[0] + total, before[1] + count
    return {name: total / count for name, (total, count) in sorted(totals.items())}


def level_name(level: float, prefix: str = "train/loss/level") -> str:
    """The bin of a noise level, such as train/loss/level/0.2-0.4."""
    bin_ = min(int(level * NUM_BINS), NUM_BINS - 1)
    return f"{prefix}/{bin_ / NUM_BINS:.1f}-{(bin_ + 1) / NUM_BINS:.1f}"
