"""A tiny random Wan in diffusers' pipelines, from our export, and by our sampler: the same latents of the same noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_models import CHANNELS, IMAGE_DIM, PATCH, TEXT_DIM, reference, tokens_of

from dit_video.model.published import export, load, make_transformer
from dit_video.model.wan import WanExperts, WanTransformer, given_then_grey, image_control
from dit_video.sampler.guidance import by_time, guided
from dit_video.sampler.solvers import Solver, Velocity, euler, unipc
from dit_video.sampler.times import Schedule, flow_match_euler, flow_unipc
from dit_video.seeding import seeded
from dit_video.shapes import Context, Grid, Stream, token_places

diffusers = pytest.importorskip("diffusers")
GRID, STEPS, SHIFT, GUIDANCE = Grid(3, 2, 3), 8, 5.0, 4.0
SIZE = {"height": 8 * 2 * GRID.h, "width": 8 * 2 * GRID.w, "num_frames": 9, "num_inference_steps": STEPS, "output_type": "latent"}
SOLVERS: dict[str, tuple[Solver, Schedule, Any]] = {
    "euler": (euler, flow_match_euler, diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)),
    "unipc": (
        unipc, flow_unipc,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    ),
}  # fmt: skip
NOISE = torch.randn(1, CHANNELS, GRID.t, 2 * GRID.h, 2 * GRID.w, generator=seeded(1))


def prompts() -> tuple[Tensor, Tensor]:
    """States of a caption and of a negative one, and zeros after them."""
    states = torch.zeros(2, 1, 512, TEXT_DIM)
    for row, length in enumerate((9, 2)):
        states[row, 0, :length] = torch.randn(length, TEXT_DIM, generator=seeded(row, "text"))
    return states[0], states[1]


def through(folder: Path, kind: str, seed: int = 0) -> WanTransformer | WanExperts:
    """A transformer of ours, which was diffusers' and is exported for it again."""
    reference(kind, seed).save_pretrained(folder / "published")  # type: ignore[operator]
    transformer = make_transformer(folder / "published")
    load(transformer, folder / "published")
    export(transformer, folder / "ours")
    return transformer


def theirs(folder: Path) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(folder / "ours")


def sampled(
    transformer: WanTransformer | WanExperts, solver: Solver, schedule: Schedule, low_guidance: float = GUIDANCE,
    control: Tensor | None = None, image: Tensor | None = None, given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents as tokens, by the solver, schedule and guidance of a preset; `given` are the first frame's tokens."""
    found, x = schedule(STEPS, SHIFT), tokens_of(NOISE)
    known = torch.zeros(1, GRID.num_tokens, dtype=torch.bool)
    if given is not None:
        known[:, : given.shape[1]] = True
        x = torch.cat([given, x[:, given.shape[1] :]], dim=1)
    place = token_places(GRID, PATCH, 16.0, 4.0)[None]

    def velocity(states: Tensor) -> Velocity:
        def ask(x: Tensor, time: Tensor) -> Tensor:
            level = found.told_at(time)
            levels = torch.stack([torch.zeros(1), level.amax(dim=1)], dim=1) if given is not None else level[:, :1]
            index = (~known).long() if given is not None else known.long()
            stream = Stream(x, place, levels, index, known, known, control)
            context = Context(states, torch.tensor([512]), image=image)
            return transformer({"video": stream}, context)[0]["video"] * ~known[..., None]

        return ask

    told, untold = (velocity(states) for states in prompts())
    both = by_time(guided(told, untold, GUIDANCE), guided(told, untold, low_guidance), 0.875)
    with torch.no_grad():
        return solver(both, x, torch.where(known, 0.0, found.times[:, None, None]))


def made(pipeline: Any, **more: Any) -> Tensor:
    """Latents as tokens, by a pipeline of diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    told, untold = prompts()
    return tokens_of(pipeline(
        prompt_embeds=told, negative_prompt_embeds=untold, latents=NOISE.clone(), guidance_scale=GUIDANCE, **SIZE | more
    ).frames)  # fmt: skip


def autoencoder() -> Any:
    torch.manual_seed(3)
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.5, 2.0, 1.5],
    ).eval()  # fmt: skip


def latents_of(vae: Any, video: Tensor) -> Tensor:
    """Scaled latents `b t h w c` of a clip `b T H W 3`."""
    with torch.no_grad():
        found = vae.encode(video.movedim(-1, 1)).latent_dist.mode().movedim(1, -1)
    return (found - torch.tensor(vae.config.latents_mean)) / torch.tensor(vae.config.latents_std)


def close(one: Tensor, other: Tensor, told: Callable[[str, object], None]) -> None:
    told("latents", f"{float((one - other).abs().max()):.1e}")
    assert one.shape == other.shape and other.isfinite().all() and (one - other).abs().max() < 1e-4
    assert (one - tokens_of(NOISE)).abs().mean() > 0.1  # something was made


@pytest.mark.parametrize("how", SOLVERS)
def test_text_to_video(tmp_path: Path, how: str, record_property: Callable[[str, object], None]) -> None:
    transformer = through(tmp_path, "t2v")
    solver, schedule, scheduler = SOLVERS[how]
    pipeline = diffusers.WanPipeline(None, None, None, scheduler, theirs(tmp_path))
    close(sampled(transformer, solver, schedule), made(pipeline), record_property)


@pytest.mark.parametrize("how", SOLVERS)
def test_text_to_video_by_two_experts(tmp_path: Path, how: str, record_property: Callable[[str, object], None]) -> None:
    for seed, part in enumerate(("transformer", "transformer_2")):
        reference("t2v", seed).save_pretrained(tmp_path / "in" / part)  # type: ignore[operator]
    transformer = make_transformer(tmp_path / "in")
    load(transformer, tmp_path / "in")
    export(transformer, tmp_path / "ours")
    one, two = (
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours" / part) for part in ("transformer", "transformer_2")
    )
    solver, schedule, scheduler = SOLVERS[how]
    pipeline = diffusers.WanPipeline(None, None, None, scheduler, one, two, boundary_ratio=0.875)
    found, wanted = sampled(transformer, solver, schedule, low_guidance=2.0), made(pipeline, guidance_scale_2=2.0)
    close(found, wanted, record_property)
    assert (found - sampled(transformer, solver, schedule)).abs().max() > 1e-3  # both scales are at work


@pytest.mark.parametrize("how", SOLVERS)
def test_image_to_video_by_given_tokens(tmp_path: Path, how: str, record_property: Callable[[str, object], None]) -> None:
    """TI2V-5B: the first frame's tokens have level 0, and come out as they are."""
    transformer, vae, image = through(tmp_path, "ti2v"), autoencoder(), torch.rand(1, 3, SIZE["height"], SIZE["width"])
    solver, schedule, scheduler = SOLVERS[how]
    pipeline = diffusers.WanImageToVideoPipeline(
        None, None, vae, scheduler, transformer=theirs(tmp_path), expand_timesteps=True
    )  # fmt: skip
    given = tokens_of(latents_of(vae, image.movedim(1, -1)[:, None] * 2 - 1).movedim(-1, 1))
    found = sampled(transformer, solver, schedule, given=given)
    close(found, made(pipeline, image=image), record_property)
    assert torch.equal(found[:, : given.shape[1]], given)


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("kind", ["i2v", "i2v_2.2"])
def test_image_to_video_by_channels(tmp_path: Path, kind: str, how: str, record_property: Callable[[str, object], None]) -> None:
    transformer, vae, image = through(tmp_path, kind), autoencoder(), torch.rand(1, 3, SIZE["height"], SIZE["width"])
    solver, schedule, scheduler = SOLVERS[how]
    pipeline = diffusers.WanImageToVideoPipeline(None, None, vae, scheduler, transformer=theirs(tmp_path))
    states = torch.randn(1, 5, IMAGE_DIM, generator=seeded(4)) if kind == "i2v" else None
    pipeline.encode_image = lambda image, device: states
    clip = given_then_grey(image.movedim(1, -1)[:, None] * 2 - 1, SIZE["num_frames"])
    control = image_control(latents_of(vae, clip), 1, PATCH)
    close(sampled(transformer, solver, schedule, control=control, image=states), made(pipeline, image=image), record_property)
