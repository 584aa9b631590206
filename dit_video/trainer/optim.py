"""Muon for hidden matrices, AdamW for the rest, and a learning rate that is a function of the clips seen."""

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from dit_video.model.layers import Linear
from dit_video.trainer.guard import Guard
from dit_video.trainer.parallel import local

AT_ONCE = 1 << 28
"""Numbers of Muon's matrices that are gathered and iterated together, at most; of a single weight that is larger, all."""


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest (semi-)orthogonal matrices `k rows columns`, approximately.

    Singular values of at least 0.002 of the matrix's norm end between 0.68 and 1.21. The quintic Newton-Schulz iteration with
    Keller Jordan's coefficients (Muon, 2024).
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every hidden matrix moves by the same amount in all its directions (Keller Jordan, 2024).

    A fused weight, such as queries, keys and values in one, is cut into its matrices first. Matrices of one shape go through the
    iteration together.
    """

    def __init__(
        self,
        parameters: list[tuple[nn.Parameter, int]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        groups = defaultdict(list)
        for parameter, matrices in parameters:
            groups[matrices].append(parameter)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": members, "matrices": matrices} for matrices, members in groups.items()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        waiting: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, dict]]] = defaultdict(list)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = [local(parameter.grad) for parameter in parameters]
            momenta = [local(self.state[parameter]["momentum"]) for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
            for parameter, move in zip(parameters, ahead, strict=True):
                waiting[parameter.shape[0] // group["matrices"], parameter.shape[1]].append((parameter, move, group))
        for shape, members in waiting.items():
            some: list[tuple[nn.Parameter, Tensor, dict]] = []
            for member in members:
                if some and sum(parameter.numel() for parameter, _, _ in some) + member[0].numel() > AT_ONCE:
                    self._move(shape, some)
                    some = []
                some.append(member)
            self._move(shape, some)

    def _move(self, shape: tuple[int, int], members: list[tuple[nn.Parameter, Tensor, dict]]) -> None:
        """Moves weights of matrices of one shape, by the orthogonal ones of what lies ahead of each."""
        parts = [gathered(move, parameter).unflatten(0, (group["matrices"], -1)) for parameter, move, group in members]
        moves = self._orthogonalised(torch.cat(parts), members[0][0]) * max(1, shape[0] / shape[1]) ** 0.5
        for (parameter, _, group), move in zip(members, moves.split([len(part) for part in parts]), strict=True):
            own = scattered(move.flatten(0, 1), parameter)
            local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=-group["lr"])

    def _orthogonalised(self, matrices: Tensor, parameter: nn.Parameter) -> Tensor:
        """The matrices of cut weights are dealt out, so that each is worked on by one rank; those of others are zeros, to be summed."""
        ranks, rank = owners(parameter)
        if ranks == 1:
            return orthogonalise(matrices, dtype=self.dtype)
        moves = torch.zeros_like(matrices)
        if rank < len(matrices):
            moves[rank::ranks] = orthogonalise(matrices[rank::ranks], dtype=self.dtype)
        return moves


def owners(parameter: Tensor) -> tuple[int, int]:
    """How many ranks a weight is cut over, and which of them this is."""
    if not isinstance(parameter, DTensor):
        return 1, 0
    return parameter.device_mesh.size(-1), parameter.device_mesh.get_local_rank(-1)


def gathered(piece: Tensor, like: Tensor) -> Tensor:
    """All of what this rank has a piece of, cut as a parameter is."""
    if not isinstance(like, DTensor):
        return piece
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def scattered(part: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of the sum of what all ranks that a parameter is cut over have."""
    if not isinstance(like, DTensor):
        return part
    mesh = like.device_mesh
    partial = [*([Replicate()] * (mesh.ndim - 1)), Partial()]
    return (
        DTensor.from_local(part.contiguous(), mesh, partial, run_check=False).redistribute(placements=like.placements).to_local()
    )


def split_parameters(module: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Names of the hidden matrices with how many each fuses, which Muon takes, and of all other parameters, which AdamW takes."""
    hidden = {
        f"{name}.weight": layer.matrices
        for name, layer in module.named_modules()
        if isinstance(layer, Linear) and layer.matrices and layer.weight.requires_grad
    }
    return hidden, [name for name, p in module.named_parameters() if p.requires_grad and name not in hidden]


def rate(clips: int, max_clips: int, warmup_clips: int, decay_clips: int) -> float:
    """The factor on the learning rate after so many clips: a linear rise, a plateau, and a linear fall over the last decay_clips."""
    rise = min(1.0, (clips + 1) / warmup_clips) if warmup_clips else 1.0
    fall = min(1.0, max(0.0, (max_clips - clips) / decay_clips)) if decay_clips else 1.0
    return rise * fall


class Optimisers:
    """How to build the optimisers: Muon for hidden matrices and AdamW for the rest, or AdamW for everything."""

    def __init__(
        self,
        muon_lr: float | None = 0.02,  # of hidden matrices; none: AdamW takes them too
        adamw_lr: float = 2e-3,  # of everything else
        betas: tuple[float, float] = (0.9, 0.99),  # of AdamW
        momentum: float = 0.95,  # of Muon
        weight_decay: float = 0.0,
        warmup_clips: int = 2_000,
        decay_share: float = 1.0,  # of the run, over which the learning rate falls to zero
        clip_norm: float | None = 1.0,  # bound of the gradient's norm
        muon_precision: Literal["bfloat16", "float32", "float64"] = "bfloat16",  # of the iteration that orthogonalises
        max_skips: int = 10,  # steps whose loss or gradient is no number are left out; so many in a row stop the run
        spike: float | None = None,  # a step whose gradient norm is so many times the running one is left out too; none: never
    ) -> None:
        if not 0 <= decay_share <= 1:
            raise ValueError(f"decay_share must be in [0, 1], got {decay_share}; set optimisers.decay_share")
        if muon_precision not in ("bfloat16", "float32", "float64"):
            raise ValueError(f"precision is bfloat16, float32 or float64, got {muon_precision!r}; set optimisers.muon_precision")
        if not isinstance(max_skips, int) or max_skips < 1:
            raise ValueError(f"max_skips must be a whole number of at least 1, got {max_skips!r}; set optimisers.max_skips")
        if spike is not None and not spike > 1:
            raise ValueError(f"spike must be more than 1, or null, got {spike!r}; set optimisers.spike")
        self.max_skips, self.spike = max_skips, spike
        self.muon_dtype = getattr(torch, muon_precision)
        self.muon_lr, self.adamw_lr, self.betas, self.momentum = muon_lr, adamw_lr, (betas[0], betas[1]), momentum
        self.weight_decay, self.warmup_clips, self.decay_share, self.clip_norm = (
            weight_decay,
            warmup_clips,
            decay_share,
            clip_norm,
        )

    def make_guard(self) -> Guard:
        """What decides which steps the weights follow."""
        return Guard(self.spike, self.max_skips)

    def build(self, module: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of a module, by name."""
        named = dict(module.named_parameters())
        hidden, rest = split_parameters(module)
        if self.muon_lr is None:
            hidden, rest = {}, [*hidden, *rest]
        built: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                [named[n] for n in rest], self.adamw_lr, self.betas, weight_decay=self.weight_decay, fused=True
            )  # type: ignore[arg-type]
        }
        if hidden:
            assert self.muon_lr is not None
            built["muon"] = Muon(
                [(named[n], parts) for n, parts in hidden.items()],
                self.muon_lr,
                self.momentum,
                self.weight_decay,
                self.muon_dtype,
            )
        for optimiser in built.values():
            for group in optimiser.param_groups:
                group["peak_lr"] = group["lr"]
        return built

    def set_rate(self, optimisers: list[torch.optim.Optimizer], clips: int, max_clips: int) -> float:
        """Sets every learning rate for the next step; gives the factor."""
        factor = rate(clips, max_clips, self.warmup_clips, int(self.decay_share * max_clips))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return factor
