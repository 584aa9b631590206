"""Context parallelism: the tokens of a clip split over ranks, which exchange tokens for heads inside attention.

After Ulysses (Jacobs et al. 2023): each rank computes all of the network for its own tokens; in attention alone it holds all tokens, of
a part of the heads. Tokens and heads need not divide by the ranks. The text is on every rank, of which attention takes the heads it needs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup

from dit_video.model.attention import Attention
from dit_video.model.transformer import Transformer
from dit_video.shapes import Stream, cells_of


def shares(count: int, ranks: int) -> list[int]:
    """`count` things over ranks: the first of them get one more where it does not divide."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


class _Exchange(torch.autograd.Function):
    """Sends piece r of the first axis to rank r and receives a piece from each; backward sends all of it back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, out_sizes: list[int], in_sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (out_sizes, in_sizes), group
        received = sent.new_empty(sum(in_sizes), *sent.shape[1:])
        dist.all_to_all_single(received, sent.contiguous(), in_sizes, out_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        out_sizes, in_sizes = ctx.sizes
        return _Exchange.apply(gradients[0], in_sizes, out_sizes, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    """Puts the pieces of all ranks together along an axis; backward gives every rank the sum of what all ranks say of its piece."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, sizes: list[int], axis: int, group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.axis, ctx.group = sizes, axis, group
        front = piece.movedim(axis, 0).contiguous()
        largest = max(sizes)
        padded = front.new_zeros(largest, *front.shape[1:])
        padded[: len(front)] = front
        gathered = front.new_empty(len(sizes) * largest, *front.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        pieces = [part[:size] for part, size in zip(gathered.chunk(len(sizes)), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole.split(ctx.sizes, dim=ctx.axis)[dist.get_rank(ctx.group)], None, None, None


class Ulysses:
    """Attention over all tokens of a clip by ranks that hold a part of them each."""

    def __init__(self, attend: Attention, group: ProcessGroup) -> None:
        self.attend, self.group = attend, group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sizes: list[int] = []  # tokens of each rank, of the clips that are just passing
        self.places: Tensor | None = None  # of all tokens, in the order of the ranks

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        if places is None:  # the text alone is asked, which is here in whole
            return self.attend(query, key, value, None, lengths)
        own = query.shape[2]
        heads = shares(query.shape[1], self.ranks)
        mine = slice(sum(heads[: self.rank]), sum(heads[: self.rank + 1]))
        whole = self._to_heads(torch.stack([query, key[:, :, :own], value[:, :, :own]]), heads)
        text = [x[:, mine, own:] for x in (key, value)]
        keys, values = (torch.cat([x, y], dim=2) for x, y in zip(whole[1:], text, strict=True))
        lengths = lengths if lengths is None else lengths + (sum(self.sizes) - own)
        return self._to_tokens(self.attend(whole[0], keys, values, self.places, lengths), heads)

    def _to_heads(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """`three b heads n e` of this rank's tokens to that of all tokens and this rank's heads."""
        three, batch, _, own, dim = x.shape
        sent = rearrange(x, "three b heads n e -> heads (three b n e)")
        pieces = [piece.flatten() for piece in sent.split(list(heads))]
        each, mine = three * batch * dim, heads[self.rank]
        received = _Exchange.apply(
            torch.cat(pieces), [each * own * count for count in heads], [each * mine * size for size in self.sizes], self.group
        )
        parts = received.split([each * mine * size for size in self.sizes])
        shaped = [
            rearrange(part.view(mine, three, batch, size, dim), "heads three b n e -> three b heads n e")
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(shaped, dim=3)

    def _to_tokens(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """`b heads n e` of all tokens and this rank's heads to that of this rank's tokens and all heads."""
        batch, mine, _, dim = x.shape
        own = self.sizes[self.rank]
        pieces = [piece.flatten() for piece in x.split(self.sizes, dim=2)]
        received = _Exchange.apply(
            torch.cat(pieces), [batch * mine * dim * size for size in self.sizes], [batch * dim * own * count for count in heads],
            self.group,
        )  # fmt: skip
        parts = received.split([batch * dim * own * count for count in heads])
        return torch.cat([part.view(batch, count, own, dim) for part, count in zip(parts, heads, strict=True)], dim=1)


def split_tokens(transformer: Transformer, group: ProcessGroup) -> None:
    """Makes a transformer compute the tokens of this rank alone, of streams that every rank of the group hands it in whole.

    It gives the values of all tokens to every rank, and a loss on them counts once for each rank: divide it by their number. Every stream
    is split by itself, so that each rank has its part of the first frame as of the last.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks == 1:
        return
    exchanges = []
    for block in transformer.blocks:
        block.attend = Ulysses(block.attend, group)
        exchanges.append(block.attend)

    def enter(module: Transformer, arguments: tuple) -> tuple:
        streams, *rest = arguments
        # A token's cell is counted among all tokens of its clip, and so before they part.
        streams = {
            name: stream if stream.cell is not None else replace(stream, cell=cells_of(stream.place))
            for name, stream in streams.items()
        }
        sizes = {name: shares(stream.place.shape[1], ranks) for name, stream in streams.items()}
        order = [name for name in module.ends if name in streams]
        parts = {name: stream.place.split(sizes[name], dim=1) for name, stream in streams.items()}
        places = torch.cat([parts[name][r] for r in range(ranks) for name in order], dim=1)
        for exchange in exchanges:
            exchange.sizes, exchange.places = [sum(sizes[name][r] for name in order) for r in range(ranks)], places
        module.split_sizes = sizes  # type: ignore[assignment]
        return ({name: part_of(stream, sizes[name], rank) for name, stream in streams.items()}, *rest)

    def leave(module: Transformer, arguments: tuple, outputs: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple:
        values, tapped = outputs
        sizes: dict[str, list[int]] = module.split_sizes  # type: ignore[assignment]
        whole = {name: _Gather.apply(value, sizes[name], 1, group) for name, value in values.items()}
        return whole, {tap: _Gather.apply(states, sizes[tap.split(".")[1]], 1, group) for tap, states in tapped.items()}

    transformer.register_forward_pre_hook(enter)
    transformer.register_forward_hook(leave)


def part_of(stream: Stream, sizes: list[int], rank: int) -> Stream:
    """A rank's tokens of a stream; its table of noise levels is the clip's, and stays whole."""

    per_token = {name: getattr(stream, name) for name in ("values", "place", "index", "given", "partial", "control", "cell")}
    return replace(stream, **{name: x.split(sizes, dim=1)[rank] for name, x in per_token.items() if x is not None})
