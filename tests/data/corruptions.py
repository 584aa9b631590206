"""Ways in which a shard comes to harm, and which of its clips are lost by each; shared by the tests and by what the issue must show."""

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Files = list[tuple[tarfile.TarInfo, bytes]]


@dataclass(frozen=True)
class Corruption:
    """Changes a shard at clip `at`; `lost` says which of `count` clips are then gone where an index was made before."""

    change: Callable[[Path, int], None]
    lost: Callable[[int, int], set[int]]


def _files(path: Path) -> Files:
    with tarfile.open(path) as tar:
        return [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]


def _write(path: Path, files: Files) -> None:
    with tarfile.open(path, "w") as tar:
        for header, data in files:
            header.pax_headers = {}
            tar.addfile(header, io.BytesIO(data))


def _find(path: Path, at: int, extension: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return [header for header in tar.getmembers() if header.name.endswith("." + extension)][at]


def _rewrite(change: Callable[[Files, str], Files]) -> Callable[[Path, int], None]:
    def apply(path: Path, at: int) -> None:
        stem = _find(path, at, "mp4").name.removesuffix(".mp4")
        _write(path, change(_files(path), stem))

    return apply


def _bytes(change: Callable[[bytearray, Path, int], bytes]) -> Callable[[Path, int], None]:
    def apply(path: Path, at: int) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), path, at))

    return apply


def _flip(extension: str) -> Callable[[bytearray, Path, int], bytes]:
    def change(data: bytearray, path: Path, at: int) -> bytes:
        header = _find(path, at, extension)
        data[header.offset_data + header.size // 2] ^= 4
        return bytes(data)

    return change


def _overwrite_header(data: bytearray, path: Path, at: int) -> bytes:
    start = _find(path, at, "mp4").offset_data - 512
    data[start : start + 300] = b"\xaa" * 300
    return bytes(data)


def _rename(files: Files, stem: str) -> Files:
    for header, _ in files:
        if header.name == f"{stem}.mp4":
            header.name = f"../{stem}.mp4"
    return files


def _link(files: Files, stem: str) -> Files:
    for number, (header, _) in enumerate(files):
        if header.name == f"{stem}.mp4":
            header.type, header.linkname, header.size = tarfile.SYMTYPE, "/etc/passwd", 0
            files[number] = (header, b"")
    return files


def _twice(files: Files, stem: str) -> Files:
    copies = [(tarfile.TarInfo(header.name), b"other bytes") for header, _ in files if header.name.startswith(stem + ".")]
    for header, data in copies:
        header.size = len(data)
    return files + copies


def _after(at: int, count: int) -> set[int]:
    return set(range(at, count))


def _one(at: int, count: int) -> set[int]:
    return {at}


def _none(at: int, count: int) -> set[int]:
    return set()


def _all(at: int, count: int) -> set[int]:
    return set(range(count))


CORRUPTIONS = {
    "cut at a member boundary": Corruption(_bytes(lambda d, path, at: bytes(d[: _first(path, at)])), _after),
    "cut inside a member": Corruption(_bytes(lambda d, path, at: bytes(d[: _find(path, at, "mp4").offset_data + 100])), _after),
    "header overwritten": Corruption(_bytes(_overwrite_header), _none),
    "bit flipped in video": Corruption(_bytes(_flip("mp4")), _one),
    "bit flipped in caption": Corruption(_bytes(_flip("txt")), _one),
    "zero length": Corruption(_bytes(lambda d, path, at: b""), _all),
    "members out of order": Corruption(
        _rewrite(lambda files, stem: sorted(files, key=lambda file: file[0].name == f"{stem}.txt")), _none
    ),
    "caption missing": Corruption(_rewrite(lambda files, stem: [file for file in files if file[0].name != f"{stem}.txt"]), _one),
    "duplicate key": Corruption(_rewrite(_twice), _none),
    "gzip disguised as tar": Corruption(_bytes(lambda d, path, at: gzip.compress(bytes(d))), _all),
    "symlink member": Corruption(_rewrite(_link), _one),
    "../ key": Corruption(_rewrite(_rename), _none),
}


def _first(path: Path, at: int) -> int:
    """Where the header of the first member of a clip lies."""
    stem = _find(path, at, "mp4").name.removesuffix(".mp4")
    with tarfile.open(path) as tar:
        return next(header.offset for header in tar.getmembers() if header.name.startswith(stem + "."))
