"""The training objective: corrupt a batch of clips, ask the network, compare velocities on the tokens that were to be made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dit_video.objective.levels import Levels
from dit_video.objective.path import Prediction, mix, shift_for, shifted, target_of
from dit_video.objective.tasks import Task, check_tasks, draw_task, given_tokens
from dit_video.seeding import seeded
from dit_video.shapes import Batch, Caption, Grid, Stream, Tokens, grid_of, patchify, real_slots

Denoiser = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Streams by name, captions, taps and, where a batch has any, states of first frames; to each stream's values and what was tapped."""


@dataclass
class Corrupted:
    """A batch on its way into the network, with the answer beside it."""

    stream: Stream
    captions: list[Caption]  # None where dropped
    grid: Grid
    clean: Float[Tensor, "b n p"]
    noise: Float[Tensor, "b n p"]
    time: Float[Tensor, " b"]  # of the tokens to be made
    real: Float[Tensor, "n p"]  # 0 where a token's value is padding before the first frame
    tasks: list[str]

    @property
    def made(self) -> Bool[Tensor, "b n"]:
        return ~self.stream.given


@dataclass
class Losses:
    """The loss of every clip, and what it was made of."""

    per_clip: Float[Tensor, " b"]  # what is trained on
    velocity: Float[Tensor, " b"]  # the part that compares velocities
    extra: dict[str, Float[Tensor, " b"]]  # the other parts, before their weights
    time: Float[Tensor, " b"]
    tasks: list[str]


@runtime_checkable
class ExtraLoss(Protocol):
    """A further loss on hidden states, such as representation alignment; a module whose parameters are trained along."""

    weight: float
    taps: tuple[str, ...]  # the hidden states it wants, see VideoTransformer.forward

    def __call__(self, tapped: dict[str, Tensor], batch: Batch, corrupted: Corrupted, grid: Grid) -> Float[Tensor, " b"]: ...


class Objective(nn.Module):
    """Flow matching on the straight path, with tasks as masks over tokens.

    The loss is the squared error of the velocity, whatever the network predicts: the mean over the real values of a token, then over
    the tokens to be made of a clip. All that is random about a clip comes from (seed, its slot).
    """

    def __init__(
        self,
        tasks: dict[str, Task],  # by name, with their probabilities
        levels: Levels,  # distribution of the noise level
        predict: Prediction = "clean",  # what the network's output means
        caption_dropout: float = 0.1,  # probability that a clip is trained without its caption
        given_noise: float = 0.0,  # noise level that given tokens carry; clean first frames tend to freeze motion
        min_time: float = 0.05,  # bound of the divisor in the loss
        base_tokens: int | None = None,  # clips with more tokens to make than this are shifted toward noise; none: no shift
        sample_latents: bool = False,  # latents are drawn from the autoencoder's distribution, around the mean that is taken otherwise
        extra: dict[str, ExtraLoss] | None = None,  # further losses, by name
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_tasks(tasks)
        if predict not in ("clean", "velocity", "noise"):
            raise ValueError(f"predict must be clean, velocity or noise, got {predict!r}; set objective.predict")
        for name, value in {"caption_dropout": caption_dropout, "given_noise": given_noise}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}; set objective.{name}")
        self.tasks, self.levels, self.predict = tasks, levels, predict
        self.caption_dropout, self.given_noise, self.min_time = caption_dropout, given_noise, min_time
        self.base_tokens, self.sample_latents, self.seed = base_tokens, sample_latents, seed
        self.extra: Mapping[str, ExtraLoss] = nn.ModuleDict(extra or {})  # type: ignore

    def forward(self, network: Denoiser, batch: Batch, tokens: Tokens) -> Losses:
        return self.compare(network, batch, self.corrupt(batch, tokens))

    def corrupt(self, batch: Batch, tokens: Tokens, time: float | None = None) -> Corrupted:
        """Draws each clip's task, noise level, noise and caption dropout from (seed, slot); a given time replaces the level."""
        video, patch = self.clean(batch), tokens.patch
        grid, device = grid_of(video, patch), video.device
        clean, told = patchify(video, patch), batch.told()
        real = repeat(real_slots(grid, patch), "n pt -> n (pt values)", values=clean.shape[-1] // patch.t).to(device)

        tasks, given, times = [], [], []
        captions: list[Caption] = []
        noise = torch.empty(clean.shape)
        for row, slot in enumerate(batch.slots.tolist()):
            generator = seeded(self.seed, slot)
            task = draw_task(self.tasks, generator)
            drawn = self.tasks[task].draw(grid.t, generator)
            given.append(
                given_tokens(drawn if batch.control is None else [], grid)
            )  # an image told by channels is made all the same
            tasks.append(task if drawn else "text_to_video")  # what a clip of one frame always is
            shift = shift_for(int((~given[-1]).sum()), self.base_tokens)
            times.append(shifted(torch.tensor(self.levels.draw(generator)), shift))
            dropped = torch.rand((), generator=generator).item() < self.caption_dropout
            captions.append(None if dropped else told[row])
            torch.randn(clean.shape[1:], generator=generator, out=noise[row])
        noise = noise.to(device) * real
        made_time = torch.stack(times).to(device) if time is None else torch.full((len(tasks),), time, device=device)

        stream = video_stream(clean, torch.stack(given).to(device), grid, tokens, batch.fps)
        stream.control = batch.control
        stream.levels = torch.stack([torch.full_like(made_time, self.given_noise), made_time], dim=1)
        stream.values = mix(clean, noise, stream.level_per_token())
        return Corrupted(stream, captions, grid, clean, noise, made_time, real, tasks)

    def clean(self, batch: Batch) -> Float[Tensor, "b t h w c"]:
        """What is to be made of noise; latents that are to be drawn are drawn from (seed, slot)."""
        if not self.sample_latents or batch.latents is None:
            return batch.clean()
        if batch.logvar is None:
            raise ValueError(
                "these latents come without a variance; encode with logvar=true, or set objective.sample_latents=false"
            )
        noise = [
            torch.randn(batch.logvar.shape[1:], generator=seeded(self.seed, slot, "latents")) for slot in batch.slots.tolist()
        ]
        return batch.latents + (batch.logvar / 2).exp() * torch.stack(noise).to(batch.logvar.device)

    def compare(self, network: Denoiser, batch: Batch, corrupted: Corrupted) -> Losses:
        """Asks the network about corrupted clips and gives the loss of each."""
        stream, made = corrupted.stream, corrupted.made
        taps = tuple(tap for loss in self.extra.values() for tap in loss.taps)
        image = () if batch.image is None else (batch.image,)
        outputs, tapped = network({"video": stream}, corrupted.captions, taps, *image)

        # Given tokens leave before anything is divided by their time, which may be 0: a masked infinity would still be a NaN.
        time = torch.where(made, stream.level_per_token(), 0.5)
        target, divisor = target_of(corrupted.clean, corrupted.noise, time, self.predict, self.min_time)
        share = (corrupted.real / corrupted.real.sum(-1, keepdim=True)).sqrt()  # of a value in its token's mean
        error = (outputs["video"] - target) * share
        per_token = torch.linalg.vecdot(error, error) / divisor**2
        per_clip = torch.where(made, per_token, 0).sum(-1) / made.sum(-1)

        extra = {name: loss(tapped, batch, corrupted, corrupted.grid) for name, loss in self.extra.items()}
        total = per_clip + sum((self.extra[name].weight * value for name, value in extra.items()), torch.zeros(()))
        return Losses(total, per_clip.detach(), {k: v.detach() for k, v in extra.items()}, corrupted.time, corrupted.tasks)


def video_stream(values: Float[Tensor, "b n p"], given: Bool[Tensor, "b n"], grid: Grid, tokens: Tokens, fps: float) -> Stream:
    """The stream of a batch of clips: given tokens have the first of two noise levels, tokens to be made the second (both 0 so far)."""
    batch = values.shape[0]
    place = repeat(tokens.places(grid, fps), "n place -> b n place", b=batch).to(values.device)
    partial = repeat(real_slots(grid, tokens.patch)[:, 0] == 0, "n -> b n", b=batch).to(values.device)
    return Stream(values, place, torch.zeros(batch, 2, device=values.device), (~given).long(), given, partial)
