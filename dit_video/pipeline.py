"""A published pipeline's folder, as diffusers keeps it, seen as a run: its config is put together from what lies there."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dit_video.compose import compose, quoted, take_apart
from dit_video.model import published

SAMPLERS = {  # by preset of the model
    "wan2.1_t2v_1.3b": "wan2.1_t2v_480p", "wan2.1_t2v_14b": "wan2.1_t2v_720p", "wan2.1_i2v_14b": "wan2.1_i2v_480p",
    "wan2.2_ti2v_5b": "wan2.2_ti2v_5b", "wan2.2_t2v_a14b": "wan2.2_t2v_a14b", "wan2.2_i2v_a14b": "wan2.2_i2v_a14b",
}  # fmt: skip
CLIP = {"num_frames": 81, "height": 480, "width": 832, "fps": 16}
"""What is made unless something else is asked for: what Wan's 480p models were trained on."""


def config_of(folder: Path) -> DictConfig:
    """The config that a run with these weights would have; PublishedError or ValueError where the folder lacks a part of it."""
    parts = published.find_parts(folder)
    sizes = [published.sizes_of(part) for part in parts.values()]
    preset = preset_of(sizes)
    for name in ("vae", "text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise published.PublishedError(
                f"{folder} has no {name}/, which a pipeline has; set run to a whole pipeline, or train"
            )
    where = {name: quoted(str(folder / name)) for name in ("vae", "text_encoder", "tokenizer")}
    words = [
        f"model={preset}", "text=umt5", f"sampler={SAMPLERS[preset]}", "data=shards", "data.shards=none", "logger=none",
        f"autoencoder.folder={where['vae']}", f"text.folder={where['text_encoder']}", f"text.tokenizer={where['tokenizer']}",
        *(f"data.{key}={value}" for key, value in CLIP.items()),
    ]  # fmt: skip
    config = compose("train", take_apart(words))
    with open_dict(config):
        _set_sizes(config, folder, sizes)
    return config


def preset_of(sizes: list[dict[str, Any]]) -> str:
    """The preset that is most like a transformer of these sizes, or two of them."""
    first, experts = sizes[0], len(sizes) > 1
    if experts:
        return "wan2.2_i2v_a14b" if first["control_channels"] else "wan2.2_t2v_a14b"
    if first["control_channels"]:
        return "wan2.1_i2v_14b"
    if first["channels"] > 16:
        return "wan2.2_ti2v_5b"
    return "wan2.1_t2v_14b" if first["width"] > 2048 else "wan2.1_t2v_1.3b"


def _set_sizes(config: DictConfig, folder: Path, sizes: list[dict[str, Any]]) -> None:
    """Puts what the folder's config.json files say in place of a preset's sizes."""
    target = config.model.expert if "expert" in config.model else config.model
    for key, value in sizes[0].items():
        target[key] = list(value) if isinstance(value, tuple) else value
    vae = _json(folder / "vae" / "config.json")
    patch = int(vae.get("patch_size") or 1)
    steps = sum(vae.get("temperal_downsample", [False, True, True]))
    config.autoencoder.channels = int(vae.get("z_dim", 16))
    space = patch * 2 ** (len(vae.get("dim_mult", [1, 2, 4, 4])) - 1)
    config.autoencoder.compression = [2**steps, space, space]
    text = _json(folder / "text_encoder" / "config.json")
    config.text.dim = int(text.get("d_model", text.get("hidden_size", 4096)))
    if "boundary" in config.model:
        told = _json(folder / "model_index.json").get("boundary_ratio")
        config.model.boundary = float(told) if told is not None else config.model.boundary
        config.sampler.boundary = config.model.boundary
    OmegaConf.resolve(config)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        return found
    except (OSError, ValueError) as error:
        raise published.PublishedError(f"{path} cannot be read: {error}; set run to a whole pipeline") from error
