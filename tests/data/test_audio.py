"""The sound of a clip: where it lies in time, at any rate, in any codec, and what is not there."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import counting_video

from dit_video.data.audio import AudioError, AudioFormat, decode_audio
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import BadDataError, write_shard
from dit_video.data.video_file import encode_mp4
from dit_video.data_tools.check import check_shards

TONE = 440.0


def tone(begin: float, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A sine that is 0 at time 0 of the source; in a second channel it is turned around."""
    time = begin + np.arange(round(seconds * rate)) / rate
    return (np.array([[0.5], [-0.5]][:channels]) * np.sin(2 * np.pi * TONE * time)).astype(np.float32)


def chirps(seconds: float, rate: int, every: float = 0.25) -> np.ndarray:
    """Bursts of 20 ms from 500 to 4000 Hz, which resemble themselves at no other time, that begin at every multiple of `every` but 0."""
    time = np.arange(round(seconds * rate)) / rate
    phase = time % every
    wave = np.sin(2 * np.pi * (500 + 3500 * phase / 0.04) * phase) * np.sin(np.pi * phase / 0.02)
    return (0.8 * wave * (phase < 0.02) * (time >= every))[None].astype(np.float32)


def film(
    sound: np.ndarray,
    rate: int,
    codec: str = "aac",
    kind: str = "mp4",
    frames: int = 24,
    shown_at: float = 0.0,
    heard_at: float = 0.0,
) -> bytes:
    """A counting video at 8 fps whose first frame is shown, and whose sound begins, at a time of the file's clock."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        video = container.add_stream("libx264", rate=8, options={"crf": "12"})
        video.height, video.width, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="mono" if len(sound) == 1 else "stereo")
        for number, pixels in enumerate(counting_video(frames)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts, picture.time_base = round((shown_at + number / 8) * 1000), Fraction(1, 1000)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout=audio.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(heard_at * rate), Fraction(1, rate)
        resampler = av.AudioResampler(
            format=audio.format.name, layout=audio.layout.name, rate=rate, frame_size=audio.frame_size or 1024
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))
    return out.getvalue()


@pytest.mark.parametrize(("codec", "kind"), [("pcm_s16le", "mov"), ("pcm_f32le", "mov"), ("flac", "mp4")])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("wanted", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("start", [0.0, 0.31, 1.7])
def test_samples_are_where_they_sound(codec: str, kind: str, rate: int, wanted: int, start: float) -> None:
    found = decode_audio(
        film(tone(0, 3, rate), rate, codec, kind), AudioFormat(wanted), start_seconds=start, seconds=1.0, origin=0.0
    )
    assert found is not None and found.shape == (1, wanted) and found.dtype == np.float32
    # half a sample of the source is how far a start between two of its samples may be off
    slack = 0.5 * 2 * np.pi * TONE * 0.5 / rate + 2e-3
    inside = slice(200 if start == 0 else 0, None)  # a tone that begins at once is not what a filter can follow
    assert np.abs(found - tone(start, 1.0, wanted))[:, inside].max() < slack


@pytest.mark.parametrize(
    ("codec", "kind"),
    [("aac", "mp4"), ("libmp3lame", "mp4"), ("libopus", "matroska"), ("flac", "matroska"), ("pcm_s16le", "matroska")],
)
@pytest.mark.parametrize("start", [0.0, 0.4, 1.55])
def test_lossy_sound_and_coarse_clocks_are_aligned(codec: str, kind: str, start: float) -> None:
    rate = 48_000
    found = decode_audio(
        film(chirps(3, rate), rate, codec, kind), AudioFormat(16_000), start_seconds=start, seconds=1.2, origin=0.0
    )
    assert found is not None
    true = chirps(3, 16_000)[:, round(start * 16_000) :][:, : found.shape[1]]
    shifts = range(-200, 201)
    best = max(shifts, key=lambda shift: float((np.roll(found, shift, axis=1) * true).sum()))
    assert abs(best) <= 16  # 1 ms, which is the step of Matroska's clock
    if codec in ("flac", "pcm_s16le"):  # no gaps and no doubled samples between its pieces
        here = np.roll(found, best, axis=1)[:, 100:-100]
        assert np.abs(here - true[:, 100 : 100 + here.shape[1]]).max() < 0.3


def test_time_counts_from_the_first_frame() -> None:
    """Clips of longer films keep the film's clock, and a sound may begin before or after the pictures."""
    for shown_at, heard_at in ((5.0, 5.0), (5.0, 4.5), (5.0, 5.5), (0.0, 1.0)):
        data = film(tone(heard_at - shown_at, 3, 16_000), 16_000, "pcm_f32le", "matroska", shown_at=shown_at, heard_at=heard_at)
        found = decode_audio(data, AudioFormat(16_000), start_seconds=0.75, seconds=1.0, origin=shown_at)
        assert found is not None
        expected = tone(0.75, 1.0, 16_000)
        expected[:, : max(0, round((heard_at - shown_at - 0.75) * 16_000))] = 0  # nothing is heard yet
        assert np.abs(found - expected).max() < 1e-3


def test_channels_are_mixed_and_doubled() -> None:
    two, one = (
        film(tone(0, 2, 16_000, 2), 16_000, "pcm_f32le", "matroska"),
        film(tone(0, 2, 16_000), 16_000, "pcm_f32le", "matroska"),
    )
    mixed = decode_audio(two, AudioFormat(16_000), start_seconds=0.5, seconds=1)
    doubled = decode_audio(one, AudioFormat(16_000, 2), start_seconds=0.5, seconds=1)
    both = decode_audio(two, AudioFormat(16_000, 2), start_seconds=0.5, seconds=1)
    assert mixed is not None and doubled is not None and both is not None
    assert np.abs(mixed).max() < 1e-4  # the two are each other's opposite
    assert np.abs(doubled[0] - doubled[1]).max() < 1e-4 and np.abs(doubled).max() > 0.3
    assert np.abs(both - tone(0.5, 1, 16_000, 2)).max() < 1e-3


def test_what_is_not_there_is_silence() -> None:
    short = film(tone(0, 1, 16_000), 16_000, "pcm_f32le", "matroska")
    found = decode_audio(short, AudioFormat(16_000), start_seconds=0.5, seconds=2)
    assert found is not None and found.shape == (1, 32_000)
    assert np.abs(found[:, :8000] - tone(0.5, 0.5, 16_000)).max() < 1e-3 and not found[:, 8010:].any()
    assert decode_audio(encode_mp4(counting_video(9), 8), AudioFormat(16_000), start_seconds=0, seconds=1) is None


def test_sound_that_does_not_decode_is_an_error() -> None:
    for data in (b"", b"\0" * 500, b"hello" * 100):
        with pytest.raises(AudioError):
            decode_audio(data, AudioFormat(16_000), start_seconds=0, seconds=1)
    for rate, channels in ((0, 1), (2**21, 1), (16_000, 0), (16_000, 3)):
        with pytest.raises(ValueError, match=r"data\.audio_"):
            AudioFormat(rate, channels)


def wav(sound: np.ndarray, rate: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound, format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return out.getvalue()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_bring_the_sound_of_their_clips(tmp_path: Path, num_workers: int) -> None:
    """Of the film, of a member beside it, and none; at a place in the source that another visit changes, and again from the cache."""
    rate = 16_000
    write_shard(
        tmp_path / "0.tar",
        [
            {"__key__": "own", "mp4": film(tone(0, 3, rate), rate, "flac", "mp4"), "txt": "own"},
            {"__key__": "beside", "mp4": encode_mp4(counting_video(24), 8), "wav": wav(tone(0, 3, rate), rate), "txt": "beside"},
            {"__key__": "none", "mp4": encode_mp4(counting_video(9), 8), "txt": "none"},
            {"__key__": "exact", "mp4": film(tone(0, 1.125, rate), rate, "flac", "mp4", frames=9), "txt": "exact"},
        ],
    )
    loader = ClipLoader(f"{tmp_path}/*.tar", 4, 9, 32, 32, 8, decoder="pyav", num_workers=num_workers, audio_rate=rate)
    batches, starts = loader.batches(), set()
    for _ in range(6):
        batch = next(batches)
        assert batch.audio is not None and batch.has_audio is not None and batch.audio_rate == rate
        assert batch.audio.shape == (4, 1, round(9 / 8 * rate)) and batch.weights.tolist() == [1] * 4
        for row, caption in enumerate(batch.captions):
            start = float(batch.starts[row])
            expected = tone(start, 9 / 8, rate) * (caption != "none")
            assert np.abs(batch.audio[row].numpy() - expected).max() < 0.1  # half a sample at 16 kHz is 0.04 of this tone
            assert bool(batch.has_audio[row]) == (caption != "none")
            starts.add((caption, round(start, 6)))
        first = next(batch.micro_batches())
        assert first.audio is not None and first.audio_rate == rate and bool((first.to("cpu").audio == batch.audio).all())
    assert sum(caption == "own" for caption, _ in starts) == 6 and ("exact", 0.0) in starts


def test_without_being_asked_no_sound_is_decoded(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "mp4": film(tone(0, 1.125, 16_000), 16_000, frames=9), "txt": "a"}])
    (batch,) = list(ClipLoader(f"{tmp_path}/*.tar", 1, 9, 32, 32, 8, decoder="pyav").one_pass())
    assert batch.audio is None and batch.has_audio is None and batch.to("cpu").audio is None


def test_a_lossy_member_beside_a_film_begins_with_it(tmp_path: Path) -> None:
    out, sound = io.BytesIO(), chirps(3, 48_000)
    with av.open(out, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=48_000, frame_size=1152)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    write_shard(
        tmp_path / "0.tar", [{"__key__": "a", "mp4": encode_mp4(counting_video(9), 8), "mp3": out.getvalue(), "txt": "a"}]
    )
    (batch,) = list(ClipLoader(f"{tmp_path}/*.tar", 1, 9, 32, 32, 8, decoder="pyav", audio_rate=16_000).one_pass())
    assert batch.audio is not None
    found, true = batch.audio[0].numpy(), chirps(3, 16_000)[:, :18_000]
    assert abs(max(range(-500, 501), key=lambda shift: float((np.roll(found, shift, axis=1) * true).sum()))) <= 16


def test_a_check_decodes_sound_where_it_is_asked_to(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "mp4": encode_mp4(counting_video(9), 8), "wav": b"junk" * 99, "txt": "a"}])
    check_shards(f"{tmp_path}/0.tar", workers=0)
    with pytest.raises(BadDataError, match="1 of 1 clips are bad"):
        check_shards(f"{tmp_path}/0.tar", workers=0, audio=True)
