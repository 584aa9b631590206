"""Checks of what is installed and of what the shell hands over."""

import netrc
import os
import platform
import re
import time
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dit_video.doctor.finding import Finding, Settings, one_line

NAME = "dit-video"
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}  # uploads that stole credentials when they were imported
TOLD = ("torch", "lightning", "hydra-core", "webdataset", "numpy", "av", "decord")
EXTRA_OF_DEVELOPERS = "dev"

LAUNCHERS = {"RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What torchrun and its like tell the processes that they start."""
PREFIXES = (
    "WDS_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "SLURM_", "WANDB_",
    "HYDRA_", "DIT_VIDEO_", "DECORD_", "MALLOC_", "LD_",
)  # fmt: skip
NAMES = {*LAUNCHERS, "PYTHONHASHSEED", "PYTHONPATH", "PYTHONOPTIMIZE", "PYTHONSAFEPATH"}
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
MAX_CHARS = 40  # of a value
MAX_SLURM = 4  # of some fifty variables that a job has


def known_malware(settings: Settings) -> Finding:
    """Whether a release is installed that steals credentials; nothing is imported to find out."""
    found = [f"{name} {version}" for name, bad in MALICIOUS.items() for version in _versions(name) if version in bad]
    if not found:
        seen = [f"{name} {', '.join(_versions(name)) or 'is not installed'}" for name in MALICIOUS]
        return Finding.of(f"none known ({'; '.join(seen)}; {' and '.join(MALICIOUS['lightning'])} were malicious)")
    return Finding.of(
        f"{' and '.join(found)} STEALS CREDENTIALS when it is imported",
        failures=["uninstall it, run make setup, and change every key, token and password that this account can read"],
    )


def packages(settings: Settings) -> Finding:
    """Whether Python and every requirement are in the ranges that the package states."""
    try:
        own = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return Finding.of(f"{NAME} is not installed, so its requirements are not known", ["run make setup, or pip install -e ."])
    failures, warnings = [], []
    python = SpecifierSet(own.metadata["Requires-Python"])
    if platform.python_version() not in python:
        failures.append(f"Python must be {python}; make setup PYTHON=/path/to/another")
    extras = [extra for extra in own.metadata.get_all("Provides-Extra") or [] if extra != EXTRA_OF_DEVELOPERS]
    needed: dict[str, str] = {}
    for requirement in map(Requirement, own.requires or []):
        version = next(iter(_versions(requirement.name)), None)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed[requirement.name] = version or "missing"
            if not fits:
                failures.append(f"{requirement.name} {version or 'is missing'}, {requirement.specifier} is needed; {install}")
        elif version and not fits and any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            warnings.append(f"the optional {requirement.name} is {version}, {requirement.specifier} is wanted; {install}")
    told = ", ".join(f"{name} {needed[name]}" for name in TOLD if name in needed)
    others = len(needed) - sum(name in needed for name in TOLD)
    return Finding.of(f"Python {platform.python_version()}, {told} and {others} others", warnings, failures)


def _versions(name: str) -> list[str]:
    """The versions of a distribution that are installed; an earlier folder may hide a later one's."""
    return [found.version for found in metadata.distributions(name=name)]


def program(settings: Settings) -> Finding:
    """Whether the programs import, how long it takes, and what they are."""
    began = time.perf_counter()
    vision = find_spec("torchvision") is not None
    remove = "pip uninstall torchvision, which this project does not use"
    try:
        import torch

        train = import_module("dit_video.train")
        for name in ("sample", "evaluate", "info"):
            import_module(f"dit_video.{name}")
    except Exception as error:
        return Finding.of(f"does not import ({one_line(error)})", failures=[remove if vision else "run make setup"])
    seconds = time.perf_counter() - began
    warnings = []
    if vision and torch.version.cuda is None:
        warnings.append(
            f"torchvision beside a torch without CUDA often breaks the import of lightning and transformers; {remove}"
        )
    if seconds > 30:
        warnings.append("every rank and every start pays this; put the environment on a local disk")
    version = next(iter(_versions(NAME)), "not installed")
    text = f"{NAME} {version}, commit {train.commit()}, imports in {seconds:.1f} s, {platform.platform()}"
    return Finding.of(text, warnings)


def environment(settings: Settings) -> Finding:
    """The variables of the shell that change what torch, Lightning, webdataset and wandb do."""
    found = {name: value for name, value in sorted(os.environ.items()) if name in NAMES or name.startswith(PREFIXES)}
    slurm = [name for name in found if name.startswith("SLURM_")]
    shown = [name for name in found if name not in slurm[MAX_SLURM:]]
    told = [f"{name}={'(hidden)' if SECRET.search(name) else found[name][:MAX_CHARS]}" for name in shown]
    told += [f"{len(slurm) - MAX_SLURM} more of SLURM"] if len(slurm) > MAX_SLURM else []
    warnings, left = [], sorted(LAUNCHERS & found.keys())
    if left and "TORCHELASTIC_RUN_ID" not in found and "SLURM_STEP_ID" not in found:
        warnings.append(
            f"{', '.join(left)} tell a run that it is one of several ranks (another than 0 writes nothing); unset {' '.join(left)}"
        )
    elif found.get("SLURM_PROCID", "0") != "0" and "SLURM_STEP_ID" not in found:
        warnings.append("SLURM_PROCID makes a run another rank than 0, which writes nothing; unset SLURM_PROCID")
    tasks = found.get("SLURM_NTASKS", "1")
    if tasks != "1" and found.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_STEP_ID" not in found:
        warnings.append(
            f"SLURM_NTASKS={tasks} outside of srun: Lightning takes this for one of {tasks} processes; start it by srun"
        )
    if found.get("PYTHONOPTIMIZE"):
        warnings.append("PYTHONOPTIMIZE removes assertions; unset PYTHONOPTIMIZE")
    secure = "WDS_SECURE is not set, which webdataset's own readers look at and training does not"
    return Finding.of("; ".join([", ".join(told) or "nothing set", *([] if "WDS_SECURE" in found else [secure])]), warnings)


def wandb(settings: Settings) -> Finding:
    """Whether a run can be written by wandb, offline, and whether it could be sent."""
    if not (versions := _versions("wandb")):
        return Finding.of("not installed", ["set logger=none, or pip install wandb"])
    # Its files stay in the doctor's folder, and it calls nobody.
    folders = {f"WANDB_{kind}_DIR": settings.scratch for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    logged_in, mode = _logged_in(), os.environ.get("WANDB_MODE", "")
    os.environ |= folders | {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    began = time.perf_counter()
    try:
        import wandb as library

        quiet = library.Settings(silent=True, disable_git=True, console="off")
        with library.init(project="doctor", mode="offline", dir=settings.scratch, settings=quiet) as run:
            run.log({"loss": 1.0})
        written = list(Path(settings.scratch).glob("wandb/offline-run-*/*.wandb"))
    except Exception as error:
        return Finding.of(f"{versions[0]} cannot start a run ({one_line(error)})", failures=["set logger=none"])
    if not written:
        return Finding.of(f"{versions[0]} wrote no offline run", failures=["set logger=none"])
    text = f"{versions[0]} wrote an offline run in {time.perf_counter() - began:.1f} s, {'logged in' if logged_in else 'not logged in'}"
    text += f", WANDB_MODE={mode}" if mode else ", runs are offline unless logger.mode=online"
    asked = mode == "online" and not logged_in
    return Finding.of(text, ["without a login nothing can be sent; run wandb login, or unset WANDB_MODE"] if asked else [])


def _logged_in() -> bool:
    """As the environment and the login file say; nobody is asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        path = os.environ.get("NETRC")
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
