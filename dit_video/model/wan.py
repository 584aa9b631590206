"""Wan 2.1 and 2.2 (Wan Team, 2025), number for number as published, under this project's contract. `published.py` reads its weights.

What the published model has otherwise is translated at its door, in `WanTransformer.forward`:

    time        t in [0, 1] becomes 1000 t
    places      whole numbers (t, y, x) that count a clip's tokens from 0, see `cells_of`
    text        states after a caption's end are zeros up to `text_length`, and are looked at like any other
    images      what is known of an image-to-video clip comes as `control`, channels beside the noisy ones, see `image_control`

One width runs through it: hidden states, text and image states all have `d`. Norms and modulation are computed in float32 at least.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dit_video.model import attention as attention_functions
from dit_video.model.attention import Attention
from dit_video.model.layers import LevelEmbedding, RMSNorm, learned, linear, rotary_split
from dit_video.model.transformer import Modulation, Transformer, TransformerBlock, per_token, pick_of
from dit_video.numbers import is_finite, is_whole
from dit_video.shapes import Context, Patch, Stream, cells_of, patchify

THETA = 10_000.0
"""The longest rotary wavelength is about 2 pi theta tokens."""
LARGEST = 1 << 20
"""No size is more, so that products of two can be told."""


def widened(x: Tensor) -> Tensor:
    """x in float32, or in what it has that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulated_layer_norm(hidden: Float[Tensor, "b n d"], shift: Tensor, scale: Tensor, eps: float) -> Float[Tensor, "b n d"]:
    """The normed states, scaled and shifted by the noise level (adaLN, Peebles and Xie, 2022)."""
    wide = widened(hidden)
    return (F.layer_norm(wide, wide.shape[-1:], eps=eps) * (1 + scale) + shift).to(hidden.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a learned weight and bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = learned(width, mean=1.0), learned(width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        wide = widened(x)
        return F.layer_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers with GELU, in its approximation by tanh, between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, matrices: int) -> None:
        super().__init__()
        self.into = linear(inputs, hidden, bias=True, matrices=matrices)
        self.out = linear(hidden, outputs, bias=True, matrices=matrices)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return self.out(F.gelu(self.into(x), approximate="tanh"))


class ImageMLP(nn.Module):
    """States of the image encoder to keys' and values' states, normed before and after."""

    def __init__(self, image_dim: int, width: int) -> None:
        super().__init__()
        self.norm, self.out_norm = LayerNorm(image_dim, 1e-5), LayerNorm(width, 1e-5)
        self.into = linear(image_dim, image_dim, bias=True, matrices=0)
        self.out = linear(image_dim, width, bias=True, matrices=0)

    def forward(self, states: Float[Tensor, "b i e"]) -> Float[Tensor, "b i d"]:
        return self.out_norm(self.out(F.gelu(self.into(self.norm(states)))))


class WanEnds(nn.Module):
    """How the video enters and leaves the transformer, and what its noise levels say."""

    def __init__(self, inputs: int, width: int, outputs: int, level_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.patch = linear(inputs, width, bias=True, matrices=0)
        self.level = LevelEmbedding(width, level_dim // 2)
        self.modulation = linear(width, 6 * width, bias=True, matrices=0)
        self.final_offset = learned(2, width, std=width**-0.5)
        self.head = linear(width, outputs, bias=True, std=0, matrices=0)

    def enter(self, stream: Stream) -> Float[Tensor, "b n d"]:
        values = (
            stream.values
            if stream.control is None
            else torch.cat([stream.values, stream.control.to(stream.values.dtype)], dim=-1)
        )
        if values.shape[-1] != self.patch.in_features:
            control = self.patch.in_features - stream.values.shape[-1]
            raise ValueError(
                f"the model takes {control} values of control per token beside the {stream.values.shape[-1]} of the video, got "
                f"{values.shape[-1] - stream.values.shape[-1]}; set model.control_channels, or give the stream what image_control makes"
            )
        return self.patch(values)

    def modulations(self, levels: Float[Tensor, "b k"]) -> tuple[Float[Tensor, "b k d"], Modulation]:
        with torch.autocast(levels.device.type, enabled=False):
            embedded = self.level(levels)
            table = self.modulation(F.silu(embedded))
        return widened(embedded), rearrange(widened(table), "b k (six d) -> b k six d", six=6)

    def leave(
        self, hidden: Float[Tensor, "b n d"], embedded: Float[Tensor, "b k d"], pick: Tensor | None
    ) -> Float[Tensor, "b n p"]:
        with torch.autocast(hidden.device.type, enabled=False):
            shift, scale = per_token(embedded[:, :, None] + self.final_offset.to(embedded.dtype), pick)
        return widened(self.head(modulated_layer_norm(hidden, shift, scale, self.eps)))


class SelfAttention(nn.Module):
    """Queries, keys and values of the tokens, queries and keys normed over all heads at once and turned by the tokens' cells."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(width, width, bias=True) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)

    def ask(self, hidden: Float[Tensor, "b n d"], turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query_norm(self.query(hidden)), self.key_norm(self.key(hidden))
        query, key, value = (split_heads(x, self.heads) for x in (query, key, self.value(hidden)))
        return turned(query, turn), turned(key, turn), value


class CrossAttention(nn.Module):
    """The tokens look at the text, and at the image where the model takes one; the two answers are added."""

    def __init__(self, width: int, heads: int, eps: float, image: bool) -> None:
        super().__init__()
        self.heads, self.has_image = heads, image
        self.query, self.key, self.value, self.out = (linear(width, width, bias=True) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)
        if image:
            self.image_key, self.image_value = linear(width, width, bias=True), linear(width, width, bias=True)
            self.image_key_norm = RMSNorm(width, eps=eps)

    def forward(self, hidden: Tensor, text: Tensor, image: Tensor | None, attend: Attention) -> Float[Tensor, "b n d"]:
        query = split_heads(self.query_norm(self.query(hidden)), self.heads)
        key, value = self.key_norm(self.key(text)), self.value(text)
        answer = attend(query, split_heads(key, self.heads), split_heads(value, self.heads), None, None)
        if image is not None:
            key, value = self.image_key_norm(self.image_key(image)), self.image_value(image)
            answer = answer + attend(query, split_heads(key, self.heads), split_heads(value, self.heads), None, None)
        return self.out(rearrange(answer, "b heads n e -> b n (heads e)"))


class WanBlock(TransformerBlock):
    """Attention among the tokens, cross-attention to the text, and an MLP."""

    def __init__(self, width: int, heads: int, mlp_dim: int, eps: float, image: bool, attend: Attention) -> None:
        super().__init__()
        self.heads, self.eps, self.attend = heads, eps, attend
        self.attention = SelfAttention(width, heads, eps)
        self.cross_norm = LayerNorm(width, eps)
        self.cross = CrossAttention(width, heads, eps, image)
        self.mlp = MLP(width, mlp_dim, width, matrices=1)
        self.offset = learned(6, width, std=width**-0.5)  # added to the modulation that all blocks share

    def forward(
        self, hidden: Float[Tensor, "b n d"], table: Modulation, pick: Float[Tensor, "b n k"] | None, turn: Tensor,
        places: Float[Tensor, "b n 3"], text: Float[Tensor, "b l d"], image: Float[Tensor, "b i d"] | None,
    ) -> Float[Tensor, "b n d"]:  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = per_token(table + self.offset.to(table.dtype), pick)

        # Attention branch.
        query, key, value = self.attention.ask(modulated_layer_norm(hidden, shift, scale, self.eps), turn)
        answer = self.attention.out(rearrange(self.attend(query, key, value, places, None), "b heads n e -> b n (heads e)"))
        hidden = (widened(hidden) + answer * gate).to(hidden.dtype)

        # Text and MLP branches.
        hidden = hidden + self.cross(self.cross_norm(hidden), text, image, self.attend)
        answer = self.mlp(modulated_layer_norm(hidden, mlp_shift, mlp_scale, self.eps))
        return (widened(hidden) + answer * mlp_gate).to(hidden.dtype)


class WanTransformer(Transformer):
    """Text to video (2.1; TI2V-5B of 2.2, whose given frames are tokens of level 0) and image to video by channels.

    The presets are conf/model/wan*.yaml; `published.sizes_of` reads the sizes of a folder of published weights.
    """

    def __init__(
        self,
        width: int,  # of the hidden states
        depth: int,  # number of blocks
        heads: int,  # attention heads
        mlp_dim: int,  # hidden units of a block's MLP
        context_dim: int = 4096,  # width of the text states
        channels: int = 16,  # of the latents that are made
        patch: Sequence[int] = (1, 2, 2),  # frames, rows and columns of a token
        control_channels: int = 0,  # beside the latents: 20 where images come as channels, 4 of a mask and 16 of latents; 0: none
        image_dim: int = 0,  # width of the image encoder's states; 0: the model takes none
        text_length: int = 512,  # states of a caption, zeros after its end
        level_dim: int = 256,  # cosines and sines of a noise level
        eps: float = 1e-6,  # of the norms
        reference_rate: float = 4.0,  # tokens a second whose places lie 1 apart in time; the model itself counts tokens
        attention: Attention = attention_functions.sdpa,  # see dit_video/model/attention.py
    ) -> None:
        super().__init__()
        fault = wrong_size({
            "width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "context_dim": context_dim, "channels": channels,
            "patch": patch, "control_channels": control_channels, "image_dim": image_dim, "text_length": text_length,
            "level_dim": level_dim, "eps": eps, "reference_rate": reference_rate,
        })  # fmt: skip
        if fault:
            raise ValueError(f"{fault[1]}; set {fault[0]}")
        self.patch, self.channels, self.control_channels = Patch(*patch), channels, control_channels
        self.width, self.mlp_dim, self.context_dim, self.image_dim = width, mlp_dim, context_dim, image_dim
        self.text_length, self.level_dim, self.eps, self.reference_rate = text_length, level_dim, eps, reference_rate
        self.head_dim = width // heads
        area = self.patch.t * self.patch.h * self.patch.w
        end = WanEnds(area * (channels + control_channels), width, area * channels, level_dim, eps)
        self.ends: Mapping[str, WanEnds] = nn.ModuleDict({"video": end})  # type: ignore[assignment]
        self.text = MLP(context_dim, width, width, matrices=0)
        self.image = ImageMLP(image_dim, width) if image_dim else None
        self.blocks: Sequence[WanBlock] = nn.ModuleList(  # type: ignore[assignment]
            WanBlock(width, heads, mlp_dim, eps, bool(image_dim), attention) for _ in range(depth)
        )

    def forward(
        self, streams: dict[str, Stream], context: Context, taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Float[Tensor, "b n p"]], dict[str, Tensor]]:
        self.check_taps(taps)
        self.check_streams(streams)
        stream, end = streams["video"], self.ends["video"]
        cell = cells_of(stream.place) if stream.cell is None else stream.cell
        turn = turns(cell, self.head_dim, torch.promote_types(stream.values.dtype, torch.float32))
        pick = pick_of(stream)
        embedded, table = end.modulations(stream.levels)
        text = self.text(zeros_after(context.states, context.lengths, self.text_length))
        image = self._image(context)
        hidden = end.enter(stream)  # b n d

        tapped: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, table, pick, turn, stream.place, text, image)
            if f"{number}.video" in taps:
                tapped[f"{number}.video"] = hidden
        return {"video": end.leave(hidden, embedded, pick)}, tapped

    def _image(self, context: Context) -> Float[Tensor, "b i d"] | None:
        if (self.image is None) != (context.image is None):
            told = (
                "takes no states of an image encoder"
                if self.image is None
                else "takes states of an image encoder, and there are none"
            )
            raise ValueError(f"the model {told}; set model.image_dim")
        return None if self.image is None else self.image(context.image)


class WanExperts(Transformer):
    """Wan 2.2 A14B: two transformers of which each makes its part of the noise levels, so that a step costs as much as one of them.

    A clip's highest noise level decides. In training the clips of a batch may fall on different sides; an expert without clips is called
    all the same, on none, so that ranks which hold parts of its weights meet, and its gradients are zeros there.
    """

    def __init__(
        self,
        expert: Callable[..., WanTransformer],  # makes one of the two, such as a partial of WanTransformer
        boundary: float,  # the noise level from which on the first of them works: 0.875 for text, 0.9 for images
        attention: Attention = attention_functions.sdpa,  # of both
    ) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"the boundary of two experts is a noise level in [0, 1], got {boundary}; set model.boundary")
        self.boundary = boundary
        self.high, self.low = expert(attention=attention), expert(attention=attention)
        self.patch, self.channels, self.reference_rate = self.high.patch, self.high.channels, self.high.reference_rate
        self.control_channels, self.image_dim = self.high.control_channels, self.high.image_dim
        self.head_dim, self.text_length = self.high.head_dim, self.high.text_length
        self.ends = {"video": self.high.ends["video"]}  # these two are the experts', under another name
        self.blocks = (*self.high.blocks, *self.low.blocks)

    def forward(
        self, streams: dict[str, Stream], context: Context, taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Float[Tensor, "b n p"]], dict[str, Tensor]]:
        self.check_streams(streams)
        high = (streams["video"].levels.amax(dim=1) >= self.boundary).tolist()
        sides = [[row for row, is_high in enumerate(high) if is_high == side] for side in (True, False)]
        found = []
        for expert, rows in zip((self.high, self.low), sides, strict=True):
            some = torch.tensor(rows, dtype=torch.long, device=context.states.device)
            found.append(expert({"video": rows_of_stream(streams["video"], some)}, rows_of_context(context, some), taps))
        order = torch.tensor(sides[0] + sides[1], device=context.states.device).argsort()
        values = torch.cat([outputs["video"] for outputs, _ in found])[order]
        return {"video": values}, {tap: torch.cat([tapped[tap] for _, tapped in found])[order] for tap in taps}


def rows_of_stream(stream: Stream, rows: Int[Tensor, " r"]) -> Stream:
    """Some clips of a stream."""
    return replace(stream, **{name: value[rows] for name, value in vars(stream).items() if value is not None})


def rows_of_context(context: Context, rows: Int[Tensor, " r"]) -> Context:
    """The same of what they are told."""
    return replace(context, **{name: value[rows] for name, value in vars(context).items() if value is not None})


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b heads n e"]:
    """The heads of queries, keys or values."""
    return rearrange(x, "b n (heads e) -> b heads n e", heads=heads)


def turns(cell: Int[Tensor, "b n 3"], head_dim: int, dtype: torch.dtype) -> Float[Tensor, "2 b 1 n pairs"]:
    """Cosines and sines of every rotary angle of every token, for `turned`; angles are worked out in float64.

    Pair j of the m pairs of an axis turns by cell * theta^(-j / m).
    """
    angles = []
    for axis, pairs in enumerate(rotary_split(head_dim)):
        frequencies = THETA ** (-torch.arange(pairs, device=cell.device, dtype=torch.float64) / max(pairs, 1))
        angles.append(cell[..., axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    return rearrange(torch.stack([angle.cos(), angle.sin()]), "two b n pairs -> two b 1 n pairs").to(dtype)


def turned(x: Float[Tensor, "b heads n e"], turn: Float[Tensor, "2 b 1 n pairs"]) -> Float[Tensor, "b heads n e"]:
    """Turns every pair (2j, 2j + 1) of a head by its angle."""
    first, second = rearrange(x, "b heads n (pairs two) -> two b heads n pairs", two=2)
    cos, sin = turn
    out = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rearrange(out, "b heads n pairs two -> b heads n (pairs two)").to(x.dtype)


def zeros_after(states: Float[Tensor, "b l d"], lengths: Int[Tensor, " b"], length: int) -> Float[Tensor, "b length d"]:
    """States of captions cut and filled up with zeros to one length."""
    states = F.pad(states, (0, 0, 0, length - states.shape[1]))
    real = torch.arange(length, device=lengths.device) < lengths[:, None]
    return states.where(real[..., None], 0.0)


def given_then_grey(frames: Float[Tensor, "b g H W 3"], num_frames: int) -> Float[Tensor, "b T H W 3"]:
    """A clip of which only its first frames are known: what its autoencoder makes of it is what `image_control` takes."""
    return F.pad(frames, (0, 0, 0, 0, 0, 0, 0, num_frames - frames.shape[1]))


def image_control(
    latents: Float[Tensor, "b t h w c"],  # of the clip that given_then_grey makes
    num_given: int,  # frames of pixels that are known
    patch: Patch,
    compression: int = 4,  # frames of pixels in a frame of latents
) -> Float[Tensor, "b n values"]:
    """A stream's control for image to video by channels: of each latent, which of its frames are known, and the known clip's latents.

    The first frame of latents holds one frame of pixels, which stands in its mask as often as the others hold frames.
    """
    num_frames = 1 + (latents.shape[1] - 1) * compression
    if not 1 <= num_given <= num_frames:
        raise ValueError(f"of a clip of {num_frames} frames 1 to {num_frames} can be given, got {num_given}; give fewer frames")
    known: Bool[Tensor, " T"] = torch.arange(num_frames, device=latents.device) < num_given
    known = torch.cat([known[:1].expand(compression - 1), known])
    mask = repeat(
        known, "(t frames) -> b t h w frames", frames=compression, b=latents.shape[0], h=latents.shape[2], w=latents.shape[3]
    )
    return patchify(torch.cat([mask.to(latents.dtype), latents], dim=-1), patch)


def wrong_size(sizes: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys to set and what is wrong, where there is no WanTransformer of these sizes, by the names of its arguments."""
    for name, value in sizes.items():
        least = 0 if name in ("control_channels", "image_dim") else 1
        if name == "patch":
            whole = isinstance(value, Sequence) and len(value) == 3 and all(is_whole(size, 1, LARGEST) for size in value)
            wanted = None if whole else "three whole numbers of at least 1 (frames, rows, columns)"
        elif name in ("eps", "reference_rate"):
            wanted = None if is_finite(value) and value > 0 else "a number above 0"
        elif name == "level_dim":
            wanted = None if is_whole(value, 2, LARGEST) and value % 2 == 0 else f"an even whole number from 2 to {LARGEST}"
        else:
            wanted = None if is_whole(value, least, LARGEST) else f"a whole number from {least} to {LARGEST}"
        if wanted:
            return f"model.{name}", f"{name} must be {wanted}, got {value!r}"
    width, heads = sizes["width"], sizes["heads"]
    if width % heads or (width // heads) % 2:
        told = f"rotary positions need an even head width, got width {width} of {heads} heads"
        return "model.heads or model.width", told
    return None
