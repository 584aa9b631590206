"""Prints what the clip stream must show, measured here and now; allow a quarter of an hour.

    make setup && .venv/bin/python experiments/must_show/clip_stream.py            # everything
    .venv/bin/python experiments/must_show/clip_stream.py 2 7                      # some of the lines

A line ends in PASS or FAIL. Line 6 fetches the footage where it is not here; line 8 trains `make demo` and `make demo-real` where
runs/ does not hold them, which takes half an hour more.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shown import ROOT, line, show

sys.path.insert(0, str(ROOT / "tests" / "data"))


# --------------------------------------------------------------------------- 1: the sequence

STEPS = 30  # more than two passes over every source


def mixed_set(folder: Path) -> None:
    """Films of several sizes, durations and rates with two captions each, and photographs."""
    import io

    from clip_files import counting_video
    from PIL import Image

    from dit_video.data.shards import write_shard
    from dit_video.data.video_file import encode_mp4

    sizes = [(6, 16, 16, 8), (16, 16, 32, 24), (14, 16, 16, 8), (7, 20, 40, 8), (30, 48, 32, 25)]
    films = []
    for number in range(45):
        frames, height, width, fps = sizes[number % len(sizes)]
        video = encode_mp4(counting_video(frames, height, width, first=number), fps)
        films.append({"__key__": f"film{number:03d}", "mp4": video, "txt": f"film {number}", "json": {"short": f"f{number}"}})
    write_shard(folder / "films-0.tar", films[:25])
    write_shard(folder / "films-1.tar", films[25:])
    photos = []
    for number in range(13):
        out = io.BytesIO()
        Image.fromarray(counting_video(1, 24, 48, first=number)[0]).save(out, "PNG")
        photos.append({"__key__": f"photo{number:03d}", "png": out.getvalue(), "txt": f"photo {number}"})
    write_shard(folder / "photos-0.tar", photos)


def stream(folder: Path, workers: int, seed: int = 5) -> Any:
    from dit_video.data.loader import ClipLoader

    buckets = [
        {"num_frames": 5, "height": 16, "width": 16}, {"num_frames": 5, "height": 16, "width": 32},
        {"num_frames": 9, "height": 16, "width": 16}, {"num_frames": 5, "height": 32, "width": 16},
        {"num_frames": 1, "height": 16, "width": 32},
    ]  # fmt: skip
    sources = {
        "films": {"shards": f"{folder}/films-*.tar", "weight": 0.75},
        "photos": {"shards": f"{folder}/photos-*.tar", "weight": 0.25},
    }
    return ClipLoader(
        None, 6, 5, 16, 16, 8, seed=seed, num_workers=workers, decoder="pyav", micro_batches=6, buckets=buckets, sources=sources,
        captions={"txt": 0.6, "json.short": 0.4}, cache_bytes=0,
    )  # fmt: skip


def as_rank(folder: Path, rank: int, world: int, workers: int, start: int, count: int, control: str) -> None:
    """What one rank's process does: prints slot, key, start in seconds, caption and a hash of the pixels of every clip."""
    import hashlib

    loader = stream(folder, workers, seed=5 + (rank if control == "rank-dependent random numbers" else 0))
    if control == "worker-dependent order":
        loader.plan.seed += workers
    for batch in itertools.islice(loader.batches(start, rank, world), count):
        for row, key in enumerate(batch.keys):
            if key != "filler":
                pixels = hashlib.sha256(batch.video[row].numpy().tobytes()).hexdigest()[:12]
                print(json.dumps([int(batch.slots[row]), key, round(float(batch.starts[row]), 6), batch.captions[row], pixels]))


def sequence(folder: Path, world: int, workers: int, start: int = 0, count: int = STEPS, control: str = "") -> list[list[Any]]:
    """The lines of all ranks, each in a process of its own, by slot."""
    words = [sys.executable, __file__, "--rank", str(folder)]
    running = [
        subprocess.Popen(
            [*words, *map(str, (rank, world, workers, start, count)), control], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for rank in range(world)
    ]  # fmt: skip
    found = [json.loads(each) for process in running for each in process.communicate()[0].splitlines()]
    if any(process.returncode for process in running):
        raise RuntimeError("a rank failed")
    return sorted(found)


def same_sequence() -> None:
    """Line 1: the sequence at any number of ranks and workers, and after stops."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixed_set(folder)
        straight = sequence(folder, 1, 0)
        plan = stream(folder, 0).plan
        passes = plan.clips_before(STEPS).sum(0) / [45, 13]
        line(
            1, "sequence", f"{len(straight)} clips in {STEPS} steps, {passes[0]:.1f} and {passes[1]:.1f} passes over two sources"
        )
        layouts = [(world, workers) for world in (1, 2, 3) for workers in (0, 1, 3)]
        equal = [sequence(folder, world, workers) == straight for world, workers in layouts]
        line(1, "equal at 1, 2, 3 ranks times 0, 1, 3 workers", f"{sum(equal)} of {len(equal)}", all(equal))

        rng, at, found, stops = np.random.default_rng(1), 0, [], 0
        points = sorted(rng.choice(np.arange(1, STEPS), 20, replace=False).tolist()) + [STEPS]
        for point in points:
            found += sequence(folder, int(rng.choice([1, 2, 3])), int(rng.choice([0, 1])), at, point - at)
            at, stops = point, stops + 1
        line(1, "equal after random stops, each resumed at another world size", f"{stops - 1} stops", sorted(found) == straight)

        dropped = sequence(folder, 1, 0, 0, 10) + sequence(folder, 1, 0, 0, STEPS - 10)
        line(1, "negative control, state dropped", "differs" if dropped != straight else "equal", dropped != straight)
        for control in ("worker-dependent order", "rank-dependent random numbers"):
            other = sequence(folder, 2, 1, control=control)
            line(1, f"negative control, {control}", "differs" if other != straight else "equal", other != straight)


# --------------------------------------------------------------------------- 2: corruptions


def corruptions() -> None:
    """Line 2: what becomes of damaged shards."""
    import test_corruptions as harm
    from corruptions import CORRUPTIONS

    from dit_video.data.shards import BadDataError
    from dit_video.data_tools.check import check_shards

    for name, corruption in CORRUPTIONS.items():
        exact, checked, told = 0, 0, []
        for at in (2, 5):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                harmed, _ = harm.shards_of(folder, index=True)
                corruption.change(harmed, at)
                expected = corruption.lost(at, harm.COUNT)
                trained, lost, ledger = harm.one_pass(folder)
                whole = set(range(2 * harm.COUNT))
                exact += lost == expected and {int(each["key"]) for each in ledger} == expected and trained == whole - expected
                told.append(len(expected))
                try:
                    with open(os.devnull, "w") as sink, _printing_to(sink):
                        check_shards(f"{folder}/*.tar", workers=0)
                except BadDataError:
                    checked += 1
        line(
            2,
            name,
            f"ledger exact {exact} of 2 (lost {told} of {harm.COUNT}), data check finds {checked} of 2",
            exact == checked == 2,
        )


class _printing_to:
    def __init__(self, sink: Any) -> None:
        self.sink = sink

    def __enter__(self) -> None:
        self.before, sys.stdout = sys.stdout, self.sink

    def __exit__(self, *_: object) -> None:
        sys.stdout = self.before


# --------------------------------------------------------------------------- 3: hostile input


def hostile() -> None:
    """Line 3: what is made to do harm is refused, nothing of it runs, and memory stays where it was."""
    import test_hostile as attack
    from clip_files import clip_sample, mp4_at

    from dit_video.data.decode import decode_clip
    from dit_video.data.files import expand_shards
    from dit_video.data.index import write_index
    from dit_video.data.shards import write_shard
    from dit_video.eval.judge import Clip
    from dit_video.eval.report import write_report
    from dit_video.runs import write_clips
    from dit_video.sampler.generate import Request, Sampler

    def refused(what: str, call: Callable[[], Any], lost: int | None = None) -> None:
        """Either an error that says why, or a stream that leaves out as many clips."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            weights = [weight for batch in call() for weight in batch.weights.tolist()]
            told, right = f"{weights.count(0)} of {len(weights)} clips left out", weights.count(0) == lost
        except ValueError as error:
            told, right = f"refused: {str(error).replace(str(folder), '')[:100]}", lost is None
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        line(3, what, f"{told}; memory grew by {grown:.0f} MiB", right and grown < 64 and not canary.exists())

    def decode(data: bytes) -> Any:
        return decode_clip(data, num_frames=3, fps=8, height=16, width=16)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canary, shard = folder / "canary", folder / "0.tar"
        attack.load_all(_shard_folder(folder / "warm", [clip_sample(0)]))  # what the first clip of all costs is no clip's own
        refused("pipe: address", lambda: expand_shards(f"pipe:touch {canary}"))
        for extension in ("pkl", "pth"):
            import pickle

            write_shard(shard, [clip_sample(0) | {extension: pickle.dumps(attack.Canary(canary))}, clip_sample(1)])
            write_index(shard)
            refused(f".{extension} member that runs code when unpickled (not looked at)", lambda: attack.load_all(folder), lost=0)
        write_shard(shard, [clip_sample(0) | {"mp4": pickle.dumps(attack.Canary(canary))}, clip_sample(1)])
        refused("pickle called .mp4", lambda: attack.load_all(folder), lost=1)
        attack.gzip_bomb(shard)
        refused(f"gzip bomb ({shard.stat().st_size >> 10} KiB for 256 MiB)", lambda: attack.load_all(folder))
        refused("header of 100k x 100k", lambda: decode(attack.huge_frames(100_000)))
        refused("header of 10 hours", lambda: decode(mp4_at([0, 0.1, 36_000])))
        write_shard(shard, [clip_sample(0), clip_sample(1) | {"txt": "word " * 2 * 2**20}])
        refused("10 MB caption", lambda: attack.load_all(folder), lost=1)
        for key in ("a\nb", "a\x1b[2J", "../a"):
            attack.shard_with_key(shard, key)
            keys = {each for batch in attack.load_all(folder) for each in batch.keys}
            line(3, f"key {key!r}", f"clips of the stream: {sorted(keys)}", keys == {"0.tar:good"})
        html = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        write_shard(shard, [clip_sample(0) | {"txt": html}])
        (batch,) = attack.load_all(folder)
        run = folder / "run"
        write_clips(
            run / "evaluation", [Clip("seen", Request(batch.captions[0], 0, 3, 16, 16, 8.0), batch.video[0].numpy())], Sampler()
        )
        page = write_report(run).read_text()
        safe = batch.captions[0] == html and "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
        line(3, "HTML in a caption", "text in the stream, escaped in the gallery" if safe else "NOT escaped", safe)
        line(3, "canary file", "never appeared" if not canary.exists() else "APPEARED", not canary.exists())


def _shard_folder(folder: Path, samples: list[dict[str, Any]]) -> Path:
    from dit_video.data.shards import write_shard

    folder.mkdir()
    write_shard(folder / "0.tar", samples)
    return folder


# --------------------------------------------------------------------------- 4: workers that die


def deaths() -> None:
    """Line 4: hang, crash, abort and leak in a decode worker."""
    words = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/data/test_pool.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    line(
        4,
        "hang, SIGSEGV, abort and leak, 5 times each (tests/data/test_pool.py)",
        done.stdout.strip().splitlines()[-1],
        not done.returncode,
    )


# --------------------------------------------------------------------------- 5: buckets


def buckets() -> None:
    """Line 5: 4 aspects, 3 durations and images: nothing dropped, no padding, costs level."""
    from dit_video.compose import compose, take_apart
    from dit_video.data.buckets import ClipShape, assign, level, spread
    from dit_video.data.plan import Plan
    from dit_video.train import cost_of

    cost = cost_of(compose("train", take_apart(["model=small", "model.patch=[4,8,8]"])))
    aspects = [(64, 64), (48, 80), (80, 48), (64, 96)]
    shapes = [ClipShape(frames, *size, 8.0) for frames in (9, 17, 33) for size in aspects] + [
        ClipShape(1, *size, 8.0) for size in aspects
    ]
    rng = np.random.default_rng(0)
    count = 20_000
    frames, fps = np.where(rng.random(count) < 0.2, 1, rng.integers(30, 200, count)), rng.uniform(12, 30, count)
    height, width = rng.integers(100, 1200, count), rng.integers(100, 1200, count)
    chosen = assign(shapes, frames, fps, height, width)
    records = [[np.flatnonzero(chosen == number)] for number in range(len(shapes))]
    costs = [cost(shape) for shape in shapes]
    sizes = level(costs, 64)
    plan = Plan(records, sizes, [1.0], 0)
    usable = int((chosen >= 0).sum())
    visits, number, mixed = np.zeros(count, int), 0, 0
    wanted = np.array([3 * len(bucket[0]) for bucket in records])
    while (plan.clips_before(number).sum(1) < wanted).any():  # three passes of every bucket
        step = plan.step(number)
        mixed += len(set(chosen[step.records].tolist())) > 1
        np.add.at(visits, step.records, 1)
        number += 1
    least = int(visits[chosen >= 0].min())
    line(5, "clips", f"{usable} usable of {count} in {len(shapes)} buckets of {min(len(r[0]) for r in records)} and more clips")
    line(
        5,
        "every clip came up 3 times or more",
        f"least {least}, most {visits.max()}, in {number} steps",
        least >= 3 and visits.max() <= 4,
    )
    line(5, "steps of more than one bucket", str(mixed), mixed == 0)
    share = spread(costs, sizes)
    line(
        5,
        "cost of a step, around the middle",
        f"{share:.2%} (steps of {min(sizes)} to {max(sizes)} clips)",
        min(sizes) < 8 or share <= 0.05,
    )
    line(5, "padding tokens", "0: every clip of a step has the step's shape, and the patch divides each (checked before a run)")


# --------------------------------------------------------------------------- 6: speed


def speed() -> None:
    """Line 6: the loader beside decoding alone and beside plain WebDataset; the index and the check beside the disk."""
    sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
    os.environ["OMP_NUM_THREADS"] = "1"
    import loader

    footage = ROOT / "data/footage/train"
    if not list(footage.glob("*.tar")):
        subprocess.run([ROOT / ".venv/bin/dit-video", "data", "footage"], cwd=ROOT, check=True, stdout=sys.stderr)
    found = loader.measure(f"{footage}/*.tar")
    for name in found.seconds:
        line(6, name, f"{found.rate(name):.0f} frames a second of CPU time")
    line(6, "clip stream over decoding alone", found.told("decoding alone"), found.over("decoding alone") >= 0.95)
    line(6, "clip stream over plain webdataset", found.told("plain webdataset"), found.over("plain webdataset") >= 0.98)
    disk = loader.measure_disk()
    for name, rate in disk.items():
        share = rate / disk["read from the disk"]
        line(
            6, name, f"{rate / 2**20:.0f} MiB/s" + ("" if share == 1 else f", {share:.2f} of reading"), share == 1 or share > 0.7
        )


# --------------------------------------------------------------------------- 7: ten million clips


def ten_million() -> None:
    """Line 7: how long a pass over 10 million clips in 10,000 shards takes to plan, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        for shards in (1_000, 10_000):
            done = subprocess.run(
                [sys.executable, __file__, "--plan", name, str(shards)], capture_output=True, text=True, check=True, cwd=ROOT
            )
            for told in done.stdout.splitlines():
                what, value, passed = json.loads(told)
                line(7, f"{shards * 1000} clips: {what}", value, passed)


def plan_synthetic(folder: Path, shards: int) -> None:
    from dit_video.data.buckets import ClipShape, assign, level
    from dit_video.data.index import COLUMNS, Clips, ShardIndex, save
    from dit_video.data.plan import Plan
    from dit_video.data.shards import sidecar

    def say(what: str, value: str, passed: bool | None = None) -> None:
        print(json.dumps([what, value, passed]), flush=True)

    each, rng = 1000, np.random.default_rng(0)
    paths = [folder / f"{number:05d}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        if sidecar(path).exists():
            continue
        path.touch()
        offsets = np.arange(2 * each, dtype=np.int64) * 100_000
        about = ShardIndex(
            keys=[f"{number:05d}{row:04d}" for row in range(each)], frames=rng.integers(1, 200, each).astype(np.int32),
            height=rng.integers(200, 1200, each).astype(np.int32), width=rng.integers(200, 1200, each).astype(np.int32),
            fps=rng.uniform(12, 30, each), caption_length=np.full(each, 80, np.int32), fetched=np.ones(each, np.bool_),
            extensions=["mp4", "txt"],
            member_ends=np.arange(2, 2 * each + 1, 2, dtype=np.int64), member_extension=np.tile([0, 1], each).astype(np.uint8),
            member_offset=offsets, member_size=np.full(2 * each, 90_000, np.int64), member_checksum=np.zeros(2 * each, np.int64),
            shard_bytes=0, looked=True,
        )  # fmt: skip
        assert set(COLUMNS) <= set(vars(about))
        save(about, sidecar(path))
    started = time.perf_counter()
    clips = Clips(paths, look=True)
    columns = clips.columns()
    read = time.perf_counter() - started
    shapes = [ClipShape(frames, *size, 8.0) for frames in (9, 33) for size in ((64, 64), (48, 80), (80, 48))] + [
        ClipShape(1, 64, 64, 8.0)
    ]
    started = time.perf_counter()
    chosen = assign(shapes, *(columns[key] for key in ("frames", "fps", "height", "width")))
    del columns
    records = [[np.flatnonzero(chosen == number)] for number in range(len(shapes))]
    sizes = level([float(shape.num_frames * shape.height * shape.width) for shape in shapes], 64)
    plan = Plan(records, sizes, [1.0], 0)
    plan.step(0)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(2000):
        plan.step(number)
    per_step = (time.perf_counter() - started) / 2000
    started = time.perf_counter()
    plan.step(10**7)
    jump = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say("indices read", f"{read:.1f} s")
    say("pass planned", f"{planned:.1f} s", planned < 60)
    say("a step afterwards", f"{1e6 * per_step:.0f} microseconds")
    say("step 10,000,000 asked for at once", f"{jump:.2f} s")
    say("memory of the process at most", f"{memory:.2f} GiB, {memory * 2**30 / len(clips):.0f} bytes a clip", memory < 4)


# --------------------------------------------------------------------------- 8: the demos


def demos() -> None:
    """Line 8: both demos run on the stream, and what of their time it takes."""
    from dit_video.build import make
    from dit_video.compose import compose, take_apart

    for target, run, experiment in (("demo", "demo", "world_quick"), ("demo-real", "demo-real", "footage")):
        if not (ROOT / "runs" / run / "evaluation.json").is_file():
            subprocess.run(["make", target], cwd=ROOT, check=True, stdout=sys.stderr)
        summary = json.loads((ROOT / "runs" / run / "summary.json").read_text())
        steps, core = summary["steps"], summary["training_core_seconds"]
        config = compose("train", take_apart([f"experiment={experiment}", "data.num_workers=0"]))
        batches = make(config.data).batches()
        for _ in range(600):  # the world's clips come from memory after their first visit, and there are some 500 batches of them
            next(batches)
        started = time.process_time()
        for _ in range(200):
            next(batches)
        share = (time.process_time() - started) / 200 / (core / steps)
        line(
            8,
            f"make {target}",
            f"{summary['clips']} clips, {core:.0f} core-seconds, {core / steps:.3f} a step, of which reading clips is {share:.1%}",
            share < 0.02
            if target == "demo"
            else None,  # the other decodes at every visit: line 6 says what the stream adds to that
        )


LINES: dict[int, Callable[[], None]] = {
    1: same_sequence, 2: corruptions, 3: hostile, 4: deaths, 5: buckets, 6: speed, 7: ten_million, 8: demos
}  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--rank"]:
        folder, *numbers, control = sys.argv[2:]
        as_rank(Path(folder), *map(int, numbers), control)
        return 0
    if sys.argv[1:2] == ["--plan"]:
        plan_synthetic(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    return show(LINES)


if __name__ == "__main__":
    sys.exit(main())
