"""`dit-video plan`: what a training will hold, compute and cost on given devices, and what to change where it does not fit.

Nothing of it is allocated: the real training step runs on tensors without contents (see trainer/hollow.py).
"""

import math
import os
from collections.abc import Iterable

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dit_video.build import check_whole, make_network, plain
from dit_video.info import check_tokens, with_unit
from dit_video.model.autoencoders import Autoencoder
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.text import TextEncoder
from dit_video.plan.search import Found, Search, suggestion
from dit_video.plan.step import Choice, Device, estimate_step, find_buckets, measured, predict_step, step_seconds
from dit_video.plan.tables import cost_lines, head_lines, measured_table, memory_table, steps_table
from dit_video.train import check as check_training
from dit_video.trainer.fit import Hardware
from dit_video.trainer.memory import KEPT


def main(config: DictConfig) -> None:
    """Prints the plan; ValueError where the config could not be trained."""
    hardware = check(config)
    device = Device(**plain(config.device))
    network = make_network(config)
    choice, devices = Choice(hardware, config.data.micro_batches), hardware.parallel.layout.world_size
    buckets, told = find_buckets(config, network, choice)
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0", width=120)

    def say(lines: Iterable[str | Table]) -> None:
        for line in lines:
            console.print(line)

    say(head_lines(config, network, hardware, device))
    found = [estimate_step(config, network, bucket, choice) for bucket in buckets]
    worst = max(range(len(buckets)), key=lambda number: found[number].peak)
    found[worst] = most = predict_step(config, network, buckets[worst], choice)
    seconds = [step_seconds(config, memory, hardware, device) for memory in found]
    encoders: dict[str, Autoencoder | TextEncoder | ImageEncoder] = {
        "autoencoder": network.autoencoder,
        "text encoder": network.text,
    }
    if network.image_encoder is not None:
        encoders["image encoder"] = network.image_encoder
    beside = {name: encoder.device_bytes(devices) for name, encoder in encoders.items()}
    comes = max(encoder.device_bytes(devices, in_use=True) - beside[name] for name, encoder in encoders.items())
    say(["", steps_table(buckets, found, seconds, devices), memory_table(most, buckets[worst], beside)])

    room = device.memory * (1 - config.margin) - sum(beside.values())
    frozen = " and of what is frozen" if any(beside.values()) else ""
    say([
        f"{'Fits' if most.peak <= room else 'Does not fit'}: {with_unit(most.peak, 'B')} at the peak of the {most.worst}, of "
        f"{with_unit(max(room, 0), 'B')} (what the device has, less {config.margin:.0%} for its context, workspaces and fragments{frozen})"
    ])  # fmt: skip
    used = sum(most.most.get(part, 0) for part in KEPT) + comes
    if comes and used > most.peak:
        fits = "Fits" if used <= room else "Does not fit"
        comes_too = "where frozen weights that lie elsewhere come to the device, beside what is kept"
        say([f"{fits}, too: {with_unit(used, 'B')} {comes_too}"])
    if most.peak > room:
        search = Search(config, network, buckets[worst], choice, device, room)
        say(suggestion(search, Found([], most, seconds[worst][0])))
    say(["", *cost_lines(config, buckets, [time for time, _ in seconds], devices, told)])
    if config.measure:
        say(["", measured_table(*measured(config, network, buckets[worst], choice))])


def check(config: DictConfig) -> Hardware:
    """What it is to run on; ValueError, before anything is worked out, where values cannot be."""
    check_whole(config, 1, "devices", "caption_words", "max_clips", "data.batch_size", "data.micro_batches")
    check_tokens(config)
    for name, right in (
        ("utilisation", 0 < config.utilisation <= 1), ("margin", 0 <= config.margin < 1), ("network", config.network > 0),
        ("price", config.price is None or config.price >= 0),
    ):  # fmt: skip
        if not right:
            said = {
                "utilisation": "a share, more than 0", "margin": "a share, less than 1", "network": "more than 0", "price": "0 or more",
            }  # fmt: skip
            raise ValueError(f"{name} must be {said[name]}, got {config[name]}; set {name}")
    check_training(config)
    keys = plain(config.trainer) | {"compile": False}
    if config.devices is not None:
        nodes = math.gcd(config.devices, keys["num_nodes"])
        keys |= {"devices": config.devices // nodes, "num_nodes": nodes}
        sizes = keys["layout"]
        if None not in sizes.values() and math.prod(sizes.values()) != config.devices:
            keys["layout"] = sizes | {"replicate": None}
    hardware = Hardware(**keys)
    if config.measure and hardware.parallel.layout.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"measuring takes a process a device, {hardware.parallel.layout.world_size} of them; start the plan with torchrun "
            f"--nproc-per-node={hardware.devices}, or set measure=false"
        )
    return hardware
