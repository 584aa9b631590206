"""One training step, as Lightning calls it: losses of a batch, gradients, clipping, optimisers, moving average."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dit_video.model.frozen import met_before
from dit_video.model.layers import initialise, rules_of
from dit_video.model.network import Network
from dit_video.objective.objective import Losses, Objective
from dit_video.shapes import Batch
from dit_video.trainer.ema import EMA
from dit_video.trainer.guard import NonFiniteError
from dit_video.trainer.layout import all_gathered, all_sum, asked_before
from dit_video.trainer.optim import Optimisers
from dit_video.trainer.parallel import Parallel, copy_whole, parallelise, shard, whole

Compare = Callable[[Batch], Losses]
Begin = Callable[[Network], object]


@dataclass
class Learner:
    """Networks that one loss trains, with the recipe of their optimisers; a module may hold several, such as a student and its critic."""

    parts: dict[str, nn.Module]
    recipe: Optimisers
    optimisers: dict[str, torch.optim.Optimizer]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts.values() for parameter in part.parameters() if parameter.requires_grad]


@dataclass
class Skipped:
    """A step that the weights did not follow: why, and each of its clips' loss (of all ranks)."""

    step: int
    reason: str
    clips: dict[str, float]


class VideoDiffusion(L.LightningModule):
    """Trains a network on an objective. Optimisation is manual, because Muon and AdamW step together.

    A subclass with further networks adds them in `make_learners` and gives `take_step` a loss for each. Networks may come on the meta
    device: they are cut over the ranks first, and each rank then gives memory and initial values to its own part alone.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        optimisers: Optimisers,
        max_clips: int,  # the run's length: the learning rate falls to zero by then
        ema_decay: float | Sequence[float] = 0.998,  # of the averaged weights; of several the first is sampled and judged
        parallel: Parallel | None = None,  # none: one rank
        seed: int = 0,  # of weights on the meta device
        begin: Begin | None = None,  # what is done to the network's first weights, such as taking over those of another run
        offload_ema: bool = False,  # averages lie in the host's memory
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.objective, self.recipe = network, objective, optimisers
        self.max_clips, self.seed, self.begin = max_clips, seed, begin
        self.decays = [float(decay) for decay in (ema_decay if isinstance(ema_decay, Sequence) else [ema_decay])]
        self.offload_ema = offload_ema
        self.parallel = parallel or Parallel()
        self.guard = optimisers.make_guard()
        self.learners: dict[str, Learner] = {}
        self.steps, self.clips = 0, 0  # done so far
        self.losses: list[tuple[Losses, Tensor]] = []  # of the latest step's parts, with their clips' weights
        self.gradient_norm = torch.zeros(())
        self.skipped: Skipped | None = None  # the latest step, if it was left out
        self.votes: dict[str, bool] = {}  # what callbacks of this rank say to all others with the next step
        self.counts: dict[str, int] = {}  # how many ranks said so in the latest step; the same on every rank
        self.base: str | None = None  # which weights adapters stand beside, where only they are trained
        self.latest: dict[str, float] = {}  # numbers recorded, the latest of each name

    # ------------------------------------------------------------------ before training

    def configure_model(self) -> None:
        if self.learners:
            return
        device = self.trainer.strategy.root_device
        self.prepare(self.device_mesh if self.parallel.layout.world_size > 1 else None, device)

    def prepare(self, mesh: DeviceMesh | None, device: torch.device | str = "cpu") -> None:
        """Lays the networks out over the ranks of a mesh, none for one rank, and makes the optimisers of what is trained."""
        parts = self.trained_parts()
        rules = {name: rules_of(part) if on_meta(part) else {} for name, part in parts.items()}
        with torch.device("cpu"):  # Lightning makes the device the default of new tensors; what is drawn or read comes by the CPU
            self.lay_out(mesh)
            for name, part in parts.items():
                if rules[name]:
                    part.to_empty(device=device)
                    initialise(part, self.seed, rules[name], copy_whole)
            self.to(device)
            if self.begin is not None:
                self.begin(self.network)
        self.learners = self.make_learners()
        self.ema = EMA(self.network, self.decays, self.offload_ema)

    def trained_parts(self) -> dict[str, nn.Module]:
        """What is trained and saved, by name."""
        return {"network": self.network, "objective": self.objective}

    def lay_out(self, mesh: DeviceMesh | None) -> None:
        """Cuts the trained parts over the ranks."""
        parallelise(self.network, self.parallel, mesh)
        if mesh is not None and any(True for _ in self.objective.parameters()):
            shard(self.objective, self.parallel.layout.weights_mesh(mesh))

    def make_learners(self) -> dict[str, Learner]:
        """The learners by name; here one, of the network and what the objective learns."""
        return {"network": self.learner(self.recipe, network=self.network, objective=self.objective)}

    def learner(self, recipe: Optimisers, **parts: nn.Module) -> Learner:
        """A learner of some of the trained parts."""
        return Learner(parts, recipe, recipe.build(nn.ModuleDict(parts)))

    @property
    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimiser by a name: those of the first learner have short ones."""
        return {
            name if number == 0 else f"{learner_name}-{name}": optimiser
            for number, (learner_name, learner) in enumerate(self.learners.items())
            for name, optimiser in learner.optimisers.items()
        }

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.named_optimisers.values())

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """The network with its averaged weights, for as long as the block lasts; RankFailed where a rank has failed and does not come."""
        all_gathered(None)  # before ranks wait for each other's weights
        layout, gathered = self.parallel.layout, self.parallel.gather_to_sample
        waits = layout.context > 1 or (layout.shard > 1 and not gathered)
        asked = asked_before([self.network.text, self.network.transformer] if waits else [])
        with self.ema.applied(gather=gathered), asked, met_before(lambda: all_gathered(None)):
            yield self.network

    def cpu(self) -> "VideoDiffusion":
        """Lightning's way of giving memory back at the end, which would hide the error of a start that came to nothing."""
        return self if on_meta(self) else super().cpu()

    # ------------------------------------------------------------------ a step

    def training_step(self, batch: Batch, number: int) -> Tensor:
        network = self.network
        return self.take_step(batch, {"network": lambda part: self.objective(network, network.as_latents(part), network.tokens)})

    def take_step(self, batch: Batch, losses: Mapping[str, Compare]) -> Tensor:
        """Moves the weights of the named learners down their losses, together, or of none where one of them is not sound."""
        found = torch.stack(
            [part for name, compare in losses.items() for part in self._gradients(self.learners[name], batch, compare)]
        )
        sound, loss = self._agree(found, batch)
        if sound:
            for name in losses:
                for optimiser in self.learners[name].optimisers.values():
                    optimiser.step()
            self.ema.update(self.steps)
        self.steps, self.clips = self.steps + 1, self.clips + batch.step_clips
        if self.skipped is not None and self.guard.row >= self.guard.in_a_row:
            self._stop(self.skipped)
        return loss

    def _gradients(self, learner: Learner, batch: Batch, compare: Compare) -> tuple[Tensor, Tensor]:
        """Leaves a learner's clipped gradients behind; gives this rank's part of its loss, and its gradient norm before clipping."""
        learner.recipe.set_rate(list(learner.optimisers.values()), self.clips, self.max_clips)
        for optimiser in learner.optimisers.values():
            optimiser.zero_grad()

        # Every clip counts by its share of the whole step's weight, however the step is cut into parts.
        # Ranks of one context group have the same clips, each with its part of the gradients.
        same = self.parallel.layout.context
        total = same * (all_sum(batch.weights.sum()) / same).clamp(min=1e-8)
        kept: list[tuple[Losses, Tensor]] = []
        with self._alone(learner):
            for part in batch.micro_batches():
                losses = compare(part)
                self.manual_backward((losses.per_clip * part.weights).sum() / total)
                kept.append((replace(losses, per_clip=losses.per_clip.detach()), part.weights))
        parameters = [p for p in learner.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, learner.recipe.clip_norm or math.inf))
        if learner is next(iter(self.learners.values())):
            self.losses, self.gradient_norm = kept, norm
        return torch.stack([(losses.per_clip * weights).sum() for losses, weights in kept]).sum() / total, norm

    @contextmanager
    def _alone(self, learner: Learner) -> Iterator[None]:
        """The other learners' weights get no gradients from a loss that passes through them."""
        others = [p for other in self.learners.values() if other is not learner for p in other.parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _agree(self, found: Tensor, batch: Batch) -> tuple[bool, Tensor]:
        """Whether the weights should follow a step, and its loss; all ranks come to the same, and know what callbacks of each say."""
        said = torch.tensor([float(vote) for vote in self.votes.values()], dtype=found.dtype, device=found.device)
        summed = all_sum(torch.cat([found.detach().flatten(), said]))
        numbers = summed.tolist()
        self.counts = {name: int(count) for name, count in zip(self.votes, numbers[found.numel() :], strict=True)}
        size = self.parallel.layout.world_size  # a loss is summed over ranks; a norm is the same on all of them
        pairs = [(numbers[2 * i], numbers[2 * i + 1] / size) for i in range(len(found) // 2)]
        loss, norm = max(pairs, key=lambda pair: not all(map(math.isfinite, pair)))
        reason = self.guard.problem(loss, norm)
        self.skipped = None if reason is None else self._skipped(reason, batch)
        return reason is None, summed[0]

    def _skipped(self, reason: str, batch: Batch) -> Skipped:
        per_clip = torch.cat([losses.per_clip for losses, _ in self.losses]).tolist()
        ranks = all_gathered(dict(zip(batch.keys, per_clip, strict=True)))
        self.losses = []  # which are nothing for the record
        return Skipped(self.steps, reason, {key: value for clips in ranks for key, value in clips.items()})

    def _stop(self, skipped: Skipped) -> None:
        keys = [key for key, value in skipped.clips.items() if not math.isfinite(value)] or list(skipped.clips)
        raise NonFiniteError(
            f"{self.guard.row} steps in a row were left out, the latest is {skipped.step}: {skipped.reason}; clips: "
            f"{', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}; the weights are those before them; lower optimisers.muon_lr or "
            "optimisers.adamw_lr, look at the clips, or set optimisers.max_skips"
        )


def on_meta(part: nn.Module) -> bool:
    """Whether a part has weights that have no memory yet."""
    return any(parameter.is_meta for parameter in part.parameters())
