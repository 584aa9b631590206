from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_video.trainer.ema import EMA


def test_the_average_follows_the_weights(make_network: Callable[..., Any]) -> None:
    network = make_network()
    average = EMA(network, 0.9)
    wanted = {name: p.detach().double() for name, p in network.named_parameters()}
    for step in range(200):
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
                wanted[name] = decay * wanted[name] + (1 - decay) * parameter.double()
        average.update(network, step)
    for name, parameter in average.network.named_parameters():
        torch.testing.assert_close(parameter.double(), wanted[name], atol=1e-5, rtol=0)


def test_the_start_is_forgotten_soon_and_a_rest_is_reached(make_network: Callable[..., Any]) -> None:
    network = make_network()
    average = EMA(network, 0.998)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1.0
    for step in range(200):
        average.update(network, step)
    gap = max(
        float((p - q).detach().abs().max()) for p, q in zip(network.parameters(), average.network.parameters(), strict=True)
    )
    assert gap < 1e-3  # a plain average of decay 0.998 would still be 0.67 away


def test_it_is_a_network_of_its_own_that_is_not_trained(make_network: Callable[..., Any]) -> None:
    network = make_network()
    average = EMA(network, 0.9)
    before = {name: value.clone() for name, value in average.network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in average.network.state_dict().items())
    assert not average.network.training and not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_forgets_nothing_is_refused(make_network: Callable[..., Any], decay: float) -> None:
    with pytest.raises(ValueError, match="set ema_decay"):
        EMA(make_network(), decay)
