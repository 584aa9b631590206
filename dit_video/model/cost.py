"""What a network costs: parameters and FLOPs by part, computed from its sizes alone, so a network on the meta device will do.

A multiply-add counts as 2. Products of matrices are counted, as torch's flop counter does; norms, activations, softmax, rotation
and look-ups are left out. The part "attention" is scores and weighted values: every query with every key, padding included.
"""

import re
from collections.abc import Mapping

from torch import nn

from dit_video.model.network import Network
from dit_video.model.text import TextLayer, WordEncoder
from dit_video.model.transformer import Block, StreamBlock, StreamEnds
from dit_video.model.wan import WanBlock, WanEnds, WanExperts, WanTransformer
from dit_video.shapes import Grid

TRAINING = 3
"""A training step costs so many forward passes: the backward has two products for each of the forward's."""

_EXPERT = r"transformer\.(?:high\.|low\.)?"  # of two experts either, or the only transformer
_END, _BLOCK = _EXPERT + r"ends\.(?P<stream>\w+)\.", _EXPERT + r"blocks\.\d+\."
_PARTS = (  # a parameter's name, its part, and what there is one of for every row that its layer multiplies
    (r"^text\.", "text encoder", "word"),
    (_END + "(patch|given|partial|control)", "patch embedding", "token"),
    (_END + "level", "noise level", "level"),
    (_END + "pooled", "noise level", "caption"),
    (_END + "(modulation|final_offset)", "modulation", "level"),
    (_END + "head", "head", "token"),
    (_BLOCK + "context_", "text keys and values", "word"),
    (_BLOCK + r"cross\.(key|value)", "text keys and values", "state"),
    (_BLOCK + r"cross\.image_", "image keys and values", "image state"),
    (_BLOCK + r"cross(_norm|\.query|\.out)", "text cross-attention", "token"),
    (_BLOCK + r"cross\.(?P<stream>\w+)\.", "text cross-attention", "token"),
    (_BLOCK + r"streams\.(?P<stream>\w+)\.offset", "modulation", "level"),
    (_BLOCK + r"streams\.(?P<stream>\w+)\.(qkv|query_key_norm|out)", "attention projections", "token"),
    (_BLOCK + r"streams\.(?P<stream>\w+)\.mlp", "MLP", "token"),
    (_EXPERT + "text", "text keys and values", "state"),
    (_EXPERT + "image", "image keys and values", "image state"),
    (_BLOCK + "offset", "modulation", "level"),
    (_BLOCK + "attention", "attention projections", "token"),
    (_BLOCK + "mlp", "MLP", "token"),
)

IMAGE_STATES = 257
"""States of the image encoder that Wan 2.1 takes, where there is none to ask: CLIP's, of 16 x 16 patches and one for all."""


def parameters_by_part(network: Network) -> dict[str, int]:
    """How many parameters each part has; what an extension added counts as "other"."""
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        part, _, _ = _find(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def flops_by_part(
    network: Network,
    grid: Grid,
    batch: int,
    num_words: int,  # states of the longest caption
    num_levels: int = 2,  # distinct noise levels of a clip: 2 in training, 1 where a sampler is given nothing
    other_tokens: Mapping[str, int] | None = None,  # of each stream beside the video, per clip
) -> dict[str, int]:
    """FLOPs of each part in one forward pass over a batch of clips; a training step costs `TRAINING` times as much."""
    transformer = network.transformer
    tokens = {name: 0 for name in transformer.ends} | dict(other_tokens or {}) | {"video": grid.num_tokens}
    all_tokens = sum(tokens.values())
    seen = IMAGE_STATES if network.image_encoder is None else network.image_encoder.tokens
    rows = {"word": num_words, "level": num_levels, "caption": 1, "image state": seen}
    if isinstance(transformer, WanTransformer | WanExperts):  # which looks at zeros after a caption
        rows["state"] = transformer.text_length
    flops: dict[str, int] = {}

    def add(part: str, multiply_adds: int) -> None:
        flops[part] = flops.get(part, 0) + 2 * batch * multiply_adds

    for name, module in network.named_modules():
        if name.startswith("transformer.low."):
            continue  # a clip goes through one of two experts
        if isinstance(module, nn.Linear):
            part, per, stream = _find(name)
            add(part, (tokens[stream] if per == "token" else rows[per]) * module.weight.numel())
        elif isinstance(module, TextLayer):
            add("text encoder", 2 * num_words**2 * module.out.in_features)
        elif isinstance(module, WordEncoder):
            add("text encoder", num_words * module.dim)  # the mean over words

    blocks = transformer.high.blocks if isinstance(transformer, WanExperts) else transformer.blocks
    for block in blocks:
        if isinstance(block, WanBlock):
            inner = block.attention.out.in_features
            add("attention", 2 * all_tokens**2 * inner)
            add("text cross-attention", 2 * all_tokens * rows["state"] * inner)
            if block.cross.has_image:
                add("image cross-attention", 2 * all_tokens * rows["image state"] * inner)
            continue
        assert isinstance(block, Block)
        for name, own in block.streams.items():
            assert isinstance(own, StreamBlock)
            inner = own.out.in_features
            keys = all_tokens + (num_words if block.text == "joint" else 0)
            add("attention", 2 * tokens[name] * keys * inner)
            if block.text == "cross":
                add("text cross-attention", 2 * tokens[name] * num_words * inner)

    # A token's marks and its row of the modulations are products with small matrices too.
    for name, end in transformer.ends.items():
        assert isinstance(end, StreamEnds | WanEnds)
        width = end.patch.out_features
        if isinstance(end, StreamEnds):
            add("patch embedding", tokens[name] * 2 * width)
        if num_levels > 1:
            add("modulation", tokens[name] * num_levels * width * (6 * len(blocks) + 2))
    return flops


def _find(name: str) -> tuple[str, str, str]:
    """A parameter's part, what its rows count, and its stream."""
    for pattern, part, per in _PARTS:
        if found := re.search(pattern, name):
            return part, per, found.groupdict().get("stream", "video")
    return "other", "token", "video"
