"""A world of 64 clips and a model that learns a little of it in seconds: what the tests of the trainer and the programs share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = (
    "logger=none", "model.width=32", "model.depth=2", "model.heads=2", "text.dim=32", "text.buckets=64", "data.batch_size=8",
    "optimisers.warmup_clips=16", "sampler.steps=2", "sample_prompts=[a small red circle moves left]", "ema_decay=0.9",
)  # fmt: skip
QUIET = tuple(f"every.{name}=0" for name in ("record", "monitor", "sample", "evaluate", "validate", "save"))


def dit_video(*words: object) -> int:
    """The command line in this process; returns its exit status."""
    from dit_video.cli import main

    return main([str(word) for word in words])


def train(shards: Path, runs: Path, name: str, *words: object) -> int:
    """A small training, with none of its callbacks unless `words` ask for them."""
    return dit_video("train", *SMALL, *QUIET, f"runs={runs}", f"name={name}", f"data.shards={shards}/*.tar", *words)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: weights, averages and optimisers', by whatever number of ranks it was written."""
    from dit_video.trainer.checkpoint import opened

    saved = opened(max((run / "checkpoints").glob("step-*")))
    return {f"{group}/{key}": value for group in saved.groups for key, value in saved.tensors(group).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def records(run: Path, key: str = "train/loss") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that hold a key."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def world_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards with 64 clips of the world."""
    from dit_video.data_tools.world_shards import write_world

    out = tmp_path_factory.mktemp("world") / "shards"
    sizes = {"num_frames": 9, "height": 32, "width": 32, "fps": 8}
    return write_world(out, clips=64, seed=0, **sizes, shard_size=32, num_prompts=8, workers=1)


@pytest.fixture(scope="session")
def trained_run(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 160 clips with every callback on; read it, never write to it."""
    runs = tmp_path_factory.mktemp("runs")
    every = ("every.record=40", "every.monitor=80", "every.sample=80", "every.validate=80", "every.evaluate=160", "every.save=80")
    held_out = (f"validation.shards={world_shards}/00001.tar", "validation.clips=16")
    judged = ("eval.suites.seen.count=4", "eval.suites.held_out.count=4")
    assert train(world_shards, runs, "trained", "max_clips=160", *every, *held_out, *judged) == 0
    return runs / "trained"
