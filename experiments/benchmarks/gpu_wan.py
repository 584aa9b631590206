"""Wan 1.3B on one CUDA GPU: its transformer beside diffusers' in one loop, and its training on cached latents; gpu.sh runs both.

python experiments/benchmarks/gpu_wan.py beside cached        # without a GPU the same on a small model, so that it is known to run
"""

import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu import program
from torch import nn
from torch.utils._pytree import tree_leaves

from dit_video.model.cost import TRAINING, flops_by_part
from dit_video.model.network import Network
from dit_video.model.published import load, make_transformer
from dit_video.model.text import WordEncoder
from dit_video.sampler.guidance import guided
from dit_video.sampler.solvers import Velocity, unipc
from dit_video.sampler.times import flow_unipc
from dit_video.shapes import Context, Grid, Patch, Stream, patchify, token_places
from dit_video.trainer.callbacks.throughput import peak_flops
from dit_video.trainer.parallel import forget_activations

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from text_models import save_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Wan:
    """Sizes of a transformer of Wan, of its text, and of a clip; a step that is guided is one of `steps`."""

    width: int = 1536
    depth: int = 30
    heads: int = 12
    mlp_dim: int = 8960
    text_dim: int = 4096
    grid: Grid = Grid(21, 30, 52)
    device: str = "cuda"
    steps: int = 4


def beside_diffusers(size: Wan) -> bool:
    """Wan's transformer beside diffusers' with the same weights, in one loop, interleaved: a training step, and a guided sampling step.

    A training step is forward, backward with every block recomputed, and AdamW, under bf16 autocast. Guided steps are the preset's, UniPC
    with guidance 5 on noise; diffusers' are those of its pipeline, whose weights are bf16, as its users have them.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    device, grid = size.device, size.grid
    sizes = {"num_attention_heads": size.heads, "attention_head_dim": size.width // size.heads, "num_layers": size.depth}
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        theirs = WanTransformer3DModel(in_channels=16, out_channels=16, text_dim=size.text_dim, ffn_dim=size.mlp_dim, **sizes)
        with torch.no_grad():  # which are zeros or ones at first, and would hide what is multiplied by them
            for parameter in theirs.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(folder)
        theirs.enable_gradient_checkpointing()
        own = make_transformer(Path(folder)).to_empty(device=device)
        load(own, Path(folder))
        other = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    noise = torch.randn(1, 16, grid.t, 2 * grid.h, 2 * grid.w, device=device)
    told, untold = torch.zeros(2, 1, 512, size.text_dim, device=device)
    told[:, :64], untold[:, :8] = (torch.randn(1, length, size.text_dim, device=device) for length in (64, 8))
    tokens = patchify(noise.movedim(1, -1), own.patch)
    nothing = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
    place = token_places(grid, Patch(4, 16, 16), 16.0, 4.0)[None].to(device)

    def ask(x: torch.Tensor, level: torch.Tensor, states: torch.Tensor, length: int) -> torch.Tensor:
        stream = Stream(x, place, level, nothing.long(), nothing, nothing)
        return own({"video": stream}, Context(states[:, :length], torch.tensor([length], device=device)))[0]["video"]

    half = torch.tensor([[0.5]], device=device)
    asked = {
        "ours": lambda: ask(tokens, half, told, 64),
        "diffusers": lambda: theirs(noise, 1000 * half[0], told, return_dict=False)[0],
    }
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        found, wanted = asked["ours"]().float(), patchify(asked["diffusers"]().float().movedim(1, -1), own.patch)
    good = close("one forward pass", found, wanted)

    schedule, pipeline = flow_unipc(size.steps, 3.0), WanPipeline(None, None, None, UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), other)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def sample_ours() -> torch.Tensor:
        def velocity(states: torch.Tensor, length: int) -> Velocity:
            return lambda x, time: ask(x, schedule.told_at(time)[:, :1], states, length)

        wanted = guided(velocity(told, 64), velocity(untold, 8), 5.0)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return unipc(wanted, tokens, schedule.times.to(device)[:, None, None].expand(-1, 1, grid.num_tokens), None)

    def sample_theirs() -> torch.Tensor:
        made = pipeline(
            prompt_embeds=told, negative_prompt_embeds=untold, latents=noise.clone(), guidance_scale=5.0, output_type="latent",
            height=16 * grid.h, width=16 * grid.w, num_frames=4 * grid.t - 3, num_inference_steps=size.steps,
        ).frames  # fmt: skip
        return patchify(made.float().movedim(1, -1), own.patch)

    good &= close(f"latents after {size.steps} guided steps", sample_ours(), sample_theirs(), bound=0.1)

    def show(
        what: str, work: dict[str, Callable[[], object]], per: int, repeats: int, passes: int, held: dict[str, list[nn.Module]]
    ) -> None:
        """Times both in turn; each one's memory is the peak less what the other models hold."""
        times: dict[str, list[float]] = {name: [] for name in work}
        memory = dict.fromkeys(work, 0.0)
        for number in range(repeats + 1):
            for name in work:
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                work[name]()
                if device == "cuda":
                    torch.cuda.synchronize()
                    memory[name] = (torch.cuda.max_memory_allocated() - bytes_of(held[name])) / 2**30
                times[name] += [(time.perf_counter() - started) / per] if number else []
        flops = passes * sum(flops_by_part(network, grid, 1, 64, num_levels=1).values())
        for name, taken in times.items():
            seconds = statistics.median(taken)
            more = f", MFU {flops / seconds / peak_flops(torch.device(device)):.3f}, peak memory {memory[name]:.2f} GiB"
            print(f"wan {what}, {name}: {seconds * 1e3:.0f} ms ({min(taken) * 1e3:.0f} to {max(taken) * 1e3:.0f})"
                  f"{more if device == 'cuda' else ''}")  # fmt: skip
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["diffusers"], strict=True))
        print(f"wan {what}: diffusers takes {ratio:.3f} of our time", flush=True)

    network = Network(WordEncoder(size.text_dim), own)
    both = {"ours": sample_ours, "diffusers": sample_theirs}
    show("guided step", both, size.steps, 3, 2, {"ours": [theirs, other], "diffusers": [own, theirs]})

    for block in own.blocks:
        forget_activations(block, "full")
    models = {"ours": own, "diffusers": theirs}
    optimisers = {name: torch.optim.AdamW(model.parameters(), 1e-5, fused=True) for name, model in models.items()}

    def train(name: str) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = asked[name]().float().square().mean()
        loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad()

    pipeline.transformer = other = None
    apart = {"ours": [theirs, optimisers["diffusers"]], "diffusers": [own, optimisers["ours"]]}
    show("training step", {name: partial(train, name) for name in models}, 1, 5, TRAINING, apart)
    return good


def close(what: str, found: torch.Tensor, wanted: torch.Tensor, bound: float = 0.02) -> bool:
    far = float((found - wanted).abs().mean() / wanted.abs().mean())
    print(
        f"wan beside diffusers, bf16, {what}: mean difference {far:.1e} of the mean value  {'PASS' if far < bound else 'FAIL'}",
        flush=True,
    )
    return far < bound


def bytes_of(held: Iterable[nn.Module | torch.optim.Optimizer]) -> int:
    """Of parameters and of an optimiser's state."""
    tensors = [x for each in held for x in tree_leaves(each.state_dict()) if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors if x.is_cuda)


def cached(small: bool, *more: str) -> bool:
    """The programs as one calls them: clips are encoded to latents and text states, and a model of Wan's sizes is trained on those."""
    size = ["data.num_frames=81", "data.height=480", "data.width=832", "data.fps=16"]
    on = ["trainer=gpu", "trainer.recompute=full"]
    model, dim, clips, processes = ["model=wan2.1_t2v_1.3b"], 4096, 4, 8
    if small:
        size, on, dim, processes = ["data.num_frames=9", "data.height=64", "data.width=64", "data.fps=8"], [], 64, 1
        model += ["model.width=64", "model.depth=2", "model.heads=2", "model.mlp_dim=96"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames, height, width, fps = (word.partition(".")[2] for word in size)
        program("data", "world", f"out={folder}/world", f"clips={clips}", frames, height, width, fps, "shard_size=2", "num_prompts=8",
                "validation_clips=1", f"workers={processes}")  # fmt: skip
        program("data", "random_autoencoder", f"out={folder}/vae")
        save_umt5(folder / "umt5", dim)
        common = ["data=shards", "text=umt5", f"text.dim={dim}", *size, "data.random_start=false", *model]
        started = time.perf_counter()
        program("data", "encode", *common, f"data.shards={folder}/world/*.tar", f"out={folder}/latents",
                f"autoencoder.folder={folder}/vae", f"text.folder={folder}/umt5")  # fmt: skip
        print(
            f"cached: {clips} clips of {' '.join(size)} encoded in {time.perf_counter() - started:.0f} s by a narrow random autoencoder"
        )
        quiet = [f"every.{what}=0" for what in ("save", "sample", "validate", "monitor")]
        program("train", *common, *on, *more, "optimisers=adamw", f"data.shards={folder}/latents/*.tar", f"runs={folder}/runs", "name=wan",
                "logger=none", "data.batch_size=1", "max_clips=12", "every.record=2", *quiet)  # fmt: skip
        run = folder / "runs" / "wan"
        every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in every if "perf/mfu" in line][1:]  # the first holds the start
        parameters = json.loads((run / "summary.json").read_text())["parameters"]
    speed, mfu, share = (
        statistics.median(line[f"perf/{what}"] for line in lines) for what in ("clips_per_second", "mfu", "share_in_steps")
    )
    tokens = statistics.median(line["perf/tokens_per_second"] for line in lines) / speed
    told = f"{parameters / 1e9:.3f}B parameters, {tokens:,.0f} tokens a clip, {1e3 / speed:.0f} ms a step, MFU {mfu:.3f}"
    if not small:
        told += f", peak memory {max(line['perf/peak_memory_gib'] for line in lines):.2f} GiB"
    losses = [line["train/loss"] for line in every if "train/loss" in line]
    good = bool(losses) and all(map(math.isfinite, losses))
    told += f", {1 - share:.2%} of the time outside of steps, losses {losses[0]:.3f} to {losses[-1]:.3f}"
    print(f"cached: dit-video train {' '.join([*on, *more])}: {told}  {'PASS' if good else 'FAIL'}", flush=True)
    return good


def planned() -> bool:
    """What `dit-video plan` predicts of such a training's memory beside what it measures here."""
    words = [
        "model=wan2.1_t2v_1.3b",
        "text=umt5",
        "trainer=gpu",
        "trainer.recompute=full",
        "optimisers=adamw",
        "data.batch_size=1",
    ]
    size = ["data=shards", "data.shards=none.tar", "data.num_frames=81", "data.height=480", "data.width=832", "data.fps=16"]
    told = program("plan", *words, *size, "caption_words=64", "measure=true")
    error = float(re.findall(r"^ *peak by torch's allocator +\S+ \S+ +\S+ \S+ +([+-][\d.]+)%", told, re.M)[0])
    print(told, f"error of the peak {error:+.1f}%  {'PASS' if abs(error) < 10 else 'FAIL'}", sep="", flush=True)
    return abs(error) < 10


def save_umt5(folder: Path, dim: int) -> None:
    """A text encoder in UMT5's layout with random weights, one layer of it."""
    import transformers

    config = transformers.UMT5Config(vocab_size=96, d_model=dim, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder, "umt5")


if __name__ == "__main__":
    small = not torch.cuda.is_available()
    parts: dict[str, Callable[[], bool]] = {
        "beside": lambda: beside_diffusers(Wan(64, 2, 2, 96, 64, Grid(2, 3, 4), "cpu") if small else Wan()),
        "cached": lambda: cached(small),
        "compiled": lambda: cached(small, "trainer.compile=true"),
    } | ({} if small else {"planned": planned})
    sys.exit(0 if all([parts[name]() for name in sys.argv[1:] or parts]) else 1)
