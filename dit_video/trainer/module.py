"""One training step, as Lightning calls it: losses of a batch, gradients, clipping, optimisers, moving average."""

import math
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dit_video.model.network import Network
from dit_video.objective.objective import Losses, Objective
from dit_video.shapes import Batch
from dit_video.trainer.ema import EMA
from dit_video.trainer.layout import all_sum
from dit_video.trainer.optim import Optimisers
from dit_video.trainer.parallel import Parallel, parallelise, shard, whole


class NonFiniteError(ValueError):
    """A loss or gradient stopped being a number; the weights are those of the step before."""


class VideoDiffusion(L.LightningModule):
    """Trains a network on an objective. Optimisation is manual, because Muon and AdamW step together."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        optimisers: Optimisers,
        max_clips: int,  # the run's length: the learning rate falls to zero by then
        ema_decay: float = 0.998,
        parallel: Parallel | None = None,  # none: one rank
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.objective, self.recipe = network, objective, optimisers
        self.max_clips = max_clips
        self.ema = EMA(network, ema_decay)
        self.parallel = parallel or Parallel()
        self.named_optimisers: dict[str, torch.optim.Optimizer] = {}
        if self.parallel.layout.world_size == 1:
            self.prepare(None)
        self.steps, self.clips = 0, 0  # done so far
        self.losses: list[tuple[Losses, Tensor]] = []  # of the latest step's parts, with their clips' weights
        self.gradient_norm = torch.zeros(())

    def configure_model(self) -> None:
        if not self.named_optimisers:  # only now are there process groups
            self.prepare(self.device_mesh)

    def prepare(self, mesh: DeviceMesh | None) -> None:
        """Lays the networks out over the ranks of a mesh, none for one rank, and makes the optimisers of what is trained."""
        parallelise(self.network, self.parallel, mesh)
        parallelise(self.ema.network, Parallel(self.parallel.layout), mesh)
        if mesh is not None and any(True for _ in self.objective.parameters()):
            shard(self.objective, self.parallel.layout.weights_mesh(mesh))
        trained = torch.nn.ModuleDict({"network": self.network, "objective": self.objective})
        self.named_optimisers = self.recipe.build(trained)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.named_optimisers.values())

    def training_step(self, batch: Batch, number: int) -> Tensor:
        optimisers = list(self.named_optimisers.values())
        self.recipe.set_rate(optimisers, self.clips, self.max_clips)
        for optimiser in optimisers:
            optimiser.zero_grad()

        # Gradients: every clip counts by its share of the whole step's weight, however the step is cut into parts.
        # Ranks of one context group have the same clips, each with its part of the gradients.
        transformer, same = self.network.transformer, self.parallel.layout.context
        total = same * (all_sum(batch.weights.sum()) / same).clamp(min=1e-8)
        self.losses = []
        for part in batch.micro_batches():
            losses = self.objective(self.network, part, transformer.patch, transformer.reference_rate)
            self.manual_backward((losses.per_clip * part.weights).sum() / total)
            self.losses.append((replace(losses, per_clip=losses.per_clip.detach()), part.weights))
        parameters = [p for p in [*self.network.parameters(), *self.objective.parameters()] if p.grad is not None]
        self.gradient_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm or math.inf))
        loss = all_sum(torch.stack([(losses.per_clip * weights).sum() for losses, weights in self.losses]).sum() / total)
        self._stop_if_not_finite(loss, batch)

        # Update: weights, their average, and the count of what was done.
        for optimiser in optimisers:
            optimiser.step()
        self.ema.update(self.network, self.steps)
        self.steps, self.clips = self.steps + 1, self.clips + batch.step_clips
        return loss

    def _stop_if_not_finite(self, loss: Tensor, batch: Batch) -> None:
        if torch.isfinite(loss) and torch.isfinite(self.gradient_norm):
            return
        quantity = "gradient" if torch.isfinite(loss) else "loss"
        per_clip = torch.cat([losses.per_clip for losses, _ in self.losses])
        keys = [key for key, value in zip(batch.keys, per_clip.tolist(), strict=True) if not math.isfinite(value)] or batch.keys
        raise NonFiniteError(
            f"the {quantity} of step {self.steps} is not finite; clips: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}; "
            "the weights were not changed; lower optimisers.muon_lr or optimisers.adamw_lr, or look at the clips"
        )
