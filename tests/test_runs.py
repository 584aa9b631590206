"""A trained run from Python and from `dit-video evaluate`, and runs that strangers made."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from small_run import dit_video, files_of

import dit_video as package
from dit_video.runs import Run, read_config
from dit_video.trainer import checkpoint
from dit_video.trainer.checkpoint import CheckpointError

FEW = """\
defaults:
  - world_small
suites:
  seen: {count: 4}
  held_out: {count: 4}
"""


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "copy")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A config folder of the user's own, with an evaluation of eight clips."""
    (tmp_path / "conf" / "eval").mkdir(parents=True)
    (tmp_path / "conf" / "eval" / "few.yaml").write_text(FEW)
    return tmp_path / "conf"


def test_three_lines_of_python(run_copy: Path, few: Path) -> None:
    run = package.load(run_copy)
    video = run.sample("a small red circle moves left", seed=7)
    assert video.shape == (9, 32, 32, 3) and video.dtype == np.uint8
    assert np.array_equal(video, run.sample("a small red circle moves left", seed=7))
    assert not np.array_equal(video, run.sample("a small red circle moves left", seed=8))
    protocol = OmegaConf.create({"eval": OmegaConf.merge(read_config(run_copy).eval, {"suites": {"seen": {"count": 3}}})}).eval
    found = run.evaluate(protocol)
    assert found.metrics["adherence.seen.all"].count == 3
    assert {"evaluation.json", "evaluation", "report.html"} <= {path.name for path in run_copy.iterdir()}


def test_rounded_matrices_make_the_same_clips_in_half_the_memory(trained_run: Path) -> None:
    wide, rounded = Run(trained_run), Run(trained_run, dtype="bfloat16")
    wide.sampler = replace(wide.sampler, precision="bfloat16")
    assert np.array_equal(*(run.sample("a small red circle moves left", seed=7) for run in (wide, rounded)))
    held = [sum(p.nbytes for p in run.trained.network.transformer.blocks.parameters()) for run in (wide, rounded)]
    assert held[1] < 0.55 * held[0]
    with pytest.raises(ValueError, match="set precision=bfloat16 or dtype=float32"):
        rounded.sample("snow", sampler=replace(wide.sampler, precision="float32"))
    with pytest.raises(ValueError, match="dtype must be"):
        Run(trained_run, dtype="float16")  # type: ignore[arg-type]


def test_the_averaged_weights_are_the_ones_that_are_sampled(trained_run: Path) -> None:
    weights = Run(trained_run).trained.network.state_dict()
    newest = max((trained_run / "checkpoints").glob("step-*"))
    ema, last = load_file(newest / "ema.safetensors"), load_file(newest / "network.safetensors")
    assert all(torch.equal(weights[name], ema[name]) for name in ema) and weights.keys() == ema.keys()
    assert any(not torch.equal(weights[name], last[name]) for name in last)


def test_evaluate_writes_numbers_with_their_protocol(run_copy: Path, few: Path) -> None:
    assert dit_video("evaluate", f"run={run_copy}", "eval=few", "steps=1", "--config-dir", few) == 0
    found = json.loads((run_copy / "evaluation.json").read_text())
    for name in ("adherence.seen.all", "adherence.held_out.all", "adherence.seen.colour"):
        assert found["metrics"][name]["count"] == 4
        assert 0 <= found["metrics"][name]["low"] <= found["metrics"][name]["value"] <= found["metrics"][name]["high"] <= 1
    assert "1 steps" in found["protocol"]["sampler"] and "multistep" in found["protocol"]["sampler"]
    assert "4 prompts" in found["protocol"]["suite.seen"] and "metric.adherence" in found["protocol"]
    clips = [json.loads(line) for line in (run_copy / "evaluation" / "index.jsonl").read_text().splitlines()]
    assert len(clips) == 8 and all((run_copy / "evaluation" / clip["file"]).is_file() for clip in clips)
    assert all(set(clip["verdict"]) == {"right", "reason"} and clip["suite"] in ("seen", "held_out") for clip in clips)
    assert "adherence" in (run_copy / "report.html").read_text()

    before = (run_copy / "evaluation.json").read_bytes()
    assert dit_video("evaluate", f"run={run_copy}", "eval=few", "steps=1", "--config-dir", few) == 0
    assert (run_copy / "evaluation.json").read_bytes() == before


def test_sampling_does_not_need_the_training_data_nor_change_the_run(trained_run: Path, tmp_path: Path) -> None:
    before = files_of(trained_run)
    assert dit_video("sample", f"run={trained_run}", f"out={tmp_path}/out", "prompt=a circle", "steps=1") == 0
    assert files_of(trained_run) == before


def test_a_damaged_newest_checkpoint_is_passed_over(run_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_copy / "checkpoints" / "step-00000020" / "meta.json").unlink()
    before = load_file(run_copy / "checkpoints" / "step-00000010" / "ema.safetensors")
    weights = Run(run_copy).trained.network.state_dict()
    assert "PASSED OVER" in caplog.text
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_weights_of_another_model_are_refused(run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(run_copy / "config.yaml")
    config.model.width = 48
    OmegaConf.save(config, run_copy / "config.yaml")
    with pytest.raises(CheckpointError, match="of another model"):
        Run(run_copy)
    assert dit_video("sample", f"run={run_copy}", f"out={tmp_path}/out", "prompt=a circle") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformer." in line and "(48" in line and "(32" in line and "set model" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["model", "sampler.solver", "objective.tasks.extend", "eval.metrics.adherence"])
@pytest.mark.parametrize("target", ["os.system", "dit_video.cli.os.system", "subprocess.run"])
def test_a_stored_config_calls_nothing_of_others(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, target: str
) -> None:
    config = OmegaConf.load(run_copy / "config.yaml")
    OmegaConf.update(config, f"{key}._target_", target)
    OmegaConf.update(config, f"{key}.command", f"touch {tmp_path}/canary", force_add=True)
    OmegaConf.save(config, run_copy / "config.yaml")
    for program in (["sample", "prompt=a circle"], ["evaluate"]):
        assert dit_video(*program, f"run={run_copy}") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{key}._target_" in line and target in line
    assert not (tmp_path / "canary").exists()


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


def test_a_pickle_among_the_weights_is_refused_in_one_line(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run_copy / "checkpoints").iterdir():
        torch.save({"a": Bomb(tmp_path / "canary")}, path / "ema.safetensors")
        sums = {file.name: checkpoint._sha256(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
        (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
    assert dit_video("sample", f"run={run_copy}", f"out={tmp_path}/out", "prompt=a circle") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be used" in line
    assert not (tmp_path / "canary").exists()
    assert pickle.dumps(Bomb(tmp_path / "canary"))  # a bomb it was


def test_tensors_that_are_no_numbers_are_no_weights(run_copy: Path) -> None:
    path = run_copy / "checkpoints" / "step-00000020"
    weights = load_file(path / "ema.safetensors")
    save_file({f"{name}.more": value for name, value in weights.items()}, path / "ema.safetensors")
    sums = {file.name: checkpoint._sha256(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="has none"):
        Run(run_copy)


@pytest.mark.parametrize("content", ["- a\n- list\n", "a: [1", "\x00\x01", "plain text", ""])
def test_a_config_that_is_none_is_told_in_one_line(run_copy: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (run_copy / "config.yaml").write_text(content)
    assert dit_video("sample", f"run={run_copy}", "prompt=a circle") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config" in line and "set run" in line
