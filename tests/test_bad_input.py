"""What cannot work ends in one line that says what, where and which key to change, and in a status that is not 0; nothing is lost."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import dit_video, files_of, train

from dit_video.data.shards import write_shard
from dit_video.data.video_file import encode_mp4
from dit_video.sampler.generate import Request
from dit_video.world.render import render
from dit_video.world.state import sample_scene


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dit-video: ") and len(lines[0]) < 700
    return lines[0]


def clip(number: int, **members: object) -> dict[str, object]:
    """A good clip of the world, but for the members that are changed, or left out (None)."""
    scene = sample_scene(np.random.default_rng(number), num_frames=9, height=32, width=32, fps=8)
    sample = {"__key__": f"{number:05d}", "mp4": encode_mp4(render(scene), 8), "txt": "a red circle"} | members
    return {key: value for key, value in sample.items() if value is not None}


VALUES = [
    (["max_clips=0"], "max_clips must be a whole number of at least 1, got 0"),
    (["max_clips=many"], "set max_clips"),
    (["data.micro_batches=0"], "set data.micro_batches"),
    (["data.buckets=[{num_frames: 9}, {height: 30}]"], "height 30 is not a positive multiple of the patch's 8"),
    (["data.sources={a: {shards: x.tar, weight: -1}}"], "there is no such shard"),
    (["data.batch_size=0"], "set data.batch_size"),
    (["data.num_frames=0"], "set num_frames"),
    (["data.num_frames=8"], "for example 9"),
    (["data.height=30"], "height 30 is not a positive multiple of the patch's 8"),
    (["data.width=0"], "set width"),
    (["data.fps=0"], "data.fps"),
    (["data.decoder=vlc"], "set data.decoder"),
    (["data.num_workers=-1"], "set data.num_workers"),
    (["model.heads=5"], "width 32 is not divisible by heads 5"),
    (["model.depth=0"], "set model.depth"),
    (["text.heads=7"], "set text.dim or text.heads"),
    (["sampler.steps=-3"], "set steps"),
    (["objective.caption_dropout=1"], "set objective.caption_dropout"),
    (["optimisers.decay_share=2"], "set optimisers.decay_share"),
    (["ema_decay=1"], "set ema_decay"),
    (["seed=-1"], "set seed"),
    (["every.save=often"], "set every.save"),
    (["name=a/b"], "a run's name is one folder's, got 'a/b'"),
    (["name="], "set name"),
    (["model.widht=32"], "unknown key model.widht; did you mean model.width?"),
    (["experimnt=world_quick"], "experiment"),
    (["experiment=world_quik"], "experiment has no option 'world_quik'; did you mean world_quick?"),
    (["debug=overfitt"], "did you mean overfit?"),
    (["model=gigantic"], "model has no option 'gigantic'"),
    (["sample_prompts=[a]", "every.sample=8", "data.shards=nowhere/*.tar"], "nowhere/*.tar: there is no such shard; change data.shards"),
    (["validation.shards=nowhere.tar", "every.validate=8"], "nowhere.tar"),
    (["every.evaluate=8", "eval.suites.seen.count=0"], "count"),
    (["init_from=nowhere"], "set init_from"),
    (["trainer.accelerator=abacus"], "abacus"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told_of"), VALUES, ids=[",".join(words) for words, _ in VALUES])
def test_values_that_cannot_work(
    world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told_of: str
) -> None:
    assert train(world_shards, tmp_path / "runs", "run", "max_clips=16", *words) in (1, 2)
    assert told_of in told(capsys)
    if words != ["trainer.accelerator=abacus"]:  # known only to Lightning, after the folder is made
        assert not (tmp_path / "runs").exists()


@pytest.fixture
def bad_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of one shard."""

    def write(*samples: dict[str, object]) -> Path:
        (tmp_path / "bad").mkdir()
        write_shard(tmp_path / "bad" / "0.tar", samples)
        return tmp_path / "bad"

    return write


def assert_refused(shards: Path, capsys: pytest.CaptureFixture[str], *of: str) -> None:
    assert train(shards, shards.parent / "runs", "run", "max_clips=16") == 1
    line = told(capsys)
    assert all(part in line for part in ("data.", *of)), line


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    assert_refused(tmp_path / "bad", capsys, "bad/*.tar", "no such shard")


def test_shards_that_are_no_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    for content in (b"", b"these are words, not a tar" * 100, b"\x1f\x8b gzip"):
        (tmp_path / "bad" / "0.tar").write_bytes(content)
        assert_refused(tmp_path / "bad", capsys, "bad/0.tar", "data.shards")


def test_of_a_tar_that_is_cut_off_the_whole_clips_are_used(
    world_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.tar").write_bytes((world_shards / "00000.tar").read_bytes()[:20_000])
    assert train(tmp_path / "bad", tmp_path / "runs", "run", "max_clips=16", "data.max_bad_fraction=0.1") == 0
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("0.tar" in message and "cannot be read after" in message for message in warned)
    assert "cannot be read after" in (tmp_path / "runs" / "run" / "data.json").read_text()


def test_videos_that_do_not_decode(bad_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    shards = bad_shards(*(clip(number, mp4=b"no video at all" * 50) for number in range(20)))
    assert_refused(shards, capsys, "0.tar", "in a row", "skipped.jsonl")
    ledger = (shards.parent / "runs" / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(ledger) >= 2 and all("reason" in line for line in ledger)
    assert not (shards.parent / "runs" / "run" / "summary.json").exists()


def test_captions_that_are_missing(bad_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(bad_shards(*(clip(number, txt=None) for number in range(4))), capsys, "no caption .txt", "data.caption_ext")


@pytest.mark.parametrize("caption", ["a red circle " * 100_000, "   ", b"\xff\xfe\x00"])
def test_captions_that_are_none(bad_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str], caption: object) -> None:
    assert_refused(bad_shards(*(clip(number, txt=caption) for number in range(20))), capsys, "in a row", "the caption")


def test_one_bad_clip_is_left_out_and_on_record(bad_shards: Callable[..., Path]) -> None:
    shards = bad_shards(clip(0, mp4=b"no video"), clip(1, txt=""), *(clip(number) for number in range(2, 30)))
    assert train(shards, shards.parent / "runs", "run", "max_clips=32", "data.max_bad_fraction=0.2") == 0
    ledger = (shards.parent / "runs" / "run" / "skipped.jsonl").read_text().splitlines()
    assert sorted(re.findall(r'"key": "(\d+)"', "".join(ledger))) == ["00000", "00001"]


def test_a_run_that_cannot_go_on_keeps_what_it_has(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(trained_run)
    assert train(Path("nowhere"), trained_run.parent, trained_run.name, "max_clips=320") == 1
    assert "another config" in told(capsys)
    assert files_of(trained_run) == before


def test_a_folder_of_something_else_is_no_run(world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "samples").mkdir(parents=True)
    (tmp_path / "photos" / "samples" / "beach.jpg").write_bytes(b"of great value")
    before = files_of(tmp_path)
    assert train(world_shards, tmp_path, "photos", "max_clips=16") == 1
    assert "set name or runs" in told(capsys)
    assert files_of(tmp_path) == before


SAMPLES = [
    (["prompt=a circle", "num_frames=0"], "set num_frames"),
    (["prompt=a circle", "num_frames=-4"], "set num_frames"),
    (["prompt=a circle", "height=30"], "height 30 is not a positive multiple of the patch's 8"),
    (["prompt=a circle", "width=0"], "set width"),
    (["prompt=a circle", "width=wide"], "set width"),
    (["prompt=a circle", "steps=-5"], "set steps"),
    (["prompt=a circle", "steps=0"], "set steps"),
    (["prompt=a circle", "count=0"], "set count"),
    (["prompt=a circle", "fps=0"], "set fps"),
    (["prompt=a circle", "seed=seven"], "set seed"),
    (["prompt=a circle", "task=juggle"], "knows no task 'juggle', only text_to_video"),
    (["prompt=a circle", "task=extend"], "given"),
    (["prompt=a circle", "prompts=nowhere.txt"], "set prompt to a text, or prompts"),
    ([], "set prompt to a text, or prompts"),
    (["prompts=nowhere.txt"], "nowhere.txt cannot be read: No such file or directory; set prompts"),
    (["prompts={here}/empty.txt"], "set prompts"),
    (["prompts={here}/latin.txt"], "latin.txt cannot be read"),
    (["prompts={here}/bad.jsonl"], "bad.jsonl, line 2 is not a JSON object"),
    (["prompt=a circle", "image=nowhere.png"], "nowhere.png: there is no such image; set image"),
    (["prompt=a circle", "image={here}/empty.txt"], "set image"),
    (["prompt=a circle", "video=nowhere.mp4"], "set video"),
    (["prompt=a circle", "video={here}/empty.txt"], "set video"),
    (["prompt=a circle", "image=a.png", "video=b.mp4"], "leave image or video out"),
    (["prompt=a circle", "video={here}/short.mp4", "given_frames=7"], "set given_frames"),
    (["prompt=a circle", "video={here}/short.mp4", "given_frames=0"], "set given_frames"),
    (["prompt=a circle", "video={here}/short.mp4", "given_frames=2"], "given in numbers of 1 + k * 2, got 2"),
    (["prompt=a circle", "video={here}/short.mp4", "height=48"], "set height and width"),
    (["prompt=a circle", "video={here}/short.mp4", "num_frames=3"], "set num_frames"),
    (["prompt=a circle", "sampler/solver=magic"], "sampler/solver has no option 'magic'; there are: euler, heun, multistep"),
    (["promt=a circle"], "unknown key promt; did you mean prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told_of"), SAMPLES, ids=[",".join(words) for words, _ in SAMPLES])
def test_samples_that_cannot_be_made(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told_of: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a circle"}\n{"text": "a circle"}\n')
    (tmp_path / "short.mp4").write_bytes(encode_mp4(np.zeros((5, 32, 32, 3), np.uint8), 8))
    before = files_of(trained_run)
    words = [word.replace("{here}", str(tmp_path)) for word in words]
    assert dit_video("sample", f"run={trained_run}", f"out={tmp_path}/out", *words) in (1, 2)
    assert told_of in told(capsys)
    assert not (tmp_path / "out").exists() and files_of(trained_run) == before


@pytest.mark.parametrize("program", [["sample", "prompt=a circle"], ["evaluate"]])
def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], program: list[str]) -> None:
    assert dit_video(*program, f"run={tmp_path}/nowhere") == 1
    assert f"{tmp_path}/nowhere is not a run: it has no config.yaml; set run" in told(capsys)
    assert dit_video(*program) == 1
    assert "run has no value; give run=..." in told(capsys)


def test_a_run_without_a_checkpoint(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_bytes((trained_run / "config.yaml").read_bytes())
    assert dit_video("sample", f"run={tmp_path}/young", "prompt=a circle") == 1
    assert "holds no checkpoint yet; train it first" in told(capsys)


def test_evaluations_that_cannot_be_made(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(trained_run)
    for words, told_of in (
        (["steps=-1"], "set steps"),
        (["eval.suites.seen.count=0"], "at least one clip, got 0"),
        (["eval.height=30", "steps=1"], "height"),
        (["eval=nothing"], "eval has no option 'nothing'"),
        (["eval.batch_size=0"], "set eval.batch_size"),
    ):
        assert dit_video("evaluate", f"run={trained_run}", *words) in (1, 2)
        assert told_of in told(capsys)
    assert files_of(trained_run) == before


def test_given_frames_of_another_size_are_refused_in_python(trained_run: Path) -> None:
    from dit_video.runs import Run

    run = Run(trained_run)
    frame = np.asarray(Image.new("RGB", (24, 24)))
    with pytest.raises(ValueError, match="set height and width"):
        run.sample("a circle", task="image_to_video", given=frame[None])
    with pytest.raises(ValueError, match="set task=image_to_video"):
        run.sample("a circle", given=np.zeros((1, 32, 32, 3), np.uint8))
    assert isinstance(run.request("a circle"), Request)
