"""The transformer: what its outputs may depend on, and what they must not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dit_video.model import attention
from dit_video.model.layers import initialise
from dit_video.model.network import Network
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import StreamSpec, VideoTransformer, mlp_dim
from dit_video.seeding import seeded
from dit_video.shapes import Context, Grid, Patch, Stream, real_slots, token_grid, token_places

PATCH = Patch(2, 4, 4)
GRID = token_grid(5, 8, 12, PATCH)
CAPTIONS = ["a small red circle moves left", None, "blue"]
TEXT = pytest.mark.parametrize("text", ["joint", "cross"])

Make = Callable[..., Network]


def stream_of(batch: int = 3, num_levels: int = 2, seed: int = 0, grid: Grid = GRID, token_dim: int = 96) -> Stream:
    generator = seeded(seed)
    index = torch.randint(num_levels, (batch, grid.num_tokens), generator=generator)
    return Stream(
        torch.randn(batch, grid.num_tokens, token_dim, generator=generator),
        token_places(grid, PATCH, 8.0, 4.0).expand(batch, -1, -1),
        torch.rand(batch, num_levels, generator=generator),
        index,
        index == 0,
        (real_slots(grid, PATCH)[:, 0] == 0).expand(batch, -1),
    )


PER_TOKEN = ("values", "place", "index", "given", "partial")


def cut(stream: Stream, part: slice | tuple, names: tuple[str, ...]) -> Stream:
    return replace(stream, **{name: getattr(stream, name)[part] for name in names})


def out_of(network: Network, stream: Stream, captions: list = CAPTIONS) -> torch.Tensor:
    with torch.no_grad():
        return network({"video": stream}, captions)[0]["video"]


# --------------------------------------------------------------------------- at the start of training


@TEXT
def test_it_starts_at_zero(text: str) -> None:
    network = Network(WordEncoder(16, heads=2), VideoTransformer(PATCH, 32, 2, 2, 16, text=text, pooled_dim=16))  # type: ignore[arg-type]
    initialise(network, 0)
    stream = stream_of()
    outputs, tapped = network({"video": stream}, CAPTIONS, ("0.video", "1.video"))
    assert outputs["video"].shape == stream.values.shape and not outputs["video"].any()
    entered = network.transformer.ends["video"].enter(stream)
    for states in tapped.values():  # every block is the identity
        assert torch.equal(states, entered)


@TEXT
def test_every_parameter_learns(make_network: Make, text: str) -> None:
    network = make_network(text=text, control_dim=3)
    stream = replace(stream_of(), control=torch.randn(3, GRID.num_tokens, 3))
    network({"video": stream}, CAPTIONS)[0]["video"].square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# --------------------------------------------------------------------------- what must not matter


@TEXT
def test_a_clip_does_not_depend_on_its_batch(make_network: Make, text: str) -> None:
    network, stream = make_network(text=text), stream_of()
    together = out_of(network, stream)
    for row in range(3):
        alone = out_of(network, cut(stream, slice(row, row + 1), (*PER_TOKEN, "levels")), CAPTIONS[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5)


@TEXT
def test_tokens_have_no_order(make_network: Make, text: str) -> None:
    network, stream = make_network(text=text), stream_of()
    order = torch.randperm(GRID.num_tokens)
    shuffled = out_of(network, cut(stream, (slice(None), order), PER_TOKEN))
    assert torch.allclose(shuffled, out_of(network, stream)[:, order], atol=1e-5)


def test_only_offsets_of_places_matter(make_network: Make) -> None:
    """In cross-attention to the text; among joint keys the words stand at the place (0, 0, 0)."""
    network, stream = make_network(text="cross"), stream_of()
    moved = replace(stream, place=stream.place + torch.tensor([5.0, -2.0, 1.0]))
    assert torch.allclose(out_of(network, moved), out_of(network, stream), atol=1e-4)
    stretched = replace(stream, place=stream.place * 1.5)
    assert not torch.allclose(out_of(network, stretched), out_of(network, stream), atol=1e-2)


def test_attention_functions_agree(make_network: Make) -> None:
    stream = stream_of()
    one, other = (out_of(make_network(attention=attend), stream) for attend in (attention.sdpa, attention.math))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_table_of_equal_levels_is_one_level(make_network: Make) -> None:
    network, stream = make_network(), stream_of(num_levels=1)
    wanted = out_of(network, stream)
    for num_levels in (2, 5):
        index = torch.randint(num_levels, stream.index.shape)
        table = replace(stream, levels=stream.levels.expand(-1, num_levels), index=index)
        assert torch.allclose(out_of(network, table), wanted, atol=1e-5)
    unused = replace(stream, levels=torch.cat([torch.rand(3, 1), stream.levels], dim=1), index=torch.ones_like(stream.index))
    assert torch.allclose(out_of(network, unused), wanted, atol=1e-5)


def test_words_past_the_length_are_never_looked_at(make_network: Make) -> None:
    for text in ("joint", "cross"):
        network, stream = make_network(text=text).transformer, stream_of()
        states, lengths = torch.randn(3, 6, 16), torch.tensor([6, 1, 3])
        other = torch.where(torch.arange(6)[:, None] < lengths[:, None, None], states, 1e3)
        with torch.no_grad():
            one, two = (network({"video": stream}, Context(s, lengths, torch.ones(3, 16)))[0]["video"] for s in (states, other))
        assert torch.allclose(one, two, atol=1e-5)


# --------------------------------------------------------------------------- what must matter


@TEXT
def test_everything_told_matters(make_network: Make, text: str) -> None:
    network, stream = make_network(text=text, pooled_dim=0), stream_of()
    plain = out_of(network, stream)
    changes = {
        "values": replace(stream, values=stream.values + 0.1),
        "levels": replace(stream, levels=(stream.levels + 0.3) % 1),
        "index": replace(stream, index=1 - stream.index),
        "given": replace(stream, given=~stream.given),
        "partial": replace(stream, partial=~stream.partial),
    }
    for name, changed in changes.items():
        difference = (out_of(network, changed) - plain).abs().amax(dim=(1, 2))
        assert (difference > 1e-3).all(), name
    told = out_of(network, stream, ["a large green square", "a triangle", "blue blue"])
    assert ((told - plain).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_pooled_text_alone_reaches_the_modulation(make_network: Make) -> None:
    network, stream = make_network().transformer, stream_of()
    states, lengths = torch.zeros(3, 1, 16), torch.ones(3, dtype=torch.long)
    with torch.no_grad():
        one, two = (network({"video": stream}, Context(states, lengths, pooled))[0]["video"] for pooled in torch.randn(2, 3, 16))
    assert not torch.allclose(one, two, atol=1e-3)


def test_every_token_sees_every_other(make_network: Make) -> None:
    network, stream = make_network(depth=1), stream_of(batch=1)
    values = stream.values.clone().requires_grad_()
    out = network({"video": replace(stream, values=values)}, ["red"])[0]["video"]
    for token in (0, GRID.num_tokens - 1):
        (grad,) = torch.autograd.grad(out[0, token].sum(), values, retain_graph=True)
        assert grad[0].abs().sum(-1).min() > 0


def test_a_level_touches_the_modulation_of_its_own_tokens(make_network: Make) -> None:
    network, stream = make_network(depth=1), stream_of(batch=1)
    end = network.transformer.ends["video"]
    before = end.levels(stream, None)
    after = end.levels(replace(stream, levels=stream.levels + torch.tensor([[0.0, 0.1]])), None)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])


def test_control_starts_silent_and_needs_an_input(make_network: Make) -> None:
    control = torch.randn(3, GRID.num_tokens, 3)
    network, stream = make_network(control_dim=3), stream_of()
    plain = out_of(network, stream)
    assert not torch.allclose(out_of(network, replace(stream, control=control)), plain, atol=1e-3)
    initialise(network.transformer.ends["video"], 0)
    assert torch.equal(out_of(network, replace(stream, control=control)), out_of(network, stream))
    with pytest.raises(ValueError, match="set model.control_dim"):
        out_of(make_network(), replace(stream, control=control))


# --------------------------------------------------------------------------- other shapes, taps, streams


@TEXT
@pytest.mark.parametrize("size", [(1, 4, 4), (1, 8, 8), (9, 4, 12), (3, 16, 8)])
def test_any_grid(make_network: Make, text: str, size: tuple[int, int, int]) -> None:
    grid = token_grid(*size, PATCH)
    out = out_of(make_network(text=text), stream_of(grid=grid))
    assert out.shape == (3, grid.num_tokens, 96) and out.isfinite().all()


def test_taps_give_states_and_leave_outputs_alone(make_network: Make) -> None:
    network, stream = make_network(), stream_of()
    outputs, tapped = network({"video": stream}, CAPTIONS, ("0.video", "1.video"))
    assert list(tapped) == ["0.video", "1.video"] and all(states.shape == (3, GRID.num_tokens, 32) for states in tapped.values())
    assert not torch.equal(*tapped.values())
    assert torch.equal(outputs["video"], network({"video": stream}, CAPTIONS)[0]["video"])
    tapped["0.video"].sum().backward()
    assert network.transformer.blocks[0].streams["video"].mlp.down.weight.grad.any()
    for wrong in ("2.video", "0.audio", "-1.video", "video", "10.video"):
        with pytest.raises(ValueError, match=r"0.video, 1.video"):
            network({"video": stream}, CAPTIONS, (wrong,))


def audio_of(batch: int = 3) -> Stream:
    place = torch.cat([torch.arange(6)[:, None] / 3, torch.zeros(6, 2)], dim=1).expand(batch, -1, -1)
    marks = (torch.arange(6) % 2 == 0).expand(batch, -1)
    return Stream(torch.randn(batch, 6, 10), place, torch.rand(batch, 1), torch.zeros(batch, 6, dtype=torch.long), marks, ~marks)


@TEXT
def test_two_streams_of_different_widths_meet(make_network: Make, text: str) -> None:
    network = make_network(text=text, other_streams={"audio": StreamSpec(token_dim=10, width=24)})
    video, audio = stream_of(), audio_of()
    outputs, tapped = network({"video": video, "audio": audio}, CAPTIONS, ("1.audio", "0.video"))
    assert outputs["video"].shape == video.values.shape and outputs["audio"].shape == audio.values.shape
    assert tapped["1.audio"].shape == (3, 6, 24) and tapped["0.video"].shape == (3, GRID.num_tokens, 32)

    sound = audio.values.clone().requires_grad_()  # each stream hears the other
    heard = network({"video": video, "audio": replace(audio, values=sound)}, CAPTIONS)[0]["video"]
    heard.square().sum().backward()
    assert sound.grad is not None and sound.grad.abs().sum(-1).min() > 0
    network.zero_grad()
    sum(out.square().sum() for out in outputs.values()).backward()  # type: ignore[union-attr]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_streams_may_come_in_any_order(make_network: Make) -> None:
    seen = []

    def attend(query, key, value, places=None, lengths=None):  # type: ignore[no-untyped-def]
        seen.append(places)
        return attention.sdpa(query, key, value, places, lengths)

    network = make_network(other_streams={"audio": StreamSpec(10, 24)}, attention=attend)
    video, audio = stream_of(), audio_of()
    with torch.no_grad():
        one, _ = network({"video": video, "audio": audio}, CAPTIONS)
        two, _ = network({"audio": audio, "video": video}, CAPTIONS)
    assert torch.equal(one["video"], two["video"]) and torch.equal(one["audio"], two["audio"])
    assert all(torch.equal(places, torch.cat([video.place, audio.place], dim=1)) for places in seen)


def test_attention_gets_places_of_its_queries(make_network: Make) -> None:
    """A pattern of one's own is one function: here tokens look at their own frame only, so other frames cannot reach it."""

    def per_frame(query, key, value, places=None, lengths=None):  # type: ignore[no-untyped-def]
        n = query.shape[2]
        same = places[:, :, None, 0] == places[:, None, :, 0]
        same = torch.nn.functional.pad(same, (0, key.shape[2] - n), value=True)
        same &= attention.key_mask(lengths, key.shape[2])[:, 0]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=same[:, None])

    network, stream = make_network(attention=per_frame), stream_of()
    changed = replace(stream, values=stream.values.clone())
    changed.values[:, : GRID.h * GRID.w] += 1
    one, two = out_of(network, stream), out_of(network, changed)
    assert torch.equal(one[:, GRID.h * GRID.w :], two[:, GRID.h * GRID.w :])
    assert not torch.allclose(one[:, : GRID.h * GRID.w], two[:, : GRID.h * GRID.w], atol=1e-3)


def test_bfloat16_autocast_is_near_float32(make_network: Make) -> None:
    network, stream = make_network(attention=attention.math), stream_of()
    wanted = out_of(network, stream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = out_of(network, stream)
    assert out.dtype == torch.float32
    assert (out - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"width": 30, "heads": 4}, "model.heads"),
        ({"depth": 0}, "model.depth"),
        ({"patch": (2, 4)}, "model.patch"),
        ({"patch": (0, 4, 4)}, "model.patch"),
        ({"heads": 32}, "model.heads"),
        ({"head_dim": 15}, "model.heads"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"set .*{key}"), torch.device("meta"):
        VideoTransformer(**{"patch": PATCH, "width": 32, "depth": 2, "heads": 2, "context_dim": 16} | sizes)


def test_head_dim_is_free_of_width(make_network: Make) -> None:
    out = out_of(make_network(head_dim=12), stream_of())
    assert out.shape == (3, GRID.num_tokens, 96)


def test_mlp_costs_what_a_plain_one_does() -> None:
    for width in (128, 768, 5120):
        assert mlp_dim(width, 4.0) % 32 == 0
        assert 3 * mlp_dim(width, 4.0) == pytest.approx(2 * 4 * width, rel=0.05)
