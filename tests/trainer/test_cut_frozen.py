"""Frozen encoders that are cut over ranks: the same states, latents and clips to the bit, and each rank holds its part alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from frozen_work import encoding, failing  # noqa: E402
from layout_work import run_ranks  # noqa: E402
from small_run import QUIET, SMALL, records, tensors  # noqa: E402
from text_models import config_of, save_tokenizer  # noqa: E402

from dit_video.data.video_file import read_video  # noqa: E402
from dit_video.data_tools.random_autoencoder import write_random_autoencoder  # noqa: E402
from dit_video.model.frozen import Frozen  # noqa: E402

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random autoencoder and a random text encoder."""
    folder = tmp_path_factory.mktemp("frozen")
    write_random_autoencoder(str(folder / "vae"))
    torch.manual_seed(0)
    transformers.UMT5EncoderModel(config_of("umt5")).save_pretrained(folder / "umt5")
    save_tokenizer(folder / "umt5", "umt5")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_cut_says_the_same(frozen: Path, ranks: int) -> None:
    for found in run_ranks(ranks, encoding, frozen):
        assert all(found["same"]), found["same"]
        assert all(1 / ranks <= share < 1.4 / ranks for share in found["held"].values()), found[
            "held"
        ]  # small tensors fill up places


@pytest.mark.slow
def test_a_rank_that_fails_is_told_to_all_and_what_is_cut_works_on(frozen: Path) -> None:
    one, other = run_ranks(2, failing, frozen)
    assert one == other or (one[0], one[2]) == (other[0], other[2])
    assert one[0] == "rank 0: OSError: a disk is gone" and "rank 0: ValueError: no weights" in one[1] and one[2] == "done"


@pytest.mark.slow
def test_training_with_what_is_cut_is_the_same(frozen: Path, world_shards: Path, tmp_path: Path) -> None:
    """With validation and sampling beside it, whose prompts and clips do not divide by the ranks."""
    words = [
        "train", *SMALL, *QUIET, f"runs={tmp_path}", f"data.shards={world_shards}/*.tar", "trainer.devices=2",
        "autoencoder=wan", f"autoencoder.folder={frozen}/vae", "autoencoder.dtype=float32", "text=umt5", f"text.folder={frozen}/umt5",
        "text.dtype=float32", "text.dim=24", "model.patch=[1,1,1]", "model.text=cross", "objective.tasks.in_between.probability=0",
        "max_clips=32", "every.record=8", "every.validate=16", "every.sample=16", "every.save=16", "validation.clips=10",
        f"validation.shards={world_shards}/00001.tar", "sample_prompts=[snow,rain,a red circle]",
    ]  # fmt: skip
    words = [word for word in words if not word.startswith("text.buckets") and word not in ("text.dim=32", "every.save=0")]
    for name, placement, layout in (("device", "device", "shard"), ("shard", "shard", "shard"), ("context", "shard", "context")):
        places = (
            f"name={name}",
            f"text.placement={placement}",
            f"autoencoder.placement={placement}",
            f"trainer.layout.{layout}=2",
        )
        program = [sys.executable, "-m", "dit_video.cli", *words, *places]
        done = subprocess.run(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    one, other = tmp_path / "device", tmp_path / "shard"  # the same up to kernels that round by where in memory a weight lies
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-7) for name in before)
    for key in ("train/loss", "val/loss"):
        wanted, found = ([line[key] for line in records(run, key)] for run in (one, other))
        assert wanted and found == pytest.approx(wanted, rel=1e-5)
        assert [line[key] for line in records(tmp_path / "context", key)] == pytest.approx(wanted, rel=1e-2)  # in bfloat16
    clips = [sorted((run / "samples").rglob("*.mp4")) for run in (one, other)]
    assert len(clips[0]) == len(clips[1]) == 6
    apart = [np.abs(read_video(a)[0].astype(int) - read_video(b)[0]).mean() for a, b in zip(*clips, strict=True)]
    assert max(apart) < 0.1
    assert not records(other, "failed/sampling") and not records(other, "failed/validation")


def test_one_process_holds_all() -> None:
    module = torch.nn.Linear(3, 4)
    frozen = Frozen(lambda: module, "shard")
    assert not frozen.is_cut
    held = [frozen.device_bytes(lambda: 100, ranks, in_use) for ranks in (1, 4) for in_use in (False, True)]
    assert held == [100, 100, 25, 125]  # the whole, beside the part that it was gathered from
    with frozen.on("cpu") as one, frozen.on("cpu") as other:  # inside it may be asked for again
        assert one is other is module and not module.weight.requires_grad
