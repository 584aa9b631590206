"""Classifier-free guidance as a function of two velocities: the one told the caption and the one told nothing, or a negative prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dit_video.sampler.solvers import Velocity


def guided(
    told: Velocity, untold: Velocity, scale: float, interval: Sequence[float] = (0.0, 1.0), rescale: float = 0.0
) -> Velocity:
    """The velocity untold + scale * (told - untold) (Ho and Salimans, 2022); a scale of 1 is `told` itself, at no cost.

    Outside the interval of time it is not applied (Kynkäänniemi et al. 2024). rescale in [0, 1] draws the standard deviation of each
    clip's velocity back to that of the told one (Lin et al. 2023, section 3.4).
    """
    if scale == 1:
        return told

    def velocity(x: Float[Tensor, "b n p"], time: Float[Tensor, "b n"]) -> Float[Tensor, "b n p"]:
        level = float(time.max())
        plain = told(x, time)
        if not interval[0] <= level <= interval[1]:
            return plain
        other = untold(x, time)
        out = other + scale * (plain - other)
        if rescale:
            spread = out.std(dim=(1, 2), keepdim=True)
            ratio = plain.std(dim=(1, 2), keepdim=True) / spread
            ratio = torch.where(spread > 0, ratio, 1.0)  # a clip that stands still has none
            out = torch.lerp(out, out * ratio, rescale)
        return out

    return velocity


def by_time(early: Velocity, late: Velocity, boundary: float) -> Velocity:
    """One velocity from noise down to a time, with it, and another below, such as guidance of two scales for two experts."""
    return lambda x, time: (early if float(time.max()) >= boundary else late)(x, time)
