"""The words of `dit-video --help`: commands and flags from the tables here, groups and keys from the configs themselves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A program: what it does in a line, and how it is called."""

    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        "train a model into runs/<name>, or go on where that run stopped",
        (
            "dit-video train experiment=world_quick name=demo",
            "dit-video train experiment=world_quick name=deep model.depth=8 objective.predict=velocity",
            "dit-video train -m experiment=world_quick name=width model.width=128,192",
            "dit-video train experiment=world_quick name=wide init_from=runs/demo",
        ),
    ),
    "sample": Command(
        "make videos with a trained model",
        (
            'dit-video sample run=runs/demo prompt="a small red circle moves left" seed=7',
            "dit-video sample run=runs/demo prompts=prompts.txt out=videos steps=12 guidance=3",
            'dit-video sample run=runs/demo image=first.png prompt="the circle moves up"',
        ),
    ),
    "evaluate": Command(
        "measure a trained model and write its evaluation and report",
        ("dit-video evaluate run=runs/demo",),
    ),
    "info": Command(
        "print parameters and FLOPs of a model by part, without building it in memory",
        ("dit-video info model=tiny", "dit-video info model=14b num_frames=81 height=720 width=1280"),
    ),
    "doctor": Command(
        "check what a run relies on by doing it, and say what to do where it fails",
        (
            "dit-video doctor",
            "dit-video doctor runs=/scratch/runs shards='footage/*.tar' devices=4",
            "dit-video doctor train=false",
        ),
    ),
    "plan": Command(
        "predict the memory, time and cost of a training, and what to change where it does not fit",
        (
            "dit-video plan experiment=world_quick trainer=gpu device=h100",
            "dit-video plan model=1.3b trainer=fsdp trainer.devices=8 data.num_frames=81 data.height=480 data.width=832 price=2.5",
            "dit-video plan experiment=world_quick measure=true",
        ),
    ),
    "data": Command(
        "make, index and check shards of captioned clips, and look at a step of training",
        (
            "dit-video data world",
            "dit-video data check shards='footage/*.tar'",
            "dit-video data peek step=100 experiment=world_quick",
        ),
    ),
    "checkpoint": Command(
        "list, verify, export and compare what a run has saved",
        (
            "dit-video checkpoint ls run=runs/demo",
            "dit-video checkpoint verify run=runs/demo",
            "dit-video checkpoint export run=runs/demo out=exported",
            "dit-video checkpoint diff a=runs/demo b=runs/demo-good",
        ),
    ),
    "completion": Command(
        "print a script that teaches a shell to complete commands, keys and options",
        (
            'eval "$(dit-video completion bash)"                    # in ~/.bashrc',
            'eval "$(dit-video completion zsh)"                     # in ~/.zshrc',
            "dit-video completion fish | source                     # in ~/.config/fish/config.fish",
        ),
    ),
}

TOOLED = ("data", "checkpoint")
"""Commands that are several: the word after them is the name of a tool."""

FLAGS = {
    "--help": "this help; after a command, its groups and keys",
    "--cfg": "print the composed config and stop",
    "--config-dir": "DIR: a config folder of yours, searched before the package's (./conf is found by itself)",
    "--multirun": "run once for every combination of comma-separated values (-m)",
    "--traceback": "show the full traceback of an error (or set DIT_VIDEO_TRACEBACK=1)",
    "--version": "print the version",
}
SHORT_FLAGS = {"-h": "--help", "-m": "--multirun"}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = min(max((len(name) for name, _ in rows), default=0), 34)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)


def general_help() -> str:
    commands = _table([(name, command.summary) for name, command in COMMANDS.items()])
    shorts = {long: f"{short}, {long}" for short, long in SHORT_FLAGS.items()}
    flags = _table([(shorts.get(name, name), text) for name, text in FLAGS.items()])
    examples = "\n".join(f"  {command.examples[0]}" for name, command in COMMANDS.items() if name != "completion")
    return f"""dit-video: train, sample and judge video diffusion transformers

usage: dit-video COMMAND [key=value ...] [flags]

commands (dit-video COMMAND --help tells its keys)
{commands}

flags
{flags}

examples, from nothing to a judged model
{examples}

key=value changes a key of the config, +key=value adds one, ~key removes one, and group=option swaps a part (model=small).
trust=PACKAGE lets configs name classes of a package of yours; without it only dit_video is ever called."""


def command_help(command: str, config_name: str | None, folders: tuple[Path, ...]) -> str:
    """What a command does, its groups with their options, its keys with the comments of their YAML, and examples."""
    from dit_video.compose import choices, config_file, tools

    about = COMMANDS[command]
    examples = "examples\n" + "\n".join(f"  {example}" for example in about.examples)
    if command == "completion":
        return f"{about.summary}\n\nusage: dit-video completion bash|zsh|fish\n\n{examples}"
    if config_name is None:
        rows = [(tool, _first_comment(config_file(f"{command}_{tool}", folders))) for tool in tools(command, folders)]
        return (
            f"{about.summary}\n\nusage: dit-video {command} TOOL [key=value ...] [flags]\n\ntools\n{_table(rows)}\n\n{examples}"
        )
    summary, words = about.summary, command
    if command in TOOLED:
        words = f"{command} {config_name.removeprefix(f'{command}_')}"
        summary = _first_comment(config_file(config_name, folders)) or summary
        examples = f"example\n  dit-video {words}"
    usage = f"usage: dit-video {words} [group=option ...] [key=value ...] [flags]    (* stands where nothing is said)"
    parts = [summary, usage]
    groups = choices(config_name, folders)
    plain = []
    for group, (chosen, options) in sorted(groups.items(), key=lambda item: (item[1][0] is not None, item[0])):
        rows = [(_mark(group, option, chosen), _first_comment(config_file(f"{group}/{option}", folders))) for option in options]
        if any(comment for _, comment in rows):
            parts.append(f"{group}\n{_table(rows)}")
        elif rows:
            plain.append((group, " ".join(name.removeprefix(f"{group}=") for name, _ in rows)))
    if plain:
        parts.append(f"other groups\n{_table(plain)}")
    if keys := documented_keys(config_file(config_name, folders)):
        parts.append(f"keys (--cfg prints all of them, with their values)\n{_table(keys)}")
    parts.append(examples)
    return "\n\n".join(parts)


def _mark(group: str, option: str, chosen: str | None) -> str:
    return f"{group}={option}{'*' if option == chosen else ''}"


def _first_comment(path: Path | None) -> str:
    """The comment that a config opens with."""
    for line in path.read_text().splitlines() if path else ():
        if line.strip() and "@package" not in line:
            return line[1:].strip() if line.startswith("#") else ""
    return ""


def documented_keys(path: Path | None) -> list[tuple[str, str]]:
    """Each key of a config file that has a value, as `key=value`, with the comment that stands beside it."""
    rows: list[tuple[str, str]] = []
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines() if path else ():
        found = re.match(r"^( *)([A-Za-z_]\w*):(?:\s+(.*))?$", line)
        if not found:
            continue
        indent, key, rest = len(found[1]), found[2], found[3] or ""
        parents = [(depth, name) for depth, name in parents if depth < indent]
        value, comment = re.fullmatch(r"((?:'[^']*'|\"[^\"]*\"|[^#'\"])*?)\s*(?:#\s*(.*))?", rest).groups() if rest else ("", "")  # type: ignore[union-attr]
        dotted = ".".join([*(name for _, name in parents), key])
        parents.append((indent, key))
        if value and not dotted.startswith(("defaults", "hydra", "_target_")):
            rows.append((f"{dotted}={'' if value == '???' else value}", comment or ("(must be given)" if value == "???" else "")))
    return rows
