"""A task is a choice of tokens that are given. Each draws its choice in training, and knows where a user's given frames go in sampling.

Choices are made in token frames: number 0 covers the first frame alone, every other covers pt frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from dit_video.shapes import Grid, Patch


@runtime_checkable
class Task(Protocol):
    """What the objective and the sampler need to know of a task."""

    probability: float  # in training, relative to the other tasks'

    def draw(self, token_frames: int, generator: torch.Generator) -> list[int]:
        """The token frames given in training, of so many."""
        ...

    def places(self, num_given: int, token_frames: int, pt: int) -> list[int]:
        """The token frames that a user's given frames fill; ValueError where their number does not fit."""
        ...


@dataclass
class TextToVideo:
    """Nothing is given; a clip of one frame makes it text to image."""

    probability: float = 1.0

    def draw(self, token_frames: int, generator: torch.Generator) -> list[int]:
        return []

    def places(self, num_given: int, token_frames: int, pt: int) -> list[int]:
        if num_given:
            raise ValueError(f"text to video takes no given frames, got {num_given}; set task=image_to_video or leave image out")
        return []


@dataclass
class FirstFrames:
    """The first frames are given: one for image to video, more to extend a clip."""

    probability: float = 1.0
    min_token_frames: int = 1
    max_token_frames: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min_token_frames <= self.max_token_frames:
            numbers = f"min_token_frames {self.min_token_frames} and max_token_frames {self.max_token_frames}"
            raise ValueError(f"{numbers} are no range; set objective.tasks.<task>.max_token_frames")

    def draw(self, token_frames: int, generator: torch.Generator) -> list[int]:
        low, high = min(self.min_token_frames, token_frames - 1), min(self.max_token_frames, token_frames - 1)
        return list(range(int(torch.randint(low, high + 1, (), generator=generator))))

    def places(self, num_given: int, token_frames: int, pt: int) -> list[int]:
        if num_given < 1 or (num_given - 1) % pt:
            raise ValueError(
                f"the first frames are given in numbers of 1 + k * {pt}, got {num_given}; give another number of frames"
            )
        places = list(range(1 + (num_given - 1) // pt))
        if len(places) >= token_frames:
            raise ValueError(f"{num_given} given frames leave nothing to make; set num_frames to more than {num_given}")
        return places


@dataclass
class InBetween:
    """The first frame and the last token frame are given."""

    probability: float = 1.0

    def draw(self, token_frames: int, generator: torch.Generator) -> list[int]:
        return [0, token_frames - 1] if token_frames > 2 else []

    def places(self, num_given: int, token_frames: int, pt: int) -> list[int]:
        if num_given != 1 + pt:
            raise ValueError(f"in-between takes the first frame and the last {pt}: {1 + pt} given frames, got {num_given}")
        if token_frames < 3:
            raise ValueError("nothing lies between the given frames; set num_frames to a longer clip")
        return [0, token_frames - 1]


def draw_task(tasks: dict[str, Task], generator: torch.Generator) -> str:
    """The name of a task, drawn by the tasks' probabilities."""
    names, chances = list(tasks), [float(task.probability) for task in tasks.values()]
    point, reached = torch.rand((), generator=generator).item() * sum(chances), 0.0
    for name, chance in zip(names, chances, strict=True):
        reached += chance
        if point < reached:
            return name
    return next(name for name in reversed(names) if tasks[name].probability > 0)  # rounding


def check_tasks(tasks: dict[str, Task]) -> None:
    """ValueError where the probabilities cannot be drawn from."""
    for name, task in tasks.items():
        if not task.probability >= 0:
            raise ValueError(f"a probability is 0 or more, got {task.probability}; set objective.tasks.{name}.probability")
    if not sum(task.probability for task in tasks.values()) > 0:
        raise ValueError("no task has a probability above 0; set objective.tasks.<task>.probability")


def check_prefix(name: str, places: Sequence[int], compression: Patch) -> None:
    """ValueError where a task gives latents that have seen what is to be made: of an autoencoder all but a clip's first have."""
    if compression.t > 1 and list(places) != list(range(len(places))):
        raise ValueError(
            f"of latents only the first can be given, and {name} gives others; set task, or in training "
            f"objective.tasks.{name}.probability=0"
        )


def check_given(tasks: dict[str, Task], compression: Patch, causal: bool) -> None:
    """ValueError where a task that is trained gives latents that have seen what is to be made."""
    for name, task in tasks.items():
        drawn = {tuple(task.draw(9, torch.Generator().manual_seed(seed))) for seed in range(8)} if task.probability > 0 else set()
        for places in drawn:
            check_prefix(name, places, compression)
        if not causal and any(drawn):
            raise ValueError(
                f"this autoencoder lets a clip's first latents see all of it, and {name} gives them; set "
                f"objective.tasks.{name}.probability=0, or autoencoder"
            )


def given_tokens(token_frames: list[int], grid: Grid) -> torch.Tensor:
    """A boolean mask `n` of the tokens in the given token frames."""
    mask = torch.zeros(grid.t, grid.h * grid.w, dtype=torch.bool)
    mask[token_frames] = True
    return mask.flatten()
