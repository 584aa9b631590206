"""The fault matrix: a function for each row, which gives its trials one by one; what must come out stands beside each."""

import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import torch
from clip_files import counting_video, mp4_at
from corruptions import CORRUPTIONS
from harness import Fault, Leg, Outcome, Place, digest, install, killed_after, leg, program, seeded, traced
from omegaconf import OmegaConf

from dit_video.trainer import checkpoint

STEPS = 12
SAVED_TWICE = (Fault(0, 2, "renamed", "SIGKILL"),)
"""A run that is killed when the checkpoints of steps 3 and 6 are there."""
Trials = Iterator[tuple[str, Outcome]]


@dataclass
class Bench:
    """What every row works with: the system, a folder for its trials, and runs that nothing disturbed."""

    system: Any
    out: Path
    trials: int | None = None  # so many of a row at the most
    keep: bool = False
    only: tuple[str, ...] = ()  # those whose names hold one of these words

    def __post_init__(self) -> None:
        self.straight: dict[Any, Straight] = {}

    def undisturbed(self, ranks: int = 1, **options: Any) -> "Straight":
        """A run without faults, made once; every checkpoint of it is kept."""
        key = (ranks, repr(options))
        if key not in self.straight:
            folder = self.out / f"straight-{len(self.straight)}"
            shutil.rmtree(folder, ignore_errors=True)
            more = [*options.pop("more", ()), *(["checkpoints.last=30"] if self.system.name == "ours" else [])]
            done = self.system.leg(folder, ranks, more=more, **options)
            assert done.done, f"the undisturbed run failed: {done.told}\n{done.log[-2000:]}"
            self.straight[key] = Straight(self.system, folder, done.seconds)
        return self.straight[key]

    @contextmanager
    def trial(self, name: str) -> Iterator[Path]:
        """A folder that goes when the trial is over."""
        with harness.trial_folder(self.out, name, self.keep) as folder:
            yield folder

    def some(self, trials: Sequence[Any]) -> Sequence[Any]:
        """So many of a row's trials as were asked for, spread evenly."""
        trials = [trial for trial in trials if not self.only or any(word in repr(trial) for word in self.only)]
        count = min(self.trials or len(trials), len(trials))
        return [trials[number * len(trials) // count] for number in range(count)]


class Straight:
    """What is known of an undisturbed run."""

    def __init__(self, system: Any, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.saved = system.saved(folder)
        self.last = max(self.saved)
        self.hash = system.hash(self.saved[self.last])
        self.record = system.record(folder)
        self.trace = traced(folder)
        self.first_save = seconds / 2  # about so long after its start


def equal_end(bench: Bench, folder: Path, straight: Straight, done: Leg) -> Outcome:
    """Whether a run came to its end with the state and the record of the undisturbed one."""
    if not done.done:
        return Outcome(False, f"did not end: {done.told}")
    saved = bench.system.saved(folder)
    if max(saved, default=0) != straight.last:
        return Outcome(False, f"ended at step {max(saved, default=0)} instead of {straight.last}")
    if bench.system.hash(saved[straight.last]) != straight.hash:
        return Outcome(False, "ended with another state hash")
    record = bench.system.record(folder)
    if record != straight.record:
        steps = [line["step"] for line in record if "train/loss" in line]
        return Outcome(False, f"equal hash, but another record: steps {steps}")
    return Outcome(True, "equal state hash, equal record")


def until_done(bench: Bench, folder: Path, ranks: int, starts: int = 3, **options: Any) -> Leg:
    """Starts a run again until it is done."""
    for _ in range(starts):
        done = bench.system.leg(folder, ranks, **options)
        if done.done:
            break
    return done


def hybrids(bench: Bench, folder: Path, straight: Straight) -> list[int]:
    """The steps of checkpoints that load and are not, tensor by tensor, those of the undisturbed run."""
    found = []
    for step, path in bench.system.saved(folder).items():
        if digest(bench.system.state(path)) != digest(bench.system.state(straight.saved[step])):
            found.append(step)
    return found


# ------------------------------------------------------------------ 1 to 5: processes


def killed_at_random(bench: Bench) -> Trials:
    """1. SIGKILL of a random rank at a random time: the run, started again, ends with the same state hash and record.

    Two trials of five are killed anywhere from the start of their processes on, three when a checkpoint is there, as starting takes most
    of the time of runs so short; a kill that came too late is drawn again. Every fifth run is killed again on its way.
    """
    total = bench.trials or 50
    for number in range(total):
        ranks = 1 + number % 2
        straight, rng = bench.undisturbed(ranks), seeded("killed at random", number)
        late, times = number % 5 >= 2, 1 + (number % 5 == 4)
        with bench.trial("kill") as folder:
            told: list[str] = []
            for _ in range(40):
                span = straight.seconds - straight.first_save if late and not told else straight.seconds
                after, rank = float(rng.uniform(0, span)), int(rng.integers(ranks))
                since = bench.system.checkpoints(folder) if late and not told else None
                cut = bench.system.leg(folder, ranks, outside=killed_after(after, rank, since))
                if cut.done and not told:  # it came too late: once more from the beginning
                    shutil.rmtree(folder)
                    folder.mkdir()
                elif not cut.done:
                    done, saved = max(traced(folder), default=0), max(bench.system.saved(folder), default=0)
                    told.append(f"{'saved + ' if since else ''}{after:.2f} s (step {done} begun, {saved} saved)")
                if len(told) == times or (cut.done and told):
                    break
            done = until_done(bench, folder, ranks)
            yield f"{ranks} ranks, rank {rank} killed after {' and '.join(told)}", equal_end(bench, folder, straight, done)


POINTS = {"a file written": 2, "files written": 2, "no manifest yet": 2, "not renamed yet": 2, "renamed": 2, "one removed": 3}
OF_RANK_0 = ("no manifest yet", "not renamed yet", "renamed", "one removed")


def killed_in_a_save(bench: Bench) -> Trials:
    """2. SIGKILL of either rank at each named point of a save: a verified checkpoint is there, none is a hybrid, the end is equal."""
    straight = bench.undisturbed(2)
    for point, victim in bench.some(list(itertools.product(POINTS, (0, 1)))):
        with bench.trial("save") as folder:
            where = 0 if point in OF_RANK_0 else victim
            plan = [Fault(where, POINTS[point], point, "SIGKILL", victim=victim)]
            cut = bench.system.leg(folder, 2, plan)
            found, mixed = bench.system.saved(folder), hybrids(bench, folder, straight)
            if cut.done or not found or mixed:
                outcome = Outcome(False, f"verified {sorted(found)}, hybrids {mixed}, {cut.told}")
            else:
                outcome = equal_end(bench, folder, straight, until_done(bench, folder, 2))
            yield f"{point}, rank {victim}: {sorted(found)} left", outcome


def no_room(bench: Bench) -> Trials:
    """3. No space left: training goes on or stops with a message, what was saved stays as it was, no draft is left, the end is equal."""
    few = 20_000  # bytes that a file may have
    plans = {
        "one save of one rank": (1, [(0, 6, "no room"), (0, 8, "room")]),
        "every save from the second on": (1, [(0, 6, "no room")]),
        "the last save": (1, [(0, 12, "no room")]),
        "rank 1's part of a save": (2, [(1, 6, "no room"), (1, 8, "room")]),
        "the record": (1, [(0, 5, "no room beyond the record")]),
    }
    for name in bench.some([*plans, "a tmpfs that fills up"]):
        with bench.trial("room") as folder:
            if name == "a tmpfs that fills up":
                outcome = full_tmpfs(bench, folder)
                if outcome is None:
                    print("  NOT RUN  3. a tmpfs that fills up: this machine allows no mount", flush=True)
                else:
                    yield name, outcome
                continue
            ranks, deeds = plans[name]
            straight = bench.undisturbed(ranks)
            plan = [Fault(rank, step, "step", deed, seconds=few) for rank, step, deed in deeds]
            yield name, judged_room(bench, folder, straight, ranks, bench.system.leg(folder, ranks, plan))


def judged_room(bench: Bench, folder: Path, straight: Straight, ranks: int, cut: Leg) -> Outcome:
    """Whether a run that ran out of room left things as they must be, and goes on."""
    drafts = [path.name for path in bench.system.checkpoints(folder).glob(".*")]
    whole, mixed = bench.system.saved(folder), hybrids(bench, folder, straight)
    listed = [path for path in bench.system.checkpoints(folder).glob("step-*")]
    told = any(word in cut.log for word in ("could not save", "No space left", "File too large"))
    if cut.hung or drafts or mixed or len(listed) != len(whole) or not told:
        return Outcome(False, f"drafts {drafts}, whole {len(whole)} of {len(listed)}, hybrids {mixed}, told {told}: {cut.told}")
    end = equal_end(bench, folder, straight, cut if cut.done else until_done(bench, folder, ranks))
    return Outcome(end.right, f"{'went on' if cut.done else 'stopped with a message'}, then {end.told}")


def full_tmpfs(bench: Bench, folder: Path) -> Outcome | None:
    """A disk that is full indeed, with room for little more than one checkpoint; none where the system allows no mount."""
    straight = bench.undisturbed(1)
    size = sum(file.stat().st_size for file in (straight.saved[3]).rglob("*"))
    disk = folder / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        cut = bench.system.leg(folder, 1)
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        if cut.done:
            return Outcome(False, "the disk was never full")
        return judged_room(bench, folder, straight, 1, cut)
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def told_to_stop(bench: Bench) -> Trials:
    """4. SIGTERM and SIGUSR1, twice, during a save, at either rank: exit status 143, no step lost, the end is equal."""
    plans = {
        "SIGTERM at rank 0": Fault(0, 5, "step", "SIGTERM"),
        "SIGTERM at rank 1": Fault(1, 5, "step", "SIGTERM"),
        "SIGUSR1 at rank 0": Fault(0, 7, "step", "SIGUSR1"),
        "SIGTERM twice at rank 1": Fault(1, 8, "step", "SIGTERM+SIGTERM"),
        "SIGTERM at rank 0 during a save": Fault(0, 2, "files written", "SIGTERM"),
        "SIGUSR1 at rank 1 while rank 0 commits": Fault(0, 2, "no manifest yet", "SIGUSR1", victim=1),
    }
    straight = bench.undisturbed(2)
    for name in bench.some(list(plans)):
        with bench.trial("stop") as folder:
            cut = bench.system.leg(folder, 2, [plans[name]])
            stepped, saved = max(traced(folder), default=0), max(bench.system.saved(folder), default=0)
            if cut.codes != [143, 143] or stepped != saved:
                yield name, Outcome(False, f"{stepped} steps done, {saved} saved, {cut.told}")
            else:
                yield f"{name}: stopped after step {stepped}", equal_end(bench, folder, straight, until_done(bench, folder, 2))


def elastic(bench: Bench) -> Trials:
    """5. World size 2, 1, 3, 2: losses as at one rank to 1e-5, every clip once."""
    ours = bench.system.name == "ours"
    exact = ("trainer.precision=32-true", "optimisers.muon_lr=null") if ours else ()
    straight = bench.undisturbed(1, more=exact)
    losses = bench.system.losses(straight.folder)
    with bench.trial("elastic") as folder:
        begin = 1
        for ranks, end in ((2, 3), (1, 6), (3, 9), (2, STEPS)):
            if ours and end < STEPS:  # a signal in a step ends the run after the next
                how: dict[str, Any] = {"plan": [Fault(0, end - 1, "step", "SIGTERM")]}
            else:
                how = {"change": {"steps": end}}
            done = bench.system.leg(folder, ranks, more=exact, **how)
            found, trace, wanted = bench.system.losses(folder), traced(folder), range(begin, end + 1)
            same = all(sorted(clip for clip in trace.get(step, []) if clip[1]) == sorted(straight.trace[step]) for step in wanted)
            far = max((abs(found[step] / losses[step] - 1) for step in wanted if step in found), default=float("inf"))
            right = all(step in found for step in wanted) and far < 1e-5 and same and not done.hung
            told = f"largest relative difference {far:.1e}, clips {'equal' if same else 'DIFFER'}; {done.told}"
            yield f"{ranks} ranks, steps {begin} to {end}", Outcome(right, told)
            begin = end + 1


# ------------------------------------------------------------------ 6 to 8: data


SIX = (
    "cut at a member boundary",
    "cut inside a member",
    "header overwritten",
    "bit flipped in video",
    "bit flipped in caption",
    "zero length",
)
PASS = ("max_clips=64", "data.max_bad_fraction=1")  # one pass


def copied_world(bench: Bench, folder: Path) -> tuple[Path, list[str]]:
    """A copy of the shards with their indices, and the keys of the first one's clips in its order."""
    source = Path(bench.system.shards).parent
    shutil.copytree(source, folder / "shards")
    first = sorted((folder / "shards").glob("*.tar"))[0]
    with tarfile.open(first) as tar:
        keys = [name.removesuffix(".mp4") for name in tar.getnames() if name.endswith(".mp4")]
    return first, keys


def key_of(name: str) -> str:
    """A clip's key from what a batch calls it, <shard>:<key>."""
    return name.rpartition(":")[2]


def accounted(bench: Bench, folder: Path, lost: set[str], done: Leg, planned: int = 64) -> Outcome:
    """Whether all clips but the lost were trained on once, and those are in the ledger."""
    clips = [clip for step in traced(folder).values() for clip in step]
    trained = sorted(key_of(name) for name, weight in clips if weight)
    ledger = sorted(line["key"] for line in bench.system.skipped(folder))
    told = (
        f"{len(trained)} trained ({len(set(trained))} distinct), {len(ledger)} in the ledger, of {planned}; lost were {len(lost)}"
    )
    right = done.done and len(trained) == len(set(trained)) and set(ledger) == lost and len(ledger) == len(lost)
    right = right and len(trained) + len(ledger) == planned and not set(trained) & lost
    return Outcome(right, told if done.done else f"{told}: {done.told}")


def harmed_shards(bench: Bench) -> Trials:
    """6. Six corruptions of a shard at two places: exactly the lost clips are in the ledger, all others are trained on, none in part."""
    for name, at in bench.some(list(itertools.product(SIX, (5, 20)))):
        with bench.trial("shard") as folder:
            shard, keys = copied_world(bench, folder)
            CORRUPTIONS[name].change(shard, at)
            lost = {keys[number] for number in CORRUPTIONS[name].lost(at, len(keys))}
            done = bench.system.leg(folder, 1, more=PASS, change={"shards": f"{folder}/shards/*.tar"})
            yield f"{name} at clip {at}", accounted(bench, folder, lost, done)


def sound_alone() -> bytes:
    """An mp4 without pictures."""
    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def bad_videos(good: bytes) -> dict[str, bytes]:
    """What is put in place of a sound clip of 9 frames of 32x32 pixels."""
    from test_hostile import huge_frames

    from dit_video.data.video_file import encode_mp4

    flipped = bytearray(good)
    flipped[len(good) * 2 // 3] ^= 16
    return {
        "zero bytes": b"", "truncated": good[: len(good) // 2], "bit flipped": bytes(flipped), "no video stream": sound_alone(),
        "one frame": encode_mp4(counting_video(1), 8), "header of 100,000 x 100,000": huge_frames(100_000),
        "ten hours by its header": mp4_at([*(i / 8 for i in range(9)), 36_000]),
        "uneven frame times": mp4_at([0, 0.1, 0.3, 0.35, 0.5, 0.62, 0.7, 0.9, 1.0, 1.05, 1.2]),
    }  # fmt: skip


NAMES_OF_VIDEOS = (
    "zero bytes", "truncated", "bit flipped", "no video stream", "one frame", "header of 100,000 x 100,000", "ten hours by its header",
    "uneven frame times",
)  # fmt: skip


def harmed_videos(bench: Bench) -> Trials:
    """7. Eight faults of a video: it is in the ledger, or where its frame times are merely uneven trained on; training goes on."""
    from dit_video.data.index import write_index
    from dit_video.data.shards import sidecar

    for name in bench.some(NAMES_OF_VIDEOS):
        with bench.trial("video") as folder:
            shard, keys = copied_world(bench, folder)
            with tarfile.open(shard) as tar:
                files = [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]
            good = next(data for header, data in files if header.name == f"{keys[7]}.mp4")
            bad = bad_videos(good)[name]
            with tarfile.open(shard, "w") as tar:
                for header, data in files:
                    data = bad if header.name == f"{keys[7]}.mp4" else data
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
            if name != "bit flipped":  # of which the index knows the checksum from before
                sidecar(shard).unlink()
                write_index(shard)
            more = (*PASS, "data.num_workers=1") if bench.system.name == "ours" else ()
            done = bench.system.leg(folder, 1, more=more, change={"shards": f"{folder}/shards/*.tar"})
            lost = set() if name == "uneven frame times" else {keys[7]}
            refused = (
                sum(json.loads((folder / "runs/run/data.json").read_text())["refused"].values())
                if bench.system.name == "ours" and done.done
                else 0
            )
            if refused:  # its index already says that it cannot be used, so it is in no plan
                clips = [clip for step in traced(folder, 7).values() for clip in step]
                trained = {key_of(clip) for clip, weight in clips if weight}
                yield name, Outcome(refused == 1 and not trained & lost, f"left out of the plan, as data.json says: {refused}")
            else:
                yield name, accounted(bench, folder, lost, done)


DEEDS = ("hang", "segmentation fault", "abort", "leak")


def put_decoder(place: Place, name: str, deed: str) -> None:
    """Lets the program read with a decoder that does harm."""
    from bad_decoder import HarmfulReader

    from dit_video.data import loader

    loader.ClipReader = partial(HarmfulReader, name=name, deed=deed)  # type: ignore[misc, assignment]


def harmful_decoders(bench: Bench) -> Trials:
    """8. A decoder hangs, crashes, aborts or leaks: the clip is in the ledger, the order is kept, it takes no longer than its limit."""
    workers = (*PASS, "data.num_workers=1", "data.timeout_seconds=2", f"data.worker_bytes={500 * 2**20}")
    straight = bench.undisturbed(1, more=workers)
    for deed, number in bench.some(list(itertools.product(DEEDS, range(5)))):
        names = [name for step in straight.trace.values() for name, _ in step]
        name = names[int(seeded("decoder", deed, number).integers(len(names)))]
        with bench.trial("decoder") as folder:
            done = bench.system.leg(folder, 1, more=workers, patches=[partial(put_decoder, name=name, deed=deed)])
            order = [name for step in traced(folder).values() for name, _ in step] == names
            found = accounted(bench, folder, {key_of(name)}, done)
            longer = done.seconds - straight.seconds
            right = found.right and order and longer < 2 + 5
            yield (
                f"{deed}, {name}",
                Outcome(right, f"{found.told}; order {'kept' if order else 'CHANGED'}; {longer:.1f} s longer"),
            )


# ------------------------------------------------------------------ 9 to 11: steps


def not_a_number(bench: Bench) -> Trials:
    """9. A loss or gradient that is no number, on one rank: all leave the step out, the weights stay; three in a row stop the run."""
    for what, times in bench.some(list(itertools.product(("loss", "gradient"), (1, 3)))):
        with bench.trial("nan") as folder:
            plan = [Fault(1, 5 + number, what, "nan") for number in range(times)]
            more = ("optimisers.max_skips=3", "checkpoints.last=30")
            done = bench.system.leg(folder, 2, plan, more=more, change={"save_every": 1})
            yield f"{what}, {times} in a row", judged_skips(bench, folder, times, done)


def judged_skips(bench: Bench, folder: Path, times: int, done: Leg) -> Outcome:
    """Whether the state after each step that was left out is the one before it, and the steps and their clips are told."""
    saved, told = bench.system.saved(folder), bench.system.skipped(folder, "skipped_steps.jsonl")
    before = digest(bench.system.state(saved[4]))
    same = all(digest(bench.system.state(saved[step])) == before for step in range(5, 5 + times) if step in saved)
    finite = all(bool(torch.isfinite(value).all()) for value in bench.system.state(saved[max(saved)]).values())
    dumped = [line["step"] + 1 for line in told] == list(range(5, 5 + times)) and all(len(line["clips"]) == 8 for line in told)
    if times < 3:
        ended = done.done and max(saved) == STEPS and 5 in saved
    else:
        ended = not done.done and not done.hung and "in a row" in done.log
    state = "unchanged" if same else "CHANGED"
    return Outcome(ended and same and finite and dumped, f"{len(told)} steps told, state after them {state}; {done.told}")


class Forked:
    """What the program's launcher takes for a subprocess: the same command, in a fork of this process."""

    def __init__(self, words: Sequence[str], env: dict[str, str], place: Place) -> None:
        self.place, self.rank, self.returncode = place, int(env["RANK"]), None
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.clear(), os.environ.update(env)
                (place.folder / f"pid-{self.rank}").write_text(str(os.getpid()))
                install(Place(self.rank, place.plan, place.folder))
                status = program(list(words[words.index("train") :]))
            except SystemExit as stop:
                status = int(stop.code or 0)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                with (self.place.folder / "ends.jsonl").open("a") as file:
                    file.write(json.dumps({"rank": self.rank, "code": self.returncode, "time": time.time()}) + "\n")
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def launched(place: Place, words: Sequence[str]) -> int:
    """The program as it starts its own ranks, again where they fail; the ranks are forked, to save their imports."""
    from dit_video.trainer import launch

    launch.subprocess = SimpleNamespace(Popen=partial(Forked, place=place))  # type: ignore[assignment]
    sys.argv = ["dit-video", "train", *words]
    return program(["train", *words])


HANG = 4


def hung_ranks(bench: Bench) -> Trials:
    """10. A rank is stopped, slow, or holds the interpreter: all end in the limit and 5 s, it is named; started again, the end is equal."""
    straight = bench.undisturbed(2)
    deeds = ("SIGSTOP", "sleep", "hold the interpreter")
    for deed, number in bench.some(list(itertools.product(deeds, range(5)))):
        rng = seeded("hung", deed, number)
        rank, step = int(rng.integers(2)), int(rng.integers(2, STEPS + 1))
        bearable = deed == "sleep" and number >= 3  # slow, but within the limit
        with bench.trial("hang") as folder:
            plan = [Fault(rank, step, "step", deed, seconds=1.5 if bearable else 600, once=True)]
            words = bench.system.words(folder, 2, (f"trainer.hang_seconds={HANG}", "trainer.restarts=1"))
            done = leg(launched, (words,), folder, 1, plan)
            end = equal_end(bench, folder, straight, done)
            if bearable:
                right, told = end.right and "STARTED AGAIN" not in done.log, "not stopped"
            else:
                began = float((folder / "done-0").read_text())
                ends = [json.loads(line) for line in (folder / "ends.jsonl").read_text().splitlines()]
                took = max(line["time"] for line in ends[:2]) - began
                named = f"rank {rank} hangs" in done.log
                reports = [path.read_text() for path in (folder / "runs/run/hangs").glob("hang-*.txt")]
                stacks = bool(reports) and all(f"rank {each}\n" in reports[0] for each in (0, 1)) and "File " in reports[0]
                right = end.right and took <= HANG + 5 and named and stacks and "STARTED AGAIN" in done.log
                told = f"stopped after {took:.1f} s, named {named}, stacks {stacks}"
            what = f"slow for 1.5 s of {HANG}" if bearable else "slow" if deed == "sleep" else deed
            yield f"{what}, rank {rank}, step {step}", Outcome(right, f"{told}; {end.told}")


def sharded(folder: Path, source: str, sizes: Sequence[int]) -> str:
    """The world's clips dealt out into shards of other sizes."""
    from dit_video.data.index import write_index

    (folder / "dealt").mkdir()
    files = []
    for path in sorted(Path(source).parent.glob("*.tar")):
        with tarfile.open(path) as tar:
            files += [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]
    stems = list(dict.fromkeys(header.name.partition(".")[0] for header, _ in files))
    for number, size in enumerate(sizes):
        mine, stems = set(stems[:size]), stems[size:]
        path = folder / "dealt" / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for header, data in files:
                if header.name.partition(".")[0] in mine:
                    tar.addfile(header, io.BytesIO(data))
        write_index(path)
    return f"{folder}/dealt/*.tar"


def uneven(bench: Bench) -> Trials:
    """11. Uneven shards, fewer shards than ranks, a rank without a clip, uneven held-out clips, at 2 ranks: equal steps, no hang."""
    cases: dict[str, tuple[list[int], tuple[str, ...]]] = {
        "uneven shards": ([50, 3, 11], ()),
        "fewer shards than ranks": ([64], ()),
        "a rank without a clip": ([1], ("data.batch_size=1", "max_clips=12", "every.record=1", "every.save=12")),
        "uneven held-out clips": ([32, 32], ("every.validate=24", "validation.clips=13")),
    }
    for name in bench.some(list(cases)):
        sizes, more = cases[name]
        with bench.trial("uneven") as folder:
            shards = sharded(folder, bench.system.shards, sizes)
            if bench.system.name == "ours" and "held-out" in name:
                more = (*more, f"validation.shards={shards}")
            done = bench.system.leg(folder, 2, more=more, change={"shards": shards}, limit=60)
            steps = [sum(1 for _ in path.open()) for path in sorted(folder.glob("trace-*.jsonl"))]
            yield name, Outcome(done.done and steps == [STEPS, STEPS], f"steps of the ranks {steps}; {done.told}")


# ------------------------------------------------------------------ 12: checkpoints


def flip(path: Path) -> None:
    """One bit in the middle of the largest file."""
    file = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 8
    file.write_bytes(data)


def truncate(path: Path) -> None:
    file = path / "network.rank0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove(path: Path) -> None:
    (path / "ema.rank0000.safetensors").unlink()


def swap(path: Path) -> None:
    """A rank's file of the checkpoint before it: what an overwritten checkpoint looks like after a kill."""
    shutil.copy(path.with_name("step-00000003") / "network.rank0001.safetensors", path)


def edit(path: Path) -> None:
    """The manifest says another checksum."""
    manifest = path / checkpoint.MANIFEST
    sums = json.loads(manifest.read_text())
    sums["meta.json"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(sums))


DAMAGES = {
    "bit flipped": flip,
    "truncated": truncate,
    "file missing": remove,
    "another save's shard": swap,
    "manifest edited": edit,
}


def damaged_checkpoints(bench: Bench) -> Trials:
    """12. A checkpoint of two ranks is damaged in five ways: it is refused by name, the one before is taken, the end is equal."""
    straight = bench.undisturbed(2)
    with bench.trial("damage") as begun:
        bench.system.leg(begun, 2, SAVED_TWICE)
        for name in bench.some(list(DAMAGES)):
            with bench.trial("damage") as folder:
                shutil.copytree(begun / "runs", folder / "runs")
                DAMAGES[name](bench.system.checkpoints(folder) / "step-00000006")
                done = bench.system.leg(folder, 2)
                told = "PASSED OVER" in done.log and "step-00000006" in done.log and "going on from" in done.log
                first = min(traced(folder), default=0)
                end = equal_end(bench, folder, straight, done)
                right = end.right and told and first == 4
                yield name, Outcome(right, f"named {told}, went on with step {first}, {end.told}")


# ------------------------------------------------------------------ 13 and 14: what happens beside training


class BrokenLogger:
    """In place of wandb's logger."""

    how = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        if self.how == "absent":
            raise ModuleNotFoundError("No module named 'wandb'")
        self.experiment = SimpleNamespace(finish=self.finish)

    def log_hyperparams(self, *_: Any) -> None:
        pass

    def log_metrics(self, *_: Any, **__: Any) -> None:
        if self.how == "errors":
            raise ConnectionError("500 Server Error")
        if self.how == "hangs":
            time.sleep(10_000)

    def log_video(self, *_: Any, **__: Any) -> None:
        self.log_metrics()

    def finalize(self, status: str) -> None:
        if self.how == "crashes at its end":
            raise SystemError("wandb-core is gone")

    def finish(self) -> None:
        pass


def put_logger(place: Place, how: str) -> None:
    """Lets the program find a wandb that fails."""
    from dit_video.trainer import record

    BrokenLogger.how = how
    record.WandbLogger = BrokenLogger  # type: ignore[misc, assignment]
    if how == "absent":
        sys.modules["wandb"] = None  # type: ignore[assignment]
    else:
        sys.modules["wandb"] = SimpleNamespace(Settings=lambda **_: None)  # type: ignore[assignment]


def broken_loggers(bench: Bench) -> Trials:
    """13. wandb is absent, gives errors, hangs, or crashes at its end: no step is lost, the record is whole."""
    straight = bench.undisturbed(1)
    for how in bench.some(["absent", "errors", "hangs", "crashes at its end"]):
        with bench.trial("wandb") as folder:
            done = bench.system.leg(folder, 1, more=("logger=wandb",), patches=[partial(put_logger, how=how)])
            end = equal_end(bench, folder, straight, done)
            told = "a logger " in done.log
            yield how, Outcome(end.right and told, f"{end.told}, told {told}, {done.seconds:.0f} s")


def put_sampling(place: Place, what: str, how: str, rank: int | None) -> None:
    """Lets sampling or evaluating fail, or be slow, on one rank or all."""
    from dit_video import train as module

    original = getattr(module, what)

    def broken(*arguments: Any, **named: Any) -> Any:
        if rank is None or rank == place.rank:
            if how == "raises":
                raise RuntimeError("a fault of the harness")
            time.sleep(2)
        return original(*arguments, **named)

    setattr(module, what, broken)


BESIDE = {
    "sampling raises on all ranks": ("generate", "raises", None, ()),
    "sampling raises on the last rank alone": ("generate", "raises", -1, ()),
    "so it does where weights stay cut": ("generate", "raises", -1, ("trainer.gather_to_sample=false",)),
    "sampling is slow on the last rank": ("generate", "slow", -1, ()),
    "evaluation raises": ("evaluate", "raises", None, ()),
    "evaluation raises on the last rank alone": ("evaluate", "raises", -1, ()),
}


def beside_training(bench: Bench) -> Trials:
    """14. Sampling and evaluating fail or are slow: training's state hash is that of a run without them."""
    for name, ranks in bench.some([(name, ranks) for ranks in (1, 2) for name in BESIDE if ranks > 1 or "cut" not in name]):
        straight = bench.undisturbed(ranks)
        what, how, rank, more = BESIDE[name]
        with bench.trial("beside") as folder:
            words = (
                "every.sample=24", "every.evaluate=48", "eval.suites.seen.count=2", "eval.suites.held_out.count=2", "every.validate=48",
                f"validation.shards={bench.system.shards}", "validation.clips=8", "trainer.hang_seconds=20", *more,
            )  # fmt: skip
            patch = partial(put_sampling, what=what, how=how, rank=ranks - 1 if rank == -1 else None)
            done = bench.system.leg(folder, ranks, more=words, patches=[patch])
            end = equal_end(bench, folder, straight, done)
            told = how == "slow" or f"{'sampling' if what == 'generate' else 'evaluation'} FAILED" in done.log
            yield f"{name}, {ranks} ranks", Outcome(end.right and told, f"{end.told}, told {told}")


# ------------------------------------------------------------------ 15 to 17: what users and strangers do


def changed(bench: Bench) -> Trials:
    """15. The config or the data is another one on resume: refused with what differs and nothing touched; with the flag it goes on."""
    with bench.trial("changed") as begun:
        shutil.copytree(Path(bench.system.shards).parent, begun / "shards")
        shards = {"shards": f"{begun}/shards/*.tar"}
        bench.system.leg(begun, 1, SAVED_TWICE, change=shards)
        cases = {
            "learning rate": (("optimisers.adamw_lr=0.0007",), None, "adamw_lr", "accept_changed_config=true"),
            "seed": (("seed=3",), None, "seed: 0 then, 3 now", "accept_changed_config=true"),
            "a shard is gone": ((), "gone", "64 clips then, 32 now", "accept_changed_data=true"),
            "a clip is another": ((), "other", "others or in another order", "accept_changed_data=true"),
        }
        for name in bench.some(list(cases)):
            more, data, diff, flag = cases[name]
            with bench.trial("changed") as folder:
                shutil.copytree(begun / "runs", folder / "runs")
                shutil.rmtree(begun / "shards")
                shutil.copytree(Path(bench.system.shards).parent, begun / "shards")
                if data == "gone":
                    for path in (begun / "shards").glob("00001*"):
                        path.unlink()
                elif data == "other":
                    rename_a_clip(begun / "shards")
                before = {
                    path: path.read_bytes()
                    for path in sorted((folder / "runs").rglob("*"))
                    if path.is_file() and "lock" not in path.name
                }
                refused = bench.system.leg(folder, 1, more=more, change=shards)
                after = {
                    path: path.read_bytes()
                    for path in sorted((folder / "runs").rglob("*"))
                    if path.is_file() and "lock" not in path.name
                }
                extra = ("seed=3", flag) if flag == "accept_changed_config=true" and name == "seed" else (*more, flag)
                accepted = bench.system.leg(
                    folder, 1, more=(*extra, *((("accept_changed_data=true",)) if name == "seed" else ())), change=shards
                )
                right = refused.codes == [1] and diff in refused.log and before == after and accepted.done
                told = f"diff told {diff in refused.log}, untouched {before == after}, with the flag {accepted.told}"
                yield name, Outcome(right, f"{refused.codes} {told}")


def rename_a_clip(folder: Path) -> None:
    """As many clips, one under another key."""
    from dit_video.data.index import write_index
    from dit_video.data.shards import sidecar

    shard = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        files = [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]
    stem = files[0][0].name.partition(".")[0]
    with tarfile.open(shard, "w") as tar:
        for header, data in files:
            if header.name.startswith(stem + "."):
                header.name = "another" + header.name[len(stem) :]
            tar.addfile(header, io.BytesIO(data))
    sidecar(shard).unlink()
    write_index(shard)


def two_jobs(bench: Bench) -> Trials:
    """16. A second job in the same folder is refused while the first runs, which ends equal; a requeued job finds its folder."""
    straight = bench.undisturbed(1)
    for name in bench.some(["two jobs", "requeued"]):
        with bench.trial("jobs") as folder:
            if name == "requeued":
                stopped = bench.system.leg(folder, 1, [Fault(0, 5, "step", "SIGTERM")])
                end = equal_end(bench, folder, straight, bench.system.leg(folder, 1))
                runs = [path.name for path in (folder / "runs").iterdir() if path.is_dir()]
                right = end.right and stopped.codes == [143] and runs == ["run"]
                yield name, Outcome(right, f"exit {stopped.codes}, folders {runs}, {end.told}")
                continue
            seen: list[Leg] = []

            def second(running: Any, folder: Path = folder, seen: list[Leg] = seen) -> None:
                while not (folder / "done-0").exists() and running.alive():
                    time.sleep(0.01)
                other = folder / "second"
                other.mkdir()
                words = bench.system.words(folder, 1)
                seen.append(leg(harness.train, (words,), other, 1))

            done = bench.system.leg(folder, 1, [Fault(0, 5, "step", "sleep", seconds=8)], outside=second)
            end = equal_end(bench, folder, straight, done)
            right = end.right and seen[0].codes == [1] and "is being trained by process" in seen[0].log
            yield name, Outcome(right, f"the second: {seen[0].told}; the first: {end.told}")


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def hostile_checkpoint(folder: Path, canary: Path) -> None:
    """A pickle under a safe name, with a manifest that is right."""
    path = folder / "step-00000009"
    shutil.copytree(folder / "step-00000006", path)
    (path / "ema.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    sums = json.loads((path / checkpoint.MANIFEST).read_text())
    sums["ema.safetensors"] = checkpoint._sum(path / "ema.safetensors")
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))


def hostile_metadata(folder: Path, canary: Path) -> None:
    """What torch's distributed checkpoints hold, and unpickle."""
    path = folder / "step-00000009"
    path.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (path / name).write_bytes(pickle.dumps(Canary(canary)))


def shards_with(folder: Path, source: str, change: Callable[[list], list]) -> str:
    """The world's shards, the first with its members changed and without its index."""
    from dit_video.data.shards import sidecar

    shutil.copytree(Path(source).parent, folder / "shards")
    shard = sorted((folder / "shards").glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        files = [(header, tar.extractfile(header).read()) for header in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for header, data in change(files):
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    sidecar(shard).unlink()
    return f"{folder}/shards/*.tar"


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


HOSTILE = (
    "pickle as a checkpoint", "pickled metadata in the checkpoints", "_target_ in a stored config", "pipe: address", ".pkl member",
    "gzip bomb", "../ key", "symlink member", "captions of 10 MB and of HTML",
)  # fmt: skip
ROOM = 128 * 2**10
"""KiB of memory beyond that of an undisturbed run."""


def hostile(bench: Bench) -> Trials:
    """17. Hostile inputs: refused or without effect, the canary never appears, memory stays within 128 MiB of an undisturbed run's."""
    straight = bench.undisturbed(1)
    usual = int((straight.folder / "peak-0").read_text())
    for name in bench.some(HOSTILE):
        with bench.trial("hostile") as folder:
            canary = folder / "canary"
            done, right, told = attack(bench, folder, canary, name)
            peak = int((folder / "peak-0").read_text())
            safe = not canary.exists() and peak - usual < ROOM and not done.hung
            yield (
                name,
                Outcome(right and safe, f"{told}; canary {canary.exists()}, {(peak - usual) / 1024:+.0f} MiB; {done.told}"),
            )


def attack(bench: Bench, folder: Path, canary: Path, name: str) -> tuple[Leg, bool, str]:
    """Does it; gives how the program ended and whether it did right, in words too."""
    from test_hostile import gzip_bomb

    system = bench.system
    if name in HOSTILE[:3]:
        system.leg(folder, 1, SAVED_TWICE)
        if name == "_target_ in a stored config":
            path = folder / "runs" / "run" / "config.yaml"
            config = OmegaConf.load(path)
            config.objective.levels = {"_target_": "os.system", "command": f"touch {canary}"}
            OmegaConf.save(config, path)
            words = [f"run={folder}/runs/run", "prompt=a small red circle moves left", f"out={folder}/samples"]
            done = leg(sample, (words,), folder, 1)
            return done, done.codes == [1] and "os.system" in done.log, "sampling from it refused"
        (hostile_checkpoint if name == HOSTILE[0] else hostile_metadata)(system.checkpoints(folder), canary)
        done = system.leg(folder, 1)
        if name == HOSTILE[0]:
            return done, done.codes == [1] and "cannot be used" in done.log, "refused"
        end = equal_end(bench, folder, bench.undisturbed(1), done)
        return done, end.right and "PASSED OVER" in done.log, end.told
    if name == "pipe: address":
        done = system.leg(folder, 1, change={"shards": f"'pipe:touch {canary}'"})
        return done, done.codes == [1] and "data.shards" in done.log, "refused"
    if name == "gzip bomb":
        (folder / "shards").mkdir()
        gzip_bomb(folder / "shards" / "0.tar")
        done = system.leg(folder, 1, change={"shards": f"{folder}/shards/*.tar"})
        return done, done.codes == [1] and "gzip" in done.log, "refused"

    def change(files: list) -> list:
        stem = files[0][0].name.partition(".")[0]
        if name == ".pkl member":
            return [*files, *(member(f"{stem}.{ending}", pickle.dumps(Canary(canary))) for ending in ("pkl", "pyd", "pth"))]
        if name == "../ key":
            for header, _ in files:
                if header.name.startswith(stem + "."):
                    header.name = f"../{header.name}"
        elif name == "symlink member":
            (folder / "secret.mp4").write_bytes(b"secret")
            for number, (header, _) in enumerate(files):
                if header.name == f"{stem}.mp4":
                    header.type, header.linkname = tarfile.SYMTYPE, str(folder / "secret.mp4")
                    files[number] = (header, b"")
        else:
            other = next(header.name.partition(".")[0] for header, _ in files if not header.name.startswith(stem))
            texts = {f"{stem}.txt": b"word " * 2**21, f"{other}.txt": b"<script>alert(1)</script>"}
            files = [(header, texts.get(header.name, data)) for header, data in files]
        return files

    shards = shards_with(folder, system.shards, change)
    done = system.leg(folder, 1, more=PASS if system.name == "ours" else (), change={"shards": shards})
    clips = [clip for step in traced(folder).values() for clip in step]
    trained = {key_of(clip) for clip, weight in clips if weight}
    wanted = {".pkl member": 64, "../ key": 63, "symlink member": 63}.get(name, 63)
    return (
        done,
        done.done and len(trained) == wanted and not any("/" in key for key in trained),
        f"{len(trained)} clips trained on",
    )


def sample(place: Place, words: Sequence[str]) -> int:
    """Sampling from a run's folder."""
    return program(["sample", *words])


# ------------------------------------------------------------------ 18: would this be noticed?


def forget(place: Place, what: str) -> None:
    """Breaks one part of going on from a checkpoint."""
    from dit_video.data.loader import ClipLoader
    from dit_video.trainer import checkpoint as saved
    from dit_video.trainer.callbacks import saving

    batches, restore = ClipLoader.batches, saving.restore
    if what == "random numbers":  # which follow from the slot

        def other_slots(self: Any, *arguments: Any) -> Iterator[Any]:
            for batch in batches(self, *arguments):
                batch.slots += 1000
                yield batch

        ClipLoader.batches = other_slots  # type: ignore[method-assign]
    elif what == "the loader's position":
        ClipLoader.batches = lambda self, start=0, *more: batches(self, 0, *more)  # type: ignore[method-assign]
    elif what == "averaged weights":
        saved.load_averages = lambda *_: None  # type: ignore[assignment]
    elif what == "optimisers' state":
        saved.restore_optimiser = lambda *_: None  # type: ignore[assignment]
    elif what == "learning rate":

        def without(module: Any, found: Any) -> None:
            restore(module, found)
            set_rate = module.recipe.set_rate
            steps = iter(range(10**6))
            object.__setattr__(
                module.recipe, "set_rate", lambda optimisers, clips, most: set_rate(optimisers, 8 * next(steps), most)
            )

        saving.restore = without


FORGOTTEN = ("random numbers", "the loader's position", "averaged weights", "learning rate", "optimisers' state")


def negative_controls(bench: Bench) -> Trials:
    """18. Going on from a checkpoint without one of its parts: the comparison of state hashes must fail, or it proves nothing."""
    straight = bench.undisturbed(1)
    for what in bench.some(FORGOTTEN):
        with bench.trial("control") as folder:
            bench.system.leg(folder, 1, SAVED_TWICE)
            done = bench.system.leg(folder, 1, patches=[partial(forget, what=what)])
            end = equal_end(bench, folder, straight, done)
            state = bench.system.saved(folder).get(STEPS)
            noticed = (
                done.done
                and state is not None
                and digest(bench.system.state(state)) != digest(bench.system.state(straight.saved[STEPS]))
            )
            yield what, Outcome(noticed and not end.right, f"the comparison says: {end.told}")


ROWS: dict[int, tuple[str, Callable[[Bench], Trials]]] = {
    1: ("SIGKILL of a random rank at a random time", killed_at_random),
    2: ("SIGKILL at 6 points of a save x 2 ranks", killed_in_a_save),
    3: ("no space left", no_room),
    4: ("SIGTERM, SIGUSR1, twice, during a save", told_to_stop),
    5: ("world size 2, 1, 3, 2", elastic),
    6: ("shards: 6 corruptions x 2 places", harmed_shards),
    7: ("videos: 8 faults", harmed_videos),
    8: ("decoder hangs, crashes, aborts, leaks", harmful_decoders),
    9: ("loss or gradient is no number on one rank", not_a_number),
    10: ("rank stopped, slow, holding the interpreter", hung_ranks),
    11: ("uneven data over ranks", uneven),
    12: ("damaged checkpoint", damaged_checkpoints),
    13: ("wandb absent, errors, hangs, crashes", broken_loggers),
    14: ("sampling and evaluation fail", beside_training),
    15: ("config or data changed on resume", changed),
    16: ("two jobs in a folder; requeue", two_jobs),
    17: ("hostile inputs", hostile),
    18: ("negative controls: the comparison must fail", negative_controls),
}
