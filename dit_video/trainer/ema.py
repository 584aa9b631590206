"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import nn

from dit_video.model.network import Network
from dit_video.trainer.parallel import local


class EMA(nn.Module):
    """Keeps a second network whose weights follow the first's; it is the one that is sampled and judged."""

    network: Network

    def __init__(self, network: Network, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; set ema_decay")
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves toward the network's weights; over the first steps by more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([local(p) for p in each.parameters()] for each in (self.network, network))
        torch._foreach_lerp_(averages, weights, 1 - decay)
