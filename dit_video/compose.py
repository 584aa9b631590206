"""Configs from the command line: Hydra composes, this file finds the folders, keeps free text away and says what is wrong.

Search order: --config-dir, then ./conf of the current directory, then the package's own folder; the first file of a name wins.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

TEXT_KEYS = frozenset(
    {"prompt", "negative_prompt", "image", "video", "prompts", "last_image", "out", "init_from", "run", "name", "a", "b"}
)
"""Keys whose value is taken letter by letter, never as Hydra's grammar, a number, a null or an interpolation."""


class UsageError(ValueError):
    """A command line that cannot be carried out as typed."""


# --------------------------------------------------------------------------- folders


def conf_folder() -> Path:
    """The package's own configs: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


def user_folders(config_dir: str | None) -> tuple[Path, ...]:
    """The user's config folders, the more important first; UsageError where config_dir is none."""
    folders = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UsageError(f"--config-dir {config_dir} is not a folder")
        folders.append(Path(config_dir).resolve())
    here = Path("conf").resolve()
    if here.is_dir() and here != conf_folder() and here not in folders:
        folders.append(here)
    return tuple(folders)


class UserFolders(SearchPathPlugin):
    """Puts the user's folders before the package's own, in one process and in every launcher's."""

    folders: ClassVar[tuple[Path, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:
            search_path.prepend("user", f"file://{folder}", anchor="main")


def use_folders(folders: tuple[Path, ...]) -> None:
    """Makes the user's folders part of every Hydra started from here on."""
    UserFolders.folders = folders
    Plugins.instance().register(UserFolders)


@contextmanager
def _hydra(folders: tuple[Path, ...]) -> Iterator[ConfigLoader]:
    use_folders(folders)
    around, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a sweep's trial may compose other configs
    try:
        with initialize_config_dir(str(conf_folder()), job_name="dit_video", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = around


# --------------------------------------------------------------------------- what was typed


@dataclass(frozen=True)
class Typed:
    """The key=value arguments of a command, taken apart."""

    overrides: tuple[str, ...]  # Hydra's
    texts: Mapping[str, str]  # free text by key, see TEXT_KEYS; a leading + of the key is kept
    trust: tuple[str, ...]  # packages that configs may name classes of


def take_apart(arguments: Iterable[str]) -> Typed:
    """Sorts arguments into overrides, free texts and trusted packages; UsageError where one is none of them."""
    overrides, texts, trust = [], {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals and not key.startswith("~"):
            raise UsageError(f"expected key=value, got {argument!r}")
        if key == "trust":
            trust += [name for name in re.split(r"[\s,\[\]]+", value) if name]
        elif key.lstrip("+") in TEXT_KEYS:
            texts[key] = value
        elif re.match(r"[^\['\"]*\{\d+\.\.\d+\}", value):  # the usual way to write many shards, and no grammar of Hydra's
            overrides.append(f"{key}={quoted(value)}")
        else:
            overrides.append(argument)
    return Typed(tuple(overrides), texts, tuple(trust))


def literal(text: str) -> str:
    """A config value that reads back as exactly this text, even with ${...} in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """A value in Hydra's grammar that reads back as exactly this text."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", literal(text))
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", escaped) + "'"


def set_texts(config: DictConfig, texts: Mapping[str, str]) -> None:
    """Puts free texts into a composed config; UsageError for a key that it does not have.

    Read them as config.prompt or through OmegaConf.to_container: OmegaConf.resolve would read ${...} in them a second time.
    """
    for typed, text in texts.items():
        key = typed.lstrip("+")
        if key == typed and key not in config.keys():
            raise _unknown_key(key, _keys(config))
        if text == "???":
            raise UsageError(f"{key}=??? is how a config says that a value is missing; write another text")
        with open_dict(config):
            config[key] = literal(text)


# --------------------------------------------------------------------------- composing


def compose(config_name: str, typed: Typed, folders: tuple[Path, ...] = (), sweep: bool = False) -> DictConfig:
    """The config of a program under what was typed; of a sweep, its first trial. UsageError names the nearest valid keys."""
    with _hydra(folders) as loader:
        overrides = _parse(typed.overrides, loader)
        for override in overrides if not sweep else ():
            if override.is_sweep_override():
                raise UsageError(f"{override.input_line} gives several values: add -m to run each, or quote a text")
        try:
            config = hydra_compose(config_name, [_first(override) for override in overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(config_name, overrides, loader, error) from error
    set_texts(config, typed.texts)
    return config


def explain(config_name: str, typed: Typed, folders: tuple[Path, ...], error: Exception) -> UsageError:
    """What is wrong with a command line that Hydra refused."""
    with _hydra(folders) as loader:
        return _explain(config_name, _parse(typed.overrides, loader), loader, error)


def choices(config_name: str, folders: tuple[Path, ...] = ()) -> dict[str, tuple[str | None, list[str]]]:
    """Each config group of a program: what is chosen when nothing is said, and what there is to choose from."""
    with _hydra(folders) as loader:
        config = hydra_compose(config_name, [], return_hydra_config=True)
        chosen = config.hydra.runtime.choices
        groups = [group for group in chosen if not group.startswith("hydra/")]
        return {group: (chosen[group], loader.get_group_options(group.split("@")[0])) for group in groups}


def tools(command: str, folders: Sequence[Path]) -> list[str]:
    """The tools of a command that has some: one a `<command>_<tool>.yaml`."""
    found = (path for folder in (*folders, conf_folder()) for path in folder.glob(f"{command}_*.yaml"))
    return sorted({path.stem.removeprefix(f"{command}_") for path in found})


def config_file(config_name: str, folders: tuple[Path, ...]) -> Path | None:
    """The YAML file that a config (or `group/option`) comes from."""
    paths = (folder / f"{config_name}.yaml" for folder in (*folders, conf_folder()))
    return next((path for path in paths if path.is_file()), None)


def trial_name(overrides: Sequence[str]) -> str:
    """A folder name for a sweep's trial, from nothing but its overrides, so that a requeued trial finds its run again."""
    plain = ",".join(override for override in overrides if not override.startswith("hydra"))
    safe = re.sub(r"[^\w.,=+-]", "_", plain)
    if safe == plain and len(safe) <= 120:
        return safe or "trial"
    return f"{safe[:110]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _parse(overrides: Iterable[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(loader)
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            key, _, value = override.partition("=")
            hint = f"""; if the value is a text, quote it: '{key}="{value}"'""" if not set(value) & set("'\"") else ""
            raise UsageError(f"cannot read the value of {override}{hint}") from error
    return parsed


def _values(override: Override) -> list[str]:
    """The values that an override gives its key, one unless it is a sweep."""
    if override.is_sweep_override() and override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    if override.is_sweep_override():  # a range of a sweeper's own: any number of it will do
        return [str(getattr(override.value(), "start", 0))]
    return [override.get_value_element_as_str()]


def _first(override: Override) -> str:
    if not override.is_sweep_override():
        assert override.input_line is not None
        return override.input_line
    return f"{override.get_key_element()}={_values(override)[0]}"


def _explain(config_name: str, overrides: Sequence[Override], loader: ConfigLoader, error: Exception) -> UsageError:
    """Finds the first override that names a key or an option that does not exist."""
    try:
        groups = hydra_compose(config_name, [], return_hydra_config=True).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException) as broken:
        return UsageError(f"the config {config_name}.yaml does not compose: {_one_line(broken)}")
    chosen = []
    for override in overrides:
        group = override.key_or_group
        options = loader.get_group_options(group)
        if options or override.get_key_element().lstrip("+~") in groups:
            for value in re.findall(r"[^\s,\[\]]+", ",".join(_values(override))) if not override.is_delete() else ():
                if value not in (*options, "null"):
                    return UsageError(f"{group} has no option {value!r}{_suggest(value, options)}")
            chosen.append(_first(override))
    try:
        keys = _keys(hydra_compose(config_name, chosen, return_hydra_config=True))
    except (HydraException, OmegaConfBaseException) as broken:
        return UsageError(_one_line(broken))
    known = {*keys, *groups}
    for override in overrides:
        if not override.is_add() and not override.is_force_add() and override.key_or_group not in known:
            return _unknown_key(override.key_or_group, [key for key in known if not key.startswith("hydra")])
    return UsageError(_one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """Every key of a config, dotted."""
    if OmegaConf.is_config(tree):
        tree = OmegaConf.to_container(tree, resolve=False)
    keys = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict | list):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like a word; a key is also known by its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    ranked = sorted(((likeness(candidate), candidate) for candidate in set(candidates)), key=lambda pair: (-pair[0], pair[1]))
    return [candidate for score, candidate in ranked[:count] if score >= max(0.6, ranked[0][0] - 0.15)]


def _suggest(word: str, candidates: Sequence[str]) -> str:
    close = nearest(word, candidates)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are: {', '.join(candidates)}" if candidates else ""


def _unknown_key(key: str, known: Sequence[str]) -> UsageError:
    top = sorted({name.partition(".")[0] for name in known})
    close = nearest(key, known)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(top)}"
    return UsageError(f"unknown key {key}; {hint} (+{key}=... adds a new key)")


# --------------------------------------------------------------------------- trust


def check_targets(config: Any, trusted: Sequence[str] = ("dit_video",)) -> None:
    """Refuses a config that would call anything outside the trusted packages; ValueError naming the key and the target.

    A stored config is data: where it came from is not known. What a target resolves to is checked too, so that
    `dit_video.somewhere.os.system` is not mistaken for ours.
    """
    tree = config if OmegaConf.is_config(config) else OmegaConf.create(config)

    def visit(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                _check_target(value, where, trusted)
            if isinstance(value, dict | list):
                visit(value, where)

    visit(OmegaConf.to_container(tree, resolve=True), "")


def _check_target(target: Any, where: str, trusted: Sequence[str]) -> None:
    package = str(target).partition(".")[0]
    if not isinstance(target, str) or package not in trusted:
        raise ValueError(
            f"{where} is {target!r}, outside {', '.join(trusted)}; say trust={package} to let configs call that package"
        )
    try:
        found = get_object(target)
    except Exception as error:
        raise ValueError(f"{where} is {target!r}, which cannot be found: {_one_line(error)}") from error
    home = getattr(found, "__module__", None) or getattr(found, "__name__", "")
    if str(home).partition(".")[0] not in trusted:
        raise ValueError(f"{where} is {target!r}, which leads outside {', '.join(trusted)} to {home}")
