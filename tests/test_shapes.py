"""The contract: patches, the frame rule, places, and pixels."""

import pytest
import torch
from torch.utils._pytree import tree_map

from dit_video.shapes import (
    Batch,
    Context,
    Grid,
    Patch,
    Stream,
    patchify,
    real_slots,
    to_float,
    to_uint8,
    token_grid,
    token_places,
    unpatchify,
    valid_frames,
)

PATCHES = [Patch(1, 1, 1), Patch(1, 2, 2), Patch(2, 4, 2), Patch(3, 2, 4), Patch(4, 8, 8)]


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_round_trip_at_valid_lengths(patch: Patch, channels: int) -> None:
    for steps in (0, 1, 3):
        num_frames, height, width = 1 + steps * patch.t, 2 * patch.h, 3 * patch.w
        video = torch.randn(2, num_frames, height, width, channels)
        grid = token_grid(num_frames, height, width, patch)
        tokens = patchify(video, patch)
        assert grid == (1 + steps, 2, 3)
        assert tokens.shape == (2, grid.num_tokens, patch.t * patch.h * patch.w * channels)
        assert torch.equal(unpatchify(tokens, grid, patch), video)


@pytest.mark.parametrize("patch", PATCHES)
def test_other_lengths_go_to_the_next_valid_one(patch: Patch) -> None:
    for num_frames in range(1, 20):
        longer = valid_frames(num_frames, patch.t)
        assert num_frames <= longer < num_frames + patch.t
        assert valid_frames(longer, patch.t) == longer
        assert token_grid(longer, patch.h, patch.w, patch).t == 1 + (longer - 1) // patch.t
        if longer != num_frames:
            with pytest.raises(ValueError, match=rf"{num_frames} frames.* {longer}; set num_frames"):
                patchify(torch.zeros(1, num_frames, patch.h, patch.w, 3), patch)


def test_sizes_that_do_not_fit_are_refused_with_the_key_to_change() -> None:
    for size, key in (((0, 8, 8), "num_frames"), ((-3, 8, 8), "num_frames"), ((3, 12, 8), "height"), ((3, 8, 0), "width")):
        with pytest.raises(ValueError, match=f"set {key}"):
            token_grid(*size, Patch(2, 8, 8))
    with pytest.raises(ValueError, match="num_frames=0"):
        valid_frames(0, 2)


def test_a_token_holds_one_block_of_space_and_time() -> None:
    patch, video = Patch(2, 4, 4), torch.zeros(1, 5, 8, 12, 3)
    video[0, 3:5, 4:8, 8:12] = torch.randn(2, 4, 4, 3)  # the third token frame, second row, third column
    tokens = patchify(video, patch)[0]
    grid = token_grid(5, 8, 12, patch)
    touched = tokens.any(dim=1).nonzero().flatten().tolist()
    assert touched == [2 * grid.h * grid.w + 1 * grid.w + 2]
    assert torch.equal(tokens[touched[0]], video[0, 3:5, 4:8, 8:12].flatten())


@pytest.mark.parametrize("patch", PATCHES)
def test_the_first_frame_fills_its_tokens_alone(patch: Patch) -> None:
    video = torch.randn(1, 1 + 2 * patch.t, 2 * patch.h, patch.w, 3)
    grid = token_grid(*video.shape[1:4], patch)
    tokens = patchify(video, patch)
    first = grid.h * grid.w
    assert torch.equal(tokens[:, :first], patchify(video[:, :1], patch))
    slots = tokens.unflatten(2, (patch.t, -1))
    real = real_slots(grid, patch)
    assert real.shape == (grid.num_tokens, patch.t)
    assert not slots[0][real == 0].any() and slots[0][real == 1].all()
    assert real.sum().item() == video.shape[1] * first


def test_places_are_centred_in_space_and_seconds_in_time() -> None:
    patch, fps, rate = Patch(2, 8, 8), 8.0, 4.0
    grid = Grid(5, 4, 6)
    places = token_places(grid, patch, fps, rate).unflatten(0, tuple(grid))
    assert places.shape == (*grid, 3)
    assert torch.allclose(places[..., 1:].sum((0, 1, 2)), torch.zeros(2))
    assert torch.equal(places[0, :, 0, 1], torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    assert torch.equal(places[0, 0, :, 2].diff(), torch.ones(5))
    # The first token's span is its one frame, [0, 1/8) s; the second's is the frames 1 and 2, [1/8, 3/8) s.
    assert torch.allclose(places[:, 0, 0, 0], rate * torch.tensor([1 / 16, 2 / 8, 4 / 8, 6 / 8, 8 / 8]))
    assert torch.allclose(places[1:, 0, 0, 0].diff(), torch.ones(3))


@pytest.mark.parametrize("patch", PATCHES)
def test_a_moment_has_the_same_place_at_every_frame_rate(patch: Patch) -> None:
    slow = token_places(Grid(4, 1, 1), patch, 6.0, 4.0)[:, 0]
    fast = token_places(Grid(4, 1, 1), patch, 12.0, 4.0)[:, 0]
    assert torch.allclose(slow, 2 * fast)
    longer = token_places(Grid(9, 1, 1), patch, 6.0, 4.0)[:, 0]
    assert torch.equal(longer[:4], slow)  # a longer clip begins as the shorter one
    wider = token_places(Grid(1, 1, 7), patch, 6.0, 4.0)[:, 2]
    assert torch.equal(wider[1:-1], token_places(Grid(1, 1, 5), patch, 6.0, 4.0)[:, 2])


def test_a_rate_that_cannot_be_is_refused() -> None:
    for fps, rate in ((0.0, 4.0), (8.0, -1.0)):
        with pytest.raises(ValueError, match="set fps or model.reference_rate"):
            token_places(Grid(1, 1, 1), Patch(1, 1, 1), fps, rate)


def test_levels_per_token() -> None:
    levels, index = torch.tensor([[0.0, 0.5], [0.1, 0.9]]), torch.tensor([[0, 1, 1], [1, 0, 1]])
    known = torch.zeros(2, 3, dtype=torch.bool)
    stream = Stream(torch.zeros(2, 3, 4), torch.zeros(2, 3, 3), levels, index, known, known)
    assert torch.equal(stream.level_per_token(), torch.tensor([[0.0, 0.5, 0.5], [0.9, 0.1, 0.9]]))


def test_pixels_come_back_exactly_and_are_clipped() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = to_float(every)
    assert values[0] == -1 and values[-1] == 1
    assert torch.equal(to_uint8(values), every)
    assert torch.equal(to_uint8(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_a_batch_counts_every_clip_unless_told() -> None:
    batch = Batch(torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8), ["a", "b"], ["x", "y"], torch.tensor([0, 1]), 8.0)
    assert torch.equal(batch.weights, torch.ones(2))
    moved = Batch(batch.video, batch.captions, batch.keys, batch.slots, 8.0, torch.tensor([1.0, 0.0])).to("cpu")
    assert torch.equal(moved.weights, torch.tensor([1.0, 0.0])) and moved.captions == ["a", "b"]


def test_tensors_of_what_goes_through_blocks_are_found() -> None:
    """FSDP2 looks for them in trees, to gather weights again before their gradients are worked out."""
    context = Context(torch.zeros(1, 2, 3), torch.tensor([2]), torch.zeros(1, 3))
    flags = torch.zeros(1, 4, dtype=torch.bool)
    stream = Stream(torch.zeros(1, 4, 5), torch.zeros(1, 4, 3), torch.zeros(1, 1), flags.long(), flags, flags)
    more = tree_map(lambda x: x + 1 if isinstance(x, torch.Tensor) and x.is_floating_point() else x, {"it": (context, [stream])})
    context, (stream,) = more["it"]
    assert isinstance(context, Context) and context.image is None and context.lengths.item() == 2
    assert isinstance(stream, Stream) and stream.control is None and not stream.given.any()
    assert all((x == 1).all() for x in (context.states, context.pooled, stream.values, stream.place, stream.levels))
