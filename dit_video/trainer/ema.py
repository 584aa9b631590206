"""Exponential moving averages of a network's weights; one of them is what is sampled and judged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dit_video.trainer.parallel import local


class EMA:
    """Keeps an average of the trained weights for each decay, cut over ranks as the weights are, on their device or in the host's memory.

    There is no second network: `applied` puts an average into the network for a while, and the weights back afterwards, to the bit.
    """

    def __init__(self, network: nn.Module, decays: Sequence[float], offload: bool = False) -> None:
        check_decays(decays)
        self.network, self.offload = network, offload
        weights = self._weights()
        self.averages = {decay: [self._kept(weight.clone()) for weight in weights] for decay in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every average toward the network's weights; over the first steps by more, so that the start is forgotten."""
        weights = self._weights()
        if self.offload:
            weights = [weight.to("cpu", non_blocking=True) for weight in weights]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        for decay, averages in self.averages.items():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self, decay: float | None = None, gather: bool = False) -> Iterator[None]:
        """The network has the average of a decay, by default the first, until the block ends; it is in eval mode there.

        With `gather` each rank holds all of the weights meanwhile, so that a forward pass waits for no other rank.
        """
        averages = next(iter(self.averages.values())) if decay is None else self.averages[decay]
        cut = [module for module in self.network.modules() if gather and isinstance(module, FSDPModule)]
        training = self.network.training
        self._swap(averages)
        self.network.eval()
        try:
            for module in cut:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module in cut:
                module.set_reshard_after_forward(True, recurse=False)
            self._swap(averages)
            self.network.train(training)

    def named(self, decay: float) -> dict[str, Tensor]:
        """The average of a decay by the parameters' names, as much of it as this rank holds."""
        names = (name for name, parameter in self.network.named_parameters() if parameter.requires_grad)
        return dict(zip(names, self.averages[decay], strict=True))

    def _weights(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self.network.parameters() if parameter.requires_grad]

    def _kept(self, average: Tensor) -> Tensor:
        if not self.offload or average.device.type == "cpu":
            return average
        return average.cpu().pin_memory()

    @torch.no_grad()
    def _swap(self, averages: Sequence[Tensor]) -> None:
        drop_gathered(self.network)
        for weight, average in zip(self._weights(), averages, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def drop_gathered(network: nn.Module) -> None:
    """Lets cut modules forget the whole weights that they may still hold from their last forward pass, which are old once ours change."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_decays(decays: Sequence[float]) -> None:
    """ValueError unless there is at least one decay, all are in [0, 1) and none is there twice."""
    if not decays or not all(isinstance(decay, int | float) and 0 <= decay < 1 for decay in decays):
        raise ValueError(f"a decay must be in [0, 1), got {', '.join(map(str, decays)) or 'none'}; set ema_decay")
    if len(set(decays)) < len(decays):
        raise ValueError(f"the decays of the averages must differ, got {', '.join(map(str, decays))}; set ema_decay")
