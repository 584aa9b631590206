"""Shapes are checked in every test: annotations of the core rooms become beartype checks before anything is imported."""

import torch
from jaxtyping import install_import_hook

install_import_hook(
    ["dit_video.shapes", "dit_video.model", "dit_video.objective", "dit_video.sampler"],
    "beartype.beartype",
)
torch.set_num_threads(1)
