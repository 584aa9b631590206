"""Published autoencoders: as diffusers' own pipelines use them, one clip at a time, and nothing of a folder believed unread."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_video.compose import conf_folder
from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.pretrained_autoencoder import FAMILIES, DiffusersAutoencoder, build, find_files
from dit_video.shapes import Patch

diffusers = pytest.importorskip("diffusers")

# The keys of each published config.json, narrower and shallower.
SMALL: dict[str, dict[str, Any]] = {
    "wan": {"_class_name": "AutoencoderKLWan", "base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "z_dim": 16,
            "attn_scales": [], "dropout": 0.0, "temperal_downsample": [False, True, True],
            "latents_mean": [0.1 * i - 0.7 for i in range(16)], "latents_std": [0.5 + 0.1 * i for i in range(16)]},
    "wan22": {"_class_name": "AutoencoderKLWan", "base_dim": 4, "decoder_base_dim": 6, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
              "z_dim": 48, "attn_scales": [], "dropout": 0.0, "temperal_downsample": [False, True, True], "is_residual": True,
              "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
              "latents_mean": [0.05 * i - 1 for i in range(48)], "latents_std": [0.5 + 0.05 * i for i in range(48)]},
    "ltx": {"_class_name": "AutoencoderKLLTXVideo", "block_out_channels": [8, 16, 16, 16], "decoder_causal": False,
            "decoder_block_out_channels": [8, 16, 16, 16], "decoder_layers_per_block": [1, 1, 1, 1, 1], "encoder_causal": True,
            "in_channels": 3, "latent_channels": 128, "layers_per_block": [1, 1, 1, 1, 1], "out_channels": 3, "patch_size": 4,
            "patch_size_t": 1, "resnet_norm_eps": 1e-6, "scaling_factor": 1.5, "spatio_temporal_scaling": [True, True, True, False]},
    "ltx091": {"_class_name": "AutoencoderKLLTXVideo", "block_out_channels": [8, 16, 16, 16], "latent_channels": 128,
               "decoder_block_out_channels": [8, 16, 32], "layers_per_block": [1, 1, 1, 1, 1], "decoder_layers_per_block": [1, 1, 1, 1],
               "spatio_temporal_scaling": [True, True, True, False], "decoder_spatio_temporal_scaling": [True, True, True],
               "decoder_inject_noise": [False, True, True, True], "upsample_residual": [True, True, True],
               "upsample_factor": [2, 2, 2], "timestep_conditioning": True, "scaling_factor": 1.0},
    "ltx095": {"_class_name": "AutoencoderKLLTXVideo", "block_out_channels": [8, 16, 16, 32, 32], "latent_channels": 128,
               "down_block_types": ["LTXVideo095DownBlock3D"] * 4, "decoder_block_out_channels": [8, 16, 32],
               "layers_per_block": [1, 1, 1, 1, 1], "decoder_layers_per_block": [1, 1, 1, 1],
               "spatio_temporal_scaling": [True, True, True, True], "decoder_spatio_temporal_scaling": [True, True, True],
               "decoder_inject_noise": [False, False, False, False], "upsample_residual": [True, True, True],
               "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"], "upsample_factor": [2, 2, 2],
               "timestep_conditioning": True, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    "hunyuan": {"_class_name": "AutoencoderKLHunyuanVideo", "act_fn": "silu", "block_out_channels": [8, 8, 8, 8], "in_channels": 3,
                "latent_channels": 16, "layers_per_block": 1, "mid_block_add_attention": True, "norm_num_groups": 4,
                "out_channels": 3, "scaling_factor": 0.476986, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    "cogvideox": {"_class_name": "AutoencoderKLCogVideoX", "act_fn": "silu", "block_out_channels": [8, 8, 8, 8], "latent_channels": 16,
                  "layers_per_block": 1, "norm_num_groups": 4, "sample_height": 480, "sample_width": 720, "scaling_factor": 0.7,
                  "shift_factor": None, "latents_mean": None, "latents_std": None, "temporal_compression_ratio": 4},
    "flux": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 4,
             "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": False,
             "use_quant_conv": False},
    "sdxl": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
             "sample_size": 1024, "scaling_factor": 0.13025},
    "playground": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 4,
                   "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
                   "scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, 3.2, -0.4], "latents_std": [8.4, 5.9, 5.3, 5.1]},
}  # fmt: skip

OPTION = {"ltx091": "ltx", "ltx095": "ltx", "flux": "image", "sdxl": "image", "playground": "image"}
"""The YAML option of a small model; of the others it has their own name."""

CAUSAL = {name: not name.startswith(("hunyuan", "cogvideox")) for name in SMALL}


def said(name: str) -> dict[str, Any]:
    """What the YAML option says of a model."""
    import yaml

    options = yaml.safe_load((conf_folder() / "autoencoder" / f"{OPTION.get(name, name)}.yaml").read_text())
    assert options.pop("_target_").endswith("DiffusersAutoencoder")
    return options | ({"channels": 4} if name in ("sdxl", "playground") else {})


def adapter(name: str, folder: Path | None, **changes: Any) -> DiffusersAutoencoder:
    """The adapter of a small model as its YAML configures it, in float32."""
    return DiffusersAutoencoder(**said(name) | {"folder": None if folder is None else str(folder), "dtype": "float32"} | changes)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Makes a small random model of diffusers and its folder, once each; nothing in it is zero or one as it begins."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            config = SMALL[name]
            module = getattr(diffusers, config["_class_name"]).from_config(config).eval().requires_grad_(False)
            for parameter in module.parameters():
                if parameter.dim() < 2 or parameter.numel() == len(parameter):
                    parameter += 0.1 * torch.randn_like(parameter)
            if "ltx" in name:
                module.latents_mean.normal_()
                module.latents_std.uniform_(0.5, 2)
            folder = tmp_path_factory.mktemp(name)
            module.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.35.0"}))
            made[name] = module, folder
        return made[name]

    return make


def clips(name: str, steps: int, batch: int = 1) -> Tensor:
    """Random clips whose height, 3 latents, and width, 5, are no powers of two."""
    compression, step = said(name)["compression"], FAMILIES[SMALL[name]["_class_name"]].step
    frames = 1 + steps * step * compression[0]
    return torch.rand(batch, frames, 3 * compression[1], 5 * compression[2], 3) * 2 - 1


# --------------------------------------------------------------------------- what the pipelines of diffusers 0.42 do


def normalised(name: str, module: Any, latents: Tensor) -> Tensor:
    """pipeline_wan_i2v, _ltx_image2video, _hunyuan_video_image2video, _cogvideox_image2video, _flux_img2img, _..._xl_img2img."""
    config, column = module.config, (1, -1, *[1] * (latents.dim() - 2))
    if "wan" in name:
        return (latents - torch.tensor(config.latents_mean).view(column)) * (1 / torch.tensor(config.latents_std)).view(column)
    if "ltx" in name:
        return (latents - module.latents_mean.view(column)) * config.scaling_factor / module.latents_std.view(column)
    if name == "playground":
        mean, std = (torch.tensor(values).view(column) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.shift_factor if name == "flux" else 0.0)) * config.scaling_factor


def denormalised(name: str, module: Any, latents: Tensor) -> Tensor:
    """pipeline_wan, _ltx, _hunyuan_video, _cogvideox, _flux, _stable_diffusion_xl."""
    config, column = module.config, (1, -1, *[1] * (latents.dim() - 2))
    if "wan" in name:
        return latents / (1 / torch.tensor(config.latents_std)).view(column) + torch.tensor(config.latents_mean).view(column)
    if "ltx" in name:
        return latents * module.latents_std.view(column) / config.scaling_factor + module.latents_mean.view(column)
    if name == "playground":
        mean, std = (torch.tensor(values).view(column) for values in (config.latents_mean, config.latents_std))
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (config.shift_factor if name == "flux" else 0.0)


def close(ours: Tensor, theirs: Tensor, within: float = 1e-5) -> bool:
    """Whether nothing differs by more than a part of the values' spread."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= within * theirs.std())


def parts(name: str, clip: Tensor) -> list[Tensor]:
    """What diffusers takes of a clip `1 t h w c`: all of it, `1 c t h w`, or its frames one by one, `1 c h w`."""
    if SMALL[name]["_class_name"] == "AutoencoderKL":
        return [rearrange(frame, "1 h w c -> 1 c h w").contiguous() for frame in clip.unbind(1)]
    return [rearrange(clip, "1 t h w c -> 1 c t h w").contiguous()]


def whole(found: list[Tensor]) -> Tensor:
    """A clip `1 t h w c` of what diffusers gives for its parts."""
    return torch.cat([rearrange(x if x.dim() == 5 else x[:, :, None], "1 c t h w -> 1 t h w c") for x in found], dim=1)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_latents_and_clips_are_those_of_the_library_s_pipelines(
    name: str, steps: int, models: Callable, record_property: Callable[[str, object], None]
) -> None:
    module, folder = models(name)
    video, ours = clips(name, steps), adapter(name, folder)
    distributions = [module.encode(part).latent_dist for part in parts(name, video)]
    theirs = [normalised(name, module, distribution.mode()) for distribution in distributions]
    latents = ours.encode(video)
    assert latents.shape == (1, 1 + (video.shape[1] - 1) // ours.compression.t, 3, 5, ours.channels)
    record_property("latents", f"{float((latents - whole(theirs)).abs().max() / latents.std()):.1e}")
    assert latents.dtype == torch.float32 and close(latents, whole(theirs))

    mean, logvar = ours.encode_distribution(video)
    away = [normalised(name, module, found.mean + found.std) for found in distributions]  # by one deviation
    assert torch.equal(mean, latents) and logvar is not None
    assert close(logvar, 2 * (whole(away) - whole(theirs)).abs().log(), 1e-4)

    times = [torch.zeros(1)] if SMALL[name].get("timestep_conditioning") else []  # decode_timestep of the LTX pipelines
    torch.manual_seed(0)  # LTX 0.9.1 draws noise inside its decoder
    decoded = [module.decode(denormalised(name, module, part), *times).sample for part in theirs]
    made = ours.decode(latents)
    record_property("clip", f"{float((made - whole(decoded)).abs().max() / made.std()):.1e}")
    assert made.shape == video.shape and close(made, whole(decoded), 3e-5)  # rounding of a deep decoder, other on each machine


@pytest.mark.parametrize("name", SMALL)
def test_a_clip_does_not_depend_on_its_batch_to_the_last_bit(name: str, models: Callable) -> None:
    ours, video = adapter(name, models(name)[1], dtype="bfloat16"), clips(name, 1, batch=3)
    latents = ours.encode(video)
    assert latents.dtype == torch.float32
    decoded = ours.decode(latents)
    assert decoded.dtype == torch.float32
    for row in range(3):
        assert torch.equal(ours.encode(video[row : row + 1])[0], latents[row])
        assert torch.equal(ours.decode(latents[row : row + 1])[0], decoded[row])
    strided = rearrange(rearrange(video, "b t h w c -> c w b h t").contiguous(), "c w b h t -> b t h w c")
    assert torch.equal(ours.encode(strided), latents)


@pytest.mark.parametrize("name", SMALL)
def test_causality_is_as_the_option_says(name: str, models: Callable) -> None:
    ours, video = adapter(name, models(name)[1]), clips(name, 4)
    assert ours.causal is CAUSAL[name]
    latents, step = ours.encode(video), ours.compression.t * ours.family.step
    same = [
        close(ours.encode(video[:, : 1 + k * step]), latents[:, : 1 + k * ours.family.step]) for k in range(4)
    ]  # the first frame, and longer beginnings
    assert all(same) if ours.causal else not same[0]
    if name == "cogvideox":
        assert all(same[1:])  # from 9 frames on it is causal


@pytest.mark.parametrize("name", ["wan", "wan22", "flux", "ltx"])
def test_which_decode_causally(name: str, models: Callable) -> None:
    ours = adapter(name, models(name)[1])
    latents = torch.randn(1, 3, 2, 3, ours.channels)
    video = ours.decode(latents)
    assert close(ours.decode(latents[:, :1]), video[:, :1]) is (name != "ltx")


def test_the_noise_inside_a_decoder_is_always_the_same_and_takes_none_of_others(models: Callable) -> None:
    ours = adapter("ltx091", models("ltx091")[1])
    latents = torch.randn(2, 1, 2, 2, ours.channels)
    torch.manual_seed(1)
    first, after = ours.decode(latents), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert torch.equal(ours.decode(latents), first)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_tiling_is_the_library_s(name: str, models: Callable, tmp_path: Path) -> None:
    module, folder = models(name)
    if name == "flux":  # so that its tiles are small
        folder = shutil.copytree(folder, tmp_path / "tiled")
        change_config(folder, sample_size=64)
        module = diffusers.AutoencoderKL.from_pretrained(folder)
    tiled, untiled = (adapter(name, folder, tiling=tiling) for tiling in (True, False))
    video = torch.rand(1, 1, 264, 40, 3) * 2 - 1
    module = copy.deepcopy(module)
    module.enable_tiling()
    theirs = [normalised(name, module, module.encode(part).latent_dist.mode()) for part in parts(name, video)]
    latents = tiled.encode(video)
    assert close(latents, whole(theirs)) and not close(latents, untiled.encode(video))
    assert tiled.fingerprint != untiled.fingerprint
    decoded = [module.decode(denormalised(name, module, part)).sample for part in theirs]
    assert tiled.decode(latents).shape == video.shape and close(tiled.decode(latents), whole(decoded))


# --------------------------------------------------------------------------- as part of a network


def test_precision_changes_latents_a_little_and_the_fingerprint(models: Callable) -> None:
    folder, video = models("wan")[1], clips("wan", 1)
    exact = adapter("wan", folder)
    for dtype, within in (("bfloat16", 0.1), ("float16", 0.02)):
        rough = adapter("wan", folder, dtype=dtype)
        assert close(rough.encode(video), exact.encode(video), within) and not close(rough.encode(video), exact.encode(video))
        assert rough.fingerprint != exact.fingerprint


def test_autocast_and_gradients_of_the_caller_change_nothing(models: Callable) -> None:
    ours, video = adapter("wan", models("wan")[1]), clips("wan", 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours.encode(video)
    assert torch.equal(inside, ours.encode(video)) and not inside.requires_grad


def test_nothing_is_touched_before_it_is_needed() -> None:
    ours = adapter("wan", Path("/no/such/folder"))
    assert ours.compression == Patch(4, 8, 8) and ours.channels == 16 and isinstance(ours, Autoencoder)
    copy.deepcopy(ours)
    with pytest.raises(ValueError, match="/no/such/folder is not a folder; set autoencoder.folder"):
        ours.encode(clips("wan", 1))
    nothing = adapter("wan", None)
    for use in (
        lambda: nothing.encode(clips("wan", 1)),
        lambda: nothing.decode(torch.zeros(1, 1, 1, 1, 16)),
        lambda: nothing.fingerprint,
    ):
        with pytest.raises(ValueError, match="folder is null; set autoencoder.folder"):
            use()


def test_planning_does_not_import_the_library() -> None:
    options = said("wan") | {"folder": "/no/such/folder"}
    code = f"import sys; from dit_video.model.pretrained_autoencoder import DiffusersAutoencoder as A; A(**{options}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules and "diffusers" not in modules


def test_copies_share_the_module_and_offload_gives_it_back(models: Callable) -> None:
    ours, video = adapter("wan", models("wan")[1], placement="offload"), clips("wan", 0)
    twin = copy.deepcopy(ours)
    latents = ours.encode(video)
    assert torch.equal(twin.encode(video), latents)
    assert twin.scaled is ours.scaled and twin.scaled._module is ours.scaled._module is not None
    moves: list[str] = []
    move = ours.scaled._module.to
    ours.scaled._module.to = lambda device: (moves.append(str(device)), move(device))[1]  # type: ignore[method-assign, func-returns-value]
    ours.encode(video)
    assert moves == ["cpu", "cpu"]  # there and back
    adapter("wan", models("wan")[1]).encode(video)


def test_pixels_are_an_autoencoder_too() -> None:
    video = torch.rand(1, 2, 3, 4, 3)
    assert Pixels().causal and Pixels().encode_distribution(video) == (video, None) and Pixels().name == "Pixels pixels"


# --------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("wan", (6, 24, 40), r"6 frames .* 1 \+ k \* 4; the nearest are 5 and 9: set num_frames"),
        ("wan", (5, 36, 40), "height 36 .* multiples of 8; nearest: 32 and 40: set height"),
        ("wan", (5, 24, 4), "width 4 .* multiples of 8; nearest: 8: set width"),
        ("wan22", (5, 40, 48), "height 40 .* multiples of 16; nearest: 32 and 48: set height"),
        ("ltx", (13, 96, 96), r"13 frames .* 1 \+ k \* 8; the nearest are 9 and 17"),
        ("hunyuan", (4, 24, 24), "the nearest are 1 and 5"),
        ("cogvideox", (5, 24, 24), r"1 \+ k \* 8; the nearest are 1 and 9"),
        ("flux", (3, 24, 20), "width 20 .* nearest: 16 and 24"),
    ],
)
def test_clips_that_do_not_fit_are_refused_before_anything_is_loaded(
    name: str, shape: tuple[int, int, int], message: str, models: Callable
) -> None:
    ours = adapter(name, models(name)[1])
    with pytest.raises(ValueError, match=message):
        ours.encode(torch.zeros(1, *shape, 3))
    assert ours.scaled._module is None


def test_latents_that_do_not_fit_are_refused(models: Callable) -> None:
    with pytest.raises(ValueError, match="latents have 3 channels and the autoencoder 16; set autoencoder"):
        adapter("wan", models("wan")[1]).decode(torch.zeros(1, 1, 2, 2, 3))
    with pytest.raises(ValueError, match="a clip of 5 frames does not fit AutoencoderKLCogVideoX"):  # of 2 it would make 8
        adapter("cogvideox", models("cogvideox")[1]).decode(torch.zeros(1, 2, 2, 2, 16))


def test_options_that_cannot_be_are_refused_at_once() -> None:
    for changes in ({"dtype": "float64"}, {"compression": [4, 8]}, {"compression": [0, 8, 8]}):
        with pytest.raises(ValueError, match=f"set .*autoencoder.{next(iter(changes))}"):
            adapter("wan", None, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "holds an AutoencoderKLWan of channels 16, got 48; set autoencoder.channels"),
        ({"compression": [4, 16, 16]}, r"of compression \[4, 8, 8\], got \[4, 16, 16\]; set autoencoder.compression"),
        ({"causal": False}, "of causal True, got False; set autoencoder.causal"),
    ],
)
def test_options_other_than_the_folder_s_are_refused(changes: dict[str, Any], message: str, models: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        adapter("wan", models("wan")[1], **changes).encode(torch.zeros(1, 1, 16, 16, 3))


@pytest.mark.parametrize("option", ["wan", "wan22", "ltx", "hunyuan", "cogvideox", "image"])
def test_options_say_what_the_published_sizes_are(option: str, tmp_path: Path) -> None:
    """At the sizes of the published configs, which are the defaults of diffusers' classes; nothing is allocated."""
    small = SMALL["flux" if option == "image" else option]
    sizes = {"base_dim", "decoder_base_dim", "num_res_blocks", "block_out_channels", "layers_per_block", "norm_num_groups"}
    config = {key: value for key, value in small.items() if not key.startswith("decoder_") and key not in sizes}
    config |= {"wan22": {"base_dim": 160, "decoder_base_dim": 256}, "image": {"block_out_channels": [128, 256, 512, 512]}}.get(
        option, {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    module = build(find_files(tmp_path))
    assert sum(parameter.numel() for parameter in module.parameters()) > 5e7
    adapter(option, tmp_path).compare(module)


# --------------------------------------------------------------------------- folders


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(models: Callable, tmp_path: Path) -> Path:
    """A Wan folder of the test's own."""
    return shutil.copytree(models("wan")[1], tmp_path / "wan")


WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(folder: Path, name: str = "wan") -> str:
    """The one line that a folder is refused with."""
    with pytest.raises(ValueError) as caught:
        adapter(name, folder).encode(torch.zeros(1, 1, 16, 16, 3))
    message = str(caught.value)
    assert "\n" not in message and message.endswith("; set autoencoder.folder") and str(folder) in message, message
    return message


def test_a_fingerprint_is_of_contents_alone(folder: Path, tmp_path: Path) -> None:
    ours = adapter("wan", folder)
    before = ours.fingerprint
    assert len(before) == 16 and ours.name == f"AutoencoderKLWan {before[:8]}"
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    assert adapter("wan", tmp_path / "pipeline").fingerprint == before
    assert adapter("wan", folder, placement="offload").fingerprint == before
    change_config(folder, _diffusers_version="9.9", _name_or_path="elsewhere")
    (folder / "README.md").write_text("about")
    assert adapter("wan", folder).fingerprint == before
    assert ours.scaled._module is None  # nothing was loaded for it

    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    changed = adapter("wan", folder).fingerprint
    assert changed != before and ours.fingerprint == before  # computed once
    change_config(folder, latents_std=[1.0] * 16)
    assert adapter("wan", folder).fingerprint not in (before, changed)


def test_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    adapter("wan", Path("~") / folder.name).check()


def test_a_pipeline_s_folder_will_do(models: Callable, tmp_path: Path) -> None:
    shutil.copytree(models("wan")[1], tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    video = clips("wan", 1)
    assert torch.equal(adapter("wan", tmp_path).encode(video), adapter("wan", models("wan")[1]).encode(video))


def test_weights_in_shards_and_with_the_names_of_sd(models: Callable, tmp_path: Path) -> None:
    module, folder = models("sdxl")
    module.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    shards = sorted((tmp_path / "shards").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    video = clips("sdxl", 1)
    expected = adapter("sdxl", folder).encode(video)
    sharded = adapter("sdxl", tmp_path / "shards")
    assert torch.equal(sharded.encode(video), expected)
    before = sharded.fingerprint
    last = bytearray(shards[-1].read_bytes())
    last[-1] ^= 1
    shards[-1].write_bytes(last)
    assert adapter("sdxl", tmp_path / "shards").fingerprint != before
    shards[-1].unlink()
    assert f"lacks {shards[-1].name}" in refused(tmp_path / "shards", "sdxl")

    old = shutil.copytree(folder, tmp_path / "old")
    today = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    weights = load_file(old / WEIGHTS)
    for new, name in today:
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".proj_attn." in key for key in weights)
    save_file(weights, old / WEIGHTS)
    assert torch.equal(adapter("sdxl", old).encode(video), expected)


def test_configs_that_cannot_be_used(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\ud800", "is not JSON"),
        ("[1]", "is not a mapping"),
        ("{}", "is of class None, known are AutoencoderKLWan, AutoencoderKLLTXVideo"),
        ('{"_class_name": "AutoencoderKLMochi"}', "is of class 'AutoencoderKLMochi'"),
        ('{"_class_name": ["os"]}', r"is of class ['os']"),
    ):
        (folder / "config.json").write_bytes(text.encode(errors="surrogatepass"))
        assert message in refused(folder)
    for changes, message in (
        ({"dim_mult": "abc"}, "does not describe an AutoencoderKLWan"),
        ({"base_dim": -4}, "does not describe an AutoencoderKLWan"),
        ({"latents_std": [1.0] * 15}, "has no scaling for 16 channels: scale"),
        ({"latents_std": [0.0] * 16}, "has no scaling for 16 channels: scale"),
        ({"latents_mean": [float("nan")] * 16}, "has no scaling for 16 channels: shift"),
        ({"latents_mean": "none"}, "has no scaling that can be read"),
        ({"num_res_blocks": 2}, "which AutoencoderKLWan of its config.json has not"),
        ({"base_dim": 8}, "of shape ["),
        ({"num_res_blocks": 10**6}, "asks for num_res_blocks 1000000, and its weights are"),
    ):
        (folder / "config.json").write_text(config)
        change_config(folder, **changes)
        assert message in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json is not there" in refused(folder)


def test_weights_that_cannot_be_used(folder: Path) -> None:
    path = folder / WEIGHTS
    weights, whole = load_file(path), path.read_bytes()
    first = next(iter(weights))
    for part in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:4], b"", b"\xff" * 64, whole + b"more"):
        path.write_bytes(part)
        assert f"{WEIGHTS} is damaged or cut off" in refused(folder)
        for use in (adapter("wan", folder).check, adapter("wan", folder).device_bytes):  # plans ask for these
            with pytest.raises(ValueError, match="is damaged or cut off.*; set autoencoder.folder"):
                use()
    save_file({key: value for key, value in weights.items() if key != first}, path)
    assert f"lacks weights that its config.json asks for: {first} and 0 more" in refused(folder)
    save_file(weights | {"other": torch.zeros(1)}, path)
    assert "holds other, which AutoencoderKLWan of its config.json has not" in refused(folder)
    save_file(weights | {first: torch.zeros(1, 2)}, path)
    assert f"holds {first} of shape [1, 2]" in refused(folder)
    for index in (
        {},
        {"weight_map": {"a": "../other.safetensors"}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "a.bin"}},
        {"weight_map": []},
    ):
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        assert "does not name safetensors that lie beside it" in refused(folder)


class Marks:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_or_executed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Marks(marker))
    whole = (folder / WEIGHTS).read_bytes()
    for name in ("diffusion_pytorch_model.bin", "model.ckpt", "vae.pt"):
        (folder / name).write_bytes(hostile)
    (folder / "autoencoder.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    change_config(folder, auto_map={"AutoModel": "autoencoder.Autoencoder"}, _name_or_path=str(folder))
    (folder / WEIGHTS).unlink()
    assert f"lacks {WEIGHTS}; diffusion_pytorch_model.bin is pickled, and such files are never read" in refused(folder)
    (folder / WEIGHTS).write_bytes(hostile)  # a pickle by another name
    assert "is damaged or cut off" in refused(folder)
    (folder / WEIGHTS).write_bytes(whole)
    adapter("wan", folder).encode(torch.zeros(1, 1, 16, 16, 3))  # what lies beside it does not matter
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()  # it would have


def test_weights_that_overflow_are_not_passed_on(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"] + 1e6
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match="AutoencoderKLWan .* not finite in float16; set autoencoder.dtype=float32"):
        adapter("wan", folder, dtype="float16").encode(torch.zeros(1, 1, 16, 16, 3))


def test_without_diffusers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'dit-video\[latents\]'"):
        adapter("wan", folder).encode(torch.zeros(1, 1, 16, 16, 3))


def test_a_file_overwritten_afterwards_changes_nothing(folder: Path) -> None:
    ours, video = adapter("wan", folder), clips("wan", 1)
    latents = ours.encode(video)
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(ours.encode(video), latents)
