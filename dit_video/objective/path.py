"""The path between a clean clip and noise. The one convention of time in this project:

    time t in [0, 1], 0 is clean, 1 is noise
    noisy    = (1 - t) * clean + t * noise
    velocity = noise - clean               (so a sampler goes from t = 1 to t = 0 along -velocity)

This is the straight path of rectified flow (Liu et al. 2022) and flow matching (Lipman et al. 2022). A published model with another
convention translates at its own door.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Prediction = Literal["clean", "velocity", "noise"]


def mix(clean: Float[Tensor, "b n p"], noise: Float[Tensor, "b n p"], time: Float[Tensor, "b n"]) -> Float[Tensor, "b n p"]:
    """The noisy tokens at each token's own time."""
    return torch.lerp(clean, noise, time[..., None])


def velocity_of(
    output: Float[Tensor, "b n p"],
    noisy: Float[Tensor, "b n p"],
    time: Float[Tensor, "b n"],
    predict: Prediction,
    min_time: float,
) -> Float[Tensor, "b n p"]:
    """The velocity that a network's output means.

    min_time bounds the divisor: t where it predicts clean, 1 - t where it predicts noise. Tokens at that end of the path must be
    taken out, or their time replaced, by the caller.
    """
    if predict == "clean":
        return (noisy - output) / time.clamp(min=min_time)[..., None]
    if predict == "noise":
        return (output - noisy) / (1 - time).clamp(min=min_time)[..., None]
    return output


def target_of(
    clean: Float[Tensor, "b n p"], noise: Float[Tensor, "b n p"], time: Float[Tensor, "b n"], predict: Prediction, min_time: float
) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n"] | float]:
    """What the network's output is compared with, and the divisor that turns its error into an error of the velocity."""
    if predict == "clean":
        return clean, time.clamp(min=min_time)
    if predict == "noise":
        return noise, (1 - time).clamp(min=min_time)
    return noise - clean, 1.0


def clean_of(
    noisy: Float[Tensor, "b n p"], velocity: Float[Tensor, "b n p"], time: Float[Tensor, "b n"]
) -> Float[Tensor, "b n p"]:
    """The clean tokens that a velocity points at: noisy - t * velocity."""
    return noisy - time[..., None] * velocity


def shifted(time: Tensor, shift: float) -> Tensor:
    """Moves times toward noise: t -> s t / (1 + (s - 1) t), so that more tokens, which hide less under the same noise, see more of it.

    Esser et al. 2024, equation 23.
    """
    return shift * time / (1 + (shift - 1) * time)


def shift_for(num_tokens: int, base_tokens: int | None) -> float:
    """The shift for clips with so many tokens to be made: sqrt(num_tokens / base_tokens); without a base there is none (1)."""
    return 1.0 if base_tokens is None else max(num_tokens, 1) ** 0.5 / base_tokens**0.5
