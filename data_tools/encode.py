"""Encodes captioned clips once: latents and text states of every clip, as shards that training reads in place of the videos."""

import fcntl
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as to_safetensors

from dit_video.build import check_whole, make, make_autoencoder, make_image_encoder, make_network, make_text
from dit_video.data.buckets import ClipShape
from dit_video.data.encoding import BYTES, IMAGE, LATENTS, NOTHING, TEXT, Encoding, note_of, read_note
from dit_video.data.errors import BadDataError
from dit_video.data.files import ShardFile, size_of
from dit_video.data.index import build, save
from dit_video.data.ledger import BadClip, Ledger
from dit_video.data.loader import ClipLoader
from dit_video.data.pool import DecodePool, Failure, Result
from dit_video.data.reader import ClipReader, Job, ReadClip
from dit_video.data.shards import Member, members_of, sidecar
from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.layers import initialise
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.text import TextEncoder
from dit_video.model.wan import given_then_grey
from dit_video.numbers import NoNumbersError
from dit_video.shapes import to_float
from dit_video.trainer.launch import passed_on

log = logging.getLogger(__name__)

NOTE, SKIPPED = "encoding.json", "skipped.jsonl"
RESERVED = ("num_frames", "height", "width", "fps", "start", "source")  # of a sample's json, which says what the clip is
_RECORD = 512  # bytes that members of a tar are filled up to


def main(config: DictConfig) -> None:
    """Encodes the shards of a config into a folder, by one process or several."""
    check_whole(config, 1, "processes", "views")
    check_whole(config, 0, "data.num_workers")
    if not str(config.out):
        raise ValueError("out is empty; set out to a folder")
    if config.processes > 1:
        _start(config.processes)
        return
    text = make_text(config)
    source = make(config.data, random_start=False, look=True)
    encode_shards(
        Path(config.out), source, make_autoencoder(config), text if text.is_frozen else None, config.dtype,
        config.logvar, config.views, config.device, make_network(config).takes_images, make_image_encoder(config),
    )  # fmt: skip


def _start(processes: int) -> None:
    """The same command several times, each process on a device of its own where there are several."""
    words = [word for word in sys.argv[1:] if not word.startswith("processes=")]
    with passed_on() as started:
        for number in range(processes):
            program = [sys.executable, "-m", "dit_video.cli", *words, "processes=1"]
            started.append(subprocess.Popen(program, env=os.environ | {"LOCAL_RANK": str(number)}))
        try:
            failed = [status for process in started if (status := process.wait())]
        finally:
            for process in started:
                process.terminate()
    if failed:
        raise SystemExit(failed[0] if failed[0] > 0 else 128 - failed[0])


@dataclass
class _Encoder:
    """What turns a clip that was read into a sample."""

    encoding: Encoding
    autoencoder: Autoencoder
    text: TextEncoder | None
    image_encoder: ImageEncoder | None
    device: torch.device

    def sample(self, key: str, clip: ReadClip, shape: ClipShape, video: np.ndarray) -> dict[str, bytes]:
        """The members of a sample, the last of them its json: a sample that has it is whole."""
        members = {field: caption.encode() for field, caption in clip.captions.items() if not field.startswith("json.")}
        if self.text is not None:
            members[TEXT] = self.states(clip.captions)
        members[LATENTS] = to_safetensors(self._latents(video), note_of(self.encoding, clip.start))
        if self.image_encoder is not None:
            states = self.image_encoder(torch.from_numpy(video[:1]).to(self.device))[0]
            found = {"0/image.states": states.to("cpu", self.image_encoder.kept)}
            members[IMAGE] = to_safetensors(_finite(found, "image_encoder.dtype=float32"), note_of(self.encoding))
        captions = {field.removeprefix("json."): caption for field, caption in clip.captions.items() if field.startswith("json.")}
        return members | {"json": json.dumps(vars(shape) | {"start": clip.start, **captions, "source": key}).encode()}

    def states(self, captions: Mapping[str, str]) -> bytes:
        """The states of captions, by field."""
        assert self.text is not None
        tensors: dict[str, torch.Tensor] = {}
        for field, caption in captions.items():
            found = self.text.states_of(caption)
            for number, each in enumerate((found, *found.others)):
                name = f"{number}/{field}"
                tensors[f"{name}.states"] = each.states.cpu().clone()  # two fields may say the same
                if each.pooled is not None:
                    tensors[f"{name}.pooled"] = each.pooled.cpu().clone()
        return to_safetensors(_finite(tensors, "text.dtype=float32"), note_of(self.encoding))

    @torch.no_grad()
    def _latents(self, video: np.ndarray) -> dict[str, torch.Tensor]:
        if isinstance(self.autoencoder, Pixels):
            return {"mean": torch.from_numpy(video)}
        dtype = getattr(torch, self.encoding.dtype)
        clip = to_float(torch.from_numpy(video)[None]).to(self.device)
        mean, logvar = self.autoencoder.encode_distribution(clip)
        if self.encoding.logvar and logvar is None:
            raise ValueError(f"{self.autoencoder.name} gives no variance; set logvar=false")
        found = {"mean": mean, "logvar": logvar if self.encoding.logvar else None, "known": None}
        if self.encoding.known:
            found["known"] = self.autoencoder.encode(given_then_grey(clip[:, :1], clip.shape[1]))
        kept = {name: tensor[0].to("cpu", dtype).contiguous() for name, tensor in found.items() if tensor is not None}
        return _finite(kept, "dtype=bfloat16, or autoencoder.dtype=float32")


def _finite(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """Tensors as they were given; NoNumbersError where a number is not finite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NoNumbersError(
                f"what was made of it is not finite in {str(tensor.dtype).rpartition('.')[2]}: {name}; set {key}"
            )
    return tensors


def encode_shards(
    out: Path,
    source: ClipLoader,
    autoencoder: Autoencoder,
    text: TextEncoder | None = None,
    dtype: str = "bfloat16",
    logvar: bool = False,
    views: int = 1,
    device: str | None = None,
    known: bool = False,
    image_encoder: ImageEncoder | None = None,
) -> None:
    """Writes, for every shard of a source, one of the same name with the latents and text states of its clips.

    Each clip is made into the shape of its bucket; of a source that lasts longer, `views` clips are taken, evenly spread. With `known` the
    latents of a clip's first frame with grey after it lie beside its own, with an image encoder what it says of that frame. Any number of
    processes, on any machines that share the folder, may be started alike: each takes shards that no other has. One that was cut off goes
    on after the last whole sample. What cannot be read, or made into finite numbers, is listed in skipped.jsonl, and more of it than
    the source's max_bad_fraction is a BadDataError. ValueError where the folder was made otherwise.
    """
    if logvar and isinstance(autoencoder, Pixels):
        raise ValueError("pixels have no variance; set logvar=false, or autoencoder")
    if dtype not in BYTES or dtype == "uint8":
        raise ValueError(f"latents are kept as float16, bfloat16 or float32, got {dtype!r}; set dtype")
    if source.encoding is not None:
        raise ValueError(f"{source.clips.shards[0]} holds latents already; set data.shards to videos")
    if source.audio is not None:
        raise ValueError("shards of latents hold no sound; set data.audio_rate=null")
    assert isinstance(source.reader, ClipReader)
    for field in source.fields:
        if field == "json" or field.removeprefix("json.") in RESERVED:
            raise ValueError(
                f"a caption's field {field} is taken by what a sample says of its clip; set data.captions to other names"
            )
    autoencoder.check()
    if image_encoder is not None:
        image_encoder.check()
    if autoencoder.can_decode:
        for shape in source.shapes:
            autoencoder.check_clip(shape.num_frames, shape.height, shape.width)
    encoding = Encoding(
        autoencoder.name, autoencoder.compression, autoencoder.channels, "uint8" if isinstance(autoencoder, Pixels) else dtype,
        logvar, known, None if text is None else text.name,
        f"{source.reader.decoder}, {'from the beginning' if views == 1 else f'{views} views'}, {', '.join(map(str, source.shapes))}",
        None if image_encoder is None else image_encoder.name,
        (0, 0) if image_encoder is None else (image_encoder.tokens, image_encoder.dim),
        () if text is None else _widths(text), tuple(sorted(source.fields)),
    )  # fmt: skip
    names = [_name(shard) for shard in source.clips.shards]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two shards are called {twice}; encode them into folders of their own")
    if text is not None:
        text.check()
    _claim(out, encoding, source)
    source.report.log()
    encoder = _Encoder(encoding, autoencoder, text, image_encoder, _device(device))
    if text is not None:
        initialise(text, 0)  # its learned null caption, which is not written
        text.to(encoder.device)
        _write(out / NOTHING, encoder.states({"nothing": ""}))
    ledger = Ledger(source.num_clips, source.ledger.max_bad_fraction, out / SKIPPED, shuffled=False)
    console = Console(stderr=True)
    written = skipped = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=int((source.report.bucket >= 0).sum()))
        for number, name in enumerate(names):
            with _taken(out / name) as file:
                if file is None:
                    continue
                for whole in _encode_shard(file, out / name, source, number, encoder, views, ledger):
                    written, skipped = written + whole, skipped + (not whole)
                    progress.advance(task)
                _finish(file, out / name)
    left = [name for name in names if not (out / name).exists()]
    for name, count in (text.summary() if text is not None else {}).items():
        if name.endswith("truncated") and count:
            log.warning("%d captions are longer than the text encoder reads, and were cut there (%s)", count, name)
    refused = int((source.report.bucket < 0).sum())
    told = f"{out}: encoded {written} clips" + (f", {skipped} could not be used, see {SKIPPED}" if skipped else "")
    told += f"; {refused} were in no bucket" if refused else ""
    Console(soft_wrap=True).print(told + (f"; {len(left)} shards are other processes'" if left else ""))


def _name(shard: ShardFile) -> str:
    return shard.name if shard.name.endswith(".tar") else f"{shard.name}.tar"


def _widths(text: TextEncoder) -> tuple[tuple[int, int], ...]:
    """Of the states and the pooled vector that each encoder gives a caption."""
    first = text.imagined(1)
    return tuple((each.states.shape[1], 0 if each.pooled is None else len(each.pooled)) for each in (first, *first.others))


def _device(name: str | None) -> torch.device:
    """The device of that name; of several GPUs, each process of a machine has its own."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))


def _claim(out: Path, encoding: Encoding, source: ClipLoader) -> None:
    """Makes the folder this encoding's, or ValueError where it is another's: of other encoders, captions, clips or sources."""
    note = out / NOTE
    shards = {}  # their bytes, and how many of their clips are wanted
    for shard, (start, end) in zip(source.clips.shards, itertools.pairwise(source.clips.starts.tolist()), strict=True):
        shards[_name(shard)] = [size_of(shard), int((source.report.bucket[start:end] >= 0).sum())]
    about = {"encoding": encoding.to_json(), "captions": list(encoding.captions), "shards": shards}
    begun = out.exists() and any(out.glob("*.tar*"))
    if note.is_file() and begun:
        try:
            before = json.loads(note.read_text())
            then = Encoding.from_json(before["encoding"])
            changed = []
            if (then.essence, then.clips) != (encoding.essence, encoding.clips):
                changed.append(f"encoding {then.to_json()}, now {encoding.to_json()}")
            if before["captions"] != about["captions"]:
                changed.append(f"captions {before['captions']}, now {about['captions']}")
            for name, (size, clips) in shards.items():
                known = before["shards"].get(name, [size, clips])
                size_then, clips_then = known if isinstance(known, list) else (known, clips)  # a number in older notes
                if size_then != size:
                    changed.append(f"{name} of {size_then} bytes, now {size}")
                elif clips_then != clips:
                    changed.append(f"{clips_then} clips of {name}, now {clips}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{note} cannot be read: {error!r}; set out to another folder") from error
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            told = "; ".join(changed[:5])
            raise ValueError(f"{out} was encoded otherwise: {told}{more}; set out to another folder, or remove this one")
        about["shards"] = before["shards"] | shards
    elif begun:
        raise ValueError(f"{out} holds shards, and no {NOTE} that says what made them; set out to another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write(note, (json.dumps(about, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f"{path.name}.{uuid4().hex}")
    draft.write_bytes(data)
    os.replace(draft, path)


@contextmanager
def _taken(path: Path) -> Iterator[BinaryIO | None]:
    """The file that a shard is written into, for this process alone; none where the shard is there, or another process's.

    The lock is on a file beside it that nothing else opens: a process that closes any handle of a file gives up its locks on it.
    """
    if path.exists():
        yield None
        return
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if path.exists():  # another has finished it since
            lock.unlink(missing_ok=True)
            yield None
            return
        with os.fdopen(os.open(_partial(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            yield file
        lock.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _encode_shard(
    file: BinaryIO, path: Path, source: ClipLoader, number: int, encoder: _Encoder, views: int, ledger: Ledger
) -> Iterator[bool]:
    """Appends the samples that a shard still lacks; says of each whether it could be used."""
    done, end = _whole_samples(path, encoder.encoding)
    jobs = [(key, job) for key, job in _jobs(source, number, views) if key not in done]
    twice = [key for key, times in Counter(key for key, _ in jobs).items() if times > 1 or key in done]
    if twice:
        raise ValueError(f"two clips of {path.name} would be called {twice[0]}; rename one, or set views=1")
    file.seek(end)
    file.truncate()
    reader = source.reader
    assert isinstance(reader, ClipReader)
    pool: DecodePool[Job | None, ReadClip | None] = DecodePool(
        reader, source.num_workers, max(map(reader.num_bytes, source.shapes)),
        timeout_seconds=source.timeout_seconds, memory_bytes=source.worker_bytes,
    )  # fmt: skip
    # webdataset's writer cannot go on in a file that was cut off
    with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        outcomes = zip(jobs, pool.map(job for _, job in jobs), strict=True)
        for _, views_of_one in itertools.groupby(outcomes, lambda each: each[0][1].slot):
            bad = None
            for (key, job), outcome in views_of_one:
                made = _made(encoder, reader, f"{path.name}:{key}", job, outcome)
                if isinstance(made, str):
                    bad = BadClip(job.record, made)
                else:
                    for extension, data in made.items():
                        info = tarfile.TarInfo(f"{key}.{extension}")
                        info.size, info.mode = len(data), 0o444
                        tar.addfile(info, io.BytesIO(data))
                    tar.members.clear()  # type: ignore[attr-defined]
                    file.flush()
                yield not isinstance(made, str)
            ledger.account(bad)


def _made(
    encoder: _Encoder, reader: ClipReader, name: str, job: Job, outcome: Result[Job | None, ReadClip | None] | Failure
) -> dict[str, bytes] | str:
    """The members of a sample, or why there is none."""
    if isinstance(outcome, Failure):
        return outcome.reason
    assert outcome.value is not None
    try:
        return encoder.sample(name, outcome.value, job.shape, reader.layout(job.shape, outcome.pixels)[0])
    except NoNumbersError as error:  # what else goes wrong is no fault of the clip's
        return str(error)


def _jobs(source: ClipLoader, number: int, views: int) -> Iterator[tuple[str, Job]]:
    """The clips of a shard with the keys they are stored under."""
    columns = source.clips.columns()
    first, last = source.clips.starts[number : number + 2].tolist()
    for clip in range(first, last):
        if source.report.bucket[clip] < 0:
            continue
        record, shape = source.clips.record(clip), source.shapes[source.report.bucket[clip]]
        seconds = columns["frames"][clip] / max(columns["fps"][clip], 1e-9)
        longer = shape.num_frames > 1 and seconds - shape.seconds >= 0.5 / shape.fps
        count = views if longer else 1
        for view in range(count):
            key = record.key if count == 1 else f"{record.key}-view{view}"
            yield key, Job(record, clip, shape, start=view / (count - 1) if count > 1 else 0.0)


def _whole_samples(path: Path, encoding: Encoding) -> tuple[set[str], int]:
    """The keys of a shard's samples that are whole in a file that may have been cut off, and where the last of them ends.

    All are read, up to the first that is not whole: after a loss of power a file may be as long as it was, and hold zeros anywhere.
    """
    partial = _partial(path)
    if not partial.stat().st_size:
        return set(), 0
    try:
        members, _ = members_of(partial)
    except BadDataError:  # cut off within its first header
        return set(), 0
    samples: dict[str, dict[str, Member]] = {}
    for key, extension, member in members:
        samples.setdefault(key, {})[extension] = member
    whole, end = set(), 0
    for key, found in samples.items():
        if "json" not in found or LATENTS not in found or not _readable(partial, found, encoding):
            break
        whole.add(key)
        end = found["json"].offset + found["json"].size
    return whole, -(-end // _RECORD) * _RECORD


def _readable(partial: Path, members: Mapping[str, Member], encoding: Encoding) -> bool:
    try:
        with partial.open("rb") as file:
            for extension, member in members.items():
                file.seek(member.offset)
                data = file.read(member.size)
                if extension in (LATENTS, TEXT, IMAGE):
                    if Encoding.from_json(read_note(data)[0]).essence != encoding.essence:
                        return False
                    deserialize(data)
                elif extension == "json":
                    json.loads(data)
                elif not data.strip(b"\0"):
                    return False
        return True
    except (ValueError, SafetensorError):
        return False


def _finish(file: BinaryIO, path: Path) -> None:
    """Turns a file with all samples into the shard; its index is there first."""
    file.flush()
    os.fsync(file.fileno())
    index = build(_partial(path), checksums=True, look=True)
    if index.problems:
        raise BadDataError(f"{_partial(path)}: {index.problems[0]}; remove it, and it is written anew")
    save(index, sidecar(path))
    os.replace(_partial(path), path)
