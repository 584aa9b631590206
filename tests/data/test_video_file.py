import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_video.data.video_file import centre_crop, contact_sheet, cover_size, encode_mp4, read_image, read_video, write_mp4


def moving_square(num_frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    video = np.full((num_frames, height, width, 3), 230, np.uint8)
    for i in range(num_frames):
        video[i, 8:20, 2 * i : 2 * i + 12] = (200, 30, 40)
    return video


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps"), [(1, 32, 32, 8), (9, 32, 48, 8), (17, 64, 34, 23.976), (3, 2, 2, 30)]
)
def test_mp4_round_trip_keeps_count_size_rate_and_pixels(num_frames: int, height: int, width: int, fps: float) -> None:
    video = moving_square(num_frames, 64, 64)[:, :height, :width]
    decoded, decoded_fps = read_video(encode_mp4(video, fps))
    assert decoded.shape == video.shape and decoded.dtype == np.uint8
    assert decoded_fps == pytest.approx(fps, rel=1e-3)
    assert np.abs(decoded.astype(int) - video).mean() < 4


def test_the_same_video_gives_the_same_bytes(tmp_path: Path) -> None:
    video = moving_square()
    write_mp4(tmp_path / "a.mp4", video, 8)
    assert (tmp_path / "a.mp4").read_bytes() == encode_mp4(video, 8) == encode_mp4(video[:, :, :].copy(), 8.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (read_video(tmp_path / "a.mp4")[0] == read_video(encode_mp4(video, 8))[0]).all()


@pytest.mark.parametrize(
    ("shape", "word"),
    [((3, 31, 32, 3), "height"), ((3, 32, 33, 3), "width"), ((0, 32, 32, 3), "T H W 3"), ((32, 32, 3), "T H W 3")],
)
def test_frames_that_h264_cannot_hold_are_refused_by_name(shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        encode_mp4(np.zeros(shape, np.uint8), 8)


def test_other_types_and_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        encode_mp4(np.zeros((3, 32, 32, 3)), 8)
    with pytest.raises(ValueError, match="fps"):
        encode_mp4(np.zeros((3, 32, 32, 3), np.uint8), 0)


@pytest.mark.parametrize("data", [b"", b"not a video", bytes(1000)])
def test_what_is_no_video_or_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(data)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(data, 8, 8)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.png"):
        read_image(tmp_path / "none.png", 8, 8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (48, 32), (17, 5), (200, 300)])
def test_images_cover_the_frame_and_keep_their_middle(tmp_path: Path, height: int, width: int) -> None:
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[:, 60:] = 255  # black left, white right: the edge stays in the middle at any size
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    image = read_image(path, height, width)
    assert image.shape == (height, width, 3)
    assert image[:, 0].max() < 10 and image[:, -1].min() > 245
    assert abs(float(image.mean()) - 127.5) < 30


def test_an_image_of_the_right_size_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    assert (read_image(out.getvalue(), 20, 30) == pixels).all()


def test_cover_is_the_smallest_that_covers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        source_height, source_width, height, width = (int(size) for size in rng.integers(1, 500, 4))
        covered = cover_size(source_height, source_width, height, width)
        assert covered[0] >= height and covered[1] >= width and (covered[0] == height or covered[1] == width)
        assert centre_crop(np.zeros((*covered, 3), np.uint8), height, width).shape == (height, width, 3)


def test_a_contact_sheet_shows_first_and_last_frames_enlarged(tmp_path: Path) -> None:
    videos = [moving_square(9, 32, 32), moving_square(1, 16, 24), moving_square(33, 32, 48)]
    contact_sheet(videos, ["a red square moves right", "", "long words " * 80 + "日本"], tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.array(sheet.convert("RGB"))
    assert (pixels[10 : 10 + 96, 10 : 10 + 96] == videos[0][0].repeat(3, 0).repeat(3, 1)).all()
    left = 10 + 4 * (96 + 2)
    assert (pixels[10 : 10 + 96, left : left + 96] == videos[0][8].repeat(3, 0).repeat(3, 1)).all()
    caption = pixels[10 + 96 : 10 + 96 + 20, 10:200]
    assert caption.min() < 100  # the caption is drawn


def test_a_contact_sheet_needs_a_caption_for_each_clip(tmp_path: Path) -> None:
    for videos in ([], [moving_square()]):
        with pytest.raises(ValueError, match="caption"):
            contact_sheet(videos, [], tmp_path / "sheet.png")


def as_png(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_images_of_other_kinds_look_as_they_are_shown() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    deep = read_image(as_png(Image.fromarray(ramp)), 64, 64)
    assert np.abs(deep[..., 0] - ramp / 257).max() <= 1
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[..., 0], clear[:, 16:, 3] = 255, 255  # red, of which the left half is not to be seen
    shown = read_image(as_png(Image.fromarray(clear)), 32, 32)
    assert (shown[:, :16] == 255).all() and (shown[:, 16:] == [255, 0, 0]).all()
    assert (read_image(as_png(Image.fromarray(clear), "WEBP"), 32, 32)[:, :12] > 240).all()
    palette = Image.fromarray(clear).convert("RGB").convert("P")
    assert (read_image(as_png(palette), 32, 32) == [255, 0, 0]).mean() > 0.9


def test_an_image_that_no_frame_can_be_cut_from_is_refused() -> None:
    with pytest.raises(ValueError, match="too long and thin"):
        read_image(as_png(Image.new("L", (60_000, 1))), 256, 256)
    with pytest.raises(ValueError, match="which value is white"):
        read_image(as_png(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), 8, 8)
