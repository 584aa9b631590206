"""Numbers on held-out things while training goes on: the loss under fixed noise, and the metrics of an evaluation."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import lightning as L
import torch

from dit_video.eval.estimate import Estimate
from dit_video.shapes import Batch, grid_of
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class ValidationLoss(EveryClips):
    """Records val/loss and val/loss/level/<t> and val/loss/task/<task>: held-out clips, the same noise every time, averaged weights.

    Every clip is corrupted at each of the levels; val/loss is the plain mean over clips and levels, in velocity space.
    """

    def __init__(self, every_clips: int, batches: Callable[[], Iterable[Batch]]) -> None:
        super().__init__(every_clips)
        self.batches = batches

    @torch.no_grad()
    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        values: dict[str, list[float]] = defaultdict(list)
        objective, network = module.objective, module.ema.network
        for batch in self.batches():
            batch = batch.to(module.device)
            patch = network.transformer.patch
            grid = grid_of(batch.video, patch)
            for level in LEVELS:
                corrupted = objective.corrupt(batch, patch, network.transformer.reference_rate, time=level)
                with trainer.strategy.precision_plugin.forward_context():
                    losses = objective.compare(network, batch, corrupted, grid)
                for loss, task, weight in zip(losses.velocity.tolist(), losses.tasks, batch.weights.tolist(), strict=True):
                    for name in ("", f"/level/{level}", f"/task/{task}"):
                        values[f"val/loss{name}"] += [loss] * (weight > 0)
        record(trainer, module, {name: sum(v) / len(v) for name, v in sorted(values.items()) if v})


class Evaluating(EveryClips):
    """Records eval/<metric>.<suite>.<field> as `evaluate` finds them for the averaged weights."""

    def __init__(self, every_clips: int, evaluate: Callable[[VideoDiffusion], dict[str, Estimate]]) -> None:
        super().__init__(every_clips)
        self.evaluate = evaluate

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        record(trainer, module, {f"eval/{name}": estimate.value for name, estimate in self.evaluate(module).items()})
