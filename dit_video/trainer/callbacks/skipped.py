"""Steps that the weights did not follow."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L

from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record, step_of

log = logging.getLogger(__name__)


class SkippedSteps(L.Callback):
    """Appends a line to skipped_steps.jsonl for each step that was left out: its number, why, and each clip with its loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        if trainer.is_global_zero and self.path.is_file():  # what comes after the checkpoint that is gone on from, comes again
            lines = [line for line in self.path.read_text().splitlines() if step_of(line) < pl_module.steps]
            self.count = len(lines)
            draft = self.path.with_suffix(".draft")
            draft.write_text("".join(line + "\n" for line in lines))
            draft.replace(self.path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Any, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        self._tell(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: VideoDiffusion, exception: BaseException) -> None:  # type: ignore[override]
        self._tell(trainer, pl_module)

    def _tell(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        skipped, module.skipped = module.skipped, None
        if skipped is None:
            return
        self.count += 1
        log.warning("STEP %d LEFT OUT: %s; its clips are in %s", skipped.step, skipped.reason, self.path)
        if trainer.is_global_zero:
            clips = {key: loss if abs(loss) < float("inf") else str(loss) for key, loss in skipped.clips.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": skipped.step, "reason": skipped.reason, "clips": clips}) + "\n")
        record(trainer, module, {"skipped_steps": float(self.count)})
