"""Distributions of the noise level."""

from statistics import NormalDist

import pytest
import torch

from dit_video.objective.levels import LogitNormal, Uniform
from dit_video.seeding import seeded


def draws(levels: Uniform | LogitNormal, count: int = 4000) -> torch.Tensor:
    return torch.tensor([levels.draw(seeded("levels", i)) for i in range(count)], dtype=torch.float64)


@pytest.mark.parametrize(("mean", "std"), [(0.8, 1.0), (0.0, 1.0), (-0.5, 2.0)])
def test_logit_normal_has_its_quantiles(mean: float, std: float) -> None:
    levels = draws(LogitNormal(mean, std))
    assert 0 <= levels.min() and levels.max() <= 1
    for share in (0.1, 0.5, 0.9):
        wanted = torch.sigmoid(torch.tensor(NormalDist(mean, std).inv_cdf(share)))
        assert levels.quantile(share).item() == pytest.approx(wanted.item(), abs=0.03)


def test_the_default_has_a_median_of_69_hundredths() -> None:
    assert draws(LogitNormal()).median().item() == pytest.approx(0.69, abs=0.015)


def test_uniform_is_uniform() -> None:
    levels = draws(Uniform())
    shares = torch.histc(levels.float(), bins=10, min=0, max=1) / len(levels)
    assert (shares - 0.1).abs().max() < 0.02


def test_a_draw_depends_on_the_generator_alone() -> None:
    for levels in (Uniform(), LogitNormal()):
        assert levels.draw(seeded(1)) == levels.draw(seeded(1)) != levels.draw(seeded(2))


def test_a_spread_must_be_positive() -> None:
    with pytest.raises(ValueError, match="set objective.levels.std"):
        LogitNormal(std=0.0)
