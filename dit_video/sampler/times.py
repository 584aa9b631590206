"""The times between which a sampler's steps lie, and what the network is told of each: plain functions with one signature.

    schedule(steps, shift) -> Times, from noise to clean

Published models were sampled at times of their own, which are not quite evenly spaced, and are told some of them in whole thousandths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dit_video.objective.path import shifted


@dataclass(frozen=True)
class Times:
    """The times of a schedule."""

    times: Float[Tensor, " s"]  # between which the solver steps
    told: Float[Tensor, " s"]  # the noise levels that the network is told at them

    def told_at(self, time: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """What the network is told of tokens at their times, which are some of the schedule's."""
        return self.told.to(time)[(time[..., None] - self.times.to(time)).abs().argmin(dim=-1)]


Schedule = Callable[[int, float], Times]


def even(steps: int, shift: float) -> Times:
    """Evenly spaced from 1 to 0, then shifted toward noise."""
    times = shifted(torch.linspace(1, 0, steps + 1), shift)
    return Times(times, times)


def flow_match_euler(steps: int, shift: float) -> Times:
    """Those of diffusers' FlowMatchEulerDiscreteScheduler: evenly spaced from 1 to the shifted thousandth, shifted (again), and then 0."""
    last = shifted(torch.tensor(0.001), shift).item()
    spaced = shifted(torch.from_numpy(np.linspace(1000, 1000 * last, steps) / 1000), shift).float()
    times = torch.cat([spaced, torch.zeros(1)])
    return Times(times, times)


def flow_unipc(steps: int, shift: float) -> Times:
    """Those of diffusers' UniPCMultistepScheduler with flow sigmas: evenly spaced from 1 to a thousandth, which is left out, then shifted.

    The first is a millionth less than 1, the last is 0. The network is told whole thousandths, rounded down.
    """
    spaced = shifted(torch.from_numpy(np.linspace(1, 0.001, steps + 1)[:-1]), shift)
    spaced[0] -= 1e-6
    times, told = (torch.cat([found, torch.zeros(1)]) for found in (spaced.float(), ((spaced * 1000).floor() / 1000).float()))
    return Times(times, told)
