"""Autoencoders trained elsewhere, through diffusers, from a local folder: Wan, LTX, HunyuanVideo, CogVideoX, and those of images.

A folder holds config.json, which says the class, and safetensors. Nothing is downloaded, unpickled or executed, and names and shapes of
the weights are compared with what the config asks for before anything is allocated.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_video.model.autoencoders import Autoencoder
from dit_video.model.frozen import Frozen, Placement
from dit_video.model.headers import FLOATS, check_depth, expanded, headers, num_weights
from dit_video.numbers import NoNumbersError
from dit_video.shapes import Patch

KEY = "autoencoder.folder"

VERSION = 1
"""Of what this file makes of the same weights; part of every fingerprint."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------- what differs from class to class

Scaling = tuple[Any, Any]
"""(shift, scale), one number or one a channel: what a transformer sees is (latents - shift) * scale."""


@dataclass(frozen=True)
class Family:
    """What is to be known of a class of diffusers; the source is its code and that of its pipelines, release 0.42."""

    channels: str  # the key of config.json that says how many
    compression: Callable[[Any], tuple[int, int]]  # of a module: in time, and in height and width
    scaling: Callable[[Any], Scaling]  # of a module
    causal: Callable[[Any], bool]  # of a config
    step: int = 1  # a clip has 1 + k * step * compression.t frames
    images: bool = False  # frames go through one by one


def spread(module: Any) -> Scaling:
    """Channels are brought to mean 0 and deviation 1."""
    mean, std = (torch.tensor(module.config[key], dtype=torch.float32) for key in ("latents_mean", "latents_std"))
    return mean, 1 / std


def factor(module: Any) -> Scaling:
    """One factor."""
    return 0.0, module.config.scaling_factor


def ltx_scaling(module: Any) -> Scaling:
    """Mean and deviation lie among the weights."""
    return module.latents_mean, module.config.scaling_factor / module.latents_std


def image_scaling(module: Any) -> Scaling:
    """SD has a factor, SD3 and Flux a shift before it, Playground 2.5 mean and deviation, as the pipeline of SDXL takes them."""
    config = module.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, scale = spread(module)
        return mean, scale * config.scaling_factor
    return config.get("shift_factor") or 0.0, config.scaling_factor


def halvings(module: Any) -> int:
    """Rows of pixels in a latent where every block but the last halves them."""
    return 2 ** (len(module.config.block_out_channels) - 1)


FAMILIES = {
    "AutoencoderKLWan": Family(
        channels="z_dim",
        compression=lambda module: (
            2 ** sum(module.config.temperal_downsample),
            2 ** (len(module.config.dim_mult) - 1) * (module.config.get("patch_size") or 1),
        ),
        scaling=spread,
        causal=lambda config: True,
    ),
    "AutoencoderKLLTXVideo": Family(
        channels="latent_channels",
        compression=lambda module: (module.temporal_compression_ratio, module.spatial_compression_ratio),
        scaling=ltx_scaling,
        causal=lambda config: config.get("encoder_causal", True),
    ),
    # Its convolutions are causal, and its group norms average over the whole clip (16 frames, of a longer one).
    "AutoencoderKLHunyuanVideo": Family(
        channels="latent_channels",
        compression=lambda module: (module.temporal_compression_ratio, module.spatial_compression_ratio),
        scaling=factor,
        causal=lambda config: False,
    ),
    # So do these, over 8 frames. Of an even number t of latents its decoder makes 4 * t frames: the frame rule leaves those out.
    "AutoencoderKLCogVideoX": Family(
        channels="latent_channels",
        compression=lambda module: (int(module.config.temporal_compression_ratio), halvings(module)),
        scaling=factor,
        causal=lambda config: False,
        step=2,
    ),
    "AutoencoderKL": Family(
        channels="latent_channels",
        compression=lambda module: (1, halvings(module)),
        scaling=image_scaling,
        causal=lambda config: True,
        images=True,
    ),
}

OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What the attention of the first published image autoencoders, SD 1 and 2, was called."""


class Scaled(nn.Module):
    """An autoencoder of diffusers with its scaling; one clip at a time, so that no clip depends on its batch, to the last bit."""

    shift: Tensor
    scale: Tensor

    def __init__(self, module: Any, family: Family, dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in zip(("shift", "scale"), family.scaling(module), strict=True):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).clone())
        self.module, self.dtype = module.type(dtype), dtype
        self.layout = "t c h w" if family.images else "1 c t h w"
        self.frames = 1 if family.images else None  # that go through at once; none: all

    def encode(self, clip: Float[Tensor, "T H W 3"]) -> tuple[Float[Tensor, "t h w c"], Float[Tensor, "t h w c"]]:
        """Mean and logarithm of the variance of a clip's latents, scaled."""
        found = []
        for part in clip.to(self.dtype).split(self.frames or len(clip)):
            # contiguous, because convolutions choose their kernels, and so their rounding, by the strides that a clip happens to have
            latents = self.module.encode(rearrange(part, f"t h w c -> {self.layout}").contiguous()).latent_dist
            found.append([rearrange(x, f"{self.layout} -> t h w c").float() for x in (latents.mean, latents.logvar)])
        mean, logvar = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (mean - self.shift) * self.scale, logvar + 2 * self.scale.abs().log()

    def decode(self, latents: Float[Tensor, "t h w c"]) -> Float[Tensor, "T H W 3"]:
        """The clip of scaled latents."""
        config, arguments = self.module.config, {}
        if config.get("timestep_conditioning"):  # LTX from 0.9.1 on; its pipelines say time 0 and add no noise unless asked to
            arguments["temb"] = torch.zeros(1, device=latents.device, dtype=self.dtype)
        found = []
        with same_noise(latents.device) if any(config.get("decoder_inject_noise") or ()) else nullcontext():
            for part in (latents.float() / self.scale + self.shift).to(self.dtype).split(self.frames or len(latents)):
                pixels = self.module.decode(rearrange(part, f"t h w c -> {self.layout}").contiguous(), **arguments).sample
                found.append(rearrange(pixels, f"{self.layout} -> t h w c").float())
        return torch.cat(found)


@contextmanager
def same_noise(device: torch.device) -> Iterator[None]:
    """Torch's own randomness is the same inside whenever it is entered, and goes on outside as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


# --------------------------------------------------------------------------- the autoencoder


class DiffusersAutoencoder(Autoencoder):
    """A published autoencoder, loaded at its first use: what is said of it here is enough to plan, and to train from latents on disk.

    Measured on small random models in float32, beginnings of clips by themselves beside whole clips, in deviations of the values: Wan and
    images are causal both ways (2e-6). LTX is in encoding (2e-6), and decodes looking ahead (3 to 4). HunyuanVideo is neither (0.4 to 2 in
    encoding, 2 to 4 in decoding). CogVideoX is from 9 frames on (0), where the first frame by itself has other latents (0.5 to 0.7).

    CogVideoX 1.5 I2V divides its picture's latents by the factor (`invert_scale_latents`); here they are multiplied, as all others are.
    """

    def __init__(
        self,
        compression: Sequence[int],  # frames, rows and columns of pixels in a latent
        channels: int,  # of a latent
        folder: str | None = None,  # of config.json and weights, or of a whole pipeline, whose vae/ it then is
        causal: bool = True,  # see Autoencoder
        dtype: str = "bfloat16",  # float32 or float16; latents are float32 whatever it is
        placement: Placement = "device",  # between uses; or offload: in the host's memory, or shard: cut over the ranks
        tiling: bool = False,  # large frames in overlapping tiles, as the library cuts them: less memory, and slightly other latents
    ) -> None:
        if len(compression) != 3 or min(compression) < 1:
            raise ValueError(
                f"compression must be frames, rows and columns, got {list(compression)}; set autoencoder.compression"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; set autoencoder.dtype")
        self.compression, self.channels, self.causal = Patch(*compression), channels, causal
        self.folder, self.dtype, self.tiling = folder, dtype, tiling
        self.scaled = Frozen(self.load, placement)

    @cached_property
    def files(self) -> "Files":
        """The folder's config and weights, found and not yet read."""
        if self.folder is None:
            raise ValueError("the autoencoder's weights are needed here, and folder is null; set autoencoder.folder")
        return find_files(expanded(self.folder))

    @property
    def family(self) -> Family:
        return FAMILIES[self.files.class_name]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of config.json, the weights' bytes, precision, tiling and VERSION; where the folder lies does not matter."""
        config = {key: value for key, value in self.files.config.items() if not key.startswith("_") or key == "_class_name"}
        told = json.dumps([VERSION, self.dtype, self.tiling, config], sort_keys=True)
        digest = hashlib.sha256(told.encode())
        for path in self.files.weights:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.files.class_name} {self.fingerprint[:8]}"

    @property
    def can_decode(self) -> bool:
        return self.folder is not None

    @property
    def is_cut(self) -> bool:
        return self.can_decode and self.scaled.is_cut

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        return self.scaled.device_bytes(self._num_bytes, ranks, in_use) if self.can_decode else 0

    def _num_bytes(self) -> int:
        return num_weights(self.files.weights, KEY) * DTYPES[self.dtype].itemsize

    def check(self) -> None:
        self.compare(self.blank())

    def blank(self) -> Any:
        """The module that the folder's config describes, on the meta device."""
        check_depth(self.files.folder / "config.json", self.files.config, len(headers(self.files.weights, KEY)), KEY)
        return build(self.files)

    def encode(self, video: Float[Tensor, "b T H W 3"]) -> Float[Tensor, "b t h w c"]:
        return self.encode_distribution(video)[0]

    def encode_distribution(
        self, video: Float[Tensor, "b T H W 3"]
    ) -> tuple[Float[Tensor, "b t h w c"], Float[Tensor, "b t h w c"] | None]:
        self.check_clip(*video.shape[1:4])
        with self.scaled.on(video.device) as scaled:
            mean, logvar = (torch.stack(clips) for clips in zip(*map(scaled.encode, video), strict=True))
        self.check_finite("latents", mean)
        return mean, logvar

    def decode(self, latents: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b T H W 3"]:
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels and the autoencoder {self.channels}; set autoencoder")
        t, h, w = (int(size) for size in latents.shape[1:4])
        self.check_clip(1 + (t - 1) * self.compression.t, h * self.compression.h, w * self.compression.w)
        with self.scaled.on(latents.device) as scaled:
            video = torch.stack([scaled.decode(clip) for clip in latents])
        self.check_finite("pixels", video)
        return video

    def check_clip(self, num_frames: int, height: int, width: int) -> None:
        """ValueError where a clip has not 1 + k * step frames or a size that is no multiple; it names the nearest that do."""
        step, name = self.compression.t * self.family.step, self.files.class_name
        if (num_frames - 1) % step:
            below = 1 + (num_frames - 1) // step * step
            raise ValueError(
                f"a clip of {num_frames} frames does not fit {name}, which takes 1 + k * {step}; "
                f"the nearest are {below} and {below + step}: set num_frames"
            )
        for key, size, part in (("height", height, self.compression.h), ("width", width, self.compression.w)):
            if size % part or not size:
                nearest = " and ".join(str(n) for n in (size // part * part, (size // part + 1) * part) if n)
                raise ValueError(
                    f"{key} {size} does not fit {name}, which takes multiples of {part}; nearest: {nearest}: set {key}"
                )

    def check_finite(self, what: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise NoNumbersError(f"{self.name} gave {what} that are not finite in {self.dtype}; set autoencoder.dtype=float32")

    def load(self) -> Scaled:
        """The module with its weights; ValueError where folder, weights and what was said of them do not agree."""
        files, family = self.files, self.family
        module = self.blank()
        self.compare(module)
        fill(module, files)
        if self.tiling:
            module.enable_tiling()
        try:
            scaled = Scaled(module, family, DTYPES[self.dtype])
        except Exception as error:
            blame(files.folder / "config.json", f"has no scaling that can be read: {error}", error)
        for name, value in scaled.named_buffers(recurse=False):
            if value.shape not in ((), (self.channels,)) or not value.isfinite().all() or (name == "scale" and not value.all()):
                blame(files.folder, f"has no scaling for {self.channels} channels: {name} is {value.tolist()}")
        return scaled

    def compare(self, module: Any) -> None:
        """ValueError where the module is another than the options say; it names the key."""
        family, place = self.family, self.files.folder
        try:
            time, space = family.compression(module)
            found = {
                "compression": [time, space, space],
                "channels": module.config[family.channels],
                "causal": bool(family.causal(module.config)),
            }
        except Exception as error:
            blame(place / "config.json", f"does not describe an {self.files.class_name}: {error}", error)
        for key, told in {"compression": list(self.compression), "channels": self.channels, "causal": self.causal}.items():
            if told != found[key]:
                raise ValueError(
                    f"{place} holds an {self.files.class_name} of {key} {found[key]}, got {told}; set autoencoder.{key}"
                )


# --------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Files:
    """An autoencoder's folder: its config, and its weights in the order of their names."""

    folder: Path
    config: dict[str, Any]
    weights: list[Path]

    @property
    def class_name(self) -> str:
        return self.config["_class_name"]


def blame(path: Path, what: str, error: Exception | None = None) -> NoReturn:
    """ValueError, in one line, of what is wrong with a path."""
    raise ValueError(f"{path} {' '.join(what.split())}; set {KEY}") from error


def find_files(folder: Path) -> Files:
    """The config and weights of an autoencoder's folder, or of a pipeline's; ValueError where they are not there or of no known class."""
    if not folder.is_dir():
        blame(folder, "is not a folder")
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in list(FAMILIES):  # a list, because what is looked for may be anything
        blame(folder / "config.json", f"is of class {config.get('_class_name')!r}, known are {', '.join(FAMILIES)}")

    names = ["diffusion_pytorch_model.safetensors"]
    index = folder / f"{names[0]}.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(x, str) and Path(x).name == x and x.endswith(".safetensors") for x in names):
            blame(index, "does not name safetensors that lie beside it")
        names = sorted(set(names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        pickled = sorted(path.name for ending in ("bin", "ckpt", "pt", "pth") for path in folder.glob(f"*.{ending}"))
        hint = ""
        if others:
            hint = f"; if {others[0]} is what is meant, give it that name"
        elif pickled:
            hint = f"; {pickled[0]} is pickled, and such files are never read: save it as safetensors"
        blame(folder, f"lacks {missing[0]}{hint}")
    return Files(folder, config, [folder / name for name in names])


def read_json(path: Path) -> dict[str, Any]:
    """A file's mapping."""
    if not path.is_file():
        blame(path, "is not there")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        blame(path, f"is not JSON: {error}", error)
    if not isinstance(found, dict):
        blame(path, "is not a mapping")
    return found


def build(files: Files) -> Any:
    """The module that config.json describes, on the meta device."""
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(f"{files.class_name} needs diffusers ({error}): pip install 'dit-video[latents]'") from error
    try:
        with torch.device("meta"):
            return getattr(library, files.class_name).from_config(files.config)
    except Exception as error:  # whatever the values of somebody's file lead to
        blame(files.folder / "config.json", f"does not describe an {files.class_name}: {error}", error)


def fill(module: Any, files: Files) -> None:
    """Gives a module on the meta device its weights, in float32, once every name and shape has been compared."""
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    names: dict[str, str] = {}  # in the module, by that in the file
    for old, (path, shape, kind) in headers(files.weights, KEY).items():
        name = old if old in wanted else renamed(old)
        if name not in wanted:
            blame(path, f"holds {old}, which {files.class_name} of its config.json has not")
        if shape != wanted[name]:
            blame(path, f"holds {old} of shape {shape}, and its config.json asks for {wanted[name]}")
        if kind not in FLOATS:
            blame(path, f"holds {old} as {kind}: quantised weights are not read")
        names[old] = name
    lacking = sorted(set(wanted) - set(names.values()))
    if lacking:
        blame(files.folder, f"lacks weights that its config.json asks for: {lacking[0]} and {len(lacking) - 1} more")
    # copies, because what safetensors gives is the file itself in memory, and a file may be overwritten
    weights = {names[old]: x.to(torch.float32, copy=True) for path in files.weights for old, x in load_file(path).items()}
    module.load_state_dict(weights, assign=True)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def renamed(name: str) -> str:
    """What a weight is called today."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
