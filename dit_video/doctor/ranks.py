"""Checks of how processes are started, and how they find each other and talk."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_video.doctor.finding import Finding, Settings, one_line, size
from dit_video.doctor.software import LAUNCHERS
from dit_video.trainer.launch import free_port

SECONDS = 30
"""In which the ranks must have found each other; importing torch comes before that."""
IMPORT_SECONDS = 60
NUM_VALUES, ROUNDS = 2**22, 3  # of float32, in the sums that are timed
START = "import sys; sys.path[:] = sys.argv[6:]; from dit_video.doctor.ranks import rank; rank(*sys.argv[1:6])"


def start_methods(settings: Settings) -> Finding:
    """Whether forkserver works, by which `data world` starts its workers; decode workers and ranks are plain processes."""
    known = multiprocessing.get_all_start_methods()
    told = [method for method in ("forkserver", "spawn") if method in known]
    tempfile.tempdir = settings.temporary  # as a run would, since their sockets lie in it, and the path of one may not be long
    for method in told:
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
                answer = pool.submit(pow, 2, 10).result(SECONDS)
        except Exception as error:
            advice = (
                f"set TMPDIR to a shorter path than {settings.temporary}, or one that takes sockets; or workers=1 in data world"
            )
            return Finding.of(f"{method} does not work ({one_line(error)})", failures=[advice])
        if answer != 2**10:
            return Finding.of(f"{method} gives {answer} for {2**10}", failures=["set workers=1 in data world"])
    return Finding.of(f"{' and '.join(told)} give an answer")


def process_group(settings: Settings) -> Finding:
    """Real ranks on this machine: a sum, an exchange and a barrier by gloo, and by NCCL where there are GPUs."""
    failures: list[str] = []
    answers = run_ranks("gloo", settings.devices)
    told = [_told("gloo", answers, failures)]
    if gpus := max(answer.get("gpus", 0) for answer in answers):
        told.append(_told("nccl", run_ranks("nccl", min(settings.devices, gpus)), failures))
    return Finding.of("; ".join(told), failures=failures)


def _told(backend: str, answers: list[dict[str, Any]], failures: list[str]) -> str:
    broken = [f"rank {number} {answer['error']}" for number, answer in enumerate(answers) if "error" in answer]
    if broken:
        failures += network_problems() or ["see whether a firewall keeps processes of this machine apart"]
        return f"{backend} between {len(answers)} ranks fails ({broken[0][:200]})"
    speed = f", sums {size(min(answer['speed'] for answer in answers))}/s" if len(answers) > 1 else ""
    seconds = max(answer["seconds"] for answer in answers)
    return f"{backend}: {len(answers)} ranks together in {seconds:.1f} s, all_reduce, all_to_all, barrier{speed}"


def network_problems() -> list[str]:
    """What often keeps processes of one machine apart, where it is so."""
    problems, name = [], socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        problems.append(f"this machine's name {name} leads to no address; add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo")
    known = [interface for _, interface in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = [part.lstrip("^=") for part in os.environ.get(variable, "").split(",") if part]
        missing = [part for part in asked if not any(interface.startswith(part) for interface in known)]
        if missing and known:
            problems.append(
                f"{variable} names {', '.join(missing)}, and there are {', '.join(known)}; set {variable} to one of them"
            )
    return problems


def run_ranks(backend: str, count: int, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """What each rank of a process group of this machine tells; "error" where it failed or gave no answer in time."""
    environment = {
        name: value for name, value in os.environ.items() if name not in LAUNCHERS and not name.startswith("TORCHELASTIC")
    }
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", START, backend, str(number), str(count), port, folder, *sys.path],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for number in range(count)
        ]  # fmt: skip
        until = time.monotonic() + seconds + IMPORT_SECONDS
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.1))
        return [_answer(Path(folder) / f"{number}.json", process) for number, process in enumerate(processes)]


def _answer(path: Path, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    if process.poll() is None:
        process.kill()
        process.wait()
        return {"error": "gave no answer in time"}
    return json.loads(path.read_text()) if path.exists() else {"error": f"ended with {process.returncode}"}


def rank(backend: str, number: str, count: str, port: str, folder: str) -> None:
    """The life of a rank: what it finds goes to a file."""
    try:
        found = _collectives(backend, int(number), int(count), port)
    except Exception as error:
        found = {"error": one_line(error)}
    draft = Path(folder) / f"{number}.draft"
    draft.write_text(json.dumps(found))
    draft.replace(Path(folder) / f"{number}.json")


def _collectives(backend: str, number: int, count: int, port: str) -> dict[str, Any]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    began = time.perf_counter()
    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count, timeout=timedelta(seconds=SECONDS)
    )
    summed = torch.full((3,), float(number + 1), device=device)
    dist.all_reduce(summed)
    sent = torch.arange(count, device=device) + number * count
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    dist.barrier()
    seconds = time.perf_counter() - began
    if summed.tolist() != [count * (count + 1) / 2] * 3:
        raise ValueError(f"all_reduce gives {summed.tolist()}")
    if received.tolist() != [other * count + number for other in range(count)]:
        raise ValueError(f"all_to_all gives {received.tolist()}")
    large = torch.ones(NUM_VALUES, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(large)
        large[0].item()  # on a GPU the sum is only begun until then
        best = min(best, time.perf_counter() - started)
    dist.destroy_process_group()
    return {"seconds": seconds, "speed": 4 * NUM_VALUES / best, "gpus": torch.cuda.device_count()}
