"""Checkpoints that are whole or not there: a new folder per save, tensors as safetensors, the rest as JSON, a manifest of checksums.

    step-00000123/
        network.safetensors        every group of tensors: a file, or one for each rank, network.rank0002.safetensors, with its rows of
                                   each tensor and, in the header, where they belong
        meta.json                  all that is not a tensor
        manifest.json              size and SHA-256 of every file; written last

A save is written into a hidden folder, flushed to disk, and renamed only when its manifest is there; only then are old checkpoints
removed, and never the newest two. Nothing is pickled, so loading executes nothing. Any number of ranks reads what any number wrote.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dit_video.model.published import Readable
from dit_video.trainer.parallel import local, rows_of

log = logging.getLogger(__name__)

_UMASK = os.umask(0)
os.umask(_UMASK)  # which can only be read by setting it
MANIFEST, META = "manifest.json", "meta.json"
DRAFT, OLD, SUMS = ".draft-", ".old-", "sums-of-rank-"
SPARE = 1.05  # of a save's size that must be free on the disk


def reached(point: str) -> None:
    """Called at every named point of a save; the tests of faults put something else here."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Part:
    """What one rank writes of a tensor: its rows from `start` on, of `rows`."""

    values: Tensor
    start: int = 0
    rows: int | None = None  # of the whole tensor; none: it is not cut


Groups = Mapping[str, Mapping[str, Part]]


def part_of(values: Tensor, like: Tensor | None = None) -> Part | None:
    """What this rank writes of a tensor, cut as itself or as `like` says; nothing where another rank does."""
    like = values if like is None else like
    own = local(values).detach()
    if not isinstance(like, DTensor):
        return Part(own) if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0 else None
    for place, rank in zip(like.placements, like.device_mesh.get_coordinate() or (), strict=True):
        if not place.is_shard() and rank > 0:
            return None  # a copy of what the first replica holds
        if place.is_shard() and place != Shard(0):
            raise CheckpointError(f"weights are cut by rows alone, found {place}")
    rows = rows_of(like)
    return Part(own, rows.start, like.shape[0]) if rows.stop > rows.start else None


# ------------------------------------------------------------------ writing


def check_room(folder: Path, num_bytes: int) -> None:
    """OSError where the disk of a folder has no room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < SPARE * num_bytes:
        raise OSError(f"a checkpoint takes {num_bytes / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def write_groups(draft: Path, groups: Groups, rank: int | None) -> None:
    """Writes a rank's parts of all groups, flushed to disk, and last the checksums of these files. `rank` is none where there is one."""
    draft.mkdir(parents=True, exist_ok=True)
    sums = {}
    for group, parts in groups.items():
        if not parts and rank:
            continue
        path = draft / (f"{group}.safetensors" if rank is None else f"{group}.rank{rank:04d}.safetensors")
        cut = {name: [part.start, part.rows] for name, part in parts.items() if part.rows is not None}
        tensors = {name: part.values.contiguous().cpu() for name, part in parts.items()}
        save_file(tensors, path, {"rows": json.dumps(cut)} if cut else None)
        path.chmod(0o666 & ~_UMASK)  # safetensors makes files that their owner alone can read
        reached("a file written")
        sums[path.name] = _sum(path)
    _write_json(draft / f"{SUMS}{rank or 0}", sums)
    reached("files written")


def sums_of(draft: Path, ranks: int) -> list[Path] | None:
    """Where so many ranks have told the checksums of their files; none until all of them have."""
    paths = [draft / f"{SUMS}{rank}" for rank in range(ranks)]
    return paths if all(path.is_file() for path in paths) else None


def commit(draft: Path, final: Path, ranks: int, meta: Mapping[str, Any]) -> None:
    """Turns a draft, of which all ranks have written their files, into a checkpoint."""
    _write_json(draft / META, meta)
    every = {META: _sum(draft / META)}
    for path in sums_of(draft, ranks) or ():
        every |= json.loads(path.read_text())
        path.unlink()
    reached("no manifest yet")
    _write_json(draft / MANIFEST, every)
    _flush(draft / MANIFEST)
    _flush(draft)
    reached("not renamed yet")
    if final.exists():  # damaged, and passed over when the run went on
        _remove(final)
    draft.rename(final)
    _flush(final.parent)
    reached("renamed")


@dataclass
class Checkpoint:
    """Everything of a save in one place: groups of tensors, and plain data."""

    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: "Keep | None" = None) -> Path:
    """Writes `folder/step-<number>` in one process and removes what need not be kept; an OSError leaves what was there as it was."""
    final = path_of(folder, checkpoint.meta["steps"])
    if final.exists() and verify(final) is None:
        return final
    draft = draft_of(final)
    shutil.rmtree(draft, ignore_errors=True)
    groups = {group: {name: Part(value) for name, value in tensors.items()} for group, tensors in checkpoint.tensors.items()}
    with told_as_lost(final, draft):
        check_room(folder, num_bytes(groups))
        write_groups(draft, groups, None)
        commit(draft, final, 1, checkpoint.meta)
    prune(folder, keep or Keep(), {final})
    return final


@contextmanager
def told_as_lost(final: Path, draft: Path) -> Iterator[None]:
    """Turns what goes wrong in a save into one OSError that says what is left, and removes the draft."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(not_saved(final, error)) from error


def not_saved(final: Path, problem: object) -> str:
    """What a user is told where a checkpoint could not be written."""
    return f"could not save {final}: {problem}; earlier checkpoints are untouched; make room, or set runs to another disk"


def path_of(folder: Path, steps: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"step-{steps:08d}"


def draft_of(final: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return final.with_name(f"{DRAFT}{final.name}")


def clear_drafts(folder: Path) -> None:
    """Removes what saves and removals that were cut off have left; no other process may be saving."""
    for pattern in (f"{DRAFT}*", f"{OLD}*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def remove_draft(final: Path) -> None:
    """Gives up a save."""
    shutil.rmtree(draft_of(final), ignore_errors=True)


def num_bytes(groups: Groups) -> int:
    """Bytes of a rank's parts."""
    return sum(part.values.numel() * part.values.element_size() for parts in groups.values() for part in parts.values())


# ------------------------------------------------------------------ keeping


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; the newest two that are verified always do."""

    last: int = 2  # so many of the newest
    every: int = 0  # the first in each stretch of so many clips, for good; 0: none
    best: str | None = None  # a number that is recorded in training, such as val/loss: the checkpoint with the best of it
    best_is: str = "lowest"

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}; set checkpoints.{name}")
        if self.best_is not in ("lowest", "highest"):
            raise ValueError(f"best_is must be lowest or highest, got {self.best_is!r}; set checkpoints.best_is")

    def chosen(self, metas: Sequence[Mapping[str, Any]]) -> set[int]:
        """The steps of those checkpoints, oldest first, that stay for what they are; the newest are counted elsewhere."""
        kept, stretches = set(), set()
        for meta in metas:
            stretch = meta["clips"] // self.every if self.every else 0
            if self.every and stretch and stretch not in stretches:
                stretches.add(stretch)
                kept.add(meta["steps"])
        values = [(meta["metrics"][self.best], meta["steps"]) for meta in metas if self.best in meta.get("metrics", {})]
        if values:
            kept.add(min(values)[1] if self.best_is == "lowest" else max(values)[1])
        return kept


def prune(folder: Path, keep: Keep, good: set[Path]) -> None:
    """Removes checkpoints that need not be kept; `good` are known to be verified, others are read first."""
    paths = listed(folder)
    metas = [meta for path in paths if (meta := _meta_or_none(path)) is not None]
    chosen = {path_of(folder, steps) for steps in keep.chosen(metas)}
    wanted = max(keep.last, 2)
    for path in reversed(paths):
        if wanted == 0:
            if path not in chosen:
                _remove(path)
                reached("one removed")
        elif path in good or verify(path) is None:
            good.add(path)
            wanted -= 1


def _remove(path: Path) -> None:
    """Removes a checkpoint in such a way that, cut off, it leaves none that looks damaged."""
    old = path.with_name(f"{OLD}{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _meta_or_none(path: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((path / META).read_text())
        return meta if isinstance(meta, dict) and {"steps", "clips"} <= meta.keys() else None
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------ finding and checking


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
    """What is wrong with a checkpoint; none: nothing. All of its files are read."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        if not isinstance(sums, dict) or set(sums) != {file.name for file in path.iterdir()} - {MANIFEST}:
            return "its files are not those of its manifest"
        for name, wanted in sums.items():
            size = wanted.get("bytes") if isinstance(wanted, dict) else None
            if size is not None and (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
        with ThreadPoolExecutor() as pool:  # a checksum leaves the interpreter alone
            for name, found in zip(sums, pool.map(lambda name: _sha256(path / name), sums), strict=True):
                if found != (sums[name]["sha256"] if isinstance(sums[name], dict) else sums[name]):
                    return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({error})"
    return None


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Rows:
    """What one file holds of a tensor."""

    file: Any
    start: int
    count: int
    total: int


@dataclass
class Saved:
    """A checkpoint that is open for reading, tensor by tensor and row by row, whoever wrote which rows."""

    path: Path
    meta: dict[str, Any]
    _parts: dict[str, dict[str, list[_Rows]]] = field(repr=False)

    @property
    def groups(self) -> list[str]:
        return sorted(self._parts)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        shapes = {}
        for name, parts in self._group(group).items():
            first, *rest = parts[0].file.get_slice(name).get_shape() or (None,)
            shapes[name] = () if first is None else (sum(part.count for part in parts), *rest)
        return shapes

    def read(self, group: str, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        parts = self._group(group)[name]
        if len(parts) == 1 and rows is None:
            return parts[0].file.get_tensor(name)
        rows = slice(0, sum(part.count for part in parts)) if rows is None else rows
        found = []
        for part in parts:
            first, last = max(rows.start - part.start, 0), min(rows.stop - part.start, part.count)
            if first < last:
                found.append(part.file.get_slice(name)[first:last])
        return torch.cat(found) if found else parts[0].file.get_slice(name)[0:0]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group."""
        return {name: self.read(group, name) for name in self._group(group)}

    def close(self) -> None:
        """Lets the files go, whose room on the disk is not free before, even when they are removed."""
        self._parts.clear()

    def _group(self, group: str) -> dict[str, list[_Rows]]:
        if group not in self._parts:
            raise CheckpointError(
                f"{self.path} has no {group}, only {', '.join(self.groups)}; it was saved by another kind of run"
            )
        return self._parts[group]


def opened(path: Path, checked: bool = False) -> Saved:
    """Opens a checkpoint, after checking it unless that was done; CheckpointError where it is damaged or rows of it are missing."""
    problem = None if checked else verify(path) if path.is_dir() else "there is no such folder"
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    try:
        meta = json.loads((path / META).read_text())
        if int(meta["steps"]) < 0 or int(meta["clips"]) < 0:
            raise ValueError(f"it is of step {meta['steps']} and {meta['clips']} clips")
        files = [(_FILE.fullmatch(file.name)[1], file) for file in sorted(path.glob("*.safetensors"))]  # type: ignore[index]
    except (OSError, ValueError, TypeError, KeyError) as error:  # as it was saved, but not by us
        raise CheckpointError(f"checkpoint {path} cannot be used: {error!r}") from error
    return opened_files(path, files, meta)


def opened_files(path: Path, files: Iterable[tuple[str, Path]], meta: dict[str, Any]) -> Saved:
    """Opens safetensors files as one checkpoint, each of them all or a part of the named group."""
    groups: dict[str, dict[str, list[_Rows]]] = {}
    try:
        for name, file_path in files:
            group = groups.setdefault(name, {})
            file = safe_open(file_path, framework="pt")
            cut = json.loads((file.metadata() or {}).get("rows", "{}"))
            for tensor in file.keys():
                count = (file.get_slice(tensor).get_shape() or [1])[0]
                start, total = cut.get(tensor, (0, count))
                group.setdefault(tensor, []).append(_Rows(file, start, count, total))
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error!r}") from error
    for name, tensors in groups.items():
        for tensor, parts in tensors.items():
            parts.sort(key=lambda part: part.start)
            ends = [0, *(part.start + part.count for part in parts)]
            if [part.start for part in parts] != ends[:-1] or any(part.total != ends[-1] for part in parts):
                raise CheckpointError(f"checkpoint {path} cannot be used: rows of {name}/{tensor} are missing or there twice")
    return Saved(path, meta, groups)


_FILE = re.compile(r"(.+?)(?:\.rank\d+)?\.safetensors")


def load(path: Path, groups: Sequence[str] | None = None) -> Checkpoint:
    """All of a checkpoint, or the named groups of its tensors, in memory."""
    saved = opened(path)
    return Checkpoint({group: saved.tensors(group) for group in (groups or saved.groups)}, saved.meta)


# ------------------------------------------------------------------ putting back


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: all of its state but weights that are frozen, which come from where they came from before."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def check_fits(module: nn.Module, saved: Readable, group: str) -> None:
    """CheckpointError that names the first tensors in which a group and a module's weights differ."""
    wanted = {name: tuple(value.shape) for name, value in trained(module).items()}
    given = saved.shapes(group)
    if wanted != given:
        names = sorted({*wanted, *given} - {name for name in wanted if wanted[name] == given.get(name)})
        told = "; ".join(
            f"{name}: model {wanted.get(name, 'has none')}, checkpoint {given.get(name, 'has none')}" for name in names[:3]
        )
        raise CheckpointError(
            f"{saved.path} is of another model ({len(names)} of {len(wanted)} tensors differ): {told}; set model, text or name"
        )


def load_weights(module: nn.Module, saved: Readable, group: str) -> None:
    """Puts a group into a module, each rank its own rows; CheckpointError, before anything is changed, where it does not fit."""
    check_fits(module, saved, group)
    for name, value in trained(module).items():
        _put(local(value), saved, group, name, value)


def fitting(module: nn.Module, saved: Readable, group: str) -> dict[str, list[str]]:
    """The names of tensors of a group that a module has in the same shape (kept), of its own others (new) and of those left (dropped)."""
    own, given = module.state_dict(), saved.shapes(group)
    kept = {name for name, shape in given.items() if name in own and tuple(own[name].shape) == shape}
    return {"kept": sorted(kept), "new": sorted(set(own) - kept), "dropped": sorted(set(given) - kept)}


def warm_start(module: nn.Module, saved: Readable, group: str) -> None:
    """Takes over every tensor of the same name and shape."""
    own = module.state_dict()
    for name in fitting(module, saved, group)["kept"]:
        _put(local(own[name]), saved, group, name, own[name])


def load_averages(averages: Mapping[str, Tensor], network: nn.Module, saved: Readable, group: str) -> None:
    """Puts a group into averages of a network's weights, which are cut as the weights are."""
    check_fits(network, saved, group)
    for name, weight in network.named_parameters():
        if name in averages:
            _put(averages[name], saved, group, name, weight)


@torch.no_grad()
def _put(own: Tensor, saved: Readable, group: str, name: str, like: Tensor) -> None:
    own.copy_(saved.read(group, name, rows_of(like) if isinstance(like, DTensor) else None))


def optimiser_state(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's tensors by "<parameter>/<quantity>", as they are cut."""
    return {
        f"{names[parameter]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }


@torch.no_grad()
def restore_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: Saved, group: str) -> None:
    """Undoes optimiser_state."""
    own: dict[str, nn.Parameter] = {names[p]: p for group in optimiser.param_groups for p in group["params"]}
    for key, shape in saved.shapes(group).items():
        name, quantity = key.rsplit("/", 1)
        if name not in own:
            raise CheckpointError(f"the checkpoint's optimiser knows {name}, the model does not; set model or name")
        parameter = own[name]  # what has its shape is cut as it is; a count of steps is not
        if shape == tuple(parameter.shape):
            optimiser.state[parameter][quantity] = torch.zeros_like(parameter)
            _put(local(optimiser.state[parameter][quantity]), saved, group, key, parameter)
        else:
            optimiser.state[parameter][quantity] = saved.read(group, key).to(parameter.device)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1))


def _sum(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, which is flushed to disk."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
