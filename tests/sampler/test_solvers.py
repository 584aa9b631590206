"""Solvers: exactness, measured orders of convergence, and tokens that take no step."""

import pytest
import torch
from torch import Tensor

from dit_video.objective.path import shifted
from dit_video.sampler.solvers import Solver, Stochastic, euler, heun, multistep, unipc

DETERMINISTIC = [euler, heun, multistep, unipc]
SOLVERS = [*DETERMINISTIC, Stochastic(0.5), Stochastic(1.0)]
BATCH, TOKENS, VALUES = 2, 5, 3


def schedule(steps: int, kind: str) -> Tensor:
    """Times `s b n`: the same for all tokens, uneven, one for each token, or with tokens that start late."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:, None, None].expand(-1, BATCH, TOKENS)
    if kind == "even":
        return even
    if kind == "uneven":
        return shifted(even, 3.0)
    if kind == "alternating":  # every second step is three times as long
        sizes = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(steps)[:steps]
        return torch.cat([torch.ones(1), 1 - sizes.cumsum(0) / sizes.sum()]).clamp(min=0)[:, None, None].expand_as(even)
    if kind == "per token":
        return torch.stack([shifted(even[..., i], 0.5 + i) for i in range(TOKENS)], dim=-1)
    assert kind == "late"  # token i waits for i tenths of the way, then falls twice as fast as it would have to
    delay = torch.arange(TOKENS, dtype=torch.float64) / 10
    return (1 - 2 * ((1 - even) - delay)).clamp(0, 1)


KINDS = ["even", "uneven", "alternating", "per token", "late"]


def field(x: Tensor, time: Tensor) -> Tensor:
    """A velocity that is not linear in x or t."""
    return torch.sin(2 * x) + x * torch.cos(3 * time)[..., None] - time[..., None] ** 2


def start() -> Tensor:
    return torch.randn(BATCH, TOKENS, VALUES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fresh(step: int) -> Tensor:
    """New noise for a step."""
    return torch.randn(BATCH, TOKENS, VALUES, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))


def exact(x: Tensor, first: float = 1.0, last: float = 0.0) -> Tensor:
    """x at the last time, by the classical Runge-Kutta method in very small steps."""
    steps = 2000
    size = (last - first) / steps
    h = torch.full((BATCH, TOKENS, 1), size, dtype=torch.float64)
    for i in range(steps):
        t = torch.full((BATCH, TOKENS), first + size * i, dtype=torch.float64)
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + size / 2)
        k3 = field(x + h / 2 * k2, t + size / 2)
        k4 = field(x + h * k3, t + size)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_velocity_is_followed_exactly(solver: Solver, kind: str, steps: int) -> None:
    clean, noise = torch.randn(2, BATCH, TOKENS, VALUES, dtype=torch.float64)
    out = solver(lambda x, time: noise - clean, noise, schedule(steps, kind), fresh)
    assert torch.allclose(out, clean, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (multistep, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_convergence(solver: Solver, order: int, kind: str) -> None:
    wanted = exact(start())
    errors = [(solver(field, start(), schedule(steps, kind), fresh) - wanted).abs().amax(dim=(0, 2)) for steps in (160, 320, 640)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        measured = torch.log2(coarse / fine)  # of each token
        assert ((measured - order).abs() < 0.25).all(), measured
    assert errors[-1].max() < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_unipc_from_noise_to_clean(kind: str) -> None:
    """Its axis is infinite at both ends, where a step of order 1 stays; errors of single tokens cross zero, so the largest counts."""
    coarse, fine = ((unipc(field, start(), schedule(steps, kind)) - exact(start())).abs().amax() for steps in (80, 1280))
    assert 1.7 < torch.log2(coarse / fine) / 4 < 2.4


@pytest.mark.parametrize("kind", ["even", "uneven", "alternating"])
def test_order_of_unipc_between(kind: str) -> None:
    wanted = exact(start(), 0.9, 0.1)
    coarse, fine = ((unipc(field, start(), 0.1 + 0.8 * schedule(steps, kind)) - wanted).abs().amax() for steps in (320, 640))
    assert torch.log2(coarse / fine) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_unipc_is_that_of_diffusers(steps: int, shift: float) -> None:
    """With the sigmas that its scheduler makes for Wan, whose first is a little less than 1."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    wanted = x = start().float()
    for number, timestep in enumerate(scheduler.timesteps):
        time = scheduler.sigmas[number].expand(BATCH, TOKENS)
        wanted = scheduler.step(field(wanted, time), timestep, wanted).prev_sample
    found = unipc(field, x, scheduler.sigmas[:, None, None].expand(-1, BATCH, TOKENS))
    assert (found - wanted).abs().max() < 1e-5
    assert steps < 3 or (found - euler(field, x, scheduler.sigmas[:, None, None].expand(-1, BATCH, TOKENS))).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_steps_come_out_bit_for_bit(solver: Solver, kind: str) -> None:
    given = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    given[0, :2] = given[1, 3] = True
    x = start().float()
    times = torch.where(given, 0.0, schedule(9, kind).float())
    out = solver(lambda x, time: field(x, time) * 1e6, x, times, lambda step: fresh(step).float())
    assert torch.equal(out[given], x[given]) and not torch.isclose(out[~given], x[~given]).any(-1).all()
    alone = solver(field, start(), schedule(9, kind), fresh)  # and the others do not notice
    beside = solver(field, start(), torch.where(given, 0.0, schedule(9, kind)), fresh)
    assert torch.equal(alone[~given], beside[~given])


@pytest.mark.parametrize(("solver", "calls"), [(euler, 6), (heun, 11), (multistep, 6), (unipc, 6), (Stochastic(), 6)])
def test_evaluations(solver: Solver, calls: int) -> None:
    seen = []

    def counted(x: Tensor, time: Tensor) -> Tensor:
        assert time.max() > 0  # never at the clean end, where the velocity of a predicted clean clip is not defined
        seen.append(time)
        return field(x, time)

    solver(counted, start(), schedule(6, "even"), fresh)
    assert len(seen) == calls


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_token_s_velocity_at_its_clean_end_is_not_used(solver: Solver) -> None:
    """Tokens may reach t = 0 before others do (a rollout); there the velocity is a division by almost nothing."""
    times = schedule(10, "late")
    assert (times[-3] == 0).any() and (times[-3] > 0).any()

    def with_end(velocity: float) -> Tensor:
        return solver(lambda x, time: torch.where(time[..., None] > 0, field(x, time), velocity), start(), times, fresh)

    assert torch.equal(with_end(0.0), with_end(1e12))


@pytest.mark.parametrize("kind", KINDS)
def test_without_renewal_the_stochastic_solver_is_euler(kind: str) -> None:
    ours, eulers = (solver(field, start(), schedule(9, kind), fresh) for solver in (Stochastic(0.0), euler))
    assert torch.allclose(ours, eulers, atol=1e-12)


@pytest.mark.parametrize("renewal", [0.3, 1.0])
def test_the_renewed_noise_has_the_strength_of_its_time(renewal: float) -> None:
    """Toward a known clean clip, x stays clean + t * standard normal noise at every step, whatever part of the noise is new."""
    shape, clean = (1, 20_000, 1), 0.3

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        spread.append(((x - (1 - time[..., None]) * clean) / time[..., None]).std().item())
        return (x - clean) / time[..., None]

    spread: list[float] = []
    noise = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(1, 0, 5, dtype=torch.float64)[:, None, None].expand(-1, *shape[:2])
    out = Stochastic(renewal)(velocity, noise[4], times, lambda step: noise[step])
    assert torch.allclose(out, torch.full_like(out, clean)) and spread == pytest.approx([1.0] * 4, abs=0.03)


@pytest.mark.parametrize("renewal", [-0.1, 1.5, float("nan")])
def test_a_renewal_is_a_share(renewal: float) -> None:
    with pytest.raises(ValueError, match="set sampler.solver.renewal"):
        Stochastic(renewal)
