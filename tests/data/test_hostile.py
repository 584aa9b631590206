"""Shards made to do harm: nothing in them is executed, unpacked or believed."""

import io
import pickle
import resource
import struct
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import clip_sample, counting_video, mp4_at

from dit_video.data import decode
from dit_video.data.decode import DecodeError, decode_clip, probe
from dit_video.data.files import expand_shards
from dit_video.data.index import write_index
from dit_video.data.loader import ClipLoader
from dit_video.data.shards import BadDataError, write_shard
from dit_video.data.video_file import encode_mp4
from dit_video.data_tools.check import check_shards

VIDEO = encode_mp4(counting_video(3, 16, 16), 8)


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def load_all(folder: Path, **changes: object) -> list:
    arguments = {"batch_size": 2, "num_frames": 3, "height": 16, "width": 16, "fps": 8, "decoder": "pyav", "max_bad_fraction": 1}
    return list(ClipLoader(f"{folder}/*.tar", **arguments | changes).one_pass())  # type: ignore[arg-type]


def test_an_address_that_runs_a_program_is_refused(tmp_path: Path) -> None:
    for url in (f"pipe:touch {tmp_path}/canary", f"PIPE:touch {tmp_path}/canary", f"pipe:touch {tmp_path}/canary; cat x.tar"):
        with pytest.raises(BadDataError, match=r"data\.shards"):
            expand_shards(url)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "mp4"])
def test_nothing_is_unpickled(tmp_path: Path, extension: str) -> None:
    bomb = pickle.dumps(Canary(tmp_path / "canary"))
    write_shard(tmp_path / "0.tar", [clip_sample(0) | {extension: bomb}, clip_sample(1)])
    weights = [batch.weights.tolist() for batch in load_all(tmp_path)]
    assert sorted(weights[0]) == ([0, 1] if extension == "mp4" else [1, 1])
    if extension == "mp4":
        with pytest.raises(BadDataError):
            check_shards(f"{tmp_path}/*.tar", workers=0)
    else:
        check_shards(f"{tmp_path}/*.tar", workers=0)
    write_index(tmp_path / "0.tar")
    assert not (tmp_path / "canary").exists()


def gzip_bomb(path: Path) -> None:
    """256 MiB of zeros, a thousandth of that on the disk."""
    with tarfile.open(path, "w:gz") as tar:
        header = tarfile.TarInfo("a.mp4")
        header.size = 2**28
        tar.addfile(header, Zeros(header.size))  # type: ignore[arg-type]


class Zeros(io.RawIOBase):
    """So many zeros, never all of them in memory."""

    def __init__(self, count: int) -> None:
        self.left = count

    def read(self, count: int = -1) -> bytes:
        taken = min(self.left, count)
        self.left -= taken
        return bytes(taken)


def test_a_compressed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    gzip_bomb(tmp_path / "0.tar")
    assert (tmp_path / "0.tar").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadDataError, match="gzip"):
        load_all(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # 64 MiB


def huge_frames(side: int) -> bytes:
    """An AVI of raw pictures whose header claims that they are side x side."""
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr24"
        for pixels in counting_video(3, 16, 16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="bgr24")))
    changed = bytearray(out.getvalue())
    at = changed.index(b"strf") + 12  # after the chunk's length and the header's own
    changed[at : at + 8] = struct.pack("<ii", side, side)
    return bytes(changed)


def test_a_header_of_huge_frames_or_hours_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):  # FFmpeg itself refuses it
        decode_clip(huge_frames(100_000), num_frames=3, fps=8, height=16, width=16)
    with monkeypatch.context() as patch, pytest.raises(DecodeError, match="16 x 16 are larger than 255 pixels"):
        patch.setattr(decode, "MAX_SOURCE_PIXELS", 255)
        probe(VIDEO)
    with pytest.raises(DecodeError, match="36000 s by its header"):
        probe(mp4_at([0, 0.1, 36_000]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # 64 MiB


def test_captions_that_are_huge_or_full_of_markup_stay_text(tmp_path: Path) -> None:
    html = "<script>alert(1)</script> a clip & more"
    huge = clip_sample(1) | {"txt": "word " * 2 * 2**20}
    write_shard(tmp_path / "0.tar", [clip_sample(0) | {"txt": html}, huge])
    (batch,) = load_all(tmp_path)
    assert sorted(zip(batch.captions, batch.weights.tolist(), strict=True)) == [("", 0), (html, 1)]


def shard_with_key(path: Path, key: str) -> None:
    """A clip of that key, and a good one."""
    with tarfile.open(path, "w") as tar:
        for name, data in ((f"{key}.mp4", VIDEO), (f"{key}.txt", b"x"), ("good.mp4", VIDEO), ("good.txt", b"y")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[2J", "../a", "/a", "a\x7f"])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, key: str) -> None:
    shard_with_key(tmp_path / "0.tar", key)
    shown = {key for batch in load_all(tmp_path) for key in batch.keys}
    assert shown == {"0.tar:good"}
