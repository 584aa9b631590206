"""Costs against torch's own flop counter, and against counting."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_video.model import attention
from dit_video.model.cost import IMAGE_STATES, TRAINING, flops_by_part, parameters_by_part
from dit_video.model.layers import initialise
from dit_video.model.network import Network
from dit_video.model.pretrained_text import Several
from dit_video.model.text import WordEncoder
from dit_video.model.transformer import StreamSpec, VideoTransformer
from dit_video.model.wan import WanExperts, WanTransformer
from dit_video.shapes import Grid, Stream

CAPTIONS = ["a small red circle moves left", "blue circle"]  # 6 words and 2

Make = Callable[..., Network]


def stream_of(num_tokens: int, token_dim: int, num_levels: int, device: str) -> Stream:
    marks = torch.zeros(2, num_tokens, dtype=torch.bool, device=device)
    index = torch.zeros(2, num_tokens, dtype=torch.long, device=device)
    values, place = (torch.zeros(2, num_tokens, size, device=device) for size in (token_dim, 3))
    return Stream(values, place, torch.zeros(2, num_levels, device=device), index, marks, marks)


@pytest.mark.parametrize("text", ["joint", "cross"])
@pytest.mark.parametrize("num_levels", [1, 2, 5])
@pytest.mark.parametrize("attend", [attention.sdpa, attention.math])
def test_flops_are_those_that_torch_counts(make_network: Make, text: str, num_levels: int, attend: Callable) -> None:
    network = make_network(text=text, attention=attend, head_dim=12).to("meta")
    grid = Grid(3, 2, 5)
    with FlopCounterMode(display=False) as counter:
        network({"video": stream_of(grid.num_tokens, 96, num_levels, "meta")}, CAPTIONS)
    assert sum(flops_by_part(network, grid, 2, 6, num_levels).values()) == counter.get_total_flops()


def test_flops_of_layers_over_states(make_network: Make) -> None:
    network = make_network()
    network.text = Several({"words": WordEncoder(24, heads=2)}, 16, 24, depth=2)
    network.transformer = make_network(pooled_dim=24).transformer
    initialise(network.text, 0)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network({"video": stream_of(30, 96, 2, "cpu")}, CAPTIONS)
    assert sum(flops_by_part(network, Grid(3, 2, 5), 2, 6, 2).values()) == counter.get_total_flops()


def test_flops_of_two_streams_and_a_control(make_network: Make) -> None:
    network = make_network(other_streams={"audio": StreamSpec(10, 24)}, control_dim=3)
    video, audio = stream_of(12, 96, 1, "cpu"), stream_of(7, 10, 1, "cpu")
    video.control = torch.zeros(2, 12, 3)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network({"video": video, "audio": audio}, CAPTIONS)
    assert sum(flops_by_part(network, Grid(3, 2, 2), 2, 6, 1, {"audio": 7}).values()) == counter.get_total_flops()


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("image_dim", [0, 12])
@pytest.mark.parametrize("experts", [False, True])
def test_flops_of_wan(num_levels: int, image_dim: int, experts: bool) -> None:
    """Of two experts a clip goes through one; both are in memory."""
    one = partial(WanTransformer, 24, 2, 2, 40, 16, 4, text_length=9, level_dim=16, image_dim=image_dim, control_channels=8)
    network = Network(WordEncoder(16, heads=2), WanExperts(one, 0.5) if experts else one())
    initialise(network, 0)
    grid, counts = Grid(3, 2, 5), parameters_by_part(network)
    assert "other" not in counts and sum(counts.values()) == sum(p.numel() for p in network.parameters())
    stream = replace(stream_of(grid.num_tokens, 16, num_levels, "cpu"), control=torch.zeros(2, 30, 32))
    image = torch.zeros(2, IMAGE_STATES, 12) if image_dim else None
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network.transformer({"video": stream}, replace(network.text(CAPTIONS), image=image))
    assert sum(flops_by_part(network, grid, 2, 6, num_levels).values()) == counter.get_total_flops()


def test_training_costs_about_three_forwards() -> None:
    with torch.device("meta"):
        network = Network(WordEncoder(64), VideoTransformer((1, 2, 2), 256, 4, 2, 64, channels=16, attention=attention.math))
    grid = Grid(4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        network({"video": stream_of(grid.num_tokens, 64, 2, "meta")}, CAPTIONS)[0]["video"].sum().backward()
    assert counter.get_total_flops() == pytest.approx(TRAINING * sum(flops_by_part(network, grid, 2, 6).values()), rel=0.01)


def test_every_parameter_belongs_to_a_part(make_network: Make) -> None:
    for sizes in ({}, {"text": "cross"}, {"other_streams": {"audio": StreamSpec(10, 24)}, "control_dim": 3, "pooled_dim": 0}):
        network = make_network(**sizes)
        counts = parameters_by_part(network)
        assert "other" not in counts and sum(counts.values()) == sum(p.numel() for p in network.parameters())
    network.extra = torch.nn.Linear(3, 2)
    assert parameters_by_part(network)["other"] == 8


def test_flops_grow_as_they_should(make_network: Make) -> None:
    network = make_network(text="cross")
    one, wide = flops_by_part(network, Grid(2, 4, 4), 1, 8), flops_by_part(network, Grid(4, 4, 4), 1, 8)
    assert wide["attention"] == 4 * one["attention"] and wide["MLP"] == 2 * one["MLP"]
    assert wide["text keys and values"] == one["text keys and values"]
    assert flops_by_part(network, Grid(2, 4, 4), 3, 8) == {part: 3 * flops for part, flops in one.items()}
