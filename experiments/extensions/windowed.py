"""A new attention pattern: tokens see only tokens close in time, and all of the text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_video.model.attention import key_mask


def windowed(
    query: Tensor,  # b heads n e
    key: Tensor,  # b heads m e, of which the first n are the tokens themselves
    value: Tensor,  # b heads m e
    places: Tensor | None = None,  # b n 3: time, y, x
    lengths: Tensor | None = None,  # b: how many keys are real
    reach: float = 1.0,  # in units of the rotary time axis, 1 / model.reference_rate seconds
) -> Tensor:
    """Attention within `reach` of time."""
    mask = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if places is not None:
        time = places[..., 0]
        mask[..., : query.shape[2]] = ((time[:, :, None] - time[:, None, :]).abs() <= reach)[:, None]
    if lengths is not None:
        mask = mask & key_mask(lengths, key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
