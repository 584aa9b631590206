"""Solvers of dx/dt = velocity(x, t) from noise to clean. Plain functions with one signature:

    solver(velocity, x, times) -> x at times[-1]

`times` is `s b n`: s points in time that fall to 0, for every token its own. A token whose time does not change takes steps of zero and
comes out bit for bit as it went in: that is how given tokens stay exact.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Float[Tensor, "b n p"], Float[Tensor, "b n"]], Float[Tensor, "b n p"]]
Solver = Callable[[Velocity, Float[Tensor, "b n p"], Float[Tensor, "s b n"]], Float[Tensor, "b n p"]]


def euler(velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"]) -> Float[Tensor, "b n p"]:
    """First order, one evaluation a step; exact where the velocity is constant."""
    for now, then in zip(times[:-1], times[1:], strict=True):
        x = x + (then - now)[..., None] * velocity(x, now)
    return x


def heun(velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"]) -> Float[Tensor, "b n p"]:
    """Second order, two evaluations a step (a token's last step, which ends at t = 0, is Euler's: Karras et al. 2022, algorithm 1)."""
    for now, then in zip(times[:-1], times[1:], strict=True):
        step = (then - now)[..., None]
        first = velocity(x, now)
        ahead = x + step * first
        mean = (first + velocity(ahead, then)) / 2 if then.any() else first
        x = torch.where(then[..., None] > 0, x + step * mean, ahead)
    return x


def multistep(velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"]) -> Float[Tensor, "b n p"]:
    """Second order with one evaluation a step: Adams-Bashforth of order 2 on uneven steps, its first step Euler's."""
    before, last_step = None, None
    for now, then in zip(times[:-1], times[1:], strict=True):
        step = (then - now)[..., None]
        current = velocity(x, now)
        if before is None or last_step is None:
            x = x + step * current
        else:
            moving = last_step != 0  # a token that has not moved yet has no slope to go by
            ratio = (step / last_step.where(moving, 1)).where(moving, 0)
            x = x + step * (current + ratio / 2 * (current - before))
        before, last_step = current, step
    return x
