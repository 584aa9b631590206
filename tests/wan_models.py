"""Tiny random Wan transformers of diffusers, and the same clip for both sides, for tests of parity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_video.model.wan import WanTransformer
from dit_video.seeding import seeded
from dit_video.shapes import Context, Grid, Patch, Stream, patchify, token_places

PATCH = Patch(1, 2, 2)
HEADS, HEAD_DIM, TEXT_DIM, IMAGE_DIM, CHANNELS = 2, 14, 20, 10, 4
SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "out_channels": CHANNELS,
    "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 40, "num_layers": 2, "cross_attn_norm": True, "eps": 1e-6, "rope_max_seq_len": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": CHANNELS},
    "i2v": {"in_channels": 2 * CHANNELS + 4, "image_dim": IMAGE_DIM, "added_kv_proj_dim": HEADS * HEAD_DIM},  # 2.1
    "i2v_2.2": {"in_channels": 2 * CHANNELS + 4},
    "ti2v": {"in_channels": CHANNELS},  # whose first frame has a timestep of its own
}


def reference(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """diffusers' transformer of a kind; every parameter is random, none as it is when training starts."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**SIZES | KINDS[kind] | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if name.endswith("bias") or "norm" in name else 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(
                ("norm" in name and "weight" in name) + spread * torch.randn(parameter.shape, generator=seeded(seed, name))
            )
    return model.eval()


def ours(folder: Path, kind: str = "t2v", seed: int = 0, **changes: Any) -> WanTransformer:
    """The same as WanTransformer, by way of a folder that diffusers saves."""
    from dit_video.model.published import load, make_transformer

    reference(kind, seed, **changes).save_pretrained(folder)  # type: ignore[operator]
    transformer = make_transformer(folder)
    load(transformer, folder)
    assert isinstance(transformer, WanTransformer)
    return transformer


@dataclass
class Clip:
    """A batch of noisy clips, as diffusers takes them and as this project does."""

    latents: Tensor  # b c t h w
    control: Tensor | None
    timestep: Tensor  # b, or b n
    text: Tensor  # b 512 d, zeros after the caption
    image: Tensor | None
    stream: Stream
    context: Context

    def theirs(self) -> dict[str, Any]:
        seen = self.latents if self.control is None else torch.cat([self.latents, self.control], dim=1)
        return {
            "hidden_states": seen, "timestep": self.timestep, "encoder_hidden_states": self.text,
            "encoder_hidden_states_image": self.image, "return_dict": False,
        }  # fmt: skip


def clip(kind: str, grid: Grid, batch: int = 2, seed: int = 0, fps: float = 16.0) -> Clip:
    """Random clips; of `ti2v` the first frame is given and has the timestep 0."""
    generator = seeded(seed, "clip")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (grid.t, grid.h * PATCH.h, grid.w * PATCH.w)
    latents, control = random(batch, CHANNELS, *size), random(batch, CHANNELS + 4, *size) if kind.startswith("i2v") else None
    lengths = torch.tensor([7, 3, 12][:batch])
    states = random(batch, 12, TEXT_DIM)
    text = torch.zeros(batch, 512, TEXT_DIM)
    for row, length in enumerate(lengths):
        text[row, :length] = states[row, :length]
    image = random(batch, 5, IMAGE_DIM) if kind == "i2v" else None
    levels = torch.rand(batch, 1, generator=generator)

    given = torch.zeros(batch, grid.num_tokens, dtype=torch.bool)
    timestep = levels[:, 0] * 1000
    if kind == "ti2v":
        given[:, : grid.h * grid.w] = True
        timestep = (~given) * timestep[:, None]
        levels = torch.cat([torch.zeros(batch, 1), levels], dim=1)
    index = (~given).long() if kind == "ti2v" else torch.zeros_like(given, dtype=torch.long)
    place = token_places(grid, Patch(4, 16, 16), fps, 4.0).expand(batch, -1, -1)
    stream = Stream(tokens_of(latents), place, levels, index, given, given, None if control is None else tokens_of(control))
    return Clip(latents, control, timestep, text, image, stream, Context(states, lengths, image=image))


def tokens_of(video: Tensor) -> Tensor:
    """Tokens of a clip as diffusers holds it, b c t h w."""
    return patchify(video.movedim(1, -1), PATCH)
