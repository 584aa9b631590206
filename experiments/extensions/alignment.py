"""A representation-alignment loss through a tap (REPA, Yu et al. 2024): hidden states learn to predict features of the clean clip."""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from dit_video.model.layers import linear
from dit_video.objective.objective import Corrupted
from dit_video.shapes import Batch, Grid, to_float


class Alignment(nn.Module):
    """One minus the cosine between a projection of a block's hidden states and features of the same place in the clean clip.

    The features are colour and edge statistics of each token's pixels, which need no download; a frozen image encoder goes in their place.
    """

    def __init__(self, tap: str, width: int, weight: float = 0.5) -> None:
        super().__init__()
        self.taps, self.weight = (tap,), weight
        self.project = nn.Sequential(linear(width, width), nn.SiLU(), linear(width, 12, matrices=0))

    def forward(self, tapped: dict[str, Tensor], batch: Batch, corrupted: Corrupted, grid: Grid) -> Tensor:
        wanted = statistics(to_float(batch.video), grid)  # b n 12
        return 1 - F.cosine_similarity(self.project(tapped[self.taps[0]]).float(), wanted, dim=-1).mean(dim=1)


def statistics(video: Tensor, grid: Grid) -> Tensor:
    """Means of the channels and of their gradients along time, height and width over each token's pixels, `b n 12`."""
    gradients = (
        torch.gradient(video, dim=(1, 2, 3))
        if video.shape[1] > 1
        else (torch.zeros_like(video), *torch.gradient(video, dim=(2, 3)))
    )
    maps = torch.cat([video, *(gradient.abs() for gradient in gradients)], dim=-1)
    first, rest = maps[:, :1], maps[:, 1:]  # the first frame is a token frame of its own
    later = (
        reduce(rest, "b (t pt) (h ph) (w pw) c -> b t h w c", "mean", t=grid.t - 1, h=grid.h, w=grid.w)
        if grid.t > 1
        else rest[:, :0, : grid.h, : grid.w]
    )
    start = reduce(first, "b t (h ph) (w pw) c -> b t h w c", "mean", h=grid.h, w=grid.w)
    return rearrange(torch.cat([start, later], dim=1), "b t h w c -> b (t h w) c")
