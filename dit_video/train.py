"""dit-video train: one run, from its config to its folder (see dit_video/runs.py for what lies in it)."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, ListConfig, OmegaConf

from dit_video.build import check_whole, make, make_network, make_objective, make_sampler, make_text, make_trained, plain
from dit_video.data.buckets import ClipShape
from dit_video.data.encoding import NOTHING
from dit_video.data.loader import ClipLoader
from dit_video.eval.estimate import Estimate
from dit_video.eval.judge import evaluate
from dit_video.eval.report import write_report
from dit_video.model.cost import TRAINING, flops_by_part
from dit_video.model.network import Network
from dit_video.model.text import split_words
from dit_video.objective.tasks import check_given
from dit_video.runs import Lock, check_base, check_encoders, identity, read_yaml, start_in, write_json, write_text
from dit_video.sampler.generate import Request, check_request, generate
from dit_video.shapes import Batch
from dit_video.trainer import checkpoint, heart
from dit_video.trainer.callbacks.evaluation import Evaluating, ValidationLoss
from dit_video.trainer.callbacks.losses import LossRecord
from dit_video.trainer.callbacks.monitor import Monitor
from dit_video.trainer.callbacks.progress import ProgressBar
from dit_video.trainer.callbacks.sampling import Sampling
from dit_video.trainer.callbacks.saving import Saving
from dit_video.trainer.callbacks.skipped import SkippedSteps
from dit_video.trainer.callbacks.stopping import Stopping
from dit_video.trainer.callbacks.throughput import Throughput
from dit_video.trainer.checkpoint import Keep, Saved
from dit_video.trainer.ema import check_decays
from dit_video.trainer.fit import Hardware, Spent, fit
from dit_video.trainer.heart import beat
from dit_video.trainer.launch import STOPPED, join, launch, wants_launch
from dit_video.trainer.layout import all_gathered, by_first_rank, over_ranks
from dit_video.trainer.module import Begin, VideoDiffusion
from dit_video.trainer.record import JsonlRecord

log = logging.getLogger(__name__)

WORDS_OF_A_CAPTION = 16  # where the cost of a step is worked out; what counts is the clips' tokens
ALL_AT_ONCE = {"sources": None, "micro_batches": 1}  # of held-out clips
BESIDE_TRAINING = {
    "accept_changed_data", "accept_changed_config",
    "trust", "logger", "runs", "every", "eval", "sampler", "sample_prompts", "checkpoints", "profile", "validation",
    "max_clips", "data.num_workers", "data.cache_bytes", "data.skipped_path", "data.timeout_seconds", "data.worker_bytes",
    "data.remote_cache", "data.remote_cache_bytes", "data.micro_batches", "trainer.devices", "trainer.num_nodes", "trainer.layout",
    "trainer.recompute", "trainer.compile", "trainer.threads", "trainer.gather_to_sample", "trainer.offload_ema", "trainer.max_hours",
    "trainer.hang_seconds", "trainer.restarts", "optimisers.max_skips", "init_from", "autoencoder.folder", "autoencoder.placement",
    "image_encoder.folder", "image_encoder.processor", "image_encoder.placement",
    "text.folder", "text.tokenizer", "text.placement", "text.cache", "text.memory_bytes",
}  # fmt: skip
"""Keys that may change when a run goes on; all others decide its weights. (So does max_clips, but a longer run is a fair wish.)"""
BESIDE_TRAINING_INSIDE = re.compile(r"text\.encoders\.[^.]+\.(folder|tokenizer|placement|cache|memory_bytes)")
"""The same of encoders that are several."""
UNSAID = {"text.depth": 0, "text.heads": 4}
"""What a config meant that is older than a key, where it is something else than a part that was not chosen."""


def main(config: DictConfig) -> None:
    """Trains the run that a config describes, or what is left of it, in this process or, of several ranks, in one each."""
    spent = Spent()
    check(config)
    hardware = Hardware(**plain(config.trainer))
    layout = hardware.parallel.layout
    if wants_launch(layout.world_size, hardware.restarts):
        if hardware.num_nodes > 1:
            raise ValueError(f"ranks on {hardware.num_nodes} machines are started by srun or torchrun on each; see the README")
        if status := launch(int(hardware.devices), hardware.restarts, sys.argv[1:]):
            raise SystemExit(status)
        return
    rank = join(layout.world_size, hardware.accelerator)
    folder = Path(config.runs) / config.name
    with ExitStack() as held:
        by_first_rank(lambda: held.enter_context(Lock(folder)))
        stopped = train(config, folder, hardware, rank, spent)
    if stopped:
        raise SystemExit(STOPPED)


def train(config: DictConfig, folder: Path, hardware: Hardware, rank: int, spent: Spent) -> bool:
    """Trains a run whose folder is this process's, or another rank's of the same run; says whether it was told to stop early."""
    layout = hardware.parallel.layout
    resume = by_first_rank(lambda: find_run(folder, config))
    saved = checkpoint.opened(resume, checked=True) if resume else None
    meta = saved.meta if saved else {"steps": 0, "clips": 0}
    spent.add(meta.get("wall_seconds", 0.0), meta.get("core_seconds", 0.0))
    if meta["clips"] >= config.max_clips:
        log.info("%s is already trained on %d clips; raise max_clips, or choose another name", folder, meta["clips"])
        if rank == 0 and not (folder / "summary.json").is_file():  # it was cut off between its last checkpoint and its end
            write_json(folder / "summary.json", summary(config, meta, spent))
            write_report(folder)
        return False
    options = make_options(config, folder)
    loader: ClipLoader = make(
        config.data, skipped_path=str(folder / "skipped.jsonl"), cost=cost_of(config), tokens=tokens_of(config),
        micro_batches=math.lcm(config.data.micro_batches, layout.data_size), states=reads_states(config), images=reads_images(config),
    )  # fmt: skip
    by_first_rank(lambda: check_encoding(config, loader))
    if saved and not config.accept_changed_data:
        by_first_rank(lambda: check_data(folder / "data.json", loader))
    module = make_module(config, saved, hardware)
    if (nothing := loader.nothing()) is not None:
        module.network.text.take_nothing(nothing)
    stopping = Stopping(hardware.max_hours)
    encoders = by_first_rank(lambda: module.network.encoders)
    if saved and (then := saved.meta.get("encoders")) and not config.accept_changed_data:
        by_first_rank(lambda: check_encoders(then, encoders, "set accept_changed_data=true"))
    about = {
        "encoders": encoders,
        "base": module.base,
        "config": plain(config),
        "code": commit(),
        "data": loader.fingerprint,
        "torch": str(torch.__version__),
    }
    callbacks = [stopping, *make_callbacks(config, folder, module, saved, spent, about, stopping)]
    loggers: list[Logger] = []
    if rank == 0:
        open_run(folder, config, resume)
        loader.report.log()
        loader.write_report(folder / "data.json")
        loggers = [JsonlRecord(folder / "metrics.jsonl", meta["steps"])]
        loggers += [make(config.logger, folder=folder)] if config.logger else []
    for logger in loggers:
        logger.log_hyperparams(plain(config))
    log.info("training %s: %d parameters, %d clips of %d", folder, num_parameters(config), config.max_clips, loader.num_clips)

    data_rank = layout.data_rank(rank)
    batches = until(config.max_clips, loader.batches(meta["steps"], data_rank, layout.data_size), meta["clips"])
    with watched(folder / "hangs", hardware, rank):
        fit(module, batches, callbacks, loggers, hardware, **options)
    for logger in loggers:
        logger.finalize("success")
    if stopping.stopped:
        log.warning(
            "%s stopped after %d of %d clips; started again, it goes on from there", folder, module.clips, config.max_clips
        )
        return True
    if rank == 0:
        write_json(folder / "summary.json", summary(config, {"steps": module.steps, "clips": module.clips}, spent))
        write_report(folder)
    log.info("%s: %d clips in %.0f s (%.0f core-seconds)", folder, module.clips, spent.wall_seconds, spent.core_seconds)
    return False


@contextmanager
def watched(folder: Path, hardware: Hardware, rank: int) -> Iterator[None]:
    """A supervisor watches the ranks of this machine for as long as the block lasts, where one is wanted."""
    if hardware.hang_seconds is None:
        yield
        return
    place, places = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    heart.start(folder, hardware.hang_seconds, rank, place, places)
    try:
        yield
    finally:
        heart.stop()


def until(max_clips: int, batches: Iterator[Batch], clips: int) -> Iterator[Batch]:
    """The batches that are left of a run of max_clips clips; steps of different buckets hold different numbers of them."""
    while clips < max_clips:
        batch = next(batches)
        clips += batch.step_clips
        yield batch


def check(config: DictConfig) -> None:
    """ValueError where values cannot work, alone or together, before anything is allocated."""
    if "/" in config.name or config.name in ("", ".", ".."):
        raise ValueError(f"a run's name is one folder's, got {config.name!r}; set name, and runs for where it lies")
    check_whole(config, 1, "max_clips", "data.batch_size", "data.micro_batches", "validation.clips")
    check_whole(config, 0, "seed", *(f"every.{name}" for name in config.every))
    network, data = make_network(config), config.data
    transformer = network.transformer
    for shape in [data, *(data.buckets or [])]:
        whole = {key: shape.get(key, data[key]) for key in ("num_frames", "height", "width")}
        network.tokens.grid(whole["num_frames"], whole["height"], whole["width"])
    if list(transformer.ends) != ["video"]:
        raise ValueError(
            f"the data holds videos alone, the model has {', '.join(transformer.ends)}; set model.other_streams=null"
        )
    if config.get("lora") and not config.init_from:
        raise ValueError("adapters need weights to adapt; set init_from to a run or to published weights, or lora=none")
    check_decays(decays_of(config))
    make_keep(config)
    check_given(make_objective(config).tasks, network.tokens.compression, network.autoencoder.causal)
    make_sampler(config)
    make(config.optimisers)
    hardware = Hardware(**plain(config.trainer))
    if hardware.gather_precision == "bfloat16" and config.sampler.precision != "bfloat16":
        raise ValueError(
            "weights in bfloat16 are sampled in bfloat16; set sampler.precision=bfloat16, or trainer.gather_precision=float32"
        )


def decays_of(config: DictConfig) -> list[float]:
    """The decays of the averaged weights, of which a config may name one or several."""
    return list(config.ema_decay) if isinstance(config.ema_decay, ListConfig) else [config.ema_decay]


def make_keep(config: DictConfig) -> Keep:
    """Which checkpoints stay."""
    return Keep(**{name: value for name, value in plain(config.checkpoints).items() if name != "asynchronous"})


def find_run(folder: Path, config: DictConfig) -> Path | None:
    """The checkpoint where a run stopped, if it ever came to one; ValueError where the folder is another run's, or none's."""
    checkpoint.clear_drafts(folder / "checkpoints")
    stored, resume = folder / "config.yaml", checkpoint.newest(folder / "checkpoints")
    if resume and stored.is_file():
        changed = differences(plain(read_yaml(stored)), plain(config))
        if changed and not config.accept_changed_config:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ValueError(
                f"{folder} was trained with another config ({'; '.join(changed[:5])}{more}); choose another name, init_from={folder}, or "
                "set accept_changed_config=true"
            )
        for difference in changed:
            log.warning("CONFIG CHANGED on the way: %s", difference)
        log.info("going on from %s", resume)
        before = read_yaml(stored).max_clips
        if before != config.max_clips:
            log.warning(
                "max_clips is %d, was %d: the learning rate follows the new length from here on", config.max_clips, before
            )
    elif folder.is_dir() and any(folder.iterdir()) and not stored.is_file():
        raise ValueError(f"{folder} holds files, but no config.yaml that says of which run; set name or runs")
    return resume


def reads_states(config: DictConfig) -> bool:
    """Whether captions' states that lie in shards are of use: an encoder that is trained along reads the words."""
    return make_text(config).is_frozen


def reads_images(config: DictConfig) -> bool:
    """Whether states of first frames that lie in shards are of use."""
    return make_network(config).takes_image_states


def check_encoding(config: DictConfig, loader: ClipLoader, key: str = "data.shards") -> None:
    """ValueError where the clips were encoded with another autoencoder or text encoder, or are to be encoded and cannot be."""
    network, found = make_network(config), loader.encoding
    autoencoder, text = network.autoencoder, network.text
    if found is None:
        autoencoder.check()
        text.check()
        if network.takes_image_states and network.image_encoder is not None:
            network.image_encoder.check()
        return
    shards = loader.clips.shards[0]
    if (found.compression, found.channels) != (tuple(autoencoder.compression), autoencoder.channels):
        raise ValueError(
            f"{shards} was encoded by {found.autoencoder}, {found.channels} channels of {found.compression} pixels, and the model is to "
            f"be trained with {autoencoder.channels} of {tuple(autoencoder.compression)}; set autoencoder, or {key}"
        )
    if autoencoder.can_decode and found.autoencoder != autoencoder.name:
        raise ValueError(
            f"{shards} was encoded by {found.autoencoder}, and the model is to be trained with {autoencoder.name}; set autoencoder.folder, "
            f"or {key}"
        )
    if network.image_encoder is not None:
        own, size = network.image_encoder, (network.image_encoder.tokens, network.image_encoder.dim)
        if found.image is None or found.image_size != size or (own.is_here and found.image != own.name):
            of = "no image encoder" if found.image is None else f"{found.image}, {found.image_size[0]} of {found.image_size[1]}"
            raise ValueError(
                f"the first frames of {shards} were encoded by {of}, and the model is to be trained with "
                f"{own.name if own.is_here else 'one'}, {size[0]} of {size[1]}; set image_encoder, or {key}"
            )
    if found.text is None:
        text.check()  # captions are encoded as they come
    elif text.is_frozen and text.is_here and found.text != text.name:
        raise ValueError(
            f"the captions of {shards} were encoded by {found.text}, and the model is to be trained with {text.name}; set text, or {key}"
        )
    if (
        text.is_frozen
        and not text.is_here
        and text.needs_nothing
        and loader.nothing() is None
        and config.objective.caption_dropout
    ):
        raise ValueError(
            f"{NOTHING} is not beside {shards}, and without it the text encoder has to read the empty caption; copy it, or set text.folder"
        )


def check_data(before: Path, loader: ClipLoader) -> None:
    """ValueError where a run would go on with other clips than those it was begun with, saying what differs."""
    then = json.loads(before.read_text()) if before.is_file() else {}
    if then.get("fingerprint") in (None, loader.fingerprint):
        return
    here = loader.report.about()
    counted = [sum(sum(bucket["clips"].values()) for bucket in about["buckets"]) for about in (then, here)]
    left_out = [{why: count for why, count in about["refused"].items() if count} for about in (then, here)]
    differs = [f"{counted[0]} clips then, {counted[1]} now"] if counted[0] != counted[1] else []
    differs += [f"left out then {left_out[0] or 'none'}, now {left_out[1] or 'none'}"] if left_out[0] != left_out[1] else []
    raise ValueError(
        f"{before.parent} was begun on other data, and would not go on with the same next clip "
        f"({'; '.join(differs) or 'as many clips, but others or in another order'}); bring the data back, choose another name, or set "
        "accept_changed_data=true"
    )


def open_run(folder: Path, config: DictConfig, resume: Path | None) -> None:
    """Makes the run's folder; of a run that never came to its first checkpoint, the record goes."""
    if resume is None:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(config))))
    with (folder / "commits.txt").open("a") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {commit()}\n")


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """The keys in which two configs differ, but for those that do not change what is trained, and for what was not there to be said yet."""
    if key in BESIDE_TRAINING or BESIDE_TRAINING_INSIDE.fullmatch(key):
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [d for name in names for d in differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))]
    if before is None and now == UNSAID.get(key, {}):
        return []
    return [] if before == now else [f"{key}: {before} then, {now} now"]


def make_module(config: DictConfig, saved: Saved | None, hardware: Hardware) -> VideoDiffusion:
    """The module; its weights have no memory yet, and begin as the seed says, or as another run's."""
    network, optimisers = make_network(config), make(config.optimisers)
    begin = find_start(network, Path(config.init_from)) if config.init_from and (config.get("lora") or not saved) else None
    base = by_first_rank(lambda: _base_of(network, config, saved)) if config.get("lora") and config.init_from else None
    build = make(config.module, _partial_=True)  # Hydra would turn what it is given into plain data
    module: VideoDiffusion = build(
        network, make_objective(config), optimisers, config.max_clips, decays_of(config), hardware.parallel, config.seed, begin,
        hardware.offload_ema,
    )  # fmt: skip
    module.base = base
    return module


def _base_of(network: Network, config: DictConfig, saved: Saved | None) -> str:
    """Which weights the adapters stand beside; CheckpointError where they once stood beside others."""
    start = start_in(Path(config.init_from), network)
    check_base(start, saved.meta.get("base") if saved else None)
    found = identity(start)
    start.close()
    return found


def find_start(network: Network, run: Path) -> Begin:
    """How a network starts from another run's averaged weights, or published ones; says of every key whether it is kept, new or dropped."""
    by_first_rank(lambda: start_in(run, network).close())  # what is wrong with it is told once
    saved = start_in(run, network)
    found = checkpoint.fitting(network, saved, "ema")
    if not found["kept"]:
        raise checkpoint.CheckpointError(
            f"{saved.path} has no tensor of this model's names and shapes; set init_from, model or text"
        )
    log.info("starting from %s: %s", saved.path, ", ".join(f"{len(names)} {kind}" for kind, names in found.items()))
    for kind, names in found.items():
        for name in names:
            log.info("  %s %s", kind, name)

    def begin(network: torch.nn.Module) -> None:
        checkpoint.warm_start(network, saved, "ema")
        saved.close()

    return begin


def make_callbacks(
    config: DictConfig, folder: Path, module: VideoDiffusion, saved: Saved | None, spent: Spent, about: dict[str, Any],
    stopping: Stopping,
) -> list[L.Callback]:  # fmt: skip
    """Everything that happens beside training; what it needs is made now, so that what cannot work is known now."""
    every, sampler = config.every, make_sampler(config)

    def draw(module: VideoDiffusion, requests: Sequence[Request]) -> list[Any]:
        beat("sampling")
        if any(all_gathered(stopping.asked)):
            raise InterruptedError("the run is told to stop")
        share = partial(generate, make_trained(module.network, module.objective), sampler=sampler)
        with module.averaged():
            return over_ranks(share, requests, lambda request: request.shape, module.parallel.layout)

    def flops_per_clip(module: VideoDiffusion, batch: Batch) -> float:
        grid = module.network.grid(batch)
        words = max(len(split_words(caption)) for caption in batch.captions)  # shorter captions are padded to this
        return TRAINING * sum(flops_by_part(module.network, grid, 1, words).values())

    data = config.data
    requests = [
        Request(prompt, config.seed + number, data.num_frames, data.height, data.width, data.fps)
        for number, prompt in enumerate(config.sample_prompts)
    ]
    sees = can_sample(module.network)
    for request in requests if sees else ():
        check_request(request, make_trained(module.network, module.objective))
    callbacks: list[L.Callback] = [
        Throughput(every.record, flops_per_clip),
        LossRecord(every.record),
        Monitor(every.monitor),
        ProgressBar(),
    ]
    if sees:
        callbacks.append(Sampling(every.sample, folder / "samples", requests, draw))
    if every.evaluate and config.eval and sees:
        suites, metrics = ({str(k): make(v) for k, v in config.eval[part].items()} for part in ("suites", "metrics"))

        def judge(module: VideoDiffusion) -> dict[str, Estimate]:
            return evaluate(suites, metrics, lambda requests: draw(module, requests), config.eval.batch_size).metrics

        callbacks.append(Evaluating(every.evaluate, judge))
    if every.validate and config.validation.shards:
        clips = config.validation.clips
        held_out: ClipLoader = make(
            data,
            shards=config.validation.shards,
            num_workers=0,
            max_clips=clips,
            random_start=False,
            states=reads_states(config),
            images=reads_images(config),
            **ALL_AT_ONCE,
        )
        by_first_rank(lambda: check_encoding(config, held_out, "validation.shards"))
        callbacks.append(ValidationLoss(every.validate, held_out.one_pass))
    saving = Saving(
        every.save, folder / "checkpoints", make_keep(config), saved, spent, about, asynchronous=config.checkpoints.asynchronous
    )
    return [*callbacks, SkippedSteps(folder / "skipped_steps.jsonl"), saving]


def can_sample(network: Network) -> bool:
    """Whether prompts alone can be made into clips with what is here; a warning says why not."""
    lacking = {
        "autoencoder.folder is null": not network.autoencoder.can_decode, "text.folder is null": not network.text.is_here,
        "the model makes clips from first frames": network.takes_images or network.takes_image_states,
    }  # fmt: skip
    for why, it_does in lacking.items():
        if it_does:
            log.warning("%s, so nothing is sampled or evaluated while training", why)
    return not any(lacking.values())


def cost_of(config: DictConfig) -> Callable[[ClipShape], float]:
    """What a clip of a shape costs to train on, in floating-point operations: linear and quadratic in its tokens."""
    network = make_network(config)

    def cost(shape: ClipShape) -> float:
        grid = network.tokens.grid(shape.num_frames, shape.height, shape.width)
        return float(sum(flops_by_part(network, grid, 1, WORDS_OF_A_CAPTION).values()))

    return cost


def tokens_of(config: DictConfig) -> Callable[[ClipShape], int]:
    """How many tokens a clip of a shape is to the model."""
    tokens = make_network(config).tokens
    return lambda shape: tokens.grid(shape.num_frames, shape.height, shape.width).num_tokens


def make_options(config: DictConfig, folder: Path) -> dict[str, Any]:
    """What else Lightning's trainer is told: a profiler, where one is asked for."""
    if not config.profile:
        return {}
    from dit_video.trainer.profile import step_profiler

    return {"profiler": step_profiler(folder)}


def num_parameters(config: DictConfig) -> int:
    """How many parameters a run trains."""
    every = [*make_network(config).parameters(), *make_objective(config).parameters()]
    return sum(parameter.numel() for parameter in every if parameter.requires_grad)


def summary(config: DictConfig, done: dict[str, Any], spent: Spent) -> dict[str, Any]:
    """What training took, with the parts of a resumed run up to the checkpoints it went on from."""
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return {
        "name": config.name,
        "training_wall_seconds": round(spent.wall_seconds, 1),
        "training_core_seconds": round(spent.core_seconds, 1),
        "clips": done["clips"],
        "steps": done["steps"],
        "parameters": num_parameters(config),
        "seed": config.seed,
        "commit": commit(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, threads: {torch.get_num_threads()}",
        "torch": str(torch.__version__),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The code's commit, with a plus where it was changed since; unknown where this file is in no checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # an environment inside another repository is not a checkout of ours
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
