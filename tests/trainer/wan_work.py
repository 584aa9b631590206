"""What every rank of a test of Wan does: a small training of two experts, on pixels, in real processes."""

import os
from functools import partial
from typing import Any

import torch
from layout_work import Recorder, batch_of
from torch import Tensor

from dit_video.model.layers import initialise
from dit_video.model.lora import add_adapters
from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.wan import WanExperts, WanTransformer
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.seeding import seeded
from dit_video.trainer.fit import Hardware, fit
from dit_video.trainer.layout import Layout
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.optim import Optimisers
from dit_video.trainer.parallel import whole


def make_experts(adapted: bool) -> Network:
    """Random everywhere, zero nowhere; about half of the clips are above the boundary."""
    expert = partial(WanTransformer, 24, 2, 2, 32, 16, 3, (2, 4, 4), text_length=12, level_dim=16)
    network = Network(WordEncoder(dim=16, heads=2, buckets=64, max_words=12), WanExperts(expert, 0.7))
    initialise(network, 0)
    if adapted:
        add_adapters(network.transformer, rank=3)
        initialise(network, 0)  # the adapters: what is frozen stays as it is
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(0, name, "away from zero"))
    return network


def training_experts(
    layout: dict[str, int], adapted: bool, steps: int = 3
) -> tuple[list[tuple[float, float]], dict[str, Tensor], list[int]]:
    """Loss and gradient norm of every step, the weights at the end, and how many clips each call of an expert had on this rank."""
    torch.set_default_dtype(torch.float64)
    shape, recorder, network = Layout(**layout), Recorder(), make_experts(adapted)
    machine = Hardware(devices=shape.world_size, precision="32-true", layout=shape, threads=1)
    objective = Objective({"text_to_video": TextToVideo(), "first": FirstFrames()}, LogitNormal(), "velocity")
    module = VideoDiffusion(
        network, objective, Optimisers(warmup_clips=0, muon_lr=None), max_clips=1000, ema_decay=0.9, parallel=machine.parallel
    )
    clips: list[int] = []
    for expert in (network.transformer.high, network.transformer.low):  # type: ignore[union-attr]
        expert.text.register_forward_hook(lambda _, inputs, __: clips.append(len(inputs[0])))
    rank = int(os.environ.get("RANK", 0))
    batches = (batch_of(step, shape.data_rank(rank), shape.data_size) for step in range(steps))
    fit(module, batches, [recorder], [], machine)
    return recorder.found, {name: whole(value).detach().clone() for name, value in module.state_dict().items()}, clips


def compared(found: Any) -> Any:
    """Of what training_experts gives, what must not depend on the layout."""
    return found[:2]
