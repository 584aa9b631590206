"""The parts every network here is made of: rotary positions, modulation, SwiGLU, and initialisation by (seed, name)."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dit_video.seeding import seeded


def learned(*shape: int, std: float = 0.0, mean: float | Tensor = 0.0) -> nn.Parameter:
    """A parameter that carries its initialisation: normal with std around mean."""
    parameter = nn.Parameter(torch.empty(shape))
    _rule(parameter, std, mean)
    return parameter


class Linear(nn.Linear):
    """A linear layer that knows how many hidden matrices it fuses (queries, keys and values: 3); 0 for an input, output or table."""

    matrices: int


def linear(inputs: int, outputs: int, bias: bool = False, std: float | None = None, matrices: int = 1) -> Linear:
    """A linear layer that carries its initialisation: std is 1/sqrt(inputs) unless said, and 0 starts at zero.

    `matrices` tells the optimiser: Muon orthogonalises each hidden matrix by itself, and AdamW takes layers with none.
    """
    layer = Linear(inputs, outputs, bias=bias)
    layer.matrices = matrices
    _rule(layer.weight, inputs**-0.5 if std is None else std, 0.0)
    if bias:
        _rule(layer.bias, 0.0, 0.0)
    return layer


def round_matrices(module: nn.Module) -> None:
    """Holds hidden matrices in bfloat16: half of the memory, and the same numbers under autocast, which rounds them at every use."""
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.matrices:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)


def _rule(parameter: Tensor, std: float, mean: float | Tensor) -> None:
    parameter.initial = (std, mean)  # type: ignore[attr-defined]


Rule = tuple[float, float | Tensor]
"""How a parameter begins: normal with a standard deviation around a mean."""


def rules_of(module: nn.Module) -> dict[str, Rule]:
    """How every parameter that is trained begins, by name; ValueError where one does not say."""
    trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    rules = {name: getattr(parameter, "initial", None) for name, parameter in trained}
    lawless = [name for name, rule in rules.items() if rule is None]
    if lawless:
        raise ValueError(f"{lawless[0]} has no initialisation; make it with `linear` or `learned` of dit_video.model.layers")
    return rules  # type: ignore[return-value]


@torch.no_grad()
def initialise(
    module: nn.Module,
    seed: int,
    rules: Mapping[str, Rule] | None = None,  # taken before the weights were cut or given memory, where they were
    put: Callable[[Tensor, Tensor], object] = Tensor.copy_,  # how a weight takes its values, of which it may be a part
) -> None:
    """Sets every parameter from (seed, its name), so that a sharded or meta-device start equals a single-process start.

    A module on the meta device is given memory on the CPU first. Frozen parameters come from elsewhere and are let be.
    """
    rules = rules_of(module) if rules is None else rules
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")  # makes new parameters, which no longer know their rule
    for name, parameter in module.named_parameters():
        if name not in rules:
            continue
        std, mean = rules[name]
        values = torch.zeros(parameter.shape) + mean.cpu() if isinstance(mean, Tensor) else torch.full(parameter.shape, mean)
        if std:
            values += std * torch.randn(parameter.shape, generator=seeded(seed, name))
        put(parameter, values)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis and multiplies by a learned weight (Zhang and Sennrich, 2019).

    With several shapes the weight spans more axes than the last, such as (2, 1, e) for queries and keys normed in one go.
    """

    def __init__(self, *shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = learned(*shape, mean=1.0)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return rms_norm(x, self.eps).to(x.dtype) * self.weight.to(x.dtype)  # CUDA autocast norms in float32


def rms_norm(x: Float[Tensor, "*b d"], eps: float = 1e-6) -> Float[Tensor, "*b d"]:
    """x divided by the root mean square over its last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class SwiGLU(nn.Module):
    """The gated MLP silu(gate(x)) * up(x) -> down (Shazeer, 2020); its last layer starts at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = linear(width, 2 * hidden, matrices=2)
        self.down = linear(hidden, width, std=0)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LevelEmbedding(nn.Module):
    """Noise levels in [0, 1] as vectors: sines and cosines of 1000 t, then a two-layer MLP."""

    def __init__(self, width: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.into = linear(2 * num_frequencies, width, bias=True, matrices=0)
        self.out = linear(width, width, bias=True, matrices=0)

    def forward(self, levels: Float[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        exponents = torch.arange(self.num_frequencies, device=levels.device) / self.num_frequencies
        angles = levels[..., None] * 1000 * torch.exp(-math.log(10_000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.into.weight.dtype)
        return self.out(F.silu(self.into(waves)))


def rotary_split(head_dim: int) -> tuple[int, int, int]:
    """How many rotated pairs of a head belong to time, y and x: a third each, what is left over goes to time."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rotary(place: Float[Tensor, "b n 3"], head_dim: int, theta: float) -> Float[Tensor, "2 b n 1 1 e"]:
    """Cosines and signed sines of every rotary angle of every token (RoPE, Su et al. 2021, over three axes), for `rotate`.

    Pair j of the m pairs of an axis turns by place * theta^(-j / m).
    """
    angles = []
    for axis, pairs in enumerate(rotary_split(head_dim)):
        frequencies = theta ** (-torch.arange(pairs, device=place.device, dtype=place.dtype) / max(pairs, 1))
        angles.append(place[..., axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)  # b n e/2
    cos, sin = torch.cat([angle.cos(), angle.cos()], dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)
    return rearrange(torch.stack([cos, sin]), "two b n e -> two b n 1 1 e")


def rotate(x: Float[Tensor, "b n parts heads e"], turn: Float[Tensor, "2 b n 1 1 e"]) -> Float[Tensor, "b n parts heads e"]:
    """Turns every pair (j, j + e/2) of a head by its angle, so that a product of two rotated vectors depends on their offset."""
    cos, sin = turn.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
