"""Checkpoints of a training, and going on from one."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from dit_video.trainer import checkpoint
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.checkpoint import Checkpoint, CheckpointError
from dit_video.trainer.fit import Spent
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.parallel import whole


class Saving(EveryClips):
    """Saves every so many clips and at the end of training; goes on from a checkpoint where one is given."""

    def __init__(self, every_clips: int, folder: Path, keep: int, resume: Path | None, spent: Spent) -> None:
        super().__init__(every_clips)
        self.folder, self.keep, self.resume, self.spent = folder, keep, resume, spent

    def on_fit_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        if self.resume is not None:  # only now are the weights on their device, where the optimisers' state must be too
            restore(pl_module, self.resume)

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        saved = capture(module)  # by all ranks, each of which may hold a part
        if trainer.is_global_zero:
            saved.meta |= {"wall_seconds": self.spent.wall_seconds, "core_seconds": self.spent.core_seconds}
            checkpoint.save(self.folder, saved, self.keep)

    def on_train_end(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        self.act(trainer, pl_module)


def capture(module: VideoDiffusion) -> Checkpoint:
    """All that the next step depends on."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {"network": _whole(module.network), "ema": _whole(module.ema.network)}
    if len(module.objective.state_dict()):
        tensors["objective"] = _whole(module.objective)
    for name, optimiser in module.named_optimisers.items():
        tensors[f"optimiser-{name}"] = checkpoint.optimiser_state(optimiser, names)
    return Checkpoint(tensors, {"steps": module.steps, "clips": module.clips})


def _whole(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in part.state_dict().items()}


def restore(module: VideoDiffusion, path: Path) -> None:
    """Undoes capture; CheckpointError where the checkpoint is of another model."""
    saved = checkpoint.load(path)
    parts: dict[str, Any] = {"network": module.network, "ema": module.ema.network}
    if len(module.objective.state_dict()):
        parts["objective"] = module.objective
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    missing = [name for name in (*parts, *(f"optimiser-{name}" for name in module.named_optimisers)) if name not in saved.tensors]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]}; it was saved by another kind of run; set name")
    for name, part in parts.items():
        checkpoint.load_weights(part, saved.tensors[name], path)
    with torch.no_grad():
        for name, optimiser in module.named_optimisers.items():
            checkpoint.restore_optimiser(optimiser, names, saved.tensors[f"optimiser-{name}"])
    module.steps, module.clips = int(saved.meta["steps"]), int(saved.meta["clips"])
