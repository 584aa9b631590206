"""A step is the same mathematics on any layout: real processes, float64, against one process."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import QUIET, SMALL, records, tensors

sys.path.insert(0, str(Path(__file__).parent))
from layout_work import begun, furthest, held, run_ranks, sampled, training  # noqa: E402

from dit_video.data.video_file import read_video  # noqa: E402
from dit_video.trainer.context import shares  # noqa: E402
from dit_video.trainer.layout import Layout  # noqa: E402

ADAMW, MUON = {"muon_lr": None}, {"muon_precision": "float64"}
LAYOUTS = {
    "ddp 2": {"replicate": 2}, "fsdp 2": {"shard": 2}, "fsdp 3": {"shard": 3}, "hsdp 2x2": {"replicate": 2, "shard": 2},
    "context 2": {"context": 2}, "context 4": {"context": 4}, "fsdp x context 2x2": {"shard": 2, "context": 2},
    "ddp x context 2x2": {"replicate": 2, "context": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: run_ranks(1, training, {}, recipe)[0] for name, recipe in (("adamw", ADAMW), ("muon", MUON))}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_nothing(alone: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(Layout(**layout).world_size, training, layout, ADAMW)
    assert all(furthest(each, found[0]) == 0 for each in found[1:])  # every rank knows the same
    assert furthest(found[0], alone["adamw"]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp 2", "fsdp 3", "hsdp 2x2", "fsdp x context 2x2"])
def test_muon_on_cut_weights_is_muon(alone: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    assert furthest(run_ranks(Layout(**layout).world_size, training, layout, MUON)[0], alone["muon"]) < 1e-9


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_changes_nothing(alone: dict[str, Any], how: str) -> None:
    assert furthest(run_ranks(1, partial(training, {}, ADAMW, recompute=how))[0], alone["adamw"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_holds_its_share_of_everything(size: int) -> None:
    """Weights, gradients, optimisers' state and averages; what does not divide is a row or two."""
    whole = run_ranks(1, held, {})[0]
    for mine in run_ranks(size, held, {"shard": size}):
        for name, total in whole.items():
            assert mine[name] / total == pytest.approx(1 / size, rel=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"shard": 2}, {"shard": 3}, {"replicate": 2}])
def test_a_start_without_memory_is_the_start_of_one_process(layout: dict[str, int]) -> None:
    """No rank ever holds more of the weights than its own part."""
    alone, size = run_ranks(1, begun, {})[0]
    for weights, mine in run_ranks(Layout(**layout).world_size, begun, layout):
        assert weights.keys() == alone.keys() and all(torch.equal(weights[name], alone[name]) for name in alone)
        assert mine / size == pytest.approx(1 / layout.get("shard", 1), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "gather"),
    [({"shard": 2}, True), ({"shard": 2}, False), ({"shard": 3}, True), ({"replicate": 2}, True), ({"context": 2}, True)],
)
def test_prompts_are_shared_out_and_the_clips_are_those_of_one_process(layout: dict[str, int], gather: bool) -> None:
    alone, _ = run_ranks(1, sampled, {}, True)[0]
    for clips, far in run_ranks(Layout(**layout).world_size, sampled, layout, gather):
        assert far == 0 and len(clips) == len(alone) == 7
        for one, other in zip(clips, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_weights_that_travel_in_bfloat16_train_almost_alike(alone: dict[str, Any]) -> None:
    recipe = {"muon_lr": None}
    one = run_ranks(1, partial(training, {}, recipe, "float32", precision="bf16-mixed"))[0]
    mixed = {"precision": "bf16-mixed", "gather_precision": "bfloat16"}
    steps, _ = run_ranks(2, partial(training, {"shard": 2}, recipe, "float32", **mixed))[0]
    for (loss, norm), (other, other_norm) in zip(steps, one[0], strict=True):
        assert loss == pytest.approx(other, rel=0.02) and norm == pytest.approx(other_norm, rel=0.05)


@pytest.mark.slow
def test_averages_in_the_host_s_memory_are_the_same(alone: dict[str, Any]) -> None:
    assert furthest(run_ranks(1, partial(training, {}, ADAMW, offload_ema=True))[0], alone["adamw"]) == 0
    assert furthest(run_ranks(2, partial(training, {"shard": 2}, ADAMW, offload_ema=True))[0], alone["adamw"]) < 1e-9


def test_what_does_not_divide_is_shared_out() -> None:
    assert shares(10, 4) == [3, 3, 2, 2] and shares(2, 3) == [1, 1, 0] and shares(6, 3) == [2, 2, 2]


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.layout\.shard"):
        Layout(shard=0)
    assert [Layout(2, 2, 2).data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def launch(ranks: int, *words: str) -> None:
    """The training program as a user starts it, in so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    launcher = torchrun if ranks > 1 else [sys.executable]
    program = ["-m", "dit_video.cli", "train", *words, f"trainer.devices={ranks}"]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shard=2", "context=2"])
def test_the_program_under_torchrun_does_what_one_process_does(world_shards: Path, tmp_path: Path, layout: str) -> None:
    """The record, the samples and the checkpoint."""
    words = [
        *SMALL, f"runs={tmp_path}", f"data.shards={world_shards}/*.tar", "trainer.precision=32-true", "optimisers.muon_lr=null",
        "every.record=24", "every.monitor=48", "every.sample=48", "every.validate=0", "every.evaluate=0", "every.save=24",
        "sample_prompts=[a small red circle moves left,a blue square,a large green triangle moves up]", "sampler.precision=float32",
    ]  # fmt: skip

    launch(1, "name=alone", "max_clips=96", *words)
    launch(2, "name=two", "max_clips=96", f"trainer.layout.{layout}", *words)
    alone, two = (records(tmp_path / name) for name in ("alone", "two"))
    assert [line["step"] for line in alone] == [line["step"] for line in two] == [3, 6, 9, 12]
    for one, other in zip(alone, two, strict=True):
        assert {name for name in one if name.startswith("train/")} == {name for name in other if name.startswith("train/")}
        assert all(other[name] == pytest.approx(one[name], rel=1e-4) for name in one if name.startswith("train/loss"))
    assert len(list((tmp_path / "two" / "samples").glob("*/contact_sheet.png"))) == 2
    films = sorted((tmp_path / "alone" / "samples").glob("*/*.mp4"))
    assert len(films) == 2 * 3
    for made in films:  # prompts are shared out, and the clips are those of one process
        one, other = (read_video(path)[0].astype(int) for path in (made, tmp_path / "two" / made.relative_to(tmp_path / "alone")))
        assert np.abs(one - other).mean() < 0.5 and np.abs(one - other).max() <= 12  # what H.264 makes of a level
    whole, cut = tensors(tmp_path / "alone"), tensors(tmp_path / "two")
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_is_taken_up_at_any_number_of_ranks(world_shards: Path, tmp_path: Path) -> None:
    words = [
        *SMALL, *QUIET, f"runs={tmp_path}", f"data.shards={world_shards}/*.tar", "trainer.precision=32-true", "optimisers.muon_lr=null",
        "optimisers.decay_share=0", "every.record=8", "every.save=24",
    ]  # fmt: skip

    launch(1, "name=straight", "max_clips=96", *words)
    for max_clips, ranks in ((24, 2), (48, 1), (72, 3), (96, 2)):
        launch(ranks, "name=elastic", f"max_clips={max_clips}", f"trainer.layout.shard={ranks}", *words)
    straight, elastic = (records(tmp_path / name) for name in ("straight", "elastic"))
    assert [line["step"] for line in elastic] == [line["step"] for line in straight] == list(range(1, 13))
    for one, other in zip(straight, elastic, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
