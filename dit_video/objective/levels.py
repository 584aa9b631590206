"""Distributions of the noise level that a clip is trained at, as functions of a uniform or normal number from the clip's own generator."""

import torch


class Uniform:
    """Every noise level in [0, 1] is equally likely."""

    def draw(self, generator: torch.Generator) -> float:
        return torch.rand((), generator=generator).item()


class LogitNormal:
    """sigmoid of a normal number (Esser et al. 2024); with mean 0.8 the median level is 0.69."""

    def __init__(self, mean: float = 0.8, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}; set objective.levels.std")
        self.mean, self.std = mean, std

    def draw(self, generator: torch.Generator) -> float:
        return torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator)).item()


Levels = Uniform | LogitNormal
