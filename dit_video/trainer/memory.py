"""What a training step holds in memory, counted tensor by tensor: a ledger of every storage from its birth to its end.

It sees the storages behind tensors, not what an operation needs inside itself, nor what an allocator keeps in reserve.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dit_video.shapes import Batch
from dit_video.trainer.fit import Hardware, fit
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.parallel import local

PHASES = ("forward", "backward", "update")
KEPT = ("transformer", "text encoder", "other networks", "averages", "optimisers", "gradients")
"""Parts that are cut with the weights."""
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
"""Activations are what a forward pass leaves behind for its backward pass; temporaries are what no part of the module keeps."""

STEPS = 2
"""The first makes the optimisers' state, the second has it from its beginning."""

FLOPS: dict[Any, Callable[..., int]] = flop_registry | {  # torch's counter knows the kernels of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}

Parts = dict[str, int]  # bytes by part


@dataclass(frozen=True)
class Memory:
    """What a rank holds in a training step, in bytes."""

    peaks: dict[str, Parts]  # for each phase what each part holds at the moment at which all together hold most
    most: Parts  # what each part holds at its own greatest
    flops: dict[
        str, float
    ]  # of each phase of one step: products of matrices and attention, those that are computed again among them
    made: dict[str, float]  # bytes of new tensors
    sent: dict[str, float]  # bytes that go to other ranks, at the most

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.peaks.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))


def along(one: Memory, other: Memory, times: float) -> Memory:
    """What lies on the line from one to another, times as far as that: memory of more blocks from that of fewer."""

    def line(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {key: a.get(key, 0) + times * (b.get(key, 0) - a.get(key, 0)) for key in {**a, **b}}

    peaks = {phase: line(one.peaks[phase], other.peaks[phase]) for phase in PHASES}
    return Memory(peaks, *(line(getattr(one, name), getattr(other, name)) for name in ("most", "flops", "made", "sent")))


class Ledger(TorchDispatchMode):
    """Writes down every storage of a type of device that is made and freed while it is on; counts FLOPs and bytes sent beside it.

    `watch` tells it which storages are weights, gradients and so on, and in which phase of a step the module is.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device, self.phase = device, "build"
        self.log: list[tuple[int, int, str]] = []  # a storage's number, bytes more or fewer, phase
        self.part: dict[int, str] = {}  # of the storages of which it is known
        self.flops: Counter[str] = Counter()  # by phase
        self.sent: Counter[str] = Counter()
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # number and storage, by address
        self._size: dict[int, int] = {}  # by number, of those alive
        self._born: dict[int, str] = {}
        self._count = 0

    def __enter__(self) -> "Ledger":
        self._resize = torch.UntypedStorage.resize_
        ledger, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # how gathered weights come and go, past any operation
            done = resize(storage, size)
            if storage._cdata in ledger._alive:
                ledger._write(ledger._alive[storage._cdata][0], storage.nbytes())
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it works on local tensors, which come by here one by one
        kwargs = kwargs or {}
        result = self.call(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.number(tensor)
        if (count := FLOPS.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops[self.phase] += count(*args, **kwargs, out_val=result)
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            twice = 2 if "reduce" in func.name() and "scatter" not in func.name() else 1  # pieces are summed, then handed round
            self.sent[self.phase] += twice * max(
                (x.nbytes for x in tree_leaves((args, result)) if isinstance(x, Tensor)), default=0
            )
        return result

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, which is written down where it is new; none where it lies elsewhere."""
        if self.hides(tensor) or tensor.device.type != self.device or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            self._count += 1
            number = self._count

            def freed(_: Any) -> None:
                del self._alive[address]
                self._write(number, 0)

            self._alive[address] = number, weakref.ref(storage, freed)
            self._born[number] = self.phase
            self._write(number, storage.nbytes())
        return self._alive[address][0]

    def hides(self, tensor: Tensor) -> bool:
        """Whether a tensor has no contents, as those that DTensor asks for the shape of a result with."""
        return isinstance(tensor, FakeTensor)

    def _write(self, number: int, size: int) -> None:
        if change := size - self._size.get(number, 0):
            self.log.append((number, change, self.phase))
        self._size[number] = size

    def name(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """Says what the storages of tensors are; what has been named keeps its name."""
        for tensor in tensors:
            if tensor is not None and (number := self.number(local(tensor.detach()))) is not None:
                self.part.setdefault(number, part)

    def name_batch(self, batch: Batch) -> None:
        """Says that a batch is one."""
        encoded = [tensor for caption in batch.encoded or () if caption for tensor in caption.tensors]
        self.name(
            "batch",
            [batch.video, batch.latents, batch.weights, batch.slots, batch.starts, batch.audio, batch.has_audio, *encoded],
        )

    def name_activations(self) -> None:
        """What was made in the forward pass that is now over, and is still there, are activations."""
        for number, size in self._size.items():
            if size and self._born[number] == "forward":
                self.part.setdefault(number, ACTIVATIONS)

    def read(self, steps: int) -> Memory:
        """What was held in the steps that were watched, so many of them."""
        held: Counter[str] = Counter()
        peaks: dict[str, Parts] = {}
        most: Parts = {}
        made: Counter[str] = Counter()
        total = 0
        for number, change, phase in self.log:
            part = self.part.get(number, TEMPORARIES)
            held[part] += change
            total += change
            if phase not in PHASES:
                continue
            made[phase] += max(change, 0)
            if phase not in peaks or total > sum(peaks[phase].values()):
                peaks[phase] = dict(held)
            most[part] = max(most.get(part, 0), held[part])
        each_step = ({phase: each[phase] / steps for phase in PHASES} for each in (self.flops, made, self.sent))
        return Memory(peaks, most, *each_step)


@contextmanager
def watch(module: VideoDiffusion, ledger: Ledger) -> Iterator[None]:
    """Tells a ledger what the storages of a module are, and in which phase its training steps are."""

    def begin(_: Any, arguments: tuple) -> None:
        """The objective is asked: a micro-batch begins."""
        if not handles:  # the optimisers are made when all ranks have met
            handles.extend(optimiser.register_step_post_hook(stepped) for optimiser in module.named_optimisers.values())
        ledger.phase = "forward"
        ledger.name_batch(arguments[1])
        ledger.name("transformer", module.network.transformer.parameters())
        ledger.name("text encoder", module.network.text.parameters())
        ledger.name("other networks", (p for part in module.trained_parts().values() for p in part.parameters()))
        ledger.name("averages", (average for each in module.ema.averages.values() for average in each))

    backward = module.manual_backward

    def manual_backward(loss: Tensor, *arguments: Any, **named: Any) -> None:
        ledger.name_activations()
        ledger.phase = "backward"
        backward(loss, *arguments, **named)
        ledger.name("gradients", [p.grad for learner in module.learners.values() for p in learner.parameters])
        ledger.phase = "update"

    def stepped(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        ledger.name("optimisers", (x for state in optimiser.state.values() for x in state.values() if isinstance(x, Tensor)))

    handles: list[Any] = []
    beginning = module.objective.register_forward_pre_hook(begin)
    module.manual_backward = manual_backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for handle in [beginning, *handles]:
            handle.remove()
        del module.manual_backward


def measure(make_module: Callable[[], VideoDiffusion], make_batch: Callable[[], Batch], hardware: Hardware) -> Memory:
    """What this rank holds in steps that are really taken."""
    ledger = Ledger("cpu" if hardware.accelerator == "cpu" else "cuda")
    with ledger:
        module = make_module()
        with watch(module, ledger):
            fit(module, (make_batch() for _ in range(STEPS + 1)), [], [], hardware)  # the last has no next one beside it
    return ledger.read(STEPS + 1)
