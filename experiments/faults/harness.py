"""Real processes with planned faults: a run as a number of ranks, what is done to them and when, and what is left of it afterwards.

Every rank is forked from one process that has imported everything, so that starting one takes no time, and then runs the whole program
(`dit-video train ...`, or the baseline's). A plan of faults is put into it first: at a step, at a named point of a save, in a loss.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLACES = [str(HERE), str(ROOT / "tests"), str(ROOT / "tests" / "data")]
sys.path[:0] = [path for path in PLACES if path not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join(PLACES)  # where the forked processes' imports are looked for

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dit_video.train  # noqa: E402, F401  (so that a forked rank has it)
from dit_video.cli import main as program  # noqa: E402
from dit_video.trainer import checkpoint  # noqa: E402
from dit_video.trainer.launch import free_port  # noqa: E402

GRACE = 12.0
"""Seconds that the other ranks have to end by themselves when one has died, as under a launcher; then they are killed."""
LIMIT = 90.0
"""Seconds after which a leg is given up: it hangs."""


# ------------------------------------------------------------------ what is done, and when


@dataclass(frozen=True)
class Fault:
    """Something that happens in a rank when it comes to a point for the `step`-th time; of training steps the first is 1.

    Points: step (a training step begins), loss and gradient (of that step), those of checkpoint.reached (`step` counts saves), and what
    the patches of a row call.
    """

    rank: int
    step: int
    point: str
    deed: str
    seconds: float = 0.0
    victim: int | None = None  # the rank that a signal goes to; none: this one; -1: all
    once: bool = False  # not again in a process that takes the place of this one


@dataclass
class Place:
    """What a rank knows of its trial: its number, its plan, and the folder in which trials leave their marks."""

    rank: int
    plan: tuple[Fault, ...]
    folder: Path
    counts: dict[str, int] = field(default_factory=dict)

    def come_to(self, point: str, step: int | None = None) -> str | None:
        """Does what the plan says for this point; gives the deed where it is one that the caller does."""
        if step is None:
            step = self.counts[point] = self.counts.get(point, 0) + 1
        for number, fault in enumerate(self.plan):
            if (fault.rank, fault.step, fault.point) != (self.rank, step, point):
                continue
            mark = self.folder / f"done-{number}"
            if fault.once and mark.exists():
                continue
            mark.write_text(f"{time.time()}")
            self._do(fault)
            return fault.deed
        return None

    def _do(self, fault: Fault) -> None:
        victim = self.rank if fault.victim is None else "*" if fault.victim == -1 else fault.victim
        if fault.deed.startswith("SIG"):
            for name in fault.deed.split("+"):  # "SIGTERM+SIGTERM": twice
                for path in self.folder.glob(f"pid-{victim}"):
                    os.kill(int(path.read_text()), getattr(signal, name))
            if victim != self.rank:
                time.sleep(0.05)
        elif fault.deed == "hold the interpreter":
            ctypes.PyDLL(None).sleep(1000)
        elif fault.deed == "sleep":
            time.sleep(fault.seconds)
        elif fault.deed == "raise":
            raise RuntimeError("a fault of the harness")
        elif fault.deed == "no room":  # what is written from here on fails, as on a full disk
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.seconds), hard))
        elif fault.deed == "no room beyond the record":  # and none for a checkpoint either
            os.ftruncate(1, 0)  # the log is a file too
            size = (self.folder / "runs" / "run" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif fault.deed == "room":
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def trace(place: Place, step: int, batch: Any) -> None:
    """Leaves on record which clips a rank is given at a step, with their weights."""
    line = {"rank": place.rank, "step": step, "keys": list(batch.keys), "weights": batch.weights.tolist()}
    with (place.folder / f"trace-{place.rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Spoiled(torch.autograd.Function):
    """A number whose gradient is none."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


# ------------------------------------------------------------------ processes


def _rank(work: Callable[..., int | None], place: Place, ranks: int, port: int, arguments: tuple, limits: dict[str, int]) -> None:
    """What a forked process does: becomes a rank, with its output in the trial's log."""
    os.setsid()
    (place.folder / f"pid-{place.rank}").write_text(str(os.getpid()))
    log = os.open(place.folder / f"log-{place.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    if ranks > 1:
        os.environ |= environment(place.rank, ranks, port)
    torch.set_num_threads(1)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, resource.getrlimit(getattr(resource, name))[1]))
    status: Any = 70
    try:
        status = work(place, *arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(OSError):
        (place.folder / f"peak-{place.rank}").write_text(str(peak))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0",
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "faults",
    }  # fmt: skip


@dataclass
class Leg:
    """How one start of a run ended."""

    codes: list[int]
    seconds: float
    log: str
    hung: bool

    @property
    def done(self) -> bool:
        return not self.hung and all(code == 0 for code in self.codes)

    @property
    def told(self) -> str:
        """The end of it in a few words, for the table of what went wrong."""
        lines = [line for line in self.log.splitlines() if line.strip() and "Tip:" not in line]  # Lightning's advertising
        return f"{'HUNG, ' if self.hung else ''}exit {self.codes}: {lines[-1][:160] if lines else 'said nothing'}"


Outside = Callable[["Running"], None]


@dataclass
class Running:
    """The ranks of a leg while they run."""

    processes: list[Any]
    folder: Path
    began: float

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)


def killed_after(seconds: float, rank: int, since: Path | None = None) -> Outside:
    """SIGKILL from outside so long after the start, or after the first checkpoint in a folder."""

    def act(running: Running) -> None:
        while since is not None and running.alive() and not any(since.glob("[a-z]*")):
            time.sleep(0.002)
        began = running.began if since is None else time.monotonic()
        while time.monotonic() - began < seconds and running.alive():
            time.sleep(0.002)
        running.kill(rank, signal.SIGKILL)

    return act


def leg(
    work: Callable[..., int | None], arguments: tuple, folder: Path, ranks: int = 1, plan: Sequence[Fault] = (),
    outside: Outside | None = None, limit: float = LIMIT, limits: Mapping[str, int] | None = None,
) -> Leg:  # fmt: skip
    """Starts `work(place, *arguments)` in so many ranks, does what is to be done, and waits for the end."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"log-{rank}.txt" for rank in range(ranks)]
    for path in logs:
        path.unlink(missing_ok=True)
    context = forking()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(work, Place(rank, tuple(plan), folder), ranks, port, arguments, dict(limits or {})))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    running = Running(processes, folder, time.monotonic())
    if outside is not None:
        outside(running)
    hung, deadline = False, None
    while running.alive():
        time.sleep(0.01)
        now = time.monotonic()
        if deadline is None and any(process.exitcode not in (None, 0, 143) for process in processes):
            deadline = now + GRACE
        if (deadline is not None and now > deadline) or now - running.began > limit:
            hung = hung or deadline is None
            _end(processes)
    codes = [int(process.exitcode) for process in processes]
    _end(processes)
    log = "\n".join(path.read_text(errors="replace") for path in logs if path.exists())
    return Leg(codes, time.monotonic() - running.began, log, hung)


def forking() -> Any:
    """The context of processes that are forked from one that has imported everything."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if "harness" not in server._preload_modules:  # another test may have started one of its own, from which imports take seconds
        server._stop()
        server.set_forkserver_preload(["harness", "rows", "baseline"])
    return multiprocessing.get_context("forkserver")


def _end(processes: Sequence[Any]) -> None:
    """Kills ranks and whatever they have started."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join(5)


# ------------------------------------------------------------------ what is left


def digest(tensors: Mapping[str, torch.Tensor], more: Any = None) -> str:
    """A checksum over tensors in the order of their names, and over plain data."""
    total = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def traced(folder: Path, until: int | None = None) -> dict[int, list[tuple[str, float]]]:
    """The clips of every step, of all ranks in their order; a step that was done again counts as it was done last."""
    steps: dict[int, dict[int, list[tuple[str, float]]]] = {}
    for path in sorted(folder.glob("trace-*.jsonl")):
        for text in path.read_text().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                steps.setdefault(line["step"], {})[line["rank"]] = list(zip(line["keys"], line["weights"], strict=True))
    return {step: [clip for rank in sorted(ranks) for clip in ranks[rank]] for step, ranks in sorted(steps.items())}


@contextmanager
def trial_folder(out: Path, name: str, keep: bool) -> Iterator[Path]:
    """A folder for a trial, which goes when it was right."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=out))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------ the system under test, as rows see it


SMALL = (
    "logger=none", "model.width=32", "model.depth=2", "model.heads=2", "text.dim=32", "text.buckets=64", "data.batch_size=8",
    "optimisers.warmup_clips=16", "sampler.steps=2", "sample_prompts=[a small red circle moves left]", "ema_decay=0.9",
    "every.record=8", "every.monitor=24", "every.sample=0", "every.evaluate=0", "every.validate=0", "every.save=24",
    "max_clips=96", "trainer.threads=1",
)  # fmt: skip
"""The model and the world of tests/small_run.py: twelve steps of eight clips, a line of the record at each, a save at every third."""


def train(place: Place, words: Sequence[str], patches: Sequence[Callable[[Place], None]] = ()) -> int:
    """The training program in this process, with the plan put into it."""
    install(place)
    for patch in patches:
        patch(place)
    return program(["train", *words])


def install(place: Place) -> None:
    """Lets the program of this process come to the points of a plan."""
    from dit_video.trainer.module import VideoDiffusion

    take_step, gradients = VideoDiffusion.training_step, VideoDiffusion._gradients
    saves = {"done": 0}

    def reached(point: str) -> None:
        if point == "a file written":
            number = place.counts["files"] = place.counts.get("files", 0) + 1
            if number % 2 == 0:  # in the middle of a save
                place.come_to(point, saves["done"] + 1)
            return
        if point == "files written":
            saves["done"] += 1
        place.come_to(point, saves["done"])

    def training_step(self: VideoDiffusion, batch: Any, number: int) -> torch.Tensor:
        trace(place, self.steps + 1, batch)
        place.come_to("step", self.steps + 1)
        return take_step(self, batch, number)

    def _gradients(self: VideoDiffusion, learner: Any, batch: Any, compare: Any) -> Any:
        spoil_loss = place.come_to("loss", self.steps + 1)
        spoil_gradient = place.come_to("gradient", self.steps + 1)

        def spoiled(part: Any) -> Any:
            losses = compare(part)
            values = losses.per_clip * float(spoil_loss) if spoil_loss else losses.per_clip
            return replace(losses, per_clip=Spoiled.apply(values) if spoil_gradient else values)

        return gradients(self, learner, batch, spoiled if spoil_loss or spoil_gradient else compare)

    checkpoint.reached = reached
    VideoDiffusion.training_step, VideoDiffusion._gradients = training_step, _gradients  # type: ignore[method-assign]


@dataclass(frozen=True)
class Ours:
    """A run of dit_video."""

    shards: str
    name = "ours"

    def words(self, folder: Path, ranks: int, more: Sequence[str] = (), **change: Any) -> list[str]:
        """The command line; `change` holds what both systems can be told: steps, save_every (steps), shards, seed."""
        cut = [f"trainer.devices={ranks}", f"trainer.layout.shard={ranks}"] if ranks > 1 else []
        keys = {"steps": "max_clips={}", "save_every": "every.save={}", "shards": "data.shards={}", "seed": "seed={}"}
        told = [keys[key].format(value * 8 if key in ("steps", "save_every") else value) for key, value in change.items()]
        return [*SMALL, f"data.shards={self.shards}", f"runs={folder}/runs", "name=run", *cut, *told, *more]

    def leg(
        self, folder: Path, ranks: int = 1, plan: Sequence[Fault] = (), more: Sequence[str] = (),
        patches: Sequence[Callable[[Place], None]] = (), change: Mapping[str, Any] | None = None, **options: Any,
    ) -> Leg:  # fmt: skip
        """Starts the run once."""
        words = self.words(folder, ranks, more, **(change or {}))
        return leg(train, (words, tuple(patches)), folder, ranks, plan, **options)

    @staticmethod
    def checkpoints(folder: Path) -> Path:
        return folder / "runs" / "run" / "checkpoints"

    def state(self, path: Path) -> dict[str, torch.Tensor]:
        saved = checkpoint.opened(path)
        return {f"{group}/{key}": value for group in saved.groups for key, value in saved.tensors(group).items()}

    def saved(self, folder: Path) -> dict[int, Path]:
        """Every checkpoint that is verified, by its step."""
        return {
            int(path.name.split("-")[1]): path
            for path in checkpoint.listed(self.checkpoints(folder))
            if checkpoint.verify(path) is None
        }

    def hash(self, path: Path) -> str:
        meta = json.loads((path / checkpoint.META).read_text())
        return digest(self.state(path), {name: meta[name] for name in ("steps", "clips", "guard")})

    def record(self, folder: Path) -> list[dict[str, Any]]:
        """The lines that do not depend on the time of day."""
        path = folder / "runs" / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        told = [line for line in lines if "train/loss" in line or "grad/norm" in line]
        return [{key: value for key, value in line.items() if key != "time"} for line in told]

    def losses(self, folder: Path) -> dict[int, float]:
        """The loss of every step on record."""
        return {line["step"]: line["train/loss"] for line in self.record(folder) if "train/loss" in line}

    def skipped(self, folder: Path, name: str = "skipped.jsonl") -> list[dict[str, Any]]:
        path = folder / "runs" / "run" / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Outcome:
    """Of a trial: whether it came out as it must, and in words what happened."""

    right: bool
    told: str


def world(out: Path) -> str:
    """64 clips of the world in two shards, with their index."""
    from dit_video.data_tools.world_shards import write_world

    folder = out / "world"
    if not folder.exists():
        write_world(folder, clips=64, seed=0, num_frames=9, height=32, width=32, fps=8, shard_size=32, num_prompts=8, workers=1)
    return f"{folder}/*.tar"


def seeded(*words: Any) -> np.random.Generator:
    """Numbers that follow from words."""
    return np.random.default_rng(list(hashlib.sha256(repr(words).encode()).digest()[:8]))
