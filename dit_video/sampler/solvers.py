"""Solvers of dx/dt = velocity(x, t) from noise to clean. Plain functions with one signature:

    solver(velocity, x, times, fresh) -> x at times[-1]

`times` is `s b n`: s points in time that fall to 0, for every token its own. A token whose time does not change takes steps of zero and
comes out bit for bit as it went in: that is how given tokens stay exact. `fresh` draws new noise for a step; only stochastic solvers ask.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Velocity = Callable[[Float[Tensor, "b n p"], Float[Tensor, "b n"]], Float[Tensor, "b n p"]]
Fresh = Callable[[int], Float[Tensor, "b n p"]]  # standard normal noise for step 0, 1, ..., from each clip's own seed
Solver = Callable[[Velocity, Float[Tensor, "b n p"], Float[Tensor, "s b n"], Fresh], Float[Tensor, "b n p"]]


def euler(
    velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"], fresh: Fresh | None = None
) -> Float[Tensor, "b n p"]:
    """First order, one evaluation a step; exact where the velocity is constant."""
    for now, then in zip(times[:-1], times[1:], strict=True):
        x = x + (then - now)[..., None] * velocity(x, now)
    return x


def heun(
    velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"], fresh: Fresh | None = None
) -> Float[Tensor, "b n p"]:
    """Second order, two evaluations a step (a token's last step, which ends at t = 0, is Euler's: Karras et al. 2022, algorithm 1)."""
    for now, then in zip(times[:-1], times[1:], strict=True):
        step = (then - now)[..., None]
        first = velocity(x, now)
        ahead = x + step * first
        mean = (first + velocity(ahead, then)) / 2 if then.any() else first
        x = torch.where(then[..., None] > 0, x + step * mean, ahead)
    return x


def multistep(
    velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"], fresh: Fresh | None = None
) -> Float[Tensor, "b n p"]:
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


def unipc(
    velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"], fresh: Fresh | None = None
) -> Float[Tensor, "b n p"]:
    """UniPC (Zhao et al. 2023) of order 2 with B(h) = e^h - 1, for clean clips on the straight path; one evaluation a step.

    Third order away from t = 1 and t = 0, second order with them. A step points at a clean clip, and at where it was a step before, on the
    axis l = log((1 - t) / t); the next evaluation first corrects the step that led to it. A token's first step and the one that ends at
    t = 0 are of order 1, and the latter is not corrected.
    """
    axis = torch.log1p(-times.double()) - times.double().log()
    before: _Step | None = None
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        clean = x - now[..., None] * velocity(x, now)
        if before is not None:
            x = torch.where((before.moves & (now > 0))[..., None], before.corrected(clean), x)
        moves = now != then
        ratio = (then.double() / now.double().where(moves, 1)).to(x.dtype)
        straight = torch.lerp(clean, x, ratio[..., None])  # Euler's step: the clean clip stays where it is
        if before is None:
            before = _Step(straight, 1 - ratio, clean, torch.zeros_like(clean), moves, None, None)
        else:
            curved = moves & before.moves & (then > 0)
            length = (axis[step + 1] - axis[step]).where(curved, 1)
            back = ((axis[step - 1] - axis[step]) / length).where(
                curved, -1
            )  # where the step before began, in lengths of this one
            slope = ((before.clean - clean) / back[..., None].to(x.dtype)).where(curved[..., None], 0)
            before = _Step(straight, 1 - ratio, clean, slope, moves, length.where(curved, torch.inf), back)
        x = torch.where(moves[..., None], straight + (1 - ratio)[..., None] * before.slope / 2, x)
    return x


@dataclass
class _Step:
    """A step of UniPC that is not corrected yet."""

    straight: Float[Tensor, "b n p"]  # where it would lead if the clean clip stayed where it is
    share: Float[Tensor, "b n"]  # of the clean clip in that
    clean: Float[Tensor, "b n p"]  # as it was seen from the start
    slope: Float[Tensor, "b n p"]  # its change over the step, as the step before lets expect; 0 where the order is 1
    moves: Bool[Tensor, "b n"]
    length: Float[Tensor, "b n"] | None  # on the axis l; infinite where the order is 1
    back: Float[Tensor, "b n"] | None  # where the step before began, in lengths of this one

    def corrected(self, arrived: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
        """Where the step leads by the clean clip that is seen from its end: equation 9 of the paper, solved for two weights."""
        change = arrived - self.clean
        if self.length is None or self.back is None:
            return self.straight + self.share[..., None] * change / 2
        second = self.length.isfinite()
        h = -self.length.where(second, 1)
        once = torch.expm1(h) / h - 1
        twice = once / h - 0.5
        first, other = once / torch.expm1(h), 2 * twice / torch.expm1(h)
        of_slope = ((first - other) / (1 - self.back)).where(second, 0)
        of_change = (first - of_slope).where(second, 0.5)
        moved = of_slope[..., None].to(change.dtype) * self.slope + of_change[..., None].to(change.dtype) * change
        return self.straight + self.share[..., None] * moved


@dataclass(frozen=True)
class Stochastic:
    """First order: each step points at a clean clip and noises it again, partly anew, so that errors of earlier steps are forgotten.

    `renewal` in [0, 1] is the standard deviation of the noise's new part: 0 is Euler, 1 keeps none of the old (Song et al. 2023,
    algorithm 1); between, DDIM with sigma = renewal * t (Song et al. 2020, equation 12). A large one makes what is likely likelier.
    """

    renewal: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.renewal, bool) or not isinstance(self.renewal, int | float) or not 0 <= self.renewal <= 1:
            raise ValueError(f"renewal must be a number in [0, 1], got {self.renewal!r}; set sampler.solver.renewal")

    def __call__(
        self, velocity: Velocity, x: Float[Tensor, "b n p"], times: Float[Tensor, "s b n"], fresh: Fresh
    ) -> Float[Tensor, "b n p"]:
        for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
            current = velocity(x, now)
            clean, noise = x - now[..., None] * current, x + (1 - now)[..., None] * current
            noise = (1 - self.renewal**2) ** 0.5 * noise + self.renewal * fresh(step)
            x = torch.where((now == then)[..., None], x, torch.lerp(clean, noise, then[..., None]))
        return x
