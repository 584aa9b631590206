"""Checkpoints that are whole or not there: a new folder per save, tensors as safetensors, the rest as JSON, a manifest of checksums.

A save writes into a hidden folder, flushes it to disk, writes the manifest last and renames; only then are old checkpoints removed,
and never the newest two. Nothing is pickled, so loading executes nothing.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_video.trainer.parallel import place_like, whole

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclass
class Checkpoint:
    """What a save holds: groups of tensors, each a file, and plain data."""

    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Writes `folder/step-<number>` and removes all but the newest `keep` verified; an OSError leaves what was there as it was."""
    final = folder / f"step-{checkpoint.meta['steps']:08d}"
    if final.exists() and verify(final) is None:
        return final
    draft = folder / f".{final.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, draft / f"{name}.safetensors")
        _write_json(draft / "meta.json", checkpoint.meta)
        sums = {}
        for path in sorted(draft.iterdir()):
            sums[path.name] = _sha256(path)
            _flush(path)
        _write_json(draft / MANIFEST, sums)
        _flush(draft / MANIFEST)
        _flush(draft)
        if final.exists():  # damaged, and passed over when the run went on
            shutil.rmtree(final)
        draft.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"could not save {final}: {error}; earlier checkpoints are untouched; make room, or set runs to another disk"
        ) from error
    _prune(folder, final, max(keep, 2))
    return final


def _prune(folder: Path, verified: Path, keep: int) -> None:
    """Removes what is older than the newest `keep` verified checkpoints, of which one is known."""
    for path in reversed(listed(folder)):
        if keep == 0:
            shutil.rmtree(path)
        elif path == verified or verify(path) is None:
            keep -= 1


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, verified or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; a damaged one is named in the log and passed over.

    CheckpointError where there are checkpoints and all are damaged: training must not start again from nothing.
    """
    found = listed(folder)
    for path in reversed(found):
        problem = verify(path)
        if problem is None:
            return path
        log.warning("CHECKPOINT PASSED OVER: %s: %s", path, problem)
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {folder} are damaged; move them away to start again")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; none: nothing."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or set(sums) != {file.name for file in path.iterdir()} - {MANIFEST}:
            return "its files are not those of its manifest"
        for name, wanted in sums.items():
            if _sha256(path / name) != wanted:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def load(path: Path, names: list[str] | None = None) -> Checkpoint:
    """Reads a checkpoint, or the named groups of its tensors, after checking it."""
    problem = verify(path) if path.is_dir() else "there is no such folder"
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    names = names or [file.stem for file in path.glob("*.safetensors")]
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names}
        return Checkpoint(tensors, json.loads((path / "meta.json").read_text()))
    except (OSError, SafetensorError, ValueError) as error:  # as it was saved, but not by us
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Puts weights into a module; CheckpointError names the first keys that do not fit, before anything is changed."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != given:
        names = sorted({*wanted, *given} - {name for name in wanted if wanted[name] == given.get(name)})
        told = "; ".join(
            f"{name}: model {wanted.get(name, 'has none')}, checkpoint {given.get(name, 'has none')}" for name in names[:3]
        )
        raise CheckpointError(
            f"{source} is of another model ({len(names)} of {len(wanted)} tensors differ): {told}; set model, text or name"
        )
    own = module.state_dict()
    module.load_state_dict({name: place_like(value, own[name]) for name, value in weights.items()})


def warm_start(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Takes over every tensor of the same name and shape; lists the names kept, new (as initialised) and dropped."""
    own = module.state_dict()
    kept = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    module.load_state_dict(kept, strict=False)
    return {"kept": sorted(kept), "new": sorted(set(own) - set(kept)), "dropped": sorted(set(weights) - set(kept))}


def optimiser_state(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's tensors by "<parameter>/<quantity>"."""
    return {
        f"{names[parameter]}/{key}": whole(value) if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Undoes optimiser_state."""
    own: dict[str, nn.Parameter] = {names[p]: p for group in optimiser.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        if name not in own:
            raise CheckpointError(f"the checkpoint's optimiser knows {name}, the model does not; set model or name")
        parameter = own[name]  # what has its shape is cut as it is; a count of steps is not
        optimiser.state[parameter][quantity] = (
            place_like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
        )


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
