"""Real footage as shards: cut at shot boundaries, measured, sorted out, split into train and held-out by shot, packed small.

A film is read twice, in pieces that several processes share: once for its cuts, once for its clips. Nothing depends on how many
processes there are. Captions say what was measured and no more: no captioner looks at the pictures.
"""

import glob
import json
import math
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float, UInt8

from data_tools_fetch_placeholder import FILMS, fetch_films, sha256_of
from dit_video.data.shards import write_shard
from dit_video.data.video_file import Video, encode_mp4

T = TypeVar("T")
R = TypeVar("R")

FORMAT = 1  # counted up when the same settings would give other shards
CUT_HEIGHT = 64  # of the frames in which cuts are looked for, in pixels
PIECE_SECONDS = 60.0  # what one process looks through for cuts at a time
FLOW_RATE = 8.0  # frames a second between which motion is measured
HUES = ("red", "orange", "yellow", "green", "green", "cyan", "blue", "blue", "purple", "pink", "pink", "red")  # 30 degrees each


@dataclass(frozen=True)
class Source:
    """A video to be cut up."""

    name: str
    path: Path
    sha256: str
    description: str  # what its captions begin with
    credit: str = ""
    skip: tuple[tuple[float, float], ...] = ()  # stretches that are no footage, in seconds
    held_out: bool = False  # as a whole


@dataclass(frozen=True)
class Info:
    """What a video file says about itself."""

    seconds: float
    rate: float  # frames a second, on average
    height: int  # as shown: after rotation, with square pixels
    width: int
    turns: int  # quarter turns counter-clockwise from the stored to the shown picture

    def size(self, height: int) -> tuple[int, int]:
        """The even (height, width) of its frames at a height."""
        return height, max(2, 2 * round(height * self.width / self.height / 2))


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of the shards, beside the sources."""

    clip_seconds: float
    window_seconds: float
    height: int
    max_fps: float
    held_out_every: int
    min_motion: float
    min_light: float
    min_contrast: float
    min_distance: float
    shard_size: int
    crf: int
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "max_fps", "height", "shard_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"footage needs a positive {name}, got {getattr(self, name)}; set {name}")
        if self.height % 2:
            raise ValueError(f"H.264 needs an even height, got {self.height}; set height")
        if self.window_seconds < self.clip_seconds:
            raise ValueError(
                f"a window of {self.window_seconds:g} s cannot hold a clip of {self.clip_seconds:g} s; set window_seconds"
            )
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise ValueError(f"every {self.held_out_every}th shot cannot be held out; set held_out_every to 0, for none, or 2 and more")


@dataclass(frozen=True)
class Shot:
    """A stretch of a source without a cut, less a frame at either end; `number` counts all shots of all sources."""

    source: Source
    info: Info
    number: int
    start: float  # seconds
    end: float
    held_out: bool


@dataclass(frozen=True)
class Window:
    """A stretch of a shot that becomes one sample."""

    shot: Shot
    number: int  # in its shot
    start: float
    end: float

    def place(self) -> dict[str, Any]:
        """Where it was found."""
        return {
            "source": self.shot.source.name,
            "shot": self.shot.number,
            "start": round(self.start, 3),
            "seconds": round(self.end - self.start, 3),
        }


@dataclass(frozen=True)
class Looks:
    """What is measured in a window."""

    motion: float  # mean magnitude of optical flow, in picture heights a second
    drift: tuple[float, float]  # mean flow (x, y) over mean magnitude: (-1, 0) when all of the picture moves left
    light: float  # mean luma, 0 to 255
    darkest: float  # luma of the darkest frame
    contrast: float  # standard deviation of luma in a frame
    saturation: float  # 0 to 1
    hue: str  # the hue with most colour in it


@dataclass(frozen=True)
class Made:
    """What became of a window: a sample, or a reason why not."""

    window: Window
    sample: dict[str, Any] = field(default_factory=dict)
    motion: float = 0.0
    thumbnails: Float[np.ndarray, "frames 9 16 3"] | None = None
    dropped: str = ""


def write_footage(
    out: Path | str,
    cache: Path | str,
    videos: Sequence[str] | None = None,
    held_out_videos: Sequence[str] = (),
    clip_seconds: float = 1.125,
    window_seconds: float = 3.0,
    height: int = 64,
    max_fps: float = 30.0,
    held_out_every: int = 8,
    min_motion: float = 0.01,
    min_light: float = 24.0,
    min_contrast: float = 12.0,
    min_distance: float = 25.0,
    shard_size: int = 256,
    crf: int = 12,
    workers: int | None = None,
) -> Path:
    """Cuts videos into short captioned clips and writes them as shards `out`/train/*.tar and `out`/held_out/*.tar.

    `videos` are paths and wildcards; None fetches the films of `fetch.FILMS` into `cache`. A text file beside a video (same name,
    .txt) describes it in captions. Each sample is key.mp4 (H.264, `height` pixels high, aspect kept, the source's frame rate up to
    max_fps), key.txt and key.json (source, shot, start, seconds, fps, motion, ...). Beside them: dataset.json (settings, sources,
    counts) and dropped.jsonl (what was left out and why). Samples for training last clip_seconds to about window_seconds, so that
    clips can begin at different places; held-out ones are as short as they can be. Every held_out_every-th shot is held out, and
    so are held_out_videos as a whole; shots for training that look like a held-out one are dropped.

    The folder appears complete or not at all, and a second call does nothing. ValueError where settings cannot work, films cannot
    be fetched, nothing is left, or `out` holds something else.
    """
    out = Path(out)
    settings = Settings(
        clip_seconds, window_seconds, height, float(max_fps), held_out_every, min_motion, min_light, min_contrast, min_distance,
        shard_size, crf,
    )  # fmt: skip
    _need_packages()
    sources = _sources(videos, held_out_videos, Path(cache))
    if _exists(out, settings, sources):
        print(f"{out}: is there already, nothing to do")
        return out
    if videos is None:
        fetch_films(cache)
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    for split in ("train", "held_out"):
        (partial_out / split).mkdir(parents=True)
    try:
        report = _write(partial_out, sources, settings, workers)
        (partial_out / "dataset.json").write_text(json.dumps(report, indent=2) + "\n")
        if out.exists():
            out.rmdir()  # known to be empty
        partial_out.rename(out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    for split, counts in report["counts"].items():
        print(f"{out / split}: {counts['clips']} clips, {counts['seconds']:g} s, from {counts['shots']} shots")
    print(f"left out, see {out / 'dropped.jsonl'}: {report['dropped']}")
    return out


# --------------------------------------------------------------------------- the folder


def _need_packages() -> None:
    try:
        import cv2  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise ValueError(f"footage needs OpenCV and PySceneDetect ({error}): pip install 'dit-video[data]'") from error


def _sources(videos: Sequence[str] | None, held_out_videos: Sequence[str], cache: Path) -> list[Source]:
    """The videos that are asked for; ValueError where there are none. Films to be fetched are known by their checksum already."""
    if videos is None:
        named = [Source(Path(f.file).stem, cache / f.file, f.sha256, f.description, f.credit, f.skip) for f in FILMS]
    else:
        named = [_own_source(path, False) for path in _expand(videos, "videos")]
    held_out = [_own_source(path, True) for path in _expand(held_out_videos, "held_out_videos")]
    twice = {source.path for source in named} & {source.path for source in held_out}
    if twice:
        raise ValueError(f"{sorted(map(str, twice))} are in videos and in held_out_videos; take them out of one")
    if not named:
        raise ValueError("no videos were named; set videos, or null for the films of the demo")
    return named + held_out


def _own_source(path: Path, held_out: bool) -> Source:
    text = path.with_suffix(".txt")
    description = text.read_text(encoding="utf-8").strip() if text.is_file() else re.sub(r"[\s_.-]+", " ", path.stem).strip()
    return Source(path.stem, path, sha256_of(path), " ".join(description.split())[:500], held_out=held_out)


def _expand(patterns: Sequence[str], key: str) -> list[Path]:
    if isinstance(patterns, str):
        patterns = [patterns]
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"{pattern}: there is no such video; change {key}")
        found.update(dict.fromkeys(map(Path, matches)))
    for path in found:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, not a video; change {key}, for example to {path}/*.mp4")
    return list(found)


def _exists(out: Path, settings: Settings, sources: Sequence[Source]) -> bool:
    """Whether the shards are there, whole; ValueError where `out` holds anything else."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    try:
        report = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        found, shards, names = report["settings"], report["shards"], report["sources"]
        told = [[source["name"], source["sha256"], source["held_out"]] for source in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} holds something that is no footage data set; set out to another folder") from error
    changed = [f"{key} {found.get(key)!r} (now {value!r})" for key, value in asdict(settings).items() if found.get(key) != value]
    if told != [[source.name, source.sha256, source.held_out] for source in sources]:
        changed.append("the videos")
    if changed:
        raise ValueError(f"{out} holds footage made with other settings: {', '.join(changed)}; set out or delete it")
    for name, size in shards.items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise ValueError(f"{out / name} is missing or was changed after it was written; delete {out} to write it again")
    return True


def _write(out: Path, sources: Sequence[Source], settings: Settings, workers: int | None) -> dict[str, Any]:
    """Writes shards and dropped.jsonl, and returns what dataset.json says."""
    with _pool(workers) as run, (out / "dropped.jsonl").open("w") as dropped:
        shots = _find_shots(sources, run)
        windows = [window for shot in shots for window in _windows(shot, settings)]
        films = len({shot.source.path for shot in shots})
        print(f"{films} videos, {len(shots)} shots, {len(windows)} windows to look at", flush=True)
        reasons: Counter[str] = Counter()
        counts, seen = {}, list[Float[np.ndarray, "frames 9 16 3"]]()
        for split in ("held_out", "train"):  # in this order, so that training can avoid what is held out
            jobs = _neighbours([window for window in windows if window.shot.held_out == (split == "held_out")])
            made = (each for group in run(partial(_make, settings=settings), jobs) for each in group)
            kept: list[Made] = []

            def choose(made: Iterable[Made] = made, kept: list[Made] = kept, split: str = split) -> Iterator[dict[str, Any]]:
                for each in made:
                    reason = each.dropped or (_lookalike(each, seen, settings) if split == "train" else "")
                    if reason:
                        reasons[reason.partition(":")[0]] += 1
                        dropped.write(json.dumps({**each.window.place(), "reason": reason}) + "\n")
                        continue
                    kept.append(Made(each.window, motion=each.motion))
                    if split == "held_out" and each.thumbnails is not None:
                        seen.append(each.thumbnails)
                    yield each.sample

            _write_shards(out / split, choose(), settings.shard_size)
            counts[split] = _count(kept)
    _require(counts, settings, sources, reasons)
    shards = sorted(out.rglob("*.tar"))
    return {
        "settings": asdict(settings),
        "sources": [{**asdict(source), "path": source.path.name} for source in sources],
        "counts": counts,
        "dropped": dict(reasons),
        "shards": {path.relative_to(out).as_posix(): path.stat().st_size for path in shards},
    }
