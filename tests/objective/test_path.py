"""The path, what a network's output means on it, and the shift."""

import pytest
import torch

from dit_video.objective.path import Prediction, clean_of, mix, shift_for, shifted, target_of, velocity_of

PREDICTIONS: tuple[Prediction, ...] = ("clean", "velocity", "noise")


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    clean, noise = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    time = torch.rand(3, 5, dtype=torch.float64) * 0.8 + 0.1
    return clean, noise, time, mix(clean, noise, time)


def test_the_ends_of_the_path() -> None:
    clean, noise, _, _ = example()
    time = torch.zeros(3, 5, dtype=torch.float64)
    assert torch.equal(mix(clean, noise, time), clean) and torch.equal(mix(clean, noise, time + 1), noise)
    time[1, 2] = 1  # each token at its own time
    assert torch.equal(mix(clean, noise, time)[1, 2], noise[1, 2]) and torch.equal(mix(clean, noise, time)[1, 3], clean[1, 3])


def test_velocity_is_the_slope_of_the_path() -> None:
    clean, noise, time, noisy = example()
    ahead = mix(clean, noise, time + 0.01)
    assert torch.allclose((ahead - noisy) / 0.01, noise - clean)
    assert torch.allclose(clean_of(noisy, noise - clean, time), clean)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_right_output_means_the_right_velocity(predict: Prediction) -> None:
    clean, noise, time, noisy = example()
    target, _ = target_of(clean, noise, time, predict, 0.05)
    assert torch.allclose(velocity_of(target, noisy, time, predict, 0.05), noise - clean)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_divisor_turns_an_error_of_the_output_into_one_of_the_velocity(predict: Prediction) -> None:
    clean, noise, time, noisy = example()
    target, divisor = target_of(clean, noise, time, predict, 0.05)
    error = torch.randn_like(clean)
    wrong = velocity_of(target + error, noisy, time, predict, 0.05) - (noise - clean)
    assert torch.allclose(wrong.abs(), (error / torch.as_tensor(divisor).expand(3, 5)[..., None]).abs())


def test_divisors_are_bounded_at_the_ends() -> None:
    ends = torch.tensor([[0.0, 1.0]])
    assert torch.equal(target_of(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), ends, "clean", 0.05)[1], torch.tensor([[0.05, 1.0]]))
    assert torch.equal(target_of(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), ends, "noise", 0.05)[1], torch.tensor([[1.0, 0.05]]))


def test_shift() -> None:
    time = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shifted(time, 1.0), time)
    for shift in (0.5, 2.0, 3.0):
        moved = shifted(time, shift)
        assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()
        assert ((moved > time) == (shift > 1))[1:-1].all()
        # Esser et al.: the ratio of noise to signal is multiplied by the shift.
        assert torch.allclose(moved[1:-1] / (1 - moved[1:-1]), shift * time[1:-1] / (1 - time[1:-1]))
        assert torch.allclose(shifted(moved, 1 / shift), time)


def test_shift_grows_with_the_root_of_tokens() -> None:
    assert shift_for(77, None) == 1 and shift_for(64, 64) == 1
    assert shift_for(256, 64) == pytest.approx(2) and shift_for(16, 64) == pytest.approx(0.5)
    assert shift_for(0, 64) > 0
