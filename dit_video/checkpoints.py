"""dit-video checkpoint ls|verify|export|diff: what a run has saved, whether it is whole, and how it leaves the run's folder."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from dit_video.build import make_network
from dit_video.card import model_card
from dit_video.model import published
from dit_video.model.lora import adapters_of, save_adapters
from dit_video.model.wan import WanExperts, WanTransformer
from dit_video.runs import export_file, saved_in, write_json, write_text
from dit_video.trainer import checkpoint
from dit_video.trainer.checkpoint import CheckpointError, Saved

TOLD = 10  # of the tensors that differ


def ls(run: str) -> None:
    """Prints every checkpoint of a run: what it holds and by whom it was written; none is read in whole."""
    table = _table("checkpoint", "clips", "size", "ranks", "saved", "code", "best known")
    for path in _listed(run):
        try:
            saved = checkpoint.opened(path, checked=True)
        except CheckpointError as error:
            table.add_row(path.name, "", "", "", "", "", str(error).partition(": ")[2])
            continue
        meta = saved.meta
        size = sum(file.stat().st_size for file in path.iterdir())
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / checkpoint.MANIFEST).stat().st_mtime))
        ranks = math.prod(meta.get("layout", {"shard": 1}).values())
        metrics = meta.get("metrics", {})
        told = next((f"{name} {metrics[name]:.4g}" for name in ("val/loss", "train/loss") if name in metrics), "")
        table.add_row(path.name, f"{meta['clips']:,}", _size(size), str(ranks), when, str(meta.get("code", "")), told)
    Console(width=max(Console().width, 100)).print(table)


def verify(run: str) -> None:
    """Reads every checkpoint of a run and compares it with its checksums; CheckpointError where one is damaged."""
    bad = []
    for path in _listed(run):
        problem = checkpoint.verify(path)
        if problem is None:
            try:
                checkpoint.opened(path, checked=True)
            except CheckpointError as error:
                problem = str(error).partition(": ")[2]
        print(f"{path.name}  {'whole' if problem is None else f'DAMAGED: {problem}'}", flush=True)
        bad += [path.name] if problem else []
    if bad:
        raise CheckpointError(f"{len(bad)} of {len(_listed(run))} checkpoints of {run} are damaged: {', '.join(bad)}")


def export(
    run: str, out: str, step: int | None = None, weights: Sequence[str] | str = ("ema", "network"), layout: str | None = None
) -> None:
    """Writes a run's weights, config and model card to a folder that `dit_video.load`, `run=` and `init_from=` take as they take a run's.

    Every set of weights is a variant: model.safetensors holds the trained ones, model.ema.safetensors their average. With a layout the
    first of them is written as its transformer was published, by itself: for diffusers, or as the original.
    """
    folder, weights = Path(out), [weights] if isinstance(weights, str) else weights
    if not out or folder.is_file():
        raise ValueError(f"out must be a folder, got {out!r}; set out to another")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; set out to another folder")
    if not weights:
        raise ValueError("weights names no set of weights; set it to some of ema and network")
    saved = checkpoint.opened(_chosen(run, step))
    if "config" not in saved.meta:
        raise CheckpointError(f"{saved.path} does not say its config; it is older than that, so train some more clips first")
    if layout is not None:
        transformer = make_network(OmegaConf.create(saved.meta["config"])).transformer
        if not isinstance(transformer, WanTransformer | WanExperts):
            raise ValueError(f"{run} trained a {type(transformer).__name__}, which has no published layout; set layout=null")
        own = _OfTransformer(saved, weights[0])
        if adapters_of(transformer):
            if layout != "diffusers":
                raise ValueError(f"adapters have no layout of their own in {layout}; set layout=diffusers")
            print(f"{save_adapters(transformer, folder, own)}: the {weights[0]} adapters, for diffusers' load_lora_weights")
            return
        published.export(transformer, folder, layout, own)  # type: ignore[arg-type]
        print(f"{folder}: the transformer's {weights[0]} weights in the layout of {layout}")
        return
    tensors = {name: saved.tensors(name) for name in weights}
    sizes = {name: sum(value.numel() for value in values.values()) for name, values in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in tensors.items():
        save_file(values, folder / export_file(name), {"format": "pt"})
        print(f"{folder / export_file(name)}: {sizes[name]:,} numbers in {len(values)} tensors")
    write_text(folder / "README.md", model_card(Path(run), saved.meta, sizes, folder))
    told = ("steps", "clips", "base", "encoders", "ema_decays", "code", "data", "torch", "metrics")
    about: dict[str, Any] = {name: saved.meta[name] for name in told if name in saved.meta}
    write_json(folder / "config.json", {"run": Path(run).name, **about, "config": saved.meta["config"]})


class _OfTransformer(Mapping[str, Tensor]):
    """A transformer's weights by their names in it, read when they are asked for."""

    def __init__(self, saved: Saved, group: str) -> None:
        self.saved, self.group = saved, group
        self.names = [name for name in saved.shapes(group) if name.startswith("transformer.")]

    def __getitem__(self, name: str) -> Tensor:
        return self.saved.read(self.group, f"transformer.{name}")

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix("transformer.") for name in self.names)

    def __len__(self) -> int:
        return len(self.names)


def diff(a: str, b: str) -> None:
    """Prints in what two checkpoints differ: what they say of themselves, and their tensors."""
    one, other = (checkpoint.opened(path) if path.name.startswith("step-") else saved_in(path) for path in (Path(a), Path(b)))
    print(f"a  {one.path}\nb  {other.path}")
    beside = ("wall_seconds", "core_seconds")
    for key, left, right in _differences(one.meta, other.meta):
        if key not in beside:
            print(f"{key}: {left} in a, {right} in b")
    same, alone = True, False
    for group in sorted({*one.groups, *other.groups}):
        if group not in one.groups or group not in other.groups:
            print(f"{group}: only in {'a' if group in one.groups else 'b'}")
            alone = True
            continue
        same &= _compare(group, one, other)
    both = " that both have" if alone else ""
    print(f"all tensors{both} are equal to the bit" if same else "tensors differ")


def _compare(group: str, one: Saved, other: Saved) -> bool:
    """Prints how a group differs; says whether it is equal."""
    shapes = one.shapes(group), other.shapes(group)
    alone = [f"{name} only in {'a' if name in shapes[0] else 'b'}" for name in sorted(shapes[0].keys() ^ shapes[1].keys())]
    shared = sorted(shapes[0].keys() & shapes[1].keys())
    alone += [
        f"{name} is {shapes[0][name]} in a, {shapes[1][name]} in b" for name in shared if shapes[0][name] != shapes[1][name]
    ]
    far: dict[str, float] = {}
    for name in shared:
        if shapes[0][name] == shapes[1][name]:
            left, right = one.read(group, name), other.read(group, name)
            if left.dtype != right.dtype or not torch.equal(left, right):
                far[name] = float((left.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-30))
    print(f"{group}: {len(shared) - len(far)} of {len(shapes[0].keys() | shapes[1].keys())} tensors are equal")
    for told in alone[:TOLD]:
        print(f"  {told}")
    for name in sorted(far, key=lambda name: -far[name])[:TOLD]:
        print(f"  {name} differs by {far[name]:.2g} of its largest value")
    if (more := len(alone) - TOLD) > 0 or len(far) > TOLD:
        print(f"  and {max(more, 0) + max(len(far) - TOLD, 0)} more")
    return not alone and not far


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
    elif a != b:
        yield key, a, b


def _listed(run: str) -> list[Path]:
    found = checkpoint.listed(Path(run) / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint; set run to a run's folder, such as runs/demo")
    return found


def _chosen(run: str, step: int | None) -> Path:
    """The newest whole checkpoint of a run, or the one after so many steps."""
    paths = _listed(run)
    if step is None:
        found = checkpoint.newest(Path(run) / "checkpoints")
        assert found is not None
        return found
    path = checkpoint.path_of(Path(run) / "checkpoints", step)
    if path not in paths:
        raise CheckpointError(f"{run} has no checkpoint of step {step}, only {', '.join(path.name for path in paths)}; set step")
    return path


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
