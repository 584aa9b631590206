"""Checks of disks, of locks on files, and of memory that processes share."""

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dit_video.data.pool import DecodePool, Failure
from dit_video.doctor.finding import Finding, Settings, size

GIB = 2**30
LEAST_FREE = GIB // 4  # in which three checkpoints of the smallest model fit
WANTED_FREE = {"runs": 10 * GIB, "temporary": GIB}
WRITTEN = 2**26  # bytes, to measure with
SLOW = 50 * 2**20  # bytes a second
LONG_NAME = 200  # characters; a trial of a sweep has a folder named by its overrides
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p", "afs",
    "wekafs", "panfs", "pvfs2", "orangefs", "fuse.gcsfuse", "fuse.s3fs", "fuse.juicefs", "fuse.mount-s3", "virtiofs",
}  # fmt: skip
VANISHING = {"overlay": "with the container", "tmpfs": "at a restart", "ramfs": "at a restart"}
SHARED_BYTES = 2**26
JOB_BYTES, JOBS = 2**24, 16  # together what a loader's pool may hold at the most, loader.AHEAD_BYTES
NCCL_BYTES = GIB  # of /dev/shm, which processes of several GPUs on one machine talk through

TRY_LOCK = """
import fcntl, sys, time
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        print("refused", flush=True)
    else:
        print("taken", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def disk(settings: Settings) -> Finding:
    """The disk of the runs: room, speed, and what a checkpoint needs of it."""
    return _disk(Path(settings.runs), Path(settings.beside), "runs", "set runs to a folder on another disk")


def temporary(settings: Settings) -> Finding:
    """The disk of temporary files."""
    asked = settings.asked_temporary
    passed_over = bool(asked) and Path(asked).absolute() != Path(settings.temporary).absolute()
    refused = [f"TMPDIR={asked} cannot be written and is passed over"] if passed_over else []
    return _disk(Path(settings.temporary), Path(settings.scratch) / "disk", "temporary", "set TMPDIR to another folder", refused)


def _disk(folder: Path, own: Path, kind: str, elsewhere: str, known: Sequence[str] = ()) -> Finding:
    about, warnings = f"{folder} ({file_system(folder)})", [*known]
    failures: list[str] = []
    if kind == "runs" and (when := VANISHING.get(file_system(folder))):
        warnings.append(f"what is written there is gone {when}")
    usage = shutil.disk_usage(folder)
    about += f", {size(usage.free)} of {size(usage.total)} free"
    if usage.free < WANTED_FREE[kind]:
        why = (
            "a run keeps two checkpoints and writes a third, of up to 16 bytes a parameter each"
            if kind == "runs"
            else "it is little"
        )
        (failures if usage.free < LEAST_FREE else warnings).append(f"{why}; make room")
    if hasattr(os, "statvfs") and (free := os.statvfs(folder)).f_files and free.f_favail < 10_000:
        warnings.append(f"only {free.f_favail} more files can be made in it")
    try:
        own.mkdir(exist_ok=True)
        try:
            speed = write_speed(own / "written")
            about += f", {size(speed)}/s written and flushed"
            if speed < SLOW:
                warnings.append(f"each GiB of a checkpoint takes {GIB / speed:.0f} s")
            failures += rename_problems(own)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    except OSError as error:
        about += f", and it cannot be written: {error.strerror or error}"
        if error.errno == errno.EFBIG:
            return Finding.of(about, failures=["raise the limit on the size of a file: ulimit -f unlimited"])
        room = {errno.ENOSPC: ["make room"], errno.EDQUOT: ["your quota is used up, make room"]}
        return Finding.of(about, failures=[*room.get(error.errno or 0, []), elsewhere])
    if warnings or failures:
        (warnings or failures).append(elsewhere)
    return Finding.of(about, warnings, failures)


def write_speed(path: Path) -> float:
    """Bytes a second, until they are on the disk."""
    piece = os.urandom(2**20)  # what cannot be compressed
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(WRITTEN // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    if path.stat().st_size != WRITTEN:
        raise OSError(errno.EIO, f"{path.stat().st_size} bytes are there of {WRITTEN} written")
    path.unlink()
    return WRITTEN / seconds


def rename_problems(folder: Path) -> list[str]:
    """What is wrong with the steps of a save: a folder is written, flushed and renamed, a file takes the place of another."""
    problems = []
    draft, final = folder / "draft", folder / "final"
    draft.mkdir()
    (draft / "file").write_bytes(b"new")
    try:
        descriptor = os.open(draft, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except OSError as error:
        problems.append(f"a folder cannot be flushed ({error.strerror})")
    draft.rename(final)
    (folder / "file").write_bytes(b"old")
    os.replace(final / "file", folder / "file")
    if draft.exists() or not final.is_dir() or (folder / "file").read_bytes() != b"new":
        problems.append("a rename does not put one in the place of the other at once, which a checkpoint relies on")
    try:
        (folder / ("n" * LONG_NAME)).touch()
    except OSError as error:
        problems.append(f"a name of {LONG_NAME} characters is refused ({error.strerror}), which a trial of a sweep may have")
    return problems


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of the file system of a folder, with a word where it is one of a network."""
    found = ("", "of a kind not known here")
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        if folder.resolve().is_relative_to(point) and len(point) >= len(found[0]):  # a later mount hides an earlier one
            found = (point, after.split()[0])
    return f"{found[1]}, of a network" if found[1] in NETWORK else found[1]


def locking(settings: Settings) -> Finding:
    """Whether a lock on a file in the runs' folder keeps another process out, and goes with the process that holds it."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        return Finding.of("not known here")
    beside, advice = (
        Path(settings.beside),
        "two jobs could train one run; mount it with locks (Lustre: -o flock), or set runs elsewhere",
    )
    path = beside / "lock"
    try:
        beside.mkdir(exist_ok=True)
        path.touch()
    except OSError as error:
        return Finding.of(f"{settings.runs} cannot be written ({error.strerror})", failures=["set runs to another folder"])
    try:
        with path.open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return Finding.of(f"{settings.runs} takes no locks ({error.strerror})", failures=[advice])
            kept_out = _try_lock(path)
            fcntl.lockf(file, fcntl.LOCK_UN)
            let_in = _try_lock(path)
            dead = _lock_of_the_dead(path)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if (kept_out, let_in, dead) != ("refused", "taken", "taken"):
        text = f"a second process's lock is {kept_out} while one is held, and {let_in} after that"
        return Finding.of(text, failures=[advice])
    return Finding.of("a lock on a file in runs keeps a second process out, and goes with a killed one")


def _try_lock(path: Path) -> str:
    command = [sys.executable, "-S", "-c", TRY_LOCK, str(path), "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or "an error"


def _lock_of_the_dead(path: Path) -> str:
    """What a process says that takes the lock; it is killed while it holds it."""
    command = [sys.executable, "-S", "-c", TRY_LOCK, str(path), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        process.kill()
    return said


def shared_memory(settings: Settings) -> Finding:
    """Memory between processes: decode workers fill some, and a segment of /dev/shm is made and written."""
    told: list[str] = []
    warnings: list[str] = []
    failures: list[str] = []
    if os.name == "posix":
        pool: DecodePool[int, int] = DecodePool(fill, 2, JOB_BYTES, timeout_seconds=30.0, memory_bytes=GIB)
        for result in pool.map(range(1, JOBS + 1)):
            if isinstance(result, Failure):
                failures.append(f"a decode worker failed ({result.reason}); set data.num_workers=0")
                break
            if not (result.pixels == result.job).all():
                failures.append("decode workers wrote something else than what is read; set data.num_workers=0")
                break
        else:
            told.append(f"2 decode workers filled {size(JOBS * JOB_BYTES)}, which is not of /dev/shm")
    else:
        told.append("decode workers need Linux or macOS; data.num_workers=0 works")
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding.of("; ".join([*told, "no /dev/shm"]), warnings, failures)
    usage = shutil.disk_usage(shm)
    told.append(f"/dev/shm {size(usage.free)} of {size(usage.total)} free")
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus > 1 and usage.total < NCCL_BYTES:
        warnings.append(f"NCCL between {gpus} GPUs wants {size(NCCL_BYTES)} of /dev/shm; docker run --shm-size=1g, or --ipc=host")
    wanted = min(SHARED_BYTES, usage.free // 2)
    if wanted < 2**20:
        warnings.append("/dev/shm is full; remove what is left in it, or docker run --shm-size=1g")
    else:
        try:
            _write_segment(wanted)
            told.append(f"a segment of {size(wanted)} written")
        except OSError as error:
            failures.append(f"no segment of {size(wanted)} can be made in it ({error.strerror}); docker run --shm-size=1g")
    return Finding.of("; ".join(told), warnings, failures)


def fill(job: int, out: UInt8[np.ndarray, " bytes"]) -> int:
    """What the workers of the pool do."""
    out[:] = job
    return job


def _write_segment(num_bytes: int) -> None:
    from multiprocessing.shared_memory import SharedMemory

    segment = SharedMemory(create=True, size=num_bytes)
    try:
        assert segment.buf is not None
        filled = np.frombuffer(segment.buf, np.uint8)
        filled[:] = 1
        del filled  # or the segment cannot be closed
    finally:
        segment.close()
        segment.unlink()
