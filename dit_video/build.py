"""Objects from a composed config; what the programs share."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.layers import initialise
from dit_video.model.lora import add_adapters
from dit_video.model.network import Network
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.text import TextEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.objective.objective import Objective
from dit_video.sampler.generate import Sampler, Trained


def make(config: DictConfig, **arguments: Any) -> Any:
    """The object that a config's `_target_` names; lists and mappings arrive as plain ones."""
    return instantiate(config, **arguments, _convert_="all")


def make_network(config: DictConfig, device: str = "meta") -> Network:
    """The network of a config: on the meta device nothing is allocated, and nothing is initialised; what is frozen is not read yet."""
    with torch.device(device):
        text, autoencoder, image_encoder = make_text(config), make_autoencoder(config), make_image_encoder(config)
        transformer: VideoTransformer = make(config.model)
    if config.get("lora"):
        add_adapters(transformer, **plain(config.lora), seed=config.seed)
    if transformer.channels != autoencoder.channels:
        raise ValueError(
            f"the autoencoder's latents have {autoencoder.channels} channels, the model takes {transformer.channels}; set autoencoder, "
            "or model.channels"
        )
    taken, given = getattr(transformer, "image_dim", 0), 0 if image_encoder is None else image_encoder.dim
    if taken != given:
        raise ValueError(
            f"the image encoder's states have width {given}, the model takes {taken} (0: none); set image_encoder, or model.image_dim"
        )
    return Network(text, transformer, autoencoder, image_encoder)


def make_text(config: DictConfig) -> TextEncoder:
    """The text encoder of a config."""
    text: TextEncoder = make(config.text)
    return text


def make_autoencoder(config: DictConfig) -> Autoencoder:
    """The autoencoder of a config; one from before there were any has none."""
    return make(config.autoencoder) if "autoencoder" in config else Pixels()


def make_image_encoder(config: DictConfig) -> ImageEncoder | None:
    """The encoder of first frames that a config names, if any."""
    return make(config.image_encoder) if config.get("image_encoder") else None


def make_objective(config: DictConfig) -> Objective:
    """The objective of a config, its further losses initialised."""
    objective: Objective = make(config.objective)
    initialise(objective, config.seed)
    return objective


def make_sampler(config: DictConfig, **changes: Any) -> Sampler:
    """The sampler of a config; changes that are None are left out."""
    return make(config.sampler, **{key: value for key, value in changes.items() if value is not None})


def make_trained(network: Network, objective: Objective) -> Trained:
    """A network as sampling sees it."""
    return Trained(network, objective.tasks, objective.predict, objective.base_tokens, objective.given_noise)


def check_whole(config: DictConfig, least: int, *keys: str) -> None:
    """ValueError where a key (dotted for one inside) holds something else than a whole number of at least `least`; null is let be."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}; set {key}")


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as dictionaries and lists, interpolations resolved; what has no value yet is an error."""
    found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
