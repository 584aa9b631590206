from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_video.trainer.ema import EMA


def moved(network: Any, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += by(parameter)


@pytest.mark.parametrize("offload", [False, True])
def test_every_average_follows_the_weights(make_network: Callable[..., Any], offload: bool) -> None:
    network = make_network()
    decays = (0.9, 0.99, 0.5)
    average = EMA(network, decays, offload)
    wanted = {d: {name: p.detach().double() for name, p in network.named_parameters()} for d in decays}
    for step in range(200):
        moved(network, lambda parameter: 0.01 * torch.randn(parameter.shape))
        for decay in decays:
            now = min(decay, (1 + step) / (10 + step))
            for name, parameter in network.named_parameters():
                wanted[decay][name] = now * wanted[decay][name] + (1 - now) * parameter.detach().double()
        average.update(step)
    for decay in decays:
        for name, value in average.named(decay).items():
            torch.testing.assert_close(value.double(), wanted[decay][name], atol=1e-5, rtol=0)


def test_the_start_is_forgotten_soon_and_a_rest_is_reached(make_network: Callable[..., Any]) -> None:
    network = make_network()
    average = EMA(network, [0.998])
    moved(network, torch.ones_like)
    for step in range(200):
        average.update(step)
    named = average.named(0.998)
    gap = max(float((p - named[name]).detach().abs().max()) for name, p in network.named_parameters())
    assert gap < 1e-3  # a plain average of decay 0.998 would still be 0.67 away


def test_the_network_has_the_average_for_a_while_and_its_own_weights_again_to_the_bit(make_network: Callable[..., Any]) -> None:
    network = make_network()
    average = EMA(network, [0.9, 0.99])
    first = {name: p.detach().clone() for name, p in network.named_parameters()}
    moved(network, lambda parameter: torch.randn(parameter.shape))
    average.update(0)
    own = {name: p.detach().clone() for name, p in network.named_parameters()}
    before = {decay: {name: value.clone() for name, value in average.named(decay).items()} for decay in (0.9, 0.99)}
    with pytest.raises(ZeroDivisionError), average.applied():  # whatever happens meanwhile
        assert not network.training
        assert all(torch.equal(p, before[0.9][name]) for name, p in network.named_parameters())
        1 / 0  # noqa: B018
    assert network.training
    with average.applied(0.99):
        assert all(torch.equal(p, before[0.99][name]) for name, p in network.named_parameters())
    assert all(torch.equal(p, own[name]) and not torch.equal(p, first[name]) for name, p in network.named_parameters())
    for decay, values in before.items():
        assert all(torch.equal(value, values[name]) for name, value in average.named(decay).items())


@pytest.mark.parametrize("decays", [[1.0], [-0.1], [], [0.9, 0.9], [0.9, 2]])
def test_decays_that_forget_nothing_or_are_there_twice_are_refused(make_network: Callable[..., Any], decays: list[float]) -> None:
    with pytest.raises(ValueError, match="set ema_decay"):
        EMA(make_network(), decays)
