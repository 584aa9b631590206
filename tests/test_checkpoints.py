"""dit-video checkpoint: listed, verified, exported, loaded back and compared, on a trained run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import dit_video, tensors, train

import dit_video as package
from dit_video.card import config_hash
from dit_video.trainer import checkpoint


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert dit_video("checkpoint", *words) == code
    found = capsys.readouterr()
    return found.err if code else found.out


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_what_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "ls", f"run={run}").splitlines()
    assert sum("step-000000" in line for line in lines) == 2
    assert "val/loss" in lines[-1] or "val/loss" in lines[-2]
    (run / "checkpoints" / "step-00000010" / "network.safetensors").write_bytes(b"no tensors")
    assert "cannot be used" not in (again := told(capsys, "ls", f"run={run}")) and "step-00000010" in again
    assert "holds no checkpoint" in told(capsys, "ls", "run=nowhere", code=1)


def test_damage_is_found_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "verify", f"run={run}").count("whole") == 2
    path = run / "checkpoints" / "step-00000020" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "1 of 2 checkpoints" in told(capsys, "verify", f"run={run}", code=1)
    assert dit_video("checkpoint", "verify", f"run={run}") == 1
    assert "step-00000020  DAMAGED: ema.safetensors does not match its checksum" in capsys.readouterr().out


def test_an_export_is_loaded_as_the_run_is(
    run: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    told(capsys, "export", f"run={run}", f"out={out}")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.ema.safetensors",
        "model.safetensors",
    ]
    about = json.loads((out / "config.json").read_text())
    assert (about["steps"], about["clips"], about["ema_decays"]) == (20, 160, [0.9]) and about["config"]["model"]["width"] == 32
    card = (out / "README.md").read_text()
    assert f'dit_video.load("{out}")' in card and "160 and 20" in card and config_hash(about["config"]) in card
    assert json.loads((run / "data.json").read_text())["fingerprint"] in card and "Not evaluated yet" in card
    saved = tensors(run)
    for name, group in (("model", "network"), ("model.ema", "ema")):
        values = load_file(out / f"{name}.safetensors")
        assert {f"{group}/{key}" for key in values} == {key for key in saved if key.startswith(f"{group}/")}
        assert all(torch.equal(value, saved[f"{group}/{key}"]) for key, value in values.items())

    assert "all tensors that both have are equal to the bit" in told(capsys, "diff", f"a={run}", f"b={out}")
    clips = [package.load(where).sample("a small red circle moves left", seed=1) for where in (run, out)]
    assert np.array_equal(*clips)
    other = package.load(out, weights="network").sample("a small red circle moves left", seed=1)
    assert not np.array_equal(clips[0], other)
    with pytest.raises(ValueError, match="has no ema-0.5, only ema, network"):
        package.load(out, weights="ema-0.5")

    assert train(world_shards, tmp_path, "further", "max_clips=8", f"init_from={out}", "optimisers.warmup_clips=0") == 0
    assert "is not empty; set out" in told(capsys, "export", f"run={run}", f"out={out}", code=1)
    assert "no checkpoint of step 3, only step-00000010, step-00000020" in told(
        capsys, "export", f"run={run}", f"out={tmp_path}/x", "step=3", code=1
    )
    assert not (tmp_path / "x").exists()
    file, empty = f"out={out}/README.md", (f"out={tmp_path}/x", "weights=[]")
    for words, message in (
        (empty, "weights names no set"),
        (("out=",), "out must be a folder, got ''"),
        ((file,), "out must be a"),
    ):
        assert message in told(capsys, "export", f"run={run}", *words, code=1)
    told(capsys, "export", f"run={run}", f"out={tmp_path}/bare", "weights=network")
    lines = (tmp_path / "bare" / "README.md").read_text().splitlines()
    code = "\n".join(lines[lines.index("```python") + 1 : lines.index("```")])
    assert 'weights="network"' in code
    exec(code.replace("seed=7", "seed=7, num_frames=1"), {})  # a card's own lines work


def test_the_config_of_an_export_is_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    told(capsys, "export", f"run={run}", f"out={out}", "step=10", "weights=[ema]")
    about = json.loads((out / "config.json").read_text())
    about["config"]["sampler"]["solver"] = {"_target_": "os.system", "command": f"touch {tmp_path}/canary"}
    (out / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="os.system"):
        package.load(out)
    assert not (tmp_path / "canary").exists()
    (out / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no mapping of names; set run"):
        package.load(out)


def test_what_differs_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [run / "checkpoints" / f"step-000000{number}" for number in (10, 20)]
    same = told(capsys, "diff", f"a={steps[1]}", f"b={run}")
    assert "all tensors are equal to the bit" in same and "steps" not in same
    lines = told(capsys, "diff", f"a={steps[0]}", f"b={steps[1]}").splitlines()
    assert "steps: 10 in a, 20 in b" in lines and "tensors differ" in lines
    assert any("differs by" in line and "transformer" in line for line in lines)

    saved = checkpoint.load(steps[1])
    saved.meta["config"]["seed"] = 7
    del saved.tensors["optimiser-muon"]
    name, value = next(iter(saved.tensors["network"].items()))
    saved.tensors["network"][name] = value[:1].clone()
    changed = checkpoint.save(tmp_path / "other" / "checkpoints", saved)
    text = told(capsys, "diff", f"a={steps[1]}", f"b={changed}")
    assert "config.seed: 0 in a, 7 in b" in text and "optimiser-muon: only in a" in text
    assert f"{name} is {tuple(value.shape)} in a, {(1, *value.shape[1:])} in b" in text
