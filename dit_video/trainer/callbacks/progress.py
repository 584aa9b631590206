"""The progress bar: clips, loss, clips a second and the time left; without a terminal, a line now and then."""

import logging
import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_video.shapes import Batch
from dit_video.trainer.module import VideoDiffusion

log = logging.getLogger(__name__)

LINES = 20  # a run tells of itself where there is no terminal


class ProgressBar(L.Callback):
    """Shows where training is, at most five times a second."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.loss: float | None = None
        self.shown = self.started = 0.0
        self.clips_before = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        self.started, self.clips_before = time.perf_counter(), pl_module.clips
        if not trainer.is_global_zero:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clips"),
            TextColumn("{task.fields[told]}"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn())
        if self.bar.console.is_terminal:
            self.bar.start()
        self.task = self.bar.add_task("training", total=pl_module.max_clips, completed=pl_module.clips, told="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        now = time.perf_counter()
        if self.bar is None or (now - self.shown < 0.2 and pl_module.clips < pl_module.max_clips):
            return
        loss = float(outputs["loss"])
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        speed = (pl_module.clips - self.clips_before) / (now - self.started)
        told = f"loss {self.loss:.4f}, {speed:.0f} clips/s"
        self.shown = now
        self.bar.update(self.task, completed=pl_module.clips, told=told)
        every = max(pl_module.max_clips // LINES, 1)
        if not self.bar.console.is_terminal and (pl_module.clips // every > getattr(self, "lines", 0)):
            self.lines = pl_module.clips // every
            left = max(pl_module.max_clips - pl_module.clips, 0) / max(speed, 1e-9)
            log.info("%d of %d clips, %s, %.0f s left", pl_module.clips, pl_module.max_clips, told, left)

    def on_train_end(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: VideoDiffusion, exception: BaseException) -> None:  # type: ignore[override]
        if self.bar is not None:
            self.bar.stop()
