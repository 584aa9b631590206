"""The video diffusion transformer: streams of tokens that meet in full space-time attention, told a text and their noise levels.

    tokens -> patch embedding -> depth x [ x + gate * attention(modulated norm(x)) ; x + gate * SwiGLU(modulated norm(x)) ] -> values

Each stream owns its patch embedding, projections, norms, MLP and modulation, and may have a width of its own; streams share the heads
of attention. What the values mean (clean, velocity or noise) is the objective's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dit_video.model import attention as attention_functions
from dit_video.model.attention import Attention
from dit_video.model.layers import LevelEmbedding, RMSNorm, SwiGLU, learned, linear, rms_norm, rotary, rotate
from dit_video.shapes import Context, Patch, Stream

Modulation = Float[Tensor, "b k six d"]


@dataclass
class StreamSpec:
    """The sizes of one stream inside the transformer."""

    token_dim: int  # values in a token
    width: int  # of its hidden states
    control_dim: int = 0  # values of its control per token; 0: none


class StreamEnds(nn.Module):
    """How one stream enters and leaves the transformer."""

    def __init__(self, spec: StreamSpec, pooled_dim: int) -> None:
        super().__init__()
        self.patch = linear(spec.token_dim, spec.width, bias=True, matrices=0)
        self.given = learned(spec.width)  # added to tokens that are known
        self.partial = learned(spec.width)  # added to tokens of the first frame
        self.control = linear(spec.control_dim, spec.width, std=0, matrices=0) if spec.control_dim else None
        self.level = LevelEmbedding(spec.width)
        self.pooled = linear(pooled_dim, spec.width, matrices=0) if pooled_dim else None
        self.modulation = linear(spec.width, 6 * spec.width, bias=True, std=0, matrices=0)
        self.final_offset = learned(2, spec.width)
        self.head = linear(spec.width, spec.token_dim, bias=True, std=0, matrices=0)

    def enter(self, stream: Stream) -> Float[Tensor, "b n d"]:
        hidden = self.patch(stream.values)
        marks = torch.stack([stream.given, stream.partial], dim=-1).to(hidden.dtype)  # b n 2
        hidden = hidden + marks @ torch.stack([self.given, self.partial]).to(hidden.dtype)
        if stream.control is not None:
            if self.control is None:
                raise ValueError("the stream has a control, the model has no input for one; set model.control_dim")
            hidden = hidden + self.control(stream.control)
        return hidden

    def levels(self, stream: Stream, pooled: Float[Tensor, "b p"] | None) -> Float[Tensor, "b k d"]:
        embedded = self.level(stream.levels)
        if self.pooled is not None and pooled is not None:
            embedded = embedded + self.pooled(pooled)[:, None]
        return nn.functional.silu(embedded)

    def leave(self, hidden: Float[Tensor, "b n d"], embedded: Float[Tensor, "b k d"], pick: Tensor | None) -> Tensor:
        shift, scale = per_token(embedded[:, :, None] + self.final_offset.to(embedded.dtype), pick)
        values = self.head(modulated_norm(hidden, shift, scale))
        return values.to(torch.promote_types(values.dtype, torch.float32))


def modulated_norm(hidden: Float[Tensor, "b n d"], shift: Tensor, scale: Tensor) -> Float[Tensor, "b n d"]:
    """The normed states, scaled and shifted by the noise level (adaLN, Peebles and Xie, 2022, with the root-mean-square norm)."""
    return torch.addcmul(shift, rms_norm(hidden), 1 + scale)


def per_token(table: Float[Tensor, "b k six d"], pick: Float[Tensor, "b n k"] | None) -> tuple[Tensor, ...]:
    """Takes each token's row of the table of modulations; with one noise level a clip the row is broadcast instead.

    The rows are taken by a product with a one-hot matrix: its backward is a product too, where a gather's is a slow scatter.
    """
    if pick is None:
        return table.unbind(2)
    rows = pick.to(table.dtype) @ rearrange(table, "b k six d -> b k (six d)")
    return rows.split(table.shape[-1], dim=-1)


class StreamBlock(nn.Module):
    """One stream's own part of a block: what it sends to attention, and what it does with the answer."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * heads * head_dim, matrices=3)
        self.query_key_norm = RMSNorm(2, 1, head_dim)
        self.out = linear(heads * head_dim, width, std=0)
        self.mlp = SwiGLU(width, mlp_dim)
        # Added to the modulation that all blocks share (adaLN-single, Chen et al. 2023): shift, scale, gate for attention and MLP.
        self.offset = learned(6, width, mean=torch.tensor([[0.0], [0], [1], [0], [0], [1]], device="cpu"))

    def ask(self, hidden: Float[Tensor, "b n d"], turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = rearrange(self.qkv(hidden), "b n (three heads e) -> b n three heads e", three=3, heads=self.heads)
        query_key = rotate(self.query_key_norm(parts[:, :, :2]), turn)
        query, key, value = *query_key.unbind(2), parts[:, :, 2]
        return tuple(rearrange(x, "b n heads e -> b heads n e") for x in (query, key, value))  # type: ignore[return-value]


class TransformerBlock(nn.Module):
    """What is asked of any transformer's block from outside: its heads, and the attention that may be put in place of its own."""

    heads: int
    attend: Attention


class Transformer(nn.Module):
    """The seam for transformers, this project's own or published ones: what the network, the trainer and the costs ask of them."""

    patch: Patch
    channels: int  # of the video
    reference_rate: float  # tokens a second whose neighbours lie 1 apart in time, see token_places
    head_dim: int
    ends: Mapping[str, nn.Module]  # how each stream enters and leaves, by its name
    blocks: Sequence[TransformerBlock]

    def forward(
        self, streams: dict[str, Stream], context: Context, taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Float[Tensor, "b n p"]], dict[str, Tensor]]:
        """Gives every stream's output values, and the hidden states asked for.

        A tap is "<block>.<stream>", such as "3.video": the states `b n d` of that stream after block 3, counted from 0.
        """
        raise NotImplementedError

    def check_streams(self, streams: Mapping[str, Stream]) -> None:
        """ValueError where the streams are not those of the model."""
        if streams.keys() != self.ends.keys():
            raise ValueError(
                f"the model has the streams {', '.join(self.ends)}, got {', '.join(streams)}; set model.other_streams"
            )

    def check_taps(self, taps: tuple[str, ...]) -> None:
        """ValueError where hidden states are asked for that there are none of."""
        valid = [f"{number}.{name}" for number in range(len(self.blocks)) for name in self.ends]
        for tap in taps:
            if tap not in valid:
                raise ValueError(f"no hidden states are called {tap!r}; the model has {', '.join(valid)}")


class Block(TransformerBlock):
    """Attention over the tokens of all streams and the text, then each stream's MLP."""

    def __init__(
        self, streams: dict[str, StreamSpec], heads: int, head_dim: int, mlp_ratio: float, context_dim: int,
        text: Literal["joint", "cross"], attend: Attention,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.text, self.attend = heads, text, attend
        self.streams: Mapping[str, StreamBlock] = nn.ModuleDict(  # type: ignore[assignment]
            {name: StreamBlock(spec.width, heads, head_dim, mlp_dim(spec.width, mlp_ratio)) for name, spec in streams.items()}
        )
        inner = heads * head_dim
        self.context_norm = RMSNorm(context_dim)
        self.context_key_value = linear(context_dim, 2 * inner, matrices=2)
        self.context_key_norm = RMSNorm(head_dim)
        if text == "cross":
            self.cross: Mapping[str, CrossQuery] = nn.ModuleDict(  # type: ignore[assignment]
                {name: CrossQuery(spec.width, inner, heads) for name, spec in streams.items()}
            )

    def forward(
        self, hidden: dict[str, Tensor], tables: dict[str, Modulation], picks: dict[str, Tensor | None], turns: dict[str, Tensor],
        places: Float[Tensor, "b n 3"], context: Context,
    ) -> dict[str, Tensor]:  # fmt: skip
        modulations = {
            name: per_token(tables[name] + part.offset.to(tables[name].dtype), picks[name]) for name, part in self.streams.items()
        }

        # Attention branch: every stream asks, all answer.
        asked = []
        for name, part in self.streams.items():
            shift, scale = modulations[name][:2]
            asked.append(part.ask(modulated_norm(hidden[name], shift, scale), turns[name]))
        query, key, value = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*asked, strict=True))
        context_key, context_value = self.context(context)
        if self.text == "joint":
            num_tokens = query.shape[2]
            lengths = num_tokens + context.lengths
            key, value = torch.cat([key, context_key], dim=2), torch.cat([value, context_value], dim=2)
        else:
            lengths = None
        answer = rearrange(self.attend(query, key, value, places, lengths), "b heads n e -> b n (heads e)")
        answers = answer.split([hidden[name].shape[1] for name in self.streams], dim=1)
        for (name, part), own in zip(self.streams.items(), answers, strict=True):
            hidden = hidden | {name: torch.addcmul(hidden[name], modulations[name][2], part.out(own))}

        # Text and MLP branches of each stream.
        for name, part in self.streams.items():
            _, _, _, shift, scale, gate = modulations[name]
            if self.text == "cross":
                hidden = hidden | {
                    name: hidden[name] + self.cross[name](hidden[name], context_key, context_value, context.lengths, self.attend)
                }
            hidden = hidden | {name: torch.addcmul(hidden[name], gate, part.mlp(modulated_norm(hidden[name], shift, scale)))}
        return hidden

    def context(self, context: Context) -> tuple[Tensor, Tensor]:
        states = self.context_norm(context.states)
        key, value = rearrange(self.context_key_value(states), "b l (two heads e) -> two b heads l e", two=2, heads=self.heads)
        return self.context_key_norm(key), value


class CrossQuery(nn.Module):
    """One stream's cross-attention to the text; it starts at zero."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(width)
        self.query = linear(width, inner)
        self.query_norm = RMSNorm(inner // heads)
        self.out = linear(inner, width, std=0)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, lengths: Tensor, attend: Attention) -> Tensor:
        query = self.query_norm(rearrange(self.query(self.norm(hidden)), "b n (heads e) -> b heads n e", heads=self.heads))
        answer = attend(query, key, value, None, lengths)
        return self.out(rearrange(answer, "b heads n e -> b n (heads e)"))


def mlp_dim(width: int, mlp_ratio: float) -> int:
    """Hidden units of the SwiGLU MLP: two thirds of width * mlp_ratio, up to a multiple of 32; it costs what a plain MLP does."""
    return -(-int(width * mlp_ratio * 2 / 3) // 32) * 32


class VideoTransformer(Transformer):
    """A transformer over the video's tokens, and over those of any other streams."""

    def __init__(
        self,
        patch: Sequence[int],  # frames, rows and columns of a token
        width: int,  # of the video's hidden states
        depth: int,  # number of blocks
        heads: int,  # attention heads, shared by all streams
        context_dim: int,  # width of the text states
        channels: int = 3,  # of the video: 3 for pixels
        head_dim: int | None = None,  # by default width / heads
        mlp_ratio: float = 4.0,  # cost of the MLP, as if it were a plain one
        text: Literal["joint", "cross"] = "joint",  # text among the keys of attention, or a cross-attention of its own
        pooled_dim: int = 0,  # width of the pooled text added to the modulation; 0: none
        reference_rate: float = 4.0,  # tokens a second whose neighbours lie 1 apart on the rotary axis of time
        rotary_theta: float = 100.0,  # the longest rotary wavelength is about 2 pi theta tokens
        control_dim: int = 0,  # values of a control per token, such as a camera pose; 0: none
        other_streams: dict[str, StreamSpec] | None = None,  # beside the video, by name
        attention: Attention = attention_functions.sdpa,  # see dit_video/model/attention.py
    ) -> None:
        super().__init__()
        _check_sizes(width, depth, heads, head_dim, patch, text)
        self.patch = Patch(*patch)
        self.channels, self.reference_rate, self.rotary_theta = channels, reference_rate, rotary_theta
        self.head_dim = head_dim or width // heads
        token_dim = self.patch.t * self.patch.h * self.patch.w * channels
        specs = {"video": StreamSpec(token_dim, width, control_dim)} | (other_streams or {})
        self.ends: Mapping[str, StreamEnds] = nn.ModuleDict(  # type: ignore[assignment]
            {name: StreamEnds(spec, pooled_dim) for name, spec in specs.items()}
        )
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(specs, heads, self.head_dim, mlp_ratio, context_dim, text, attention) for _ in range(depth)
        )

    def forward(
        self, streams: dict[str, Stream], context: Context, taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Float[Tensor, "b n p"]], dict[str, Tensor]]:
        self.check_taps(taps)
        self.check_streams(streams)
        streams = {name: streams[name] for name in self.ends}  # in the model's order, whatever the caller's
        turns = {name: rotary(s.place, self.head_dim, self.rotary_theta) for name, s in streams.items()}
        places = torch.cat([s.place for s in streams.values()], dim=1) if len(streams) > 1 else streams["video"].place
        picks = {name: pick_of(s) for name, s in streams.items()}
        embedded = {name: self.ends[name].levels(s, context.pooled) for name, s in streams.items()}  # b k d
        tables = {
            name: rearrange(self.ends[name].modulation(e), "b k (six d) -> b k six d", six=6) for name, e in embedded.items()
        }
        hidden = {name: self.ends[name].enter(s) for name, s in streams.items()}  # b n d

        tapped: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, tables, picks, turns, places, context)
            tapped |= {tap: hidden[tap.split(".")[1]] for tap in taps if tap.split(".")[0] == str(number)}
        return {name: self.ends[name].leave(hidden[name], embedded[name], picks[name]) for name in hidden}, tapped


def pick_of(stream: Stream) -> Float[Tensor, "b n k"] | None:
    """Which row of its clip's table each token takes, for `per_token`; none where there is one row."""
    num_levels = stream.levels.shape[1]
    if num_levels == 1:
        return None
    return nn.functional.one_hot(stream.index, num_levels).to(stream.levels.dtype)


def _check_sizes(width: int, depth: int, heads: int, head_dim: int | None, patch: Sequence[int], text: str) -> None:
    for name, value in {"width": width, "depth": depth, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; set model.{name}")
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"a patch is three sizes of at least 1 (frames, rows, columns), got {list(patch)}; set model.patch")
    if head_dim is None and width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}; set model.heads or model.width")
    if (head_dim or width // heads) % 2 or (head_dim or width // heads) < 6:
        raise ValueError(
            f"rotary positions need an even head width of 6 or more, got {head_dim or width // heads}; set model.heads"
        )
    if text not in ("joint", "cross"):
        raise ValueError(f"text must be joint or cross, got {text!r}; set model.text")
