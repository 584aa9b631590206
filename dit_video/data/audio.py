"""The sound of a clip as a waveform, aligned with its frames in seconds."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from jaxtyping import Float32

Waveform = Float32[np.ndarray, "channels samples"]

LAYOUTS = {1: "mono", 2: "stereo"}
EARLIER_SECONDS = 0.2  # a whole number of samples at every usual rate
"""So much around the clip is decoded too: a lossy codec needs what came before a sample, a resampler what is around it."""
SAME_SECONDS = 0.005
"""Pieces that begin so near to the end of the one before follow it: Matroska tells times in whole milliseconds, which is no gap."""
MAX_SOURCE_RATE = 2**20


class AudioError(ValueError):
    """The sound that a clip should have does not decode."""


@dataclass(frozen=True)
class AudioFormat:
    """What the sound of every clip is made into."""

    rate: int  # samples a second
    channels: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.rate <= MAX_SOURCE_RATE:
            raise ValueError(f"sound has 1 to {MAX_SOURCE_RATE} samples a second, got {self.rate}; set data.audio_rate")
        if self.channels not in LAYOUTS:
            raise ValueError(f"sound has 1 or 2 channels, got {self.channels}; set data.audio_channels")

    def num_samples(self, seconds: float) -> int:
        """Samples of every channel in so many seconds."""
        return round(seconds * self.rate)


def decode_audio(
    data: bytes, form: AudioFormat, *, start_seconds: float, seconds: float, origin: float | None = None
) -> Waveform | None:
    """The sound from start_seconds on, for `seconds`, as samples in about [-1, 1]; None where the file has no sound at all.

    Sample i is what is heard i / rate after start_seconds. Both count from `origin`, a time of the file's own clock: when its first frame
    is shown; None: when the sound begins. Where the sound begins later, ends earlier, or has a gap, there is silence. AudioError where
    it does not decode.
    """
    try:
        with av.open(io.BytesIO(data), mode="r", metadata_errors="ignore") as container:
            if not container.streams.audio:
                return None
            rate = container.streams.audio[0].rate or 0
            if not 0 < rate <= MAX_SOURCE_RATE:
                raise AudioError(f"its sound has {rate} samples a second by its header")
            stream = container.streams.audio[0]
            begins = float((stream.start_time or 0) * (stream.time_base or 0)) if origin is None else origin
            around = _around(container, rate, form.channels, begins + start_seconds, seconds)
    except AudioError:
        raise
    except (av.FFmpegError, OverflowError, MemoryError, ValueError) as error:
        raise AudioError(f"its sound does not decode: {error}") from error
    return _resample(around, rate, form, form.num_samples(seconds))


def decode_all_audio(data: bytes) -> float:
    """Decodes all of a file's sound and gives its seconds, 0 where there is none; AudioError where it does not decode."""
    try:
        with av.open(io.BytesIO(data), mode="r", metadata_errors="ignore") as container:
            if not container.streams.audio:
                return 0.0
            rate = container.streams.audio[0].rate
            if not rate:
                raise AudioError("its sound tells no rate")
            return sum(samples.shape[1] for _, samples in _decoded(container, rate, 1)) / rate
    except AudioError:
        raise
    except (av.FFmpegError, OverflowError, MemoryError, ValueError) as error:
        raise AudioError(f"its sound does not decode: {error}") from error


def _around(container: InputContainer, rate: int, channels: int, begin: float, seconds: float) -> Waveform:
    """The sound at its own rate, from EARLIER_SECONDS before the clip to as much after it, silence where there is none."""
    stream = container.streams.audio[0]
    first = begin - EARLIER_SECONDS
    window = np.zeros((channels, math.ceil((seconds + 2 * EARLIER_SECONDS) * rate)), np.float32)
    if stream.time_base:
        container.seek(max(0, math.floor((first - EARLIER_SECONDS) / stream.time_base)), stream=stream)
    for time, samples in _decoded(container, rate, channels):
        at = round((time - first) * rate)
        if at >= window.shape[1]:
            break
        here = samples[:, max(-at, 0) : window.shape[1] - at]
        window[:, max(at, 0) : max(at, 0) + here.shape[1]] = here
    return window


def _decoded(container: InputContainer, rate: int, channels: int) -> Iterator[tuple[float, Waveform]]:
    """Pieces of the sound with the time of each: where the one before ended, unless it tells clearly another."""
    stream, resampler = container.streams.audio[0], AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
    ended, following = float(stream.start_time or 0) * float(stream.time_base or 0), False
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise AudioError("its sound is cut off or damaged")
        if frame.pts is not None and frame.time_base is not None:
            told = float(frame.pts * frame.time_base)
            if not following or abs(told - ended) > SAME_SECONDS:
                ended, following = told, True
        for piece in resampler.resample(frame):
            samples = piece.to_ndarray()
            yield ended, samples
            ended += samples.shape[1] / rate


def _resample(around: Waveform, rate: int, form: AudioFormat, count: int) -> Waveform:
    """The samples of the clip at the wanted rate, out of those around it."""
    if rate != form.rate:
        frame = av.AudioFrame.from_ndarray(around, format="fltp", layout=LAYOUTS[form.channels])
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = AudioResampler(format="fltp", layout=LAYOUTS[form.channels], rate=form.rate)
        around = np.concatenate([piece.to_ndarray() for piece in (*resampler.resample(frame), *resampler.resample(None))], axis=1)
    skipped = round(EARLIER_SECONDS * form.rate)
    return np.ascontiguousarray(around[:, skipped : skipped + count])
