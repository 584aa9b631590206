"""The objective: what it draws, and what the loss may depend on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_video.model.network import Network
from dit_video.objective.levels import LogitNormal, Uniform
from dit_video.objective.objective import Corrupted, Objective
from dit_video.objective.path import Prediction, target_of
from dit_video.objective.tasks import FirstFrames, InBetween, TextToVideo
from dit_video.shapes import Batch, Grid, Patch, Tokens, patchify, to_float, token_grid

PATCH = Patch(2, 4, 4)
TOKENS = Tokens(PATCH)
GRID = token_grid(5, 8, 8, PATCH)
TASKS = {
    "text_to_video": TextToVideo(),
    "image_to_video": FirstFrames(),
    "extend": FirstFrames(1, 2, 2),
    "in_between": InBetween(),
}


def objective_of(tasks: dict | None = None, levels: Any = None, **more: Any) -> Objective:
    return Objective(tasks or TASKS, levels or LogitNormal(), **more)


def batch_of(slots: list[int], num_frames: int = 5) -> Batch:
    clips = [
        torch.randint(256, (num_frames, 8, 8, 3), generator=torch.Generator().manual_seed(s), dtype=torch.uint8) for s in slots
    ]
    return Batch(torch.stack(clips), [f"clip number {s}" for s in slots], [str(s) for s in slots], torch.tensor(slots), 8.0)


def loss_of(objective: Objective, network: Callable, batch: Batch) -> Tensor:
    return objective(network, batch, TOKENS).per_clip


# --------------------------------------------------------------------------- draws


def test_draws_depend_on_seed_and_slot_alone() -> None:
    objective = objective_of(caption_dropout=0.5)
    together = objective.corrupt(batch_of([5, 0, 17, 9, 3, 8]), TOKENS)
    reordered = objective.corrupt(batch_of([3, 17, 5]), TOKENS)
    for row, there in ((0, 4), (1, 2), (2, 0)):
        for name in ("clean", "noise", "time"):
            assert torch.equal(getattr(reordered, name)[row], getattr(together, name)[there]), name
        for name in ("values", "place", "levels", "index", "given", "partial"):
            assert torch.equal(getattr(reordered.stream, name)[row], getattr(together.stream, name)[there]), name
        assert reordered.tasks[row] == together.tasks[there] and reordered.captions[row] == together.captions[there]
    other = objective_of(caption_dropout=0.5, seed=1).corrupt(batch_of([5]), TOKENS)
    assert not torch.equal(other.noise[0], together.noise[0]) and other.time[0] != together.time[0]


def test_draws_touch_no_global_state() -> None:
    batch, before = batch_of([1, 2]), torch.get_rng_state()
    objective_of().corrupt(batch, TOKENS)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_normal_and_differs_between_clips() -> None:
    corrupted = objective_of().corrupt(batch_of(list(range(200))), TOKENS)
    real = corrupted.noise[:, corrupted.real.bool()]
    assert real.mean().item() == pytest.approx(0, abs=0.02) and real.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(real[:20]).triu(1).abs().max() < 0.25


def test_captions_are_dropped_as_often_as_told() -> None:
    for share in (0.0, 0.1, 0.5):
        captions = objective_of(caption_dropout=share).corrupt(batch_of(list(range(1000)), 1), TOKENS).captions
        assert captions.count(None) / 1000 == pytest.approx(share, abs=0.03)
        assert all(caption in (None, f"clip number {slot}") for slot, caption in enumerate(captions))


def test_tokens_are_noisy_where_made_and_clean_where_given() -> None:
    batch = batch_of(list(range(40)))
    corrupted = objective_of().corrupt(batch, TOKENS)
    stream, clean = corrupted.stream, patchify(to_float(batch.video), PATCH)
    assert torch.equal(corrupted.clean, clean)
    assert torch.equal(stream.values[stream.given], clean[stream.given])
    wanted = (1 - corrupted.time[:, None, None]) * clean + corrupted.time[:, None, None] * corrupted.noise
    assert torch.allclose(stream.values[corrupted.made], wanted[corrupted.made], atol=1e-6)
    level = stream.level_per_token()
    assert not level[stream.given].any()
    assert torch.equal(level[corrupted.made], corrupted.time[:, None].expand_as(level)[corrupted.made])
    assert not stream.values[:, ~corrupted.real.bool()].any()  # before the first frame there is nothing
    frames = stream.given.unflatten(1, tuple(GRID)).flatten(2)
    assert (frames.all(2) == frames.any(2)).all()
    masks = {
        task: {tuple(frames[row, :, 0].tolist()) for row, name in enumerate(corrupted.tasks) if name == task} for task in TASKS
    }
    assert masks == {
        "text_to_video": {(False, False, False)},
        "image_to_video": {(True, False, False)},
        "extend": {(True, True, False)},
        "in_between": {(True, False, True)},
    }


def test_given_tokens_may_carry_a_little_noise() -> None:
    batch = batch_of([0, 1])
    corrupted = objective_of({"image": FirstFrames()}, given_noise=0.1).corrupt(batch, TOKENS)
    given = corrupted.stream.given
    wanted = 0.9 * corrupted.clean + 0.1 * corrupted.noise
    assert torch.allclose(corrupted.stream.values[given], wanted[given], atol=1e-6)
    assert torch.equal(corrupted.stream.level_per_token()[given], torch.full((8,), 0.1))


def test_levels_are_shifted_by_the_tokens_to_be_made() -> None:
    batch = batch_of(list(range(30)))
    plain = objective_of({"image": FirstFrames()}).corrupt(batch, TOKENS).time
    moved = objective_of({"image": FirstFrames()}, base_tokens=2).corrupt(batch, TOKENS).time
    shift = (8 / 2) ** 0.5  # 8 of 12 tokens are made
    assert torch.allclose(moved, shift * plain / (1 + (shift - 1) * plain))


def test_one_frame_is_text_to_image() -> None:
    corrupted = objective_of().corrupt(batch_of(list(range(30)), 1), TOKENS)
    assert corrupted.made.all() and corrupted.stream.partial.all()
    assert loss_of(objective_of(), Fixed(torch.zeros(2, 4, 96)), batch_of([1, 2], 1)).isfinite().all()


def test_a_fixed_time_replaces_the_drawn_one() -> None:
    corrupted = objective_of().corrupt(batch_of([1, 2]), TOKENS, time=0.3)
    assert torch.equal(corrupted.time, torch.full((2,), 0.3))
    assert torch.equal(corrupted.noise, objective_of().corrupt(batch_of([1, 2]), TOKENS).noise)


# --------------------------------------------------------------------------- the loss


def oracle(objective: Objective, batch: Batch, error: Tensor | float = 0.0) -> Callable:
    """A network whose outputs all mean the same velocity: the true one plus an error."""
    corrupted = objective.corrupt(batch, TOKENS)
    time = corrupted.stream.level_per_token().clamp(0.05, 0.95)
    target, divisor = target_of(corrupted.clean, corrupted.noise, time, objective.predict, 0.05)
    scale = torch.as_tensor(divisor).expand_as(time)[..., None]
    return lambda streams, captions, taps: ({"video": target + error * scale}, {})


@pytest.mark.parametrize("predict", ["clean", "velocity", "noise"])
def test_the_true_answer_costs_nothing(predict: Prediction) -> None:
    objective, batch = objective_of(predict=predict), batch_of(list(range(20)))
    assert loss_of(objective, oracle(objective, batch), batch).max() < 1e-9


def test_the_loss_is_the_velocity_s_whatever_is_predicted() -> None:
    batch = batch_of(list(range(20)))
    time = objective_of().corrupt(batch, TOKENS).time
    inside = (time > 0.05) & (time < 0.95)
    error = torch.randn(20, GRID.num_tokens, 96)
    losses = []
    for predict in ("clean", "velocity", "noise"):
        objective = objective_of(predict=predict)
        losses.append(loss_of(objective, oracle(objective, batch, error), batch)[inside])
    corrupted = objective_of().corrupt(batch, TOKENS)
    counted = corrupted.made[..., None] * corrupted.real
    per_token = (error.square() * counted).sum(-1) / corrupted.real.sum(-1)
    wanted = (per_token.sum(-1) / corrupted.made.sum(-1))[inside]
    assert inside.sum() > 10
    for loss in losses:
        assert torch.allclose(loss, wanted, rtol=1e-4)


class Fixed:
    """A network that answers with the same values whatever it is asked."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, streams: dict, captions: Any, taps: Any) -> tuple[dict, dict]:
        return {"video": self.values}, {}


def test_only_made_tokens_and_real_pixels_count() -> None:
    objective, batch = objective_of(), batch_of(list(range(20)))
    values = torch.randn(20, GRID.num_tokens, 96)
    corrupted = objective.corrupt(batch, TOKENS)
    wanted = loss_of(objective, Fixed(values), batch)
    changed = torch.where(corrupted.stream.given[..., None], 1e3, values)
    changed = torch.where(corrupted.real.bool(), changed, -1e3)
    assert torch.equal(loss_of(objective, Fixed(changed), batch), wanted)
    other = replace(corrupted, clean=torch.where(corrupted.stream.given[..., None], 7.0, corrupted.clean))
    assert torch.equal(objective.compare(Fixed(values), batch, other).per_clip, wanted)
    row, token, value = (corrupted.made[..., None] & corrupted.real.bool()).nonzero()[1234].tolist()
    values[row, token, value] += 1
    assert (loss_of(objective, Fixed(values), batch) != wanted).nonzero().flatten().tolist() == [row]


def test_first_frames_weigh_as_much_as_other_tokens() -> None:
    """A token of the first frame holds half as many pixels; its mean, not its sum, counts."""
    objective, batch = objective_of({"text": TextToVideo()}, predict="velocity"), batch_of([0])
    corrupted = objective.corrupt(batch, TOKENS)
    for token in (0, GRID.num_tokens - 1):
        error = torch.zeros(1, GRID.num_tokens, 96)
        error[0, token] = 1
        loss = objective.compare(Fixed(corrupted.noise - corrupted.clean + error), batch, corrupted).per_clip
        assert loss.item() == pytest.approx(1 / GRID.num_tokens, rel=1e-5)


@pytest.mark.parametrize("predict", ["clean", "velocity", "noise"])
@pytest.mark.parametrize(("time", "min_time"), [(0.0, 0.05), (1e-6, 0.05), (0.5, 0.0), (1.0, 0.05)])
def test_gradients_are_finite_at_every_time(
    make_network: Callable[..., Network], predict: Prediction, time: float, min_time: float
) -> None:
    """Given tokens stand at t = 0, where a clean answer would be divided by 0 if min_time did not bound it."""
    network, batch = make_network(), batch_of(list(range(8)))
    objective = objective_of(predict=predict, min_time=min_time)
    corrupted = objective.corrupt(batch, TOKENS, time)
    assert corrupted.stream.given.any()
    losses = objective.compare(network, batch, corrupted)
    losses.per_clip.mean().backward()
    assert losses.per_clip.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


def test_a_clip_s_loss_does_not_depend_on_its_batch(make_network: Callable[..., Network]) -> None:
    network, objective = make_network(), objective_of()
    together = loss_of(objective, network, batch_of([4, 7, 1]))
    for row, slot in enumerate((4, 7, 1)):
        assert loss_of(objective, network, batch_of([slot])).item() == pytest.approx(together[row].item(), rel=1e-4)


def test_a_network_at_its_start_has_the_loss_of_a_zero_answer(make_network: Callable[..., Network]) -> None:
    from dit_video.model.layers import initialise

    network, objective, batch = make_network(), objective_of(predict="velocity"), batch_of(list(range(10)))
    initialise(network.transformer.ends["video"], 0)
    assert torch.equal(loss_of(objective, network, batch), loss_of(objective, Fixed(torch.zeros(10, GRID.num_tokens, 96)), batch))


class Aligned(nn.Module):
    """A further loss: hidden states as near as can be to the mean colour of the clean clip."""

    weight, taps = 0.5, ("0.video",)

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(32, 1)

    def forward(self, tapped: dict[str, Tensor], batch: Batch, corrupted: Corrupted, grid: Grid) -> Tensor:
        assert tapped["0.video"].shape[1] == grid.num_tokens
        return (self.read(tapped["0.video"])[..., 0] - corrupted.clean.mean(-1)).square().mean(-1)


def test_further_losses_are_added_with_their_weight(make_network: Callable[..., Network]) -> None:
    network, batch, aligned = make_network(), batch_of([3, 4]), Aligned()
    objective = objective_of(extra={"alignment": aligned})
    plain = loss_of(objective_of(), network, batch)
    losses = objective(network, batch, TOKENS)
    assert torch.allclose(losses.velocity, plain) and losses.extra["alignment"].shape == (2,)
    assert torch.allclose(losses.per_clip, plain + 0.5 * losses.extra["alignment"])
    losses.per_clip.sum().backward()
    assert "extra.alignment.read.weight" in dict(objective.named_parameters()) and aligned.read.weight.grad.any()
    assert network.transformer.blocks[0].streams["video"].qkv.weight.grad.any()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"predict": "flow"}, "objective.predict"),
        ({"caption_dropout": 1.0}, "objective.caption_dropout"),
        ({"caption_dropout": -0.1}, "objective.caption_dropout"),
        ({"given_noise": 1.5}, "objective.given_noise"),
        ({"levels": Uniform(), "tasks": {"text": TextToVideo(0.0)}}, "objective.tasks"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict, key: str) -> None:
    with pytest.raises(Exception, match=f"set {key}" if key != "objective.predict" else "predict"):
        objective_of(**arguments)


def test_a_clip_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="set num_frames or model.patch"):
        objective_of().corrupt(batch_of([0], 4), TOKENS)
