"""A published pipeline's folder, as diffusers keeps it, seen as a run: its config is put together from what lies there."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dit_video.compose import compose, literal, take_apart
from dit_video.model import published
from dit_video.model.published import read_json
from dit_video.numbers import is_whole

SAMPLERS = {  # by preset of the model
    "wan2.1_t2v_1.3b": "wan2.1_t2v_480p", "wan2.1_t2v_14b": "wan2.1_t2v_720p", "wan2.1_i2v_14b": "wan2.1_i2v_480p",
    "wan2.2_ti2v_5b": "wan2.2_ti2v_5b", "wan2.2_t2v_a14b": "wan2.2_t2v_a14b", "wan2.2_i2v_a14b": "wan2.2_i2v_a14b",
}  # fmt: skip
CLIP = {"num_frames": 81, "height": 480, "width": 832, "fps": 16}
"""What is made unless something else is asked for: what Wan's 480p models were trained on."""


def config_of(folder: Path) -> DictConfig:
    """The config that a run with these weights would have; PublishedError or ValueError where the folder lacks a part of it."""
    published.opened(folder).close()  # what the sizes promise is there, before anything of these sizes is made
    sizes = [published.sizes_of(part) for part in published.find_parts(folder).values()]
    preset = preset_of(sizes)
    looks = bool(sizes[0]["image_dim"])
    names = ("vae", "text_encoder", "tokenizer", *(("image_encoder", "image_processor") if looks else ()))
    for name in names:
        if not (folder / name).is_dir():
            raise published.PublishedError(
                f"{folder} has no {name}/, which a pipeline has; set run to a whole pipeline, or train"
            )
    words = [
        f"model={preset}", "text=umt5", f"sampler={SAMPLERS[preset]}", "data=shards", "data.shards=none", "logger=none",
        *(f"data.{key}={value}" for key, value in CLIP.items()),
        "image_encoder=clip" if looks else "image_encoder=none",
    ]  # fmt: skip
    config = compose("train", take_apart(words))
    with open_dict(config):
        _set_sizes(config, folder, sizes)
        OmegaConf.resolve(config)
        _set_folders(config, folder, looks)
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
    vae, text = folder / "vae" / "config.json", folder / "text_encoder" / "config.json"
    about = read_json(vae)
    halved = about.get("temperal_downsample", [False, True, True])
    if not isinstance(halved, list) or not all(isinstance(each, bool) for each in halved):
        raise published.PublishedError(f"{vae}: temperal_downsample must be a list of true and false, got {halved!r}")
    widths = about.get("dim_mult", [1, 2, 4, 4])
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        raise published.PublishedError(f"{vae}: dim_mult must be a list of numbers, got {widths!r}")
    space = _whole(vae, about, "patch_size", 1, 16) * 2 ** (len(widths) - 1)
    config.autoencoder.channels = _whole(vae, about, "z_dim", 16, 4096)
    config.autoencoder.compression = [2 ** sum(halved), space, space]
    config.text.dim = _whole(text, read_json(text), "d_model", 4096, 65536)
    if sizes[0]["image_dim"]:
        tower = folder / "image_encoder" / "config.json"
        sizes_of_tower = read_json(tower)
        side = _whole(tower, sizes_of_tower, "image_size", 224, 4096) // _whole(tower, sizes_of_tower, "patch_size", 32, 4096)
        config.image_encoder.dim, config.image_encoder.tokens = sizes[0]["image_dim"], 1 + side**2
    if "boundary" in config.model:
        told = published.boundary_in(folder)
        config.model.boundary = config.model.boundary if told is None else told
        config.sampler.boundary = config.model.boundary


def _set_folders(config: DictConfig, folder: Path, looks: bool) -> None:
    """Says where the other parts lie; a folder's name is no interpolation, whatever is in it."""

    def place(name: str) -> str:
        return literal(literal(str(folder / name)))  # twice, as Hydra resolves a config first and reads it then

    config.autoencoder.folder, config.text.folder, config.text.tokenizer = place("vae"), place("text_encoder"), place("tokenizer")
    if looks:
        config.image_encoder.folder, config.image_encoder.processor = place("image_encoder"), place("image_processor")


def _whole(path: Path, about: dict[str, Any], key: str, default: int, most: int) -> int:
    value = about.get(key)
    value = default if value is None else value
    if not is_whole(value, 1, most):
        raise published.PublishedError(f"{path}: {key} must be a whole number from 1 to {most}, got {value!r}")
    return value
