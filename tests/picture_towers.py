"""A small random picture tower of CLIP in the published layout, for tests of models that look at first frames."""

from pathlib import Path

import torch


def picture_tower(folder: Path, seed: int = 0) -> None:
    """A random picture tower of CLIP with its processor, as transformers saves them."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
