"""The README's three extensions, run as a user runs them: from their own folder, with one file and one YAML each."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dit_video.data_tools.world_shards import write_world

FOLDER = Path(__file__).parents[1] / "experiments" / "extensions"
SMALL = [
    "logger=none", "max_clips=64", "model.width=48", "model.depth=2", "text.dim=32", "data.batch_size=16", "sample_prompts=[]",
    "every.record=16", "every.save=64", "every.sample=0", "every.validate=0", "every.monitor=0",
]  # fmt: skip


def dit_video(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dit_video.cli", *words], cwd=FOLDER, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "shards"
    write_world(out, clips=32, seed=0, num_frames=9, height=32, width=32, fps=8, num_prompts=8, workers=1)
    return out


def train(data: Path, runs: Path, name: str, *words: str) -> list[dict]:
    dit_video("train", *SMALL, f"runs={runs}", f"name={name}", f"data.shards={data}/*.tar", *words)
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_new_attention_pattern_trains_and_a_new_metric_judges_it(data: Path, tmp_path: Path) -> None:
    records = train(data, tmp_path, "windowed", "trust=windowed", "model/attention=windowed")
    assert any("train/loss" in record for record in records)
    words = ["eval.suites.seen.count=4", "eval.suites.held_out.count=4", "steps=2"]
    dit_video("evaluate", f"run={tmp_path}/windowed", "trust=[windowed,flicker]", "eval=world_flicker", *words)
    found = json.loads((tmp_path / "windowed" / "evaluation.json").read_text())
    assert found["metrics"]["flicker.seen.grey_levels"]["count"] == 4
    assert "flicker.held_out.grey_levels" not in found["metrics"]
    assert "brightness" in found["protocol"]["metric.flicker"]


@pytest.mark.slow
def test_an_alignment_loss_through_a_tap_is_trained_and_recorded(data: Path, tmp_path: Path) -> None:
    records = train(
        data, tmp_path, "aligned", "trust=alignment", "+objective/extra=alignment", "max_clips=640", "every.record=64"
    )
    losses = [record["train/loss/extra/alignment"] for record in records if "train/loss/extra/alignment" in record]
    assert losses[-1] < 0.7 * losses[0]


def test_extensions_are_refused_unless_trusted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dit_video.cli", "train", "model/attention=windowed"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "trust=windowed" in done.stderr


def test_the_core_does_not_know_the_extensions() -> None:
    core = Path(__file__).parents[1] / "dit_video"
    names = re.compile(r"\b(windowed|Flicker|Alignment)\b")
    assert not [path for path in core.rglob("*.py") if names.search(path.read_text())]
