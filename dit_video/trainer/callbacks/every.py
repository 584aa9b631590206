"""Callbacks that act each time a number of clips has gone by."""

from typing import Any

import lightning as L

from dit_video.shapes import Batch
from dit_video.trainer.module import VideoDiffusion


class EveryClips(L.Callback):
    """Calls `act` after the step in which the count of clips passes a multiple of every_clips; 0: never."""

    def __init__(self, every_clips: int) -> None:
        self.every_clips = every_clips

    def due(self, clips: int, batch: Batch) -> bool:
        """Whether a step that ends at `clips` with this batch passes a multiple."""
        return self.every_clips > 0 and clips // self.every_clips > (clips - batch.step_clips) // self.every_clips

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if self.due(pl_module.clips, batch):
            self.act(trainer, pl_module)

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        raise NotImplementedError
