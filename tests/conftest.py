"""Shapes are checked in every test: annotations of the core rooms become beartype checks before anything is imported."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from dit_video.model.network import Network

# The hook takes its checker by name; an int is a float to it, as it is to mypy and in a YAML file.
checker = ModuleType("checker")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules["checker"] = checker
install_import_hook(["dit_video.shapes", "dit_video.model", "dit_video.objective", "dit_video.sampler"], "checker.check")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by file, so small_run has no package to be found in

from small_run import trained_run, world_shards  # noqa: E402, F401


@pytest.fixture(autouse=True)
def same_numbers_in_every_order() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_network() -> Callable[..., "Network"]:
    """Makes a small network for keywords of VideoTransformer; every parameter is random, none zero as when training starts."""
    from dit_video.model.layers import initialise
    from dit_video.model.network import Network
    from dit_video.model.text import WordEncoder
    from dit_video.model.transformer import VideoTransformer
    from dit_video.seeding import seeded

    def make(seed: int = 0, **sizes: Any) -> Network:
        standard = {"patch": (2, 4, 4), "width": 32, "depth": 2, "heads": 2, "context_dim": 16, "pooled_dim": 16}
        network = Network(WordEncoder(dim=16, heads=2, buckets=64, max_words=12), VideoTransformer(**standard | sizes))
        initialise(network, seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(seed, name, "away from zero"))
        return network

    return make
