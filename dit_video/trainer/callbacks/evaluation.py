"""Numbers on held-out things while training goes on: the loss under fixed noise, and the metrics of an evaluation."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import lightning as L
import torch

from dit_video.eval.estimate import Estimate
from dit_video.model.network import Network
from dit_video.shapes import Batch
from dit_video.trainer.callbacks.every import Aside
from dit_video.trainer.heart import beat
from dit_video.trainer.layout import all_gathered
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class ValidationLoss(Aside):
    """Records val/loss and val/loss/level/<t> and val/loss/task/<task>: held-out clips, the same noise every time, averaged weights.

    Every clip is corrupted at each of the levels; val/loss is the plain mean over clips and levels, in velocity space.
    """

    name = "validation"

    def __init__(self, every_clips: int, batches: Callable[[], Iterable[Batch]]) -> None:
        super().__init__(every_clips)
        self.batches = batches

    @torch.no_grad()
    def look(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        with module.averaged() as network:
            ranks = all_gathered(self._losses(trainer, module, network))
        names = {name for values in ranks for name in values}
        values = {name: [value for found in ranks for value in found.get(name, ())] for name in names}
        record(trainer, module, {name: sum(v) / len(v) for name, v in sorted(values.items()) if v})

    def _losses(self, trainer: L.Trainer, module: VideoDiffusion, network: Network) -> dict[str, list[float]]:
        """Of the batches that this rank takes: a share where it needs no other rank for the transformer, otherwise, on rank 0, all."""
        layout, shared = module.parallel.layout, module.parallel.gather_to_sample
        rank, size = (layout.data_rank(trainer.global_rank), layout.data_size) if shared else (0, 1)
        values: dict[str, list[float]] = defaultdict(list)
        objective = module.objective

        def take(batch: Batch, counts: bool = True) -> None:
            batch = network.as_latents(batch.to(module.device))
            for level in LEVELS:
                corrupted = objective.corrupt(batch, network.tokens, time=level)
                with trainer.strategy.precision_plugin.forward_context():
                    losses = objective.compare(network, batch, corrupted)
                for loss, task, weight in zip(losses.velocity.tolist(), losses.tasks, batch.weights.tolist(), strict=True):
                    for name in ("", f"/level/{level}", f"/task/{task}"):
                        values[f"val/loss{name}"] += [loss] * (counts and weight > 0)

        number = 0
        for number, batch in enumerate(self.batches(), 1):
            beat("validation")
            if (number - 1) % size == rank:
                take(batch)
        if network.is_cut and rank >= number % size > 0:  # all ranks use what is cut equally often
            take(batch, counts=False)
        return values if trainer.global_rank % layout.context == 0 and (shared or trainer.is_global_zero) else {}


class Evaluating(Aside):
    """Records eval/<metric>.<suite>.<field> as `evaluate` finds them for the averaged weights."""

    name = "evaluation"

    def __init__(self, every_clips: int, evaluate: Callable[[VideoDiffusion], dict[str, Estimate]]) -> None:
        super().__init__(every_clips)
        self.evaluate = evaluate

    def look(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        record(trainer, module, {f"eval/{name}": estimate.value for name, estimate in self.evaluate(module).items()})
