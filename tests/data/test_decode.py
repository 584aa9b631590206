import io
import struct

import av
import numpy as np
import pytest
from clip_files import counting_video, frame_numbers, mp4_at

from dit_video.data.decode import (
    DecodeError,
    Decoder,
    choose_frames,
    decode_all,
    decode_clip,
    has_decord,
    probe,
    why_no_torchcodec,
)
from dit_video.data.video_file import encode_mp4, read_video

DECODERS: list[Decoder] = [
    "pyav", *(["decord"] if has_decord() else []), *(["torchcodec"] if why_no_torchcodec() is None else [])
]  # fmt: skip

each = pytest.mark.parametrize("decoder", DECODERS)


@each
@pytest.mark.parametrize("source_fps", [8, 12, 16, 23.976, 24, 25, 30, 50, 60])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_frames_are_the_nearest_in_time(decoder: Decoder, source_fps: float, start: float) -> None:
    data = encode_mp4(counting_video(round(1.6 * source_fps) + 2), source_fps)
    video = decode_clip(data, num_frames=9, fps=8, height=32, width=32, start_seconds=start, decoder=decoder).video
    assert video.shape == (9, 32, 32, 3) and video.dtype == np.uint8
    wanted = (start + np.arange(9) / 8) * source_fps
    assert np.abs(np.array(frame_numbers(video)) % 64 - wanted % 64).max() <= 0.5 + 1e-3


@each
@pytest.mark.parametrize("b_frames", [0, 3])
def test_changing_frame_rates_follow_the_timestamps(decoder: Decoder, b_frames: int) -> None:
    seconds = np.cumsum([0.0] + [0.02] * 20 + [0.3] * 3 + [0.05] * 20)
    data = mp4_at(seconds.tolist(), b_frames=b_frames)
    assert probe(data).times == pytest.approx(seconds, abs=2e-3)
    video = decode_clip(data, num_frames=12, fps=8, height=32, width=32, start_seconds=0.2, decoder=decoder).video
    nearest = [int(np.abs(seconds - (0.2 + i / 8)).argmin()) for i in range(12)]
    assert frame_numbers(video) == nearest


@each
def test_a_slower_source_repeats_frames(decoder: Decoder) -> None:
    data = encode_mp4(counting_video(6), 4)
    video = decode_clip(data, num_frames=9, fps=8, height=32, width=32, decoder=decoder).video
    assert frame_numbers(video) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_the_earlier_of_two_equally_near_frames_is_chosen() -> None:
    times = np.arange(6) * 0.1
    assert choose_frames(times, np.array([0.0, 0.05, 0.15, 0.16, 0.5, 9.0, -1.0])).tolist() == [0, 0, 1, 2, 5, 5, 0]
    assert choose_frames(times[:1], np.array([0.0, 5.0])).tolist() == [0, 0]


def test_all_decoders_give_the_same_pixels() -> None:
    rng = np.random.default_rng(0)
    video = np.kron(rng.integers(0, 256, (40, 6, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    data = encode_mp4(video, 24)
    for start in (0.0, 0.41, 0.54):
        clips = [
            decode_clip(data, num_frames=9, fps=8, height=48, width=64, start_seconds=start, decoder=decoder).video
            for decoder in DECODERS
        ]
        assert all((clips[0] == clip).all() for clip in clips[1:])


def test_all_decoders_resize_alike() -> None:
    rows, columns = np.mgrid[0:96, 0:128] / 10
    waves = np.stack([np.sin(rows + i / 3) + np.cos(columns) for i in range(9)])
    data = encode_mp4(np.repeat(127 + 60 * waves[..., None], 3, axis=-1).astype(np.uint8), 8)
    for height, width in ((24, 26), (48, 48), (96, 64)):
        clips = [
            decode_clip(data, num_frames=9, fps=8, height=height, width=width, decoder=decoder).video.astype(int)
            for decoder in DECODERS
        ]
        for decoder, clip in zip(DECODERS, clips, strict=True):  # torchcodec turns pixels into RGB first, and resizes then
            assert np.abs(clips[0] - clip).mean() < (2 if decoder == "torchcodec" else 0.5), decoder


@each
def test_frames_are_those_of_a_sequential_read(decoder: Decoder) -> None:
    data = mp4_at((np.arange(60) / 24).tolist(), b_frames=3)
    everything, _ = read_video(data)
    video = decode_clip(data, num_frames=8, fps=24, height=32, width=32, start_seconds=1.25, decoder=decoder).video
    assert (video == everything[30:38]).all()


@each
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (20, 48), (48, 20), (24, 24), (64, 72)])
def test_resizing_keeps_aspect_and_middle(decoder: Decoder, height: int, width: int) -> None:
    video = np.zeros((9, 32, 64, 3), np.uint8)
    video[:, 12:20, 28:36] = 255  # a square in the middle stays a square in the middle
    clip = decode_clip(encode_mp4(video, 8), num_frames=9, fps=8, height=height, width=width, decoder=decoder).video
    assert clip.shape == (9, height, width, 3)
    rows, columns = np.nonzero(clip[0, :, :, 0] > 127)
    assert abs(rows.mean() - (height - 1) / 2) < 0.6 and abs(columns.mean() - (width - 1) / 2) < 0.6
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


@each
def test_a_rotated_source_is_shown_upright(decoder: Decoder) -> None:
    video = np.zeros((9, 32, 64, 3), np.uint8)
    video[:, :8] = 255
    data = encode_mp4(video, 8)
    matrix = data.index(b"tkhd") + 44
    turned = data[:matrix] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 * 65536, 0, 0x40000000) + data[matrix + 36 :]
    clip = decode_clip(turned, num_frames=9, fps=8, height=64, width=32, decoder=decoder).video
    assert clip[:, :, -6:].min() > 200 and clip[:, :, :20].max() < 50  # the top is now at the right


@each
def test_a_clip_of_just_the_length_fits_and_a_longer_one_does_not(decoder: Decoder) -> None:
    data = encode_mp4(counting_video(9), 8)
    assert frame_numbers(decode_clip(data, num_frames=9, fps=8, height=32, width=32, decoder=decoder).video) == list(range(9))
    with pytest.raises(DecodeError, match="too short"):
        decode_clip(data, num_frames=11, fps=8, height=32, width=32, decoder=decoder)
    with pytest.raises(DecodeError, match="too short"):
        decode_clip(data, num_frames=9, fps=8, height=32, width=32, start_seconds=0.2, decoder=decoder)
    almost = encode_mp4(counting_video(34), 30)  # 1.133 s; the last of ten frames at 8 fps would begin at 1.125 s
    with pytest.raises(DecodeError, match="too short"):
        decode_clip(almost, num_frames=10, fps=8, height=32, width=32, decoder=decoder)
    assert len(decode_clip(almost, num_frames=9, fps=8, height=32, width=32, decoder=decoder).video) == 9


@each
def test_a_chosen_start_is_given_the_room_there_is(decoder: Decoder) -> None:
    data = encode_mp4(counting_video(33), 8)
    rooms = []

    def last(room: float) -> float:
        rooms.append(room)
        return room

    clip = decode_clip(data, num_frames=9, fps=8, height=32, width=32, start_seconds=last, decoder=decoder).video
    assert rooms == [pytest.approx(3.0)] and frame_numbers(clip) == list(range(24, 33))


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


@each
def test_what_holds_no_video_is_a_decode_error(decoder: Decoder) -> None:
    whole = encode_mp4(counting_video(9), 8)
    for data in (b"", b"\0" * 500, b"hello" * 100, whole[: len(whole) // 3], whole[: len(whole) * 2 // 3], audio_only()):
        with pytest.raises(DecodeError):
            decode_clip(data, num_frames=9, fps=8, height=32, width=32, decoder=decoder)


def test_pyav_notices_a_damaged_frame() -> None:
    rng = np.random.default_rng(0)
    video = np.kron(rng.integers(0, 256, (9, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    data = bytearray(encode_mp4(video, 8))
    start = data.index(b"mdat")
    data[start + 1500 : start + 1700] = b"\xff" * 200
    with pytest.raises(DecodeError):
        decode_clip(bytes(data), num_frames=9, fps=8, height=32, width=32, decoder="pyav")


@each
def test_broken_bytes_end_in_a_clip_or_a_decode_error(decoder: Decoder) -> None:
    rng = np.random.default_rng(0)
    whole = mp4_at((np.arange(30) / 24).tolist(), b_frames=2)
    for trial in range(250):
        data = bytearray(whole)
        first, last = sorted(rng.integers(0, len(data) + 1, 2))
        match trial % 4:
            case 0:
                del data[first:]
            case 1:
                del data[first:last]
            case 2:
                data[first:last] = rng.bytes(last - first)
            case 3:
                for place in rng.integers(0, len(data), 8):
                    data[place] ^= 1 << int(rng.integers(0, 8))
        try:
            clip = decode_clip(bytes(data), num_frames=9, fps=8, height=32, width=32, decoder=decoder).video
        except DecodeError:
            continue
        assert clip.shape == (9, 32, 32, 3)


def older_film(codec: str, kind: str, num_frames: int = 60, b_frames: int = 2) -> bytes:
    """A counting video at 24 fps as older programs write it."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=24, options={"bf": str(b_frames), "qscale": "2", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for number, pixels in enumerate(counting_video(num_frames, 64, 64)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


@each
@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        ("mpeg4", "avi"),
        ("mpeg4", "mp4"),
        ("mpeg4", "matroska"),
        ("mpeg2video", "matroska"),
        ("libx264", "avi"),
        ("mpeg2video", "mpegts"),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.375])
def test_older_films_give_the_frames_of_their_times(decoder: Decoder, codec: str, kind: str, start: float) -> None:
    """AVI tells when frames are decoded, not when they are shown; and of older codecs decord counts frames otherwise."""
    clip = decode_clip(older_film(codec, kind), num_frames=9, fps=8, height=64, width=64, start_seconds=start, decoder=decoder)
    wanted = 24 * start + 3 * np.arange(9)
    assert np.abs(np.array(frame_numbers(clip.video)) - wanted).max() <= 1  # what coding does to greys
    assert decode_all(older_film(codec, kind)) == 60
