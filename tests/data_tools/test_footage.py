"""Footage: no clip crosses a cut, shots are held out as wholes, and what is left out is on record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_video.data.files import expand_shards
from dit_video.data.index import records_of
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import ClipRecord, read_member
from dit_video.data.video_file import Video, read_video, write_mp4
from dit_video.data_tools.footage import caption, look, write_footage
from dit_video.data_tools.shots import find_cuts, probe, read_frames
from dit_video.eval.continuation import ContinuationSuite

FPS, HEIGHT, WIDTH, SHOT_FRAMES = 24, 64, 96, 40
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60], [200, 60, 200], [60, 200, 200], [230, 140, 40],
                    [120, 120, 120], [40, 120, 90], [150, 40, 110], [110, 160, 240], [240, 180, 200]])  # fmt: skip
STILL, BLACK = 3, 5  # what these shots of the film are


def shot(colour: np.ndarray, seed: int, speed: int = -2, num_frames: int = SHOT_FRAMES) -> Video:
    """Smooth noise around a colour that moves sideways by `speed` pixels a frame."""
    noise = np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH))
    spectrum = np.fft.rfft2(noise) * np.exp(-300 * (np.fft.fftfreq(HEIGHT)[:, None] ** 2 + np.fft.rfftfreq(WIDTH) ** 2))
    smooth = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
    picture = colour + 25 * (smooth / smooth.std())[..., None]
    frames = [np.roll(picture, number * speed, axis=1) for number in range(num_frames)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def film() -> Video:
    shots = [shot(colour, seed, 0 if seed == STILL else -2) for seed, colour in enumerate(COLOURS)]
    shots[BLACK] = np.zeros_like(shots[BLACK])
    return np.concatenate([*shots, shot(COLOURS[0], 99, num_frames=12)])  # the last one is too short


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_mp4(folder / "a_test-film.mp4", film(), FPS)
    return folder


@pytest.fixture(scope="module")
def written(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "footage", videos)


def write(out: Path, videos: Path | list[str], **settings: Any) -> Path:
    named = videos if isinstance(videos, list) else [str(videos / "*.mp4")]
    return write_footage(out, out.parent / "cache", named, **({"workers": 1, "held_out_every": 4, "min_distance": 0} | settings))


def read_attributes(record: ClipRecord) -> dict:
    return json.loads(read_member(record, "json"))


def records(out: Path, split: str) -> list[ClipRecord]:
    return records_of(expand_shards(f"{out}/{split}/*.tar"))


def colours(record: ClipRecord) -> set[int]:
    """Which shots' colours the frames of a sample have."""
    video, _ = read_video(read_member(record, "mp4"))
    means = video.astype(float).mean(axis=(1, 2))
    return set(np.linalg.norm(means[:, None] - COLOURS, axis=-1).argmin(axis=1).tolist())


def dropped(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_finds_every_cut_to_the_frame_in_any_piece(videos: Path) -> None:
    path = videos / "a_test-film.mp4"
    info = probe(path)
    wanted = [number * SHOT_FRAMES / FPS for number in range(1, len(COLOURS) + 1)]
    assert find_cuts(path, info, 0, info.seconds) == pytest.approx(wanted)
    pieces = [cut for start in range(0, 30, 3) for cut in find_cuts(path, info, start, start + 3)]
    assert pieces == pytest.approx(wanted)


def test_reads_the_frames_of_a_stretch_wherever_it_begins(videos: Path) -> None:
    path = videos / "a_test-film.mp4"
    info = probe(path)
    whole = dict(read_frames(path, info, 0, info.seconds, HEIGHT))
    assert len(whole) == len(film()) and info.rate == FPS and info.width(HEIGHT) == WIDTH
    for start in (0, 7, 100, 333):
        part = list(read_frames(path, info, start / FPS, (start + 5) / FPS, HEIGHT))
        assert [round(time * FPS) for time, _ in part] == list(range(start, start + 5))
        assert all((frame == whole[time]).all() for time, frame in part)


def test_no_clip_crosses_a_cut(written: Path) -> None:
    everything = records(written, "train") + records(written, "held_out")
    assert all(len(colours(record)) == 1 for record in everything)
    for record in everything:
        about = read_attributes(record)
        video, fps = read_video(read_member(record, "mp4"))
        assert video.shape[1:] == (64, WIDTH, 3) and fps == FPS == about["fps"]
        assert len(video) / fps == pytest.approx(about["seconds"], abs=1e-3) and about["seconds"] >= 1.125


def test_shots_are_held_out_as_wholes(written: Path) -> None:
    train = {number for record in records(written, "train") for number in colours(record)}
    held_out = {number for record in records(written, "held_out") for number in colours(record)}
    assert held_out and train.isdisjoint(held_out)
    assert train | held_out == set(range(len(COLOURS))) - {STILL, BLACK}


def test_what_is_left_out_is_on_record(written: Path) -> None:
    reasons = {line["shot"]: line["reason"].split(":")[0] for line in dropped(written)}
    assert reasons == {STILL: "still", BLACK: "dark", len(COLOURS): "short"}
    report = json.loads((written / "dataset.json").read_text())
    assert report["dropped"] == {"still": 1, "dark": 1, "short": 1}
    assert report["counts"]["train"]["clips"] == len(records(written, "train"))


def test_captions_say_what_was_measured_also_in_the_mirror(written: Path) -> None:
    told = {record.key: read_member(record, "txt").decode() for record in records(written, "train")}
    mirrored = [key for key in told if key.endswith("-mirrored")]
    assert len(mirrored) * 2 == len(told)
    for key in mirrored:
        assert told[key].startswith("a test film: ") and "to the right" in told[key]
        assert "to the left" in told[key.removesuffix("-mirrored")]
    assert not any("mirrored" in record.key for record in records(written, "held_out"))


def test_measures_speed_in_picture_heights() -> None:
    slow, fast = (look(shot(COLOURS[0], 0, speed), 8.0) for speed in (1, 2))
    assert slow.motion == pytest.approx(8 / HEIGHT, rel=0.15) and fast.motion == pytest.approx(16 / HEIGHT, rel=0.15)
    assert fast.drift == pytest.approx((1, 0), abs=0.15)
    assert [look(shot(colour, 0), 24.0).hue for colour in COLOURS[:6]] == ["red", "green", "blue", "yellow", "pink", "cyan"]
    assert caption("A film.", fast) == "A film: much movement to the right, mostly red."


def test_the_number_of_processes_changes_nothing_and_a_second_call_neither(
    videos: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = write(tmp_path / "footage", videos, workers=2)
    assert contents(again) == contents(written)
    stamps = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    capsys.readouterr()
    write(tmp_path / "footage", videos, workers=2)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == stamps
    assert not list(tmp_path.glob("*.partial"))


def test_long_shots_become_many_samples_for_training_and_few_held_out(tmp_path: Path) -> None:
    frames = 6 * FPS
    write_mp4(tmp_path / "long.mp4", np.concatenate([shot(COLOURS[i], i, num_frames=frames) for i in range(4)]), FPS)
    out = write(tmp_path / "out", tmp_path, held_out_every=2, held_out_per_shot=3, window_seconds=2, mirror=False)
    assert [len(records(out, split)) for split in ("train", "held_out")] == [2 * 3, 2 * 3]
    seconds = [read_attributes(record)["seconds"] for record in records(out, "train")]
    assert sum(seconds) == pytest.approx(2 * (frames - 2) / FPS, abs=1e-2)  # nothing of a shot is lost but a frame at either end


def test_a_shot_that_comes_back_is_not_trained_on_when_it_is_held_out(tmp_path: Path) -> None:
    order = (0, 1, 2, 1, 3, 4)  # the fourth is held out
    write_mp4(tmp_path / "film.mp4", np.concatenate([shot(COLOURS[i], i, -1) for i in order]), FPS)
    out = write(tmp_path / "out", tmp_path, held_out_every=6, min_distance=20, mirror=False)
    assert [colours(record) for record in records(out, "held_out")] == [{1}]
    assert [(line["shot"], line["reason"].split(":")[0]) for line in dropped(out)] == [(1, "like held-out")]
    assert [colours(record) for record in records(out, "train")] == [{0}, {2}, {3}, {4}]


def test_own_videos_are_described_held_out_and_forgiven(videos: Path, tmp_path: Path) -> None:
    write_mp4(tmp_path / "park.mp4", np.concatenate([shot(COLOURS[i], 50 + i, 2) for i in range(3)]), 30)
    (tmp_path / "park.txt").write_text("A park\nin spring.")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    named = [str(videos / "*.mp4"), str(tmp_path / "broken.mp4")]
    out = write(tmp_path / "out", named, held_out_videos=[str(tmp_path / "park.mp4")], held_out_every=0, max_fps=15)
    assert {read_attributes(record)["source"] for record in records(out, "train")} == {"a_test-film"}
    for record in records(out, "held_out"):
        assert read_attributes(record)["source"] == "park" and read_attributes(record)["fps"] == 15
        assert read_member(record, "txt").startswith(b"A park in spring: ")
    assert [line["source"] for line in dropped(out) if line["reason"].startswith("broken")] == ["broken"]


def test_the_data_room_and_the_evaluation_read_it(written: Path) -> None:
    loader = ClipLoader(f"{written}/train/*.tar", 4, num_frames=9, height=32, width=48, fps=8, decoder="pyav")
    batch = next(loader.batches())
    assert batch.video.shape == (4, 9, 32, 48, 3) and bool((batch.weights == 1).all())
    suite = ContinuationSuite(f"{written}/held_out/*.tar", 2, seed=0, num_given=1, num_frames=9, height=32, width=48, fps=8)
    assert len(suite.requests()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 63}, "set height"),
        ({"clip_seconds": 0}, "set clip_seconds"),
        ({"clip_seconds": 0.1}, "set clip_seconds"),
        ({"window_seconds": 1}, "set window_seconds"),
        ({"held_out_every": 1}, "set held_out_every"),
        ({"held_out_videos": ["nowhere/*.mp4"]}, "change held_out_videos"),
        ({"min_motion": 100.0}, "no clip is left for train.*still.*lower"),
        ({"held_out_every": 100}, "no clip is left for held_out"),
    ],
)
def test_refuses_what_cannot_work_and_leaves_nothing_behind(
    videos: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "footage", videos, **settings)
    assert not list(tmp_path.iterdir())


def test_refuses_videos_that_are_missing_or_twice(videos: Path, tmp_path: Path) -> None:
    for named, message in (([str(tmp_path / "*.mp4")], "no such video"), ([str(tmp_path)], "is a folder"), ([], "set videos")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "out", named)
    (tmp_path / "copy.mp4").write_bytes((videos / "a_test-film.mp4").read_bytes())
    with pytest.raises(ValueError, match="are the same video"):
        write(tmp_path / "out", [str(videos / "a_test-film.mp4")], held_out_videos=[str(tmp_path / "copy.mp4")])


def test_never_writes_over_anything_else(videos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="set out to another folder"):
        write(mine, videos)
    assert (mine / "thesis.txt").read_text() == "precious"
    out = write(tmp_path / "footage", videos)
    before = contents(out)
    with pytest.raises(ValueError, match=r"height 64 \(now 32\)"):
        write(out, videos, height=32)
    assert contents(out) == before
    next(out.rglob("*.tar")).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="was changed after it was written"):
        write(out, videos)
