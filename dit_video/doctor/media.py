"""Checks of the decoders, on a video that is written here, and of the user's own shards."""

import io
import math
from importlib import import_module
from importlib.util import find_spec

import av
import numpy as np

from dit_video.data import decode
from dit_video.data.audio import AudioFormat, decode_audio
from dit_video.data.decode import Decoder, decode_clip, probe, why_no_torchcodec
from dit_video.data.files import expand_shards
from dit_video.data.index import build
from dit_video.data.shards import ClipRecord
from dit_video.data.video_file import Video, encode_mp4
from dit_video.doctor.finding import Finding, Settings

FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 96, 8.0
LOSS_OF_H264 = 3.0  # mean difference of a pixel's value; it is about 1, and over 10 to the next frame
RATE, TONE = 16000, 440.0
PER_SHARD, SHARDS = 4, 2  # clips and shards that are looked at


def moving_video() -> Video:
    """A soft pattern that moves by so much a frame that no frame can be taken for another."""
    t, y, x = np.meshgrid(np.arange(FRAMES), np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    wave = np.sin(2 * math.pi * (x / 48 + y / 64 + t / FRAMES))
    return (128 + 80 * wave[..., None] + np.array([30, 0, -30])).astype(np.uint8)  # of one colour, as 4:2:0 thins colours out


def pyav(settings: Settings) -> Finding:
    """PyAV, which writes videos, looks at each before it is decoded, and stands in for the other decoders."""
    video = moving_video()
    data = encode_mp4(video, FPS)
    got = decode_clip(data, num_frames=FRAMES, fps=FPS, height=HEIGHT, width=WIDTH, decoder="pyav").video
    error = np.abs(got.astype(float) - video).mean()
    text = f"PyAV {av.__version__}: {FRAMES} frames of H.264 written and decoded, mean error {error:.2g} of 255"
    wrong = ["frames are not those that were written; reinstall av, as without it there is no decoder"]
    return Finding.of(text, failures=wrong if error > LOSS_OF_H264 else [])


def decord(settings: Settings) -> Finding:
    """decord, the default for shards of one's own."""
    if find_spec("decord") is None:
        return Finding.of("not installed, optional: PyAV takes its place")
    return _like_pyav("decord")


def torchcodec(settings: Settings) -> Finding:
    """torchcodec, where it is installed."""
    if find_spec("torchcodec") is None:
        return Finding.of("not installed, optional")
    if cause := why_no_torchcodec():
        advice = "install FFmpeg's shared libraries and the torchcodec of this torch, or leave data.decoder as it is"
        return Finding.of(f"installed, and cannot be loaded ({cause})", [advice])
    return _like_pyav("torchcodec")


def _like_pyav(decoder: Decoder) -> Finding:
    """Whether a decoder gives the frames that PyAV gives, which of H.264 of 8 bits without resizing it does to the bit."""
    data = encode_mp4(moving_video(), FPS)
    wanted = decode_clip(data, num_frames=FRAMES, fps=FPS, height=HEIGHT, width=WIDTH, decoder="pyav").video
    # Asked directly: decode_clip gives PyAV's frames where another decoder gives up.
    got = decode._fetch(data, probe(data), np.arange(FRAMES), (HEIGHT, WIDTH), decoder)
    if got is None:
        return Finding.of("gives up on a plain H.264 video", ["PyAV takes its place at each clip; set data.decoder=pyav"])
    if not np.array_equal(got, wanted):
        text = f"decodes other pixels than PyAV, mean difference {np.abs(got.astype(float) - wanted).mean():.2g} of 255"
        return Finding.of(text, failures=["set data.decoder=pyav"])
    return Finding.of(f"{FRAMES} frames of H.264, the same pixels as PyAV's")


def sound(settings: Settings) -> Finding:
    """A second of a tone as AAC in an mp4 beside its frames, as data.audio_rate reads it."""
    heard = decode_audio(video_with_tone(), AudioFormat(RATE), start_seconds=0.5, seconds=1.0, origin=0.0)
    if heard is None:
        return Finding.of("the sound of an mp4 is not found", failures=["leave data.audio_rate=null, and reinstall av"])
    found = np.abs(np.fft.rfft(heard[0])).argmax() * RATE / heard.shape[1]
    silent = decode_audio(encode_mp4(moving_video(), FPS), AudioFormat(RATE), start_seconds=0.0, seconds=1.0)
    wrong = abs(found - TONE) > 2 or not 0.2 < np.abs(heard).max() < 1 or silent is not None
    failures = ["sound is not what was written; leave data.audio_rate=null, and reinstall av"] if wrong else []
    return Finding.of(f"AAC decoded, a tone of {TONE:g} Hz read as {found:g} Hz; a silent mp4 has none", failures=failures)


def video_with_tone() -> bytes:
    """The moving video as an mp4 with a tone of its length."""
    out, frames = io.BytesIO(), moving_video()
    with av.open(out, "w", format="mp4") as container:
        pictures = container.add_stream("libx264", rate=int(FPS))
        pictures.height, pictures.width, pictures.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        tone = container.add_stream("aac", rate=RATE, layout="mono")
        for pixels in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures.encode(None))
        samples = 0.5 * np.sin(2 * math.pi * TONE * np.arange(int(RATE * FRAMES / FPS)) / RATE).astype(np.float32)
        for start in range(0, len(samples), 1024):
            piece = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts = RATE, start
            container.mux(tone.encode(piece))
        container.mux(tone.encode(None))
    return out.getvalue()


def shards(settings: Settings) -> Finding:
    """A few clips of the first and the last shard, read and decoded to the end; nothing is written beside them."""
    tools = import_module("dit_video.data_tools.check")  # which is found as part of the package alone
    paths = expand_shards(settings.shards)
    check, unused = tools.CheckClip(captions=("txt",), max_caption_chars=2000, frames=True, audio=False), np.zeros(1, np.uint8)
    read, samples, warnings = 0, 0, []
    for shard in list(dict.fromkeys([paths[0], paths[-1]]))[:SHARDS]:
        index = build(shard)
        samples += len(index)
        warnings += [f"{shard}: {problem}" for problem in index.problems[:3]]
        for row in range(min(PER_SHARD, len(index))):
            record = ClipRecord(shard, index.keys[row], index.members(row))
            try:
                check(record, unused)
                read += 1
            except Exception as error:  # as of the pool: whatever a decoder raises on media is about this clip
                warnings.append(f"{record.name}: {error}")
    text = f"{len(paths)} found; read and decoded {read} clips of the {samples} in the first and the last"
    advice = f"{'; '.join(warnings)}; run dit-video data check shards=..." if warnings else ""
    return Finding("FAIL" if not read else "warning" if warnings else "ok", text, advice or ("" if read else "set shards"))
