"""A whole published pipeline, random and tiny: opened as a run it makes the clip that diffusers makes of the same noise and prompt."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import dit_video
from text_models import config_of as text_config
from text_models import save_tokenizer
from torch import Tensor
from wan_models import CHANNELS, IMAGE_DIM, reference

import dit_video as package
from dit_video.model.published import PublishedError
from dit_video.pipeline import config_of
from dit_video.runs import Run
from dit_video.sampler.generate import Sampler, noise_of
from dit_video.sampler.solvers import euler, unipc
from dit_video.sampler.times import flow_match_euler, flow_unipc
from dit_video.shapes import unpatchify

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
STEPS, SHIFT, GUIDANCE = 6, 3.0, 4.0
SIZE = {"num_frames": 9, "height": 32, "width": 48}
SOLVERS: dict[str, tuple[Any, Any, Any]] = {
    "euler": (euler, flow_match_euler, diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)),
    "unipc": (
        unipc, flow_unipc,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    ),
}  # fmt: skip
KINDS = {
    "t2v": ("t2v",),
    "two experts": ("t2v", "t2v"),
    "ti2v": ("ti2v",),
    "i2v_2.2": ("i2v_2.2",),
    "i2v of two": ("i2v_2.2", "i2v_2.2"),
    "i2v": ("i2v",),  # 2.1, which looks at the first frame by CLIP too
}


def looking() -> dict[str, Any]:
    """A picture tower with random weights and its processor."""
    sizes = {"hidden_size": IMAGE_DIM, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    return {
        "image_encoder": tower,
        "image_processor": transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


def write_pipeline(folder: Path, kind: str) -> Any:
    """Saves a pipeline of diffusers with random weights, each of its parts in the published layout; gives it."""
    torch.manual_seed(5)
    text = transformers.UMT5EncoderModel(text_config("umt5")).eval()
    save_tokenizer(folder / "made", "umt5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "made")
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.5, 2.0, 1.5],
    ).eval()  # fmt: skip
    own = [reference(each, seed, text_dim=24) for seed, each in enumerate(KINDS[kind])]
    scheduler, second = SOLVERS["unipc"][2], own[1] if len(own) > 1 else None
    if "i2v" in kind:
        pipeline = diffusers.WanImageToVideoPipeline(
            tokenizer, text, vae, scheduler, transformer=own[0], transformer_2=second, expand_timesteps=kind == "ti2v",
            boundary_ratio=0.875 if second is not None else None, **(looking() if kind == "i2v" else {}),
        )  # fmt: skip
    else:
        pipeline = diffusers.WanPipeline(
            tokenizer, text, vae, scheduler, own[0], second, boundary_ratio=0.875 if second is not None else None
        )
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(folder: Path) -> Run:
    """As a user opens it; weights in float32, as a small model's bits are compared."""
    run = package.load(folder)
    run.trained.network.text.reading = replace(run.trained.network.text.reading, dtype="float32")  # type: ignore[attr-defined]
    run.trained.network.autoencoder.dtype = "float32"  # type: ignore[attr-defined]
    return run


def noise(run: Run, seed: int) -> Tensor:
    """The noise of a seed as diffusers holds it, b c t h w."""
    tokens = run.trained.tokens
    grid = tokens.grid(SIZE["num_frames"], SIZE["height"], SIZE["width"])
    return unpatchify(noise_of(seed, grid, tokens.patch, CHANNELS)[None], grid, tokens.patch).movedim(-1, 1)


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_the_pipelines(tmp_path: Path, kind: str, how: str, record_property: Callable[[str, object], None]) -> None:
    pipeline = write_pipeline(tmp_path, kind)
    solver, schedule, pipeline.scheduler = SOLVERS[how]
    run = opened(tmp_path / "pipeline")
    low = 2.0 if len(KINDS[kind]) > 1 else None
    sampler = Sampler(
        STEPS,
        GUIDANCE,
        low_guidance=low,
        boundary=0.875 if low else 0.0,
        shift=SHIFT,
        solver=solver,
        schedule=schedule,
        batch_size=1,
    )
    asked: dict[str, Any] = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "max_sequence_length": 512, **SIZE}
    more: dict[str, Any] = {}
    if low:
        asked["guidance_scale_2"] = low
    if "i2v" in kind:
        frame = np.random.default_rng(2).integers(0, 256, (1, SIZE["height"], SIZE["width"], 3), np.uint8)
        more = {"given": frame, "task": "image_to_video"}
        asked["image"] = Image.fromarray(frame[0])
    prompt, negative = "a small red circle moves left", "snow"
    wanted = pipeline(prompt=prompt, negative_prompt=negative, latents=noise(run, 7), output_type="np", **asked).frames[0]
    found = run.sample(prompt, 7, sampler, negative_prompt=negative, **SIZE, fps=16, **more)
    apart = np.abs(found.astype(np.float64) - 255 * wanted)
    assert found.shape == wanted.shape and found.std() > 2
    start = 1 if kind == "ti2v" else 0
    record_property("of 255", f"{apart[start:].max():.3f}")
    assert apart[start:].max() < 1.0  # of 255: what rounding to whole numbers leaves


def test_the_programs_take_a_pipelines_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(tmp_path, "t2v")
    words = [f"run={tmp_path}/pipeline", "prompt=snow", "steps=2", "num_frames=5", "height=16", "width=32", f"out={tmp_path}/out"]
    assert dit_video("sample", *words, "dtype=bfloat16") == 0
    assert (tmp_path / "out" / "0000.mp4").is_file()
    (tmp_path / "pipeline" / "vae" / "config.json").unlink()
    assert dit_video("sample", *words) == 1
    assert "vae/config.json" in capsys.readouterr().err.strip().splitlines()[-1]


def test_half_a_pipeline_is_not_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(tmp_path, "two experts")
    shutil.rmtree(tmp_path / "pipeline" / "transformer_2")
    assert dit_video("sample", f"run={tmp_path}/pipeline", "prompt=snow", f"out={tmp_path}/out") == 1
    assert "model_index.json names transformer_2, which is missing" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "key", "value", "told"),
    [
        ("model_index.json", "boundary_ratio", [1], "boundary_ratio must be a number in"),
        ("transformer/config.json", "num_attention_heads", 1 << 20, "width must be a whole number"),
        ("transformer_2/config.json", "ffn_dim", 1 << 20, "config.json tells of"),  # told before there is memory for it
    ],
)
def test_what_a_folder_says_is_checked_before_anything_is_made(
    tmp_path: Path, file: str, key: str, value: object, told: str
) -> None:
    write_pipeline(tmp_path, "two experts")
    path = tmp_path / "pipeline" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PublishedError, match=told):
        config_of(tmp_path / "pipeline")


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "a${b}c", "a'b, c=[d]", "e\\"])
def test_a_folders_name_is_taken_letter_by_letter(tmp_path: Path, name: str) -> None:
    write_pipeline(tmp_path, "i2v")
    folder = (tmp_path / "pipeline").rename(tmp_path / name)
    network = package.load(folder).trained.network
    assert network.text.folder == str(folder / "text_encoder") and network.text.tokenizer_folder == str(folder / "tokenizer")
    assert network.autoencoder.folder == str(folder / "vae")
    assert network.image_encoder is not None and network.image_encoder.folder == str(folder / "image_encoder")


@pytest.mark.parametrize("kind", ["two experts", "i2v"])
def test_rounded_matrices_make_the_same_clips(tmp_path: Path, kind: str) -> None:
    write_pipeline(tmp_path, kind)
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE["height"], SIZE["width"], 3), dtype=np.uint8)
    first = {"given": image, "task": "image_to_video"} if kind == "i2v" else {}
    size = {name: SIZE[name] for name in ("num_frames", "height", "width")}
    wide, rounded = package.load(tmp_path / "pipeline"), package.load(tmp_path / "pipeline", dtype="bfloat16")
    few = replace(rounded.sampler, steps=3)
    assert few.precision == "bfloat16"
    one, other = (run.sample("snow", sampler=few, **size, **first) for run in (wide, rounded))
    assert np.array_equal(one, other) and one.std() > 0
