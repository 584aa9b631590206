"""How ranks share the work: replicate x shard x context, and what each of them is in it.

Ranks of one context group hold the same clips and a part of their tokens each; ranks of one shard group hold other clips and a part of
the weights each; replicas hold all of it again. What a step computes does not depend on the layout.
"""

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

LAST_WORDS = 2.0  # seconds in which rank 0 tells its error before the others end, and a launcher with them all ranks
NAMES = ("replicate", "shard", "context")


@dataclass(frozen=True)
class Layout:
    """Sizes of the three kinds of groups; their product is the number of ranks."""

    replicate: int = 1
    shard: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"a group has at least 1 rank, got {name}={value!r}; set trainer.layout.{name}")

    @classmethod
    def of(cls, world_size: int, replicate: int | None = 1, shard: int | None = 1, context: int | None = 1) -> "Layout":
        """The layout of so many ranks; one size that is None takes what the others leave."""
        sizes = {"replicate": replicate, "shard": shard, "context": context}
        open_ = [name for name, size in sizes.items() if size is None]
        known = math.prod(size for size in sizes.values() if size is not None)
        if len(open_) > 1:
            raise ValueError(f"only one size can be left open, got {', '.join(open_)}; set trainer.layout.{open_[0]}")
        if open_ and known:
            sizes[open_[0]] = world_size // known
        layout = cls(**sizes)  # type: ignore[arg-type]
        if layout.world_size != world_size:
            raise ValueError(
                f"{world_size} ranks are not {layout.replicate} x {layout.shard} x {layout.context} (replicate x shard x context); set "
                "trainer.layout, trainer.devices or trainer.num_nodes"
            )
        return layout

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def data_size(self) -> int:
        """Ranks that hold clips of their own."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which of the ranks with clips of their own a rank is."""
        return rank // self.context

    def mesh(self, device: str) -> DeviceMesh:
        """The process groups of this layout; ranks of one context group are neighbours, then those of a shard group."""
        return init_device_mesh(device, (self.replicate, self.shard, self.context), mesh_dim_names=NAMES)

    def weights_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The ranks that weights are cut over, context ranks among them, and where there are replicas those as a first dimension."""
        if self.replicate == 1:
            return mesh["shard", "context"]._flatten("weights")
        return init_device_mesh(
            mesh.device_type, (self.replicate, self.shard * self.context), mesh_dim_names=("replicate", "weights")
        )


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that lay themselves out over a mesh, with the mesh of a layout instead of its own two dimensions."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(data_parallel_size=layout.data_size, tensor_parallel_size=layout.context)
        self.cluster_environment = TorchElasticEnvironment()  # whose variables launch.py has set, whoever started the ranks
        self.layout = layout

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        self._device_mesh = self.layout.mesh(self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


@dataclass(frozen=True)
class _Failed:
    """What a rank that has failed hands in, in place of whatever all ranks hand in next."""

    interrupted: bool  # it was told to stop
    why: str


class RankFailed(RuntimeError):
    """A rank, this one or another, failed at something that all do together; every rank raises it at the same place."""

    interrupted = False  # it was told to stop


def all_gathered(mine: T) -> list[T]:
    """What every rank hands in, which can be any plain object, by rank; RankFailed where one failed before it came here."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        found: list[Any] = [mine]
    else:
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
    for rank, each in enumerate(found):
        if isinstance(each, _Failed):
            failure = RankFailed(each.why if len(found) == 1 else f"rank {rank}: {each.why}")
            failure.interrupted = each.interrupted
            raise failure
    return found


def together(work: Callable[[], T]) -> T:
    """What `work` gives, which all ranks do; RankFailed on all where it fails on one, at whatever all_gathered they have come to."""
    value: Any = None
    try:
        value = work()
    except RankFailed:  # which all know of
        raise
    except Exception as error:
        log.debug("failed", exc_info=True)
        value = _Failed(isinstance(error, InterruptedError), f"{type(error).__name__}: {error}")
    all_gathered(value if isinstance(value, _Failed) else None)
    return value


@contextmanager
def asked_before(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Before each call of a module all ranks say that they come: for such as wait for other ranks inside, where nobody can be told."""
    hooks = [module.register_forward_pre_hook(lambda *_: all_gathered(None) and None, prepend=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_first_rank(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; where it fails, rank 0 raises the error and the others end without a word."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    mine: tuple[Any, BaseException | None] = (None, None)
    first = torch.distributed.get_rank() == 0
    if first:
        try:
            mine = (work(), None)
        except Exception as error:
            mine = (None, error)
    failed, value = all_gathered((mine[1] is not None, mine[0]))[0]
    if mine[1] is not None:
        raise mine[1]
    if failed:
        time.sleep(LAST_WORDS)
        raise SystemExit(1)
    return value


def over_ranks(work: Callable[[list[T]], list[R]], items: Sequence[T], kind: Callable[[T], Hashable], layout: Layout) -> list[R]:
    """What `work` makes of items, which ranks with clips of their own share out; every rank gets all of it, in order.

    Every rank works on as many items of each kind as the others, some of them twice where they do not divide: networks whose weights are
    cut over the ranks wait for each other at every call. RankFailed, on every rank, where the work of one fails.
    """
    if layout.world_size == 1:
        return work(list(items))
    rank, size = layout.data_rank(torch.distributed.get_rank()), layout.data_size
    kinds: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        kinds.setdefault(kind(item), []).append(number)
    mine = [number for numbers in kinds.values() for number in [*numbers, *([numbers[-1]] * (-len(numbers) % size))][rank::size]]
    made = together(lambda: dict(zip(mine, work([items[number] for number in mine]), strict=True)))
    everything = {number: result for made in all_gathered(made) for number, result in made.items()}
    return [everything[number] for number in range(len(items))]
