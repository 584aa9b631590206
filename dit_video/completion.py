"""Shell completion: a script a shell, and one function that answers what may stand at the end of a line."""

import shlex

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dit_video.cli import parse
from dit_video.compose import Typed, UsageError, choices, compose, take_apart, tools, user_folders
from dit_video.help import COMMANDS, FLAGS, TOOLED

# A shell hands over the line up to the cursor and gets whole words back; bash breaks words at `=` and replaces the last piece.
SCRIPTS = {
    "bash": r"""_dit_video() {
    local line="${COMP_LINE:0:COMP_POINT}" word answer
    word="${line##* }"
    COMPREPLY=()
    while IFS= read -r answer; do
        [ -n "$answer" ] && COMPREPLY+=("${answer#"${word%"${word##*=}"}"}")
    done < <(dit-video completion reply "$line" 2>/dev/null)
}
complete -o default -o nospace -F _dit_video dit-video""",
    "zsh": r"""_dit_video() {
    local -a answers
    answers=("${(@f)$(dit-video completion reply "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$answers[1]" ]]; then compadd -Q -S '' -- $answers; else _default; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit; compinit }
compdef _dit_video dit-video""",
    "fish": r"""complete -c dit-video -e
complete -c dit-video -f -a '(dit-video completion reply (commandline -cp) 2>/dev/null)'
complete -c dit-video -F -n 'string match -qr "^(image|video|prompts|run|init_from|out|a|b)=" -- (commandline -ct)'""",
}


def script(shell: str) -> str:
    """The script for a shell; UsageError where there is none."""
    if shell not in SCRIPTS:
        raise UsageError(f"completion needs the name of a shell: {', '.join(SCRIPTS)}; got {shell!r}")
    return SCRIPTS[shell]


def reply(line: str) -> list[str]:
    """Every word that may stand where the line ends, in place of its last word; none where any text may."""
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # a quote is still open: a free text, and nobody's to guess
        return []
    current = "" if line.endswith(" ") or not words else words.pop()
    return sorted(answer for answer in _answers(words, current) if answer.startswith(current) and answer != current)


def _answers(words: list[str], current: str) -> list[str]:
    given = [word for word in words if not word.startswith("-")]
    if current.startswith("-"):
        return list(FLAGS)
    if not given:
        return list(COMMANDS)
    if given[0] == "completion":
        return list(SCRIPTS)
    if len(given) == 1 and given[0] in TOOLED:
        return tools(given[0], user_folders(None))
    try:
        call = parse(words)
        assert call.config_name is not None
        groups = choices(call.config_name, call.folders)
        try:
            config = compose(call.config_name, take_apart(call.arguments), call.folders)
        except UsageError:  # what stands before may be wrong and still wants completing
            config = compose(call.config_name, Typed((), {}, ()), call.folders)
    except (ValueError, OSError, HydraException, OmegaConfBaseException):
        return []
    key, equals, _ = current.partition("=")
    if not equals:
        return [f"{group}=" for group in groups] + _keys(config, key)
    if key in groups:
        return [f"{key}={option}" for option in groups[key][1]]
    truth = isinstance(OmegaConf.select(config, key, throw_on_missing=False), bool)
    return [f"{key}={value}" for value in ("true", "false")] if truth else []


def _keys(config: DictConfig, typed: str) -> list[str]:
    """The keys one level below what is typed: `key=` where it has a value, `key.` where it has keys of its own."""
    parent = typed.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return []
    tree = OmegaConf.to_container(node, resolve=False)
    assert isinstance(tree, dict)
    names = {str(key): "." if isinstance(value, dict) else "=" for key, value in tree.items()}
    return [f"{parent}{'.' if parent else ''}{name}{end}" for name, end in names.items() if not name.startswith("_")]
