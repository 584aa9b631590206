"""A clip of evenly timed frames out of the bytes of a video file, resized on the way.

Frames are chosen by seconds, from the timestamps of the file, so sources of any frame rate (also a changing one) give the same
motion. PyAV looks at the file first: it knows size, rotation and every timestamp, and refuses what is cut off or no video before
decord sees it, which such files can crash.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float, Int

from dit_video.data.video_file import Video, centre_crop, cover_size

Decoder = Literal["decord", "pyav", "torchcodec"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)

DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "libaom-av1")
"""Of MPEG-2 and MPEG-4 part 2 it gives frames that are one or two beside those that were asked for."""
SEEKABLE = {"mp4", "matroska"}  # and what FFmpeg counts with them: mov and webm
MAX_SOURCE_PIXELS = 2**26
"""Height times width of a source frame; more is taken for a broken header."""


MAX_SOURCE_SECONDS = 4 * 3600.0
"""Duration of a source; more is taken for a broken header, or for a film that was never cut into clips."""


class DecodeError(ValueError):
    """The bytes do not hold the clip that was asked for: no video, broken, or too short."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself: its frames in the order they are shown, `times[0]` being 0."""

    height: int  # as shown, after rotation
    width: int
    rotation: int  # quarter turns counter-clockwise from the stored to the shown picture
    seconds: float  # until the end of the last frame
    origin: float  # when the first frame is shown, in seconds of the file's own clock
    times: Float[np.ndarray, " frames"]  # when each frame begins, in seconds after that
    timestamps: Int[np.ndarray, " frames"]  # the same in units of the stream
    numbered: bool  # frames are known by their number alone: the file tells when each is decoded, not when it is shown (AVI)
    seekable: bool  # the container tells where each frame is; in others decoders begin somewhere near it
    codec: str


@cache
def has_decord() -> bool:
    """Whether decord is installed here; it has no wheel for ARM and newer macOS."""
    return find_spec("decord") is not None


@cache
def why_no_torchcodec() -> str | None:
    """Why torchcodec cannot be used here, None where it can; it is optional, and needs FFmpeg's shared libraries on the system."""
    try:
        import torchcodec.decoders  # type: ignore[import-untyped, import-not-found] # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # without FFmpeg it raises a page of text
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _open(data: bytes) -> InputContainer:
    container = av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise DecodeError("no video stream in it that can be decoded")
    container.streams.video[0].codec_context.thread_count = 1  # parallelism is over clips
    return container


def _probe(container: InputContainer) -> VideoInfo:
    stream = container.streams.video[0]
    _check_size(stream.height, stream.width)  # as the header says, before anything is allocated for a frame
    seconds = (container.duration or 0) / av.time_base
    if seconds > MAX_SOURCE_SECONDS:
        raise DecodeError(
            f"it lasts {seconds:.0f} s by its header, and {MAX_SOURCE_SECONDS:.0f} s is the most that is looked into"
        )
    shown, numbered = [], container.format.name == "avi"
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError("it is cut off or damaged: a packet in it is not whole")
        numbered |= packet.pts is None and packet.size > 0
        timestamp = packet.pts if packet.pts is not None else packet.dts
        if packet.size and timestamp is not None and not packet.is_discard:
            shown.append((timestamp, packet.duration or 0))
    if not shown or stream.time_base is None:
        raise DecodeError("no frame with a timestamp in it")
    shown.sort()
    timestamps = np.array([timestamp for timestamp, _ in shown], np.int64)
    last = shown[-1][1] or (int(np.median(np.diff(timestamps))) if len(shown) > 1 else 0)
    container.seek(int(timestamps[0]), stream=stream)
    first = next(container.decode(stream), None)
    if first is None:
        raise DecodeError("not one frame of it decodes")
    _check_size(first.height, first.width)
    turns = round(first.rotation / 90) % 4
    height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
    tick = float(stream.time_base)
    elapsed = timestamps - timestamps[0]
    seconds = float(elapsed[-1] + last) * tick
    origin, codec = float(timestamps[0]) * tick, stream.codec_context.name
    seekable = bool(set(container.format.name.split(",")) & SEEKABLE) and not numbered
    return VideoInfo(height, width, turns, seconds, origin, elapsed * tick, timestamps, numbered, seekable, codec)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_SOURCE_PIXELS:
        raise DecodeError(f"its frames of {height} x {width} are larger than {MAX_SOURCE_PIXELS} pixels")


def probe(data: bytes) -> VideoInfo:
    """Size, rotation and timestamps of a video file, from its packets and its first frame; DecodeError where it is none."""
    try:
        with _open(data) as container:
            return _probe(container)
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise DecodeError(f"not a video that can be read: {error}") from error


def choose_frames(times: Float[np.ndarray, " frames"], targets: Float[np.ndarray, " chosen"]) -> Int[np.ndarray, " chosen"]:
    """The frame that begins nearest to each target time; the earlier of two that are equally near."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, targets - 1e-6)


def _fetch_pyav(
    data: bytes, container: InputContainer, info: VideoInfo, indices: Int[np.ndarray, " frames"], height: int, width: int
) -> Video:
    if info.rotation % 2:
        height, width = width, height
    wanted = {int(info.timestamps[index]) for index in indices}
    if info.seekable:
        container.seek(min(wanted), stream=container.streams.video[0])
        found = _pictures(container, info, wanted, height, width)
    else:
        with _open(data) as fresh:
            found = _pictures(fresh, info, wanted, height, width)
    missing = wanted - found.keys()
    if missing:
        raise DecodeError(f"{len(missing)} of its frames do not decode, the first at timestamp {min(missing)}")
    video = np.stack([found[int(info.timestamps[index])] for index in indices])
    return np.rot90(video, info.rotation, axes=(1, 2))


def _pictures(container: InputContainer, info: VideoInfo, wanted: set[int], height: int, width: int) -> dict[int, np.ndarray]:
    """The wanted frames by timestamp, as far as they decode, from where the container stands."""
    stream, found, reformatter = container.streams.video[0], {}, VideoReformatter()
    for number, frame in enumerate(container.decode(stream)):
        timestamp = frame.pts if frame.pts is not None else frame.dts
        if info.numbered:  # the n-th picture that comes out is the n-th that is shown
            timestamp = int(info.timestamps[number]) if number < len(info.timestamps) else None
        if timestamp in wanted and not frame.is_corrupt:
            small = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1)
            found[timestamp] = small.to_ndarray()
        if timestamp is not None and timestamp >= max(wanted):
            break
    return found


def _fetch_decord(data: bytes, info: VideoInfo, indices: Int[np.ndarray, " frames"], height: int, width: int) -> Video | None:
    """None where decord gives up: on broken files, but also on sound ones at widths such as 16, 24 and 48."""
    import decord  # type: ignore[import-untyped]

    size = {} if (height, width) == (info.height, info.width) else {"height": height, "width": width}
    try:
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, **size)
        return reader.get_batch(indices.tolist()).asnumpy() if len(reader) == len(info.times) else None
    except (decord.DECORDError, RuntimeError):
        return None


def _fetch_torchcodec(data: bytes, info: VideoInfo, indices: Int[np.ndarray, " frames"], height: int, width: int) -> Video | None:
    """None where torchcodec gives up, or counts other frames than the packets do."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize  # type: ignore[import-untyped, import-not-found]

    resize = [] if (height, width) == (info.height, info.width) else [Resize((height, width))]
    try:
        decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=resize)
        return decoder.get_frames_at(indices.tolist()).data.numpy() if len(decoder) == len(info.times) else None
    except (RuntimeError, ValueError, IndexError):
        return None


def _fetch(
    data: bytes, info: VideoInfo, indices: Int[np.ndarray, " frames"], size: tuple[int, int], decoder: Decoder
) -> Video | None:
    """Frames by a decoder other than PyAV; None where it is not here, gives up, or would count frames otherwise than they are shown."""
    if not info.seekable:
        return None
    if decoder == "decord" and has_decord() and info.codec in DECORD_CODECS:
        return _fetch_decord(data, info, indices, *size)
    return _fetch_torchcodec(data, info, indices, *size) if decoder == "torchcodec" else None


@dataclass(frozen=True)
class DecodedClip:
    """Frames, and which seconds of the source they are."""

    video: Video
    start: float  # in seconds after its first frame
    origin: float  # as in VideoInfo


def decode_clip(
    data: bytes,
    *,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    start_seconds: float | Callable[[float], float] = 0.0,
    decoder: Decoder = "decord",
) -> DecodedClip:
    """`num_frames` frames at `fps` frames a second, from start_seconds on, each the source frame nearest in time.

    Pixels are resized in the decoder to cover height x width with their aspect kept, and cut at the centre. start_seconds may be
    a function that receives the latest possible start and returns the start. A source slower than fps repeats frames. The last
    frame may stand for up to half a frame of time missing at the end. DecodeError where the bytes are no video, do not decode, or
    are too short. Of H.264 of 8 bits, without resizing, all decoders give the same pixels; PyAV also notices a damaged frame, where
    decord shows what it can. Where decord is not installed, and where it or torchcodec gives up, PyAV takes its place.
    """
    try:
        with _open(data) as container:
            info = _probe(container)
            slack = info.seconds - num_frames / fps
            start = start_seconds(max(0.0, slack)) if callable(start_seconds) else start_seconds
            if start > slack + 0.5 / fps + 1e-6 and num_frames > 1 or start > info.seconds:
                raise DecodeError(
                    f"too short: it lasts {info.seconds:.3f} s, and {num_frames} frames at {fps:g} fps from {start:.3f} s on "
                    f"need {start + num_frames / fps:.3f} s"
                )
            indices = choose_frames(info.times, start + np.arange(num_frames) / fps)
            size = cover_size(info.height, info.width, height, width)
            _check_size(*size)
            video = _fetch(data, info, indices, size, decoder)
            if video is None:
                video = _fetch_pyav(data, container, info, indices, *size)
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise DecodeError(f"not a video that can be read: {error}") from error
    return DecodedClip(np.ascontiguousarray(centre_crop(video, height, width)), start, info.origin)


def decode_all(data: bytes) -> int:
    """Decodes every frame of a video file and gives their number; DecodeError where one does not decode, or there is none."""
    try:
        with _open(data) as container:
            info = _probe(container)
        with _open(data) as container:  # from its beginning, to which not every container can seek
            frames = sum(not frame.is_corrupt for frame in container.decode(container.streams.video[0]))
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise DecodeError(f"not a video that can be read: {error}") from error
    if frames < len(info.times):
        raise DecodeError(f"{len(info.times) - frames} of its {len(info.times)} frames do not decode")
    return frames
