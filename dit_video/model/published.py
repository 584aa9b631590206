"""Published weights in and out: Wan's, as its authors keep them (the original layout) or as diffusers does, in safetensors alone.

    config.json  diffusion_pytorch_model.safetensors              one transformer, in either layout
    config.json  diffusion_pytorch_model-00001-of-00006.safetensors ... diffusion_pytorch_model.safetensors.index.json
                                                                  the same in several files
    transformer/  transformer_2/                                  a pipeline of diffusers; the second of two experts only
    high_noise_model/  low_noise_model/                           two experts in the original layout

Nothing is unpickled or executed: JSON and safetensors are all that is read, and everything in them is checked against the sizes that
config.json says before a weight is taken. Weights go from one layout to the other by names and reshapes, so an export is exact to the bit.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_video.model.transformer import Transformer
from dit_video.model.wan import LARGEST, WanExperts, WanTransformer, wrong_size
from dit_video.numbers import is_finite, is_whole

Layout = Literal["diffusers", "original"]

STEM, CONFIG, PIPELINE = "diffusion_pytorch_model", "config.json", "model_index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BOUNDARIES = {0: 0.875, 20: 0.9}
"""The noise level between the experts of Wan 2.2 A14B, by the channels of control; the original layout does not keep it."""
TEXT_LENGTH = 512

_NAMES = (  # ours, diffusers', the original's
    ("ends.video.patch", "patch_embedding", "patch_embedding"),
    ("ends.video.level.into", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("ends.video.level.out", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("ends.video.modulation", "condition_embedder.time_proj", "time_projection.1"),
    ("ends.video.final_offset", "scale_shift_table", "head.modulation"),
    ("ends.video.head", "proj_out", "head.head"),
    ("text.into", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text.out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("image.norm", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image.into", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image.out", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("image.out_norm", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
)
_BLOCK_NAMES = (  # after blocks.<number>
    ("offset", "scale_shift_table", "modulation"),
    ("attention.query", "attn1.to_q", "self_attn.q"),
    ("attention.key", "attn1.to_k", "self_attn.k"),
    ("attention.value", "attn1.to_v", "self_attn.v"),
    ("attention.out", "attn1.to_out.0", "self_attn.o"),
    ("attention.query_norm", "attn1.norm_q", "self_attn.norm_q"),
    ("attention.key_norm", "attn1.norm_k", "self_attn.norm_k"),
    ("cross_norm", "norm2", "norm3"),
    ("cross.query", "attn2.to_q", "cross_attn.q"),
    ("cross.key", "attn2.to_k", "cross_attn.k"),
    ("cross.value", "attn2.to_v", "cross_attn.v"),
    ("cross.out", "attn2.to_out.0", "cross_attn.o"),
    ("cross.query_norm", "attn2.norm_q", "cross_attn.norm_q"),
    ("cross.key_norm", "attn2.norm_k", "cross_attn.norm_k"),
    ("cross.image_key", "attn2.add_k_proj", "cross_attn.k_img"),
    ("cross.image_value", "attn2.add_v_proj", "cross_attn.v_img"),
    ("cross.image_key_norm", "attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("mlp.into", "ffn.net.0.proj", "ffn.0"),
    ("mlp.out", "ffn.net.2", "ffn.2"),
)
_COLUMN: dict[Layout, int] = {"diffusers": 1, "original": 2}
_UNUSED = ".attn2.norm_added_q."  # in some of diffusers' folders, and read by nobody
_EXPERTS: dict[Layout, dict[str, str]] = {
    "diffusers": {"high.": "transformer", "low.": "transformer_2"},
    "original": {"high.": "high_noise_model", "low.": "low_noise_model"},
}


@runtime_checkable
class Readable(Protocol):
    """Weights open for reading tensor by tensor and row by row: a checkpoint's or published ones."""

    @property
    def path(self) -> Path: ...
    def shapes(self, group: str) -> dict[str, tuple[int, ...]]: ...
    def read(self, group: str, name: str, rows: slice | None = None) -> Tensor: ...
    def close(self) -> None: ...


class PublishedError(ValueError):
    """Published weights that are missing, damaged, pickled, or of another model."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file of JSON; PublishedError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PublishedError(f"{path} cannot be read: {error}") from error
    return mapping_in(text, str(path))


def mapping_in(text: str, where: str) -> dict[str, Any]:
    """The mapping that a text of JSON is; PublishedError, which says where the text stands, if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PublishedError(f"{where} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PublishedError(f"{where} is no mapping of names")
    return found


# ------------------------------------------------------------------ names and shapes


def module_name(ours: str, layout: Layout) -> str:
    """What a layout calls one of WanTransformer's modules or its own parameters; KeyError where it has no such."""
    column = _COLUMN[layout]
    if ours.startswith("blocks."):
        _, number, rest = ours.split(".", 2)
        return f"blocks.{number}." + {names[0]: names[column] for names in _BLOCK_NAMES}[rest]
    return {names[0]: names[column] for names in _NAMES}[ours]


def own_module_name(name: str, layout: Layout) -> str:
    """Undoes module_name."""
    column = _COLUMN[layout]
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        return f"blocks.{number}." + {names[column]: names[0] for names in _BLOCK_NAMES}[rest]
    return {names[column]: names[0] for names in _NAMES}[name]


def published_name(ours: str, layout: Layout) -> str:
    """What a layout calls one of WanTransformer's parameters."""
    module, dot, leaf = ours.rpartition(".")
    return module_name(ours, layout) if leaf.endswith("offset") else module_name(module, layout) + dot + leaf


def to_published(ours: str, values: Tensor, transformer: WanTransformer) -> Tensor:
    """A parameter in the shape it is published in: a linear patch embedding is a convolution there, and offsets have an axis more."""
    if ours.endswith("offset"):
        return values[None]
    if ours != "ends.video.patch.weight":
        return values
    t, h, w = transformer.patch
    parts = values.split([t * h * w * transformer.channels, t * h * w * transformer.control_channels], dim=1)
    return torch.cat([rearrange(part, "d (t h w c) -> d c t h w", t=t, h=h, w=w) for part in parts if part.shape[1]], dim=1)


def to_own(ours: str, values: Tensor, channels: int) -> Tensor:
    """Undoes to_published, of all rows or of some."""
    if ours.endswith("offset"):
        return values[0]
    if ours != "ends.video.patch.weight":
        return values
    parts = (values[:, :channels], values[:, channels:])
    return torch.cat([rearrange(part, "d c t h w -> d (t h w c)") for part in parts], dim=1)


# ------------------------------------------------------------------ sizes


def sizes_of(folder: Path) -> dict[str, Any]:
    """The arguments of WanTransformer that a transformer's folder says; PublishedError where config.json says something else."""
    config = _config(folder)
    sizes = (_original_sizes if config["_class_name"] == "WanModel" else _diffusers_sizes)(folder, config)
    if fault := wrong_size(sizes):
        raise PublishedError(f"{folder / CONFIG}: {fault[1]}")
    return sizes


def _diffusers_sizes(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    heads, head_dim = _whole(folder, config, "num_attention_heads"), _even(folder, config, "attention_head_dim")
    channels = _whole(folder, config, "out_channels")
    wanted = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}
    if config.get("image_dim"):
        wanted["added_kv_proj_dim"] = heads * head_dim
    _want(folder, config, wanted)
    return {
        "width": heads * head_dim, "depth": _whole(folder, config, "num_layers", most=1000), "heads": heads,
        "mlp_dim": _whole(folder, config, "ffn_dim"), "context_dim": _whole(folder, config, "text_dim", 4096), "channels": channels,
        "patch": _patch(folder, config), "control_channels": _control(folder, config, "in_channels", channels),
        "image_dim": _whole(folder, config, "image_dim", 0, least=0), "text_length": TEXT_LENGTH,
        "level_dim": _even(folder, config, "freq_dim", 256), "eps": _positive(folder, config, "eps", 1e-6),
    }  # fmt: skip


def _original_sizes(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    channels = _whole(folder, config, "out_dim")
    _want(folder, config, {"cross_attn_norm": True, "qk_norm": True})
    if config.get("model_type", "t2v") not in ("t2v", "i2v", "ti2v"):
        raise PublishedError(
            f"{folder / CONFIG}: model_type {config['model_type']!r} is none of t2v, i2v and ti2v; no other can be read"
        )
    with Files(
        folder
    ) as files:  # both 2.1's and 2.2's image to video call themselves i2v, and the first alone has an image encoder
        image = files.shape("img_emb.proj.0.weight") if "img_emb.proj.0.weight" in files.names else (0,)
        if "img_emb.emb_pos" in files.names:
            raise PublishedError(f"{folder} has img_emb.emb_pos: models of a first and a last frame cannot be read")
    return {
        "width": _whole(folder, config, "dim"), "depth": _whole(folder, config, "num_layers", most=1000),
        "heads": _whole(folder, config, "num_heads"), "mlp_dim": _whole(folder, config, "ffn_dim"),
        "context_dim": _whole(folder, config, "text_dim", 4096), "channels": channels, "patch": _patch(folder, config),
        "control_channels": _control(folder, config, "in_dim", channels), "image_dim": image[0],
        "text_length": _whole(folder, config, "text_len", TEXT_LENGTH), "level_dim": _even(folder, config, "freq_dim", 256),
        "eps": _positive(folder, config, "eps", 1e-6),
    }  # fmt: skip


def config_of(transformer: WanTransformer, layout: Layout) -> dict[str, Any]:
    """What config.json says of a transformer in a layout; undoes sizes_of."""
    inputs = transformer.channels + transformer.control_channels
    if layout == "original":
        kind = "i2v" if transformer.control_channels else "ti2v" if transformer.channels == 48 else "t2v"
        return {
            "_class_name": "WanModel", "model_type": kind, "dim": transformer.width, "ffn_dim": transformer.mlp_dim,
            "num_layers": len(transformer.blocks), "num_heads": transformer.width // transformer.head_dim, "in_dim": inputs,
            "out_dim": transformer.channels, "text_dim": transformer.context_dim, "text_len": transformer.text_length,
            "freq_dim": transformer.level_dim, "patch_size": list(transformer.patch), "eps": transformer.eps,
        }  # fmt: skip
    if transformer.text_length != TEXT_LENGTH:
        raise ValueError(
            f"diffusers looks at {TEXT_LENGTH} text states, the model at {transformer.text_length}; set model.text_length"
        )
    return {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": transformer.width // transformer.head_dim,
        "attention_head_dim": transformer.head_dim, "num_layers": len(transformer.blocks), "ffn_dim": transformer.mlp_dim,
        "in_channels": inputs, "out_channels": transformer.channels, "text_dim": transformer.context_dim,
        "freq_dim": transformer.level_dim, "patch_size": list(transformer.patch), "eps": transformer.eps, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "image_dim": transformer.image_dim or None,
        "added_kv_proj_dim": transformer.width if transformer.image_dim else None, "pos_embed_seq_len": None, "rope_max_seq_len": 1024,
    }  # fmt: skip


def make_transformer(folder: Path) -> WanTransformer | WanExperts:
    """The transformer whose weights a folder holds, with its sizes and without its weights."""
    parts = find_parts(folder)
    sizes = [sizes_of(part) for part in parts.values()]
    if len(parts) == 1:
        return WanTransformer(**sizes[0])
    if sizes[0] != sizes[1]:
        key = next(key for key in sizes[0] if sizes[0][key] != sizes[1][key])
        raise PublishedError(f"the two experts of {folder} differ in {key}: {sizes[0][key]} and {sizes[1][key]}")
    told = boundary_in(folder)
    return WanExperts(
        partial(WanTransformer, **sizes[0]), BOUNDARIES.get(sizes[0]["control_channels"], 0.875) if told is None else told
    )


def boundary_in(folder: Path) -> float | None:
    """The noise level between two experts that a pipeline's folder says, if it says any."""
    told = _about(folder).get("boundary_ratio")
    if told is not None and not (is_finite(told) and 0 <= told <= 1):
        raise PublishedError(f"{folder / PIPELINE}: boundary_ratio must be a number in [0, 1], got {told!r}")
    return None if told is None else float(told)


def _about(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of itself; nothing where it is no pipeline's."""
    return read_json(folder / PIPELINE) if (folder / PIPELINE).is_file() else {}


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise PublishedError(
            f"{folder} has no {CONFIG}, which says the sizes of its weights; set init_from to a transformer's folder"
        )
    config = read_json(folder / CONFIG)
    if config.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
        raise PublishedError(
            f"{folder / CONFIG}: _class_name is {config.get('_class_name')!r}; WanModel and WanTransformer3DModel can be read"
        )
    return config


def _whole(
    folder: Path, config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = LARGEST
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not is_whole(value, least, most):
        raise PublishedError(f"{folder / CONFIG}: {key} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _even(folder: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _whole(folder, config, key, default)
    if value % 2:
        raise PublishedError(f"{folder / CONFIG}: {key} must be even, got {value}")
    return value


def _positive(folder: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not is_finite(value) or value <= 0:
        raise PublishedError(f"{folder / CONFIG}: {key} must be a number above 0, got {value!r}")
    return float(value)


def _patch(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int]:
    patch = config.get("patch_size", (1, 2, 2))
    if not isinstance(patch, list | tuple) or len(patch) != 3 or not all(is_whole(size, 1, 64) for size in patch):
        raise PublishedError(f"{folder / CONFIG}: patch_size must be three whole numbers of at least 1, got {patch!r}")
    return patch[0], patch[1], patch[2]


def _control(folder: Path, config: Mapping[str, Any], key: str, channels: int) -> int:
    inputs = _whole(folder, config, key)
    if inputs < channels:
        raise PublishedError(f"{folder / CONFIG}: {key} must be at least the {channels} channels that come out, got {inputs}")
    return inputs - channels


def _want(folder: Path, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise PublishedError(f"{folder / CONFIG}: {key} must be {value!r}, got {config[key]!r}; no other Wan can be read")


# ------------------------------------------------------------------ finding and reading


def is_published(folder: Path) -> bool:
    """Whether a folder looks like published weights, whole or not, rather than a run of this project or its export."""
    if (
        any((folder / name).is_dir() for experts in _EXPERTS.values() for name in experts.values())
        or (folder / PIPELINE).is_file()
    ):
        return True
    if any(folder.glob(f"{STEM}*")):
        return True
    try:
        return "_class_name" in read_json(folder / CONFIG)
    except PublishedError:
        return False


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders of a folder's transformers: one, whose parameters have no prefix, or two experts, called high and low."""
    if not folder.is_dir():
        raise PublishedError(f"{folder} is no folder; set init_from to a folder of published weights")
    for name in _named_in(folder):
        if not (folder / name).is_dir():
            raise PublishedError(
                f"{folder / PIPELINE} names {name}, which is missing; fetch {name}/ too, or set run or init_from to a whole pipeline"
            )
    for experts in _EXPERTS.values():
        found = {prefix: folder / name for prefix, name in experts.items() if (folder / name).is_dir()}
        if list(found) == ["high."] and experts["high."] == "transformer":
            return {"": found["high."]}
        if len(found) == 1:
            missing = next(name for prefix, name in experts.items() if prefix not in found)
            raise PublishedError(f"{folder} has one of two experts, and no {missing}/")
        if found:
            return found
    if (folder / PIPELINE).is_file():
        raise PublishedError(f"{folder} is a pipeline without transformer/; set init_from to a folder that has it")
    return {"": folder}


def _named_in(folder: Path) -> list[str]:
    """The transformers that a pipeline's folder says it has: with a boundary there are two."""
    about, experts = _about(folder), list(_EXPERTS["diffusers"].values())
    if about.get("boundary_ratio") is not None:
        return experts
    return [name for name in experts if about.get(name) not in (None, [None, None])]  # a part that is left out is a pair of nulls


class Files:
    """The safetensors files of one transformer, of which every tensor's header can be asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {}  # the open file that holds each tensor
        self.paths: dict[str, Path] = {}
        index = folder / f"{STEM}.safetensors.index.json"
        if index.is_file():
            self._open_indexed(index)
            return
        path = folder / f"{STEM}.safetensors"
        if not path.is_file():
            if any(folder.glob(f"{STEM}*.safetensors")):
                raise PublishedError(f"{folder} has neither {path.name} nor, for weights in several files, {index.name}")
            pickled = sorted(found.name for pattern in PICKLED for found in folder.glob(pattern))
            why = f", but {pickled[0]}, which is pickled and is never opened" if pickled else ""
            raise PublishedError(f"{folder} has no {path.name}{why}; set init_from to a folder of safetensors")
        for name in self._open(path):
            self.paths[name] = path

    def _open_indexed(self, index: Path) -> None:
        told = read_json(index).get("weight_map")
        if not isinstance(told, dict) or not all(isinstance(file, str) for file in told.values()):
            raise PublishedError(f"{index}: weight_map must say the file of every tensor")
        named = sorted(set(told.values()))
        for file in named:
            if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
                raise PublishedError(f"{index}: weight_map names {file!r}, which is no safetensors file beside it")
            if not (self.folder / file).is_file():
                raise PublishedError(f"{index}: weight_map names {file}, which is missing")
        for file in named:
            for name in self._open(self.folder / file):
                if told.get(name) != file:
                    raise PublishedError(
                        f"{self.folder / file} holds {name}, for which weight_map of {index.name} says {told.get(name)}"
                    )
                self.paths[name] = self.folder / file
        if lost := [name for name in told if name not in self.names]:
            raise PublishedError(f"{index}: weight_map says that {told[lost[0]]} holds {lost[0]}, and it does not")

    def _open(self, path: Path) -> Iterator[str]:
        try:
            file = safe_open(path, framework="pt")
            names = list(file.keys())
        except (OSError, SafetensorError, ValueError) as error:
            raise PublishedError(f"{path} cannot be read as safetensors: {error}") from error
        for name in names:
            self.names[name] = file
            yield name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.names[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        told = self.names[name].get_slice(name).get_dtype()
        if told not in DTYPES:
            raise PublishedError(f"{self.paths[name]}: {name} is {told}, and only {', '.join(DTYPES)} can be read")
        return DTYPES[told]

    def close(self) -> None:
        self.names.clear()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Kept:
    """Where a parameter lies."""

    files: Files
    name: str  # as published
    own: str  # in its WanTransformer
    shape: tuple[int, ...]  # in its WanTransformer
    channels: int


@dataclass
class Published:
    """Published weights under this project's names, open for reading as a checkpoint is; they stand for any group that is asked for."""

    path: Path
    layout: Layout
    _kept: dict[str, _Kept] = field(repr=False)

    @property
    def groups(self) -> list[str]:
        return ["network"]

    def shapes(self, group: str = "network") -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: kept.shape for name, kept in self._kept.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """What every tensor is kept in."""
        return {name: kept.files.dtype(kept.name) for name, kept in self._kept.items()}

    def read(self, group: str, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, as it is kept."""
        kept = self._kept[name]
        file = kept.files.names[kept.name]
        if rows is None or kept.own.endswith("offset"):  # whose rows are not those of the file
            whole = to_own(kept.own, file.get_tensor(kept.name), kept.channels)
            return whole if rows is None else whole[rows]
        return to_own(kept.own, file.get_slice(kept.name)[rows], kept.channels)

    def tensors(self, group: str = "network") -> dict[str, Tensor]:
        """All tensors."""
        return {name: self.read(group, name) for name in self._kept}

    def close(self) -> None:
        """Lets the files go."""
        self._kept.clear()


def opened(folder: Path, prefix: str = "transformer.") -> Published:
    """Opens published weights; parameters are called as in a network that has this prefix before its transformer's.

    PublishedError where anything is missing, too much, or of another shape than config.json says.
    """
    kept: dict[str, _Kept] = {}
    layouts: list[Layout] = []
    for expert, part in find_parts(folder).items():
        layout: Layout = "original" if _config(part)["_class_name"] == "WanModel" else "diffusers"
        layouts.append(layout)
        kept |= {prefix + expert + name: found for name, found in _opened_part(part, layout)}
    return Published(folder, layouts[0], kept)


def _opened_part(folder: Path, layout: Layout) -> Iterator[tuple[str, _Kept]]:
    with torch.device("meta"):
        transformer = WanTransformer(**sizes_of(folder))
    files, wanted = Files(folder), {}
    for own, parameter in transformer.named_parameters():
        wanted[published_name(own, layout)] = own, parameter
    found = {name for name in files.names if not (layout == "diffusers" and _UNUSED in name)}
    if missing := [name for name in wanted if name not in found]:
        first = next(iter(found - wanted.keys()), None)
        beside = f", but {first}, which {CONFIG} knows nothing of" if first else ""
        raise PublishedError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors that {CONFIG} tells of: no {missing[0]}{beside}"
        )
    if extra := sorted(found - wanted.keys()):
        raise PublishedError(f"{files.paths[extra[0]]} holds {extra[0]}, which {CONFIG} knows nothing of ({len(extra)} of them)")
    for name, (own, parameter) in wanted.items():
        files.dtype(name)
        shape = tuple(to_published(own, parameter, transformer).shape)
        if files.shape(name) != shape:
            raise PublishedError(f"{files.paths[name]}: {name} has shape {files.shape(name)}, and {CONFIG} tells of {shape}")
        yield own, _Kept(files, name, own, tuple(parameter.shape), transformer.channels)


def check_sizes(transformer: Transformer, folder: Path) -> None:
    """PublishedError where config.json tells of another transformer than this one, though weights of both have the same shapes."""
    experts = isinstance(transformer, WanExperts)
    own, parts = [transformer.high, transformer.low] if experts else [transformer], list(find_parts(folder).values())
    if len(parts) != len(own):
        return  # which the names of their weights show
    for one, part in zip(own, parts, strict=True):
        if not isinstance(one, WanTransformer):
            return  # and this too
        sizes = {
            "heads": one.width // one.head_dim, "patch": tuple(one.patch), "eps": one.eps, "text_length": one.text_length,
            "level_dim": one.level_dim,
        }  # fmt: skip
        for key, told in sizes_of(part).items():
            if sizes.get(key, told) != told:
                raise PublishedError(
                    f"{part / CONFIG} is of a model with {key} {told}, got {sizes[key]}; set {'model.expert' if experts else 'model'}.{key}"
                )


@torch.no_grad()
def load(transformer: Transformer, folder: Path) -> None:
    """Puts published weights into a transformer that has memory and holds all of itself; PublishedError where they do not fit."""
    found = opened(folder, prefix="")
    own, given = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}, found.shapes()
    if own != given:
        name = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))[0]
        raise PublishedError(
            f"{folder} is of another model: {name} is {given.get(name, 'missing')}, the model's {own.get(name, 'is missing')}"
        )
    check_sizes(transformer, folder)
    for name, value in transformer.state_dict().items():
        value.copy_(found.read("network", name))
    found.close()


# ------------------------------------------------------------------ writing


def export(
    transformer: WanTransformer | WanExperts,  # whose sizes are told; on the meta device where `weights` are given
    folder: Path,  # a new one
    layout: Layout = "diffusers",
    weights: Mapping[str, Tensor] | None = None,  # whole, by the transformer's names, and asked for one by one; none: its own
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None,  # by the same names, such as Published.dtypes() of prefix ""
    file_bytes: int = 5_000_000_000,  # of one file at most, unless a tensor is larger
) -> None:
    """Writes a transformer's weights as they are published; two experts get a folder each, named as in a pipeline of the layout."""
    if layout not in _COLUMN:
        raise ValueError(f"the layout must be diffusers or original, got {layout!r}; set layout")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; set out to a new folder")
    weights = transformer.state_dict() if weights is None else weights
    if isinstance(transformer, WanTransformer):
        _export(transformer, folder, layout, weights, "", dtypes, file_bytes)
        return
    for prefix, name in _EXPERTS[layout].items():
        _export(getattr(transformer, prefix[:-1]), folder / name, layout, weights, prefix, dtypes, file_bytes)


def _export(
    transformer: WanTransformer, folder: Path, layout: Layout, weights: Mapping[str, Tensor], prefix: str,
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None, file_bytes: int,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(config_of(transformer, layout), indent=2)

    def dtype_of(own: str) -> torch.dtype:
        found = dtypes.get(prefix + own) if isinstance(dtypes, Mapping) else dtypes
        return found or weights[prefix + own].dtype

    files: list[list[str]] = [[]]
    sizes = {own: value.numel() * dtype_of(own).itemsize for own, value in transformer.named_parameters()}
    for own, size in sizes.items():
        if files[-1] and sum(sizes[name] for name in files[-1]) + size > file_bytes:
            files.append([])
        files[-1].append(own)
    index: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        name = f"{STEM}.safetensors" if len(files) == 1 else f"{STEM}-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for own in names:
            values = to_published(own, weights[prefix + own].detach(), transformer)
            tensors[published_name(own, layout)] = values.to("cpu", dtype_of(own)).contiguous()
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes files that their owner alone can read
        index |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        told = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(index.items()))}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(told, indent=2))
    (folder / CONFIG).write_text(config)
