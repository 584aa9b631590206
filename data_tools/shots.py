"""Films and their shots: what a video file says about itself, its small frames, where the cuts are, and what lies between."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

Frame = UInt8[np.ndarray, "H W 3"]
Run = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]
"""`map`, here or in other processes."""

CUT_HEIGHT = 64  # of the frames in which cuts are looked for, in pixels
PIECE_SECONDS = 60.0  # what one process looks through for cuts at a time


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
    aspect: float  # width over height as shown: after rotation, with square pixels
    turns: int  # quarter turns counter-clockwise from the stored to the shown picture

    def width(self, height: int) -> int:
        """The even width that belongs to a height."""
        return max(2, 2 * round(height * self.aspect / 2))


@dataclass(frozen=True)
class Shot:
    """A stretch of a source without a cut, less a frame at either end."""

    source: Source
    info: Info
    number: int  # in its source
    start: float  # seconds
    end: float
    held_out: bool = False

    def place(self) -> dict[str, Any]:
        """Where it was found."""
        seconds = self.end - self.start
        return {"source": self.source.name, "shot": self.number, "start": round(self.start, 3), "seconds": round(seconds, 3)}


@dataclass(frozen=True)
class Window:
    """A stretch of a shot that may become a sample."""

    shot: Shot
    start: float
    end: float

    def place(self) -> dict[str, Any]:
        """Where it was found."""
        return {**self.shot.place(), "start": round(self.start, 3), "seconds": round(self.end - self.start, 3)}


def probe(path: Path) -> Info:
    """Length, rate and shape of a video file; ValueError where it is none."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            frame = next(container.decode(stream), None) if stream else None
            if stream is None or frame is None or stream.time_base is None:
                raise ValueError(f"{path}: no video in it that can be decoded")
            duration = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, av.time_base)
            rate = stream.average_rate or stream.guessed_rate
            if not rate or duration <= 0:
                raise ValueError(f"{path}: does not say how long it is, or its frame rate; write it again as mp4")
            aspect = float(frame.width * (stream.sample_aspect_ratio or 1) / frame.height)
            turns = round(frame.rotation / 90) % 4
            return Info(float(duration), float(rate), 1 / aspect if turns % 2 else aspect, turns)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a video: {error}") from error


def read_frames(path: Path, info: Info, start: float, end: float, height: int) -> Iterator[tuple[float, Frame]]:
    """The frames that begin in [start, end), to the nearest frame, with their times in seconds, resized to a height.

    ValueError where the file does not decode there.
    """
    width = info.width(height)
    stored_height, stored_width = (width, height) if info.turns % 2 else (height, width)
    half, reformatter = 0.5 / info.rate, VideoReformatter()
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            stream.codec_context.thread_count = 1  # parallelism is over pieces
            origin = stream.start_time or 0
            if start > 0.5:  # a little early, as seeking goes by the order of decoding
                container.seek(origin + int((start - 0.5) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    continue
                seconds = float((frame.pts - origin) * stream.time_base)
                if seconds >= end - half:
                    return
                if seconds >= start - half:
                    small = reformatter.reformat(
                        frame, stored_width, stored_height, "rgb24", interpolation=Interpolation.AREA, threads=1
                    )
                    yield seconds, np.rot90(small.to_ndarray(), info.turns)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: does not decode after {start:.1f} s: {error}") from error


def find_cuts(path: Path, info: Info, start: float, end: float) -> list[float]:
    """When in [start, end) a new shot begins, in seconds: the time of its first frame.

    Both PySceneDetect's AdaptiveDetector, which is not fooled by fast cameras, and its ContentDetector, which sees cuts out of
    fast motion, are believed: half a shot is a shot, but a clip must not hold a cut.
    """
    from scenedetect import FrameTimecode  # type: ignore[import-untyped]
    from scenedetect.detectors import AdaptiveDetector, ContentDetector  # type: ignore[import-untyped]

    shortest = max(2, round(info.rate / 4))
    detectors = (AdaptiveDetector(min_scene_len=shortest), ContentDetector(min_scene_len=shortest))
    times: list[float] = []
    cuts: set[int] = set()
    for number, (seconds, frame) in enumerate(read_frames(path, info, max(0.0, start - 1), end + 1, CUT_HEIGHT)):
        times.append(seconds)
        timecode = FrameTimecode(number, info.rate)
        for detector in detectors:
            cuts.update(found.frame_num for found in detector.process_frame(timecode, frame[..., ::-1]))
    return [times[cut] for cut in sorted(cuts) if start <= times[cut] < end]


def _attempt_cuts(piece: tuple[Source, Info, float, float]) -> list[float] | str:
    source, info, start, end = piece
    try:
        return find_cuts(source.path, info, start, end)
    except ValueError as error:
        return str(error)


def find_shots(
    sources: Sequence[Source], clip_seconds: float, held_out_every: int, run: Run, drop: Callable[[dict[str, Any], str], None]
) -> list[Shot]:
    """The shots of all sources that are long enough for a clip; the others, and what cannot be read, are given to `drop`."""
    pieces = []
    for source in sources:
        try:
            info = probe(source.path)
        except ValueError as error:
            drop({"source": source.name}, f"broken: {error}")
            continue
        edges = [*np.arange(0.0, max(info.seconds - PIECE_SECONDS / 2, 1e-3), PIECE_SECONDS).tolist(), info.seconds]
        pieces += [(source, info, start, end) for start, end in pairwise(edges)]
    found = zip(pieces, run(_attempt_cuts, pieces), strict=True)
    shots: list[Shot] = []
    for _, group in groupby(found, key=lambda each: each[0][0]):
        results = list(group)
        source, info = results[0][0][:2]
        broken = next((cuts for _, cuts in results if isinstance(cuts, str)), None)
        if broken:
            drop({"source": source.name}, f"broken: {broken}")
            continue
        for shot in _split(source, info, [cut for _, cuts in results for cut in cuts]):
            if any(start <= (shot.start + shot.end) / 2 < end for start, end in source.skip):
                drop(shot.place(), "no footage: titles and credits")
            elif _num_frames(shot) < math.ceil(clip_seconds * info.rate - 1e-3):
                drop(shot.place(), "short")
            else:
                shots.append(shot)
    every = held_out_every
    return [
        replace(shot, held_out=shot.source.held_out or (every > 0 and number % every == every // 2))
        for number, shot in enumerate(shots)
    ]


def _split(source: Source, info: Info, cuts: Sequence[float]) -> list[Shot]:
    """The stretches between cuts and the edges of what is skipped, less a frame at either end, where pictures may be mixed."""
    edges = [time for stretch in source.skip for time in stretch if 0 < time < info.seconds]
    times = sorted({0.0, *cuts, *edges, info.seconds})
    frame = 1 / info.rate
    long = [(start, end) for start, end in pairwise(times) if end - start > 2 * frame]
    return [Shot(source, info, number, start + frame, end - frame) for number, (start, end) in enumerate(long)]


def _num_frames(shot: Shot) -> int:
    return math.floor((shot.end - shot.start) * shot.info.rate + 1e-3)


def find_windows(shot: Shot, clip_seconds: float, window_seconds: float, held_out_per_shot: int) -> list[Window]:
    """A shot in equal parts that lose nothing of it, each long enough for a clip; few for a held-out shot."""
    frames, rate = _num_frames(shot), shot.info.rate
    most = frames // math.ceil(clip_seconds * rate - 1e-3)
    number = min(most, held_out_per_shot if shot.held_out else math.ceil(frames / (window_seconds * rate)))
    edges = [shot.start + frames * part // number / rate for part in range(number + 1)]
    return [Window(shot, start, end) for start, end in pairwise(edges)]
