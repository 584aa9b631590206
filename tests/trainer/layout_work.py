"""What every rank of a test of layouts does: a small training, in real processes with real process groups."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dit_video.build import make_network as make_plain_network
from dit_video.compose import compose, take_apart
from dit_video.data.plan import Step
from dit_video.model.layers import initialise
from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.plan import check
from dit_video.plan.step import Choice, find_buckets, measured
from dit_video.seeding import seeded
from dit_video.shapes import Batch
from dit_video.trainer.fit import Hardware, fit
from dit_video.trainer.launch import free_port
from dit_video.trainer.layout import Layout
from dit_video.trainer.memory import PHASES, Memory
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.optim import Optimisers
from dit_video.trainer.parallel import local, whole

CLIPS, STEPS, MICRO_BATCHES = 5, 20, 12


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives in each rank of a world of processes, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, work, arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        failed = [process.exitcode for process in processes if process.exitcode != 0]
        for process in processes:
            process.kill()
        if failed:
            told = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
            raise AssertionError(f"ranks ended with {failed}\n{told}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.save(work(*arguments), f"{folder}/{rank}.pt")
    except BaseException:
        import traceback

        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def make_network(heads: int = 3) -> Network:
    """Random everywhere, zero nowhere; three heads, so that two and four ranks do not divide them."""
    transformer = VideoTransformer(patch=(2, 4, 4), width=24, depth=2, heads=heads, context_dim=16, pooled_dim=16)
    network = Network(WordEncoder(dim=16, heads=2, buckets=64, max_words=12), transformer)
    initialise(network, 0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(0, name, "away from zero"))
    return network


def batch_of(step: int, rank: int, world_size: int) -> Batch:
    """A rank's part of a step of five clips, one of them a filler, as the loader deals it out."""
    generator = torch.Generator().manual_seed(step)
    video = torch.randint(0, 256, (CLIPS, 3, 8, 12, 3), generator=generator, dtype=torch.uint8)
    weights = torch.ones(CLIPS)
    weights[step % CLIPS] = 0
    parts = Step(step, 0, step * CLIPS, torch.arange(CLIPS).numpy()).micro_batches(MICRO_BATCHES)[rank::world_size]
    rows = [row for part in parts for row in (part or [-1])]  # an empty micro-batch is a filler
    real = torch.tensor([row >= 0 for row in rows])
    captions = ["" if row < 0 or row == 3 else f"clip number {row} of step {step} moves" for row in rows]
    return Batch(
        video[rows] * real[:, None, None, None, None], captions, [str(row) for row in rows], torch.tensor(rows).clamp(min=0) + step * CLIPS,
        8.0, weights[rows] * real, [max(len(part), 1) for part in parts], CLIPS,
    )  # fmt: skip


class Recorder(L.Callback):
    """Loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: VideoDiffusion, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.found.append((float(outputs["loss"]), float(pl_module.gradient_norm)))


def make_unborn(heads: int = 3) -> Network:
    """The same network before it has memory; it begins as (seed, name) say."""
    with torch.device("meta"):
        transformer = VideoTransformer(patch=(2, 4, 4), width=24, depth=2, heads=heads, context_dim=16, pooled_dim=16)
        return Network(WordEncoder(dim=16, heads=2, buckets=64, max_words=12), transformer)


def begun(layout: dict[str, int]) -> tuple[dict[str, Tensor], int]:
    """The first weights of a network that comes on the meta device, and the largest weight that this rank gave memory to, in bytes."""
    shape = Layout(**layout)
    machine = Hardware(devices=shape.world_size, precision="32-true", layout=shape, threads=1)
    module = VideoDiffusion(
        make_unborn(), Objective({"t": TextToVideo()}, LogitNormal()), Optimisers(), 100, 0.9, machine.parallel
    )
    fit(module, iter(()), [], [], machine)
    held = [local(p).untyped_storage().nbytes() for p in module.network.parameters()]
    return {name: whole(value).detach().clone() for name, value in module.state_dict().items()}, sum(held)


def trained(
    layout: dict[str, int], recipe: dict[str, Any], steps: int, callbacks: Sequence[L.Callback] = (), **hardware: Any
) -> VideoDiffusion:
    """The module after so many steps on a layout, in torch's default type."""
    shape = Layout(**layout)
    machine = Hardware(devices=shape.world_size, **{"precision": "32-true", "layout": shape, "threads": 1, **hardware})
    objective = Objective({"text_to_video": TextToVideo(), "first": FirstFrames()}, LogitNormal())
    module = VideoDiffusion(
        make_network(), objective, Optimisers(warmup_clips=0, **recipe), max_clips=1000, ema_decay=[0.9, 0.99],
        parallel=machine.parallel, offload_ema=machine.offload_ema,
    )  # fmt: skip
    rank = int(os.environ.get("RANK", 0))
    batches = (batch_of(step, shape.data_rank(rank), shape.data_size) for step in range(steps))
    fit(module, batches, callbacks, [], machine)
    return module


def training(
    layout: dict[str, int], recipe: dict[str, Any], dtype: str = "float64", steps: int = STEPS, **hardware: Any
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of every step, and all weights and averages at the end."""
    torch.set_default_dtype(getattr(torch, dtype))
    recorder = Recorder()
    module = trained(layout, recipe, steps, [recorder], **hardware)
    found = {name: whole(value).detach().clone() for name, value in module.state_dict().items()}
    for decay in module.decays:
        with module.ema.applied(decay):
            found |= {f"ema-{decay}/{name}": whole(value).detach().clone() for name, value in module.network.state_dict().items()}
    return recorder.found, found


def furthest(one: Any, other: Any) -> float:
    """The largest relative difference of losses, gradient norms and weights."""
    (steps, weights), (other_steps, other_weights) = one, other
    assert weights.keys() == other_weights.keys() and len(steps) == len(other_steps)
    differences = [
        abs(a - b) / abs(b) for pair, other in zip(steps, other_steps, strict=True) for a, b in zip(pair, other, strict=True)
    ]
    differences += [
        float((weights[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)) for name, value in other_weights.items()
    ]
    return max(differences)


def sampled(layout: dict[str, int], gather: bool) -> tuple[list[Tensor], float]:
    """Clips of seven prompts from the averaged weights after three steps, shared out over the ranks, before they are rounded to pixels;

    and how far the weights are from those before sampling, which is nothing.
    """
    import dit_video.sampler.generate as generating
    from dit_video.sampler.generate import Request, Sampler, Trained, generate
    from dit_video.trainer.layout import over_ranks

    generating.to_uint8 = lambda video: video.float()  # type: ignore[assignment]
    module = trained(layout, {"muon_lr": None}, 3, gather_to_sample=gather)
    before = {name: whole(value).detach().clone() for name, value in module.network.state_dict().items()}
    sizes = [(3, 8, 12), (3, 8, 12), (5, 8, 8), (3, 8, 12), (3, 8, 12), (3, 8, 12), (5, 8, 8)]
    requests = [Request(f"clip number {number}", number, *size, 8.0) for number, size in enumerate(sizes)]
    with module.averaged() as network:
        made = Trained(network, module.objective.tasks, module.objective.predict, None, 0.0)
        sampler = Sampler(steps=3)
        clips = over_ranks(
            lambda own: generate(made, own, sampler), requests, lambda request: request.shape, module.parallel.layout
        )
    far = max(float((whole(value) - before[name]).abs().max()) for name, value in module.network.state_dict().items())
    return [torch.as_tensor(clip) for clip in clips], far


def held(layout: dict[str, int]) -> dict[str, int]:
    """The numbers that a rank holds after a step, by kind."""
    module = trained(layout, {"muon_lr": None}, 1)
    parameters = list(module.network.parameters())
    states = [
        value for optimiser in module.named_optimisers.values() for state in optimiser.state.values() for value in state.values()
    ]
    kinds: dict[str, list[Tensor]] = {
        "weights": [p.detach() for p in parameters], "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimiser": [value for value in states if value.ndim], "average": module.ema.averages[0.9],
    }  # fmt: skip
    return {kind: sum(local(tensor).numel() for tensor in tensors) for kind, tensors in kinds.items()}


def planned(words: Sequence[str]) -> tuple[Memory, Memory]:
    """What `dit-video plan` predicts of this rank for a command line, and what two steps taken here hold."""
    config = compose("plan", take_apart([*words, "data.shards=nowhere.tar"]))
    network, choice = make_plain_network(config), Choice(check(config), config.data.micro_batches)
    buckets, _ = find_buckets(config, network, choice)
    predicted, found, _ = measured(config, network, buckets[-1], choice)
    return predicted, found


def errors(predicted: Memory, found: Memory) -> dict[str, float]:
    """Relative errors of the peak, of each phase's peak, and of every part that is a twentieth of the peak or more."""
    pairs = {"peak": (predicted.peak, found.peak)}
    pairs |= {phase: (sum(predicted.peaks[phase].values()), sum(found.peaks[phase].values())) for phase in PHASES}
    pairs |= {part: (predicted.most.get(part, 0), size) for part, size in found.most.items() if size > found.peak / 20}
    return {name: one / other - 1 for name, (one, other) in pairs.items()}
