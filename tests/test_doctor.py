"""The doctor finds what is really broken, survives what breaks it, and leaves nothing behind."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doctor_work import under
from small_run import dit_video, files_of

from dit_video.data import decode
from dit_video.doctor import CHECKS, child, devices, machine, media, ranks, software, storage
from dit_video.doctor.finding import Finding, Settings, size
from dit_video.model.attention import math as written_out

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("runs", "scratch"):
        (tmp_path / name).mkdir()
    return Settings(str(tmp_path / "runs"), str(tmp_path / "runs/.doctor"), [], 2, str(tmp_path / "scratch"), str(tmp_path))


# --------------------------------------------------------------------------- a check in its process


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raising", "RuntimeError: no such luck"),
        ("crashing", "killed by SIGSEGV (about to go)"),
        ("leaving", "exit status 3"),
        ("crashing_at_its_end", "killed by SIGABRT after its work"),
    ],
)
def test_a_check_that_breaks_is_a_line(name: str, said: str, settings: Settings) -> None:
    found = child.run(f"doctor_work.{name}", settings, 60)
    assert found.status == "FAIL" and said in found.text and "\n" not in found.text


def test_a_check_that_talks_answers_all_the_same(settings: Settings) -> None:
    assert child.run("doctor_work.sound", settings, 60) == Finding("ok", "sound")


def test_a_check_that_hangs_is_cut_off_with_what_it_started(settings: Settings) -> None:
    found = child.run("doctor_work.hanging", settings, 3)
    assert found.status == "FAIL" and "no answer in 3 s" in found.text
    started = int((Path(settings.scratch) / "pid").read_text())
    for _ in range(100):  # it is gone, or a zombie that nobody has waited for
        try:
            if "Z" in Path(f"/proc/{started}/stat").read_text().rpartition(")")[2].split()[0]:
                return
            os.kill(started, 0)
        except (OSError, IndexError):
            return
        time.sleep(0.05)
    raise AssertionError("what it started goes on")


def test_every_check_of_the_table_is_there() -> None:
    for check in CHECKS:
        module, _, function = f"dit_video.doctor.{check.where}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), check
    assert [check.gate for check in CHECKS] == [True] + [False] * (len(CHECKS) - 1)


# --------------------------------------------------------------------------- what is installed


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Makes distributions look as if they were installed in other versions, None: not at all."""
    real = software._versions

    def seen(name: str) -> list[str]:
        key = name.replace("-", "_")
        return ([versions[key]] if versions[key] else []) if key in versions else real(name)  # type: ignore[list-item]

    monkeypatch.setattr(software, "_versions", seen)


def test_a_release_that_steals_is_named_and_nothing_else_is_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert software.known_malware(settings).status == "ok"
    installed(monkeypatch, lightning="2.6.3")
    found = software.known_malware(settings)
    assert found.status == "FAIL" and "STEALS" in found.text and "uninstall" in found.advice

    monkeypatch.setattr("dit_video.doctor.run", lambda where, settings, seconds: software.known_malware(settings))
    assert dit_video("doctor", "train=false") == 1
    assert "nothing else was run" in (out := capsys.readouterr()).out and "packages" not in out.out
    assert out.err == "dit-video: 1 of 1 checks failed: known malware\n"


def test_versions_out_of_their_range_and_missing_ones(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.packages(settings).status == "ok"
    installed(monkeypatch, torch="2.9.0", einops=None, torchcodec="0.1")
    found = software.packages(settings)
    assert found.status == "FAIL"
    for said in (
        "torch 2.9.0, <2.14,>=2.11 is needed",
        "einops is missing",
        "optional torchcodec is 0.1",
        "pip install 'einops>=0.8'",
    ):
        assert said in found.advice
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert "Python must be" in software.packages(settings).advice


def test_torchvision_beside_a_torch_of_cpus(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = software.program(settings)
    assert found.status == "ok" and "dit-video 0.1.0, commit " in found.text
    monkeypatch.setattr(software, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert software.program(settings).status == "warning"

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(software, "import_module", broken)
    found = software.program(settings)
    assert found.status == "FAIL" and "nms" in found.text and "pip uninstall torchvision" in found.advice


def test_variables_that_are_left_over(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in software.NAMES or name.startswith(software.PREFIXES):
            monkeypatch.delenv(name)
    assert software.environment(settings).status == "ok"
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("WDS_SECURE", "1")
    found = software.environment(settings)
    assert found == Finding("ok", "OMP_NUM_THREADS=7, WANDB_API_KEY=(hidden), WDS_SECURE=1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = software.environment(settings)
    assert found.status == "warning" and "unset RANK WORLD_SIZE" in found.advice
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own, which is no leftover
    assert software.environment(settings).status == "ok"
    for number in range(20):
        monkeypatch.setenv(f"SLURM_X{number}", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    found = software.environment(settings)
    assert "srun" in found.advice and "more of SLURM" in found.text


def test_wandb_that_cannot_start(settings: Settings) -> None:
    broken = "import wandb\ndef init(**given): raise OSError('no service')\nwandb.init = init"
    found = under(broken, "dit_video.doctor.software.wandb", settings)
    assert found.status == "FAIL" and "no service" in found.text and "logger=none" in found.advice
    online = "os.environ |= {'WANDB_MODE': 'online', 'NETRC': '/nowhere'}; os.environ.pop('WANDB_API_KEY', None)"
    found = under(online, "dit_video.doctor.software.wandb", settings)
    assert found.status == "warning" and "wandb login" in found.advice


# --------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("preparation", "status", "said"),
    [
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", "FAIL", "ulimit -n"),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
            "warning",
            "ulimit -n",
        ),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))", "FAIL", "ulimit -f"),
        ("resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))", "warning", "ulimit -v"),
        ("resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))", "warning", "ulimit -t"),
    ],
)
def test_limits_that_are_too_low(preparation: str, status: str, said: str, settings: Settings) -> None:
    found = under(preparation, "dit_video.doctor.machine.limits", settings)
    assert found.status == status and said in found.advice


@pytest.mark.parametrize(
    ("preparation", "said"),
    [
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "SIGTERM is ignored"),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])", "SIGUSR1 is blocked"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "SIGINT is ignored"),
    ],
)
def test_signals_that_do_not_arrive(preparation: str, said: str, settings: Settings) -> None:
    usual = "signal.pthread_sigmask(signal.SIG_SETMASK, [])\nfor s in (1, 2, 10, 12, 15): signal.signal(s, signal.SIG_DFL)\n"
    assert under(usual, "dit_video.doctor.machine.signals", settings).status == "ok"
    found = under(usual + preparation, "dit_video.doctor.machine.signals", settings)
    assert found.status == "warning" and said in found.text


def test_an_ignored_signal_reaches_the_check_through_the_doctor(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert "SIGUSR1 is ignored" in child.run("dit_video.doctor.machine.signals", settings, 60).text
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("free", "status"), [(2**33, "ok"), (2**31, "warning"), (2**29, "FAIL")])
def test_little_memory(free: int, status: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "meminfo", lambda: {"MemTotal": 2**35, "MemAvailable": free})
    monkeypatch.setattr(machine, "cgroup_limits", lambda *names: [])
    assert machine.memory(settings).status == status
    monkeypatch.setattr(machine, "cgroup_limits", lambda controller, new, old: [2**31 if "max" in new else 2**31 - 2**28])
    assert machine.memory(settings).status == "FAIL"
    monkeypatch.setattr(machine, "meminfo", dict)
    assert machine.memory(settings).status == "ok"  # a system without /proc


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_control_groups_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    new = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/cpu.max": "150000 100000\n"}
    new |= {"sys/fs/cgroup/job/step/cpu.max": "max 100000\n", "sys/fs/cgroup/job/memory.max": "1024\n"}
    assert machine.usable_cores(write(tmp_path / "new", new)) == 1.5
    assert machine.cgroup_limits("memory", "memory.max", "memory.limit_in_bytes", tmp_path / "new") == [1024]
    old = {"proc/self/cgroup": "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n"}
    old |= {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
    assert machine.usable_cores(write(tmp_path / "old", old)) == 3
    assert machine.cgroup_limits("memory", "memory.max", "memory.limit_in_bytes", tmp_path / "old") == []
    assert machine.usable_cores(tmp_path / "none") == 8


# --------------------------------------------------------------------------- disks, locks, shared memory


@LINUX
def test_a_folder_that_cannot_be_written(settings: Settings) -> None:
    """In /proc nobody can write, not even root, who passes every permission."""
    settings = replace(settings, runs="/proc", beside="/proc/.doctor")
    found = storage.disk(settings)
    assert found.status == "FAIL" and "cannot be written" in found.text and "set runs" in found.advice
    found = storage.locking(settings)
    assert found.status == "FAIL" and "cannot be written" in found.text


def test_a_limit_on_files_fails_the_disk(settings: Settings) -> None:
    found = under("resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))", "dit_video.doctor.storage.disk", settings)
    assert found.status == "FAIL" and "ulimit -f" in found.advice
    assert files_of(Path(settings.runs)) == {}


def test_a_disk_that_is_full_slow_or_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty, real = SimpleNamespace(free=2**40, total=2**41), storage.write_speed
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: plenty)
    monkeypatch.setattr(storage, "file_system", lambda folder: "ext4")
    assert storage.disk(settings).status == "ok" and storage.temporary(settings).status in ("ok", "warning")
    monkeypatch.setattr(storage, "write_speed", lambda path: 2**20)
    assert "takes 1024 s" in storage.disk(settings).advice
    monkeypatch.setattr(storage, "write_speed", real)
    monkeypatch.setattr(storage, "file_system", lambda folder: "overlay")
    assert "gone with the container" in storage.disk(settings).advice
    assert "passed over" in storage.temporary(replace(settings, asked_temporary="/nowhere")).advice
    plenty.free = 2**31
    assert storage.disk(settings).status == "warning"
    plenty.free = 2**20
    assert storage.disk(settings).status == "FAIL"

    monkeypatch.setattr(storage.os, "replace", lambda old, new: None)
    (Path(settings.runs) / ".doctor").mkdir()
    assert "rename" in " ".join(storage.rename_problems(Path(settings.beside)))


@LINUX
def test_file_systems_are_named(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    here = str(tmp_path.resolve())
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {here} rw shared:1 - nfs4 server:/x rw\n")
    assert storage.file_system(tmp_path, mounts) == "nfs4, of a network"
    assert storage.file_system(tmp_path.parent, mounts) == "ext4"
    assert "not known" in storage.file_system(tmp_path, tmp_path / "none")


def test_locks_that_keep_nobody_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    assert storage.locking(settings).status == "ok"
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: None)  # the second process, which locks truly, is let in
    found = storage.locking(settings)
    assert found.status == "FAIL" and "taken while one is held" in found.text and "two jobs" in found.advice

    def refuse(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert "No locks available" in storage.locking(settings).text
    assert not Path(settings.beside).exists()


def test_shared_memory_that_is_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_video.data.loader import AHEAD_BYTES

    assert storage.JOBS * storage.JOB_BYTES == AHEAD_BYTES
    assert storage.shared_memory(settings).status == "ok"
    monkeypatch.setattr(storage, "JOB_BYTES", 1024)

    def refuse(num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    if Path("/dev/shm").is_dir():
        monkeypatch.setattr(storage, "_write_segment", refuse)
        assert "No space left" in storage.shared_memory(settings).advice
    monkeypatch.setattr(storage, "fill", os.getpid)  # takes no job, so each fails
    found = storage.shared_memory(settings)
    assert found.status == "FAIL" and "data.num_workers=0" in found.advice


# --------------------------------------------------------------------------- processors, attention, decoders


def test_threads_and_bf16(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "bf16_gain", lambda: 1.5)
    for name in devices.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "usable_cores", lambda: 1.0)
    assert devices.processor(settings).status == "ok"  # conftest sets one thread
    monkeypatch.setattr(devices, "usable_cores", lambda: 4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "trainer.threads=4" in devices.processor(settings).advice
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: 16)
    assert "wait for each other" in devices.processor(settings).advice
    monkeypatch.setattr(devices, "bf16_gain", lambda: 0.5)
    assert "32-true" in devices.processor(settings).advice


def test_gpus_by_a_stand_in(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed of GPUs, on machines without: the calls are torch's, the answers made up."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda number: SimpleNamespace(name="GPU-9", major=9, minor=0),
        "mem_get_info": lambda number: (60 * 2**30, 80 * 2**30),
        "can_device_access_peer": lambda one, other: False,
        "is_bf16_supported": lambda: True,
    }
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_product", lambda device: 1.0 if device == "cuda:1" else 0.0)
    found = devices.gpu(settings)
    assert found.status == "FAIL" and "GPU 1 is off" in found.advice and "holds 20 GiB of GPU 0" in found.advice
    for said in ("GPU-9 80 GiB (60 GiB free, capability 9.0)", "no peer access between 1-0", "NCCL 2.27.3", "bf16"):
        assert said in found.text


def test_attention_that_is_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.attention(settings).status == "ok"

    def forgets_lengths(query: Any, key: Any, value: Any, places: Any, lengths: Any) -> Any:
        return written_out(query, key, value, places, None)

    def not_a_number(query: Any, key: Any, value: Any, places: Any, lengths: Any) -> Any:
        return written_out(query, key, value, places, lengths) * float("nan")

    for wrong in (forgets_lengths, not_a_number):
        monkeypatch.setattr("dit_video.build.make", lambda config, wrong=wrong: wrong)
        found = devices.attention(settings)
        assert found.status == "FAIL" and "sdpa is wrong in float32 and bfloat16" in found.advice


def test_a_flash_attn_that_was_built_for_another_torch(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices.flash_attn(settings).text == "not installed, optional"
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(tmp_path)
    found = devices.flash_attn(settings)
    assert found.status == "warning" and "undefined symbol" in found.advice


def test_a_decoder_that_gives_other_frames(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert media.pyav(settings).status == media.sound(settings).status == "ok"
    real = decode._fetch_pyav

    def late(data: bytes, container: Any, info: Any, indices: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.roll(real(data, container, info, indices, height, width), 1, axis=0)

    monkeypatch.setattr(decode, "_fetch_pyav", late)
    assert "not those that were written" in media.pyav(settings).advice


def test_decord_that_gives_other_frames_gives_up_or_is_not_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def like(fetch: Callable[..., np.ndarray | None]) -> Finding:
        monkeypatch.setattr(decode, "_fetch_decord", fetch)
        monkeypatch.setattr(decode, "has_decord", lambda: True)
        monkeypatch.setattr(media, "find_spec", lambda name: SimpleNamespace())
        return media.decord(settings)

    def right(data: bytes, info: Any, indices: np.ndarray, height: int, width: int) -> np.ndarray:
        return decode.decode_clip(data, num_frames=17, fps=8.0, height=height, width=width, decoder="pyav").video

    assert like(right).status == "ok"
    found = like(lambda *arguments: right(*arguments) + 1)
    assert found.status == "FAIL" and "mean difference" in found.text and "data.decoder=pyav" in found.advice
    assert like(lambda *arguments: None).status == "warning"
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    assert media.decord(settings).status == media.torchcodec(settings).status == "ok"
    monkeypatch.setattr(media, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(media, "why_no_torchcodec", lambda: "libavutil.so is missing")
    assert "libavutil" in media.torchcodec(settings).text


def test_shards_that_are_there_cut_off_or_missing(world_shards: Path, settings: Settings, tmp_path: Path) -> None:
    before = files_of(world_shards)
    found = media.shards(replace(settings, shards=[f"{world_shards}/*.tar"]))
    assert found == Finding("ok", "2 found; read and decoded 8 clips of the 64 in the first and the last")
    assert files_of(world_shards) == before
    cut = tmp_path / "cut.tar"
    cut.write_bytes((world_shards / "00000.tar").read_bytes()[:20480])
    found = media.shards(replace(settings, shards=[str(cut)]))
    assert found.status == "warning" and "cannot be read after 11 members" in found.advice and "data check" in found.advice
    found = child.run("dit_video.doctor.media.shards", replace(settings, shards=[str(tmp_path / "no.tar")]), 60)
    assert found.status == "FAIL" and "no.tar" in found.text


# --------------------------------------------------------------------------- processes


def test_a_start_method_that_does_not_work(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(method: str) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(ranks.tempfile, "tempdir", None)  # which the check sets in its own process
    monkeypatch.setattr(ranks.multiprocessing, "get_context", broken)
    found = ranks.start_methods(settings)
    assert found.status == "FAIL" and "AF_UNIX" in found.text and "workers=1" in found.advice


def test_ranks_that_do_not_find_each_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")  # a leftover that the doctor's own ranks do not take for theirs
    assert ranks.process_group(settings).status == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    found = ranks.process_group(settings)
    assert found.status == "FAIL" and "eth99" in found.advice and "fails (rank 0" in found.text
    monkeypatch.setattr(ranks.socket, "getaddrinfo", lambda *given: (_ for _ in ()).throw(OSError("unknown")))
    assert "/etc/hosts" in ranks.network_problems()[0]
    monkeypatch.setattr(ranks, "IMPORT_SECONDS", 0)
    assert ranks.run_ranks("gloo", 1, seconds=0.2) == [{"error": "gave no answer in time"}]


# --------------------------------------------------------------------------- the command


def test_the_command_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dit_video("doctor", "only=[packages,file locking]", "json=found.json") == 0
    first, second, _, counts = capsys.readouterr().out.splitlines()
    assert first.startswith("packages          ok       Python ") and second.startswith("file locking      ok       a lock")
    assert counts.startswith("ok 2, warnings 0, failed 0, in ")
    assert json.loads((tmp_path / "found.json").read_text())["file locking"]["status"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]

    assert dit_video("doctor", "only=[lockign]") == 1 and "file locking" in capsys.readouterr().err
    assert dit_video("doctor", "devices=0") == 1 and "set devices" in capsys.readouterr().err


@LINUX
def test_the_command_fails_where_a_check_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert dit_video("doctor", "only=disk", "runs=/proc/runs") == 1
    out, err = capsys.readouterr()
    assert "disk              FAIL     /proc (proc" in out and err == "dit-video: 1 of 1 checks failed: disk\n"


def test_a_stopped_doctor_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    words = ["doctor", "only=[program,self-test]", "runs=."]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_video.cli", *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(7) == b"program"  # it stands there while the check runs
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdout.close()
    assert files_of(tmp_path) == {} and list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_the_self_test_finds_a_training_that_cannot_start(settings: Settings) -> None:
    """What a launcher has left in the shell says that there is another rank, which never comes."""
    left = "os.environ |= {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}"
    found = under(left, "dit_video.doctor.self_test.self_test", settings)
    assert found.status == "FAIL" and "2 processes were started" in found.text


@pytest.mark.slow
def test_everything_works_on_this_machine(tmp_path: Path, world_shards: Path) -> None:
    command = [sys.executable, "-m", "dit_video.cli", "doctor", "runs=runs", f"shards={world_shards}/*.tar"]
    with tempfile.TemporaryDirectory() as temporary:  # tmp_path is too long for the path of a socket
        environment = os.environ | {"TMPDIR": temporary}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        left = list(Path(temporary).iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:18].strip() for line in lines[: len(CHECKS)]] == [check.name for check in CHECKS]
    assert "went on from a verified checkpoint" in lines[len(CHECKS) - 1]
    assert files_of(tmp_path) == {} and left == []


def test_sizes_in_words() -> None:
    assert [size(number) for number in (0, 1023, 2**20, 2.5 * 2**30, 2**51)] == [
        "0 B",
        "1.02e+03 B",
        "1 MiB",
        "2.5 GiB",
        "2,048 TiB",
    ]
