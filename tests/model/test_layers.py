"""The parts of every network, each against a second way to compute it."""

import cmath

import pytest
import torch
from torch import nn

from dit_video.model.layers import (
    LevelEmbedding,
    RMSNorm,
    SwiGLU,
    initialise,
    learned,
    linear,
    rms_norm,
    rotary,
    rotary_split,
    rotate,
    seeded,
)


def turned_by_complex_numbers(x: torch.Tensor, place: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE written a second time: pair j of a head is the complex number x[j] + i x[j + e/2], multiplied by exp(i angle)."""
    pairs = x.shape[-1] // 2
    per_axis = pairs // 3
    sizes = (pairs - 2 * per_axis, per_axis, per_axis)
    out = torch.empty_like(x)
    for token in range(x.shape[0]):
        pair = 0
        for axis, size in enumerate(sizes):
            for j in range(size):
                angle = float(place[token, axis]) * theta ** (-j / size)
                turned = complex(x[token, pair], x[token, pair + pairs]) * cmath.exp(1j * angle)
                out[token, pair], out[token, pair + pairs] = turned.real, turned.imag
                pair += 1
    return out


@pytest.mark.parametrize("head_dim", [6, 16, 32, 64, 128])
def test_rotary_positions_against_complex_numbers(head_dim: int) -> None:
    x = torch.randn(5, head_dim, dtype=torch.float64)
    place = torch.randn(5, 3) * 10
    turned = rotate(x[None, :, None, None], rotary(place[None], head_dim, 100.0))[0, :, 0, 0]
    assert torch.allclose(turned, turned_by_complex_numbers(x, place, 100.0), atol=2e-5)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("head_dim", [6, 32, 128])
def test_products_of_rotated_vectors_depend_on_the_offset_alone(head_dim: int) -> None:
    query, key = torch.randn(2, 1, 1, 1, 1, head_dim, dtype=torch.float64)
    offset = torch.tensor([[[1.5, -2.0, 3.0]]])

    def product(place: torch.Tensor, offset: torch.Tensor) -> float:
        turned = rotate(query, rotary(place, head_dim, 100.0)) * rotate(key, rotary(place + offset, head_dim, 100.0))
        return turned.sum().item()

    here, there = torch.zeros(1, 1, 3), torch.tensor([[[7.0, -3.0, 11.0]]])
    assert product(here, offset) == pytest.approx(product(there, offset), abs=1e-4)
    for axis in range(3):  # and every axis counts
        other = offset.clone()
        other[..., axis] += 1
        assert abs(product(here, other) - product(here, offset)) > 1e-3


def test_rotary_pairs_are_shared_out() -> None:
    for head_dim in range(6, 130, 2):
        split = rotary_split(head_dim)
        assert sum(split) == head_dim // 2 and min(split) >= 1 and split[0] >= split[1] == split[2]


def test_norm_divides_by_the_root_mean_square() -> None:
    x = torch.randn(3, 4, 8) * 5
    assert torch.allclose(rms_norm(x), x / x.square().mean(-1, keepdim=True).sqrt(), atol=1e-5)
    norm = RMSNorm(2, 1, 8)
    initialise(norm, 0)
    with torch.no_grad():
        norm.weight[1] = 3
    pair = torch.randn(3, 2, 5, 8)
    assert torch.allclose(norm(pair)[:, 0], rms_norm(pair[:, 0]), atol=1e-6)
    assert torch.allclose(norm(pair)[:, 1], 3 * rms_norm(pair[:, 1]), atol=1e-6)
    assert norm(pair.bfloat16()).dtype == torch.bfloat16


def test_mlp_is_gated_and_starts_at_zero() -> None:
    mlp, x = SwiGLU(8, 16), torch.randn(3, 8)
    initialise(mlp, 0)
    assert not mlp(x).any()
    with torch.no_grad():
        mlp.down.weight.normal_()
        gate, up = mlp.gate_up.weight.split(16)
        wanted = ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T
        assert torch.allclose(mlp(x), wanted, atol=1e-5)


def test_levels_are_told_apart() -> None:
    embedding = LevelEmbedding(16)
    initialise(embedding, 0)
    levels = torch.linspace(0, 1, 101)[None]
    out = embedding(levels)[0]
    assert out.shape == (101, 16)
    assert torch.cdist(out, out).fill_diagonal_(1).min() > 1e-3


class Pair(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        parts = {"first": linear(4, 6, bias=True), "second": RMSNorm(4), "third": linear(4, 4, std=0)}
        for name in reversed(parts) if turned else parts:
            self.add_module(name, parts[name])
        self.offset = learned(2, 3, std=0.5, mean=torch.tensor([[1.0], [5.0]], device="cpu"))


def test_initialisation_is_a_function_of_seed_and_name() -> None:
    one, other, reseeded = Pair(False), Pair(True), Pair(False)
    with torch.device("meta"):
        meta = Pair(False)
    initialise(one, 3)
    torch.manual_seed(12)
    initialise(other, 3)
    initialise(meta, 3)
    initialise(reseeded, 4)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        assert torch.equal(parameter, meta.get_parameter(name)), name
    assert not torch.equal(one.first.weight, reseeded.first.weight)
    assert not torch.equal(one.first.weight[:4], one.third.weight)


def test_initialisation_keeps_each_rule() -> None:
    layer = linear(400, 100, bias=True)
    initialise(layer, 0)
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.05) and not layer.bias.any()
    pair = Pair(False)
    initialise(pair, 0)
    assert not pair.third.weight.any() and torch.equal(pair.second.weight, torch.ones(4))
    assert torch.allclose(pair.offset.mean(1), torch.tensor([1.0, 5.0]), atol=1.5) and pair.offset.std(1).min() > 0


def test_initialisation_touches_no_global_state() -> None:
    pair, before = Pair(False), torch.get_rng_state()
    initialise(pair, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_depend_on_every_part() -> None:
    draws = [torch.rand((), generator=seeded(*parts)).item() for parts in ((0, 1), (0, 1), (1, 0), (0, 11), (0, 1, "sample"))]
    assert draws[0] == draws[1] and len(set(draws)) == 4
