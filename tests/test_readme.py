"""What the README names exists, and its commands run (on small data and a small model, with their own keys unchanged)."""

import re
import shlex
from pathlib import Path

import pytest
from small_run import SMALL, dit_video, files_of, train

from dit_video.data_tools.world_shards import write_world

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("dit-video")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:dit_video|conf|experiments|tests|data_tools)/[\w./-]+)`", README)
    named += re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)\b(?=[ `]|$)", "\n".join(BLOCKS))) <= targets


def test_the_readme_has_commands_of_every_program() -> None:
    assert {words_of(command)[0] for command in COMMANDS} == {
        "train",
        "sample",
        "evaluate",
        "info",
        "plan",
        "doctor",
        "data",
        "checkpoint",
    }


@pytest.mark.slow
def test_the_commands_run(world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and lengths are cut down, so that seconds do; what the README types stays, and comes first."""
    monkeypatch.chdir(tmp_path)
    assert train(world_shards, Path("runs"), "demo", "max_clips=16", "model.patch=[4,8,8]") == 0
    own = write_world(tmp_path / "own", clips=32, seed=0, num_frames=9, height=64, width=96, fps=8, shard_size=1, workers=1)
    (tmp_path / "footage").mkdir()
    for number, shard in enumerate(sorted(own.glob("*.tar"))):
        shard.rename(tmp_path / "footage" / f"{number:03d}.tar")
    (tmp_path / "prompts.txt").write_text("a small red circle moves left\na large blue square bounces\n")
    from PIL import Image

    Image.new("RGB", (32, 32), (40, 40, 40)).save(tmp_path / "first.png")
    few = ["eval.suites.seen.count=2", "eval.suites.held_out.count=2", "steps=1"]
    for command in COMMANDS:
        program, *words = words_of(command)
        if any(word in command for word in ("trust=", "Wan2", "$", "layout=")):
            continue  # run by tests/test_extensions.py; tests/test_pipeline.py and test_published_training.py run what these do
        if program == "train":
            given = {word.partition("=")[0] for word in words}
            shards = [] if "data.shards" in given else [f"data.shards={world_shards}/*.tar", "validation.shards=null"]
            words += [*(word for word in SMALL if word.partition("=")[0] not in given), *shards, "max_clips=16"]
        if program == "evaluate":
            words += ["eval=world_small", *few]
        if program == "doctor":
            words += ["only=[packages,disk]"]  # all of it is run by tests/test_doctor.py
        if words[:1] == ["peek"]:
            words += [f"data.shards={world_shards}/*.tar"]
        before = files_of(tmp_path)
        assert dit_video(program, *words) == 0, command
        quiet = program in ("info", "plan", "doctor") or words[0] in ("check", "ls", "verify", "diff")
        assert quiet or files_of(tmp_path) != before, command
