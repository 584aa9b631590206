import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_video.model.layers import initialise, linear
from dit_video.trainer.optim import Muon, Optimisers, orthogonalise, rate, split_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (1, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, s, vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spectrum = torch.logspace(-2, 0, s.shape[-1])  # some directions a hundred times weaker than others
    matrices = (u * spectrum) @ vh * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    found = orthogonalise(matrices, dtype=dtype)
    values = torch.linalg.svdvals(found)
    assert found.shape == matrices.shape
    assert values.min() > 0.66 and values.max() < 1.23


def test_orthogonalising_keeps_directions_and_leaves_zeros() -> None:
    matrix = torch.randn(1, 24, 40)
    u, _, vh = torch.linalg.svd(matrix[0], full_matrices=False)
    core = u.mT @ orthogonalise(matrix, dtype=torch.float32)[0] @ vh.mT
    assert (core - core.diag().diag()).abs().max() < 1e-4  # the singular vectors are those of the matrix
    assert not orthogonalise(torch.zeros(2, 8, 8)).any()


def moved(weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], matrices: int) -> torch.Tensor:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimiser = Muon([(parameter, matrices) for parameter in parameters], lr=0.1, weight_decay=0.01)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
    return torch.cat([parameter.detach() for parameter in parameters])


def test_a_fused_weight_moves_exactly_as_its_matrices_would() -> None:
    weight, gradients = torch.randn(3 * 32, 24), [torch.randn(3 * 32, 24) for _ in range(3)]
    fused = moved([weight], [[gradient] for gradient in gradients], matrices=3)
    apart = moved(list(weight.chunk(3)), [list(gradient.chunk(3)) for gradient in gradients], matrices=1)
    whole = moved([weight], [[gradient] for gradient in gradients], matrices=1)
    assert torch.equal(fused, apart)
    assert not torch.allclose(fused, whole, atol=1e-3)


def test_a_step_is_one_unit_of_every_direction_whatever_the_gradient_s_size() -> None:
    for scale in (1e-6, 1.0, 1e4):
        move = -moved([torch.zeros(16, 48)], [[scale * torch.randn(16, 48)]], matrices=1) / 0.1
        values = torch.linalg.svdvals(move)
        assert values.min() > 0.3 and values.max() < 1.25


def test_every_parameter_has_one_optimiser(make_network: Callable[..., Any]) -> None:
    network = make_network(text="cross", control_dim=3)
    every = [name for name, _ in network.named_parameters()]
    hidden, rest = split_parameters(network)
    assert sorted([*hidden, *rest]) == sorted(every) and not set(hidden) & set(rest)
    for word in ("modulation", "head", "tables", "positions", "patch", "level", "null", "norm", "bias", "offset", "control"):
        assert not [name for name in hidden if word in name], word
    for part in ("qkv", "out", "mlp.gate_up", "mlp.down", "context_key_value", "cross.video.query"):
        assert [name for name in hidden if name.startswith("transformer.blocks.0.") and name.endswith(f"{part}.weight")], part
    assert {name.rpartition(".")[0].rpartition(".")[2]: parts for name, parts in hidden.items() if parts > 1} == {
        "qkv": 3, "gate_up": 2, "context_key_value": 2,
    }  # fmt: skip

    built = Optimisers().build(network)
    ids = [id(p) for optimiser in built.values() for group in optimiser.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, network.parameters()))
    assert list(Optimisers(muon_lr=None).build(network)) == ["adamw"]
    (alone,) = Optimisers(muon_lr=None).build(network).values()
    assert sum(len(group["params"]) for group in alone.param_groups) == len(every)


def test_frozen_parameters_have_none() -> None:
    module = nn.Sequential(linear(8, 8), linear(8, 8, bias=True))
    initialise(module, 0)
    module[0].requires_grad_(False)
    assert split_parameters(module) == ({"1.weight": 1}, ["1.bias"])


def test_the_rate_rises_stays_and_falls_in_clips() -> None:
    factors = [rate(clips, 1000, 100, 400) for clips in range(0, 1001)]
    assert factors[0] == pytest.approx(0.01) and factors[49] == pytest.approx(0.5)
    assert factors[99:601] == [1.0] * 502
    assert factors[800] == pytest.approx(0.5) and factors[1000] == 0.0
    assert rate(0, 10, 0, 0) == rate(10, 10, 0, 0) == 1.0
    assert rate(2000, 1000, 0, 400) == 0.0  # past the end of the run


def test_set_rate_moves_every_group_from_its_own_peak(make_network: Callable[..., Any]) -> None:
    recipe = Optimisers(muon_lr=0.02, adamw_lr=0.002, warmup_clips=0, decay_share=1.0)
    built = recipe.build(make_network())
    for clips, factor in ((0, 1.0), (50, 0.5), (50, 0.5), (100, 0.0)):
        assert recipe.set_rate(list(built.values()), clips, 100) == pytest.approx(factor)
        assert {group["lr"] for group in built["muon"].param_groups} == {0.02 * factor}
        assert {group["lr"] for group in built["adamw"].param_groups} == {0.002 * factor}


def test_it_learns_a_linear_map() -> None:
    module = nn.Sequential(linear(16, 32), linear(32, 8, bias=True))
    initialise(module, 0)
    x, target = torch.randn(256, 16), torch.randn(256, 16) @ torch.randn(16, 8)
    target = x @ torch.linalg.lstsq(x, target).solution
    recipe = Optimisers(muon_lr=0.05, warmup_clips=0)
    optimisers = list(recipe.build(module).values())
    losses = []
    for step in range(100):
        recipe.set_rate(optimisers, step, 100)
        loss = (module(x) - target).square().mean()
        losses.append(loss.item())
        module.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
    assert losses[-1] < 0.01 * losses[0] and math.isfinite(losses[-1])


def test_a_share_outside_of_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="set optimisers.decay_share"):
        Optimisers(decay_share=1.5)


def test_muon_in_portions_is_muon(make_network: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is iterated together is bounded, and changes no move by more than rounding."""

    def after(at_once: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("dit_video.trainer.optim.AT_ONCE", at_once)
        network = make_network()
        optimiser = Optimisers(muon_precision="float64").build(network)["muon"]
        for step in range(3):
            for number, parameter in enumerate(network.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
            optimiser.step()
        return network.state_dict()

    together = after(1 << 28)
    for at_once in (1, 5_000, 20_000):
        for name, value in after(at_once).items():
            torch.testing.assert_close(value, together[name], rtol=0, atol=1e-6)
