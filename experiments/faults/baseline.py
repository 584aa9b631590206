"""The same model on plain Lightning + webdataset, as a careful user writes it from their documentation, and the same faults done to it.

Seeds set for everything, shards split by node and worker and shuffled deterministically, warn_and_continue where samples can fail,
gradient clipping, DDP, ModelCheckpoint every third step that keeps the newest two and last.ckpt and saves on an exception, resuming from
last.ckpt. There is no moving average: Lightning's does not hold for weights that are cut. Wherever a choice was open the one that favours
the baseline was taken: its record is not compared, and a checkpoint counts as verified as soon as torch.load reads it.
"""

import csv
import glob
import io
import itertools
import os
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import lightning as L
import numpy as np
import rows
import torch
import webdataset as wds
from corruptions import CORRUPTIONS
from harness import SMALL, Fault, Leg, Outcome, Place, Spoiled, digest, leg, traced
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rows import STEPS, Bench, Canary, Trials, equal_end, until_done
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard

from dit_video.build import make_network, make_objective
from dit_video.compose import compose, take_apart
from dit_video.data.decode import decode_clip
from dit_video.model.layers import initialise
from dit_video.shapes import Batch

HUNG = 5.0
"""Seconds that a rank waits for another one."""


@dataclass
class Settings:
    """What a row may change."""

    folder: str
    shards: str
    steps: int = STEPS
    save_every: int = 3
    seed: int = 0
    workers: int = 0
    patience: float = 20.0  # seconds that a rank waits for another
    rate: float = 1e-3
    harm: tuple[str, str] | None = None  # a decoder's deed at a key
    cut: bool = False  # FSDP2 and sharded checkpoints in place of DDP and single files
    sampling: tuple[str, int | None] | None = None  # raises or is slow, at a rank or all


# ------------------------------------------------------------------ the program, as a user writes it


class Diffusion(L.LightningModule):
    """The network and objective of dit_video, trained by Lightning's automatic optimisation."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = compose("train", take_apart([*SMALL, "data.shards=none"]))
        self.network = make_network(config, device="cpu")
        initialise(self.network, settings.seed)
        self.objective = make_objective(config)
        self.settings, self.spoil = settings, lambda losses: losses

    def configure_model(self) -> None:
        if self.settings.cut:
            for block in self.network.transformer.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network.transformer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network.text, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        slots = torch.randint(0, 2**31, (len(batch["captions"]),))  # the objective's noise, from torch's own generator
        clips = Batch(batch["video"], batch["captions"], batch["keys"], slots, 8.0)
        losses = self.objective(self.network, clips, self.network.tokens)
        loss = self.spoil(losses.per_clip.mean())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=self.settings.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 2) * (1 - step / STEPS))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decode_mp4(key: str, data: bytes) -> Any:
    """A handler for webdataset's decode: clips, which it would leave as they are."""
    if not key.endswith("mp4"):
        return None
    return decode_clip(data, num_frames=9, fps=8, height=32, width=32, start_seconds=lambda slack: 0.0, decoder="pyav").video


def read(sample: dict[str, Any], harm: tuple[str, str] | None) -> tuple[str, Any, str]:
    """A clip's name, frames and caption."""
    if harm and sample["__key__"] == harm[1]:
        import bad_decoder

        bad_decoder.harm(harm[0])
    return f"{Path(sample['__url__']).name}:{sample['__key__']}", sample["mp4"], sample["txt"]


def collate(samples: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    """A batch of clips."""
    keys, videos, captions = zip(*samples, strict=True)
    return {"keys": list(keys), "video": torch.from_numpy(np.stack(videos)), "captions": list(captions)}


def loader_of(settings: Settings, ranks: int) -> Any:
    """Shards split over ranks and workers, shuffled by seed, samples that fail left out with a warning."""
    urls = [settings.shards] if settings.shards.startswith("pipe:") else sorted(glob.glob(settings.shards))
    dataset = (
        wds.WebDataset(
            urls, nodesplitter=wds.split_by_node, shardshuffle=100, detshuffle=True, seed=settings.seed,
            handler=wds.warn_and_continue,
        )
        .shuffle(16, rng=__import__("random").Random(settings.seed))
        .decode(decode_mp4, handler=wds.warn_and_continue)
        .map(partial(read, harm=settings.harm), handler=wds.warn_and_continue)
        .batched(8 // ranks, collation_fn=collate, partial=True)
    )  # fmt: skip
    workers = {"num_workers": settings.workers, "timeout": 2, "multiprocessing_context": "fork"} if settings.workers else {}
    return wds.WebLoader(dataset, batch_size=None, **workers)


class Sampling(L.Callback):
    """Samples now and then, with a generator of its own, as a user's callback would."""

    def __init__(self, place: Place, how: str, rank: int | None) -> None:
        self.place, self.how, self.rank = place, how, rank

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % 3 == 0 and self.rank in (None, self.place.rank):
            if self.how == "raises":
                raise RuntimeError("a fault of the harness")
            time.sleep(2)


class Faults(L.Callback):
    """Lets the program come to the points of a plan."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        harness.trace(self.place, step, SimpleNamespace(keys=batch["keys"], weights=torch.ones(len(batch["keys"]))))
        self.place.come_to("step", step)
        loss, gradient = self.place.come_to("loss", step), self.place.come_to("gradient", step)
        pl_module.spoil = (lambda x: x * float(loss)) if loss else Spoiled.apply if gradient else (lambda x: x)


def points_of_saves(place: Place) -> None:
    """Lets the atomic save of single files come to named points: a save of ours is two files here, the newest and last.ckpt."""
    from fsspec.implementations.local import LocalFileOpener

    write, commit = LocalFileOpener.write, LocalFileOpener.commit

    def in_two(self: Any, data: bytes, *more: Any) -> Any:
        if "w" not in self.mode or len(data) < 10_000:
            return write(self, data, *more)
        place.come_to("before the file")
        half = write(self, data[: len(data) // 2], *more)
        self.f.flush()
        place.come_to("half of the file")
        return half + write(self, data[len(data) // 2 :], *more)

    def committed(self: Any) -> None:
        place.come_to("before the rename")
        commit(self)
        place.come_to("renamed")

    LocalFileOpener.write, LocalFileOpener.commit = in_two, committed
    write_data = FileSystemWriter.write_data

    def shard_written(self: Any, *arguments: Any) -> Any:
        place.come_to("before a rank's shard")
        return write_data(self, *arguments)

    FileSystemWriter.write_data = shard_written


def train(place: Place, settings: Settings) -> int:
    """Trains, going on from last.ckpt where there is one."""
    warnings.filterwarnings("ignore", ".*(many workers|log_every_n_steps|IterableDataset|LeafSpec).*")
    points_of_saves(place)
    L.seed_everything(settings.seed, workers=True)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(settings.folder)
    newest = ModelCheckpoint(
        folder / "checkpoints", monitor="step", mode="max", save_top_k=2, save_last=True, every_n_train_steps=settings.save_every,
        save_on_exception=True,
    )  # fmt: skip
    sampling = [Sampling(place, *settings.sampling)] if settings.sampling else []
    limit = timedelta(seconds=settings.patience)
    several = (
        ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, timeout=limit)
        if settings.cut
        else DDPStrategy(timeout=limit)
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=several if ranks > 1 else "auto",
        precision="bf16-mixed", max_steps=settings.steps, gradient_clip_val=1.0, callbacks=[Faults(place), *sampling, newest],
        logger=CSVLogger(folder, name="", version=0), log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(Diffusion(settings), loader_of(settings, ranks), ckpt_path=str(last) if last.exists() else None)
    return 0


# ------------------------------------------------------------------ the system, as rows see it


@dataclass(frozen=True)
class Baseline:
    """A run of plain Lightning + webdataset."""

    shards: str
    name = "baseline"

    def leg(
        self, folder: Path, ranks: int = 1, plan: Sequence[Fault] = (), more: Sequence[Any] = (),
        change: Mapping[str, Any] | None = None, **options: Any,
    ) -> Leg:  # fmt: skip
        settings = Settings(str(folder / "run"), **({"shards": self.shards} | dict(change or {})))
        return leg(train, (settings,), folder, ranks, plan, **options)

    @staticmethod
    def checkpoints(folder: Path) -> Path:
        return folder / "run" / "checkpoints"

    def saved(self, folder: Path) -> dict[int, Path]:
        """Every checkpoint that can be read, by its step; last.ckpt comes last, as it is what is gone on from."""
        found = {}
        paths = [*sorted(self.checkpoints(folder).glob("epoch*.ckpt")), *self.checkpoints(folder).glob("last*.ckpt")]
        for path in paths:
            with suppress(Exception):
                found[int(torch.load(path, weights_only=True)["global_step"])] = path
        return found

    def state(self, path: Path) -> dict[str, torch.Tensor]:
        saved = torch.load(path, weights_only=True)
        found = dict(saved["state_dict"])
        for number, state in saved["optimizer_states"][0]["state"].items():
            found |= {f"optimiser/{number}/{key}": torch.as_tensor(value) for key, value in state.items()}
        return found

    def hash(self, path: Path) -> str:
        return digest(self.state(path))

    def record(self, folder: Path) -> list[dict[str, Any]]:
        return []

    def losses(self, folder: Path) -> dict[int, float]:
        """Of the latest start, whose log takes the place of the one before."""
        path = folder / "run" / "version_0" / "metrics.csv"
        path = path if path.exists() else next(iter((folder / "run").rglob("metrics.csv")), path)
        with suppress(OSError), path.open() as file:
            return {int(line["step"]) + 1: float(line["train/loss"]) for line in csv.DictReader(file)}
        return {}

    def skipped(self, folder: Path, name: str = "") -> list[dict[str, Any]]:
        return []


def step_of_last(bench: Bench, folder: Path) -> int:
    """Where it would go on from."""
    with suppress(Exception):
        return int(torch.load(bench.system.checkpoints(folder) / "last.ckpt", weights_only=True)["global_step"])
    return 0


# ------------------------------------------------------------------ rows that are done in another way than for ours


POINTS = ("before the file", "half of the file", "before the rename", "renamed")


def killed_in_a_save(bench: Bench) -> Trials:
    """2. Single files under DDP, killed at each point of the writing of either file: is there one that loads, of one step alone?"""
    straight = bench.undisturbed(2)
    for point, number in itertools.product(POINTS, (3, 4)):  # the newest, then last.ckpt, of the second save
        with bench.trial("save") as folder:
            bench.system.leg(folder, 2, [Fault(0, number, point, "SIGKILL")])
            last, left = step_of_last(bench, folder), sorted(bench.system.saved(folder))
            rest = [path.name for path in bench.system.checkpoints(folder).iterdir() if path.suffix != ".ckpt"]
            yield f"{point} {number}", Outcome(last > 0, f"last.ckpt of step {last}, readable {left}, left over {rest}")
    del straight
    yield from killed_in_a_sharded_save(bench)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a sharded checkpoint, put together as Lightning does."""
    return _load_distributed_checkpoint(path)["state_dict"]


def killed_in_a_sharded_save(bench: Bench) -> Trials:
    """2. FSDP2 with sharded checkpoints, one rank killed before its part of either folder: is last.ckpt of one step alone?"""
    straight = bench.out / "straight-sharded"
    bench.system.leg(straight, 2, change={"cut": True})
    sound = {step: digest(weights_in(next((straight / "run/checkpoints").glob(f"*step={step}.ckpt")))) for step in (9, 12)}
    for number, rank in itertools.product((5, 6), (0, 1)):  # the newest folder, then last.ckpt, of the third save
        with bench.trial("sharded") as folder:
            bench.system.leg(folder, 2, [Fault(rank, number, "before a rank's shard", "SIGKILL")], change={"cut": True})
            before = folder / "run/checkpoints"
            whole = {step: digest(weights_in(next(before.glob(f"*step={step}.ckpt")))) for step in (6,)} | sound
            try:
                found = next((step for step, of in whole.items() if of == digest(weights_in(before / "last.ckpt"))), None)
                told = f"of step {found}" if found else "loads, but is of NO step: a hybrid"
            except Exception as error:
                found, told = None, f"cannot be read: {error!r}"[:100]
            which = "last.ckpt" if number == 6 else "the newest"
            yield f"sharded, {which}, rank {rank}", Outcome(found is not None, f"last.ckpt {told}")


def told_to_stop(bench: Bench) -> Trials:
    """4. Signals: exit status 143 and no step lost."""
    plans = {
        "SIGTERM at both ranks": Fault(0, 5, "step", "SIGTERM", victim=-1), "SIGTERM at rank 0": Fault(0, 5, "step", "SIGTERM"),
        "SIGTERM at rank 1": Fault(1, 5, "step", "SIGTERM"),
        "SIGUSR1 at rank 0": Fault(0, 7, "step", "SIGUSR1"), "SIGTERM twice at rank 1": Fault(1, 8, "step", "SIGTERM+SIGTERM"),
        "SIGTERM at rank 0 during a save": Fault(0, 3, "half of the file", "SIGTERM"),
        "SIGUSR1 at rank 1 during a save": Fault(0, 3, "half of the file", "SIGUSR1", victim=1),
    }  # fmt: skip
    straight = bench.undisturbed(2)
    for name, fault in plans.items():
        with bench.trial("stop") as folder:
            cut = bench.system.leg(folder, 2, [fault])
            stepped, saved = max(traced(folder), default=0), step_of_last(bench, folder)
            end = equal_end(bench, folder, straight, until_done(bench, folder, 2))
            right = cut.codes == [143, 143] and saved >= stepped and end.right
            yield name, Outcome(right, f"exit {cut.codes}, step {stepped} begun, {saved} saved; {end.told}")


def no_room(bench: Bench) -> Trials:
    """3. No space left for one save, every save, the last, and the log."""
    straight = bench.undisturbed(1)
    plans = {
        "one save": [(6, "no room", 20_000), (8, "room", 0)], "every save from the second on": [(6, "no room", 20_000)],
        "the last save": [(12, "no room", 20_000)], "the log": [(5, "no room", 0)],
    }  # fmt: skip
    for name, deeds in plans.items():
        with bench.trial("room") as folder:
            plan = [Fault(0, step, "step", deed, seconds=size) for step, deed, size in deeds]
            cut = bench.system.leg(folder, 1, plan)
            last = step_of_last(bench, folder)
            left = [path.name for path in bench.system.checkpoints(folder).iterdir() if path.suffix != ".ckpt"]
            unreadable = len(list(bench.system.checkpoints(folder).glob("*.ckpt"))) - len(bench.system.saved(folder)) - (last > 0)
            end = equal_end(bench, folder, straight, cut if cut.done else until_done(bench, folder, 1))
            right = last > 0 and not left and end.right
            told = f"{cut.told}; last.ckpt of step {last}, left over {left}, unreadable {max(unreadable, 0)}; {end.told}"
            yield name, Outcome(right, told)


def harmed_shards(bench: Bench) -> Trials:
    """6. Corruptions of a shard: are the lost clips named one by one, and is no clip trained on in part or twice?"""
    for name, at in itertools.product(rows.SIX, (5, 20)):
        with bench.trial("shard") as folder:
            shard, keys = rows.copied_world(bench, folder)
            CORRUPTIONS[name].change(shard, at)
            lost = {keys[number] for number in CORRUPTIONS[name].lost(at, len(keys))}
            yield f"{name} at clip {at}", counted(bench, folder, lost)


def counted(bench: Bench, folder: Path, lost: set[str], **change: Any) -> Outcome:
    """One pass over 64 clips: what was trained on, and which of the lost ones the log names."""
    done = bench.system.leg(folder, 1, change={"shards": f"{folder}/shards/*.tar", "steps": 8} | change, limit=60)
    first_pass, seen = [], set()
    for step in traced(folder).values():
        keys = [rows.key_of(name) for name, _ in step]
        if seen & set(keys):
            break  # the next pass
        first_pass += keys
        seen |= set(keys)
    named = {key for key in lost if key in done.log}
    wrong = seen & lost
    gone = 64 - len(seen)
    right = done.done and named == lost and not wrong and gone == len(lost)
    return Outcome(
        right, f"{len(lost)} lost: {len(named)} named, {len(wrong)} of them trained on; {gone} missing from the pass; {done.told}"
    )


def harmed_videos(bench: Bench) -> Trials:
    """7. Faults of a video: named and left out."""
    for name in rows.NAMES_OF_VIDEOS:
        with bench.trial("video") as folder:
            shard, keys = rows.copied_world(bench, folder)
            with tarfile.open(shard) as tar:
                files = [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]
            good = next(data for header, data in files if header.name == f"{keys[7]}.mp4")
            bad = rows.bad_videos(good)[name]
            with tarfile.open(shard, "w") as tar:
                for header, data in files:
                    data = bad if header.name == f"{keys[7]}.mp4" else data
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
            yield name, counted(bench, folder, set() if name == "uneven frame times" else {keys[7]})


def harmful_decoders(bench: Bench) -> Trials:
    """8. A decoder in a worker hangs, crashes, aborts, leaks."""
    for deed in rows.DEEDS:
        with bench.trial("decoder") as folder:
            _, keys = rows.copied_world(bench, folder)
            yield deed, counted(bench, folder, {keys[11]}, workers=1, harm=(deed, keys[11]))


def not_a_number(bench: Bench) -> Trials:
    """9. A loss or gradient that is no number on one rank: are the weights still numbers, and is it told?"""
    for what, times in itertools.product(("loss", "gradient"), (1, 3)):
        with bench.trial("nan") as folder:
            done = bench.system.leg(folder, 2, [Fault(1, 5 + number, what, "nan") for number in range(times)])
            saved = bench.system.saved(folder)
            finite = {
                step: all(bool(torch.isfinite(v).all()) for v in bench.system.state(path).values())
                for step, path in saved.items()
            }
            spoiled = sorted(step for step, sound in finite.items() if not sound)
            yield (
                f"{what}, {times} in a row",
                Outcome(not spoiled and bool(saved), f"checkpoints with no numbers in them: {spoiled}; {done.told}"),
            )


def hung_ranks(bench: Bench) -> Trials:
    """10. A rank is stopped, slow, or holds the interpreter: do all end in time, is it named, does it go on?"""
    for deed, rank in itertools.product(("SIGSTOP", "sleep", "hold the interpreter"), (0, 1)):
        with bench.trial("hang") as folder:
            done = bench.system.leg(folder, 2, [Fault(rank, 6, "step", deed, seconds=600)], change={"patience": HUNG}, limit=60)
            began = float((folder / "done-0").read_text())
            took = time.time() - began
            told = f"all ranks ended after {took:.0f} s (the harness killed the stuck one), rank named: "
            named = f"rank {rank} hangs" in done.log
            yield f"{deed}, rank {rank}", Outcome(named and took < HUNG + 5, f"{told}{named}; {done.told}")


def uneven(bench: Bench) -> Trials:
    """11. Uneven shards and fewer shards than ranks: equal steps, no hang."""
    for name, sizes in {"uneven shards": [50, 3, 11], "fewer shards than ranks": [64], "a rank without a clip": [1]}.items():
        with bench.trial("uneven") as folder:
            shards = rows.sharded(folder, bench.system.shards, sizes)
            done = bench.system.leg(folder, 2, change={"shards": shards, "patience": HUNG}, limit=60)
            steps = [sum(1 for _ in path.open()) for path in sorted(folder.glob("trace-*.jsonl"))]
            yield name, Outcome(done.done and steps == [STEPS, STEPS], f"steps of the ranks {steps}; {done.told}")


def flip(path: Path) -> None:
    """One bit of the weights, which are most of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)


def damaged_checkpoints(bench: Bench) -> Trials:
    """12. last.ckpt has a flipped bit, is cut off, is gone: refused, and the one before taken."""
    damages: dict[str, Callable[[Path], Any]] = {
        "bit flipped": flip, "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]), "file missing": Path.unlink,
    }  # fmt: skip
    straight = bench.undisturbed(1)
    with bench.trial("damage") as begun:
        bench.system.leg(begun, 1, [Fault(0, 8, "step", "SIGKILL")])
        for name in damages:
            with bench.trial("damage") as folder:
                shutil.copytree(begun / "run", folder / "run")
                damages[name](bench.system.checkpoints(folder) / "last.ckpt")
                done = bench.system.leg(folder, 1)
                first = min(traced(folder), default=0)
                end = equal_end(bench, folder, straight, done)
                yield name, Outcome(first == 4 and end.right, f"went on with step {first or 'none'}; {end.told}")


def beside_training(bench: Bench) -> Trials:
    """14. A sampling callback raises or is slow: the state is that of a run without it."""
    straight = bench.undisturbed(2)
    for name, sampling in {
        "raises on all ranks": ("raises", None),
        "raises on one rank": ("raises", 1),
        "slow on one rank": ("slow", 0),
    }.items():
        with bench.trial("beside") as folder:
            done = bench.system.leg(folder, 2, change={"sampling": sampling})
            yield name, equal_end(bench, folder, straight, done)


def changed(bench: Bench) -> Trials:
    """15. The config or the data is another one on resume: refused with what differs."""
    with bench.trial("changed") as begun:
        bench.system.leg(begun, 1, [Fault(0, 8, "step", "SIGKILL")])
        for name in ("learning rate", "seed", "a shard is gone", "a clip is another"):
            with bench.trial("changed") as folder:
                shutil.copytree(begun / "run", folder / "run")
                rows.copied_world(bench, folder)
                change: dict[str, Any] = {"shards": f"{folder}/shards/*.tar"}
                if name == "a shard is gone":
                    next((folder / "shards").glob("00001*.tar")).unlink()
                elif name == "a clip is another":
                    rows.rename_a_clip(folder / "shards")
                else:
                    change |= {"rate": 7e-4} if name == "learning rate" else {"seed": 3}
                done = bench.system.leg(folder, 1, change=change)
                yield name, Outcome(not done.done and "then" in done.log, f"went on without a word: {done.done}")


def two_jobs(bench: Bench) -> Trials:
    """16. A second job in the same folder; a requeued one."""
    straight = bench.undisturbed(1)
    with bench.trial("jobs") as folder:
        seen: list[Leg] = []

        def second(running: Any) -> None:
            while not (folder / "done-0").exists() and running.alive():
                time.sleep(0.01)
            (folder / "second").mkdir()
            seen.append(leg(train, (Settings(str(folder / "run"), bench.system.shards),), folder / "second", 1))

        bench.system.leg(folder, 1, [Fault(0, 5, "step", "sleep", seconds=8)], outside=second)
        yield "two jobs", Outcome(seen[0].codes == [1], f"the second: exit {seen[0].codes}, both wrote to the same folder")
    with bench.trial("jobs") as folder:
        bench.system.leg(folder, 1, [Fault(0, 5, "step", "SIGTERM")])
        end = equal_end(bench, folder, straight, bench.system.leg(folder, 1))
        yield "requeued", Outcome(end.right, f"found its folder; {end.told}")


def hostile(bench: Bench) -> Trials:
    """17. Hostile inputs: refused or without effect, no canary, memory bounded."""
    straight = bench.undisturbed(1)
    usual = int((straight.folder / "peak-0").read_text())
    names = (
        "pickle as a checkpoint",
        "pipe: address",
        ".pkl member",
        "gzip bomb",
        "../ key",
        "symlink member",
        "captions of 10 MB and of HTML",
    )
    for name in names:
        with bench.trial("hostile") as folder:
            canary = folder / "canary"
            done = attack(bench, folder, canary, name)
            peak = int((folder / "peak-0").read_text()) if (folder / "peak-0").exists() else 0
            clips = {key for step in traced(folder).values() for key, _ in step}
            bad = name == "../ key" and any("/" in rows.key_of(key) for key in clips)
            safe = not canary.exists() and peak - usual < rows.ROOM and not done.hung and not bad
            yield (
                name,
                Outcome(
                    safe,
                    f"canary {canary.exists()}, {(peak - usual) / 1024:+.0f} MiB, {len(clips)} clips trained on; {done.told}",
                ),
            )


def attack(bench: Bench, folder: Path, canary: Path, name: str) -> Leg:
    """Does it; gives how the program ended."""
    import pickle

    from test_hostile import gzip_bomb

    system = bench.system
    if name == "pickle as a checkpoint":
        system.leg(folder, 1, [Fault(0, 8, "step", "SIGKILL")])
        (system.checkpoints(folder) / "last.ckpt").write_bytes(pickle.dumps(Canary(canary)))
        return system.leg(folder, 1)
    if name == "pipe: address":
        return system.leg(folder, 1, change={"shards": f"pipe:touch {canary}"}, limit=30)
    if name == "gzip bomb":
        (folder / "shards").mkdir()
        gzip_bomb(folder / "shards" / "0.tar")
        return system.leg(folder, 1, change={"shards": f"{folder}/shards/*.tar"}, limit=30)

    def change(files: list) -> list:
        stem = files[0][0].name.partition(".")[0]
        if name == ".pkl member":
            return [*files, *(rows.member(f"{stem}.{ending}", pickle.dumps(Canary(canary))) for ending in ("pkl", "pyd", "pth"))]
        if name == "../ key":
            for header, _ in files:
                if header.name.startswith(stem + "."):
                    header.name = f"../{header.name}"
        elif name == "symlink member":
            for number, (header, _) in enumerate(files):
                if header.name == f"{stem}.mp4":
                    header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
                    files[number] = (header, b"")
        else:
            files = [(header, b"word " * 2**21 if header.name == f"{stem}.txt" else data) for header, data in files]
        return files

    shards = rows.shards_with(folder, system.shards, change)
    return system.leg(folder, 1, change={"shards": shards}, limit=60)


TRIALS = {1: 12}
ROWS_OF_BASELINE: dict[int, Callable[[Bench], Iterator[tuple[str, Outcome]]]] = {
    1: rows.killed_at_random, 2: killed_in_a_save, 3: no_room, 4: told_to_stop, 5: rows.elastic, 6: harmed_shards, 7: harmed_videos,
    8: harmful_decoders, 9: not_a_number, 10: hung_ranks, 11: uneven, 12: damaged_checkpoints, 14: beside_training, 15: changed,
    16: two_jobs, 17: hostile,
}  # fmt: skip
