"""From requests to videos: noise from each request's own seed, a solver, guidance, and the frames that were given, kept as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from dit_video.model.network import Network
from dit_video.model.wan import given_then_grey, image_control
from dit_video.numbers import is_finite, is_whole
from dit_video.objective.objective import video_stream
from dit_video.objective.path import Prediction, mix, shift_for, velocity_of
from dit_video.objective.tasks import Task, check_prefix, given_tokens
from dit_video.sampler.guidance import by_time, guided
from dit_video.sampler.solvers import Solver, Velocity, multistep
from dit_video.sampler.times import Schedule, Times, even
from dit_video.seeding import seeded
from dit_video.shapes import Grid, Patch, Stream, Tokens, patchify, real_slots, to_float, to_uint8, unpatchify, valid_frames


@dataclass
class Request:
    """One video to be made: what it shows, its size, and the seed that its noise comes from."""

    prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    negative_prompt: str = ""
    task: str = "text_to_video"
    given: np.ndarray | None = None  # uint8 T H W 3: the known frames, as the task wants them
    attributes: dict[str, Any] = field(default_factory=dict)  # what the prompt states, for the world's checker

    @property
    def shape(self) -> tuple:
        """What requests of one batch have in common."""
        return self.num_frames, self.height, self.width, self.fps, self.task, 0 if self.given is None else len(self.given)


@dataclass
class Sampler:
    """How videos are drawn from a network: solver, steps and guidance, and what the training says of its output."""

    steps: int = 12
    guidance: float = 2.0  # 1: none
    low_guidance: float | None = None  # at times below `boundary`; none: guidance is the same at all times
    boundary: float = 0.0  # of the two, such as that between two experts
    interval: Sequence[float] = (0.0, 1.0)  # of time, in which guidance acts
    rescale: float = 0.0  # of guided velocities, see guidance.py
    shift: float | None = None  # of the times toward noise; none: as in training
    solver: Solver = multistep
    schedule: Schedule = even  # the times of the steps, and what the network is told of them
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network; in bfloat16 a clip's last bits depend on its batch
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if not is_whole(value, least):
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r}; set {name} (in training sampler.{name})"
                )
        for name in ("guidance", "low_guidance", "boundary", "rescale", "shift"):
            value = getattr(self, name)
            if not is_finite(value) and not (value is None and name in ("low_guidance", "shift")):
                raise ValueError(f"{name} must be a number, got {value!r}; set {name} (in training sampler.{name})")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}; set rescale (in training sampler.rescale)")
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}; set shift (in training sampler.shift)")
        pair = isinstance(self.interval, Sequence) and len(self.interval) == 2 and all(map(is_finite, self.interval))
        if not pair or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(
                f"interval is two times in [0, 1], the lower first, got {self.interval!r}; set interval (in training sampler.interval)"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"precision must be float32 or bfloat16, got {self.precision!r}; set precision (in training sampler.precision)"
            )


@dataclass
class Trained:
    """A network with what the objective fixed about it, so that training and sampling cannot disagree."""

    network: Network
    tasks: dict[str, Task]
    predict: Prediction
    base_tokens: int | None
    given_noise: float

    @property
    def tokens(self) -> Tokens:
        return self.network.tokens


def check_request(request: Request, trained: Trained) -> None:
    """ValueError where a request cannot be met, before any work is done."""
    if request.task not in trained.tasks:
        raise ValueError(f"the model knows no task {request.task!r}, only {', '.join(trained.tasks)}; set task")
    if not request.fps > 0:
        raise ValueError(f"fps must be positive, got {request.fps}; set fps")
    grid, pt = _grid(request, trained.tokens), trained.tokens.span.t
    trained.network.autoencoder.check_clip(valid_frames(request.num_frames, pt), request.height, request.width)
    given = request.given
    if given is None and (trained.network.takes_images or trained.network.takes_image_states):
        raise ValueError("this model makes a clip from its first frame; give it, with image=")
    if given is not None and given.ndim != 4:
        raise ValueError(f"given frames are an array of frames, height, width and 3, got shape {given.shape}; give them so")
    places = trained.tasks[request.task].places(0 if given is None else len(given), grid.t, pt)
    check_prefix(request.task, places, trained.tokens.compression)
    whole = valid_frames(request.num_frames, pt)
    if request.num_frames != whole and grid.t - 1 in places:
        raise ValueError(
            f"with the last frames given a clip cannot be trimmed to {request.num_frames} frames; set num_frames={whole}"
        )
    if given is not None and (given.dtype != np.uint8 or given.shape[1:] != (request.height, request.width, 3)):
        wanted = (len(given), request.height, request.width, 3)
        raise ValueError(
            f"given frames must be uint8 of shape {wanted}, got {given.dtype} of {given.shape}; set height and width to theirs"
        )


@torch.no_grad()
def generate(trained: Trained, requests: Sequence[Request], sampler: Sampler) -> list[np.ndarray]:
    """Makes a video `T H W 3` uint8 for every request, in order; requests of one shape run in batches together.

    A clip does not depend on what shares its batch: its noise comes from its own seed.
    """
    for request in requests:
        check_request(request, trained)
    groups: dict[tuple, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.shape, []).append(number)
    videos: dict[int, np.ndarray] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), sampler.batch_size):
            chosen = numbers[start : start + sampler.batch_size]
            videos |= dict(zip(chosen, _generate(trained, [requests[i] for i in chosen], sampler), strict=True))
    return [videos[number] for number in range(len(requests))]


def _generate(trained: Trained, requests: list[Request], sampler: Sampler) -> list[np.ndarray]:
    first, tokens, device = requests[0], trained.tokens, next(trained.network.parameters()).device
    grid, patch, channels = _grid(first, tokens), tokens.patch, trained.network.transformer.channels
    noise = torch.stack([noise_of(request.seed, grid, patch, channels) for request in requests]).to(device)
    x, given = _place_given(trained, requests, noise, grid)
    stream = video_stream(noise, given, grid, tokens, first.fps)
    stream.control = _control(trained, requests)
    if not given.any():  # one noise level for the whole clip, which the model broadcasts
        stream.levels, stream.index = stream.levels[:, :1], torch.zeros_like(stream.index)

    shift = shift_for(int((~given[0]).sum()), trained.base_tokens) if sampler.shift is None else sampler.shift
    schedule = sampler.schedule(sampler.steps, shift)
    times = torch.where(given, 0.0, schedule.times.to(device)[:, None, None])  # s b n

    image = _image_states(trained, requests)
    told = _velocity(trained, stream, [request.prompt for request in requests], image, grid, schedule)
    untold = _velocity(trained, stream, [request.negative_prompt or None for request in requests], image, grid, schedule)
    velocity = _guided(told, untold, sampler)

    def fresh(step: int) -> Tensor:
        return torch.stack([noise_of(request.seed, grid, patch, channels, step) for request in requests]).to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=sampler.precision == "bfloat16"):
        clean = sampler.solver(velocity, x, times, fresh)
    videos = to_uint8(trained.network.autoencoder.decode(unpatchify(clean, grid, patch))).cpu().numpy()
    return [video[: first.num_frames] for video in videos]


def noise_of(seed: int, grid: Grid, patch: Patch, channels: int = 3, step: int | None = None) -> Float[Tensor, "n p"]:
    """The noise that a seed stands for, to start from or to add in a step; zero in the padding before the first frame."""
    generator = seeded(seed, "sample") if step is None else seeded(seed, "sample", step)
    noise = torch.randn(grid.num_tokens, patch.t * patch.h * patch.w * channels, generator=generator)
    return noise * repeat(real_slots(grid, patch), "n pt -> n (pt values)", values=noise.shape[-1] // patch.t)


def _grid(request: Request, tokens: Tokens) -> Grid:
    return tokens.grid(valid_frames(request.num_frames, tokens.span.t), request.height, request.width)


def _place_given(trained: Trained, requests: list[Request], noise: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Puts the given frames' tokens among the noise; returns them with the mask of what is given."""
    first, tokens = requests[0], trained.tokens
    if first.given is None or trained.network.takes_images:
        return noise, torch.zeros(noise.shape[:2], dtype=torch.bool, device=noise.device)
    places = trained.tasks[first.task].places(len(first.given), grid.t, tokens.span.t)
    frames = _given_frames(requests, noise.device)
    mask = given_tokens(places, grid).to(noise.device)
    x = noise.clone()
    x[:, mask] = patchify(trained.network.autoencoder.encode(frames), tokens.patch)
    return x, mask.expand(len(requests), -1)


def _given_frames(requests: list[Request], device: torch.device) -> Float[Tensor, "b g H W 3"]:
    return to_float(torch.from_numpy(np.stack([request.given for request in requests if request.given is not None])).to(device))


def _control(trained: Trained, requests: list[Request]) -> Float[Tensor, "b n c"] | None:
    """What is told of the given frames by channels, where the model takes them so."""
    network, given = trained.network, requests[0].given
    if not network.takes_images:
        return None
    assert given is not None  # see check_request
    frames = _given_frames(requests, next(network.parameters()).device)
    clip = given_then_grey(frames, valid_frames(requests[0].num_frames, trained.tokens.span.t))
    return image_control(network.autoencoder.encode(clip), len(given), trained.tokens.patch, trained.tokens.compression.t)


def _image_states(trained: Trained, requests: list[Request]) -> Float[Tensor, "b i e"] | None:
    """What the image encoder says of the first frames, where the model asks it."""
    network = trained.network
    if not network.takes_image_states:
        return None
    first = [torch.from_numpy(request.given[0]) for request in requests if request.given is not None]
    return network.image_states(torch.stack(first).to(next(network.parameters()).device))


def _guided(told: Velocity, untold: Velocity, sampler: Sampler) -> Velocity:
    velocity = guided(told, untold, sampler.guidance, sampler.interval, sampler.rescale)
    if sampler.low_guidance is None:
        return velocity
    return by_time(velocity, guided(told, untold, sampler.low_guidance, sampler.interval, sampler.rescale), sampler.boundary)


def _velocity(
    trained: Trained, stream: Stream, captions: list[str | None], image: Tensor | None, grid: Grid, schedule: Times
) -> Velocity:
    """The network as a velocity of tokens at their times, for these captions."""
    patch = trained.tokens.patch
    real = repeat(real_slots(grid, patch), "n pt -> n (pt values)", values=stream.values.shape[-1] // patch.t)
    moves = real.to(stream.values.device) * ~stream.given[..., None]  # what is given stays, and so does the padding
    context = replace(trained.network.text(captions), image=image)  # the same at every step

    def velocity(x: Float[Tensor, "b n p"], time: Float[Tensor, "b n"]) -> Float[Tensor, "b n p"]:
        seen, level = x, schedule.told_at(time)
        if trained.predict == "noise":  # at t = 1 the noise is all there is to see, and says nothing of the clean clip
            time, level = time.clamp(max=0.95), level.clamp(max=0.95)
        if trained.given_noise and stream.given.any():  # given tokens are shown as they were in training, and kept as they are
            level = level.where(~stream.given, trained.given_noise)
            seen = torch.where(stream.given[..., None], mix(x, stream.values, level), x)
        levels = torch.zeros_like(stream.levels).scatter(1, stream.index, level)  # tokens of one index share one level
        asked = Stream(seen, stream.place, levels, stream.index, stream.given, stream.partial, stream.control)
        outputs, _ = trained.network.transformer({"video": asked}, context)
        return velocity_of(outputs["video"], x, time, trained.predict, min_time=1e-4) * moves

    return velocity
