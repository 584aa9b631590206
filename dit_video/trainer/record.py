"""Where numbers go: metrics.jsonl in the run's folder is the record, wandb and TensorBoard are mirrors that may fail."""

import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
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
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
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


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a crash


class Mirror(Logger):
    """A logger that never stops training: its first failure is told, then it is left alone."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.target: Logger | None = self._try("starting", make)

    @property
    def name(self) -> str:
        return "mirror"

    @property
    def version(self) -> str:
        return ""

    def _try(self, what: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # whatever a service of others does, the run goes on
            log.warning("a logger failed while %s and is left out from here on: %s", what, error)
            self.target = None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        if self.target is not None:
            self._try("taking the config", self.target.log_hyperparams, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.target is not None:
            self._try("taking metrics", self.target.log_metrics, dict(metrics), step)

    def log_video(self, name: str, paths: list[str], captions: list[str], step: int) -> None:
        """Shows mp4 files, where the service can."""
        if isinstance(self.target, WandbLogger):
            self._try(
                "taking videos", self.target.log_video, name, paths, step=step, caption=captions, format=["mp4"] * len(paths)
            )

    def finalize(self, status: str) -> None:
        if self.target is not None:
            self._try("closing", self.target.finalize, status)
        if isinstance(self.target, WandbLogger):
            self._try("closing", self.target.experiment.finish)


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
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({"clips": module.clips, **metrics}, step=module.steps)
