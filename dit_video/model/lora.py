"""LoRA (Hu et al. 2021) on a transformer's linear layers, by peft: adapters put in from outside, kept in files that diffusers reads.

    W x  becomes  W x + scale * B A x,    scale = alpha / rank

A begins random and B at zero, so that nothing changes at first; everything but A and B is frozen. A layer's own weight is called
<layer>.base_layer.weight while it has an adapter, which is <layer>.lora_A.default.weight and <layer>.lora_B.default.weight.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dit_video.model.layers import Linear
from dit_video.model.published import PublishedError, Readable, mapping_in, module_name, own_module_name
from dit_video.model.transformer import Transformer
from dit_video.model.wan import LARGEST, WanExperts, WanTransformer
from dit_video.numbers import is_finite, is_whole
from dit_video.seeding import seeded

FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"  # diffusers' names
NAME = "default"  # peft's name of an adapter that has no other
BASE = ".base_layer."
_PREFIXES = {"": "transformer.", "high.": "transformer.", "low.": "transformer_2."}


def add_adapters(
    transformer: Transformer,  # on the meta device, or with its weights; before it is cut over ranks
    rank: int = 16,
    alpha: float | None = None,  # none: as the rank, so that the scale is 1
    targets: Sequence[str] | str | None = None,  # ends of layers' names, such as attention.query; none: all hidden matrices
    seed: int = 0,  # of A where there are weights already; on the meta device it begins with everything else
) -> None:
    """Puts an adapter beside each of a transformer's linear layers that are named, in place, and freezes all the rest."""
    targets = [targets] if isinstance(targets, str) else targets
    check_options(rank, alpha, targets)
    linears = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, Linear)}
    if targets is None:
        chosen = [name for name, layer in linears.items() if layer.matrices]
    else:
        chosen = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]
        idle = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linears)]
        if idle:
            some = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in linears})[:20])
            raise ValueError(f"no linear layer's name ends in {idle[0]!r}; set lora.targets to some of {some}")
    if isinstance(transformer, WanTransformer | WanExperts):
        for name in chosen:
            _check_writable(name)
    scale = 1.0 if alpha is None else alpha / rank
    _inject(transformer, dict.fromkeys(chosen, rank), dict.fromkeys(chosen, scale))
    for name, layer in adapters_of(transformer).items():
        down = layer.lora_A[NAME].weight
        if not down.is_meta:
            drawn = torch.randn(down.shape, generator=seeded(seed, f"{name}.lora_A")) * down.initial[0]
            down.data.copy_(drawn)


def check_options(rank: object, alpha: object, targets: object) -> None:
    """ValueError where no adapters can be made so."""
    if not is_whole(rank, 1, LARGEST):
        raise ValueError(f"the rank of an adapter must be a whole number from 1 to {LARGEST}, got {rank!r}; set lora.rank")
    if alpha is not None and not (is_finite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a number above 0, or null for the rank, got {alpha!r}; set lora.alpha")
    some = isinstance(targets, Sequence) and targets and all(isinstance(each, str) for each in targets)
    if targets is not None and not some:
        raise ValueError(
            f"targets must be some ends of layers' names, or null for all matrices, got {targets!r}; set lora.targets"
        )


def _inject(transformer: Transformer, ranks: Mapping[str, int], scales: Mapping[str, float]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("adapters need peft (pip install dit-video[lora])") from error
    if adapters_of(transformer):
        raise ValueError("the transformer has adapters already; merge them first")
    patterns = {name: f"^{re.escape(name)}$" for name in ranks}
    config = LoraConfig(
        target_modules=list(ranks), r=1, lora_alpha=1, rank_pattern={patterns[name]: rank for name, rank in ranks.items()},
        alpha_pattern={patterns[name]: scales[name] * rank for name, rank in ranks.items()},
    )  # fmt: skip
    hollow = any(weight.is_meta or isinstance(weight, FakeTensor) for weight in transformer.parameters())
    with _unmoved() if hollow else nullcontext(), next(transformer.parameters()).device:
        inject_adapter_in_model(config, transformer, NAME)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for layer in adapters_of(transformer).values():
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        down.initial, up.initial = (down.shape[1] ** -0.5, 0.0), (0.0, 0.0)  # see layers.rules_of


@contextmanager
def _unmoved() -> Iterator[None]:
    """Peft leaves new adapters where they are made, as weights that have no contents cannot be moved."""
    move = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def adapters_of(transformer: nn.Module) -> dict[str, Any]:
    """peft's layers by name; none where there are no adapters."""
    return {
        name: layer for name, layer in transformer.named_modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


@torch.no_grad()
def merge_adapters(transformer: Transformer) -> None:
    """Adds what the adapters do to the weights beneath them, and takes them out; all weights can be trained again."""
    for name, layer in adapters_of(transformer).items():
        base = layer.base_layer
        base.weight += layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, base)
    transformer.requires_grad_(True)
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config


@dataclass(frozen=True)
class UnderAdapters:
    """Weights that know of no adapters, under the names that a network with adapters has for them; open for reading as they are."""

    saved: Readable
    names: Mapping[str, str]  # a network's, and what was saved for it

    @property
    def path(self) -> Path:
        return self.saved.path

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        own = {saved: name for name, saved in self.names.items()}
        return {own.get(name, name): shape for name, shape in self.saved.shapes(group).items()}

    def read(self, group: str, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        return self.saved.read(group, self.names.get(name, name), rows)

    def close(self) -> None:
        """Lets the files go."""
        self.saved.close()


def under_adapters(network: nn.Module, saved: Readable) -> UnderAdapters:
    """What was saved, as a network with adapters wants to read it."""
    return UnderAdapters(saved, {name: name.replace(BASE, ".") for name in network.state_dict() if BASE in name})


# ------------------------------------------------------------------ files


def save_adapters(transformer: WanTransformer | WanExperts, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Writes adapters as diffusers' load_lora_weights and load_lora_adapter read them, B times the scale; gives the file.

    The scale is in B because few other programs read where diffusers would look for it. `weights` are whole adapters by the names of
    the transformer's parameters, such as averaged ones; none: its own.
    """
    weights = dict(transformer.named_parameters()) if weights is None else weights
    tensors = {}
    for name, layer in adapters_of(transformer).items():
        prefix, own = _expert(transformer, name)
        _check_writable(own)
        published = _PREFIXES[prefix] + module_name(own, "diffusers")
        down, up = (weights[f"{name}.{part}.{NAME}.weight"].detach().cpu() for part in ("lora_A", "lora_B"))
        tensors[f"{published}.lora_A.weight"] = down.contiguous()
        tensors[f"{published}.lora_B.weight"] = (up * layer.scaling[NAME] if layer.scaling[NAME] != 1 else up).contiguous()
    if not tensors:
        raise ValueError("the transformer has no adapters to be saved")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / FILE).chmod(0o644)  # safetensors makes files that their owner alone can read
    return folder / FILE


def _check_writable(name: str) -> None:
    if name.endswith(".patch"):
        raise ValueError("the adapter of a patch embedding cannot be written, as it is a convolution there; set lora.targets")


@torch.no_grad()
def load_adapters(transformer: WanTransformer | WanExperts, path: Path) -> None:
    """Puts adapters of a file, or of the one in a folder, into a transformer, which gets them where it has none.

    PublishedError, before anything is changed, where the file is none, or its adapters are not those of the transformer.
    """
    path = path / FILE if path.is_dir() else path
    found, scales = _found_in(transformer, path)
    layers = adapters_of(transformer)
    if layers and (differing := sorted(layers.keys() ^ found.keys())):
        raise PublishedError(f"{path} and the transformer do not adapt the same layers: {differing[0]}; set lora.targets")
    linears = {name.removesuffix(".base_layer"): part for name, part in transformer.named_modules() if isinstance(part, Linear)}
    if strange := sorted(found.keys() - linears.keys()):
        raise PublishedError(f"{path} holds an adapter of {strange[0]}, which the transformer does not have")
    ranks = {name: layers[name].r[NAME] if layers else len(pair["lora_A"]) for name, pair in found.items()}
    for name, pair in found.items():
        own = {"lora_A": (ranks[name], linears[name].in_features), "lora_B": (linears[name].out_features, ranks[name])}
        for part, tensor in pair.items():
            if tuple(tensor.shape) != own[part]:
                raise PublishedError(
                    f"{path}: {part} of {name} has shape {tuple(tensor.shape)}, the transformer's {own[part]}; set lora.rank"
                )
    if not layers:
        _inject(transformer, ranks, scales)
    for name, layer in adapters_of(transformer).items():
        ratio = scales[name] / layer.scaling[NAME]
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        down.copy_(found[name]["lora_A"])
        up.copy_(found[name]["lora_B"] if ratio == 1 else found[name]["lora_B"].to(up.dtype) * ratio)


def _found_in(transformer: nn.Module, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Both matrices of every adapter of a file by the layer that they are put beside, and their scales."""
    read, told = _read(path)
    found: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    for key, tensor in read.items():
        prefix, name, part = _own_name(transformer, path, key)
        if tensor.ndim != 2 or not len(tensor) or not tensor.is_floating_point():
            raise PublishedError(f"{path}: {key} must be a matrix of numbers, got {tensor.dtype} of shape {tuple(tensor.shape)}")
        found.setdefault(name, {})[part] = tensor
        scales[name] = _scale(path, told, prefix)
    if not found:
        raise PublishedError(f"{path} holds no adapters")
    if torn := [name for name, pair in found.items() if len(pair) < 2]:
        raise PublishedError(f"{path} holds half of the adapter of {torn[0]}")
    return found, scales


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, and what it says of them."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise PublishedError(f"{path} is no file of adapters in safetensors; nothing else is opened")
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(METADATA, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise PublishedError(f"{path} cannot be read: {error}") from error
    return tensors, mapping_in(told, f"{path}: {METADATA}")


def _scale(path: Path, told: Mapping[str, Any], prefix: str) -> float:
    """What a file says of adapters whose keys have a prefix; what has none is said of all."""
    about = {key: value for key, value in told.items() if "." not in key}
    about |= {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
    if other := [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if about.get(key)]:
        raise PublishedError(f"{path}: {METADATA} tells of adapters of another kind, {other[0]}: {about[other[0]]}")
    rank, alpha = about.get("r", 1), about.get("lora_alpha", 1)
    if not is_whole(rank, 1, LARGEST) or not is_finite(alpha) or not alpha / rank > 0:
        raise PublishedError(f"{path}: {METADATA} says r {rank!r} and lora_alpha {alpha!r}, which must both be above 0")
    return alpha / rank


def _expert(transformer: nn.Module, name: str) -> tuple[str, str]:
    """Which of two experts a module is of, and its name there."""
    if not isinstance(transformer, WanExperts):
        return "", name
    expert, _, own = name.partition(".")
    return f"{expert}.", own


def _own_name(transformer: nn.Module, path: Path, key: str) -> tuple[str, str, str]:
    """The prefix of a file's key, and the module and the part of an adapter that it names."""
    experts = ("high.", "low.") if isinstance(transformer, WanExperts) else ("",)
    prefixes = {_PREFIXES[expert]: expert for expert in experts}
    if experts == ("",):
        prefixes[""] = ""  # as a transformer alone is saved
    for prefix, expert in sorted(prefixes.items(), reverse=True):
        match = re.fullmatch(re.escape(prefix) + r"(.+)\.(lora_[AB])\.weight", key)
        if match:
            try:
                return prefix, expert + own_module_name(match[1], "diffusers"), match[2]
            except (KeyError, ValueError):
                break
    raise PublishedError(f"{path} holds {key}, which is no adapter of this transformer in diffusers' layout")
