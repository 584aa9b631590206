"""The command line: `dit-video COMMAND [key=value ...]`. Hydra composes, this file owns the words that a person reads.

Nothing heavy is imported before a command runs.
Exit status: 0 done, 1 the work failed, 2 the command line was wrong, 130 interrupted.
"""

import atexit
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dit_video.help import COMMANDS, FLAGS, SHORT_FLAGS, TOOLED, command_help, general_help

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dit_video.compose import Typed


@dataclass(frozen=True)
class Call:
    """A command line, taken apart."""

    command: str | None
    tool: str | None  # of data: world, footage, ...; of checkpoint: ls, verify, ...
    arguments: tuple[str, ...]  # key=value
    flags: frozenset[str]
    config_dir: str | None
    folders: tuple[Path, ...]  # of configs, the user's; config_dir is the first

    @property
    def config_name(self) -> str | None:
        return self.command if self.command not in TOOLED else f"{self.command}_{self.tool}" if self.tool else None


class TrialError(ValueError):
    """A sweep of which a trial failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(list(argv))
    except KeyboardInterrupt:
        print("dit-video: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left, as in `dit-video info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns an interrupt into exit(1)
            return 130
        raise
    except Exception as error:
        from dit_video.compose import UsageError

        line = describe(error)
        if line is None or "--traceback" in argv or os.environ.get("DIT_VIDEO_TRACEBACK") == "1":
            traceback.print_exc()
        if line is not None:
            rank = os.environ.get("RANK", "0")
            print(f"dit-video{'' if rank == '0' else f' (rank {rank})'}: {line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def program() -> NoReturn:
    """Runs this process's command line and ends the process with its exit status."""
    status = 1

    def end() -> None:
        if (launch := sys.modules.get("dit_video.trainer.launch")) is not None:
            launch.end_rank(status)

    atexit.register(end)  # first, so that it is called last
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    sys.exit(status)


def describe(error: BaseException) -> str | None:
    """The one line that tells a user what to change; None where the error is not the user's but a fault of the program."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give {error.full_key}=..."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    lightning = type(error).__name__ == "MisconfigurationException"  # by name: this module imports nothing heavy
    if lightning or isinstance(error, ValueError | OSError | HydraException | OmegaConfBaseException):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and lines[0].startswith("Caught ") and len(lines) > 1:  # torch wraps what a loader's worker raised
            return lines[-1].partition(": ")[2]
        return " ".join(lines) or type(error).__name__
    return None


def _run(argv: list[str]) -> int:
    if argv[:2] == ["completion", "reply"]:  # what the shell scripts ask
        from dit_video.completion import reply

        print("\n".join(reply(" ".join(argv[2:]))))
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(general_help())
        return 0
    call = parse(argv)
    if "--version" in call.flags:
        from importlib.metadata import version

        print(f"dit-video {version('dit-video')}")
        return 0
    if call.command is None or "--help" in call.flags:
        print(command_help(call.command, call.config_name, call.folders) if call.command else general_help())
        return 0
    if call.command == "completion":
        from dit_video.completion import script

        print(script(call.arguments[0] if call.arguments else ""))
        return 0
    from dit_video.compose import compose, take_apart

    assert call.config_name is not None
    typed = take_apart(call.arguments)
    sweep = "--multirun" in call.flags
    config = compose(call.config_name, typed, call.folders, sweep)
    if "--cfg" in call.flags:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
    elif sweep:
        _sweep(call, typed, f"{config.get('runs') or 'runs'}/{config.get('name') or call.config_name}")
    else:
        with _argv(*argv):  # which other ranks are started with
            _program(call.command, typed.trust, config)
    return 0


def parse(argv: Sequence[str]) -> Call:
    """Takes a command line apart; UsageError names what is not known and what is nearest to it."""
    from dit_video.compose import UsageError, nearest, tools, user_folders

    words: list[str] = []
    flags: set[str] = set()
    config_dir = None
    rest = iter(argv)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = SHORT_FLAGS.get(name, name)
        if name not in FLAGS or (equals and name != "--config-dir"):
            raise UsageError(f"unknown flag {word}; {_options(nearest(name, FLAGS), list(FLAGS))}")
        if name == "--config-dir":
            config_dir = value if equals else next(rest, None)
            if not config_dir:
                raise UsageError("--config-dir needs a folder")
        flags.add(name)
    folders = user_folders(config_dir)
    command = words.pop(0) if words else None
    if command is not None and command not in COMMANDS:
        raise UsageError(f"unknown command {command}; {_options(nearest(command, COMMANDS), list(COMMANDS))}")
    tool = None
    if command in TOOLED and not (flags & {"--help"} and not words):
        known = tools(command, folders)
        tool = words.pop(0) if words else ""
        if tool not in known:
            what = f"unknown {command} tool {tool}" if tool else f"{command} needs the name of a tool"
            raise UsageError(f"{what}; {_options(nearest(tool, known), known)}")
    return Call(command, tool, tuple(words), frozenset(flags), config_dir, folders)


def _options(close: Sequence[str], every: Sequence[str]) -> str:
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(every)}"


# --------------------------------------------------------------------------- running


def _program(command: str, trust: Sequence[str], config: "DictConfig") -> Any:
    from omegaconf import open_dict

    from dit_video.compose import check_targets

    _start_logging()
    if trust and os.getcwd() not in sys.path:  # a package of the user's own stands where the user stands
        sys.path.append(os.getcwd())
    check_targets(config, ("dit_video", *trust))
    program = config.get("program") if command in TOOLED else f"dit_video.{command}"
    if program is None:  # a tool that is a plain function of its keys
        return _call_target(config)
    with open_dict(config):
        config.trust = list(trust)
    return importlib.import_module(program).main(config)


def _call_target(config: "DictConfig") -> Any:
    """Calls what `_target_` names with the other keys; Hydra's own instantiate would read ${...} in free text once more."""
    from hydra.utils import get_object, instantiate
    from omegaconf import OmegaConf

    from dit_video.compose import UsageError

    arguments = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(arguments, dict)
    target = get_object(arguments.pop("_target_"))
    values = {str(k): instantiate(v, _convert_="all") if isinstance(v, dict | list) else v for k, v in arguments.items()}
    try:
        inspect.signature(target).bind(**values)
    except TypeError as error:
        raise UsageError(f"{target.__name__} of {target.__module__}: {error}") from error
    return target(**values)


def _start_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dit_video").setLevel(logging.INFO)


def _sweep(call: Call, typed: "Typed", folder: str) -> None:
    """Runs every trial through Hydra's sweeper and launcher; TrialError where one failed, after the others are done."""
    import hydra
    from hydra.errors import HydraException, InstantiationException

    from dit_video.compose import conf_folder, explain, quoted, use_folders

    assert call.config_name is not None
    settings = {  # Hydra keeps the list of trials and writes nothing else: a trial's folder is its run directory
        "hydra.sweep.dir": quoted(folder),
        "hydra.sweep.subdir": ".",
        "hydra.output_subdir": "null",
        "hydra/job_logging": "none",
        "hydra/hydra_logging": "none",
    }
    given = {override.partition("=")[0] for override in typed.overrides}
    ours = [f"{key}={value}" for key, value in settings.items() if key not in given]

    def task(config: "DictConfig") -> Any:
        return _trial(call, typed, config)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    use_folders(call.folders)
    try:
        with _argv("--multirun", *ours, *typed.overrides):
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=call.config_name)(task)()
    except InstantiationException as error:
        raise TrialError(f"a trial failed: {describe(error)}") from error
    except HydraException as error:
        raise explain(call.config_name, typed, call.folders, error) from error
    except Exception as error:
        raise TrialError(f"a trial failed: {describe(error) or repr(error)}") from error


def _trial(call: Call, typed: "Typed", config: "DictConfig") -> Any:
    """One trial of a sweep: the single run of its overrides under a name of its own, for processes that it starts too."""
    from hydra.core.hydra_config import HydraConfig

    from dit_video.compose import quoted, set_texts, trial_name

    overrides = list(HydraConfig.get().overrides.task)
    HydraConfig.instance().cfg = None  # or Lightning would start its other processes as a sweep
    set_texts(config, typed.texts)
    trial = trial_name(overrides)
    if config.get("runs") and config.get("name"):
        own = {"runs": f"{config.runs}/{config.name}", "name": trial}
    else:
        own = {"out": f"{config.out}/{trial}"} if config.get("out") else {}
    set_texts(config, own)
    assert call.command is not None
    words = [call.command, *([call.tool] if call.tool else []), *overrides, *(f"trust={package}" for package in typed.trust)]
    words += [f"{key}={quoted(text) if key == 'runs' else text}" for key, text in {**typed.texts, **own}.items()]
    words += [f"--config-dir={call.config_dir}"] if call.config_dir else []
    if os.environ.get("RANK", "0") == "0":
        print(f"dit-video: trial {trial}", file=sys.stderr)
    try:
        with _argv(*words):
            return _program(call.command, typed.trust, config)
    except Exception as error:
        if (line := describe(error)) is None:
            traceback.print_exc()
        print(f"dit-video: trial {trial} failed: {line or repr(error)}", file=sys.stderr)
        raise


@contextmanager
def _argv(*words: str) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    program()
