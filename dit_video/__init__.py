"""dit_video: a research training framework for video diffusion transformers.

run = dit_video.load("runs/demo")
video = run.sample("a small red circle moves left", seed=7)  # uint8 T H W 3
print(run.evaluate().metrics["adherence.held_out.all"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dit_video.runs import Run


def load(
    run: "Path | str",
    trust: "Sequence[str]" = (),
    device: str | None = None,
    weights: str = "ema",
    folders: "Mapping[str, str] | None" = None,
    dtype: 'Literal["float32", "bfloat16"]' = "float32",
) -> "Run":
    """Opens a trained run's folder, or an export, for sampling and evaluation; its config may call dit_video and packages in `trust`.

    Frozen weights that lie elsewhere by now are named by their key: folders={"autoencoder.folder": "/data/vae"}.
    With dtype="bfloat16" the transformer takes half the memory, and clips are made in bfloat16.
    """
    from dit_video.runs import Run  # a second of imports that the command line's --help does not need

    return Run(run, trust, device, weights, folders, dtype)
