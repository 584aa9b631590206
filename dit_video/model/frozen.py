"""Pretrained modules that are used and never trained, such as text encoders and autoencoders."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Placement = Literal["device", "offload"]
Precision = Literal["float32", "bfloat16", "float16"]


class Frozen(Generic[Module]):
    """A module that `load` makes at its first use; it stays on the device that asks, or lies in the host's memory between uses.

    It hides from nn.Module on purpose: a network's parameters, averages and checkpoints are those of what is trained, and a network on
    the meta device must not need the weights of its text encoder. Copies of a network share it.
    """

    def __init__(self, load: Callable[[], Module], placement: Placement = "device") -> None:
        if placement not in ("device", "offload"):
            raise ValueError(
                f"placement must be device or offload, got {placement!r}; "
                "set text.placement, autoencoder.placement or image_encoder.placement"
            )
        self._load, self.placement = load, placement
        self._module: Module | None = None

    def __deepcopy__(self, memo: dict) -> "Frozen[Module]":
        return self

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[Module]:
        """The module on a device, without gradients, for as long as the block lasts."""
        if self._module is None:
            with torch.device("cpu"):
                self._module = self._load().eval().requires_grad_(False)
        try:
            with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
                yield self._module.to(device)
        finally:
            if self.placement == "offload":
                self._module.to("cpu")


def num_weights(files: Sequence[Path], prefix: str = "") -> int:
    """How many numbers safetensors hold, as their headers say, in tensors whose names begin so."""
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if name.startswith(prefix))  # noqa: SIM118
    return total
