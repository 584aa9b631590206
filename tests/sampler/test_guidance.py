"""Guidance as a function of two velocities."""

import pytest
import torch
from torch import Tensor

from dit_video.sampler.guidance import by_time, guided

X, TIME = torch.randn(3, 4, 5), torch.full((3, 4), 0.6)


def told(x: Tensor, time: Tensor) -> Tensor:
    return x.sin() + time[..., None]


def untold(x: Tensor, time: Tensor) -> Tensor:
    return x.cos() * time[..., None]


def never(x: Tensor, time: Tensor) -> Tensor:
    raise AssertionError("this velocity costs an evaluation that is not needed")


def test_a_scale_of_one_is_none() -> None:
    assert guided(told, never, 1) is told and guided(told, never, 1.0, (0.2, 0.5), 0.7) is told


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_it_goes_from_untold_to_told_and_beyond(scale: float) -> None:
    out = guided(told, untold, scale)(X, TIME)
    assert torch.allclose(out, (1 - scale) * untold(X, TIME) + scale * told(X, TIME), atol=1e-5)


def test_equal_velocities_are_left_alone() -> None:
    assert torch.allclose(guided(told, told, 5.0, rescale=0.7)(X, TIME), told(X, TIME), atol=1e-6)


def test_outside_the_interval_nothing_is_added_and_nothing_computed() -> None:
    for interval in ((0.7, 1.0), (0.0, 0.5)):
        assert torch.equal(guided(told, never, 3.0, interval)(X, TIME), told(X, TIME))
    for interval in ((0.6 - 1e-6, 1.0), (0.0, 0.61)):
        assert not torch.allclose(guided(told, untold, 3.0, interval)(X, TIME), told(X, TIME))


def test_the_interval_goes_by_tokens_that_are_made() -> None:
    given_at_zero = TIME * (torch.arange(4) > 1)
    assert torch.equal(guided(told, never, 3.0, (0.7, 1.0))(X, given_at_zero), told(X, given_at_zero))
    assert not torch.allclose(guided(told, untold, 3.0, (0.5, 0.7))(X, given_at_zero), told(X, given_at_zero))


def test_rescale_brings_back_the_spread_of_each_clip() -> None:
    plain, wild = told(X, TIME), guided(told, untold, 6.0)(X, TIME)
    full = guided(told, untold, 6.0, rescale=1.0)(X, TIME)
    assert torch.allclose(full.std((1, 2)), plain.std((1, 2)), rtol=1e-4)
    ratio = full / wild
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4)
    half = guided(told, untold, 6.0, rescale=0.5)(X, TIME)
    assert torch.allclose(half, (full + wild) / 2, atol=1e-5)


def test_a_clip_that_stands_still_is_not_rescaled_to_nothing_known() -> None:
    def still(x: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(x) if x is X else torch.where(torch.arange(3)[:, None, None] > 0, told(x, time), 0.0)

    assert not guided(still, still, 2.0, rescale=0.7)(X, TIME).any()
    mixed = guided(still, still, 2.0, rescale=0.7)(X.clone(), TIME)
    assert mixed.isfinite().all() and not mixed[0].any() and torch.allclose(mixed[1:], told(X, TIME)[1:], atol=1e-6)


def test_two_scales_meet_at_a_time() -> None:
    """As in a pipeline of two experts: the first has its boundary."""
    both = by_time(guided(told, untold, 4.0), guided(told, untold, 3.0), 0.6)
    for level, scale in ((0.9, 4.0), (0.6, 4.0), (0.59, 3.0), (0.0, 3.0)):
        time = torch.full_like(TIME, level)
        assert torch.equal(both(X, time), guided(told, untold, scale)(X, time))
    some = torch.where(torch.arange(4) < 2, 0.0, 0.9).expand(3, -1)  # given tokens are at 0
    assert torch.equal(both(X, some), guided(told, untold, 4.0)(X, some))
