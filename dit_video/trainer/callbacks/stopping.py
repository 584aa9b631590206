"""Stopping early in such a way that nothing is lost: on a signal, or when the time that was allotted is over."""

import logging
import signal
import time
from typing import Any

import lightning as L

from dit_video.trainer.heart import beat
from dit_video.trainer.module import VideoDiffusion

log = logging.getLogger(__name__)

STOP = "stop"  # a rank's vote
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopping(L.Callback):
    """Ends training after the step in which any rank has got SIGTERM or SIGUSR1, or when so many hours are over.

    Lightning's own handler talks to other ranks from inside a signal, where they may be in the middle of something else; here a signal
    only leaves a mark, which the ranks agree on with their next step. It must come before the callbacks that take long.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.max_hours = max_hours
        self.started = time.monotonic()
        self.why = ""
        self.before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this rank wants to stop."""
        if not self.why and self.max_hours is not None and time.monotonic() - self.started > 3600 * self.max_hours:
            self.why = f"{self.max_hours:g} hours are over"
        return bool(self.why)

    def on_train_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        pl_module.votes[STOP] = False
        self.stopped = False
        self.before = {number: signal.signal(number, self._mark) for number in SIGNALS}  # by now Lightning has set its own

    def _mark(self, number: int, frame: object) -> None:
        self.why = self.why or f"got {signal.Signals(number).name}"

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, batch: Any, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        beat("step", pl_module.steps)
        pl_module.votes[STOP] = self.asked

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Any, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        beat("waiting for clips", pl_module.steps)
        if pl_module.counts.get(STOP, 0) > 0 and pl_module.clips < pl_module.max_clips:
            log.warning("stopping after step %d: %s", pl_module.steps, self.why or "another rank was told to")
            self.stopped = trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: VideoDiffusion, stage: str) -> None:  # type: ignore[override]
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
