"""Checks of processors and GPUs: what they are, and whether they compute what they should."""

import importlib
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_video.doctor.finding import Finding, Settings, one_line, size
from dit_video.doctor.machine import usable_cores

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Of attention and its gradients, as a share of the largest value; sound ones are within half of it."""
FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")


def processor(settings: Settings) -> Finding:
    """The CPU, the cores a run may use, torch's threads, and whether bf16 is worth it."""
    model, flags = _cpu()
    cores, threads = usable_cores(), torch.get_num_threads()
    given = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    text = f"{model}, {cores:g} of {os.cpu_count()} cores usable, torch uses {threads} threads"
    text += f" ({', '.join(given)})" if given else ""
    text += f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    ratio = bf16_gain()
    text += f"; bf16 autocast {ratio:.2g}x as fast as fp32 ({', '.join(flags) or 'no known instructions'})"
    warnings = []
    if threads > math.ceil(cores):
        warnings.append(f"more threads than cores wait for each other; set trainer.threads={max(int(cores), 1)}")
    elif given and threads <= cores / 2:
        warnings.append(f"{cores:g} cores could be used; unset {given[0].partition('=')[0]}, or set trainer.threads={int(cores)}")
    if ratio < 0.9:
        warnings.append("bf16 is slower here; set trainer.precision=32-true on CPU")
    return Finding.of(text, warnings)


def _cpu() -> tuple[str, list[str]]:
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        import platform

        return platform.processor() or platform.machine(), []
    known = {key.strip(): value.strip() for key, _, value in lines}
    flags = known.get("flags", known.get("Features", "")).split()
    return known.get("model name", os.uname().machine), [flag for flag in FLAGS if flag in flags]


def bf16_gain(rounds: int = 5) -> float:
    """How many times faster the layer of a small transformer is in bf16 than in fp32, forward and backward."""
    layer, tokens = torch.nn.Linear(384, 1536), torch.randn(2048, 384)
    best = {True: math.inf, False: math.inf}
    for low in (True, False) * (rounds + 1):  # in turn, as other work may come between
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            layer(tokens).sum().backward()
        best[low] = min(best[low], time.perf_counter() - began)
    return best[False] / best[True]


def gpu(settings: Settings) -> Finding:
    """Every GPU by name, memory and capability, each with a product of matrices that is right."""
    if torch.backends.mps.is_available():
        off = _product("mps")
        return Finding.of("Apple's MPS", failures=[f"its product of matrices is off by {off:.2g}"] if off > 1e-3 else [])
    seen = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    if not torch.cuda.is_available():
        if not seen:
            return Finding.of(f"none (torch is a {build} build)")
        text = f"{', '.join(seen)} in /dev, which torch (a {build} build) does not see"
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return Finding.of(text, ["CUDA_VISIBLE_DEVICES hides them; unset it"])
        if build == "CPU":
            return Finding.of(text, ["install torch's CUDA build of the same version, for trainer=gpu"])
        try:
            torch.cuda.init()
        except Exception as error:
            text += f" ({one_line(error)})"
        return Finding.of(text, failures=["the driver is too old for this torch, or not for this container; see nvidia-smi"])
    told, warnings, failures = [], [], []
    count = torch.cuda.device_count()
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        told.append(f"{about.name} {size(total)} ({size(free)} free, capability {about.major}.{about.minor})")
        if free < 0.9 * total:
            warnings.append(f"other work holds {size(total - free)} of GPU {number}; see nvidia-smi")
        if (off := _product(f"cuda:{number}")) > 1e-2:
            failures.append(f"a product of matrices on GPU {number} is off by {off:.2g}; it is broken, leave it out")
    apart = [f"{a}-{b}" for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if count > 1:
        told.append(f"no peer access between {', '.join(apart)}" if apart else "peer access between all")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return Finding.of(f"{', '.join(told)}; {bf16}; driver {_driver()}, {build}, NCCL {nccl}", warnings, failures)


def _product(device: str) -> float:
    """The largest relative error of a product of matrices."""
    one, other = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    wanted = one.double() @ other.double()
    return ((one.to(device) @ other.to(device)).cpu() - wanted).abs().max().item() / wanted.abs().max().item()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known here"


# --------------------------------------------------------------------------- attention


def attention(settings: Settings) -> Finding:
    """Every attention of conf/model/attention, forward and backward, beside the softmax written out in float64."""
    from dit_video.build import make
    from dit_video.compose import compose, conf_folder, take_apart

    names = sorted(path.stem for path in (conf_folder() / "model/attention").glob("*.yaml") if path.stem != "flash")
    told, failures = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in names:
            attend = make(compose("info", take_apart([f"model/attention={name}"])).model.attention)
            errors = {dtype: attention_error(attend, dtype, device) for dtype in TOLERANCE}
            told.append(f"{name} on {device} ({', '.join(f'{str(d)[6:]} {error:.1g}' for d, error in errors.items())})")
            wrong = [str(dtype)[6:] for dtype, error in errors.items() if not error <= TOLERANCE[dtype]]
            if wrong:
                failures.append(f"{name} is wrong in {' and '.join(wrong)} on {device}; choose another model/attention")
    return Finding.of(f"relative error of {', '.join(told)}", failures=failures)


def attention_error(attend: Callable[..., Tensor], dtype: torch.dtype, device: str) -> float:
    """The largest error of an attention's result and gradients, against float64, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    sizes = (70, 83, 83)  # queries; keys and values, of which the last 13 are text
    inputs = [torch.randn(2, 4, count, 64, generator=generator).to(dtype) for count in sizes]
    places, lengths = torch.zeros(2, 70, 3), torch.tensor([83, 74])
    wanted = _with_gradients(_reference, [x.double() for x in inputs], places, lengths)
    got = _with_gradients(attend, [x.to(device) for x in inputs], places.to(device), lengths.to(device))
    return max(((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted, strict=True))


def _reference(query: Tensor, key: Tensor, value: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    real = torch.arange(key.shape[2]) < lengths[:, None, None, None]
    return scores.masked_fill(~real, -math.inf).softmax(-1) @ value


def _with_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], *more: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, *more)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def flash_attn(settings: Settings) -> Finding:
    """flash-attn, where it is installed: whether it imports, and computes what it should."""
    found = [name for name in FLASH_MODULES if _is_there(name)]
    if not found:
        return Finding.of("not installed, optional")
    problems = []
    for name in found:
        try:
            importlib.import_module(name)
        except Exception as error:  # an undefined symbol, where it was built for another torch
            problems.append(
                f"{name} does not import ({one_line(error)}); build it anew for torch {torch.__version__}, or uninstall it"
            )
    if not torch.cuda.is_available():
        return Finding.of(f"{', '.join(found)}, and no GPU to run it on", [*problems, "set model/attention=sdpa or math"])
    from dit_video.model.attention import Flash

    try:
        flash: Any = Flash()
        off = attention_error(flash, torch.bfloat16, "cuda")
    except Exception as reason:
        return Finding.of(f"{', '.join(found)} does not run ({one_line(reason)})", [*problems, "set model/attention=sdpa"])
    wrong = [] if off <= TOLERANCE[torch.bfloat16] else ["it is wrong; set model/attention=sdpa"]
    return Finding.of(f"{flash.name}, relative error {off:.1g} in bfloat16", problems, wrong)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False
