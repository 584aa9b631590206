"""What a step of a training is: its clips, what the rank with most of them holds, and how long a device takes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from dit_video.build import make
from dit_video.data.buckets import ClipShape, level
from dit_video.data.errors import BadDataError
from dit_video.data.loader import ClipLoader
from dit_video.data.plan import Step
from dit_video.model.autoencoders import Pixels
from dit_video.model.cost import TRAINING, flops_by_part
from dit_video.model.network import Network
from dit_video.shapes import Batch, Encoded, token_grid
from dit_video.train import make_module
from dit_video.trainer.fit import Hardware
from dit_video.trainer.hollow import predict
from dit_video.trainer.memory import Memory, along, measure
from dit_video.trainer.module import VideoDiffusion

FEW = (3, 5)  # blocks from whose memory that of more is worked out where many ways are looked at


@dataclass(frozen=True)
class Device:
    """What a step runs on, as conf/device says it."""

    name: str
    memory: float  # bytes
    bfloat16: float  # FLOP/s at the peak, dense
    float32: float
    bandwidth: float  # of its memory, bytes/s
    interconnect: float  # to other devices of its node, bytes/s in one direction

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and not value > 0:
                raise ValueError(f"a device's {name} must be more than 0, got {value!r}; set device.{name}")

    def peak(self, hardware: Hardware) -> float:
        """FLOP/s at the peak in the precision of a training."""
        return self.bfloat16 if hardware.precision == "bf16-mixed" else self.float32


@dataclass(frozen=True)
class Bucket:
    """The clips of one shape, and the steps that are made of them."""

    shape: ClipShape
    tokens: int  # of a clip
    flops: int  # of training on a clip: the forward pass and its backward
    clips: int  # of a step
    count: int | None  # clips that there are; none: the data is not there yet


@dataclass(frozen=True)
class Choice:
    """How a step is laid out: what can be changed without changing what it computes."""

    hardware: Hardware
    micro_batches: int  # of a step, over all ranks

    @property
    def parts(self) -> int:
        """Into how many micro-batches a step is really cut: every rank with clips of its own takes as many."""
        return math.lcm(self.micro_batches, self.hardware.parallel.layout.data_size)


def find_buckets(config: DictConfig, network: Network, choice: Choice) -> tuple[list[Bucket], str | None]:
    """The buckets with the clips of their steps, and why it is not known how many clips there are, where it is not."""

    def tokens(shape: ClipShape) -> int:
        return network.tokens.grid(shape.num_frames, shape.height, shape.width).num_tokens

    def flops(shape: ClipShape) -> int:
        grid = network.tokens.grid(shape.num_frames, shape.height, shape.width)
        return TRAINING * sum(flops_by_part(network, grid, 1, config.caption_words).values())

    shapes = _shapes(config.data)
    costs = [float(flops(shape)) for shape in shapes]
    counts: list[int | None] = [None] * len(shapes)
    sizes, told = level(costs, config.data.batch_size), None
    if OmegaConf.is_missing(config.data, "shards") and not config.data.sources:
        told = "data.shards is not given"
    else:
        try:
            loader: ClipLoader = make(config.data, cost=lambda shape: float(flops(shape)), micro_batches=choice.parts)
            counts, sizes = [loader.report.count(number) for number in range(len(shapes))], loader.report.sizes
        except InstantiationException as error:
            if not isinstance(error.__cause__, BadDataError | OSError):
                raise
            told = str(error.__cause__)
    found = [Bucket(*each) for each in zip(shapes, map(tokens, shapes), map(int, costs), sizes, counts, strict=True)]
    return [bucket for bucket in found if bucket.count != 0], told


def _shapes(data: DictConfig) -> list[ClipShape]:
    default = {"num_frames": data.num_frames, "height": data.height, "width": data.width, "fps": float(data.fps)}
    buckets: Any = OmegaConf.to_container(data.buckets, resolve=True) if data.buckets else [{}]
    if unknown := [key for bucket in buckets for key in bucket if key not in default]:
        raise ValueError(f"data.buckets has no {unknown[0]}; it has {', '.join(default)}")
    return [ClipShape(**default | bucket) for bucket in buckets]


def predict_step(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Memory:
    """What the rank with most clips holds in a step of a bucket."""
    return predict(
        partial(_module, config, choice),
        partial(make_batch, config, network, bucket, choice),
        choice.hardware,
    )


def estimate_step(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Memory:
    """The same from two networks of fewer blocks where there are many, several times as fast: all blocks hold as much."""
    depth = config.model.get("depth", 0)
    if depth <= 2 * sum(FEW):
        return predict_step(config, network, bucket, choice)
    few, more = (
        predict_step(OmegaConf.merge(config, {"model": {"depth": count}}), network, bucket, choice)  # type: ignore[arg-type]
        for count in FEW
    )
    return along(few, more, (depth - FEW[0]) / (FEW[1] - FEW[0]))


def unstarted(config: DictConfig) -> DictConfig:
    """A config without the run that it starts from, whose weights need not be there yet."""
    return OmegaConf.merge(config, {"init_from": None})  # type: ignore[return-value]


def _module(config: DictConfig, choice: Choice) -> VideoDiffusion:
    module = make_module(unstarted(config), None, choice.hardware)
    if module.network.text.is_frozen and not module.network.text.is_here:
        module.network.text.take_nothing(module.network.text.imagined(1))
    return module


def make_batch(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> Batch:
    """Random clips and captions, as many as the rank with most of them gets of a step."""
    ranks = choice.hardware.parallel.layout.data_size
    parts = Step(0, 0, 0, np.arange(bucket.clips)).micro_batches(choice.parts)
    sizes = max(
        ([max(len(part), 1) for part in parts[rank::ranks]] for rank in range(ranks)), key=lambda each: (max(each), sum(each))
    )
    count, shape = sum(sizes), bucket.shape
    size = (
        count,
        *token_grid(shape.num_frames, shape.height, shape.width, network.autoencoder.compression),
        network.autoencoder.channels,
    )
    pixels = isinstance(network.autoencoder, Pixels)
    video = torch.randint(0, 256, size, dtype=torch.uint8) if pixels else None
    latents = None if pixels else torch.randn(size)
    own = network.image_encoder
    image = None if own is None else torch.randn(count, own.tokens, own.dim)
    caption, text = " ".join(f"word{number}" for number in range(config.caption_words)), network.text
    encoded: list[Encoded | None] | None = None
    if text.is_frozen and not text.is_here:
        encoded = [text.imagined(config.caption_words) for _ in range(count)]
    return Batch(
        video, [caption] * count, ["random"] * count, torch.arange(count), shape.fps, parts=sizes, step_clips=bucket.clips,
        latents=latents, known=torch.randn(size) if network.takes_images and not pixels else None, image=image, encoded=encoded,
    )  # fmt: skip


def step_seconds(config: DictConfig, memory: Memory, hardware: Hardware, device: Device) -> tuple[float, str]:
    """How long a step takes, and what bounds it: products at the stated utilisation, memory or the exchange at their full bandwidth."""
    bounds = {
        "products": sum(memory.flops.values()) / (device.peak(hardware) * config.utilisation),
        "memory": 2 * sum(memory.made.values()) / device.bandwidth,  # what is made is written once and read once, at the least
        "exchange": sum(memory.sent.values()) / (config.network if hardware.num_nodes > 1 else device.interconnect),
    }
    longest = max(bounds, key=lambda name: bounds[name])
    return bounds[longest], longest


def measured(config: DictConfig, network: Network, bucket: Bucket, choice: Choice) -> tuple[Memory, Memory, int | None]:
    """Predicted and measured memory of two real steps taken here, and what torch's allocator says of a GPU."""
    hardware = choice.hardware
    on_gpu = hardware.accelerator != "cpu" and torch.cuda.is_available()
    choice = replace(choice, hardware=replace(hardware, accelerator=hardware.accelerator if on_gpu else "cpu"))
    predicted = predict_step(config, network, bucket, choice)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = measure(partial(_module, config, choice), partial(make_batch, config, network, bucket, choice), choice.hardware)
    return predicted, found, torch.cuda.max_memory_allocated() if on_gpu else None
