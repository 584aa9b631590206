"""Where numbers go: metrics.jsonl in the run's folder is the record, wandb and TensorBoard are mirrors that may fail."""

import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from dit_video.trainer.module import VideoDiffusion

log = logging.getLogger(__name__)


class JsonlRecord(Logger):
    """Appends one JSON object a call to metrics.jsonl; on resume, lines after the step that is resumed from are dropped."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if step_of(line) <= resume_step]
            draft = path.with_suffix(".draft")
            draft.write_text("".join(line + "\n" for line in kept))
            os.replace(draft, path)  # a full disk leaves the record as it was

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # JSON has no NaN; a number that is none is worth a line all the same.
        values = {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def step_of(line: str) -> int:
    """The step that a line of a record belongs to; of one that was cut off by a crash, one that never comes."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62


class Mirror(Logger):
    """A logger of someone else's that cannot stop or slow down training: it is made, fed and closed in a thread of its own.

    Its first failure is told, then it is left alone; where it is too slow, what does not fit into its queue is left out of it.
    """

    def __init__(self, make: Callable[[], Logger], patience: float = 30.0, room: int = 1000) -> None:
        super().__init__()
        self.patience = patience  # seconds that its closing is waited for
        self.calls: Queue[tuple[str, Callable[[Logger], object]] | None] = Queue(room)
        self.failed = self.full = False
        self.thread = Thread(target=self._work, args=(make,), daemon=True, name="mirror")
        self.thread.start()

    @property
    def name(self) -> str:
        return "mirror"

    @property
    def version(self) -> str:
        return ""

    def _work(self, make: Callable[[], Logger]) -> None:
        what = "starting"
        try:
            target = make()
            while (call := self.calls.get()) is not None:
                what, work = call
                work(target)
            what = "closing"
            target.finalize("success")
            if isinstance(target, WandbLogger):
                target.experiment.finish()
        except BaseException as error:  # whatever a service of others does, the run goes on
            log.warning("a logger failed while %s and is left out from here on: %s", what, error)
            self.failed = True

    def _put(self, what: str, work: Callable[[Logger], object]) -> None:
        if self.failed:
            return
        try:
            self.calls.put_nowait((what, work))
        except Full:
            if not self.full:
                log.warning("a logger does not keep up; what it misses is in metrics.jsonl all the same")
            self.full = True

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._put("taking the config", lambda target: target.log_hyperparams(params))  # type: ignore[arg-type]

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        self._put("taking metrics", lambda target: target.log_metrics(values, step))

    def log_video(self, name: str, paths: list[str], captions: list[str], step: int) -> None:
        """Shows mp4 files, where the service can."""

        def show(target: Logger) -> None:
            if isinstance(target, WandbLogger):
                target.log_video(name, paths, step=step, caption=captions, format=["mp4"] * len(paths))

        self._put("taking videos", show)

    def finalize(self, status: str) -> None:
        """Waits, for a while, until all of it is handed on."""
        if self.failed or not self.thread.is_alive():
            return
        with suppress(Full):
            self.calls.put(None, timeout=self.patience)
        self.thread.join(self.patience)
        if self.thread.is_alive():
            self.failed = True
            with suppress(Empty):  # what waits is given up, so that the thread ends if it is ever let
                while True:
                    self.calls.get_nowait()
            self.calls.put(None)
            log.warning("a logger did not close within %g s and is left alone", self.patience)


def wandb_mirror(folder: Path, project: str = "dit_video", mode: str = "offline", name: str | None = None) -> Mirror:
    """Mirrors metrics and samples to Weights & Biases; offline, they wait in the run's folder for `wandb sync`."""

    def start() -> WandbLogger:
        import wandb

        quiet = wandb.Settings(silent=True)  # its summary is metrics.jsonl's, told twice
        logger = WandbLogger(
            project=project, name=name or folder.name, save_dir=folder, offline=mode == "offline", mode=mode, settings=quiet
        )
        _ = logger.experiment  # starts the service now, so that a failure is known now
        return logger

    folder.mkdir(parents=True, exist_ok=True)
    return Mirror(start)


def tensorboard_mirror(folder: Path) -> Mirror:
    """Mirrors metrics to TensorBoard event files in the run's folder (extra: tensorboard)."""
    return Mirror(lambda: TensorBoardLogger(save_dir=folder, name="tensorboard", version=""))


def record(trainer: L.Trainer, module: VideoDiffusion, metrics: Mapping[str, float]) -> None:
    """Sends numbers to the record and its mirrors, with the step and the clips they belong to."""
    module.latest |= {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({"clips": module.clips, **metrics}, step=module.steps)
