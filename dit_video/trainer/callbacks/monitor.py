"""Health of training: gradient norms, update-to-weight ratios and the largest attention logit."""

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dit_video.model.attention import Attention
from dit_video.shapes import Batch
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record


class Monitor(EveryClips):
    """Looks closely at one step in a while, so that it costs less than a hundredth of training.

    Records grad/norm (before clipping), grad/norm/<group> (after), update/ratio/<group> (norm of the change over norm of the weights)
    and attention/largest_logit; groups are the blocks, the streams' ends and the text encoder.
    """

    before: dict[str, Tensor] | None = None
    watched: list["Watched"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if self.due(pl_module.clips + len(batch.captions), batch):
            self.before = {name: p.detach().clone() for name, p in pl_module.network.named_parameters()}
            self.watched = []
            for block in pl_module.network.transformer.blocks:
                self.watched.append(Watched(block.attend))
                block.attend = self.watched[-1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Batch, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if self.before is not None:
            for block, watched in zip(pl_module.network.transformer.blocks, self.watched, strict=True):
                block.attend = watched.attend
            self.act(trainer, pl_module)
            self.before = None

    @torch.no_grad()
    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        assert self.before is not None
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # of gradients, changes, weights
        for name, parameter in module.network.named_parameters():
            group = squares[group_of(name)]
            group[0] += float(parameter.grad.square().sum()) if parameter.grad is not None else 0.0
            group[1] += float((parameter - self.before[name]).square().sum())
            group[2] += float(self.before[name].square().sum())
        metrics = {"grad/norm": float(module.gradient_norm)}
        for name, (gradient, change, weight) in squares.items():
            metrics[f"grad/norm/{name}"] = gradient**0.5
            metrics[f"update/ratio/{name}"] = (change / max(weight, 1e-12)) ** 0.5
        metrics["attention/largest_logit"] = max(watched.largest for watched in self.watched)
        record(trainer, module, metrics)


class Watched:
    """An attention function that keeps its largest logit."""

    def __init__(self, attend: Attention) -> None:
        self.attend, self.largest = attend, 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, lengths: Tensor | None) -> Tensor:
        with torch.no_grad():
            self.largest = max(self.largest, float((query @ key.mT).abs().max()) * query.shape[-1] ** -0.5)
        return self.attend(query, key, value, places, lengths)


def group_of(name: str) -> str:
    """The group of a parameter: text, blocks.<number>, or ends.<stream>."""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(parts[:2]) if parts[0] in ("blocks", "ends") else parts[0]
