"""Attention as one plain function of queries, keys and values, handed to the model by its config.

Every pattern has the signature of `Attention`: the first n keys are the clip's own tokens, in the order of the queries, and what follows
are text tokens. Only the first lengths[i] keys of clip i are real. So a new pattern (a window, a causal order in time) is one function
in a file of its own, and reads the tokens' places.
"""

import importlib
import logging
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

log = logging.getLogger(__name__)


@runtime_checkable
class Attention(Protocol):
    """What the transformer calls: attention of n queries over m keys."""

    def __call__(
        self,
        query: Float[Tensor, "b heads n e"],
        key: Float[Tensor, "b heads m e"],
        value: Float[Tensor, "b heads m e"],
        places: Float[Tensor, "b n 3"] | None,  # of the queries (and so of the first n keys); none in cross-attention
        lengths: Int[Tensor, " b"] | None,  # how many keys of each clip are real; none: all
    ) -> Float[Tensor, "b heads n e"]: ...


def key_mask(lengths: Int[Tensor, " b"], num_keys: int) -> Bool[Tensor, "b 1 1 m"]:
    """True where a key is real."""
    return rearrange(torch.arange(num_keys, device=lengths.device) < lengths[:, None], "b m -> b 1 1 m")


def sdpa(
    query: Float[Tensor, "b heads n e"],
    key: Float[Tensor, "b heads m e"],
    value: Float[Tensor, "b heads m e"],
    places: Float[Tensor, "b n 3"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b heads n e"]:
    """torch's scaled_dot_product_attention; the default on a GPU."""
    mask = None if lengths is None else key_mask(lengths, key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def math(
    query: Float[Tensor, "b heads n e"],
    key: Float[Tensor, "b heads m e"],
    value: Float[Tensor, "b heads m e"],
    places: Float[Tensor, "b n 3"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b heads n e"]:
    """softmax(q k^T / sqrt(e)) v written out; on CPU in bf16 its backward is several times faster than sdpa's."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if lengths is not None:
        scores = scores.masked_fill(~key_mask(lengths, key.shape[2]), float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Flash:
    """flash-attn (4, 3 or 2, the newest that imports), compared once with sdpa before its first use."""

    def __init__(self) -> None:
        self.function, self.name = _find_flash()
        self.checked: set[tuple[torch.dtype, int]] = set()
        log.info("attention runs on %s", self.name)

    def __call__(
        self,
        query: Float[Tensor, "b heads n e"],
        key: Float[Tensor, "b heads m e"],
        value: Float[Tensor, "b heads m e"],
        places: Float[Tensor, "b n 3"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b heads n e"]:
        if not query.shape[0]:  # no clips, which still have gradients, of zero
            return math(query, key, value, places, lengths)
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"flash attention takes float16 or bfloat16, got {query.dtype}; set trainer.precision=bf16 or model/attention=sdpa"
            )
        signature = (query.dtype, query.shape[-1])
        if signature not in self.checked:
            self._check(query.dtype, query.shape[-1], query.shape[1], query.device)
            self.checked.add(signature)
        return self._run(query, key, value, lengths)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
        batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
        query = rearrange(query, "b heads n e -> (b n) heads e")
        if lengths is None:
            lengths = torch.full((batch,), num_keys, device=query.device)
            key, value = (rearrange(x, "b heads m e -> (b m) heads e") for x in (key, value))
        else:  # pack the real keys of all clips one after the other
            real = key_mask(lengths, num_keys)[:, 0, 0]
            key, value = (rearrange(x, "b heads m e -> b m heads e")[real] for x in (key, value))
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        query_starts = torch.arange(0, (batch + 1) * num_queries, num_queries, device=query.device, dtype=torch.int32)
        out = self.function(
            query.contiguous(), key.contiguous(), value.contiguous(),
            cu_seqlens_q=query_starts, cu_seqlens_k=starts, max_seqlen_q=num_queries, max_seqlen_k=num_keys,
        )  # fmt: skip
        out = out[0] if isinstance(out, tuple) else out  # flash-attn 3 and 4 give the log-sum-exp beside it
        return rearrange(out, "(b n) heads e -> b heads n e", b=batch)

    @torch.no_grad()
    def _check(self, dtype: torch.dtype, head_dim: int, heads: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(2, heads, 70, head_dim, generator=generator, device=device, dtype=dtype) for _ in range(3)
        )
        lengths = torch.tensor([70, 41], device=device)
        wanted = sdpa(query.float(), key.float(), value.float(), lengths=lengths)
        error = (self._run(query, key, value, lengths).float() - wanted).abs().max().item()
        if not error < 0.02:
            raise ValueError(
                f"{self.name} differs from torch's attention by {error:.3g} on a small example; set model/attention=sdpa"
            )
        log.info("%s agrees with torch's attention within %.1e", self.name, error)


def _find_flash() -> tuple:
    for module, name in (
        ("flash_attn.cute", "flash-attn 4"),
        ("flash_attn_interface", "flash-attn 3"),
        ("flash_attn", "flash-attn 2"),
    ):
        try:
            return importlib.import_module(module).flash_attn_varlen_func, name
        except (ImportError, AttributeError):
            continue
    raise ValueError(
        "model/attention=flash needs flash-attn (pip install dit-video[flash] on a CUDA machine); set model/attention=sdpa"
    )
