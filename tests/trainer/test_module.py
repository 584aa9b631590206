"""One training step on real parts: a small network, the real objective, both optimisers."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_video.compose import compose, take_apart
from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Losses, Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.shapes import Batch
from dit_video.train import make_module as make_module_of
from dit_video.trainer.callbacks.saving import Saving
from dit_video.trainer.checkpoint import Keep, load, newest, opened
from dit_video.trainer.fit import Hardware, Spent, fit
from dit_video.trainer.guard import Guard, NonFiniteError
from dit_video.trainer.module import Learner, VideoDiffusion
from dit_video.trainer.optim import Optimisers

Make = Callable[..., VideoDiffusion]


def make_batch(clips: int = 6, weights: list[float] | None = None) -> Batch:
    video = torch.randint(0, 256, (clips, 3, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    captions = [f"clip number {number} moves" for number in range(clips)]
    keys = [f"00000.tar:{number:05d}" for number in range(clips)]
    return Batch(video, captions, keys, torch.arange(clips), 8.0, torch.tensor(weights or [1.0] * clips))


@pytest.fixture
def make_module(make_network: Callable[..., Any]) -> Make:
    def make(extra: dict[str, Any] | None = None, **recipe: Any) -> VideoDiffusion:
        objective = Objective({"t": TextToVideo(), "i": FirstFrames()}, LogitNormal(), extra=extra)
        return VideoDiffusion(make_network(), objective, Optimisers(warmup_clips=0, **recipe), max_clips=1000)

    return make


def one_step(module: VideoDiffusion, batch: Batch) -> dict[str, Tensor]:
    """Takes a step in full precision and gives the gradients it was taken with."""
    fit(module, iter([batch]), [], [], Hardware(precision="32-true"))
    return {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}


def state(module: VideoDiffusion) -> dict[str, Tensor]:
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    for name, optimiser in module.named_optimisers.items():
        for number, values in enumerate(optimiser.state.values()):
            weights |= {f"{name}/{number}/{key}": torch.as_tensor(value).clone() for key, value in values.items()}
    if module.learners:
        weights |= {f"ema.network.{name}": value.clone() for name, value in module.ema.named(module.decays[0]).items()}
    return weights


def started(module: VideoDiffusion) -> VideoDiffusion:
    module.prepare(None)
    return module


@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_a_batch_is_split_into_all_its_clips_in_order(parts: list[int]) -> None:
    batch = replace(make_batch(6), parts=parts)
    pieces = list(batch.micro_batches())
    assert [len(piece.captions) for piece in pieces] == parts
    assert [key for piece in pieces for key in piece.keys] == batch.keys
    assert [caption for piece in pieces for caption in piece.captions] == batch.captions
    for name in ("video", "slots", "weights"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))


@pytest.mark.parametrize("weights", [[1.0] * 6, [1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
def test_accumulating_changes_no_gradient(make_module: Make, weights: list[float]) -> None:
    batch = make_batch(6, [float(weight) for weight in weights])
    whole = one_step(make_module(), batch)
    for parts in ([3, 3], [1, 2, 3], [1] * 6):
        cut = one_step(make_module(), replace(batch, parts=parts))
        assert cut.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], atol=1e-6, rtol=1e-5)


def test_a_filler_has_no_influence(make_module: Make) -> None:
    batch = make_batch(4)
    kept = slice(0, 3)
    alone = Batch(batch.video[kept], batch.captions[kept], batch.keys[kept], batch.slots[kept], batch.fps)
    filler = replace(batch, captions=[*batch.captions[kept], ""], weights=torch.tensor([1.0, 1, 1, 0]))
    wanted, found = one_step(make_module(), alone), one_step(make_module(), filler)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_a_batch_of_fillers_is_a_finite_step(make_module: Make) -> None:
    module = make_module()
    gradients = one_step(module, make_batch(4, [0.0] * 4))
    assert not any(gradient.any() for gradient in gradients.values())
    assert module.steps == 1 and all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_clipping_bounds_the_gradient_and_the_norm_is_told(make_module: Make) -> None:
    free = make_module(clip_norm=None)
    norm = sum(float(g.square().sum()) for g in one_step(free, make_batch()).values()) ** 0.5
    assert float(free.gradient_norm) == pytest.approx(norm, rel=1e-4) and norm > 0.1
    bound = make_module(clip_norm=0.01)
    clipped = sum(float(g.square().sum()) for g in one_step(bound, make_batch()).values()) ** 0.5
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert float(bound.gradient_norm) == pytest.approx(norm, rel=1e-4)


def test_a_step_changes_the_weights_follows_with_the_average_and_counts(make_module: Make) -> None:
    module = started(make_module())
    before = state(module)
    one_step(module, make_batch())
    after = state(module)
    assert (module.steps, module.clips) == (1, 6)
    moved = [name for name in after if name.startswith("network.") and not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * sum(name.startswith("network.") for name in after)
    for name in moved:
        twin = f"ema.{name}"
        torch.testing.assert_close(after[twin], before[twin].lerp(after[name], 0.9))


def test_a_start_is_the_same_whatever_device_is_the_default() -> None:
    """Lightning makes the GPU the default while a module is laid out; numbers are drawn on the CPU all the same."""
    words = ("model=tiny", "model.width=32", "model.depth=1", "model.heads=2", "data.shards=nowhere.tar")
    config = compose("train", take_apart(words))
    wanted = state(started(make_module_of(config, None, Hardware())))
    other = make_module_of(config, None, Hardware())
    with torch.device("meta"):
        other.prepare(None)
    found = state(other)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Poison(nn.Module):
    """A further loss that is not a number for one clip."""

    weight, taps = 1.0, ()

    def __init__(self, slot: int, value: float) -> None:
        super().__init__()
        self.slot, self.value = slot, value

    def forward(self, tapped: Any, batch: Batch, corrupted: Any, grid: Any) -> Tensor:
        return torch.where(batch.slots == self.slot, self.value, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [[6], [2, 4]])
def test_a_step_whose_loss_is_no_number_is_left_out(make_module: Make, value: float, parts: list[int]) -> None:
    module = started(make_module(extra={"poison": Poison(4, value)}))
    before = state(module)
    one_step(module, replace(make_batch(6), parts=parts))
    assert module.skipped is not None and f"the loss is {value}" in module.skipped.reason and module.skipped.step == 0
    bad = [key for key, loss in module.skipped.clips.items() if not math.isfinite(loss)]
    assert bad == ["00000.tar:00004"] and len(module.skipped.clips) == 6
    after = state(module)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (module.steps, module.clips) == (1, 6)  # its clips are not asked for again
    assert not module.losses


def test_a_step_whose_gradient_is_no_number_is_left_out_too(make_module: Make) -> None:
    module = started(make_module())
    module.network.transformer.ends["video"].given.register_hook(lambda gradient: gradient * torch.nan)
    before = state(module)
    one_step(module, make_batch())
    assert module.skipped is not None and module.skipped.reason == "the gradient norm is nan"
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())


def test_steps_left_out_in_a_row_stop_the_run_and_a_sound_one_between_does_not(make_module: Make) -> None:
    module = make_module(extra={"poison": Poison(4, float("nan"))}, max_skips=2)
    bad = make_batch(6)
    good = replace(bad, slots=bad.slots + 100)
    fit(module, iter([bad, good, bad, good]), [], [], Hardware(precision="32-true"))
    assert (module.steps, module.guard.seen) == (4, 2)
    module = started(make_module(extra={"poison": Poison(4, float("nan"))}, max_skips=2))
    before = state(module)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row .* is 1: the loss is nan; clips: 00000.tar:00004; the weights"):
        fit(module, iter([bad, bad, good]), [], [], Hardware(precision="32-true"))
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())


def test_a_spike_is_a_norm_far_above_the_running_one() -> None:
    guard = Guard(spike=10.0, in_a_row=3)
    assert guard.problem(1.0, 500.0) is None  # nothing is known yet
    for step in range(300):
        assert guard.problem(1.0, 1.0 + 0.1 * (step % 3)) is None
    told = guard.problem(1.0, 30.0)
    assert told is not None and "the gradient norm is 30" in told and "times its running mean" in told and guard.row == 1
    state = guard.state()
    assert guard.problem(1.0, 5.0) is None and guard.row == 0
    other = Guard(spike=10.0)
    other.restore(state)
    assert other.state() == state and other.problem(1.0, 30.0) == told
    assert Guard().problem(1.0, 1e30) is None  # by default only what is no number


# ------------------------------------------------------------------ several learners


class WithCritic(VideoDiffusion):
    """A toy of adversarial training: a critic tells clean from predicted, the network also learns to please it; a teacher is frozen."""

    def __init__(self, *arguments: Any, critic: nn.Module, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.critic = critic
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def trained_parts(self) -> dict[str, nn.Module]:
        return super().trained_parts() | {"critic": self.critic}

    def make_learners(self) -> dict[str, Learner]:
        recipe = Optimisers(muon_lr=None, adamw_lr=1e-2, warmup_clips=0)
        return super().make_learners() | {"critic": self.learner(recipe, critic=self.critic)}

    def training_step(self, batch: Batch, number: int) -> Tensor:
        def judged(part: Batch, network: Any) -> Tensor:
            corrupted = self.objective.corrupt(part, self.network.tokens)
            outputs, _ = network({"video": corrupted.stream}, corrupted.captions, ())
            return self.critic(outputs["video"].mean(1)).squeeze(-1)

        def please(part: Batch) -> Losses:
            losses = self.objective(self.network, part, self.network.tokens)
            return replace(losses, per_clip=losses.per_clip - 0.1 * judged(part, self.network))

        def tell(part: Batch) -> Losses:
            with torch.no_grad():
                losses = self.objective(self.network, part, self.network.tokens)
            return replace(losses, per_clip=judged(part, self.network).sigmoid() - judged(part, self.teacher).sigmoid())

        return self.take_step(batch, {"network": please, "critic": tell})


def make_critic() -> nn.Module:
    from dit_video.model.layers import linear

    with torch.device("meta"):
        return nn.Sequential(linear(96, 8, std=0.1), nn.SiLU(), linear(8, 1, std=0.1))


def test_two_learners_and_a_frozen_teacher_train_together_and_come_back(make_network: Callable[..., Any], tmp_path: Path) -> None:
    """Each moves by its own loss alone, a step that is not sound for one is left out for both, and all of it is in the checkpoint."""

    def make() -> WithCritic:
        objective = Objective({"t": TextToVideo()}, LogitNormal())
        return WithCritic(make_network(), objective, Optimisers(warmup_clips=0), 1000, critic=make_critic())

    def run(module: WithCritic, batches: list[Batch], saving: Saving) -> None:
        fit(module, iter(batches), [saving], [], Hardware(precision="32-true"))

    batches = [replace(make_batch(4), slots=torch.arange(4) + 4 * step) for step in range(6)]
    straight, teacher = make(), None
    run(straight, batches, Saving(0, tmp_path / "straight", Keep(), None, Spent()))
    assert list(straight.named_optimisers) == ["adamw", "muon", "critic-adamw"]
    teacher = dict(make().teacher.named_parameters())
    assert all(torch.equal(p, teacher[name]) for name, p in straight.teacher.named_parameters())

    first, second = make(), make()
    run(first, batches[:3], Saving(0, tmp_path / "cut", Keep(), None, Spent()))
    saved = opened(newest(tmp_path / "cut"))  # type: ignore[arg-type]
    assert {"network", "critic", "ema", "optimiser-adamw", "optimiser-muon", "optimiser-critic-adamw"} == set(saved.groups)
    run(second, batches[3:], Saving(0, tmp_path / "cut", Keep(), saved, Spent()))
    wanted, found = (load(newest(tmp_path / name)).tensors for name in ("straight", "cut"))  # type: ignore[arg-type]
    assert {group: list(values) for group, values in wanted.items()} == {group: list(values) for group, values in found.items()}
    for group, values in wanted.items():
        assert all(torch.equal(value, found[group][name]) for name, value in values.items())

    alone = make_network()  # the network's gradient knows nothing of the critic's own loss
    module = make()
    module.prepare(None)
    with module._alone(module.learners["critic"]):
        assert not any(p.requires_grad for p in module.network.parameters())
    assert all(p.requires_grad for p in module.network.parameters()) and not any(
        p.requires_grad for p in module.teacher.parameters()
    )
    assert alone.state_dict().keys() == module.network.state_dict().keys()

    sick = make()
    sick.prepare(None)
    before = state(sick)
    sick.critic.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    fit(sick, iter(batches[:1]), [], [], Hardware(precision="32-true"))
    assert sick.skipped is not None and all(torch.equal(value, before[name]) for name, value in state(sick).items())
