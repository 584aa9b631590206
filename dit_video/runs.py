"""A run's folder, and what is done with a trained one: load, sample, evaluate.

runs/<name>/config.yaml        the resolved config
            commits.txt        the code's commit at each start
            metrics.jsonl      every number recorded in training
            data.json          what the data is: clips of every bucket and source, what was refused
            skipped.jsonl      clips that could not be used, and why
            checkpoints/       verified, the newest last
            skipped_steps.jsonl  steps that the weights did not follow, why, and their clips
            hangs/             what a rank that hung was doing
            samples/           made while training
            evaluation/        clips of the latest evaluation, with index.jsonl
            evaluation.json    every metric with value, interval and count
            summary.json       what training took
            report.html        all of it on one page
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from dit_video.build import make, make_network, make_objective, make_sampler, make_trained
from dit_video.compose import check_targets, compose, take_apart
from dit_video.data.video_file import write_mp4
from dit_video.eval.judge import Clip, Evaluation, evaluate, gallery
from dit_video.eval.report import write_report
from dit_video.model import published
from dit_video.model.layers import round_matrices
from dit_video.model.lora import adapters_of, under_adapters
from dit_video.model.network import Network
from dit_video.model.published import Readable
from dit_video.pipeline import config_of
from dit_video.sampler.generate import Request, Sampler, Trained, generate
from dit_video.trainer import checkpoint
from dit_video.trainer.checkpoint import CheckpointError, Saved

log = logging.getLogger(__name__)

EXPORTED = "config.json"  # what makes a folder an export

GALLERY_CLIPS, GALLERY_WRONG = 8, 3  # shown of every suite, and how many of them may be replaced by failures


LOCATIONS = (
    "autoencoder.folder",
    "text.folder",
    "text.tokenizer",
    "image_encoder.folder",
    "image_encoder.processor",
    "init_from",
)
"""Keys of a run's config that say where weights lie which were made elsewhere, and may lie elsewhere by now."""


class Run:
    """A run's folder, one that it was exported to, or a published pipeline's, opened for sampling.

    The network has its averaged weights, from the newest verified checkpoint; `weights` names others, such as network or ema-0.9995.
    With dtype bfloat16 the transformer's matrices are rounded, which halves its memory, and clips are made in bfloat16, to the bit as
    from float32 weights with sampler.precision=bfloat16.
    `folders` says where frozen weights lie now, by key (`LOCATIONS`), if not where the config says; ValueError where they are others than
    those that the run has recorded.
    """

    def __init__(
        self,
        folder: Path | str,
        trust: Sequence[str] = (),
        device: str | None = None,
        weights: str = "ema",
        folders: Mapping[str, str] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}; set dtype")
        self.dtype = dtype
        self.folder = Path(folder)
        self.config = read_config(self.folder, trust)
        if folders:
            move(self.config, folders)
        network = make_network(self.config, device="cpu")
        if dtype == "bfloat16":
            round_matrices(network.transformer)
        if self.config.get("lora"):
            start = start_in(Path(self.config.init_from), network)
            check_base(start, saved_in(self.folder).meta.get("base"))
            checkpoint.warm_start(network, start, "ema")
            start.close()
        found = published.opened(self.folder) if published.is_published(self.folder) else saved_in(self.folder)
        if isinstance(found, Saved):
            recorded = found.meta.get("encoders")
            recorded = recorded if isinstance(recorded, dict) else {}
            check_encoders(recorded, _encoders_of(network, recorded, folders or ()), "name the right folder")
        checkpoint.load_weights(network, found, weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.trained: Trained = make_trained(network.to(device).eval(), make_objective(self.config))
        sampler = make_sampler(self.config)
        self.sampler = replace(sampler, precision="bfloat16") if dtype == "bfloat16" else sampler

    def request(self, prompt: str, seed: int = 0, **changes: Any) -> Request:
        """A request for a clip of the size that was trained on, but for the changes (num_frames, height, width, fps, task, given...)."""
        data = self.config.data
        size = {"num_frames": data.num_frames, "height": data.height, "width": data.width, "fps": data.fps}
        return Request(prompt, seed, **(size | {key: value for key, value in changes.items() if value is not None}))

    def generate(self, requests: Sequence[Request], sampler: Sampler | None = None) -> list[np.ndarray]:
        """A video `T H W 3` uint8 for every request."""
        chosen = sampler or self.sampler
        if self.dtype == "bfloat16" != chosen.precision:
            raise ValueError(
                f"matrices in bfloat16 cannot be computed with in {chosen.precision}; set precision=bfloat16 or dtype=float32"
            )
        return generate(self.trained, requests, chosen)

    def sample(self, prompt: str, seed: int = 0, sampler: Sampler | None = None, **changes: Any) -> np.ndarray:
        """One video `T H W 3` uint8 of a prompt; see `request` for what can be changed."""
        return self.generate([self.request(prompt, seed, **changes)], sampler)[0]

    def evaluate(self, protocol: DictConfig | str = "world", sampler: Sampler | None = None) -> Evaluation:
        """Every metric of an evaluation (a config of conf/eval, or its name), written to the run's folder with the clips and the report."""
        if isinstance(protocol, str):
            protocol = compose("evaluate", take_apart([f"eval={protocol}", f"run={self.folder}"])).eval
        assert isinstance(protocol, DictConfig)
        suites = {str(name): make(suite) for name, suite in protocol.suites.items()}
        metrics = {str(name): make(metric) for name, metric in protocol.metrics.items()}
        chosen = sampler or self.sampler
        result = evaluate(suites, metrics, lambda requests: self.generate(requests, chosen), int(protocol.batch_size))
        result.protocol["sampler"] = describe(chosen)
        write_clips(self.folder / "evaluation", gallery(result.clips, GALLERY_CLIPS, GALLERY_WRONG), chosen)
        result.write(self.folder / "evaluation.json")
        write_report(self.folder)
        return result


class Lock:
    """A run's folder for one job alone, until the block that this opens ends, or the process; ValueError where it is taken.

    A lock on a file of the system's, which leaves nothing to clean up after a crash; the file beside the folder says whose it is.
    """

    def __init__(self, folder: Path) -> None:
        self.made = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.path = folder.parent / f".{folder.name}.lock"
        while True:
            self.file = self.path.open("a+")
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(f"{folder} is being trained by {holder}; wait for it, stop it, or choose another name") from None
            except OSError as error:  # a file system without locks
                log.warning("%s cannot be locked (%s): see to it that no second job trains the same run", self.path, error)
            if self.path.exists() and os.fstat(self.file.fileno()).st_ino == self.path.stat().st_ino:
                break
            self.file.close()  # its holder removed it while we opened it
        self.file.truncate(0)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {when}\n")
        self.file.flush()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)  # while it is still ours
        self.file.close()
        with suppress(OSError):  # a run that never began leaves nothing behind
            for parent in self.made:
                parent.rmdir()


def export_file(weights: str) -> str:
    """Where an export keeps a set of weights."""
    return "model.safetensors" if weights == "network" else f"model.{weights}.safetensors"


def saved_in(folder: Path, key: str = "run") -> Saved:
    """What a run has saved, or what it was exported to, open for reading; CheckpointError where there is nothing, or nothing whole."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; set {key} to another")
    if (folder / EXPORTED).is_file():
        files = {path.name[len("model") : -len(".safetensors")].strip("."): path for path in folder.glob("model*.safetensors")}
        return checkpoint.opened_files(
            folder, [(name or "network", path) for name, path in files.items()], _exported(folder, key)
        )
    path = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train it first, or set {key} to another folder")
    return checkpoint.opened(path, checked=True)


def identity(weights: Readable) -> str:
    """A short name for weights, other for others: of every tensor's name, shape and first row, so that large ones are not read in whole."""
    digest = hashlib.sha256()
    for name, shape in sorted(weights.shapes("ema").items()):
        row = weights.read("ema", name, slice(0, 1)) if shape else weights.read("ema", name)
        digest.update(f"{name} {shape}".encode())
        digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_base(weights: Readable, wanted: str | None) -> None:
    """CheckpointError where weights beneath adapters are not those that the adapters were trained beside."""
    if wanted and (found := identity(weights)) != wanted:
        raise CheckpointError(
            f"the adapters were trained beside weights {wanted}, and {weights.path} now holds {found}; set init_from to those weights"
        )


def start_in(folder: Path, network: Network) -> Readable:
    """Weights for a network to start from, open for reading: a run's averages, an export's, or published ones; errors as `saved_in`.

    CheckpointError where they lack weights that are frozen in the network, and so come from nowhere else; PublishedError where published
    ones are of another model, though their shapes are the same.
    """
    if published.is_published(folder):
        found: Readable = published.opened(folder)
    else:
        found = saved = saved_in(folder, "init_from")
        config = saved.meta.get("config", {})
        if config.get("lora"):
            raise CheckpointError(
                f"{folder} holds adapters beside the weights of {config.get('init_from')} and none of its own; set init_from to those"
            )
    if adapters_of(network):
        found = under_adapters(network, found)
    frozen = {name: tuple(weight.shape) for name, weight in network.named_parameters() if not weight.requires_grad}
    given = found.shapes("ema")
    if lacking := [name for name, shape in frozen.items() if given.get(name) != shape]:
        first = lacking[0]
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} of {len(frozen)} weights that adapters are put beside: {first} is "
            f"{given.get(first, 'not there')}, the model's {frozen[first]}; set init_from or model"
        )
    if published.is_published(folder):
        published.check_sizes(network.transformer, folder)
    return found


def _exported(folder: Path, key: str = "run") -> dict[str, Any]:
    try:
        about = published.read_json(folder / EXPORTED)
        if not isinstance(about.get("config"), dict):
            raise ValueError(
                f"{folder / EXPORTED} has no config of a run, as an export's has, and no _class_name, as a published model's"
            )
        return about
    except ValueError as error:
        raise ValueError(f"{error}; set {key} to another folder") from error


def read_config(folder: Path, trust: Sequence[str] = ()) -> DictConfig:
    """The config of a run, as data: ValueError where it names anything outside dit_video and the trusted packages."""
    if published.is_published(folder):
        return config_of(folder)
    path = folder / "config.yaml"
    if (folder / EXPORTED).is_file():
        path = folder / EXPORTED
        config = OmegaConf.create(_exported(folder)["config"])
    elif path.is_file():
        config = read_yaml(path)
    else:
        raise ValueError(f"{folder} is not a run: it has no config.yaml; set run to a folder such as runs/demo")
    missing = [key for key in ("seed", "data", "text", "model", "objective", "sampler") if key not in config]
    if missing:
        raise ValueError(f"{path} is not a run's config: it has no {missing[0]}; set run to another folder")
    check_targets(config, ("dit_video", *trust))
    return config


def move(config: DictConfig, folders: Mapping[str, str]) -> None:
    """Puts other places of frozen weights into a run's config; ValueError for a key that it has not."""
    for key, place in folders.items():
        inside = key.startswith("text.encoders.") and key.rpartition(".")[2] in ("folder", "tokenizer")
        if key not in LOCATIONS and not inside:
            known = ", ".join((*LOCATIONS, "text.encoders.NAME.folder"))
            raise ValueError(f"{key} is no place of frozen weights, those are {known}; leave it out")
        where, _, name = key.rpartition(".")
        part = OmegaConf.select(config, where) if where else config
        if not isinstance(part, DictConfig) or name not in part:
            encoders = list(config.text.get("encoders", {})) if where == "text" else []
            instead = f"name text.encoders.{encoders[0]}.{name}" if encoders else "leave it out"
            raise ValueError(f"the run's config has no {key}, so there is nothing to be found elsewhere; {instead}")
        part[name] = str(place)


def _encoders_of(network: Network, recorded: Mapping[str, str | None], named: Collection[str]) -> dict[str, str | None]:
    """Who makes those latents and states now of which is recorded who did.

    Where a folder that nobody named is missing or damaged, whoever uses it is told so.
    """
    found: dict[str, str | None] = {}
    for part in (part for part in ("autoencoder", "text", "image_encoder") if recorded.get(part)):
        try:
            found[part] = network.encoder(part)
        except ValueError:
            if any(key.startswith(part) for key in named):
                raise
    return found


def check_encoders(then: Mapping[str, str | None], now: Mapping[str, str | None], what_else: str) -> None:
    """ValueError where a run would go on, or sample, with other latents or states than it was begun with."""
    for part, name in then.items():
        if name and now.get(part) and now[part] != name:
            raise ValueError(
                f"this run was begun with {name}, and {part}.folder now holds {now[part]}; bring it back, or {what_else}"
            )


def read_yaml(path: Path) -> DictConfig:
    """A config from its file; ValueError where it is none."""
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a config: {error}; set run or name to another folder") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is not a config; set run or name to another folder")
    return config


def write_clips(folder: Path, clips: Sequence[Clip], sampler: Sampler) -> None:
    """Writes an mp4 a clip and index.jsonl (file, prompt, seed, size, frames, sampler, verdict) in place of an earlier set.

    ValueError where the folder holds videos that no index.jsonl lists: they are someone's.
    """
    check_folder(folder)
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    lines = []
    for number, clip in enumerate(clips):
        name, request = f"{number:04d}.mp4", clip.request
        line = {
            "file": name, "suite": clip.suite, "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "seed": request.seed, "task": request.task, "frames": request.num_frames, "height": request.height,
            "width": request.width, "fps": request.fps, "steps": sampler.steps, "guidance": sampler.guidance,
            "sampler": describe(sampler),
        }  # fmt: skip
        if clip.judgement is not None:
            line["verdict"] = {"right": clip.judgement.right, "reason": clip.judgement.reason}
        lines.append(json.dumps(line))
        write_mp4(draft / name, clip.video, request.fps)
    # The earlier set goes only now that the new one is written.
    write_text(folder / "index.jsonl", "".join(line + "\n" for line in lines))
    for old in folder.glob("[0-9][0-9][0-9][0-9].mp4"):
        old.unlink()
    for new in draft.iterdir():
        new.replace(folder / new.name)
    draft.rmdir()


def check_folder(folder: Path) -> None:
    """ValueError where write_clips would mix its videos with others."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; set out to a folder")
    if any(folder.glob("*.mp4")) and not (folder / "index.jsonl").is_file():
        raise ValueError(f"{folder} holds videos that are not listed in an index.jsonl; set out to another folder")


def describe(sampler: Sampler) -> str:
    """The sampler in words, for a protocol."""
    solver = getattr(sampler.solver, "func", sampler.solver)
    schedule = getattr(sampler.schedule, "func", sampler.schedule)
    spaced = getattr(schedule, "__name__", repr(schedule))
    below = "" if sampler.low_guidance is None else f" and {sampler.low_guidance:g} below {sampler.boundary:g}"
    return (
        f"{getattr(solver, '__name__', repr(solver))} solver, {sampler.steps} steps{'' if spaced == 'even' else f' of {spaced}'}, "
        f"guidance {sampler.guidance:g}{below} in time "
        f"{sampler.interval[0]:g} to {sampler.interval[1]:g}, rescale {sampler.rescale:g}, times shifted "
        f"{'as in training' if sampler.shift is None else f'by {sampler.shift:g}'}, {sampler.precision}, averaged weights"
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file so that an earlier one stays whole until the new one is."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON as write_text does."""
    write_text(path, json.dumps(data, indent=2) + "\n")
