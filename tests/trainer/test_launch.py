"""Ranks are found as a launcher has set them, or started, and their end is told as one exit status."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import QUIET, SMALL, dit_video, records, same, tensors

from dit_video.trainer.launch import STOPPED, first_host, join, launch, ranks_from, told, wants_launch

ROOT = Path(__file__).parents[2]


def test_every_launcher_is_understood() -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert ranks_from(torchrun | {"HOME": "/"}) == torchrun
    slurm = {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "41234",
    }  # fmt: skip
    assert ranks_from(slurm) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu03", "MASTER_PORT": "21234",
    }  # fmt: skip
    submitit = {
        "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "77",
    }  # fmt: skip
    found = ranks_from(submitit)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    # an interactive shell, the batch script itself, and a job of one task are no launchers
    for alone in ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, slurm | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert ranks_from(alone) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-05,09],cpu1", "gpu03"), ("a,b", "a"), ("n-1-[7,9]", "n-1-7"), ("x1,y[2-3]", "x1")],
)
def test_the_first_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_another_number_of_processes_than_the_config_wants_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert wants_launch(2, 0) and wants_launch(1, 3) and not wants_launch(1, 0)
    with pytest.raises(ValueError, match="1 processes were started, trainer.devices and trainer.num_nodes make 2"):
        join(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not wants_launch(4, 3)
    with pytest.raises(ValueError, match="4 processes were started, .* make 1; set trainer.devices"):
        join(1)


PROGRAM = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
(folder / f"{rank}-{time.time_ns()}").touch()
attempt = len(list(folder.glob(f"{rank}-*")))
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("what", "restarts", "status", "attempts"),
    [
        ("pass", 2, 0, 1),
        ("sys.exit(143)", 2, STOPPED, 1),  # told to stop: whoever told it starts it again
        ("sys.exit(2)", 2, 2, 1),
        ("sys.exit(7 if rank == 1 else 0)", 0, 7, 1),
        ("sys.exit(7 if attempt < 3 else 0)", 5, 0, 3),
        ("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(60)", 1, 137, 2),  # the others do not keep it waiting
    ],
)
def test_the_end_of_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, restarts: int, status: int, attempts: int
) -> None:
    from dit_video.trainer import launch as module

    real = subprocess.Popen

    def popen(words: list[str], env: dict[str, str]) -> subprocess.Popen:
        assert words[1:3] == ["-m", "dit_video.cli"] and env["WORLD_SIZE"] == "2" and env["LOCAL_RANK"] == env["RANK"]
        return real([sys.executable, "-c", PROGRAM, *words[3:]], env=env)

    monkeypatch.setattr(module.subprocess, "Popen", popen)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    assert launch(2, restarts, [str(tmp_path), what]) == status
    assert [len(list(tmp_path.glob(f"{rank}-*"))) for rank in (0, 1)] == [attempts] * 2


def test_how_a_process_ended_is_told() -> None:
    assert (told(-9), told(3)) == ("by SIGKILL", "with exit status 3")


RANK = """
import atexit, sys, time
import torch, torch.distributed as dist
import dit_video.trainer.launch
from dit_video import cli

def main():
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    exec(sys.argv[4])
    if rank == 1:
        raise SystemExit(143)
    return 0

cli.main = main
cli.program()
"""
LATE = """
sys.setswitchinterval(1000)  # gloo's threads come to the interpreter when this one ends, and not before
for _ in range(8):
    tensor = torch.ones(100_000)
    dist.all_reduce(tensor, async_op=True).wait()
    del tensor
until = time.monotonic() + 0.3
while time.monotonic() < until:
    pass
"""


def test_a_rank_ends_with_its_own_status_though_gloo_lets_go_of_tensors_late(tmp_path: Path) -> None:
    for attempt in range(6):  # without `end_rank` more than half of the pairs end with SIGABRT
        store = str(tmp_path / str(attempt))
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), "2", store, LATE]) for rank in (0, 1)]
        assert [rank.wait(120) for rank in ranks] == [0, STOPPED]


def test_a_rank_that_ends_does_first_what_is_registered_for_its_end(tmp_path: Path) -> None:
    work = (
        "atexit.register(print, 'registered'); import threading; threading.Timer(0.2, print, ['a thread']).start(); print('work')"
    )
    program = [sys.executable, "-c", RANK, "0", "1", str(tmp_path / "store"), work]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout.split("\n") == [
        "work",
        "a thread",
        "registered",
        "",
    ]


def words(shards: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        "train", *SMALL, *QUIET, f"runs={runs}", f"name={name}", f"data.shards={shards}/*.tar", "trainer.precision=32-true",
        "max_clips=96", "every.record=8", "every.save=24", "trainer.devices=2", "trainer.layout.shard=2", *more,
    ]  # fmt: skip


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    program = [sys.executable, "-m", "dit_video.cli", *arguments]
    return subprocess.Popen(
        program, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def ended(process: subprocess.Popen) -> None:
    """Waits for a run to end well; where it does not, what it told is part of the failure."""
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told


def reached(run: Path, step: int, process: subprocess.Popen) -> None:
    """Waits until a run has recorded a step."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in records(run, "step")):
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    runs = tmp_path_factory.mktemp("two")
    ended(start(words(world_shards, runs, "run")))
    return runs / "run"


@pytest.mark.slow
def test_two_ranks_told_to_stop_lose_no_step_and_go_on_bit_for_bit(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    process = start(words(world_shards, tmp_path, "run"))
    reached(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == STOPPED and "got SIGTERM" in told
    stopped = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert int(stopped.name[5:]) == max(line["step"] for line in records(tmp_path / "run"))
    ended(start(words(world_shards, tmp_path, "run")))
    assert same(tensors(tmp_path / "run"), tensors(straight))
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_ranks_are_started_again(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    process = start(words(world_shards, tmp_path, "run", "trainer.hang_seconds=4", "trainer.restarts=1"))
    reached(tmp_path / "run", 4, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGSTOP)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert "rank 1 hangs (its process was stopped by a signal)" in told and "RANKS ARE STARTED AGAIN" in told
    (report,) = (tmp_path / "run" / "hangs").glob("hang-*.txt")
    assert "rank 0\n" in report.read_text() and "training_step" in report.read_text()
    assert same(tensors(tmp_path / "run"), tensors(straight))


@pytest.mark.slow
def test_looking_at_a_training_of_two_ranks_leaves_it_as_it_is(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    more = [
        "every.sample=24", "every.validate=24", f"validation.shards={world_shards}/00001.tar", "validation.clips=16",
        "every.evaluate=48", "eval.suites.seen.count=3", "eval.suites.held_out.count=2", "every.monitor=24",
    ]  # fmt: skip
    ended(start(words(world_shards, tmp_path, "run", *more)))
    assert same(tensors(tmp_path / "run"), tensors(straight))
    assert len(records(tmp_path / "run", "val/loss")) == 4 and not records(tmp_path / "run", "failed/sampling")


SRUN = """#!{python}
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--")]
ranks = []
for rank in range(2):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1",
           "SLURM_STEP_TASKS_PER_NODE": "2"}}
    ranks.append(subprocess.Popen([sys.executable, "-m", "dit_video.cli", *words[1:], "trainer.accelerator=cpu",
                                   "model/attention=math"], env=os.environ | own))
open({pids!r}, "w").write(" ".join(str(rank.pid) for rank in ranks))
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.slow
def test_the_batch_script_goes_back_into_the_queue_and_goes_on(straight: Path, world_shards: Path, tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol: SLURM itself is not here."""
    pids = tmp_path / "pids"
    for name, text in {
        "srun": SRUN.format(python=sys.executable, pids=str(pids)),
        "scontrol": f"#!/bin/sh\necho \"$@\" >> {tmp_path}/requeued\n",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "31", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = [word for word in words(world_shards, tmp_path, "run")[1:] if not word.startswith("trainer.devices")]

    def batch() -> subprocess.Popen:
        pids.unlink(missing_ok=True)
        script = ["bash", str(ROOT / "experiments" / "slurm" / "train.sbatch"), *arguments]
        return subprocess.Popen(script, env=os.environ | job, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    process = batch()
    reached(tmp_path / "run", 4, process)
    for pid in pids.read_text().split():  # as SLURM tells every task of the step
        os.kill(int(pid), signal.SIGTERM)
    assert process.wait(120) == STOPPED
    assert (tmp_path / "requeued").read_text() == "requeue 31\n"
    assert batch().wait(120) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 31\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12
    wanted, found = tensors(straight), tensors(tmp_path / "run")
    assert same(wanted, found)


def test_a_run_that_is_being_trained_is_not_trained_twice(
    world_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = ("trainer.devices", "trainer.layout")
    arguments = [word for word in words(world_shards, tmp_path, "run", "max_clips=80000") if not word.startswith(one)]
    process = start(arguments)
    reached(tmp_path / "run", 2, process)
    before = {path.name for path in tmp_path.iterdir()}
    assert dit_video(*arguments) == 1
    assert f"is being trained by process {process.pid} on " in capfd.readouterr().err
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == STOPPED
    assert {path.name for path in tmp_path.iterdir()} == before - {".run.lock"}
