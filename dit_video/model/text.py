"""Captions as vectors. A text encoder is any module that turns a list of captions into a Context; None stands for "no caption".

One that was trained elsewhere is in pretrained_text.py.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_video.model.attention import math
from dit_video.model.layers import RMSNorm, SwiGLU, learned, linear
from dit_video.shapes import Caption, Context, Encoded

NOTHING = "."
"""Encoded, and not used, where no caption is told: every rank's encoder then has gradients, if of zero, for the others to meet."""


class TextEncoder(nn.Module):
    """The seam for text encoders, learned or frozen: captions in, states `b l dim`, lengths and a pooled vector `b pooled_dim` out.

    The caption None (dropped in training, or no negative prompt in sampling) and the empty caption become one learned null state;
    an encoder without one answers them in a forward of its own.
    """

    def __init__(self, dim: int, pooled_dim: int | None = None, learned_null: bool = True) -> None:
        super().__init__()
        self.dim, self.pooled_dim = dim, dim if pooled_dim is None else pooled_dim
        if learned_null:
            self.null_state = learned(dim, std=1.0)
        if learned_null and self.pooled_dim:
            self.null_pooled = learned(self.pooled_dim, std=1.0)

    def encode(self, captions: list[str | Encoded]) -> Context:
        """States of captions that are not empty."""
        raise NotImplementedError

    @property
    def is_frozen(self) -> bool:
        """Whether the states of a caption are always the same, so that they can be kept."""
        return False

    @property
    def is_here(self) -> bool:
        """Whether it can read words, and not only states that it made before."""
        return True

    @property
    def name(self) -> str:
        """What it is called in messages, and in the notes of what was made with it."""
        return type(self).__name__

    def states_of(self, caption: str) -> Encoded:
        """A caption's states, in the host's memory; of frozen encoders alone."""
        raise NotImplementedError

    def imagined(self, num_words: int) -> Encoded:
        """Zeros in place of the states of a caption of so many words, in the host's memory; of frozen encoders alone."""
        raise NotImplementedError

    @property
    def needs_nothing(self) -> bool:
        """Whether no caption is told by the states of the empty one, and not by a learned state."""
        return False

    def take_nothing(self, states: Encoded) -> None:
        """Told the states of the empty caption that lie beside encoded clips, a frozen encoder need not make them."""

    def summary(self) -> dict[str, float]:
        """What happened to captions so far, for the record of a run."""
        return {}

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of frozen weights, so that they must encode equally often."""
        return False

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        """What frozen weights hold of a rank's device between uses, or in use, where so many ranks train."""
        return 0

    def check(self) -> None:
        """ValueError where it cannot be used, as far as a glance tells."""

    def unused(self) -> str | Encoded:
        """What is encoded, and not used, where no caption is told."""
        return NOTHING

    def forward(self, captions: Sequence[Caption]) -> Context:
        told = [caption for caption in captions if says(caption)]
        device, batch = self.null_state.device, len(captions)
        context = self.encode(told or [self.unused()])
        states = F.pad(self.null_state[None], (0, 0, 0, context.states.shape[1] - 1)).expand(batch, -1, -1)
        lengths = torch.ones(batch, dtype=torch.long, device=device)
        pooled = self.null_pooled.expand(batch, -1) if self.pooled_dim else None
        rows = [i for i, caption in enumerate(captions) if says(caption)]
        places = torch.tensor(rows, dtype=torch.long, device=device)
        states = states.index_copy(0, places, context.states[: len(rows)].to(states.dtype))
        lengths = lengths.index_copy(0, places, context.lengths[: len(rows)])
        if pooled is not None and context.pooled is not None:
            pooled = pooled.index_copy(0, places, context.pooled[: len(rows)].to(pooled.dtype))
        return Context(states, lengths, pooled)


def says(caption: Caption) -> TypeGuard[str | Encoded]:
    """Whether there is anything in a caption."""
    return isinstance(caption, Encoded) or bool(caption and caption.strip())


class WordEncoder(TextEncoder):
    """A small text encoder trained together with the video model: hashed words, then a few transformer layers.

    A word is looked up in two tables by two hashes of it, half of the vector each, so that any text works without a vocabulary file and
    two words meet by accident in both tables once in `buckets`^2.
    """

    def __init__(
        self,
        dim: int = 128,  # width of its states
        depth: int = 1,  # transformer layers
        heads: int = 4,
        buckets: int = 2048,  # rows of each table
        max_words: int = 64,  # what follows is not read
    ) -> None:
        super().__init__(dim)
        if dim % (2 * heads):
            raise ValueError(f"dim {dim} is not divisible by 2 * heads ({2 * heads}); set text.dim or text.heads")
        self.buckets, self.max_words = buckets, max_words
        self.tables = nn.ParameterList(learned(buckets, dim // 2, std=1.0) for _ in range(2))
        self.positions = learned(max_words, dim, std=0.3)
        self.layers = nn.ModuleList(TextLayer(dim, heads) for _ in range(depth))
        self.norm = RMSNorm(dim)

    def encode(self, captions: list[str | Encoded]) -> Context:
        if any(isinstance(caption, Encoded) for caption in captions):
            raise ValueError(
                "the clips' captions come as states of another encoder, and this one reads words; set text to that encoder"
            )
        words = [split_words(str(caption))[: self.max_words] for caption in captions]
        longest = max(map(len, words))
        hashes = torch.zeros(len(words), longest, 2, dtype=torch.long)
        for row, caption in enumerate(words):
            hashes[row, : len(caption)] = torch.tensor([hash_word(word, self.buckets) for word in caption])
        hashes = hashes.to(self.positions.device, non_blocking=True)
        lengths = torch.tensor([len(caption) for caption in words], device=hashes.device)

        looked_up = [F.embedding(hashes[..., i], table) for i, table in enumerate(self.tables)]
        states = torch.cat(looked_up, dim=-1) + self.positions[:longest]  # b l d
        for layer in self.layers:
            states = layer(states, lengths)
        states = self.norm(states)
        real = (torch.arange(longest, device=hashes.device) < lengths[:, None]).to(states.dtype)
        pooled = torch.einsum("b l d, b l -> b d", states, real) / lengths[:, None]
        return Context(states, lengths, pooled)


class TextLayer(nn.Module):
    """Attention among the words of a caption, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = RMSNorm(dim), RMSNorm(dim)
        self.qkv = linear(dim, 3 * dim, matrices=3)
        self.out = linear(dim, dim, std=0)
        self.mlp = SwiGLU(dim, 2 * dim)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        query, key, value = rearrange(
            self.qkv(self.norm(states)), "b l (three heads e) -> three b heads l e", three=3, heads=self.heads
        )
        answer = math(query, key, value, lengths=lengths)
        states = states + self.out(rearrange(answer, "b heads l e -> b l (heads e)"))
        return states + self.mlp(self.mlp_norm(states))


def split_words(text: str) -> list[str]:
    """Lower-case words, numbers, and punctuation marks one by one; never empty."""
    return re.findall(r"\w+|[^\w\s]", text.lower()) or [" "]


_hashes: dict[tuple[str, int], tuple[int, int]] = {}  # a word's rows never change, and hashing costs more than a look-up


def hash_word(word: str, buckets: int) -> tuple[int, int]:
    """The word's row in each of the two tables: the same on every machine and in every process."""
    if (word, buckets) not in _hashes:
        if len(_hashes) > 100_000:
            _hashes.clear()
        digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=16).digest()
        first, second = (int.from_bytes(half, "little") % buckets for half in (digest[:8], digest[8:]))
        _hashes[word, buckets] = first, second
    return _hashes[word, buckets]
