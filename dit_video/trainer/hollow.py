"""Training steps without memory and without arithmetic: the real module on tensors that have shapes and nothing else.

So a step's memory and FLOPs are predicted by the very code that takes it, for any network, on any layout, on one process.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dit_video.shapes import Batch
from dit_video.trainer.fit import Hardware
from dit_video.trainer.layout import Layout
from dit_video.trainer.memory import STEPS, Ledger, Memory, watch
from dit_video.trainer.module import VideoDiffusion

SEEN = 2
"""Micro-batches of a step; from the second on there are gradients beside the activations."""

# What autocast does on a GPU and not on a CPU, besides products of matrices (torch's autocast op reference).
WIDEST = ("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "index_put", "scatter_add", "tensordot", "vdot")
OUT_FLOAT32 = ("softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList")
IN_FLOAT32 = (
    "acos", "asin", "cosh", "cosine_similarity", "dist", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "linalg_vector_norm", "log",
    "log10", "log1p", "log2", "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim", "pdist", "pow.Scalar", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "softplus", "tan",
)  # fmt: skip


class Hollow(FakeTensorMode):
    """Tensors without contents."""

    depth = 0  # more than 1 where somebody inside asks for the shape of a result, as DTensor does

    def __enter__(self) -> "Hollow":
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1

    def __deepcopy__(self, memo: dict) -> "Hollow":
        return self  # a copied tensor, such as an average, belongs to the same mode


class HollowLedger(Ledger):
    """A ledger in whose steps every number that is read out of a tensor is 1."""

    def __init__(self, hollow: Hollow) -> None:
        super().__init__()
        self.hollow = hollow

    def hides(self, tensor: Tensor) -> bool:
        return self.hollow.depth > 1

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if self.hollow.depth == 1 and kwargs.get("device") == torch.device(
            "meta"
        ):  # memory need not be given later: nothing has any
            kwargs = kwargs | {"device": torch.device(self.device)}
        return func(*args, **kwargs)


def predict(make_module: Callable[[], VideoDiffusion], make_batch: Callable[[], Batch], hardware: Hardware) -> Memory:
    """What rank 0 holds in steps of its part of a batch, in a world of `hardware`; a GPU's autocast is imitated for one.

    Two micro-batches are gone through, as no later one differs from the second, and what a step computes is counted for all of them.
    """
    layout = hardware.parallel.layout
    on_gpu = hardware.accelerator != "cpu"
    mesh = None
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch about tensors without contents
        if layout.world_size > 1:
            stack.enter_context(_world(layout.world_size))
            mesh = layout.mesh("cpu")
            weights = layout.weights_mesh(mesh)  # made now, as groups are made of numbers that must be read
            stack.enter_context(patch.object(Layout, "weights_mesh", lambda *_: weights))
        hollow = stack.enter_context(Hollow(allow_non_fake_inputs=True))
        ledger = stack.enter_context(HollowLedger(hollow))
        module = make_module()
        module.to = lambda device: module  # type: ignore  # it lies nowhere
        module.prepare(mesh)
        module.manual_backward = Tensor.backward  # type: ignore[method-assign,assignment]
        stack.enter_context(watch(module, ledger))
        if hardware.precision == "bf16-mixed":
            if on_gpu:
                stack.enter_context(_autocast_of_a_gpu())
            stack.enter_context(MixedPrecision("bf16-mixed", "cpu").forward_context())
        ahead = make_batch()  # the loader's next one
        for number in range(STEPS):
            batch, ahead = ahead, make_batch()
            ledger.name_batch(ahead)
            taken = sorted(batch.parts, reverse=True)[:SEEN]
            module.training_step(replace(batch, parts=taken), number)
        found = ledger.read(STEPS)
    if on_gpu and module.offload_ema:
        peaks = {
            phase: {part: size for part, size in parts.items() if part != "averages"} for phase, parts in found.peaks.items()
        }
        found = replace(found, peaks=peaks, most={part: size for part, size in found.most.items() if part != "averages"})
    clips, times = sum(batch.parts) / sum(taken), len(batch.parts) / len(taken)
    more = {"forward": 1.0, "backward": 1.0, "update": 0.0}
    return replace(
        found,
        flops={phase: value * (1 + more[phase] * (clips - 1)) for phase, value in found.flops.items()},
        made={phase: value * (1 + more[phase] * (clips - 1)) for phase, value in found.made.items()},
        sent={phase: value * (1 + more[phase] * (times - 1)) for phase, value in found.sent.items()},
    )


@contextmanager
def _world(size: int) -> Iterator[None]:
    """A process group of which this is rank 0 and the others are imagined."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a plan imagines its ranks; run it in one process that belongs to no group of processes")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it remembers the groups, and a world to come may look the same


@contextmanager
def _autocast_of_a_gpu() -> Iterator[None]:
    """Lets autocast of the CPU's tensors treat operations as a GPU's does."""

    def cast(operation: Any, how: str, *arguments: Any, **named: Any) -> Any:
        floats = [
            x.dtype
            for x in tree_leaves((arguments, named))
            if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float32)
        ]
        wide = torch.float32 if how == "in" or (how == "widest" and torch.float32 in floats) else None

        def widened(x: Tensor) -> Tensor:
            return x.to(wide) if wide is not None and x.dtype == torch.bfloat16 else x

        if how == "out" and torch.bfloat16 in floats and named.get("dtype") is None:
            named = named | {"dtype": torch.float32}
        with torch.autocast("cpu", enabled=False):
            return operation(*tree_map_only(Tensor, widened, arguments), **tree_map_only(Tensor, widened, named))

    with torch.library._scoped_library("aten", "IMPL") as library:
        for how, names in (("widest", WIDEST), ("out", OUT_FLOAT32), ("in", IN_FLOAT32)):
            for name in names:
                packet, _, overload = name.partition(".")
                operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, partial(cast, operation, how), "AutocastCPU")
        yield
