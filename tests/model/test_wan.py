"""Wan against diffusers' own: outputs, gradients, cells, experts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wan_models import CHANNELS, HEAD_DIM, HEADS, KINDS, PATCH, TEXT_DIM, clip, ours, reference, tokens_of

from dit_video.model import attention
from dit_video.model.layers import initialise
from dit_video.model.published import published_name, to_published
from dit_video.model.wan import WanExperts, WanTransformer, given_then_grey, image_control, wrong_size
from dit_video.seeding import seeded
from dit_video.shapes import Context, Grid, Patch, Stream, cells_of, patchify, token_places

pytest.importorskip("diffusers")
GRIDS = [Grid(1, 1, 1), Grid(1, 3, 2), Grid(4, 1, 3), Grid(3, 2, 2), Grid(5, 3, 4)]


def small(image_dim: int = 0, control_channels: int = 0, text_length: int = 16) -> WanTransformer:
    return WanTransformer(
        HEADS * HEAD_DIM, 2, HEADS, 40, TEXT_DIM, CHANNELS, PATCH, control_channels, image_dim, text_length, 32
    )  # fmt: skip


def stirred(transformer: torch.nn.Module) -> torch.nn.Module:
    """The module with every parameter random, none zero as when training starts."""
    initialise(transformer, 0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=seeded(0, name, "away from zero"))
    return transformer


# --------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_and_gradients_are_those_of_diffusers(
    tmp_path: Path, kind: str, grid: Grid, record_property: Callable[[str, object], None]
) -> None:
    theirs, transformer, batch = reference(kind), ours(tmp_path, kind), clip(kind, grid)
    wanted = tokens_of(theirs(**batch.theirs())[0])
    found = transformer({"video": batch.stream}, batch.context)[0]["video"]
    far = float((found - wanted).abs().max().detach() / wanted.abs().max().detach())
    record_property("output", f"{far:.1e}")
    assert far <= 1e-5

    weight = torch.randn(wanted.shape)
    (wanted * weight).sum().backward()
    (found * weight).sum().backward()
    named = dict(theirs.named_parameters())
    rounding = 1e-7 * max(float(parameter.grad.abs().max()) for parameter in named.values())  # of gradients that are really zero
    furthest = 0.0
    for name, parameter in transformer.named_parameters():
        gradient = named[published_name(name, "diffusers")].grad
        assert gradient is not None and parameter.grad is not None
        own = to_published(name, parameter.grad, transformer)
        furthest = max(furthest, float(((own - gradient).abs().max() - rounding) / gradient.abs().max().clamp(min=1e-30)))
        assert (own - gradient).abs().max() <= 1e-4 * gradient.abs().max() + rounding, name
    record_property("gradients", f"{max(furthest, 0):.1e}")


def test_parity_does_not_depend_on_frame_rate_or_attention(tmp_path: Path) -> None:
    """The published model counts tokens, whatever they last."""
    batch = clip("t2v", Grid(4, 2, 3))
    transformer = ours(tmp_path)
    with torch.no_grad():
        wanted = transformer({"video": batch.stream}, batch.context)[0]["video"]
        slow = replace(batch.stream, place=token_places(Grid(4, 2, 3), Patch(4, 16, 16), 7.0, 3.0).expand(2, -1, -1))
        assert torch.equal(transformer({"video": slow}, batch.context)[0]["video"], wanted)
        for block in transformer.blocks:
            block.attend = attention.math
        assert torch.allclose(transformer({"video": batch.stream}, batch.context)[0]["video"], wanted, atol=1e-5)


def test_bfloat16_autocast_is_near_float32_and_leaves_modulation_alone(tmp_path: Path) -> None:
    batch, transformer = clip("ti2v", Grid(3, 2, 2)), ours(tmp_path, "ti2v")
    with torch.no_grad():
        wanted = transformer({"video": batch.stream}, batch.context)[0]["video"]
        _, table = transformer.ends["video"].modulations(batch.stream.levels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = transformer({"video": batch.stream}, batch.context)[0]["video"]
            assert torch.equal(transformer.ends["video"].modulations(batch.stream.levels)[1], table)
    assert found.dtype == torch.float32 and 0 < (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


# --------------------------------------------------------------------------- the door


@pytest.mark.parametrize("grid", [*GRIDS, Grid(21, 5, 7)])
@pytest.mark.parametrize("span", [Patch(1, 1, 1), Patch(4, 16, 16)])
def test_cells_are_counted_from_places(grid: Grid, span: Patch) -> None:
    t, h, w = (torch.arange(size) for size in grid)
    wanted = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).reshape(1, -1, 3)
    for fps, rate in ((16.0, 4.0), (23.976, 6.0), (1.0, 0.1)):
        place = token_places(grid, span, fps, rate)[None]
        assert torch.equal(cells_of(place), wanted)
        order = torch.randperm(grid.num_tokens)
        assert torch.equal(cells_of(place[:, order]), wanted[:, order])


def test_said_cells_are_taken() -> None:
    """Where a rank holds a part of a clip's tokens, they keep the cells that they have in the whole."""
    transformer, batch = stirred(small()), clip("t2v", Grid(4, 2, 3))
    some = torch.cat([torch.arange(6), torch.arange(18, 24)])  # the first frame and the last, between which two are missing
    per_token = ("values", "place", "index", "given", "partial")
    told = replace(
        batch.stream,
        **{name: getattr(batch.stream, name)[:, some] for name in per_token},
        cell=cells_of(batch.stream.place)[:, some],
    )
    with torch.no_grad():
        by_word, by_rank = (transformer({"video": x}, batch.context)[0]["video"] for x in (told, replace(told, cell=None)))
    assert not torch.allclose(by_word, by_rank, atol=1e-3)


def test_text_is_filled_up_with_zeros_that_are_looked_at() -> None:
    batch, short, long = clip("t2v", Grid(2, 2, 2)), stirred(small(text_length=12)), stirred(small(text_length=16))
    states, lengths = batch.context.states, batch.context.lengths
    with torch.no_grad():
        wanted = short({"video": batch.stream}, batch.context)[0]["video"]
        other = torch.where(torch.arange(12)[:, None] < lengths[:, None, None], states, 1e3)  # what follows a caption is not read
        assert torch.equal(short({"video": batch.stream}, Context(other, lengths))[0]["video"], wanted)
        cut = Context(torch.nn.functional.pad(states, (0, 0, 0, 9), value=1.0), lengths)
        assert torch.equal(short({"video": batch.stream}, cut)[0]["video"], wanted)
        assert not torch.allclose(long({"video": batch.stream}, batch.context)[0]["video"], wanted, atol=1e-4)


def test_equal_levels_are_one_level() -> None:
    transformer, batch = stirred(small()), clip("t2v", Grid(2, 2, 2))
    with torch.no_grad():
        wanted = transformer({"video": batch.stream}, batch.context)[0]["video"]
        table = replace(batch.stream, levels=batch.stream.levels.expand(-1, 3), index=torch.randint(3, batch.stream.index.shape))
        assert torch.allclose(transformer({"video": table}, batch.context)[0]["video"], wanted, atol=1e-5)


def test_what_a_kind_needs_is_asked_for() -> None:
    batch = clip("i2v", Grid(2, 2, 2))
    for transformer, stream, context, key in (
        (small(), batch.stream, replace(batch.context, image=None), "model.control_channels"),
        (small(control_channels=8), replace(batch.stream, control=None), replace(batch.context, image=None), "image_control"),
        (small(10, 8), batch.stream, replace(batch.context, image=None), "model.image_dim"),
        (small(0, 8), batch.stream, batch.context, "model.image_dim"),
    ):
        with pytest.raises(ValueError, match=key):
            stirred(transformer)({"video": stream}, context)


def test_taps_and_streams() -> None:
    transformer, batch = stirred(small()), clip("t2v", Grid(2, 2, 2))
    outputs, tapped = transformer({"video": batch.stream}, batch.context, ("1.video", "0.video"))
    assert sorted(tapped) == ["0.video", "1.video"] and not torch.equal(*tapped.values())
    assert torch.equal(outputs["video"], transformer({"video": batch.stream}, batch.context)[0]["video"])
    with pytest.raises(ValueError, match=r"0.video, 1.video"):
        transformer({"video": batch.stream}, batch.context, ("2.video",))
    with pytest.raises(ValueError, match="got audio"):
        transformer({"audio": batch.stream}, batch.context)


def test_it_can_start_from_nothing() -> None:
    """On the meta device, with every parameter's beginning known; its output is zero, and away from that everything learns."""
    with torch.device("meta"):
        transformer = small(image_dim=10, control_channels=8)
    initialise(transformer, 0)
    batch = clip("i2v", Grid(2, 2, 2))
    outputs = transformer({"video": batch.stream}, batch.context)[0]["video"]
    assert not outputs.any()
    learning = stirred(small(image_dim=10, control_channels=8))
    learning({"video": batch.stream}, batch.context)[0]["video"].square().sum().backward()
    for name, parameter in learning.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"width": 30}, "heads"), ({"width": 28.5}, "width"), ({"width": 1 << 40}, "width"), ({"depth": 0}, "depth"),
        ({"mlp_dim": 0}, "mlp_dim"), ({"channels": 0}, "channels"), ({"patch": (1, 2)}, "patch"), ({"patch": 2}, "patch"),
        ({"control_channels": -1}, "control_channels"), ({"text_length": -3}, "text_length"), ({"level_dim": 1}, "level_dim"),
        ({"level_dim": 33}, "level_dim"), ({"eps": "x"}, "eps"), ({"eps": 0}, "eps"), ({"reference_rate": 10**400}, "reference_rate"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_told(sizes: dict, key: str) -> None:
    fault = wrong_size({"width": 32, "depth": 1, "heads": 4, "mlp_dim": 8} | sizes)
    assert fault is not None and f"model.{key}" in fault[0]


@pytest.mark.parametrize(
    ("sizes", "key"),
    [({"width": 30}, "heads"), ({"patch": (1, 2)}, "patch"), ({"mlp_dim": 0}, "mlp_dim"), ({"level_dim": 1}, "level_dim")],
)
def test_they_are_refused(sizes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"set .*model.{key}"), torch.device("meta"):
        WanTransformer(**{"width": 32, "depth": 1, "heads": 4, "mlp_dim": 8} | sizes)


# --------------------------------------------------------------------------- images as channels


@pytest.mark.parametrize("num_given", [1, 5, 6])
def test_image_control_is_what_diffusers_makes(num_given: int) -> None:
    """Its layout, written out: of the first frame of latents all four masks say the first frame's."""
    latents = torch.randn(2, 3, 4, 6, CHANNELS)
    control = image_control(latents, num_given, PATCH)
    mask = torch.zeros(2, 9, 4, 6)
    mask[:, :num_given] = 1
    mask = torch.cat([mask[:, :1].repeat(1, 3, 1, 1), mask], dim=1).reshape(2, 3, 4, 4, 6)  # b t 4 h w
    wanted = torch.cat([mask.transpose(1, 2), latents.movedim(-1, 1)], dim=1)
    assert torch.equal(control, tokens_of(wanted))
    assert torch.equal(control, patchify(wanted.movedim(1, -1), PATCH))


def test_how_many_frames_can_be_given() -> None:
    for wrong in (0, 10):
        with pytest.raises(ValueError, match="1 to 9 can be given"):
            image_control(torch.zeros(1, 3, 4, 4, CHANNELS), wrong, PATCH)


def test_frames_that_are_not_known_are_grey() -> None:
    frames = torch.randn(2, 2, 4, 4, 3)
    video = given_then_grey(frames, 5)
    assert torch.equal(video[:, :2], frames) and video.shape[1] == 5 and not video[:, 2:].any()


# --------------------------------------------------------------------------- experts


def experts(boundary: float = 0.875) -> WanExperts:
    found = stirred(WanExperts(lambda attention: small(), boundary))
    assert isinstance(found, WanExperts)
    return found


def at_levels(levels: list[float]) -> tuple[dict[str, Stream], Context]:
    batch = clip("t2v", Grid(2, 2, 2), batch=3)
    rows = torch.arange(len(levels)) % 3
    stream = replace(batch.stream, **{name: value[rows] for name, value in vars(batch.stream).items() if value is not None})
    return {"video": replace(stream, levels=torch.tensor(levels)[:, None])}, Context(
        batch.context.states[rows], batch.context.lengths[rows]
    )


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_each_clip_goes_to_the_expert_of_its_level(boundary: float) -> None:
    """As a pipeline does at whole timesteps: those at the boundary and above are the first one's."""
    levels = [0.1, round(boundary * 1000) / 1000, 0.999, boundary - 0.001, 1.0]
    network, (streams, context) = experts(boundary), at_levels(levels)
    with torch.no_grad():
        found, tapped = network(streams, context, ("1.video",))
        for row, level in enumerate(levels):
            expert = network.high if round(level * 1000) >= boundary * 1000 else network.low
            wanted, states = expert(*at_levels(levels), ("1.video",))
            assert torch.allclose(found["video"][row], wanted["video"][row], atol=1e-5)
            assert torch.allclose(tapped["1.video"][row], states["1.video"][row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attend", [attention.sdpa, attention.math])
@pytest.mark.parametrize("level", [0.2, 0.95])
def test_an_expert_without_clips_is_called_on_none(attend: attention.Attention, level: float) -> None:
    network, calls = experts(), []
    for block in network.blocks:
        block.attend = attend
        block.register_forward_hook(lambda *_: calls.append(1))
    streams, context = at_levels([level, level])
    network(streams, context)[0]["video"].square().sum().backward()
    assert len(calls) == len(network.blocks) == 4
    for expert, used in ((network.high, level >= 0.875), (network.low, level < 0.875)):
        for name, parameter in expert.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == used, name


def test_experts_are_two_and_named_once() -> None:
    network = experts()
    assert (
        len(list(network.parameters())) == len({id(p) for p in network.parameters()}) == 2 * len(list(network.high.parameters()))
    )
    assert not torch.equal(network.high.text.out.weight, network.low.text.out.weight)
    with pytest.raises(ValueError, match="set model.boundary"):
        WanExperts(partial(small), 1.5)


def test_a_boundary_reaches_the_model_as_its_highest_level() -> None:
    network, (streams, context) = experts(), at_levels([0.5])
    stream = replace(streams["video"], levels=torch.tensor([[0.0, 0.9]]), index=torch.ones(1, 8, dtype=torch.long))
    with torch.no_grad():
        wanted = network.high({"video": stream}, context)[0]["video"]
        assert torch.equal(network({"video": stream}, context)[0]["video"], wanted)


def test_float64_stays_float64() -> None:
    transformer, batch = stirred(small()).double(), clip("t2v", Grid(2, 2, 2))

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    stream = replace(batch.stream, **{name: double(x) for name, x in vars(batch.stream).items() if x is not None})
    out = transformer({"video": stream}, Context(batch.context.states.double(), batch.context.lengths))[0]["video"]
    assert out.dtype == torch.float64
