"""What is installed: one package with its configs and tools inside, and nothing beside it."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_room_is_packaged() -> None:
    rooms = {"dit_video.conf"}
    for name, folder in (("dit_video", ROOT / "dit_video"), ("dit_video.data_tools", ROOT / "data_tools")):
        for path in (path.parent for path in folder.rglob("*.py")):
            rooms.add(".".join([name, *path.relative_to(folder).parts]))
    assert sorted(rooms) == PROJECT["tool"]["setuptools"]["packages"]


def test_requirements_keep_out_what_must_not_come_in() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    every = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert not any("torchvision" in line for line in every)
    assert {"dev", "data", "text", "latents", "lora", "sweep", "flash", "slurm", "tensorboard", "s3", "gcs"} <= set(extras)
    (lightning,) = (line for line in every if line.startswith("lightning"))
    assert "!=2.6.2" in lightning and "!=2.6.3" in lightning
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", pin) for pin in pins) and "torch==2.13.0" in pins


def test_editable_install_has_configs_and_tools() -> None:
    code = "import dit_video.data_tools; from dit_video.compose import conf_folder; print(conf_folder())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "conf"


def test_rooms_import_only_downwards() -> None:
    rooms = ["seeding", "numbers", "shapes", "world", "data", "model", "objective", "sampler", "eval", "trainer"]
    wrong = []
    for height, room in enumerate(rooms):
        folder = ROOT / "dit_video" / room
        for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom) and node.module == "dit_video":
                    names = [f"dit_video.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    parts = name.split(".")
                    if parts[0] == "dit_video" and len(parts) > 1 and parts[1] not in rooms[: height + 1]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.slow
def test_wheel_installs_one_package_that_works_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools leaves build/ behind, so a copy is built
    source.mkdir()
    for name in ("dit_video", "conf", "data_tools", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dit_video", "dit_video-0.1.0.dist-info"}
    configs = {f"dit_video/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    tools = {f"dit_video/{path.relative_to(ROOT)}" for path in (ROOT / "data_tools").rglob("*.py")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "dit_video").rglob("*.py")}
    assert configs | tools | code | {"dit_video/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import dit_video.compose as c, dit_video.data_tools as t; print(c.__file__, c.conf_folder(), *t.__path__)"
    for words in (["-c", where], ["-m", "dit_video.cli", "--help"], ["-m", "dit_video.cli", "train", "--cfg"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=elsewhere, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr
        if words[1] == where:
            assert all(path.startswith(str(site)) for path in done.stdout.split())
