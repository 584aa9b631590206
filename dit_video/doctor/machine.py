"""Checks of memory, limits and signals, and what the system lets this process use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from dit_video.doctor.finding import Finding, Settings, size

UNKNOWN = "not known here"
GIB = 2**30

WANTED_MEMORY = 4 * GIB
"""What the program takes (about 1 GiB), and data.cache_bytes, of which 2 GiB is the default."""
LEAST_MEMORY = GIB

WANTED = {  # soft limits: under the first is a FAIL, under the second a warning; why, and the shell's word for it
    "NOFILE": (128, 1024, "shards, decode workers and process groups hold files", "ulimit -n 4096"),
    "NPROC": (32, 1024, "each thread of torch and of the decode workers counts", "ulimit -u 4096"),
    "FSIZE": (2**26, float("inf"), "a file of a checkpoint or shard may not be larger", "ulimit -f unlimited"),
    "AS": (2 * GIB, float("inf"), "torch and decoders reserve much more than they use", "ulimit -v unlimited"),
    "DATA": (2 * GIB, float("inf"), "it cuts off the memory of a run", "ulimit -d unlimited"),
    "CPU": (60, float("inf"), "a run is killed after so many seconds of all its threads", "ulimit -t unlimited"),
}
BYTES = ("FSIZE", "AS", "DATA", "CORE", "MEMLOCK")
TOLD = ("NOFILE", "NPROC", "CORE", "MEMLOCK")  # also where nothing is wrong


def memory(settings: Settings) -> Finding:
    """How much memory a run can have."""
    known = meminfo()
    if not known:
        total = _total_memory()
        return Finding.of(f"{size(total)}, available {UNKNOWN}" if total else UNKNOWN)
    free = known["MemAvailable"]
    text = f"{size(free)} of {size(known['MemTotal'])} available"
    limits = cgroup_limits("memory", "memory.max", "memory.limit_in_bytes")
    used = cgroup_limits("memory", "memory.current", "memory.usage_in_bytes")
    if limits and min(limits) < known["MemTotal"]:
        text += f", the control group's limit is {size(min(limits))}"
        if used:  # of this group itself, which stands first
            free = min(free, max(min(limits) - used[0], 0))
            text += f" with {size(used[0])} in use"
    text += f", swap {size(known['SwapFree'])} of {size(known['SwapTotal'])}" if known.get("SwapTotal") else ", no swap"
    if free >= WANTED_MEMORY:
        return Finding.of(text)
    advice = [
        f"{size(free)} is little beside data.cache_bytes (2 GiB) and the program (1 GiB); lower data.cache_bytes, end other work"
    ]
    return Finding.of(text, **{"failures" if free < LEAST_MEMORY else "warnings": advice})


def limits(settings: Settings) -> Finding:
    """The limits that the shell sets on its processes."""
    try:
        import resource
    except ImportError:
        return Finding.of(UNKNOWN)
    warnings: list[str] = []
    failures: list[str] = []
    told: list[str] = []
    for name in (*WANTED, "CORE", "MEMLOCK"):
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        soft, hard = (float("inf") if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(number))
        least, wanted, why, word = WANTED.get(name, (0, 0, "", ""))
        if name in TOLD or soft < wanted:
            told.append(f"{name} {_limit(name, soft)}")
        if soft < wanted:
            raised = f"{word} (the hard limit is {_limit(name, hard)})" if hard < wanted else word
            (failures if soft < least else warnings).append(f"{name}: {why}; {raised}")
    if told_pids := cgroup_limits("pids", "pids.max", "pids.max"):
        told.append(f"control group's processes {min(told_pids):,}")
        if min(told_pids) < 512:
            warnings.append("processes and threads of the control group: each thread counts; raise its pids.max")
    if Path("/sys/class/infiniband").is_dir() and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        warnings.append("MEMLOCK: InfiniBand pins memory; ulimit -l unlimited")
    return Finding.of(", ".join(told), warnings, failures)


def _limit(name: str, value: float) -> str:
    if value == float("inf"):
        return "unlimited"
    return size(value) if name in BYTES else f"{value:,.0f}"


def signals(settings: Settings) -> Finding:
    """Whether a run would hear what it saves and stops on; a process inherits what it ignores."""
    if not hasattr(signal, "pthread_sigmask"):
        return Finding.of(UNKNOWN)
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    deaf = {
        name: "ignored" if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN else "blocked"
        for name in names
        if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN or getattr(signal, name) in blocked
    }
    if not deaf:
        return Finding.of(f"{', '.join(names)} are delivered")
    text = ", ".join(f"{name} is {how}" for name, how in deaf.items())
    if deaf == {"SIGHUP": "ignored"}:
        return Finding.of(f"{text}, as nohup does, and the others are delivered")
    advice = []
    if {"SIGTERM", "SIGUSR1"} & deaf.keys():
        advice.append(
            "a scheduler's notice, on which a run is saved, may not reach it; see what starts this shell (trap '' TERM)"
        )
    if "SIGINT" in deaf:
        advice.append("Ctrl-C and kill -INT do not stop a run from here, as after & in a script; use kill -TERM")
    return Finding.of(text, advice or ["see what starts this shell"])


# --------------------------------------------------------------------------- what Linux tells in /proc and /sys


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def _total_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def cgroup_files(controller: str, unified: str, legacy: str, root: Path = Path("/")) -> Iterator[Path]:
    """A limit's files in this process's control group and those above it, of either version; in a container the path may be another's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            if (file := top / folder / (legacy if controllers else unified)).is_file():
                yield file


def cgroup_limits(controller: str, unified: str, legacy: str, root: Path = Path("/")) -> list[int]:
    """The numbers in those files that are limits."""
    found = (file.read_text().strip() for file in cgroup_files(controller, unified, legacy, root))
    return [int(text) for text in found if text.isdecimal() and int(text) < 2**60]  # "max", -1, and the old version's no limit


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use at once: by its affinity, and by its control group's quota, which may be a part of one."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for file in cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us", root):
        quota, *period = file.read_text().split()
        if not period:
            period = file.with_name("cpu.cfs_period_us").read_text().split()
        if quota.isdecimal():
            cores = min(cores, int(quota) / int(period[0]))
    return cores
