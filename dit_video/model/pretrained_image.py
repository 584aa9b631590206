"""The encoder of a clip's first frame that Wan 2.1's image-to-video models look at beside its latents: CLIP's picture tower, frozen.

A folder as transformers writes it, read as it is; frames are prepared by the processor that lies with it.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dit_video.model.frozen import Frozen, Placement, Precision
from dit_video.model.headers import num_weights
from dit_video.model.transformers_folders import (
    check_numbers,
    checksum,
    find_folder,
    one_line,
    quiet,
    read_config,
    unusable,
    weight_files,
)

KEY = "image_encoder.folder"
PROCESSOR, PROCESSOR_KEY = "preprocessor_config.json", "image_encoder.processor"
KINDS = ("clip", "clip_vision_model")


class ImageEncoder(nn.Module):
    """States `b tokens dim` of frames, those of a hidden layer of CLIP's picture tower; each frame is read by itself.

    Nothing of it is trained or saved, and its folder is not touched before the first frame. ValueError, naming the file and the key to
    change, for a folder that cannot be used.
    """

    def __init__(
        self,
        folder: str | None,  # with config.json and *.safetensors
        dim: int,  # width of its states
        tokens: int = 257,  # states of a frame: its patches and one for all
        processor: str | None = None,  # the folder of preprocessor_config.json; none: the same
        layer: int = -2,  # whose states: -1 the last layer's, -2 those that it is given
        dtype: Precision = "float32",  # of its weights
        placement: Placement = "device",  # between uses; or offload: in the host's memory, or shard: cut over the ranks
    ) -> None:
        super().__init__()
        self.folder, self.processor_folder, self.dim, self.tokens = folder, processor or folder, dim, tokens
        self.layer, self.dtype = layer, dtype
        self.pretrained = Frozen(self._load, placement)

    @property
    def is_here(self) -> bool:
        """Whether it can look at frames, and not only states that it made before."""
        return self.folder is not None

    @property
    def name(self) -> str:
        """What it is called in messages, and in the notes of what was made with it: the kind and the fingerprint."""
        return f"{read_config(find_folder(self.folder, KEY), KEY)['model_type']} {self.fingerprint[:8]}"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that states depend on: the config, the processor, the weights' bytes, the layer and the precision."""
        folder = find_folder(self.folder, KEY)
        sums = [checksum(path) for path in [folder / "config.json", *weight_files(folder, KEY)]]
        return hashlib.sha256(json.dumps([sums, self._processor(), self.layer, self.dtype]).encode()).hexdigest()[:16]

    @property
    def kept(self) -> torch.dtype:
        """The precision in which states are kept on disk: that of the weights they were made with."""
        kept: torch.dtype = getattr(torch, self.dtype)
        return kept

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of its weights, so that they must use it equally often."""
        return self.is_here and self.pretrained.is_cut

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        """What its weights hold of a rank's device between uses, or in use, where so many ranks train."""
        return self.pretrained.device_bytes(self._num_bytes, ranks, in_use) if self.is_here else 0

    def _num_bytes(self) -> int:
        folder = find_folder(self.folder, KEY)
        tower = "vision_model." if read_config(folder, KEY)["model_type"] == "clip" else ""  # beside CLIP's for text
        return num_weights(weight_files(folder, KEY), KEY, tower) * self.kept.itemsize

    def check(self) -> None:
        """ValueError where it cannot be used, as far as a glance tells."""
        folder = find_folder(self.folder, KEY)
        kind = read_config(folder, KEY)["model_type"]
        if kind not in KINDS:
            raise unusable(folder, f"has model_type {kind}, and pictures are read by {' or '.join(KINDS)}", KEY)
        weight_files(folder, KEY)
        self._processor()

    def forward(self, frames: UInt8[Tensor, "b H W 3"]) -> Float[Tensor, "b tokens dim"]:
        if frames.is_meta or isinstance(frames, FakeTensor):  # nothing is computed, so nothing is read: only the shape counts
            return torch.zeros(frames.shape[0], self.tokens, self.dim, device=frames.device)
        with self.pretrained.on(frames.device) as model:
            return torch.stack([model(frame) for frame in frames])

    def _processor(self) -> dict[str, Any]:
        """How frames are prepared, as the processor's file says and nothing else."""
        path = find_folder(self.processor_folder, PROCESSOR_KEY) / PROCESSOR
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} is not there; set {PROCESSOR_KEY} to the folder that has it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used: {error}; set {PROCESSOR_KEY}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} cannot be used: it is no mapping; set {PROCESSOR_KEY}")
        return found

    def _load(self) -> "Tower":
        self.check()
        folder = find_folder(self.folder, KEY)
        tower = load(folder, self._processor(), self.layer, self.kept)
        try:
            states = tower(torch.zeros(32, 32, 3, dtype=torch.uint8))
        except IndexError as error:
            raise ValueError(f"{folder} has no layer {self.layer}: {error}; set image_encoder.layer") from error
        except Exception as error:  # whatever a processor of another kind does
            raise unusable(folder, f"does not read a frame: {one_line(error)}", KEY) from error
        if tuple(states.shape) != (self.tokens, self.dim):
            raise ValueError(
                f"{folder} gives {len(states)} states of width {states.shape[1]}, {self.tokens} of {self.dim} are expected; "
                "set image_encoder.tokens and image_encoder.dim"
            )
        if not states.isfinite().all():
            raise ValueError(f"{folder} gives states that are no numbers in {self.dtype}; set image_encoder.dtype or {KEY}")
        return tower


class Tower(nn.Module):
    """A picture tower of transformers with its processor, looking at one frame at a time."""

    def __init__(self, model: nn.Module, processor: Any, layer: int) -> None:
        super().__init__()
        self.model, self.processor, self.layer = model, processor, layer

    @torch.no_grad()
    def forward(self, frame: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "tokens dim"]:
        like = next(self.model.parameters())
        prepared = self.processor(images=frame.cpu().numpy(), input_data_format="channels_last", return_tensors="pt")
        output = self.model(pixel_values=prepared["pixel_values"].to(like), output_hidden_states=True)
        return output.hidden_states[self.layer][0].float()


def load(folder: Path, processor: dict[str, Any], layer: int, dtype: torch.dtype) -> Tower:
    """A folder's picture tower with all its weights; ValueError saying what is wrong and which key to change."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this image encoder needs transformers: pip install 'dit-video[text]'") from error
    with quiet(transformers):
        try:
            prepare = transformers.CLIPImageProcessorPil.from_dict(processor)
        except Exception as error:
            raise ValueError(f"{PROCESSOR} cannot be used: {one_line(error)}; set {PROCESSOR_KEY}") from error
        make: Any = transformers.CLIPVisionModel
        read: Any = transformers.CLIPVisionConfig.from_pretrained
        eager = {"attn_implementation": "eager"}
        check_numbers(lambda: make._from_config(read(folder, local_files_only=True), **eager), weight_files(folder, KEY), KEY)
        try:
            model, told = make.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
                ignore_mismatched_sizes=True, **eager,
            )  # fmt: skip
        except Exception as error:
            raise unusable(folder, f"cannot be loaded: {one_line(error)}", KEY) from error
    lost = [*sorted(told["missing_keys"]), *(name[0] for name in sorted(told["mismatched_keys"])), *told["error_msgs"]]
    if lost:
        raise unusable(folder, f"lacks weights, or has them in other shapes: {lost[0]} and {len(lost) - 1} more", KEY)
    return Tower(model.eval(), prepare, layer)
