import inspect
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml

from dit_video.data.video_file import read_video
from dit_video.data_tools.world_shards import write_world
from dit_video.world.checker import judge, read
from dit_video.world.render import render
from dit_video.world.state import Scene, is_held_out

SMALL: dict[str, Any] = {
    "clips": 20,
    "seed": 3,
    "num_frames": 5,
    "height": 32,
    "width": 48,
    "fps": 8,
    "shard_size": 8,
    "num_prompts": 30,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "clips", workers=1, **SMALL)


def test_shards_hold_clips_captions_and_states(written: Path) -> None:
    assert [path.name for path in sorted(written.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    paths = [str(path) for path in sorted(written.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [each["__key__"] for each in samples] == [f"{number:08d}" for number in range(20)]
    for number, sample in enumerate(samples):
        state = json.loads(sample["json"])
        assert state["number"] == number and state["seed"] == 3 and state["split"] == "train"
        assert sample["txt"].decode() == state["caption"]
        scene = Scene.from_dict(state)
        assert not is_held_out(scene.colour, scene.shape, scene.motion)
        assert state["stated"].items() <= scene.attributes.items()
        video, fps = read_video(sample["mp4"])
        assert fps == 8 and video.shape == (5, 32, 48, 3)
        assert np.square(video.astype(float) - render(scene)).mean() < 120
        assert judge(read(video, fps), scene.attributes).all


def test_prompts_stand_apart(written: Path) -> None:
    for name, held_out in (("prompts_seen.jsonl", False), ("prompts_held_out.jsonl", True)):
        lines = [json.loads(line) for line in (written / name).read_text().splitlines()]
        assert len(lines) == 30
        for line in lines:
            attributes = line["attributes"]
            assert is_held_out(attributes["colour"], attributes["shape"], attributes["motion"]) == held_out
            assert attributes["colour"] in line["prompt"]


def test_workers_do_not_change_a_byte_and_seeds_do(written: Path, tmp_path: Path) -> None:
    assert contents(write_world(tmp_path / "parallel", workers=2, **SMALL)) == contents(written)
    other = contents(write_world(tmp_path / "other", workers=1, **{**SMALL, "seed": 4}))
    assert other["00000.tar"] != contents(written)["00000.tar"]


def test_a_clip_does_not_depend_on_how_many_there_are(written: Path, tmp_path: Path) -> None:
    fewer = write_world(tmp_path / "fewer", workers=1, **{**SMALL, "clips": 6, "shard_size": 100})
    members = [{each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
               for archive in (tarfile.open(folder / "00000.tar") for folder in (written, fewer))]  # fmt: skip
    assert len(members[1]) == 18 and members[1].items() <= members[0].items()


def test_a_second_call_does_nothing_and_says_so(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    write_world(written, workers=1, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in written.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_call_is_completed(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    for name, content in contents(written).items():
        if name not in ("00001.tar", "prompts_held_out.jsonl"):
            (folder / name).write_bytes(content)
    write_world(folder, workers=1, **SMALL)
    assert contents(folder) == contents(written)
    assert "wrote 8 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"height": 31}, "height"), ({"clips": 0}, "clips"), ({"width": 16}, "width"), ({"num_frames": 0}, "num_frames"),
     ({"split": "test"}, "split"), ({"fps": 0}, "fps"), ({"seed": -1}, "seed"), ({"num_prompts": 0}, "num_prompts")],
)  # fmt: skip
def test_settings_that_cannot_work_leave_nothing_behind(tmp_path: Path, wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        write_world(tmp_path / "new", **{**SMALL, **wrong})
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_data_is_refused(written: Path, tmp_path: Path) -> None:
    before = contents(written)
    with pytest.raises(ValueError, match="seed 3 .now 9."):
        write_world(written, **{**SMALL, "seed": 9})
    assert contents(written) == before
    with tarfile.open(tmp_path / "footage.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="not of the world"):
        write_world(tmp_path, **SMALL)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match="not the settings"):
        write_world(tmp_path, **SMALL)


def test_the_config_names_every_argument() -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data_world.yaml").read_text())
    assert config.pop("_target_") == "dit_video.data_tools.world_shards.write_world"
    assert list(config) == list(inspect.signature(write_world).parameters)
