"""Checkpoints under every damage that a disk, a crash or a stranger can do to them."""

import json
import logging
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_video.trainer import checkpoint
from dit_video.trainer.checkpoint import Checkpoint, CheckpointError, listed, load, newest, save, verify
from dit_video.trainer.optim import Optimisers


def make(steps: int, size: int = 100) -> Checkpoint:
    values = torch.Generator().manual_seed(steps)
    network = {
        "a.weight": torch.randn(size, 3, generator=values),
        "b": torch.arange(steps, steps + 5),
        "scalar": torch.tensor(2.5),
    }
    ema = {
        "a.weight": torch.randn(size, 3, generator=values).to(torch.bfloat16),
        "turned": torch.randn(4, 6, generator=values).mT,
    }
    return Checkpoint({"network": network, "ema": ema}, {"steps": steps, "clips": 8 * steps, "told": 'a "text", ünï'})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three saves of which two are kept: steps 20 and 30."""
    for steps in (10, 20, 30):
        save(tmp_path / "checkpoints", make(steps))
    return tmp_path / "checkpoints"


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.meta == wanted.meta and found.tensors.keys() == wanted.tensors.keys()
    for group, tensors in wanted.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert found.tensors[group][name].dtype == value.dtype and torch.equal(found.tensors[group][name], value)


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert [path.name for path in listed(folder)] == ["step-00000020", "step-00000030"]
    for steps in (20, 30):
        assert_same(load(folder / f"step-{steps:08d}"), make(steps))
    assert list(load(folder / "step-00000030", ["ema"]).tensors) == ["ema"]
    assert newest(folder) == folder / "step-00000030"
    assert not list(folder.glob(".*"))  # no drafts


def test_nothing_saved_is_no_error_but_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") is None
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(tmp_path / "step-00000010")


def test_saving_the_same_step_again_keeps_what_is_there(folder: Path) -> None:
    before = (folder / "step-00000030" / checkpoint.MANIFEST).stat().st_mtime_ns
    save(folder, make(30))
    assert (folder / "step-00000030" / checkpoint.MANIFEST).stat().st_mtime_ns == before


def truncated(path: Path) -> None:
    file = path / "network.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flipped(path: Path) -> None:
    file = path / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def meta_changed(path: Path) -> None:
    (path / "meta.json").write_text((path / "meta.json").read_text().replace('"clips": ', '"clips": 1'))


def file_gone(path: Path) -> None:
    (path / "network.safetensors").unlink()


def file_more(path: Path) -> None:
    (path / "optimiser.safetensors").write_bytes((path / "ema.safetensors").read_bytes())


def manifest_gone(path: Path) -> None:
    (path / checkpoint.MANIFEST).unlink()


def manifest_cut(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_bytes((path / checkpoint.MANIFEST).read_bytes()[:-20])


def manifest_of_another_kind(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text("[1, 2]")


def hybrid(path: Path) -> None:
    shutil.copy(path.with_name("step-00000020") / "network.safetensors", path / "network.safetensors")


def emptied(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGES = [
    truncated, flipped, meta_changed, file_gone, file_more, manifest_gone, manifest_cut, manifest_of_another_kind, hybrid, emptied,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "step-00000030")
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == folder / "step-00000020"
    assert "step-00000030" in caplog.text and "PASSED OVER" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000030 cannot be used"):
        load(folder / "step-00000030")

    if damage is not hybrid:  # there is no third save to mix with
        damage(folder / "step-00000020")
        with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
            newest(folder)


def test_a_damaged_checkpoint_is_saved_anew_and_counts_for_nothing(folder: Path) -> None:
    flipped(folder / "step-00000030")
    assert newest(folder) == folder / "step-00000020"  # where the run goes on from
    save(folder, make(25))
    assert [path.name for path in listed(folder) if verify(path) is None] == ["step-00000020", "step-00000025"]
    save(folder, make(30))
    assert verify(folder / "step-00000030") is None
    assert_same(load(folder / "step-00000030"), make(30))
    for steps in (40, 50):
        save(folder, make(steps))
    assert [path.name for path in listed(folder)] == ["step-00000040", "step-00000050"]


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_at_least_two_are_kept(tmp_path: Path, keep: int) -> None:
    for steps in range(1, 6):
        save(tmp_path, make(steps), keep)
    assert len(listed(tmp_path)) == max(keep, 2)
    assert newest(tmp_path) == tmp_path / "step-00000005"


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """A disk on which no file grows beyond so many bytes; what is written further fails, as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 5_000, 100_000])
def test_a_full_disk_leaves_what_was_there_and_no_draft(folder: Path, room: int) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with disk_of(room), pytest.raises(OSError, match="could not save .*step-00000040.*earlier checkpoints are untouched"):
        save(folder, make(40, size=10_000))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
    save(folder, make(40, size=10_000))
    assert newest(folder) == folder / "step-00000040"


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def test_a_pickle_under_a_safe_name_is_refused_and_not_executed(folder: Path, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", folder / "step-00000030"
    (path / "ema.safetensors").write_bytes(pickle.dumps({"a.weight": Bomb(canary)}))
    sums = json.loads((path / checkpoint.MANIFEST).read_text())
    sums["ema.safetensors"] = checkpoint._sha256(path / "ema.safetensors")
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))  # by someone who can count
    for names in (["ema"], None):
        with pytest.raises(CheckpointError, match="step-00000030 cannot be used"):
            load(path, names)
    assert not canary.exists()
    with pytest.raises(CheckpointError, match="cannot be used"):
        load(folder / "step-00000020", ["objective"])  # a group that it does not have


def test_weights_of_another_model_are_refused_by_name_before_anything_changes(make_network: Callable[..., Any]) -> None:
    network, other = make_network(), make_network(width=48, seed=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another model .*model \(.*\), checkpoint \(.*\).*set model"):
        checkpoint.load_weights(network, other.state_dict(), Path("somewhere"))
    fewer = {name: value + 1 for name, value in list(network.state_dict().items())[:-1]}
    with pytest.raises(CheckpointError, match="checkpoint has none"):
        checkpoint.load_weights(network, fewer, Path("somewhere"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_optimisers_come_back_to_the_bit(make_network: Callable[..., Any]) -> None:
    def run(network: Any, optimisers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            for number, parameter in enumerate(network.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * step + number))
            for optimiser in optimisers:
                optimiser.step()

    def names(network: Any) -> dict[Any, str]:
        return {parameter: name for name, parameter in network.named_parameters()}

    straight, stopped, resumed = make_network(), make_network(), make_network()
    built = Optimisers().build(straight)
    run(straight, list(built.values()), range(6))
    first = Optimisers().build(stopped)
    run(stopped, list(first.values()), range(3))
    resumed.load_state_dict(stopped.state_dict())
    second = Optimisers().build(resumed)
    for name, optimiser in first.items():
        state = checkpoint.optimiser_state(optimiser, names(stopped))
        assert state and all(isinstance(value, torch.Tensor) for value in state.values())
        checkpoint.restore_optimiser(second[name], names(resumed), state)
    run(resumed, list(second.values()), range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="knows elsewhere.weight, the model does not"):
        checkpoint.restore_optimiser(second["muon"], names(resumed), {"elsewhere.weight/momentum": torch.zeros(1)})


def test_warm_start_takes_what_fits_and_lists_the_rest(make_network: Callable[..., Any]) -> None:
    source = make_network(seed=1).state_dict()
    twin = make_network()
    found = checkpoint.warm_start(twin, source)
    assert found == {"kept": sorted(source), "new": [], "dropped": []}
    assert all(torch.equal(value, source[name]) for name, value in twin.state_dict().items())

    other = make_network(patch=(2, 8, 8), depth=3)
    own = {name: value.clone() for name, value in other.state_dict().items()}
    found = checkpoint.warm_start(other, {**source, "unknown": torch.zeros(1)})
    assert sorted([*found["kept"], *found["new"]]) == sorted(own)
    patched = {f"transformer.ends.video.{name}" for name in ("patch.weight", "head.weight", "head.bias")}
    assert set(found["dropped"]) == {"unknown", *patched}
    assert {name for name in found["new"] if "blocks.2" not in name} == patched
    for name, value in other.state_dict().items():
        assert torch.equal(value, source[name] if name in found["kept"] else own[name])
