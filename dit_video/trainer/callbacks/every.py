"""Callbacks that act each time a number of clips has gone by."""

import logging
from typing import Any

import lightning as L

from dit_video.shapes import Batch
from dit_video.trainer.heart import beat
from dit_video.trainer.layout import RankFailed, together
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

log = logging.getLogger(__name__)


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


class Aside(EveryClips):
    """Something beside training, which fails without stopping it: the error is told, and counted as failed/<name>.

    `look` must leave the module as it is, to the bit. Once a rank is told to stop, what is not yet begun is left out.
    """

    name: str

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        if trainer.should_stop:
            return
        beat(self.name)
        try:
            together(lambda: self.look(trainer, module))
        except RankFailed as problem:  # whatever it is: it is not worth the training
            if problem.interrupted:
                log.warning("%s is left out: %s", self.name, str(problem).partition(f"{InterruptedError.__name__}: ")[2])
            else:
                log.error("%s FAILED after %d clips, training goes on: %s", self.name, module.clips, problem)
                record(trainer, module, {f"failed/{self.name}": 1.0})
        beat("waiting for clips")

    def look(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        raise NotImplementedError
