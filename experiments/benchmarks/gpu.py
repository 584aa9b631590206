"""Correctness and speed of the transformer and of its training on one CUDA GPU; gpu.sh runs it.

    python experiments/benchmarks/gpu.py correctness training     # some parts; without a GPU two of them run, on a small model

Speeds are the median of interleaved repetitions; MFU is three forward passes' arithmetic (dit_video.model.cost) over the step's time and
the device's published dense bf16 peak.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch

from dit_video.build import make, make_network, make_objective, plain
from dit_video.compose import compose, take_apart
from dit_video.model import attention as attend
from dit_video.model.cost import TRAINING, flops_by_part
from dit_video.model.layers import initialise
from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.shapes import Batch, Encoded, Patch, Tokens, token_grid
from dit_video.trainer import checkpoint
from dit_video.trainer.callbacks.saving import Saving, capture
from dit_video.trainer.callbacks.throughput import peak_flops
from dit_video.trainer.fit import Hardware, Spent, fit
from dit_video.trainer.launch import free_port
from dit_video.trainer.layout import Layout
from dit_video.trainer.module import VideoDiffusion

SIZES = {"base": (768, 12, 6), "xl": (1152, 28, 9), "1.3b": (1536, 30, 12)}
CLIP = (17, 64, 64)  # frames, height, width in pixels; patch 1x4x4: 4352 tokens
CAPTION = "a small red circle moves slowly to the left over a dark background"


def network(width: int, depth: int, heads: int, attention: attend.Attention) -> Network:
    model = VideoTransformer((1, 4, 4), width, depth, heads, 256, pooled_dim=256, attention=attention, rotary_theta=10_000)
    built = Network(WordEncoder(256), model)
    initialise(built, 0)
    return built.cuda()


def batch(size: int) -> Batch:
    video = torch.randint(0, 256, (size, *CLIP[:1], *CLIP[1:], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(video.cuda(), [CAPTION] * size, [""] * size, torch.arange(size), 8.0, torch.ones(size).cuda())


def step(net: Network, clips: Batch) -> torch.Tensor:
    objective = Objective({"text_to_video": TextToVideo(0.8), "image_to_video": FirstFrames(0.2)}, LogitNormal())
    with torch.autocast("cuda", torch.bfloat16):
        loss = objective(net, clips, Tokens(Patch(1, 4, 4), reference_rate=8.0)).per_clip.mean()
    loss.backward()
    return loss.detach()


def attentions() -> dict[str, attend.Attention]:
    found: dict[str, attend.Attention] = {"sdpa": attend.sdpa, "math": attend.math}
    try:
        found["flash"] = attend.Flash()
    except ValueError as error:
        print(f"flash: not measured, {error}")
    return found


def correctness() -> bool:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (torch.randn(2, 4, 512, 64, device="cuda", generator=generator) for _ in range(3))
    lengths = torch.tensor([512, 300], device="cuda")
    wanted = attend.math(query.double(), key.double(), value.double(), lengths=lengths)
    good = True
    for name, function in attentions().items():
        for dtype, bound in ((torch.float32, 1e-2), (torch.bfloat16, 2e-2)):
            if name == "flash" and dtype == torch.float32:
                continue
            error = (
                (function(query.to(dtype), key.to(dtype), value.to(dtype), None, lengths).double() - wanted).abs().max().item()
            )
            good &= error < bound
            print(f"attention {name} {dtype}: largest error {error:.2e} {'PASS' if error < bound else 'FAIL'}")
    losses = {}
    for device in ("cpu", "cuda"):
        net, clips = network(192, 3, 3, attend.sdpa).to(device), batch(2).to(device)
        objective = Objective({"text_to_video": TextToVideo()}, LogitNormal())
        losses[device] = objective(net, clips, Tokens(Patch(1, 4, 4), reference_rate=8.0)).per_clip.double().cpu()
    error = (losses["cpu"] / losses["cuda"] - 1).abs().max().item()
    good &= error < 1e-3
    print(f"loss on CPU and GPU from one seed: relative difference {error:.2e} {'PASS' if error < 1e-3 else 'FAIL'}")
    return good


def speed() -> bool:
    peak = peak_flops(torch.device("cuda"))
    grid = token_grid(*CLIP, Patch(1, 4, 4))
    for size, (width, depth, heads) in SIZES.items():
        clips = batch(4)
        nets = {
            name: network(width, depth, heads, function)
            for name, function in attentions().items()
            if name != "math" or size == "base"
        }
        times: dict[str, list[float]] = {name: [] for name in nets}
        for repetition in range(8):
            for name, net in nets.items():
                net.zero_grad()
                torch.cuda.synchronize()
                started = time.perf_counter()
                step(net, clips)
                torch.cuda.synchronize()
                if repetition >= 3:
                    times[name].append(time.perf_counter() - started)
        for name, net in nets.items():
            seconds = statistics.median(times[name])
            flops = TRAINING * sum(flops_by_part(net, grid, 4, len(CAPTION.split())).values())
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"train {size} {name}: {grid.num_tokens} tokens x 4 clips, {seconds * 1e3:.1f} ms, {4 / seconds:.1f} clips/s, "
                f"MFU {flops / seconds / peak:.3f}, peak memory so far {memory:.1f} GiB"
            )
        del nets
        torch.cuda.empty_cache()
    return True


class Cut(VideoDiffusion):
    """A module whose weights are laid out by FSDP2 although there is one rank."""

    def configure_model(self) -> None:
        if not self.learners:
            device = self.trainer.strategy.root_device
            self.prepare(Layout().mesh(device.type), device)


class Times(L.Callback):
    """When each step was over."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())


def digest(module: VideoDiffusion) -> dict[str, int]:
    """A number for each tensor of the state that differs as soon as a bit or a place does."""
    found = {}
    for group, parts in capture(module).items():
        for name, part in parts.items():
            bits = part.values.contiguous().view(torch.int32 if part.values.element_size() == 4 else torch.uint8).flatten()
            weights = torch.arange(1, bits.numel() + 1, device=bits.device)
            found[f"{group}/{name}"] = int((bits.to(torch.int64) * weights).sum())
    return found


def training(words: tuple[str, ...], steps: int = 6, clips: int = 1) -> bool:
    """The real trainer under FSDP2 on one device, on random latents: step time, peak memory, a checkpoint, and going on to the bit."""
    config = compose("train", take_apart(words))
    data, hardware, plan = config.data, Hardware(**plain(config.trainer)), make_network(config)
    grid, frozen = plan.tokens.grid(data.num_frames, data.height, data.width), plan.text.is_frozen
    shape = (
        clips,
        *token_grid(data.num_frames, data.height, data.width, plan.autoencoder.compression),
        plan.autoencoder.channels,
    )

    def batches(first: int) -> Iterator[Batch]:
        for number in range(first, steps):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(shape, generator=generator)
            told = [Encoded(torch.randn(64, plan.text.dim, generator=generator)) for _ in range(clips)] if frozen else None
            slots = torch.arange(clips) + clips * number
            yield Batch(None, [CAPTION] * clips, [str(number)] * clips, slots, data.fps, latents=latents, encoded=told)

    def run(saved: checkpoint.Saved | None, folder: Path, every: int) -> tuple[VideoDiffusion, Times]:
        module = Cut(
            make_network(config), make_objective(config), make(config.optimisers), config.max_clips, parallel=hardware.parallel
        )
        module.network.text.take_nothing(Encoded(torch.zeros(1, plan.text.dim)))
        times, keep = Times(), checkpoint.Keep()
        saving = Saving(every, folder, keep, saved, Spent(), asynchronous=True)
        saving.on_train_end = lambda trainer, module: saving.finish(trainer, module)  # type: ignore[method-assign]
        fit(module, batches(module.steps if saved is None else saved.meta["steps"]), [times, saving], [], hardware)
        return module, times

    cuda = hardware.accelerator != "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        module, times = run(None, folder, every=clips * (steps - 2))
        seconds = statistics.median(b - a for a, b in zip(times.at[:-1], times.at[1:], strict=True))
        flops = TRAINING * sum(flops_by_part(module.network, grid, clips, len(CAPTION.split())).values())
        size = sum(p.numel() for p in module.network.parameters())
        told = f"{size / 1e9:.2f}B parameters, {grid.num_tokens} tokens x {clips}, {seconds * 1e3:.0f} ms a step"
        if cuda:
            told += f", MFU {flops / seconds / peak_flops(torch.device('cuda')):.3f}"
            told += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        print(f"train {type(plan.transformer).__name__} under FSDP2: {told}", flush=True)
        wanted = digest(module)
        del module
        gc.collect()  # the trainer holds it
        if cuda:
            torch.cuda.empty_cache()
        found = checkpoint.newest(folder)
        assert found is not None
        again, _ = run(checkpoint.opened(found, checked=True), folder, every=0)
        same = digest(again) == wanted
        print(f"checkpoint of {sum(f.stat().st_size for f in found.iterdir()) / 1e9:.2f} GB at {found.name}; going on from it ends "
              f"{'bit-equal  PASS' if same else 'differently  FAIL'}")  # fmt: skip
    return same


CLIPS = (
    "trainer=gpu", "trainer.recompute=full", "optimisers=adamw", "data.num_frames=81", "data.height=480", "data.width=832",
    "data.fps=16",
)  # fmt: skip
"""32,760 tokens in the latents of an autoencoder that compresses 4 x 8 x 8."""
LARGE = ("model=1.3b", *CLIPS)
WAN = ("model=wan2.1_t2v_1.3b", "text=umt5", *CLIPS)


def program(*words: str) -> str:
    """What dit-video prints, which is to succeed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dit_video.cli", *words], capture_output=True, text=True
    )  # the package as installed
    if done.returncode:
        raise RuntimeError(f"dit-video {' '.join(words)}: {done.stdout[-2000:]} {done.stderr[-4000:]}")
    return done.stdout


def demo(*on: str) -> bool:
    """The programs on the built-in world: training with all that goes beside it, going on, judging and sampling."""
    with tempfile.TemporaryDirectory() as folder:
        program("data", "world", f"out={folder}/world", "clips=512", "num_prompts=32", "validation_clips=32")
        every = [f"every.{what}=640" for what in ("save", "sample", "validate", "evaluate", "monitor", "record")]
        words = ["experiment=world_quick", *on, f"data.shards={folder}/world/*.tar", f"validation.shards={folder}/world/validation/*.tar",
                 f"runs={folder}/runs", "logger=none", *every, "eval=world_small"]  # fmt: skip
        program("train", *words, "name=whole", "max_clips=1280")
        run = Path(folder, "runs", "whole")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = {name: value for line in lines for name, value in line.items()}
        failed = [name for name in found if name.startswith("failed/")]
        program("evaluate", f"run={run}", "eval=world_small")
        program("sample", f"run={run}", "prompt=a small red circle moves left", f"out={folder}/out")
        made = len(list(Path(folder, "out").glob("*.mp4")))
        judged = sum(name.startswith("eval/") for name in found)
    good = not failed and judged > 0 and made == 1 and {"val/loss", "grad/norm"} <= found.keys()
    told = f"val/loss {found['val/loss']:.3f}, {found['perf/clips_per_second']:.0f} clips/s, {judged} numbers judged, {made} clip sampled"
    print(f"demo {' '.join(on)}: {told}, failed {failed or 'nothing'}  {'PASS' if good else 'FAIL'}", flush=True)
    return good


def alone() -> None:
    """A process group of one rank, which FSDP2 wants."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


if __name__ == "__main__":
    alone()
    parts: dict[str, Callable[[], bool]] = {
        "correctness": correctness,
        "demo": lambda: demo("trainer=gpu"),
        "training": lambda: training(LARGE),
        "training_wan": lambda: training(WAN),
        "speed": speed,
    }
    if not torch.cuda.is_available():  # the same lines on a small model, so that they are known to run
        small = ("trainer.precision=32-true", "optimisers=adamw", "model.depth=2", "model.width=64", "model.heads=2")
        wan = ("model=wan2.1_t2v_1.3b", "model.mlp_dim=64", "text=umt5", "text.dim=64", *small)
        parts = {
            "demo": demo, "training": lambda: training(("model=1.3b", *small)), "training_wan": lambda: training(wan),
        }  # fmt: skip
    sys.exit(0 if all([parts[name]() for name in sys.argv[1:] or parts]) else 1)
