"""The command line as a person meets it: the real entry point on a small config tree and a package of the user's own."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dit_video.cli import COMMANDS, describe, main
from dit_video.completion import SCRIPTS, reply
from dit_video.compose import _hydra, check_targets, compose, conf_folder, literal, nearest, quoted, take_apart, trial_name

PROGRAM = str(Path(sys.executable).with_name("dit-video"))

CONFIGS = {
    "data_echo.yaml": """\
defaults:
  - shape: tiny
  - _self_
  - preset: null
_target_: standin.echo
to: seen.json
runs: runs
name: first  # where it is written
prompt: null
negative_prompt: ""
out: ""
size: 3  # how large
again: false
""",
    "shape/tiny.yaml": "# A tiny shape.\nwidth: 16\nheight: 4\n",
    "shape/small.yaml": "width: 32\nheight: 8\n",
    "preset/quick.yaml": "# @package _global_\n# Fast and small.\ndefaults:\n  - override /shape: small\nsize: 1\n",
    "data_missing.yaml": "_target_: standin.echo\nto: ???\n",
    "data_sly.yaml": "_target_: dit_video.cli.os.system\ncommand: touch harmed\n",
    "data_outside.yaml": "_target_: os.system\ncommand: touch harmed\n",
}

STANDIN = """\
import json, sys
from pathlib import Path

ERRORS = {"value": ValueError, "os": FileNotFoundError, "bug": KeyError, "stop": KeyboardInterrupt}

def echo(to, runs, name, size=0, fail="", **given):
    if fail or size == 13:
        raise ERRORS[fail or "value"]("no such luck\\nat all")
    path = Path(to) if runs == "runs" else Path(runs) / name / to  # a trial has a folder of its own
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**given, "runs": runs, "name": name, "size": size, "argv": sys.argv[1:]}))
"""

TEXTS = [
    *[
        "",
        " ",
        "  led by spaces ",
        "a, b, c",
        "it's",
        'say "hi"',
        "'",
        '"',
        "'''\"\"\"",
        "[a]",
        "[",
        "]",
        "{a: 1}",
        "{",
        "a=b",
        "=",
    ],
    *[
        "==x",
        "${name}",
        "${oc.env:HOME}",
        "${",
        "\\${name}",
        "\\\\${name}",
        "$HOME",
        "true",
        "null",
        "None",
        "1",
        "1e5",
        "nan",
        "~x",
    ],
    *[
        "+x",
        "-x",
        "--help",
        "#no comment",
        "a: b",
        "a\nb",
        "\ttab",
        "back\\slash",
        "ends\\",
        "ends\\\\",
        "ünï ☃ 🎬",
        "!",
        ";",
        "(",
        ")",
    ],
    *["*", "choice(a,b)", 'a small red circle, moving left; it\'s [slow] = "calm"', "{000..003}", "%s %(x)s {}"],
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own: ./conf, and a module that configs name by trust=standin."""
    for name, text in CONFIGS.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "standin.py").write_text(STANDIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("standin", None)
    return tmp_path


def echo(*arguments: str) -> int:
    return main(["data", "echo", "trust=standin", *arguments])


def seen(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_any_text_arrives_as_typed(here: Path) -> None:
    for text in TEXTS:
        assert echo(f"prompt={text}", f"negative_prompt={text}!", "size=4") == 0
        got = seen(here / "seen.json")
        assert (got["prompt"], got["negative_prompt"], got["size"]) == (text, f"{text}!", 4)


def test_literal_and_quoted_are_exact_on_random_text() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    draw = random.Random(0)
    letters = [*"ab\\\\'\"${}[](),:=~+ \n\té#%@?!", "${", "${a}", "\\${", "true"]
    for _ in range(1000):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(0, 8)))
        config = OmegaConf.create(
            {"plain": literal(text), "typed": OverridesParser.create().parse_override(f"x={quoted(text)}").value()}
        )
        stored = OmegaConf.create(OmegaConf.to_yaml(config))
        assert text == "???" or (config.plain, config.typed, stored.plain) == (text, text, text)


def test_console_script_takes_text_groups_and_new_keys(here: Path) -> None:
    text = 'it\'s "red", ${name} [x]={y}\n✓'
    command = [
        PROGRAM,
        "data",
        "echo",
        "trust=standin",
        f"prompt={text}",
        "preset=quick",
        "shape.width=7",
        "+new.key=[1,2]",
        "~again",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    got = seen(here / "seen.json")
    assert (
        got["prompt"] == text and got["shape"] == {"width": 7, "height": 8} and got["size"] == 1 and got["new"] == {"key": [1, 2]}
    )
    assert "again" not in got


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("shape.widht=3", ["shape.widht", "shape.width"]),
        ("widht=3", ["shape.width"]),
        ("szie=3", ["size"]),
        ("~agian", ["again"]),
        ("shape=tyni", ["'tyni'", "tiny"]),
        ("shpae=tiny", ["shape"]),
        ("preset=quik", ["quick"]),
        ("zzzzzz=3", ["there are:", "size"]),
        ("init_from=x", ["init_from"]),
        ("size", ["key=value", "'size'"]),
        ("size=1,2", ["-m"]),
        ("size=[1,", ["size=[1,"]),
        ("hydra/launcher=jblib", ["joblib"]),
        ("--cgf", ["--cfg"]),
        ("--config-dir=nowhere", ["nowhere"]),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_nearest(
    typed: str, names: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert echo(typed) == 2
    line = error_of(capsys)
    assert line.startswith("dit-video: ") and all(name in line for name in names), line
    assert not (here / "seen.json").exists()


def test_wrong_commands_and_tools(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2 and "train" in error_of(capsys)
    assert main(["model=tiny"]) == 2 and "unknown command" in error_of(capsys)
    assert main(["data", "ehco"]) == 2 and "echo" in error_of(capsys)
    assert main(["data"]) == 2 and "echo" in error_of(capsys)
    assert main(["completion", "ksh"]) == 2 and "fish" in error_of(capsys)


@pytest.mark.parametrize(
    ("fail", "status", "line"),
    [("value", 1, "no such luck at all"), ("os", 1, "no such luck at all"), ("stop", 130, "interrupted")],
)
def test_a_failure_is_one_line_and_a_status(
    fail: str, status: int, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert echo(f"+fail={fail}") == status
    assert error_of(capsys) == f"dit-video: {line}"


def test_missing_values_bugs_and_tracebacks(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert echo("+fail=bug") == 1
    assert "Traceback" in capsys.readouterr().err  # not the user's fault: everything is shown
    assert echo("+fail=value", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("DIT_VIDEO_TRACEBACK", "1")
    assert echo("+fail=value") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("DIT_VIDEO_TRACEBACK")
    assert echo("prompt=???") == 2 and "prompt" in error_of(capsys)
    config = OmegaConf.create({"sampler": {"steps": "???"}})
    with pytest.raises(Exception) as caught:
        print(config.sampler.steps)
    assert describe(caught.value) == "sampler.steps has no value; give sampler.steps=..."
    with pytest.raises(Exception) as caught:
        print(OmegaConf.create({"a": {"b": "${nowhere}"}}).a.b)
    assert describe(caught.value) == "a.b: Interpolation key 'nowhere' not found"
    assert describe(OSError(28, "No space left on device", "runs/x")) == "No space left on device: runs/x"
    assert (
        describe(ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback\nValueError: bad clip a"))
        == "bad clip a"
    )
    assert describe(RuntimeError("x")) is None


def test_only_trusted_packages_are_called(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "echo"]) == 1 and "trust=standin" in error_of(capsys)
    assert main(["data", "outside"]) == 1 and "os.system" in error_of(capsys)
    assert main(["data", "sly"]) == 1 and "leads outside" in error_of(capsys)
    assert not (here / "harmed").exists()


def test_check_targets() -> None:
    check_targets({"a": [{"_target_": "dit_video.shapes.Patch"}], "b": {"c": None}})
    check_targets({"a": {"_target_": "torch.nn.Linear"}}, trusted=("dit_video", "torch"))
    for target in (
        "torch.nn.Linear",
        "dit_video.shapes.torch.load",
        "dit_video.shapes.rearrange",
        "dit_videos.x",
        "dit_video.nowhere.X",
        3,
    ):
        with pytest.raises(ValueError, match="a.0._target_"):
            check_targets({"a": [{"_target_": target}]})
    with pytest.raises(ValueError, match="b._target_"):
        check_targets({"evil": "builtins.eval", "b": {"_target_": "${evil}"}})


def test_cfg_prints_what_would_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert echo("--cfg", "preset=quick", "prompt=a, ${b}") == 0
    config = OmegaConf.create(capsys.readouterr().out)
    assert (config.size, config.shape.width, config.prompt) == (1, 32, "a, ${b}")
    assert not (here / "seen.json").exists()


def test_a_config_dir_comes_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = here / "elsewhere" / "shape"
    own.mkdir(parents=True)
    (own / "tiny.yaml").write_text("width: 99\nheight: 1\n")
    (own / "odd.yaml").write_text("width: 3\nheight: 5\n")
    assert echo("--cfg", "--config-dir", "elsewhere") == 0
    assert OmegaConf.create(capsys.readouterr().out).shape.width == 99
    assert echo("--cfg", "--config-dir=elsewhere", "shape=odd") == 0
    assert OmegaConf.create(capsys.readouterr().out).shape.height == 5
    assert echo("--cfg") == 0
    assert OmegaConf.create(capsys.readouterr().out).shape.width == 16


def test_braces_in_shard_names_are_text() -> None:
    assert take_apart(["data.shards=a/{000..012}.tar"]).overrides == ("data.shards='a/{000..012}.tar'",)
    assert take_apart(["data.shards=['a/{000..012}.tar']"]).overrides == ("data.shards=['a/{000..012}.tar']",)


def test_composing_again_inside_a_program() -> None:
    with _hydra(()) as loader:  # as in a sweep's trial that reads another run's protocol
        again = compose("info", take_apart(["height=64"]))
        assert again.height == 64 and compose("info", take_apart([])).height != 64
        assert GlobalHydra.instance().config_loader() is loader


def test_nearest_knows_last_parts() -> None:
    keys = ["model.width", "model.depth", "data.width", "trainer.optimizer.rate"]
    assert nearest("width", keys) == ["data.width", "model.width"]
    assert nearest("optimiser.rate", keys)[0] == "trainer.optimizer.rate"
    assert nearest("qqq", keys) == []


# --------------------------------------------------------------------------- sweeps


def test_a_sweep_runs_every_trial_under_its_own_name(here: Path) -> None:
    assert echo("-m", "size=1,2", "shape=tiny,small", "name=many", "prompt=a, b") == 0
    runs = {path.parent.name: seen(path) for path in here.glob("runs/many/*/seen.json")}
    assert set(runs) == {f"size={size},shape={shape}" for size in (1, 2) for shape in ("tiny", "small")}
    one = runs["size=2,shape=small"]
    assert (one["size"], one["shape"], one["prompt"]) == (2, {"width": 32, "height": 8}, "a, b")
    assert (one["runs"], one["name"]) == ("runs/many", "size=2,shape=small")
    assert main([str(word) for word in one["argv"]]) == 0  # type: ignore[attr-defined]  # what a trial's own processes would run
    assert seen(here / "runs/many/size=2,shape=small/seen.json")["shape"] == one["shape"]
    assert sorted(path.name for path in here.glob("runs/many/*") if path.is_file()) == ["multirun.yaml"]


def test_a_failed_trial_fails_the_sweep_after_the_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert echo("-m", "size=13,2") == 1
    lines = capsys.readouterr().err
    assert "trial size=13 failed: no such luck at all" in lines and "Traceback" not in lines
    assert (here / "runs/first/size=2/seen.json").exists()
    assert echo("-m", "shape=tiny,smal") == 2
    assert "small" in error_of(capsys)


def test_a_sweep_through_joblib(here: Path) -> None:
    command = [
        PROGRAM,
        "data",
        "echo",
        "trust=standin",
        "-m",
        "size=1,2,13",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "prompt=${x}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "trial size=13 failed" in done.stderr
    runs = {path.parent.name: seen(path) for path in here.glob("runs/first/*/seen.json")}
    assert {name: (run["size"], run["prompt"]) for name, run in runs.items()} == {"size=1": (1, "${x}"), "size=2": (2, "${x}")}


def test_trial_names_are_folders_and_tell_trials_apart() -> None:
    assert trial_name(["model=small", "model.width=128"]) == "model=small,model.width=128"
    assert trial_name(["hydra.x=1"]) == "trial"
    paths = [trial_name([f"data.path={path}"]) for path in ("/a/b", "/a_b", "a/../../b")]
    assert len(set(paths)) == 3 and not any("/" in path for path in paths)
    long = [trial_name([f"key{i}={'x' * 30}" for i in range(20)] + [f"last={last}"]) for last in (1, 2)]
    assert long[0] != long[1] and len(long[0]) < 130


# --------------------------------------------------------------------------- help and completion


def test_help_is_fast_and_tells_every_command() -> None:
    code = "import sys; from dit_video.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert not {"torch", "lightning", "numpy", "hydra"} & set(done.stderr.split())


def test_help_of_a_command_lists_groups_keys_and_comments(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "echo", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("shape=tiny*", "A tiny shape.", "preset=quick", "Fast and small.", "size=3", "how large", "where it is written"):
        assert part in text
    assert main(["data", "--help"]) == 0 and "echo" in capsys.readouterr().out
    assert main(["completion", "--help"]) == 0 and "bash" in capsys.readouterr().out
    assert main([]) == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("command", [path.stem for path in sorted(conf_folder().glob("*.yaml"))])
def test_every_program_composes_and_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split("_", 1)
    assert main([*words, "--cfg"]) == 0
    assert main([*words, "--help"]) == 0
    assert "usage" in capsys.readouterr().out
    check_targets(compose(command, take_apart([])))


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("dit-video tr", ["train"]),
        ("dit-video --c", ["--cfg", "--config-dir"]),
        ("dit-video data ec", ["echo"]),
        ("dit-video data echo sha", ["shape.", "shape="]),
        ("dit-video data echo shape.", ["shape.height=", "shape.width="]),
        ("dit-video data echo shape=", ["shape=small", "shape=tiny"]),
        ("dit-video data echo wrong=1 shape=s", ["shape=small"]),
        ("dit-video data echo again=", ["again=false", "again=true"]),
        ("dit-video data echo prompt=", []),
        ('dit-video data echo prompt="a b', []),
        ("dit-video completion b", ["bash"]),
        ("dit-video nonsense x", []),
    ],
)
def test_completion_answers(line: str, answers: list[str], here: Path) -> None:
    assert reply(line) == answers


def test_bash_completes_at_the_cursor(here: Path) -> None:
    def complete(line: str) -> list[str]:
        bin_folder = Path(PROGRAM).parent
        setup = f'PATH="{bin_folder}:$PATH"; {SCRIPTS["bash"]}\nCOMP_LINE={json.dumps(line)}; COMP_POINT=${{#COMP_LINE}}'
        done = subprocess.run(
            ["bash", "-c", f'{setup}; _dit_video; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True
        )
        return done.stdout.split()

    assert complete("dit-video data echo shape=") == ["small", "tiny"]  # bash replaces what stands after the =
    assert complete("dit-video ev") == ["evaluate"]
    assert complete("dit-video data echo shape.w") == ["shape.width="]
