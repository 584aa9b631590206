"""Checkpoints of a training, written while it goes on, and going on from one."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dit_video.trainer import checkpoint
from dit_video.trainer.callbacks.every import EveryClips
from dit_video.trainer.checkpoint import Groups, Keep, Part, Saved
from dit_video.trainer.fit import Spent
from dit_video.trainer.heart import beat
from dit_video.trainer.layout import all_gathered
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import record

log = logging.getLogger(__name__)

WRITTEN = "checkpoint written"  # a rank's vote
PATIENCE = 30.0  # seconds that rank 0 waits for the files of others when training has broken off
FAILURES = 2  # saves that fail one after another stop the run


@dataclass
class _Pending:
    """A save whose files are being written."""

    final: Path
    meta: dict[str, Any]
    written: Future
    started: float
    blocked: float
    num_bytes: int


class Saving(EveryClips):
    """Saves every so many clips and at the end of training; goes on from a checkpoint where one is given.

    Training waits for a copy of its state in the host's memory alone; each rank's files are written beside the next steps, and when
    every rank has said with a step that its own are there, rank 0 turns them into a checkpoint. A save that fails is told and tried
    again at the next; the second in a row, or the last of the run, is an error. Records checkpoint/seconds, checkpoint/blocked_seconds
    and checkpoint/gigabytes.
    """

    def __init__(
        self,
        every_clips: int,
        folder: Path,
        keep: Keep,
        resume: Saved | None,
        spent: Spent,
        about: Mapping[str, Any] | None = None,  # what else meta.json is to say, such as the config
        asynchronous: bool = True,
    ) -> None:
        super().__init__(every_clips)
        self.folder, self.keep, self.resume, self.spent = folder, keep, resume, spent
        self.about, self.asynchronous = dict(about or {}), asynchronous
        self.pending: _Pending | None = None
        self.good: set[Path] = {resume.path} if resume else set()
        self.saved_steps = int(resume.meta["steps"]) if resume else 0
        self.failures = 0
        self.writer = ThreadPoolExecutor(1, "checkpoint")

    def on_fit_start(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        if self.resume is not None:  # only now are the weights on their device, where the optimisers' state must be too
            restore(pl_module, self.resume)
            self.resume.close()
        pl_module.votes[WRITTEN] = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: VideoDiffusion, outputs: Any, batch: Any, batch_idx: int  # type: ignore[override]
    ) -> None:  # fmt: skip
        if self.pending is not None and pl_module.counts.get(WRITTEN) == trainer.world_size:
            self.finish(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        pl_module.votes[WRITTEN] = self.pending is not None and self.pending.written.done()

    def act(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        beat("saving")
        self.finish(trainer, module)  # one at a time
        if module.steps == self.saved_steps:
            return
        started = time.perf_counter()
        groups = capture(module)
        size = sum(all_gathered(checkpoint.num_bytes(groups)))
        final = checkpoint.path_of(self.folder, module.steps)
        draft = checkpoint.draft_of(final)
        if problem := all_gathered(self._make_draft(draft, size) if trainer.is_global_zero else None)[0]:
            self._failed(checkpoint.not_saved(final, problem))
            return
        parts = {group: {name: Part(part.values.to("cpu", copy=True), part.start, part.rows) for name, part in values.items()}
                 for group, values in groups.items()}  # fmt: skip
        rank = torch.distributed.get_rank() if trainer.world_size > 1 else None
        written = self.writer.submit(checkpoint.write_groups, draft, parts, rank)
        meta = {
            "steps": module.steps, "clips": module.clips, "wall_seconds": self.spent.wall_seconds,
            "core_seconds": self.spent.core_seconds, "guard": module.guard.state(), "ema_decays": module.decays,
            "layout": vars(module.parallel.layout), "metrics": dict(module.latest), **self.about,
        }  # fmt: skip
        self.pending = _Pending(final, meta, written, started, time.perf_counter() - started, size)
        if not self.asynchronous:
            self.finish(trainer, module)

    def finish(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        """Waits for all ranks' files of a save that is under way, and makes a checkpoint of them."""
        if self.pending is None:
            return
        here, self.pending = self.pending, None
        error = here.written.exception()
        problem = next((told for told in all_gathered(error and str(error)) if told), None)
        if problem is None and trainer.is_global_zero:
            try:
                self._commit(here, trainer.world_size)
            except OSError as failure:
                problem = str(failure)
        problem = all_gathered(problem)[0]
        if problem is not None:
            checkpoint.remove_draft(here.final)
            self._failed(checkpoint.not_saved(here.final, problem))
            return
        self.failures, self.saved_steps = 0, here.meta["steps"]
        record(trainer, module, {
            "checkpoint/seconds": time.perf_counter() - here.started, "checkpoint/blocked_seconds": here.blocked,
            "checkpoint/gigabytes": here.num_bytes / 1e9,
        })  # fmt: skip

    def _commit(self, here: _Pending, ranks: int) -> None:
        checkpoint.commit(checkpoint.draft_of(here.final), here.final, ranks, here.meta)
        self.good.add(here.final)
        self.writer.submit(self._prune)

    def _prune(self) -> None:
        try:
            checkpoint.prune(self.folder, self.keep, self.good)
        except OSError as error:
            log.warning("an old checkpoint could not be removed: %s", error)

    def on_exception(self, trainer: L.Trainer, pl_module: VideoDiffusion, exception: BaseException) -> None:  # type: ignore[override]
        """A save that is under way when training breaks off becomes a checkpoint all the same, if every rank has written its files."""
        here, self.pending = self.pending, None
        if here is None or not trainer.is_global_zero:
            return
        draft, deadline = checkpoint.draft_of(here.final), time.monotonic() + PATIENCE
        failed = here.written.exception() is not None
        while not failed and checkpoint.sums_of(draft, trainer.world_size) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        with suppress(OSError):
            if not failed and checkpoint.sums_of(draft, trainer.world_size) is not None:
                self._commit(here, trainer.world_size)
        checkpoint.remove_draft(here.final)  # which is there where it came to nothing

    def _make_draft(self, draft: Path, size: int) -> str | None:
        try:
            checkpoint.check_room(self.folder, size)
            draft.mkdir()
        except OSError as error:
            return str(error)
        return None

    def _failed(self, told: str) -> None:
        self.failures += 1
        if self.failures >= FAILURES:
            raise OSError(told)
        log.error("%s; training goes on, and saves again later", told)

    def on_train_end(self, trainer: L.Trainer, pl_module: VideoDiffusion) -> None:  # type: ignore[override]
        self.failures = FAILURES - 1  # there is no later
        self.act(trainer, pl_module)
        self.finish(trainer, pl_module)
        self.writer.shutdown()


def capture(module: VideoDiffusion) -> Groups:
    """What this rank writes of all that the next step depends on."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {
        name: {key: (value, value) for key, value in checkpoint.trained(part).items()}
        for name, part in module.trained_parts().items()
    }
    weights = checkpoint.trained(module.network)
    for number, decay in enumerate(module.decays):
        averages = module.ema.named(decay)
        tensors[ema_group(decay, number)] = {key: (averages.get(key, value), value) for key, value in weights.items()}
    for name, optimiser in module.named_optimisers.items():
        state = checkpoint.optimiser_state(optimiser, names)
        tensors[f"optimiser-{name}"] = {key: (value, value) for key, value in state.items()}
    return {
        group: {key: part for key, (value, like) in values.items() if (part := checkpoint.part_of(value, like)) is not None}
        for group, values in tensors.items() if values
    }  # fmt: skip


def ema_group(decay: float, number: int) -> str:
    """The group of an average; the first, which is sampled, is called ema alone."""
    return "ema" if number == 0 else f"ema-{decay:g}"


def restore(module: VideoDiffusion, saved: Saved) -> None:
    """Undoes capture, on any number of ranks; CheckpointError where the checkpoint is of another model."""
    parts = {name: part for name, part in module.trained_parts().items() if checkpoint.trained(part)}
    averages = {ema_group(decay, number): decay for number, decay in enumerate(module.decays)}
    optimisers = {f"optimiser-{name}": optimiser for name, optimiser in module.named_optimisers.items()}
    for group in (*parts, *averages, *optimisers):
        saved.shapes(group)  # which it says it does not have
    for name, part in parts.items():
        checkpoint.check_fits(part, saved, name)
    for name, part in parts.items():
        checkpoint.load_weights(part, saved, name)
    for group, decay in averages.items():
        checkpoint.load_averages(module.ema.named(decay), module.network, saved, group)
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for group, optimiser in optimisers.items():
        checkpoint.restore_optimiser(optimiser, names, saved, group)
    module.guard.restore(saved.meta.get("guard", {}))
    module.steps, module.clips = int(saved.meta["steps"]), int(saved.meta["clips"])
