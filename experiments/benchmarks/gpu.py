"""Correctness and speed of the transformer on one CUDA GPU; gpu.sh runs it.

Speeds are the median of interleaved repetitions; MFU is three forward passes' arithmetic (dit_video.model.cost) over the step's time and
the device's published dense bf16 peak.
"""

import statistics
import sys
import time

import torch

from dit_video.model import attention as attend
from dit_video.model.cost import TRAINING, flops_by_part
from dit_video.model.layers import initialise
from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.shapes import Batch, Patch, token_grid
from dit_video.trainer.callbacks.throughput import peak_flops

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
        loss = objective(net, clips, Patch(1, 4, 4), 8.0).per_clip.mean()
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
        losses[device] = objective(net, clips, Patch(1, 4, 4), 8.0).per_clip.double().cpu()
    error = (losses["cpu"] / losses["cuda"] - 1).abs().max().item()
    good &= error < 1e-3
    print(f"loss on CPU and GPU from one seed: relative difference {error:.2e} {'PASS' if error < 1e-3 else 'FAIL'}")
    return good


def speed() -> None:
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


if __name__ == "__main__":
    ok = correctness()
    speed()
    sys.exit(0 if ok else 1)
