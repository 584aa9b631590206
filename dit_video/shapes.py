"""The contract that every room speaks: a clip is token streams; a token has a place, a noise level, and is given or to be made.

Letters: `b` batch, `T H W` frames, height and width of a video, `t h w` its token grid, `pt ph pw` the patch, `c` channels, `n` tokens,
`p` values in a token (pt * ph * pw * c), `k` distinct noise levels of a clip, `l` context tokens, `d` width.
Video is `b T H W c`, float in [-1, 1] (or uint8 in [0, 255] on its way there); tokens are `b n p`. Where an autoencoder stands between,
its latents are a video too, smaller, of more channels, and of any range; they are what is patchified.

The frame rule: a clip has 1 + k * pt frames, and its first frame fills a temporal patch alone, as in causal autoencoders. So an image is
a video of one frame, and the first frame can be given exactly. In a token of the first frame the values before that frame are zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils._pytree import register_dataclass


class Patch(NamedTuple):
    """How many frames, rows and columns of a video one token covers."""

    t: int
    h: int
    w: int


PIXELS = Patch(1, 1, 1)
"""The compression of no autoencoder: latents are pixels."""


class Grid(NamedTuple):
    """How many tokens a clip has along time, height and width; tokens are ordered with width fastest."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w


def valid_frames(num_frames: int, pt: int) -> int:
    """The smallest number of frames 1 + k * pt that is at least num_frames; a longer clip is made and trimmed to what was asked."""
    if num_frames < 1:
        raise ValueError(f"a clip needs at least 1 frame, got num_frames={num_frames}; set num_frames")
    return 1 + -(-(num_frames - 1) // pt) * pt


def token_grid(num_frames: int, height: int, width: int, patch: Patch) -> Grid:
    """The token grid of a clip; ValueError where the patch does not divide it (see valid_frames for lengths)."""
    if num_frames < 1 or (num_frames - 1) % patch.t:
        raise ValueError(
            f"a clip of {num_frames} frames does not fit the temporal patch {patch.t}: it needs 1 + k * {patch.t} frames, "
            f"for example {valid_frames(max(num_frames, 1), patch.t)}; set num_frames or model.patch"
        )
    for name, size, part in (("height", height, patch.h), ("width", width, patch.w)):
        if size < part or size % part:
            raise ValueError(f"{name} {size} is not a positive multiple of the patch's {part}; set {name} or model.patch")
    return Grid(1 + (num_frames - 1) // patch.t, height // patch.h, width // patch.w)


def grid_of(video: Tensor, patch: Patch) -> Grid:
    """The token grid of a batch of videos `b T H W c`."""
    return token_grid(video.shape[1], video.shape[2], video.shape[3], patch)


def patchify(video: Float[Tensor, "b T H W c"], patch: Patch) -> Float[Tensor, "b n p"]:
    """Cuts a video into tokens; `unpatchify` is its exact inverse."""
    grid_of(video, patch)
    padded = torch.nn.functional.pad(video, (0, 0, 0, 0, 0, 0, patch.t - 1, 0))  # zeros before the first frame
    return rearrange(padded, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=patch.t, ph=patch.h, pw=patch.w)


def unpatchify(tokens: Float[Tensor, "b n p"], grid: Grid, patch: Patch) -> Float[Tensor, "b T H W c"]:
    """Puts tokens back together into a video of 1 + (grid.t - 1) * pt frames."""
    padded = rearrange(
        tokens, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
        t=grid.t, h=grid.h, w=grid.w, pt=patch.t, ph=patch.h, pw=patch.w,
    )  # fmt: skip
    return padded[:, patch.t - 1 :]


def real_slots(grid: Grid, patch: Patch) -> Float[Tensor, "n pt"]:
    """1 where a token's temporal slot holds a real frame, 0 where it is padding (the slots before the first frame)."""
    slots = torch.ones(grid.t, patch.t)
    slots[0, : patch.t - 1] = 0
    return slots.repeat_interleave(grid.h * grid.w, dim=0)


def token_places(grid: Grid, patch: Patch, fps: float, reference_rate: float) -> Float[Tensor, "n 3"]:
    """The place (time, y, x) of every token: the middle of its span in seconds times reference_rate, and centred token indices.

    Neighbours in time differ by 1 where fps / pt equals reference_rate (in tokens a second), so frame rate, duration and aspect may
    differ between clips and between training and sampling.
    """
    if fps <= 0 or reference_rate <= 0:
        raise ValueError(
            f"fps and reference_rate must be positive, got {fps} and {reference_rate}; set fps or model.reference_rate"
        )
    starts = torch.arange(grid.t, dtype=torch.float64) * patch.t + 1 - patch.t
    middle = starts + patch.t / 2
    middle[0] = 0.5  # the first token spans one frame
    time = middle / fps * reference_rate
    y = torch.arange(grid.h, dtype=torch.float64) - (grid.h - 1) / 2
    x = torch.arange(grid.w, dtype=torch.float64) - (grid.w - 1) / 2
    place = torch.stack(torch.meshgrid(time, y, x, indexing="ij"), dim=-1)
    return rearrange(place, "t h w place -> (t h w) place").float()


def cells_of(place: Float[Tensor, "b n 3"]) -> Int[Tensor, "b n 3"]:
    """The cell (t, y, x) of every token in its clip's grid, counted from 0: the rank of its place among the clip's on each axis.

    For published models, whose positions are whole numbers. All tokens of a clip must be there.
    """
    ordered, order = place.sort(dim=1)
    ranks = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1), (0, 0, 1, 0))
    return torch.zeros_like(order).scatter(1, order, ranks)


@dataclass(frozen=True)
class Tokens:
    """How clips become tokens: the compression of the autoencoder, the patch of its latents, and the rate of places in time.

    The frame rule holds for latents as for pixels, so a clip of pixels has the grid that the product of both, the span, cuts it into.
    """

    patch: Patch  # frames, rows and columns of latents in a token
    compression: Patch = PIXELS  # frames, rows and columns of pixels in a latent
    reference_rate: float = 4.0  # tokens a second whose neighbours lie 1 apart in time

    @property
    def span(self) -> Patch:
        """Frames, rows and columns of pixels that a token covers."""
        return Patch(*(a * b for a, b in zip(self.patch, self.compression, strict=True)))

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """The token grid of a clip of pixels; errors as `token_grid`."""
        return token_grid(num_frames, height, width, self.span)

    def places(self, grid: Grid, fps: float) -> Float[Tensor, "n 3"]:
        """The place of every token, see `token_places`; fps is that of the pixels."""
        return token_places(grid, self.span, fps, self.reference_rate)


@dataclass
class Stream:
    """The tokens of one modality on their way through the transformer."""

    values: Float[Tensor, "b n p"]  # noisy where made, as given where given
    place: Float[Tensor, "b n 3"]  # (time, y, x), see token_places
    levels: Float[Tensor, "b k"]  # the distinct noise levels of each clip, 0 clean to 1 noise
    index: Int[Tensor, "b n"]  # which of them each token has
    given: Bool[Tensor, "b n"]  # known to the model; the others are to be made
    partial: Bool[Tensor, "b n"]  # holds fewer frames than its patch (the first frame's tokens); its other values are zeros
    control: Float[Tensor, "b n c"] | None = None  # what tokens are told beside their values, such as a camera pose
    cell: Int[Tensor, "b n 3"] | None = None  # see cells_of; said where not all of a clip's tokens are here

    def level_per_token(self) -> Float[Tensor, "b n"]:
        """The noise level of each token, for the algebra outside the transformer."""
        return self.levels.gather(1, self.index)


@dataclass
class Context:
    """What the model is told in words: states of a text encoder, never modulated by the noise level."""

    states: Float[Tensor, "b l d"]
    lengths: Int[Tensor, " b"]  # states from here on are padding and are never looked at
    pooled: Float[Tensor, "b p"] | None = None
    image: Float[Tensor, "b i e"] | None = None  # states of an image encoder that saw the first frame, for models that take them


for kind in (
    Stream,
    Context,
):  # FSDP2 of a torch before 2.13 finds tensors in trees of Python's own kinds and in what is registered
    register_dataclass(kind)


@dataclass(frozen=True)
class Encoded:
    """One caption as a frozen text encoder gave it; it may stand wherever a caption does."""

    states: Float[Tensor, "l d"]
    pooled: Float[Tensor, " p"] | None = None
    others: "tuple[Encoded, ...]" = ()  # of further encoders, in their order, where several read every caption

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        own = [self.states] if self.pooled is None else [self.states, self.pooled]
        return own + [tensor for other in self.others for tensor in other.tensors]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> "Encoded":
        """The same on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=True)
        others = tuple(other.to(device) for other in self.others)
        return Encoded(self.states.to(device, non_blocking=True), pooled, others)


Caption = str | Encoded | None
"""What a clip is told: words, or words as states; none: nothing."""


@dataclass
class Batch:
    """Captioned clips of one shape, as the data room hands them over."""

    video: UInt8[Tensor, "b T H W 3"] | None  # none where the clips come as latents
    captions: list[str]
    keys: list[str]  # shard and member, for messages
    slots: Int[Tensor, " b"]  # the clip's number in the global stream: the seed of everything random about it
    fps: float
    weights: Float[Tensor, " b"] = field(default=None)  # type: ignore[assignment]  # 0 for a filler, 1 for a clip
    parts: list[int] = field(default_factory=list)  # clips of each micro-batch, in order; none said: all are one
    step_clips: int = 0  # clips of the whole step, of which other ranks may have some; 0: those that are here
    starts: Float[Tensor, " b"] = field(default=None)  # type: ignore[assignment]  # seconds into the source
    audio: Float[Tensor, "b channels samples"] | None = None  # what is heard from the first frame on, where it was asked for
    audio_rate: int = 0  # samples a second
    has_audio: Bool[Tensor, " b"] | None = None  # of those without any, audio is silence
    latents: Float[Tensor, "b t h w c"] | None = None  # what the autoencoder makes of the video, where there is one
    known: Float[Tensor, "b t h w c"] | None = (
        None  # latents of the first frame with grey after it, for models that take images so
    )
    control: Float[Tensor, "b n values"] | None = None  # what is told per token beside its values; then all tokens are made
    image: Float[Tensor, "b i e"] | None = None  # states of an image encoder that saw the first frame, for models that take them
    logvar: Float[Tensor, "b t h w c"] | None = None  # of latents that are to be drawn: logarithm of the variance around them
    encoded: list[Encoded | None] | None = None  # the captions, where they come as states; none of a filler

    def __post_init__(self) -> None:
        if self.weights is None:
            self.weights = torch.ones(len(self.captions))
        if self.starts is None:
            self.starts = torch.zeros(len(self.captions))
        self.parts = self.parts or [len(self.captions)]
        self.step_clips = self.step_clips or len(self.captions)

    def clean(self) -> Float[Tensor, "b t h w c"]:
        """The clips as what is to be made of noise: their latents where they have any, else their pixels in [-1, 1]."""
        if self.latents is not None:
            return self.latents
        assert self.video is not None
        return to_float(self.video)

    def told(self) -> Sequence[Caption]:
        """The captions, as states where they are known."""
        return self.encoded or self.captions

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on a device."""
        moved: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("video", "weights", "audio", "has_audio", "latents", "logvar", "known", "control", "image")
        }
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in moved.items() if tensor is not None}
        encoded = None if self.encoded is None else [caption and caption.to(device) for caption in self.encoded]
        return replace(self, encoded=encoded, **moved)

    def micro_batches(self) -> "Iterator[Batch]":
        """The batch in its parts."""
        bounds = [0, *accumulate(self.parts)]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            cut = slice(start, end)
            tensors: dict[str, Any] = {
                name: getattr(self, name)
                for name in ("audio", "has_audio", "latents", "logvar", "known", "control", "image", "encoded")
            }
            yield Batch(
                None if self.video is None else self.video[cut], self.captions[cut], self.keys[cut], self.slots[cut],
                self.fps, self.weights[cut],
                step_clips=self.step_clips, starts=self.starts[cut], audio_rate=self.audio_rate,
                **{name: value[cut] for name, value in tensors.items() if value is not None},
            )  # fmt: skip


def to_float(video: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels of [0, 255] as numbers of torch's default type (float32 unless it was changed) in [-1, 1]."""
    return video.to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(video: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Pixels of [-1, 1] as uint8 in [0, 255], rounded and clipped; exact inverse of to_float on what to_float made."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
