"""The training program: a small run of the world from the command line, cut off, spoiled, repeated and continued."""

import io
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from small_run import QUIET, SMALL, dit_video, files_of, records, same, tensors, train

from dit_video.build import make_objective
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import write_shard
from dit_video.data.video_file import encode_mp4, read_video
from dit_video.runs import Run
from dit_video.shapes import Batch
from dit_video.trainer import checkpoint

LENGTH = ("max_clips=96", "every.save=24", "every.record=24")  # twelve steps, and a checkpoint and a record at every third


@pytest.fixture(scope="module")
def straight(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    runs = tmp_path_factory.mktemp("straight")
    assert train(world_shards, runs, "run", *LENGTH) == 0
    return runs / "run"


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Lets the shards give so many batches and then raise."""
    batches = ClipLoader.batches

    def some(self: ClipLoader, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self, *args, **kwargs)):
            if number == after:
                raise error
            yield batch

    monkeypatch.setattr(ClipLoader, "batches", some)


def recorded(run: Path) -> list[dict[str, Any]]:
    """What does not depend on the time of day."""
    return [{key: value for key, value in line.items() if key != "time"} for line in records(run)]


@pytest.mark.parametrize(("error", "code"), [(ValueError("the shards are gone"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    straight: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException, code: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        cut_off(patch, 8, error)
        assert train(world_shards, tmp_path, "run", *LENGTH) == code
    run = tmp_path / "run"
    assert [path.name for path in checkpoint.listed(run / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert not (run / "summary.json").exists()
    capsys.readouterr()

    assert train(world_shards, tmp_path, "run", *LENGTH) == 0
    assert same(tensors(run), tensors(straight))
    assert recorded(run) == recorded(straight)
    assert [line["step"] for line in records(run)] == [3, 6, 9, 12]
    assert json.loads((run / "summary.json").read_text())["steps"] == 12


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few films and many pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    samples = [
        {"__key__": f"film{i}", "mp4": encode_mp4(rng.integers(0, 256, (9, 32, 32, 3)).astype(np.uint8), 8), "txt": "a film"}
        for i in range(8)
    ]
    for number in range(60):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(out, "PNG")
        samples.append({"__key__": f"photo{number}", "png": out.getvalue(), "txt": "a picture"})
    write_shard(folder / "0.tar", samples)
    return folder


BUCKETS = ("data.buckets=[{num_frames: 9}, {num_frames: 1}]", "max_clips=120", "every.save=20", "every.record=1")


def test_a_run_over_buckets_has_the_length_and_the_end_that_it_was_given(
    mixed_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of different buckets hold different numbers of clips; clips are what is counted, cut off or not."""
    assert train(mixed_shards, tmp_path, "straight", *BUCKETS) == 0
    summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
    rates = [line["train/rate"] for line in records(tmp_path / "straight", "train/rate")]
    largest = max(bucket["clips_per_step"] for bucket in json.loads((tmp_path / "straight" / "data.json").read_text())["buckets"])
    assert 120 <= summary["clips"] < 120 + largest and min(rates) > 0 and summary["steps"] == len(rates)
    with monkeypatch.context() as patch:
        cut_off(patch, len(rates) // 2 + 1, ValueError("the shards are gone"))
        assert train(mixed_shards, tmp_path, "cut", *BUCKETS) == 1
    assert train(mixed_shards, tmp_path, "cut", *BUCKETS) == 0
    assert same(tensors(tmp_path / "cut"), tensors(tmp_path / "straight"))
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["clips"] == summary["clips"]


def test_a_run_does_not_go_on_with_other_data_unasked(
    world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world_shards, tmp_path / "shards")
    with monkeypatch.context() as patch:
        cut_off(patch, 8, ValueError("the shards are gone"))
        assert train(tmp_path / "shards", tmp_path, "run", *LENGTH) == 1
    for path in (tmp_path / "shards").glob("00001*"):
        path.unlink()
    before = files_of(tmp_path / "run")
    capsys.readouterr()
    assert train(tmp_path / "shards", tmp_path, "run", *LENGTH) == 1
    told = capsys.readouterr().err
    assert "64 clips then, 32 now" in told and "accept_changed_data=true" in told
    assert files_of(tmp_path / "run") == before
    assert train(tmp_path / "shards", tmp_path, "run", *LENGTH, "accept_changed_data=true") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    straight: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, 8, ValueError("the shards are gone"))
        assert train(world_shards, tmp_path, "run", *LENGTH) == 1
    spoiled = tmp_path / "run" / "checkpoints" / "step-00000006" / "network.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    assert train(world_shards, tmp_path, "run", *LENGTH) == 0
    assert "CHECKPOINT PASSED OVER" in caplog.text and "going on from" in caplog.text
    assert same(tensors(tmp_path / "run"), tensors(straight))
    assert recorded(tmp_path / "run") == recorded(straight)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    straight: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/ema.safetensors"):
        path.write_bytes(b"")
    before = files_of(tmp_path / "run")
    capsys.readouterr()
    assert train(world_shards, tmp_path, "run", *LENGTH) == 1
    assert "all 2 checkpoints" in capsys.readouterr().err
    assert files_of(tmp_path / "run") == before


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_saved(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    words = [*SMALL, *QUIET, f"runs={tmp_path}", "name=run", f"data.shards={world_shards}/*.tar", *LENGTH]
    process = subprocess.Popen([sys.executable, "-m", "dit_video.cli", "train", *words], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()  # wherever it is by now, even inside the next save
    process.wait()
    assert train(world_shards, tmp_path, "run", *LENGTH) == 0
    assert same(tensors(tmp_path / "run"), tensors(straight))
    assert recorded(tmp_path / "run") == recorded(straight)


def test_a_finished_run_is_left_alone(
    straight: Path, world_shards: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(straight)
    caplog.set_level("INFO")
    assert train(world_shards, straight.parent, straight.name, *LENGTH) == 0
    assert "is already trained on 96 clips; raise max_clips" in caplog.text
    assert train(world_shards, straight.parent, straight.name, "max_clips=50", *LENGTH[1:]) == 0
    assert files_of(straight) == before

    capsys.readouterr()
    assert train(world_shards, straight.parent, straight.name, *LENGTH, "model.width=48", "seed=3") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another config" in line and "model.width: 32 then, 48 now" in line and "seed: 0 then, 3 now" in line
    assert files_of(straight) == before


def test_a_finished_run_is_longer_with_more_clips(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    assert train(world_shards, tmp_path, "run", "max_clips=110", *LENGTH[1:]) == 0
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (told["steps"], told["clips"]) == (14, 112)  # whole batches
    assert [line["step"] for line in records(tmp_path / "run")] == [3, 6, 9, 12, 14]  # the last of them of two steps
    earlier = json.loads((straight / "summary.json").read_text())
    meta = json.loads((straight / "checkpoints" / "step-00000012" / "meta.json").read_text())
    assert told["training_core_seconds"] > meta["core_seconds"] > 0.5 * earlier["training_core_seconds"]


def test_callbacks_leave_training_as_it_is(trained_run: Path, world_shards: Path, tmp_path: Path) -> None:
    assert train(world_shards, tmp_path, "plain", "max_clips=160") == 0
    assert same(tensors(tmp_path / "plain"), tensors(trained_run))


def test_accumulating_and_workers_leave_training_as_it_is(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    assert train(world_shards, tmp_path, "run", *LENGTH, "data.num_workers=2", "data.decoder=pyav") == 0
    assert same(tensors(tmp_path / "run"), tensors(straight))


def test_what_lies_in_a_run_s_folder(trained_run: Path) -> None:
    found = {path.name for path in trained_run.iterdir()}
    assert found == {
        "config.yaml",
        "commits.txt",
        "metrics.jsonl",
        "data.json",
        "checkpoints",
        "samples",
        "summary.json",
        "report.html",
    }
    for clips in (80, 160):
        samples = trained_run / "samples" / f"clips-{clips:09d}"
        assert sorted(path.name for path in samples.iterdir()) == ["000.mp4", "contact_sheet.png"]
        assert read_video(samples / "000.mp4")[0].shape == (9, 32, 32, 3)
    told = json.loads((trained_run / "summary.json").read_text())
    assert {key: told[key] for key in ("name", "clips", "steps", "seed")} == {
        "name": "trained",
        "clips": 160,
        "steps": 20,
        "seed": 0,
    }
    assert told["training_wall_seconds"] > 0 and told["training_core_seconds"] > 0 and told["parameters"] > 10_000
    assert {"commit", "device", "torch", "finished"} <= told.keys()
    report = (trained_run / "report.html").read_text()
    assert "train/loss" in report or "loss" in report.lower()
    config = OmegaConf.load(trained_run / "config.yaml")
    assert config.model.width == 32 and config.data.seed == 0 and "${" not in (trained_run / "config.yaml").read_text()


def test_what_a_run_records(trained_run: Path) -> None:
    train_lines = records(trained_run)
    assert [(line["step"], line["clips"]) for line in train_lines] == [(5, 40), (10, 80), (15, 120), (20, 160)]
    keys = {key for line in train_lines for key in line}
    assert {"train/loss/task/text_to_video", "train/loss/level/0.4-0.6", "train/loss/level/0.8-1.0", "train/rate"} <= keys
    assert len(records(trained_run, "perf/clips_per_second")) == len(records(trained_run, "perf/mfu")) == 4
    assert all(0 < line["perf/mfu"] < 2 and line["perf/tokens_per_second"] > 0 for line in records(trained_run, "perf/mfu"))
    health = records(trained_run, "grad/norm")
    assert [line["clips"] for line in health] == [80, 160]
    for line in health:
        assert line["attention/largest_logit"] > 0
        for group in ("text", "ends.video", "blocks.0", "blocks.1"):
            assert line[f"grad/norm/{group}"] > 0 and 0 < line[f"update/ratio/{group}"] < 1
    held_out = records(trained_run, "val/loss")
    assert [line["clips"] for line in held_out] == [80, 160]
    assert held_out[1]["val/loss"] < held_out[0]["val/loss"]
    levels = [held_out[0][f"val/loss/level/{level}"] for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert sum(levels) / 5 == pytest.approx(held_out[0]["val/loss"])
    (judged,) = records(trained_run, "eval/adherence.seen.all")
    assert judged["clips"] == 160 and 0 <= judged["eval/adherence.held_out.all"] <= 1
    assert all(math.isfinite(v) for line in records(trained_run, "clips") for v in line.values() if isinstance(v, float))


def first_loss(run: Path) -> float:
    return float(records(run)[0]["train/loss"])


def test_a_warm_start_onto_the_same_shape_has_the_source_s_loss(
    trained_run: Path, world_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = ("trainer.precision=32-true", "every.record=8", f"init_from={trained_run}")
    caplog.set_level("INFO")
    assert train(world_shards, tmp_path, "again", "max_clips=8", *exact) == 0
    run = Run(trained_run)
    batch = next(ClipLoader(f"{world_shards}/*.tar", 8, 9, 32, 32, 8, decoder="pyav").batches())
    with torch.no_grad():
        losses = make_objective(run.config)(run.trained.network, batch, run.trained.network.tokens)
    assert first_loss(tmp_path / "again") == pytest.approx(losses.per_clip.mean().item(), rel=1e-5)
    assert "0 new, 0 dropped" in caplog.text


@pytest.mark.parametrize(
    ("change", "new"),
    [
        (["model.patch=[2,4,4]"], "transformer.ends.video.patch.weight"),
        (["data.num_frames=5", "data.height=16", "data.width=24"], None),
        (["text.dim=16"], "text.tables.0"),
        (["model.depth=3"], "transformer.blocks.2.streams.video.qkv.weight"),
    ],
)
def test_a_warm_start_onto_another_shape_says_what_it_kept(
    trained_run: Path, world_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: list[str], new: str | None
) -> None:
    caplog.set_level("INFO")
    assert train(world_shards, tmp_path, "other", "max_clips=16", "every.record=8", f"init_from={trained_run}", *change) == 0
    lines = [record.getMessage() for record in caplog.records]
    kept = [line for line in lines if line.startswith("  kept ")]
    assert kept and (f"  new {new}" in lines if new else not [line for line in lines if line.startswith("  new ")])
    own = set(tensors(tmp_path / "other"))
    told = {line.split()[1] for line in lines if line.startswith(("  kept ", "  new "))}
    assert told == {key.removeprefix("ema/") for key in own if key.startswith("ema/")}
    assert all(math.isfinite(line["train/loss"]) for line in records(tmp_path / "other"))


def test_a_warm_start_from_nothing_is_refused(world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(world_shards, tmp_path, "other", "max_clips=8", f"init_from={tmp_path}/nothing") == 1
    assert "set init_from" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


POISON = """\
import torch
from torch import nn

class Poison(nn.Module):
    weight, taps = 1.0, ()

    def __init__(self, slot):
        super().__init__()
        self.slot = slot

    def forward(self, tapped, batch, corrupted, grid):
        return torch.where(batch.slots == self.slot, torch.nan, 0.0)
"""


def test_a_step_that_is_no_number_is_left_out_and_told_and_many_in_a_row_stop_the_run(
    world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    poison = ("trust=poison", "+objective.extra.poison._target_=poison.Poison", "+objective.extra.poison.slot=67")
    loader = ClipLoader(f"{world_shards}/*.tar", 8, 9, 32, 32, 8)
    clip = loader.clips.record(int(loader.plan.step(8).records[67 - 64])).name

    assert train(world_shards, tmp_path, "run", *LENGTH, *poison) == 0
    run = tmp_path / "run"
    (told,) = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert told["step"] == 8 and told["reason"] == "the loss is nan" and len(told["clips"]) == 8
    assert [key for key, loss in told["clips"].items() if loss == "nan"] == [clip]
    assert all(torch.isfinite(value).all() for value in tensors(run).values())
    assert [line["step"] for line in records(run)] == [3, 6, 9, 12]
    assert all(math.isfinite(line["train/loss"]) for line in records(run))
    assert [line["skipped_steps"] for line in records(run, "skipped_steps")] == [1]

    capsys.readouterr()
    assert train(world_shards, tmp_path, "strict", *LENGTH, *poison, "optimisers.max_skips=1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the latest is 8: the loss is nan" in line and f"clips: {clip};" in line and "the weights are those before" in line
    strict = tmp_path / "strict"
    assert [path.name for path in checkpoint.listed(strict / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert json.loads((strict / "skipped_steps.jsonl").read_text())["step"] == 8
    assert [line["step"] for line in records(strict)] == [3, 6]


def test_a_disk_that_stays_full_ends_the_run_and_the_next_goes_on(
    straight: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        cut_off(patch, 5, ValueError("the shards are gone"))
        assert train(world_shards, tmp_path, "run", *LENGTH) == 1
    run = tmp_path / "run"
    kept = files_of(run / "checkpoints")
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert train(world_shards, tmp_path, "run", *LENGTH) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not save" in line and "step-00000009" in line and "earlier checkpoints are untouched" in line
    assert (
        "step-00000006" in caplog.text and "training goes on, and saves again later" in caplog.text
    )  # the first time it is told
    assert files_of(run / "checkpoints") == kept and sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000003"
    ]
    assert train(world_shards, tmp_path, "run", *LENGTH) == 0
    assert same(tensors(run), tensors(straight))
    assert recorded(run) == recorded(straight)


def test_a_sweep_makes_a_run_of_every_trial(world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    small = [word for word in SMALL if "model.width" not in word]
    words = [*small, *QUIET, f"runs={tmp_path}", "name=sweep", f"data.shards={world_shards}/*.tar", "max_clips=8"]
    assert dit_video("train", "-m", "model.width=32,48", *words) == 0
    widths = {OmegaConf.load(path).model.width for path in (tmp_path / "sweep").glob("*/config.yaml")}
    assert widths == {32, 48} and len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2


@pytest.mark.slow
def test_debug_overfit_learns_one_clip_by_heart(world_shards: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"runs={tmp_path}", "name=run", f"data.shards={world_shards}/*.tar", "debug=overfit"]
    sizes = ["model.width=64", "model.heads=4", "data.batch_size=16", "max_clips=3200", "optimisers.warmup_clips=160"]
    assert dit_video("train", *words, *sizes) == 0
    losses = [line["train/loss"] for line in records(tmp_path / "run")]
    assert losses[-1] < 0.05 * losses[0], losses


@pytest.mark.slow
def test_debug_profile_leaves_a_table_and_a_trace(world_shards: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"runs={tmp_path}", "name=run", f"data.shards={world_shards}/*.tar", "debug=profile"]
    assert dit_video("train", *words, "max_clips=144", "every.save=144") == 0
    folder = tmp_path / "run" / "profile"
    (table,) = folder.glob("*.txt")
    assert "Self CPU" in table.read_text() and "aten::" in table.read_text()
    traces = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert traces and all(trace["traceEvents"] for trace in traces)


def test_a_run_whose_time_is_over_saves_and_says_that_it_is_to_be_started_again(
    straight: Path, world_shards: Path, tmp_path: Path
) -> None:
    for steps in (1, 2):  # a step each time, as an hour has 3600 seconds
        with pytest.raises(SystemExit) as stop:
            train(world_shards, tmp_path, "run", *LENGTH, "trainer.max_hours=1e-9")
        assert stop.value.code == 143
        assert json.loads((max((tmp_path / "run" / "checkpoints").glob("step-*")) / "meta.json").read_text())["steps"] == steps
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(world_shards, tmp_path, "run", *LENGTH) == 0
    assert same(tensors(tmp_path / "run"), tensors(straight))
    lines = records(tmp_path / "run")  # each step is in one of them
    assert [line["step"] for line in lines] == [1, 2, 3, 6, 9, 12]
    assert sum(line["train/loss"] for line in lines[:3]) / 3 == pytest.approx(records(straight)[0]["train/loss"])


def test_a_changed_config_is_refused_with_what_differs_and_taken_when_it_is_accepted(
    world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert train(world_shards, tmp_path, "run", "max_clips=16") == 0
    changed = ("max_clips=32", "optimisers.adamw_lr=0.5", "objective.caption_dropout=0.3")
    capsys.readouterr()
    assert train(world_shards, tmp_path, "run", *changed) == 1
    told = capsys.readouterr().err
    assert "objective.caption_dropout: 0.1 then, 0.3 now" in told and "optimisers.adamw_lr: 0.002 then, 0.5 now" in told
    assert "accept_changed_config=true" in told
    assert train(world_shards, tmp_path, "run", *changed, "accept_changed_config=true") == 0
    assert "CONFIG CHANGED on the way: optimisers.adamw_lr: 0.002 then, 0.5 now" in caplog.text
    assert train(world_shards, tmp_path, "run", *changed, "max_clips=40") == 0  # it is the run's own by now
    assert train(world_shards, tmp_path, "run", *changed, "max_clips=48", "model.width=64", "accept_changed_config=true") == 1


def test_a_config_from_before_a_key_was_there_is_no_other_config() -> None:
    from dit_video.train import differences

    assert not differences({"text": {"dim": 8}}, {"image_encoder": {}, "lora": {}, "text": {"dim": 8, "depth": 0, "heads": 4}})
    assert differences({"text": {"dim": 8}}, {"text": {"dim": 8, "depth": 2}}) == ["text.depth: None then, 2 now"]
    assert differences({}, {"image_encoder": {"dim": 10}}) and differences({"text": {"dim": 8}}, {"text": {}})
    several = {"text": {"encoders": {"t5": {"folder": "a", "dim": 8}}}}
    assert not differences(several, {"text": {"encoders": {"t5": {"folder": "b", "dim": 8}}}})
    assert differences(several, {"text": {"encoders": {"t5": {"folder": "a", "dim": 9}}}})


def test_what_fails_beside_training_is_told_and_changes_nothing(
    straight: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dit_video import train as program
    from dit_video.trainer.callbacks import sampling

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    looks = ("every.sample=24", "every.evaluate=48", "eval.suites.seen.count=2", "eval.suites.held_out.count=2")
    monkeypatch.setattr(sampling, "contact_sheet", broken)  # after the weights were lent to sampling
    assert train(world_shards, tmp_path, "late", *LENGTH, *looks) == 0
    assert caplog.text.count("sampling FAILED after") == 4 and "training goes on: RuntimeError: out of luck" in caplog.text
    monkeypatch.setattr(program, "generate", broken)  # while they are lent
    caplog.clear()
    assert train(world_shards, tmp_path, "early", *LENGTH, *looks) == 0
    assert caplog.text.count("sampling FAILED after") == 4 and caplog.text.count("evaluation FAILED after") == 2
    for name in ("late", "early"):
        assert same(tensors(tmp_path / name), tensors(straight))
        assert len(records(tmp_path / name, "failed/sampling")) == 4


def test_the_checkpoints_that_are_asked_for_stay(world_shards: Path, tmp_path: Path) -> None:
    keep = ("checkpoints.last=1", "checkpoints.every=40", "checkpoints.best=train/loss", "every.record=8", "every.save=8")
    assert train(world_shards, tmp_path, "run", "max_clips=96", *keep) == 0
    kept = {int(path.name[5:]) for path in checkpoint.listed(tmp_path / "run" / "checkpoints")}
    losses = {line["step"]: line["train/loss"] for line in records(tmp_path / "run")}
    assert {5, 10, 11, 12} <= kept and min(losses, key=lambda step: losses[step]) in kept and len(kept) <= 5
    assert len(records(tmp_path / "run", "checkpoint/blocked_seconds")) == 12
    meta = checkpoint.opened(tmp_path / "run" / "checkpoints" / "step-00000012").meta
    assert meta["config"]["max_clips"] == 96 and meta["data"] and meta["code"] and meta["metrics"]["train/loss"] == losses[12]
    for wrong in ("checkpoints.last=0", "checkpoints.best_is=nicest", "checkpoints.every=-1"):
        assert train(world_shards, tmp_path, "wrong", wrong) == 1
