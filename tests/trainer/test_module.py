"""One training step on real parts: a small network, the real objective, both optimisers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_video.objective.levels import LogitNormal
from dit_video.objective.objective import Objective
from dit_video.objective.tasks import FirstFrames, TextToVideo
from dit_video.shapes import Batch
from dit_video.trainer.fit import Hardware, fit
from dit_video.trainer.module import NonFiniteError, VideoDiffusion
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
    return weights


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
    module = make_module()
    before = state(module)
    one_step(module, make_batch())
    after = state(module)
    assert (module.steps, module.clips) == (1, 6)
    moved = [name for name in after if name.startswith("network.") and not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * sum(name.startswith("network.") for name in after)
    for name in moved:
        twin = f"ema.{name}"
        torch.testing.assert_close(after[twin], before[twin].lerp(after[name], 0.9))


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
def test_a_loss_that_is_no_number_stops_before_the_weights_change(make_module: Make, value: float, parts: list[int]) -> None:
    module = make_module(extra={"poison": Poison(4, value)})
    before = state(module)
    with pytest.raises(NonFiniteError, match=r"the loss of step 0 is not finite; clips: 00000.tar:00004; the weights were not"):
        one_step(module, replace(make_batch(6), parts=parts))
    after = state(module)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (module.steps, module.clips) == (0, 0)


def test_a_gradient_that_is_no_number_stops_too(make_module: Make) -> None:
    module = make_module()
    module.network.transformer.ends["video"].given.register_hook(lambda gradient: gradient * torch.nan)
    before = state(module)
    with pytest.raises(NonFiniteError, match="the gradient of step 0 is not finite; clips: 00000.tar:00000, 00000.tar:00001,"):
        one_step(module, make_batch())
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
