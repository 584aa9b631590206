"""Writes clips of the built-in world as ordinary WebDataset shards, with prompts to evaluate with beside them."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset  # type: ignore[import-untyped]

from dit_video.data.index import write_index
from dit_video.data.shards import sidecar
from dit_video.data.video_file import encode_mp4
from dit_video.world.captions import caption, prompts
from dit_video.world.paraphrases import paraphrase
from dit_video.world.render import render
from dit_video.world.state import WORLD_VERSION, Split, check_frame, combinations, sample_scene

PROMPT_FILES = {"seen": "prompts_seen.jsonl", "held_out": "prompts_held_out.jsonl"}


@dataclass(frozen=True)
class _Settings:
    """All that decides the bytes of a data set."""

    clips: int
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    split: Split
    shard_size: int
    num_prompts: int
    crf: int
    validation_clips: int
    paraphrases: int = 0
    world_version: int = WORLD_VERSION

    def shards(self) -> dict[str, range]:
        """The numbers of the clips in each shard, by the shard's name."""
        starts = range(0, self.clips, self.shard_size)
        found = {f"{i:05d}.tar": range(start, min(start + self.shard_size, self.clips)) for i, start in enumerate(starts)}
        if self.validation_clips:
            found["validation/00000.tar"] = range(self.clips, self.clips + self.validation_clips)
        return found


def write_world(
    out: Path | str,
    clips: int,
    seed: int,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    split: Split = "train",
    shard_size: int = 1024,
    num_prompts: int = 512,
    crf: int = 12,
    validation_clips: int = 0,
    paraphrases: int = 0,
    workers: int | None = None,
) -> Path:
    """Writes shards of key.mp4 (H.264), key.txt (the caption) and key.json (the full state, what the caption states) into `out`.

    With paraphrases, key.json says the same in so many other ways too, as "paraphrase_0" and so on, see world/paraphrases.py.

    Beside them stand prompts_seen.jsonl and prompts_held_out.jsonl (fully specified; the latter of combinations that split
    "train" never shows), validation/00000.tar with validation_clips further clips, and dataset.json, the settings. A clip depends on
    (seed, its number) and the settings alone; `workers` (None: one a core) only on time. Shards that are there already are kept, so a
    second call does nothing. ValueError for settings that the world or the codec cannot draw, and for a folder that holds anything
    made with other settings.
    """
    settings = _Settings(
        clips, seed, num_frames, height, width, float(fps), split, shard_size, num_prompts, crf, validation_clips, paraphrases
    )
    _check(settings)
    out = Path(out)
    _claim(out, settings)
    missing = {name: numbers for name, numbers in settings.shards().items() if not (out / name).exists()}
    for which, name in PROMPT_FILES.items():
        if not (out / name).exists():
            lines = prompts(which, num_prompts, seed, num_frames)  # type: ignore[arg-type]
            text = "".join(json.dumps({"prompt": each.text, "attributes": each.attributes}) + "\n" for each in lines)
            _replace(out / name, text.encode())
    if not missing:
        print(f"{out}: all {clips} clips are there already, nothing to do")
        return out
    done = 0
    for number in _write_all(out, missing, settings, workers):
        done += number
    kept = clips + validation_clips - done
    print(f"{out}: wrote {done} clips of {num_frames}x{height}x{width}" + (f", kept {kept} that were there" if kept else ""))
    return out


def clip_sample(settings: _Settings, number: int) -> dict[str, Any]:
    """One clip as a WebDataset sample."""
    rng = np.random.default_rng([settings.seed, number])
    scene = sample_scene(
        rng, num_frames=settings.num_frames, height=settings.height, width=settings.width, fps=settings.fps, split=settings.split
    )
    said = caption(rng, scene)
    about = {"caption": said.text, "stated": said.attributes, "seed": settings.seed, "number": number, "split": settings.split}
    if settings.paraphrases:  # by a generator of their own, so that clips and captions are the same with and without
        other = np.random.default_rng([settings.seed, number, 1])
        about |= {f"paraphrase_{i}": paraphrase(other, said.attributes) for i in range(settings.paraphrases)}
    return {
        "__key__": f"{number:08d}",
        "mp4": encode_mp4(render(scene), settings.fps, settings.crf),
        "txt": said.text.encode(),
        "json": json.dumps(scene.to_dict() | about).encode(),
    }


def _check(settings: _Settings) -> None:
    """ValueError for settings that cannot work, before anything is written."""
    for name in ("clips", "shard_size", "num_prompts"):
        if getattr(settings, name) < 1:
            raise ValueError(f"world shards need {name} of at least 1, got {getattr(settings, name)}; set {name}")
    if settings.seed < 0:
        raise ValueError(f"a seed is 0 or more, got {settings.seed}; set seed")
    for name in ("height", "width"):
        if getattr(settings, name) % 2:
            raise ValueError(f"H.264 needs an even {name}, got {getattr(settings, name)}; set {name}")
    check_frame(settings.num_frames, settings.height, settings.width, settings.fps)
    combinations(settings.split, settings.num_frames)


def _claim(out: Path, settings: _Settings) -> None:
    """Makes the folder this data set's, or ValueError where it is another's."""
    fingerprint, wanted = out / "dataset.json", asdict(settings)
    if not settings.paraphrases:
        del wanted["paraphrases"]  # as before there were any
    if fingerprint.exists():
        try:
            found = json.loads(fingerprint.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{fingerprint} is not the settings of a world data set; set out to another folder")
        changed = [f"{key} {found.get(key)!r} (now {value!r})" for key, value in wanted.items() if found.get(key) != value]
        if changed:
            raise ValueError(f"{out} holds a world data set with other settings: {', '.join(changed)}; set out or delete it")
        return
    if out.exists() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds shards that are not of the world; set out to another folder")
    out.mkdir(parents=True, exist_ok=True)
    _replace(fingerprint, (json.dumps(wanted, indent=2) + "\n").encode())


def _write_all(out: Path, shards: dict[str, range], settings: _Settings, workers: int | None) -> Iterator[int]:
    """Writes the shards in parallel and yields how many clips each has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(shards))
    jobs = [(out / name, numbers, settings) for name, numbers in shards.items()]
    if workers == 1:
        yield from map(_write_shard, jobs)
        return
    # Neither plain fork, which breaks threads (torch's, the decoders'), nor spawn, which imports everything once a worker.
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_write_shard, jobs)


def _write_shard(job: tuple[Path, range, _Settings]) -> int:
    """Writes one shard; it appears complete or not at all."""
    path, numbers, settings = job
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(exist_ok=True)
    try:
        with partial.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
                for number in numbers:
                    writer.write(clip_sample(settings, number))
        sidecar(path).unlink(missing_ok=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    write_index(path)
    return len(numbers)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
