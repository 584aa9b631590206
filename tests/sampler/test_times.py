"""Schedules: those of diffusers' schedulers, number for number, and what the network is told."""

import pytest
import torch

from dit_video.objective.path import shifted
from dit_video.sampler.times import even, flow_match_euler, flow_unipc

STEPS, SHIFTS = [1, 2, 4, 37, 40, 50], [1.0, 3.0, 5.0, 12.0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_times_of_the_euler_scheduler(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    found = flow_match_euler(steps, shift)
    assert torch.equal(found.times, scheduler.sigmas) and torch.equal(found.told[:-1] * 1000, scheduler.timesteps)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_times_of_the_unipc_scheduler(steps: int, shift: float) -> None:
    """37 steps without a shift fall on whole thousandths, where the last bit decides which is told."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    found = flow_unipc(steps, shift)
    assert torch.equal(found.times, scheduler.sigmas) and torch.equal(
        (found.told[:-1] * 1000).round().long(), scheduler.timesteps
    )


def test_even_times_are_told_as_they_are() -> None:
    found = even(10, 3.0)
    assert torch.equal(found.times, shifted(torch.linspace(1, 0, 11), 3.0)) and torch.equal(found.told, found.times)


def test_every_token_is_told_its_time() -> None:
    schedule = flow_unipc(20, 5.0)
    index = torch.randint(21, (3, 7))
    assert torch.equal(schedule.told_at(schedule.times[index]), schedule.told[index])
    assert not torch.equal(schedule.told, schedule.times)
    assert schedule.told_at(torch.zeros(1, 1)).item() == 0
