"""What is done to a network from outside so that many ranks train it: tokens split, activations recomputed, blocks compiled, weights cut.

The network itself knows nothing of this; one function, in the order in which the parts must come.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dit_video.model.network import Network
from dit_video.trainer.context import split_tokens
from dit_video.trainer.layout import Layout

Recompute = Literal["none", "selective", "full"]
Precision = Literal["float32", "bfloat16"]

KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
"""What selective checkpointing keeps: products of matrices cost much to compute again and little to keep; all else is recomputed."""


@dataclass(frozen=True)
class Parallel:
    """How a network is trained on its ranks."""

    layout: Layout = field(default_factory=Layout)
    recompute: Recompute = "none"  # activations in the backward pass: none, all but matrix products, or all
    compile: bool = False  # every block, by torch.compile
    gather_to_sample: bool = True  # every rank holds all of the averaged weights while it samples, and waits for no other
    gather_precision: Precision = "float32"  # in which cut weights travel to be used; gradients are summed in float32

    def __post_init__(self) -> None:
        if self.recompute not in ("none", "selective", "full"):
            raise ValueError(f"recompute must be none, selective or full, got {self.recompute!r}; set trainer.recompute")
        if self.gather_precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"gather_precision must be float32 or bfloat16, got {self.gather_precision!r}; set trainer.gather_precision"
            )


def parallelise(network: Network, plan: Parallel, mesh: DeviceMesh | None) -> None:
    """Prepares a network for its ranks, in place; without a mesh there is one rank, and its weights stay whole."""
    transformer = network.transformer
    if mesh is not None and plan.layout.context > 1:
        split_tokens(transformer, mesh["context"].get_group())
    for block in transformer.blocks:
        if plan.recompute != "none":
            forget_activations(block, plan.recompute)
        if plan.compile:
            block.compile()
    if mesh is not None:
        weights = plan.layout.weights_mesh(mesh)
        for block in transformer.blocks:
            shard(block, weights, plan.gather_precision)
        shard(transformer, weights, plan.gather_precision)
        shard(network.text, weights, plan.gather_precision)  # by itself, as sampling asks it once and the transformer many times


def shard(module: nn.Module, mesh: DeviceMesh, precision: Precision = "float32") -> None:
    """Cuts a module's weights over the ranks of a mesh; gradients are summed over them, as the loss already divides by all clips.

    Products of matrices are computed in what autocast says in any case; with bfloat16 the weights are cast before they travel, which
    halves what is sent and rounds what autocast would not have, such as offsets of the modulation.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


def forget_activations(block: nn.Module, how: Recompute) -> None:
    """Lets a block forget its activations and compute them again in the backward pass."""

    def kept(context: object, operation: Callable, *arguments: object, **named: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: dict[str, Any] = {"context_fn": lambda: create_selective_checkpoint_contexts(kept)} if how == "selective" else {}
    # its forward is replaced and the block is not wrapped, so that parameters keep their names
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over ranks; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(like: Tensor) -> slice:
    """Which rows of a weight this rank holds; all of them where it is not cut."""
    if not isinstance(like, DTensor):
        return slice(0, like.shape[0] if like.ndim else 1)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return slice(offset[0], offset[0] + shape[0])


@torch.no_grad()
def copy_whole(weight: Tensor, values: Tensor) -> None:
    """Puts values for all of a weight into the part of it that this rank holds."""
    own = local(weight)
    own.copy_(values[rows_of(weight)] if isinstance(weight, DTensor) else values)
