"""Health of training: gradient norms, update-to-weight ratios and the largest attention logit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dit_video.model.attention import Attention, key_mask
from dit_video.shapes import Batch
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.parallel import whole
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
        if self.due(pl_module.clips + batch.step_clips, batch):
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
        groups: dict[str, list[str]] = defaultdict(list)
        named = dict(module.network.named_parameters())
        for name in named:
            groups[group_of(name)].append(name)
        metrics = {"grad/norm": float(module.gradient_norm)}
        for group, names in groups.items():
            before = [self.before[name] for name in names]
            gradients = [gradient for name in names if (gradient := named[name].grad) is not None]
            change = _norm([named[name].detach() - old for name, old in zip(names, before, strict=True)])
            metrics[f"grad/norm/{group}"] = _norm(gradients)
            metrics[f"update/ratio/{group}"] = change / max(_norm(before), 1e-6)
        metrics["attention/largest_logit"] = max(watched.largest for watched in self.watched)
        record(trainer, module, metrics)


NUM_QUERIES = 64  # that the largest logit is looked for among, evenly spread: all of a long clip's logits would not fit in memory


class Watched:
    """An attention function that keeps its largest logit, padding left out."""

    def __init__(self, attend: Attention) -> None:
        self.attend, self.largest = attend, 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, lengths: Tensor | None) -> Tensor:
        with torch.no_grad():
            some = query[:, :, :: -(-query.shape[2] // NUM_QUERIES)]
            logits = (some @ key.mT).abs() * query.shape[-1] ** -0.5
            if lengths is not None:
                logits = logits.masked_fill(~key_mask(lengths, key.shape[2]), 0)
            if logits.numel():  # one of two experts may have no clips
                self.largest = max(self.largest, float(logits.max()))
        return self.attend(query, key, value, places, lengths)


def _norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all tensors as one vector."""
    return float(torch.stack([whole(norm) for norm in torch._foreach_norm(list(tensors))]).norm()) if tensors else 0.0


def group_of(name: str) -> str:
    """The group of a parameter: text, blocks.<number>, or ends.<stream>."""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(parts[:2]) if parts[0] in ("blocks", "ends") else parts[0]
