"""How the processes of a run come together: found as torchrun, SLURM or submitit started them, or started here, one for each rank."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

log = logging.getLogger(__name__)

STOPPED = 143
"""Exit status of a run that was told to stop, saved, and goes on when it is started again; that of a process ended by SIGTERM."""
FINAL = (0, 2, 130, STOPPED)
"""Exit statuses after which ranks are not started again: done, a wrong command line, interrupted by the user, told to stop."""
GOING = (None, 0, STOPPED)
GRACE_SECONDS = 30  # that other ranks have to end by themselves when one has failed


def ranks_from(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as a launcher has set them; empty where none has."""
    if "RANK" in environment and "WORLD_SIZE" in environment:  # torchrun, and what we start ourselves
        own = {name: environment[name] for name in ("RANK", "WORLD_SIZE")}
        local = {"LOCAL_RANK": environment.get("LOCAL_RANK", own["RANK"])}
        local["LOCAL_WORLD_SIZE"] = environment.get("LOCAL_WORLD_SIZE", own["WORLD_SIZE"])
        return own | local | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun; the batch script itself has no step
        return {
            "RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
        }  # fmt: skip
    if int(environment.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:  # submitit's local executor
        job = sum(environment["SUBMITIT_LOCAL_JOB_ID"].encode())
        return {
            "RANK": environment["SUBMITIT_LOCAL_GLOBALID"], "WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
            "LOCAL_RANK": environment["SUBMITIT_LOCAL_LOCALID"], "LOCAL_WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + job % 20_000),
        }  # fmt: skip
    return {}


def first_host(nodes: str) -> str:
    """The first host of a SLURM list such as gpu[03-05,09],cpu1."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.partition("]")[0].split(",")[0].split("-")[0]


def join(world_size: int, accelerator: str = "cpu") -> int:
    """Joins this process to the others of its run and gives its rank; a run of one process has nothing to join.

    ValueError where a launcher started another number of processes than the config wants.
    """
    found = ranks_from(os.environ)
    started = int(found.get("WORLD_SIZE", 1))
    if started != world_size:
        raise ValueError(
            f"{started} processes were started, trainer.devices and trainer.num_nodes make {world_size}; set trainer.devices to the "
            "processes of a machine, or start as many"
        )
    if world_size == 1:
        return 0
    os.environ |= found | {"TORCHELASTIC_RUN_ID": os.environ.get("TORCHELASTIC_RUN_ID", "dit_video")}
    if not torch.distributed.is_initialized():
        backend, device = "gloo", None
        if accelerator != "cpu" and torch.cuda.is_available():  # objects and flags go by gloo, weights by NCCL
            device = torch.device("cuda", int(found["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, device_id=device)
    rank = torch.distributed.get_rank()
    if rank > 0:  # which would say the same as rank 0
        logging.getLogger("dit_video").setLevel(logging.ERROR)
    return rank


def end_rank(status: int) -> None:
    """Ends this process where it is one of several, without taking the interpreter down; what is registered with atexit is done by now.

    Gloo's threads let go of tensors late, and one that does so while the interpreter goes down ends the process by SIGABRT: a rank that
    has saved all it should would count as failed. Leaving the process group does not help, as caches inside torch keep it alive.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()  # which was registered before all else, and so would come after this
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # it is not there, whoever read it has left, or it is closed
                stream.flush()
        os._exit(status)


def wants_launch(world_size: int, restarts: int) -> bool:
    """Whether the processes of a run must still be started."""
    return (world_size > 1 or restarts > 0) and not ranks_from(os.environ)


def launch(ranks: int, restarts: int, words: Sequence[str]) -> int:
    """Starts `dit-video WORDS` once for each rank on this machine, again where ranks fail, and gives the exit status.

    SIGTERM and SIGUSR1 are passed on to the ranks.
    """
    for attempt in range(restarts + 1):
        with passed_on() as processes:
            status = _attempt(ranks, words, processes)
        if status in FINAL or attempt == restarts:
            return status
        log.warning("RANKS ARE STARTED AGAIN after exit status %d, %d of %d times", status, attempt + 1, restarts)
    raise AssertionError("unreachable")


def _attempt(ranks: int, words: Sequence[str], processes: list[subprocess.Popen]) -> int:
    port = free_port()
    for rank in range(ranks):
        own = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, "-m", "dit_video.cli", *words], env=os.environ | own))
    deadline, status = None, 0
    try:
        while any(process.poll() is None for process in processes):
            failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode not in GOING]
            if failed and deadline is None:
                rank, status = failed[0]
                deadline = time.monotonic() + GRACE_SECONDS
                log.error("rank %d ended first, %s", rank, told(status))
            if deadline is not None and time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            time.sleep(0.05)
    finally:
        for process in processes:  # where we were interrupted
            if process.poll() is None:
                process.terminate()
    codes = [process.returncode for process in processes]
    status = status or next((code for code in codes if code not in (0, STOPPED)), STOPPED if STOPPED in codes else 0)
    return 128 - status if status < 0 else status  # as a shell tells of a process that a signal ended


def told(status: int) -> str:
    """How a process ended, in words."""
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"


@contextmanager
def passed_on() -> Iterator[list[subprocess.Popen]]:
    """Processes to which SIGTERM and SIGUSR1 go that this one gets."""
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
