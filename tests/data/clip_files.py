"""Real mp4s and tars whose every frame says which one it is."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from dit_video.data.video_file import encode_mp4


def counting_video(num_frames: int, height: int = 32, width: int = 32, first: int = 0) -> np.ndarray:
    """Frame i is grey of level 4 * (first + i), which survives H.264 and is read back by `frame_numbers`."""
    levels = (first + np.arange(num_frames)) * 4 % 256
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).astype(np.uint8)


def frame_numbers(video: np.ndarray) -> list[int]:
    return (video.mean(axis=(1, 2, 3)) / 4).round().astype(int).tolist()


def mp4_at(seconds: Sequence[float], height: int = 32, width: int = 32, b_frames: int = 0) -> bytes:
    """A counting video whose frames begin at the given times."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=100, options={"crf": "8", "g": "12", "bf": str(b_frames)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, second in zip(counting_video(len(seconds), height, width), seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def clip_sample(number: int, num_frames: int = 3) -> dict[str, object]:
    """A clip whose first frame says its number."""
    return {
        "__key__": f"{number:05d}",
        "mp4": encode_mp4(counting_video(num_frames, 16, 16, first=number), 8),
        "txt": f"clip number {number}",
        "json": {"number": number},
    }
