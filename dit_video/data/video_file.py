"""Videos and images as files: frames to mp4 and back, and contact sheets for the eye."""

import io
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_COVER_PIXELS = 2**26  # of a picture that is made to cover a frame, before it is cut

Video = UInt8[np.ndarray, "T H W 3"]


def encode_mp4(video: Video, fps: float, crf: int = 12, preset: str = "veryfast") -> bytes:
    """A video as the bytes of an H.264 mp4 (yuv420p, BT.601), the same bytes for the same video.

    ValueError where the frames are not uint8 `T H W 3`, or height or width is odd, which 4:2:0 chroma cannot hold.
    """
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or len(video) == 0:
        raise ValueError(f"an mp4 needs uint8 frames of T H W 3, got {video.dtype} {video.shape}")
    if fps <= 0:
        raise ValueError(f"an mp4 needs a positive frame rate, got {fps}; set fps")
    for name, size in (("height", video.shape[1]), ("width", video.shape[2])):
        if size % 2:
            raise ValueError(f"H.264 in yuv420p needs an even {name}, got {size}; set {name} to {size + 1} or {size - 1}")
    out = io.BytesIO()
    reformatter = VideoReformatter()
    with av.open(out, "w", format="mp4") as container:
        # zerolatency: no B-frames and no lookahead, which on short clips is faster and no larger, and keeps timestamps plain
        options = {"crf": str(crf), "preset": preset, "tune": "zerolatency"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10000), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
        stream.codec_context.thread_count = 1  # threads change the bits, and cost more than they give on short clips
        for pts, pixels in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", threads=1)
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def write_mp4(path: Path | str, video: Video, fps: float) -> None:
    """Writes a video as mp4 (see encode_mp4); the file appears complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(encode_mp4(video, fps))
    os.replace(partial, path)


def read_video(source: Path | str | bytes) -> tuple[Video, float]:
    """Every frame of a video file (or its bytes) and its average frame rate; ValueError where there is none to read."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            if not container.streams.video:
                raise ValueError(f"{name}: no video stream in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            reformatter = (
                VideoReformatter()
            )  # by itself PyAV starts threads for each frame, which costs more than small frames do
            frames = [reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in container.decode(stream)]
            rate = stream.average_rate
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{name}: no frame in it can be decoded")
    return np.stack(frames), float(rate or 1)


def cover_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) with the source's aspect, rounded, that just covers height x width."""
    scale = max(height / source_height, width / source_width)
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def centre_crop(video: UInt8[np.ndarray, "... H W 3"], height: int, width: int) -> UInt8[np.ndarray, "... height width 3"]:
    """The middle height x width of frames at least that large."""
    top, left = (video.shape[-3] - height) // 2, (video.shape[-2] - width) // 2
    return video[..., top : top + height, left : left + width, :]


def read_image(source: Path | str | bytes, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """An image file (or its bytes) resized to cover height x width and cut at the centre; ValueError where it is no image."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image = _as_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise ValueError(f"{name}: there is no such image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    new_height, new_width = cover_size(image.height, image.width, height, width)
    if new_height * new_width > MAX_COVER_PIXELS:
        raise ValueError(f"{name}: {image.width} x {image.height} is too long and thin to cover {width} x {height}")
    resized = image if image.size == (new_width, new_height) else image.resize((new_width, new_height), Image.Resampling.LANCZOS)
    return centre_crop(np.array(resized), height, width)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Red, green and blue of 8 bits: what is transparent lies on white, and 16 bits become 8; ValueError where brightness has no scale."""
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError(f"an image of mode {image.mode} does not say which value is white")
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray((np.asarray(image).astype(np.uint32).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def _strip(video: Video, num_frames: int, scale: int) -> Image.Image:
    """Evenly spaced frames of a clip, first and last among them, side by side with a gap of 2 pixels."""
    chosen = video[np.unique(np.linspace(0, len(video) - 1, num_frames).round().astype(int))]
    large = chosen.repeat(scale, axis=1).repeat(scale, axis=2)
    gapped = np.pad(large, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(gapped), axis=1)[:, :-2])


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int) -> list[str]:
    """Words broken into at most max_lines lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    kept = lines[:max_lines]
    for i, line in enumerate(kept):
        cut = (i == max_lines - 1 and len(lines) > max_lines) or font.getlength(line) > width
        while cut and line and font.getlength(line + "…") > width:
            line = line[:-1]
        kept[i] = line + "…" if cut else line
    return kept


def contact_sheet(
    videos: Sequence[Video],
    captions: Sequence[str],
    path: Path | str,
    columns: int = 2,
    frames_per_clip: int = 5,
    scale: int | None = None,
) -> None:
    """Writes a PNG with a strip of evenly spaced frames per clip and its caption under it, in `columns` columns.

    Pixels are repeated `scale` times, never smoothed; None makes small frames about 96 pixels high.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(f"a contact sheet needs a caption for each clip, got {len(videos)} clips and {len(captions)} captions")
    scale = scale or max(1, round(96 / max(video.shape[1] for video in videos)))
    font = ImageFont.load_default(size=13)
    line_height, margin, max_lines = 17, 10, 3
    strips = [_strip(video, frames_per_clip, scale) for video in videos]
    width, height = max(strip.width for strip in strips), max(strip.height for strip in strips)
    texts = [_wrap(caption, font, width, max_lines) for caption in captions]
    cell_width, cell_height = width + margin, height + max(len(text) for text in texts) * line_height + margin
    columns = min(columns, len(strips))
    sheet = Image.new("RGB", (columns * cell_width + margin, math.ceil(len(strips) / columns) * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (strip, text) in enumerate(zip(strips, texts, strict=True)):
        left, top = margin + i % columns * cell_width, margin + i // columns * cell_height
        sheet.paste(strip, (left, top))
        draw.multiline_text((left, top + height + 2), "\n".join(text), fill="black", font=font, spacing=2)
    sheet.save(path, format="PNG")
