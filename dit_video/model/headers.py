"""What folders of frozen weights say of themselves, in headers and configs: looked over before anything is read or made."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantised, as safetensors calls them."""


def expanded(folder: str) -> Path:
    """The path of a folder, in which ~ is a home where there is one."""
    return Path(os.path.expanduser(folder))


class Stored(NamedTuple):
    """A tensor of a file of safetensors, as its header says."""

    file: Path
    shape: list[int]
    kind: str  # F32, BF16, I64, F8_E4M3 and so on


def headers(files: Sequence[Path], key: str) -> dict[str, Stored]:
    """The tensors that safetensors hold, by name, and nothing is read; ValueError names the file that is damaged and the config's key."""
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    found[name] = Stored(path, tensor.get_shape(), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off: {' '.join(str(error).split())}; set {key}") from error
    return found


def num_weights(files: Sequence[Path], key: str, prefix: str = "") -> int:
    """How many numbers safetensors hold, as their headers say, in tensors whose names begin so."""
    return sum(math.prod(tensor.shape) for name, tensor in headers(files, key).items() if name.startswith(prefix))


LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "depth",
    "num_res_blocks", "layers_per_block", "decoder_layers_per_block",
)  # fmt: skip
"""What configs call how many layers there are."""


def check_depth(path: Path, config: dict[str, Any], num_tensors: int, key: str) -> None:
    """ValueError where a config asks for more layers than files hold tensors, which would be made, for minutes, before any is missed."""
    for name, value in settings(config):
        counts = value if isinstance(value, list) else [value]
        if name in LAYERS and any(isinstance(count, int) and count > num_tensors for count in counts):
            raise ValueError(f"{path} asks for {name} {value}, and its weights are {num_tensors} tensors; set {key}")


def settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those of a config and of the configs inside it."""
    left = [config]
    while left:
        for name, value in left.pop().items():
            yield name, value
            if isinstance(value, dict):
                left.append(value)
