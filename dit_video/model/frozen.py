"""Pretrained modules that are used and never trained, such as text encoders and autoencoders."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Placement = Literal["device", "offload", "shard"]
Precision = Literal["float32", "bfloat16", "float16"]


_meetings: list[Callable[[], object]] = []


@contextmanager
def met_before(meet: Callable[[], object]) -> Iterator[None]:
    """Before ranks do anything together with what is cut they `meet`, which raises on all of them where one has failed elsewhere."""
    _meetings.append(meet)
    try:
        yield
    finally:
        _meetings.pop()


class Frozen(Generic[Module]):
    """A module that `load` makes at its first use, and where it lies between uses.

    With placement device it stays on the device that asks, and with offload it lies in the host's memory. With shard every rank keeps an
    equal part of it on its device, and all gather it together, so that they must use it equally often (`is_cut`); each has loaded all of
    it once, into the host's memory, and holds all of it on its device while it is used.

    It hides from nn.Module on purpose: a network's parameters, averages and checkpoints are those of what is trained, and a network on
    the meta device must not need the weights of its text encoder. Copies of a network share it.
    """

    def __init__(self, load: Callable[[], Module], placement: Placement = "device") -> None:
        if placement not in get_args(Placement):
            raise ValueError(
                f"placement must be device, offload or shard, got {placement!r}; "
                "set text.placement, autoencoder.placement or image_encoder.placement"
            )
        self._load, self.placement = load, placement
        self._module: Module | None = None
        self._pieces: _Pieces | None = None
        self._users = 0

    def __deepcopy__(self, memo: dict) -> "Frozen[Module]":
        return self

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of it, and gather it together."""
        return self.placement == "shard" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def is_open(self) -> bool:
        """Whether it is in use, and whole."""
        return self._users > 0

    def device_bytes(self, whole: Callable[[], int], ranks: int = 1, in_use: bool = False) -> int:
        """Of its `whole` bytes, what a rank's device holds between uses, or while it is used, where so many ranks train."""
        between = {"device": 1.0, "offload": 0.0, "shard": 1 / ranks}[self.placement]
        together = self.placement == "shard" and ranks > 1  # the whole, and the part that it was gathered from
        share = between + 1 if in_use and together else 1.0 if in_use else between
        return math.ceil(share * whole()) if share else 0

    def wanted(self, here: bool, device: torch.device | str) -> bool:
        """Whether any rank wants what is cut, which all of them ask together."""
        _come()
        return _any_rank(here, device)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[Module]:
        """The module on a device, without gradients, for as long as the block lasts; inside it may be asked for again."""
        if self.is_cut and not self.is_open:
            self._gather(device)
        elif self._module is None:
            self._module = self._loaded()
        assert self._module is not None
        self._users += 1
        try:
            if self._pieces is None:
                self._module.to(device)
            with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
                yield self._module
        finally:
            self._users -= 1
            if not self.is_open and self._pieces is not None:
                self._pieces.release()
            elif not self.is_open and self.placement == "offload":
                self._module.to("cpu")

    def _loaded(self) -> Module:
        with torch.device("cpu"):
            return self._load().eval().requires_grad_(False)

    def _gather(self, device: torch.device | str) -> None:
        """Makes it whole; where one rank cannot load it at the first use, all of them fail."""
        _come()
        if self._pieces is None:
            problem: Exception | None = None
            try:
                self._module = self._loaded()
                self._pieces = _Pieces(self._module, device)
            except Exception as error:
                problem = error
            if _any_rank(problem is not None, device):
                self._module = self._pieces = None
                raise problem or RuntimeError("frozen weights could not be loaded on another rank, which says why")
        assert self._pieces is not None
        self._pieces.gather()


def _come() -> None:
    for meet in _meetings:
        meet()


def _any_rank(here: bool, device: torch.device | str) -> bool:
    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class _Pieces:
    """A module's tensors, of which every rank holds an equal part of the bytes."""

    STEP = 512  # bytes that places of tensors are multiples of, as an allocator's are: kernels, and so rounding, go by alignment

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self.tensors = [*module.parameters(), *module.buffers()]
        sizes = [-(-tensor.nbytes // self.STEP) * self.STEP for tensor in self.tensors]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.shapes, self.device = [tensor.shape for tensor in self.tensors], torch.device(device)
        self.num_bytes = -(-self.starts[-1] // (self.STEP * dist.get_world_size())) * self.STEP  # of a rank's part
        first, last = (self.num_bytes * (dist.get_rank() + k) for k in (0, 1))
        part = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for tensor, start in zip(self.tensors, self.starts, strict=False):
            low, high = max(start, first), min(start + tensor.nbytes, last)
            if low < high:
                part[low - first : high - first] = (
                    tensor.detach().contiguous().view(-1).view(torch.uint8)[low - start : high - start]
                )
        self.part = part.to(device)
        self.release()

    def gather(self) -> None:
        """Every tensor is whole, on the device."""
        whole = torch.empty(self.num_bytes * dist.get_world_size(), dtype=torch.uint8, device=self.device)
        dist.all_gather_into_tensor(whole, self.part)
        for tensor, start, shape in zip(self.tensors, self.starts, self.shapes, strict=False):
            size = shape.numel() * tensor.element_size()
            tensor.data = whole[start : start + size].view(tensor.dtype).view(shape)

    def release(self) -> None:
        """Every tensor is empty."""
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
