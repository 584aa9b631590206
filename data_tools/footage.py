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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Float

from dit_video.data.decode import choose_frames
from dit_video.data.index import write_index
from dit_video.data.shards import write_shard
from dit_video.data.video_file import Video, encode_mp4

# relative, as the package is called data_tools here and dit_video.data_tools where it is installed
from .fetch import FILMS, fetch_films, sha256_of
from .shots import Frame, Run, Source, Window, find_shots, find_windows, read_frames

Thumbnails = Float[np.ndarray, "frames values"]

FORMAT = 1  # counted up when the same settings would give other shards
JOB_SECONDS = 20.0  # what one process cuts into clips at a time
FLOW_RATE = 8.0  # frames a second between which motion is measured
HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "red")
HUE_EDGES = (15, 45, 63, 165, 190, 260, 300, 345)  # in degrees, between neighbouring names


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of the shards, beside the sources."""

    clip_seconds: float
    window_seconds: float
    height: int
    max_fps: float
    mirror: bool
    held_out_every: int
    held_out_per_shot: int
    min_motion: float
    min_light: float
    min_contrast: float
    min_distance: float
    shard_size: int
    crf: int
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "max_fps", "height", "held_out_per_shot", "shard_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"footage needs a positive {name}, got {getattr(self, name)}; set {name}")
        if self.clip_seconds * FLOW_RATE < 2:
            raise ValueError(f"motion needs clips of at least {2 / FLOW_RATE:g} s, got {self.clip_seconds:g}; set clip_seconds")
        if self.height % 2:
            raise ValueError(f"H.264 needs an even height, got {self.height}; set height")
        if self.window_seconds < self.clip_seconds:
            raise ValueError(
                f"a window of {self.window_seconds:g} s cannot hold a clip of {self.clip_seconds:g} s; set window_seconds"
            )
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise ValueError(f"held_out_every is 0, for none, or at least 2, got {self.held_out_every}; set held_out_every")


@dataclass(frozen=True)
class Looks:
    """What is measured in a window."""

    motion: float  # mean magnitude of optical flow, in picture heights a second
    drift: tuple[float, float]  # mean flow (x, y) over mean magnitude: (-1, 0) where the whole picture moves left
    light: float  # mean luma, 0 to 255
    darkest: float  # mean luma of the darkest frame
    contrast: float  # standard deviation of luma in a frame
    saturation: float  # 0 to 1
    hue: str  # the name with most colour in it


@dataclass(frozen=True)
class Made:
    """What became of a window: a sample, or the reason why not."""

    window: Window
    dropped: str = ""
    sample: dict[str, Any] = field(default_factory=dict)
    motion: float = 0.0
    thumbnails: Thumbnails | None = None


def write_footage(
    out: Path | str,
    cache: Path | str,
    videos: Sequence[str] | None = None,
    held_out_videos: Sequence[str] = (),
    clip_seconds: float = 1.125,
    window_seconds: float = 3.0,
    height: int = 64,
    max_fps: float = 30.0,
    mirror: bool = True,
    held_out_every: int = 6,
    held_out_per_shot: int = 4,
    min_motion: float = 0.01,
    min_light: float = 24.0,
    min_contrast: float = 12.0,
    min_distance: float = 25.0,
    shard_size: int = 256,
    crf: int = 12,
    workers: int | None = None,
) -> Path:
    """Cuts videos into short captioned clips and writes them as shards, `out`/train/*.tar and `out`/held_out/*.tar.

    `videos` are paths and wildcards; None takes the films of `fetch.FILMS`, fetched into `cache`. A text file beside a video
    (name.txt for name.mp4) describes it in captions. A sample is key.mp4 (H.264, `height` pixels high, aspect kept, the source's
    frame rate but at most max_fps), key.txt and key.json (source, shot, start, seconds, fps, motion, ...). For training it lasts
    up to window_seconds, so that clips of clip_seconds can begin at different places, and comes a second time as in a mirror.
    Every held_out_every-th shot is held out, as at most held_out_per_shot samples, and held_out_videos are as a whole; what looks
    like something held out is not trained on. Beside the shards stand dataset.json (settings, sources, counts) and dropped.jsonl
    (what was left out, and why).

    The folder appears complete or not at all, and a second call does nothing. ValueError where settings cannot work, films cannot
    be fetched, nothing is left over, or `out` holds anything else.
    """
    settings = Settings(
        clip_seconds, window_seconds, height, float(max_fps), mirror, held_out_every, held_out_per_shot, min_motion, min_light,
        min_contrast, min_distance, shard_size, crf,
    )  # fmt: skip
    _need_packages()
    out = Path(out)
    sources = _sources(videos, held_out_videos, Path(cache))
    if _exists(out, settings, sources):
        print(f"{out}: is there already, nothing to do")
        return out
    if videos is None:
        fetch_films(cache)
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        report = _write(unfinished, sources, settings, workers)
        if out.exists():
            out.rmdir()  # it is empty
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for split, counts in report["counts"].items():
        print(f"{out / split}: {counts['clips']} clips, {counts['seconds']:g} s, from {counts['shots']} shots")
    print(f"left out, see {out / 'dropped.jsonl'}: " + ", ".join(f"{n} {reason}" for reason, n in report["dropped"].items()))
    return out


# --------------------------------------------------------------------------- what is asked for


def _need_packages() -> None:
    try:
        import cv2  # noqa: F401
        import scenedetect  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ValueError(f"footage needs OpenCV and PySceneDetect ({error}): pip install 'dit-video[data]'") from error


def _sources(videos: Sequence[str] | None, held_out_videos: Sequence[str], cache: Path) -> list[Source]:
    """The videos that are asked for. Films yet to be fetched are known by their checksums already."""
    if videos is None:
        named = [Source(Path(f.file).stem, cache / f.file, f.sha256, f.description, f.credit, f.skip) for f in FILMS]
    else:
        named = [_own_source(path, False) for path in _expand(videos, "videos")]
    held_out = [_own_source(path, True) for path in _expand(held_out_videos, "held_out_videos")]
    if not named:
        raise ValueError("no videos were named; set videos, or null for the films of the demo")
    by_content: dict[str, Source] = {}
    for source in named + held_out:
        other = by_content.setdefault(source.sha256, source)
        if other is not source:
            raise ValueError(f"{source.path} and {other.path} are the same video; take one out of videos or held_out_videos")
    return named + held_out


def _own_source(path: Path, held_out: bool) -> Source:
    text = path.with_suffix(".txt")
    words = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else re.sub(r"[\W_]+", " ", path.stem)
    return Source(path.stem, path, sha256_of(path), " ".join(words.split())[:500] or "A video", held_out=held_out)


def _expand(patterns: Sequence[str], key: str) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
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
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    telling = ("name", "sha256", "description", "held_out")
    try:
        report = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        found, shards = report["settings"], report["shards"]
        names = [tuple(source[key] for key in telling) for source in report["sources"]]
        wanted = asdict(settings)
        changed = [f"{key} {found.get(key)!r} (now {wanted[key]!r})" for key in wanted if found.get(key) != wanted[key]]
        damaged = [name for name, size in shards.items() if not (out / name).is_file() or (out / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out} holds something that is no footage data set; set out to another folder") from error
    if names != [tuple(getattr(source, key) for key in telling) for source in sources]:
        changed.append("videos")
    if changed:
        raise ValueError(f"{out} holds footage made with other settings: {', '.join(changed)}; set out or delete it")
    if damaged:
        raise ValueError(f"{out / damaged[0]} is missing or was changed after it was written; delete {out} to write it again")
    return True


# --------------------------------------------------------------------------- writing


class _Sieve:
    """Lets through the samples that are worth keeping, and keeps the record of what was left out and why."""

    def __init__(self, record: TextIO, min_distance: float) -> None:
        self.record, self.min_distance = record, min_distance
        self.reasons: Counter[str] = Counter()
        self.kept: dict[str, list[Made]] = {"train": [], "held_out": []}

    def drop(self, place: dict[str, Any], reason: str) -> None:
        self.reasons[reason.partition(":")[0]] += 1
        self.record.write(json.dumps({**place, "reason": reason}) + "\n")

    def __call__(self, made: Iterable[Made], split: str) -> Iterator[dict[str, Any]]:
        """The samples of a split; held_out comes first, as training avoids what looks like it."""
        avoid = [each.thumbnails for each in self.kept["held_out"] if each.thumbnails is not None] if split == "train" else []
        others = np.concatenate(avoid) if avoid else None
        for each in made:
            reason = each.dropped
            if not reason and others is not None and each.thumbnails is not None:
                distance = float(_distances(each.thumbnails, others).min())
                reason = f"like held-out: distance {distance:.1f}" if distance < self.min_distance else ""
            if reason:
                self.drop(each.window.place(), reason)
                continue
            self.kept[split].append(Made(each.window, motion=each.motion, thumbnails=each.thumbnails))
            yield each.sample

    def counts(self) -> dict[str, dict[str, Any]]:
        return {split: _count(made) for split, made in self.kept.items()}


def _write(out: Path, sources: Sequence[Source], settings: Settings, workers: int | None) -> dict[str, Any]:
    """Writes all files of a data set; returns what its dataset.json says."""
    for split in ("train", "held_out"):
        (out / split).mkdir(parents=True)
    with _processes(workers) as run, (out / "dropped.jsonl").open("w") as record:
        sieve = _Sieve(record, settings.min_distance)
        shots = find_shots(sources, settings.clip_seconds, settings.held_out_every, run, sieve.drop)
        lengths = settings.clip_seconds, settings.window_seconds, settings.held_out_per_shot
        windows = [window for shot in shots for window in find_windows(shot, *lengths)]
        print(f"{len({shot.source.path for shot in shots})} videos, {len(shots)} shots, {len(windows)} windows", flush=True)
        for split in ("held_out", "train"):
            jobs = _jobs([window for window in windows if window.shot.held_out == (split == "held_out")])
            made = (each for group in run(partial(_make, settings=settings), jobs) for each in group)
            _write_shards(out / split, sieve(made, split), settings.shard_size)
    counts = sieve.counts()
    wanted = ["train"] + ["held_out"] * (settings.held_out_every > 0 or any(source.held_out for source in sources))
    for split in wanted:
        if not counts[split]["clips"]:
            left_out = ", ".join(f"{number} {reason}" for reason, number in sieve.reasons.items()) or "nothing"
            raise ValueError(
                f"no clip is left for {split}: {len(shots)} shots of at least clip_seconds={settings.clip_seconds:g}, "
                f"left out: {left_out}; give more videos, or lower held_out_every, min_motion, min_light or min_contrast"
            )
    report = {
        "settings": asdict(settings),
        "sources": [{**asdict(source), "path": source.path.name} for source in sources],
        "counts": counts,
        "dropped": dict(sieve.reasons),
        "shards": {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*.tar"))},
    }
    (out / "dataset.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _count(made: Sequence[Made]) -> dict[str, Any]:
    return {
        "clips": len(made),
        "seconds": round(sum(each.window.end - each.window.start for each in made), 1),
        "shots": len({(each.window.shot.source.path, each.window.shot.number) for each in made}),
        "sources": dict(Counter(each.window.shot.source.name for each in made)),
        "motion_10_50_90": np.quantile([each.motion for each in made], (0.1, 0.5, 0.9)).round(4).tolist() if made else [],
    }


def _write_shards(folder: Path, samples: Iterator[dict[str, Any]], shard_size: int) -> None:
    for number in count():
        chunk = list(islice(samples, shard_size))
        if not chunk:
            return
        path = folder / f"{number:05d}.tar"
        write_shard(path, chunk)
        write_index(path)


@contextmanager
def _processes(workers: int | None) -> Iterator[Run]:
    """`map` over several processes (None: one a core), or the plain one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (workers or cores) == 1:
        yield map
        return
    # Neither plain fork, which breaks threads (the decoders'), nor spawn, which imports everything once a worker.
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers or cores, mp_context=context) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --------------------------------------------------------------------------- clips


def _jobs(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows that follow each other closely, so that they are read in one go."""
    jobs: list[list[Window]] = []
    for window in windows:
        job = jobs[-1] if jobs else []
        near = job and job[0].shot.source == window.shot.source and 0 <= window.start - job[-1].end < 2
        if near and window.end - job[0].start <= JOB_SECONDS:
            job.append(window)
        else:
            jobs.append([window])
    return jobs


def _make(windows: list[Window], settings: Settings) -> list[Made]:
    """Reads neighbouring windows of a source and makes a sample of each that is worth it."""
    import cv2

    cv2.setNumThreads(1)  # parallelism is over jobs
    source, info = windows[0].shot.source, windows[0].shot.info
    try:
        read = list(read_frames(source.path, info, windows[0].start, windows[-1].end, settings.height))
    except ValueError as error:
        return [Made(window, f"broken: {error}") for window in windows]
    half = 0.5 / info.rate
    made = []
    for window in windows:
        made += _make_one(window, [each for each in read if window.start - half <= each[0] < window.end - half], settings)
    return made


def _make_one(window: Window, read: Sequence[tuple[float, Frame]], settings: Settings) -> list[Made]:
    shot, rate = window.shot, window.shot.info.rate
    fps = rate / max(1, math.ceil(rate / settings.max_fps - 0.01))
    times = np.array([time for time, _ in read])
    if len(read) < 2 or times[-1] - times[0] + 1.5 / rate < settings.clip_seconds:
        return [Made(window, f"broken: only {len(read)} frames decode")]
    video = np.stack([read[index][1] for index in choose_frames(times, np.arange(times[0], times[-1] + 0.5 / rate, 1 / fps))])
    looks = look(video, fps)
    reason = _unfit(looks, settings)
    if reason:
        return [Made(window, reason)]
    made = [_pack(window, video, fps, looks, settings.crf)]
    if settings.mirror and not shot.held_out:
        turned = replace(looks, drift=(-looks.drift[0], looks.drift[1]))
        made.append(_pack(window, video[:, :, ::-1], fps, turned, settings.crf, "-mirrored"))
    return made


def _pack(window: Window, video: Video, fps: float, looks: Looks, crf: int, suffix: str = "") -> Made:
    source = window.shot.source
    about = {**window.place(), "seconds": len(video) / fps, "fps": fps, "mirrored": bool(suffix), **asdict(looks)}
    slug = re.sub(r"[^A-Za-z0-9]+", "-", source.name)[:40]
    sample = {
        "__key__": f"{slug}-{source.sha256[:6]}-{round(window.start * 1000):08d}{suffix}",
        "mp4": encode_mp4(video, fps, crf),
        "txt": caption(source.description, looks),
        "json": {key: round(value, 4) if isinstance(value, float) else value for key, value in about.items()},
    }
    return Made(window, "", sample, looks.motion, _thumbnails(video))


def look(video: Video, fps: float) -> Looks:
    """Measures a clip; motion by Farneback's optical flow between frames about 1/8 s apart."""
    import cv2

    stride = max(1, round(fps / FLOW_RATE))
    some = video[::stride]
    grey = np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in some])
    farneback = partial(
        cv2.calcOpticalFlowFarneback, pyr_scale=0.5, levels=3, winsize=9, iterations=5, poly_n=5, poly_sigma=1.1, flags=0
    )
    flow = np.stack([farneback(before, after, None) for before, after in pairwise(grey)])  # type: ignore[call-overload]
    speed = float(np.linalg.norm(flow, axis=-1).mean())
    x, y = flow.mean(axis=(0, 1, 2)) / max(speed, 1e-6)
    hue, saturation, value = np.moveaxis(
        cv2.cvtColor(np.ascontiguousarray(some).reshape(len(some), -1, 3), cv2.COLOR_RGB2HSV).astype(np.float32), -1, 0
    )
    names = np.digitize(hue.ravel() * 2, HUE_EDGES)  # OpenCV's hue is in steps of 2 degrees
    colour = np.bincount(names, weights=(saturation * value).ravel(), minlength=len(HUES))
    colour[0] += colour[-1]
    return Looks(
        motion=speed * fps / stride / video.shape[1],
        drift=(round(float(x), 3), round(float(y), 3)),
        light=float(grey.mean()),
        darkest=float(grey.mean(axis=(1, 2)).min()),
        contrast=float(grey.std(axis=(1, 2)).mean()),
        saturation=float(saturation.mean() / 255),
        hue=HUES[int(colour[:-1].argmax())],
    )


def _unfit(looks: Looks, settings: Settings) -> str:
    """Why a clip with these looks teaches nothing, or nothing."""
    if looks.darkest < settings.min_light:
        return f"dark: a frame has luma {looks.darkest:.1f}"
    if looks.contrast < settings.min_contrast:
        return f"flat: contrast {looks.contrast:.1f}"
    if looks.motion < settings.min_motion:
        return f"still: motion {looks.motion:.4f}"
    return ""


def caption(description: str, looks: Looks) -> str:
    """The description and what was measured: "A film: much movement to the left, bright, mostly green."."""
    amount = "little" if looks.motion < 0.03 else "some" if looks.motion < 0.1 else "much"
    x, y = looks.drift
    sideways = ("to the left" if x < 0 else "to the right") if abs(x) >= abs(y) else ("upwards" if y < 0 else "downwards")
    words = [f"{amount} movement" + (f" {sideways}" if math.hypot(x, y) > 0.5 else "")]
    if not 70 <= looks.light <= 160:
        words.append("dark" if looks.light < 70 else "bright")
    words.append(f"mostly {looks.hue}" if looks.saturation > 0.12 else "almost without colour")
    return f"{description.rstrip('.')}: {', '.join(words)}."


def _thumbnails(video: Video) -> Thumbnails:
    """First, middle and last frame in 16 x 9 pixels."""
    import cv2

    some = [np.ascontiguousarray(video[index]) for index in (0, len(video) // 2, -1)]
    return np.stack([cv2.resize(frame, (16, 9), interpolation=cv2.INTER_AREA).ravel() for frame in some]).astype(np.float32)


def _distances(some: Thumbnails, others: Thumbnails) -> Float[np.ndarray, "frames others"]:
    """Root mean squared differences of pixel values between any two of them."""
    squares = (some**2).sum(1)[:, None] + (others**2).sum(1) - 2 * some @ others.T
    return np.sqrt(np.maximum(squares, 0) / some.shape[1])
