"""From requests to videos: what a video depends on, given frames, tasks, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.path import Prediction
from dit_video.objective.tasks import FirstFrames, InBetween, TextToVideo
from dit_video.sampler.generate import Request, Sampler, Trained, check_request, generate, noise_of
from dit_video.sampler.solvers import Stochastic, euler, heun, multistep
from dit_video.shapes import Batch, Grid, Patch, Stream, Tokens, patchify, real_slots, to_float, unpatchify

PATCH = Patch(2, 4, 4)
TASKS = {
    "text_to_video": TextToVideo(),
    "image_to_video": FirstFrames(),
    "extend": FirstFrames(1, 2, 3),
    "in_between": InBetween(),
}
PROMPTS = ["a small red circle moves left", "", "blue", "a large green square stays still, then bounces"]


@pytest.fixture(scope="module")
def trained(make_network: Callable[..., Network]) -> Trained:
    return Trained(make_network().eval(), TASKS, "velocity", None, 0.0)


def frames(count: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def request_of(
    prompt: str = PROMPTS[0], seed: int = 0, num_frames: int = 5, height: int = 8, width: int = 8, **more: Any
) -> Request:
    return Request(prompt, seed, num_frames, height, width, 8.0, **more)


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


# --------------------------------------------------------------------------- noise


def test_noise_comes_from_the_seed_alone() -> None:
    grid = Grid(3, 2, 2)
    one = noise_of(7, grid, PATCH)
    torch.manual_seed(5)
    assert torch.equal(noise_of(7, grid, PATCH), one) and not torch.equal(noise_of(8, grid, PATCH), one)
    real = real_slots(grid, PATCH).repeat_interleave(48, dim=1).bool()
    assert not one[~real].any() and one[real].std().item() == pytest.approx(1, abs=0.05)


def test_noise_is_bit_equal_in_every_batch(trained: Trained) -> None:
    """What the solver starts from, seen by a solver that returns it."""
    seen: list[torch.Tensor] = []

    def look(velocity: Any, x: torch.Tensor, times: torch.Tensor, fresh: Any) -> torch.Tensor:
        seen.append(x)
        return x

    requests = [request_of(seed=seed) for seed in (3, 1, 4, 1, 5)]
    for batch_size in (1, 2, 5):
        generate(trained, requests, Sampler(solver=look, batch_size=batch_size))
    generate(trained, requests[::-1], Sampler(solver=look, batch_size=5))
    alone, by_two, together, turned = torch.cat(seen[:5]), torch.cat(seen[5:8]), seen[8], seen[9]
    assert torch.equal(alone, by_two) and torch.equal(alone, together) and torch.equal(alone, turned.flip(0))
    assert torch.equal(together[1], together[3]) and torch.equal(together[0], noise_of(3, Grid(3, 2, 2), PATCH))


# --------------------------------------------------------------------------- batches


def tokens_of(trained: Trained, requests: list[Request], batch_size: int, solver: Any) -> torch.Tensor:
    """Clean tokens before they are rounded to pixels."""
    seen: list[torch.Tensor] = []

    def keep(velocity: Any, x: torch.Tensor, times: torch.Tensor, fresh: Any) -> torch.Tensor:
        seen.append(solver(velocity, x, times, fresh))
        return seen[-1]

    generate(trained, requests, Sampler(6, 3.0, rescale=0.3, solver=keep, batch_size=batch_size))
    return torch.cat(seen)


@pytest.mark.parametrize("solver", [euler, heun, multistep, Stochastic(0.6), Stochastic()])
@pytest.mark.parametrize("task", ["text_to_video", "image_to_video"])
def test_clips_are_equal_across_batch_sizes(trained: Trained, solver: Any, task: str) -> None:
    given = [frames(1, seed=i) if task == "image_to_video" else None for i in range(4)]
    requests = [request_of(prompt, seed, task=task, given=given[seed]) for seed, prompt in enumerate(PROMPTS)]
    together = tokens_of(trained, requests, 4, solver)
    assert (together - tokens_of(trained, requests, 1, solver)).abs().max() < 1e-4
    assert (together - tokens_of(trained, requests[::-1], 3, solver).flip(0)).abs().max() < 1e-4


def test_requests_of_different_shapes_come_back_in_order(trained: Trained) -> None:
    requests = [
        request_of(seed=0),
        request_of(seed=1, height=12, width=8),
        request_of(seed=2, task="image_to_video", given=frames(1)),
        request_of(seed=3, num_frames=9),
        request_of(seed=4, height=12, width=8),
        request_of(seed=5, num_frames=1),
        replace(request_of(seed=6), fps=16.0),
    ]
    videos = generate(trained, requests, Sampler(3))
    for request, video in zip(requests, videos, strict=True):
        assert video.dtype == np.uint8 and video.shape == (request.num_frames, request.height, request.width, 3)
        assert near(video, generate(trained, [request], Sampler(3))[0])
    assert len({video.tobytes() for video in videos}) == len(videos)
    assert generate(trained, [], Sampler(3)) == []


def test_seed_prompt_size_and_steps_matter(trained: Trained) -> None:
    plain = generate(trained, [request_of()], Sampler(4))[0]
    for request, sampler in (
        (request_of(seed=1), Sampler(4)),
        (request_of("a large blue square"), Sampler(4)),
        (replace(request_of(), fps=4.0), Sampler(4)),
        (request_of(negative_prompt="a triangle"), Sampler(4)),
        (request_of(), Sampler(5)),
        (request_of(), Sampler(4, guidance=5.0)),
        (request_of(), Sampler(4, shift=3.0)),
        (request_of(), Sampler(4, solver=euler)),
    ):
        assert not near(generate(trained, [request], sampler)[0], plain)


# --------------------------------------------------------------------------- lengths, tasks, given frames


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (2, 3), (4, 5), (12, 13)])
def test_a_clip_is_made_to_the_next_valid_length_and_trimmed(trained: Trained, asked: int, made: int) -> None:
    videos = generate(trained, [request_of(num_frames=asked), request_of(num_frames=made)], Sampler(3))
    assert [len(video) for video in videos] == [asked, made]
    assert near(videos[0], videos[1][:asked])


@pytest.mark.parametrize(
    ("task", "num_given", "places"),
    [("image_to_video", 1, [0]), ("extend", 3, [0, 1, 2]), ("extend", 5, [0, 1, 2, 3, 4]), ("in_between", 3, [0, 7, 8])],
)
@pytest.mark.parametrize("predict", ["clean", "velocity", "noise"])
@pytest.mark.parametrize("given_noise", [0.0, 0.1])
@pytest.mark.parametrize("solver", [euler, heun, multistep, Stochastic(0.6), Stochastic()])
def test_given_frames_come_back_bit_for_bit(
    trained: Trained, task: str, num_given: int, places: list[int], predict: Prediction, given_noise: float, solver: Any
) -> None:
    asked = replace(trained, predict=predict, given_noise=given_noise)
    requests = [request_of(seed=s, num_frames=9, task=task, given=frames(num_given, seed=s)) for s in range(2)]
    for request, video in zip(requests, generate(asked, requests, Sampler(3, solver=solver)), strict=True):
        assert request.given is not None and np.array_equal(video[places], request.given)
        rest = [i for i in range(9) if i not in places]
        assert len({video[i].tobytes() for i in rest}) == len(rest)


def test_given_frames_matter_to_the_others(trained: Trained) -> None:
    one, other = (request_of(task="image_to_video", given=frames(1, seed=s)) for s in (0, 1))
    videos = generate(trained, [one, other], Sampler(3))
    assert not near(videos[0][1:], videos[1][1:])


def test_given_noise_is_shown_to_the_network_and_to_nobody_else(make_network: Callable[..., Network]) -> None:
    """The network is asked in sampling what it was asked in training: the same values, levels and marks."""
    asked: list[Stream] = []

    class Listening(VideoTransformer):
        def forward(self, streams, context, taps=()):  # type: ignore[no-untyped-def]
            asked.append(streams["video"])
            return super().forward(streams, context, taps)

    network = make_network()
    network.transformer.__class__ = Listening
    given, starting = frames(1), noise_of(0, Grid(3, 2, 2), PATCH)
    for noise in (0.0, 0.2):
        asked.clear()
        trained = Trained(network, TASKS, "clean", None, noise)
        generate(trained, [request_of(task="image_to_video", given=given)], Sampler(3, 1.0))
        video = torch.from_numpy(np.concatenate([given, given, given, given, given]))[None]
        batch = Batch(video, ["x"], ["k"], torch.tensor([0]), 8.0)
        corrupted = Objective({"image": FirstFrames()}, LogitNormal(), given_noise=noise).corrupt(batch, Tokens(PATCH)).stream
        for step, stream in enumerate(asked):
            assert torch.equal(stream.given, corrupted.given) and torch.equal(stream.partial, corrupted.partial)
            assert torch.equal(stream.index, corrupted.index) and torch.equal(stream.place, corrupted.place)
            assert stream.levels[0].tolist() == pytest.approx([noise, 1 - step / 3])
            shown = stream.values[stream.given]
            assert torch.equal(shown, asked[0].values[stream.given])
            clean = patchify(to_float(video[:, :1]), PATCH)[0]
            assert torch.allclose(shown, (1 - noise) * clean + noise * starting[: len(clean)], atol=1e-6)


def test_what_is_not_made_has_no_velocity(trained: Trained) -> None:
    """Given tokens and the padding before the first frame, so that neither counts in guidance's rescaling."""
    real = real_slots(Grid(3, 2, 2), PATCH).repeat_interleave(48, dim=1).bool()

    def look(velocity: Any, x: torch.Tensor, times: torch.Tensor, fresh: Any) -> torch.Tensor:
        moved, made = velocity(x, times[1]), times[0] > 0
        assert not moved[:, ~real].any() and not moved[~made].any() and moved[made][:, -1].all()
        return x

    for request in (request_of(), request_of(task="image_to_video", given=frames(1))):
        for predict in ("clean", "velocity", "noise"):
            generate(replace(trained, predict=predict), [request], Sampler(4, 3.0, rescale=0.5, solver=look))


# --------------------------------------------------------------------------- the right answer


class Gaussian(VideoTransformer):
    """The best answer there is for clips whose pixels are normal with mean 0.2 and standard deviation 0.3."""

    mean, spread, error = 0.2, 0.3, 0.0

    def forward(self, streams, context, taps=()):  # type: ignore[no-untyped-def]
        stream = streams["video"]
        time = stream.level_per_token()[..., None]
        signal = (1 - time) ** 2 * self.spread**2
        clean = self.mean + (1 - time) * self.spread**2 / (signal + time**2) * (stream.values - (1 - time) * self.mean)
        noise = (stream.values - (1 - time) * clean) / time
        out = {"clean": clean, "noise": noise, "velocity": noise - clean}[self.predict]
        wrong = self.error * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return {"video": out + wrong}, {}


@pytest.mark.parametrize("predict", ["clean", "velocity", "noise"])
@pytest.mark.parametrize(("solver", "steps", "levels"), [(euler, 200, 2), (heun, 40, 2), (multistep, 60, 2), (multistep, 12, 6)])
def test_the_right_answer_leads_to_the_right_clip(predict: Prediction, solver: Any, steps: int, levels: int) -> None:
    """Where the best answer is known, so is the clip: mean + spread * noise, whatever is predicted."""
    transformer = Gaussian(PATCH, 32, 1, 2, 16)
    transformer.predict = predict
    trained = Trained(Network(WordEncoder(16, heads=2), transformer), TASKS, predict, None, 0.0)
    video = generate(trained, [request_of(seed=3)], Sampler(steps, 1.0, solver=solver))[0]
    clean = unpatchify(0.2 + 0.3 * noise_of(3, Grid(3, 2, 2), PATCH)[None], Grid(3, 2, 2), PATCH)[0]
    wanted = ((clean + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(video - wanted).max() < levels


@pytest.mark.parametrize("predict", ["clean", "velocity", "noise"])
def test_small_errors_of_the_network_stay_small(predict: Prediction) -> None:
    transformer = Gaussian(PATCH, 32, 1, 2, 16)
    transformer.predict, transformer.error = predict, 0.02
    trained = Trained(Network(WordEncoder(16, heads=2), transformer), TASKS, predict, None, 0.0)
    wrong = generate(trained, [request_of(seed=3)], Sampler(12, 1.0))[0].astype(int)
    transformer.error = 0.0
    right = generate(trained, [request_of(seed=3)], Sampler(12, 1.0))[0].astype(int)
    assert np.abs(wrong - right).mean() < 12


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "outpaint"}, "no task 'outpaint', only text_to_video.*set task"),
        ({"num_frames": 0}, "set num_frames"),
        ({"height": 9}, "height 9.*set height"),
        ({"width": 0}, "set width"),
        ({"fps": 0.0}, "set fps"),
        ({"given": frames(1)}, "takes no given frames.*set task=image_to_video"),
        ({"task": "image_to_video"}, "got 0"),
        ({"task": "image_to_video", "given": frames(2)}, "1 \\+ k \\* 2, got 2"),
        ({"task": "image_to_video", "given": frames(5)}, "set num_frames to more than 5"),
        ({"task": "image_to_video", "given": frames(1, 12, 8)}, "set height and width to theirs"),
        ({"task": "image_to_video", "given": frames(1).astype(np.float32)}, "must be uint8"),
        ({"task": "in_between", "given": frames(2)}, "3 given frames, got 2"),
        ({"task": "in_between", "given": frames(3), "num_frames": 3}, "set num_frames to a longer clip"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(trained: Trained, changes: dict, said: str) -> None:
    wrong = replace(request_of(), **changes)

    def working(*_: Any) -> torch.Tensor:
        raise AssertionError("work was done")

    with pytest.raises(ValueError, match=said):
        generate(trained, [request_of(), wrong], Sampler(3, solver=working))
    with pytest.raises(ValueError, match=said):
        check_request(wrong, trained)


@pytest.mark.parametrize(("arguments", "key"), [({"steps": 0}, "set steps"), ({"batch_size": 0}, "sampler.batch_size")])
def test_a_sampler_that_cannot_be_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps", (0, True, 2.5)),
        ("guidance", (10**400, float("nan"), None, "x")),
        ("interval", (0.5, [0, "a"], [0.5], [0.6, 0.5], [0, 10**400], "01", None)),
        ("rescale", (None, 1.5)),
        ("shift", (True, 0)),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(key: str, values: tuple) -> None:
    for value in values:
        sampler = Sampler()
        setattr(sampler, key, value)
        with pytest.raises(ValueError, match=rf"set {key} \(in training sampler.{key}\)"):
            sampler.__post_init__()
