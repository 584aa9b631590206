"""The sampling program: what is asked for on the command line lies in the folder that it names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import dit_video, files_of

from dit_video.data.video_file import read_video, write_mp4
from dit_video.runs import Run, read_config

PROMPTS = [
    "a small red circle moves left",
    "a circle, red; it's \"small\" [slow] (calm) {1} = 'x'",
    "true",
    "null",
    "7",
    "${name} ${oc.env:HOME} $HOME \\ %s {}",
    "ünï ☃ 🎬 赤い丸",
    "line\u2028separator\x85and\ttab",
    "--help me = choice(a,b)",
    "",
    "many words " * 60,
]


def sample(run: Path, out: Path | None, *words: object) -> int:
    return dit_video("sample", f"run={run}", *([f"out={out}"] if out else []), "steps=1", *words)


def index(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_text_is_a_prompt(trained_run: Path, tmp_path: Path, prompt: str) -> None:
    assert sample(trained_run, tmp_path / "out", f"prompt={prompt}", f"negative_prompt={prompt}!") == 0
    (line,) = index(tmp_path / "out")
    assert (line["prompt"], line["negative_prompt"]) == (prompt, f"{prompt}!")


def test_the_index_says_what_each_file_is(trained_run: Path, tmp_path: Path) -> None:
    words = ("prompt=a red circle", "seed=7", "count=3", "guidance=3.5", "steps=2")
    assert sample(trained_run, tmp_path / "out", *words) == 0
    lines = index(tmp_path / "out")
    assert [line["seed"] for line in lines] == [7, 8, 9]
    sizes = {"frames": 9, "height": 32, "width": 32, "fps": 8, "steps": 2, "guidance": 3.5, "task": "text_to_video"}
    for line in lines:
        assert {key: line[key] for key in sizes} == sizes
        assert read_video(tmp_path / "out" / line["file"])[0].shape == (9, 32, 32, 3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "0000.mp4", "0001.mp4", "0002.mp4", "index.jsonl", "contact_sheet.png",
    }  # fmt: skip
    videos = [(tmp_path / "out" / line["file"]).read_bytes() for line in lines]
    assert len(set(videos)) == 3


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (16, 32, 48), (4, 16, 24), (12, 48, 32)])
def test_any_length_and_size_is_made_exactly(trained_run: Path, tmp_path: Path, frames: int, height: int, width: int) -> None:
    sizes = (f"num_frames={frames}", f"height={height}", f"width={width}", "fps=12")
    assert sample(trained_run, tmp_path / "out", "prompt=a circle", *sizes) == 0
    (line,) = index(tmp_path / "out")
    video, fps = read_video(tmp_path / "out" / line["file"])
    assert video.shape == (frames, height, width, 3) and (frames == 1 or fps == pytest.approx(12))
    assert (line["frames"], line["height"], line["width"], line["fps"]) == (frames, height, width, 12)


def test_the_same_command_gives_the_same_bytes_in_the_same_place(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert sample(run, None, "prompt=a red circle, slowly", "count=2") == 0
    (first,) = (run / "sampled").iterdir()
    assert first.name.startswith("a_red_circle__slowly")
    before = files_of(first)
    assert sample(run, None, "prompt=a red circle, slowly", "count=2") == 0
    assert list((run / "sampled").iterdir()) == [first] and files_of(first) == before
    for other in ("guidance=4", "sampler/solver=euler", "seed=1", "negative_prompt=blur", "num_frames=5"):
        assert sample(run, None, "prompt=a red circle, slowly", "count=2", other) == 0
    assert len(list((run / "sampled").iterdir())) == 6 and files_of(first) == before


def test_solver_and_steps_change_what_is_drawn(trained_run: Path, tmp_path: Path) -> None:
    drawn, said = {}, {}
    for solver in ("euler", "heun", "multistep", "stochastic", None):
        out = tmp_path / str(solver)
        words = [f"sampler/solver={solver}"] if solver else []
        assert sample(trained_run, out, "prompt=a red circle", "steps=3", *words) == 0
        drawn[solver], said[solver] = (out / "0000.mp4").read_bytes(), index(out)[0]["sampler"]
    assert drawn[None] == drawn["multistep"] and said[None] == said["multistep"]
    assert len(set(drawn.values())) > 1  # a model that has hardly learned anything draws nearly the same by every solver
    assert [said[solver].split()[0] for solver in ("euler", "heun", "multistep")] == ["euler", "heun", "multistep"]
    assert said["stochastic"].startswith("Stochastic(renewal=1.0) solver, 3 steps")


def test_prompts_from_files(trained_run: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", "it's = [a] \"square\", isn't it", "ünï\u2028☃"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\r\n", encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "more": 1}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("p.txt", "p.jsonl"):
        out = tmp_path / f"out-{name}"
        assert sample(trained_run, out, f"prompts={tmp_path}/{name}", "count=2") == 0
        assert [(line["prompt"], line["seed"]) for line in index(out)] == [
            (prompt, seed) for prompt in prompts for seed in (0, 1)
        ]
    first = (tmp_path / "out-p.txt" / "0002.mp4").read_bytes()
    assert sample(trained_run, tmp_path / "alone", f"prompt={prompts[1]}") == 0
    found, wanted = (read_video(video)[0].astype(int) for video in (first, (tmp_path / "alone" / "0000.mp4").read_bytes()))
    assert np.abs(found - wanted).max() <= 3  # a clip does not depend on what shares its batch, but for the last bits


def test_an_image_is_the_first_frame(trained_run: Path, tmp_path: Path) -> None:
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[8:20, 4:16] = (220, 30, 40)
    Image.fromarray(frame).save(tmp_path / "first.png")
    assert sample(trained_run, tmp_path / "out", "prompt=a red square moves right", f"image={tmp_path}/first.png") == 0
    (line,) = index(tmp_path / "out")
    assert line["task"] == "image_to_video"
    video, _ = read_video(tmp_path / "out" / line["file"])
    assert np.abs(video[0].astype(int) - frame).mean() < 6  # H.264 is lossy, sampling is not:
    exact = Run(trained_run).sample("a red square moves right", task="image_to_video", given=frame[None])
    assert np.array_equal(exact[0], frame) and not np.array_equal(exact[1], frame)

    (tmp_path / "wide.jpg").write_bytes((tmp_path / "first.png").read_bytes())
    assert sample(trained_run, tmp_path / "wide", "prompt=a square", f"image={tmp_path}/wide.jpg", "height=16", "width=48") == 0
    assert read_video(tmp_path / "wide" / "0000.mp4")[0].shape == (9, 16, 48, 3)


def test_a_video_goes_on_from_its_last_frames(trained_run: Path, tmp_path: Path) -> None:
    clip = Run(trained_run).sample("a red circle", seed=3)
    write_mp4(tmp_path / "clip.mp4", clip, 8)
    stored = read_video(tmp_path / "clip.mp4")[0]
    words = ("prompt=a red circle", f"video={tmp_path}/clip.mp4")
    for given in (3, 5):
        assert sample(trained_run, tmp_path / f"{given}", *words, f"given_frames={given}") == 0
        assert index(tmp_path / f"{given}")[0]["task"] == "extend"
        longer = read_video(tmp_path / f"{given}" / "0000.mp4")[0]
        assert longer.shape == (9, 32, 32, 3)
        assert np.abs(longer[:given].astype(int) - stored[-given:]).mean() < 4
    assert sample(trained_run, tmp_path / "between", *words, "given_frames=3", "task=in_between") == 0
    assert index(tmp_path / "between")[0]["task"] == "in_between"


def test_an_out_folder_with_videos_of_others_is_left_alone(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    for name in ("beach.mp4", "0000.mp4"):
        (out / name).write_bytes(b"of great value")
    before = files_of(out)
    assert sample(trained_run, out, "prompt=a circle") == 1
    assert "set out to another folder" in capsys.readouterr().err
    assert files_of(out) == before
    assert sample(trained_run, out / "beach.mp4", "prompt=a circle") == 1
    assert files_of(out) == before

    assert sample(trained_run, tmp_path / "own", "prompt=a circle", "count=3") == 0
    (tmp_path / "own" / "beach.mp4").write_bytes(b"of great value")
    assert sample(trained_run, tmp_path / "own", "prompt=a square", "count=2") == 0
    assert sorted(path.name for path in (tmp_path / "own").glob("*.mp4")) == ["0000.mp4", "0001.mp4", "beach.mp4"]
    assert (tmp_path / "own" / "beach.mp4").read_bytes() == b"of great value"


def test_a_stored_prompt_is_not_read_a_second_time(trained_run: Path) -> None:
    assert read_config(trained_run).sample_prompts == ["a small red circle moves left"]
