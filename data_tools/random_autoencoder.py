"""Writes an autoencoder with random weights in a published layout: its pictures are noise, and all that caches and trains can be run."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from dit_video.shapes import to_float
from dit_video.world.render import render
from dit_video.world.state import sample_scene

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("AutoencoderKLWan", {"base_dim": 8, "num_res_blocks": 1}),
    "image": (
        "AutoencoderKL",
        {
            "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    ),
}  # fmt: skip
"""Class of diffusers, and how its published config is made narrow; what is not said here is as published."""


@torch.no_grad()
def write_random_autoencoder(out: str, family: str = "wan", seed: int = 0) -> None:
    """Writes config.json and safetensors of a narrow autoencoder into `out`; ValueError where there is one, or no such family."""
    if family not in SMALL:
        raise ValueError(f"family must be one of {', '.join(SMALL)}, got {family!r}; set family")
    folder, (name, config) = Path(out), SMALL[family]
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; set out to another folder")
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(f"{name} needs diffusers ({error}): pip install 'dit-video[latents]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(library, name)(**config).eval()
    if family == "wan":  # published ones state the spread of their latents on real videos; this one's is measured on the world's
        latents = torch.cat([module.encode(clip).latent_dist.mean for clip in _clips(seed)]).transpose(0, 1).flatten(1)
        module.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    module.save_pretrained(folder)
    print(f"{folder}: {name} with {sum(p.numel() for p in module.parameters()):,} random weights; its pictures are noise")


def _clips(seed: int) -> list[torch.Tensor]:
    """A few clips `1 c T H W` in [-1, 1]."""
    size = {"num_frames": 9, "height": 64, "width": 64, "fps": 8.0}
    scenes = [sample_scene(np.random.default_rng([seed, number]), **size, split="any") for number in range(8)]  # type: ignore[arg-type]
    return [rearrange(to_float(torch.from_numpy(render(scene))), "t h w c -> 1 c t h w") for scene in scenes]
