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
from dit_video.trainer.checkpoint import Checkpoint, CheckpointError, Keep, Saved, listed, load, newest, opened, save, verify
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


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_at_least_two_are_kept(tmp_path: Path, keep: int) -> None:
    for steps in range(1, 6):
        save(tmp_path, make(steps), Keep(keep))
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
    sums["ema.safetensors"] = checkpoint._sum(path / "ema.safetensors")
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))  # by someone who can count
    for names in (["ema"], None):
        with pytest.raises(CheckpointError, match="step-00000030 cannot be used"):
            load(path, names)
    assert not canary.exists()
    with pytest.raises(CheckpointError, match="has no objective, only ema, network"):
        load(folder / "step-00000020", ["objective"])  # a group that it does not have


def saved_of(folder: Path, steps: int = 1, **tensors: dict[str, torch.Tensor]) -> Saved:
    """A checkpoint of these groups, open."""
    return opened(save(folder, Checkpoint(tensors, {"steps": steps, "clips": steps})))


def test_weights_of_another_model_are_refused_by_name_before_anything_changes(
    make_network: Callable[..., Any], tmp_path: Path
) -> None:
    network, other = make_network(), make_network(width=48, seed=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another model .*model \(.*\), checkpoint \(.*\).*set model"):
        checkpoint.load_weights(network, saved_of(tmp_path, 1, ema=other.state_dict()), "ema")
    fewer = {name: value + 1 for name, value in list(network.state_dict().items())[:-1]}
    with pytest.raises(CheckpointError, match="checkpoint has none"):
        checkpoint.load_weights(network, saved_of(tmp_path, 2, ema=fewer), "ema")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_optimisers_come_back_to_the_bit(make_network: Callable[..., Any], tmp_path: Path) -> None:
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
    states = {name: checkpoint.optimiser_state(optimiser, names(stopped)) for name, optimiser in first.items()}
    saved = saved_of(tmp_path, **states)
    for name, optimiser in second.items():
        assert states[name] and all(isinstance(value, torch.Tensor) for value in states[name].values())
        checkpoint.restore_optimiser(optimiser, names(resumed), saved, name)
    run(resumed, list(second.values()), range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    elsewhere = saved_of(tmp_path, 2, muon={"elsewhere.weight/momentum": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="knows elsewhere.weight, the model does not"):
        checkpoint.restore_optimiser(second["muon"], names(resumed), elsewhere, "muon")


def test_warm_start_takes_what_fits_and_lists_the_rest(make_network: Callable[..., Any], tmp_path: Path) -> None:
    source = make_network(seed=1).state_dict()
    twin = make_network()
    saved = saved_of(tmp_path, 1, ema=source)
    found = checkpoint.fitting(twin, saved, "ema")
    checkpoint.warm_start(twin, saved, "ema")
    assert found == {"kept": sorted(source), "new": [], "dropped": []}
    assert all(torch.equal(value, source[name]) for name, value in twin.state_dict().items())

    other = make_network(patch=(2, 8, 8), depth=3)
    own = {name: value.clone() for name, value in other.state_dict().items()}
    saved = saved_of(tmp_path, 2, ema={**source, "unknown": torch.zeros(1)})
    found = checkpoint.fitting(other, saved, "ema")
    checkpoint.warm_start(other, saved, "ema")
    assert sorted([*found["kept"], *found["new"]]) == sorted(own)
    patched = {f"transformer.ends.video.{name}" for name in ("patch.weight", "head.weight", "head.bias")}
    assert set(found["dropped"]) == {"unknown", *patched}
    assert {name for name in found["new"] if "blocks.2" not in name} == patched
    for name, value in other.state_dict().items():
        assert torch.equal(value, source[name] if name in found["kept"] else own[name])


# ------------------------------------------------------------------ written by several, read by any


def in_parts(folder: Path, steps: int, whole: dict[str, torch.Tensor], ranks: int) -> Path:
    """The checkpoint that so many ranks write of tensors that are cut by rows, as evenly as FSDP cuts them."""
    final = checkpoint.path_of(folder, steps)
    for rank in range(ranks):
        parts = {}
        for name, value in whole.items():
            if value.ndim == 0:
                parts |= {name: checkpoint.Part(value)} if rank == 0 else {}
                continue
            size = -(-len(value) // ranks)
            rows = value[rank * size : (rank + 1) * size]
            parts |= {name: checkpoint.Part(rows, rank * size, len(value))} if len(rows) else {}
        assert checkpoint.sums_of(checkpoint.draft_of(final), ranks) is None
        checkpoint.write_groups(checkpoint.draft_of(final), {"network": parts}, rank)
    checkpoint.commit(checkpoint.draft_of(final), final, ranks, {"steps": steps, "clips": steps})
    return final


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_rows_are_read_whoever_wrote_them(tmp_path: Path, ranks: int) -> None:
    whole = make(5).tensors["network"] | {"one row": torch.ones(1, 4), "turned": torch.randn(6, 4).mT.to(torch.bfloat16)}
    saved = opened(in_parts(tmp_path, 5, whole, ranks))
    assert saved.shapes("network") == {name: tuple(value.shape) for name, value in whole.items()}
    for name, value in whole.items():
        assert torch.equal(saved.read("network", name), value) and saved.read("network", name).dtype == value.dtype
        for start in range(len(value) + 1 if value.ndim else 0):
            for stop in range(start, len(value) + 1, 3):
                assert torch.equal(saved.read("network", name, slice(start, stop)), value[start:stop])


def test_rows_that_are_missing_or_there_twice_are_refused_however_well_they_are_summed(tmp_path: Path) -> None:
    whole = {"a": torch.randn(6, 2)}
    path = in_parts(tmp_path, 1, whole, 3)

    def summed() -> None:
        sums = {file.name: checkpoint._sum(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
        (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
        assert verify(path) is None

    second = (path / "network.rank0001.safetensors").read_bytes()
    (path / "network.rank0001.safetensors").write_bytes((path / "network.rank0000.safetensors").read_bytes())
    summed()
    with pytest.raises(CheckpointError, match="rows of network/a are missing or there twice"):
        opened(path)
    (path / "network.rank0001.safetensors").unlink()
    summed()
    with pytest.raises(CheckpointError, match="rows of network/a are missing or there twice"):
        opened(path)
    (path / "network.rank0001.safetensors").write_bytes(second)
    (path / "network.rank0002.safetensors").unlink()  # the last, whose rows only the others' headers know of
    summed()
    with pytest.raises(CheckpointError, match="rows of network/a are missing or there twice"):
        opened(path)


@pytest.mark.parametrize(
    "meta", ["[]", "{}", '{"steps": 3}', '{"steps": "x", "clips": 1}', '{"steps": -1, "clips": 1}', "nothing"]
)
def test_a_meta_that_says_nothing_is_refused(folder: Path, meta: str) -> None:
    path = folder / "step-00000030"
    (path / "meta.json").write_text(meta)
    sums = json.loads((path / checkpoint.MANIFEST).read_text())
    sums["meta.json"] = checkpoint._sum(path / "meta.json")
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="step-00000030 cannot be used"):
        opened(path)


# ------------------------------------------------------------------ keeping


def test_what_is_kept(tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.2, 3: 0.5, 4: 0.4, 5: 0.3, 6: float("nan"), 7: 0.8}
    for steps, loss in losses.items():
        saved = make(steps)
        saved.meta["metrics"] = {"val/loss": loss} if loss == loss else {}
        save(tmp_path, saved, Keep(2, every=24, best="val/loss"))  # a step is 8 clips
    assert [int(path.name[-2:]) for path in listed(tmp_path)] == [2, 3, 6, 7]
    for number in (3, 6, 7):
        flipped(tmp_path / f"step-{number:08d}")
    save(tmp_path, make(8), Keep(2))  # damaged ones are no reason to remove a good one
    assert [int(path.name[-2:]) for path in listed(tmp_path) if verify(path) is None] == [2, 8]


def test_what_was_cut_off_leaves_nothing_that_looks_like_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in ("a file written", "files written", "no manifest yet", "not renamed yet", "renamed", "one removed"):

        def stop(reached: str, point: str = point) -> None:
            if reached == point:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "reached", stop)
        with pytest.raises(KeyboardInterrupt):
            save(folder, make(40))
        assert newest(folder) in (folder / "step-00000030", folder / "step-00000040")
        assert all(verify(path) is None for path in listed(folder)) and len(listed(folder)) >= 2
        checkpoint.clear_drafts(folder)
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder / "step-00000040", ignore_errors=True)
        monkeypatch.setattr(checkpoint, "reached", lambda point: None)
        save(folder, make(20)), save(folder, make(30))


def test_a_disk_without_room_is_found_out_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 900, 900))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"takes 0.00 GB, and .* has 0.00 GB free; earlier checkpoints are untouched"):
        save(folder, make(40))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
