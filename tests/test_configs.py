"""Every model, text encoder and attention of conf/ composes and builds without memory."""

import pytest
import torch

from dit_video.build import make, make_network
from dit_video.compose import compose, conf_folder, take_apart
from dit_video.model.cost import parameters_by_part
from dit_video.shapes import Grid, Patch, Stream, token_places

PARAMETERS = {
    "tiny": 2.1e6, "small": 24e6, "base": 130e6, "large": 450e6, "xl": 700e6, "1.3b": 1.3e9, "5b": 5e9, "14b": 14e9,
}  # fmt: skip


STATED = {
    ("image_encoder", "clip"): ["model=wan2.1_i2v_14b"],  # what a choice leaves for the user to say
    ("text", "transformers"): ["text.folder=none", "text.dim=64"],
    ("text", "several"): ["text.encoders.t5.folder=none", "text.encoders.clip.folder=none"],
} | {("text", name): ["text.folder=none"] for name in ("t5", "umt5", "clip")}
WAN = {
    "wan2.1_t2v_1.3b": 1.42e9, "wan2.1_t2v_14b": 14.3e9, "wan2.1_i2v_14b": 16.4e9, "wan2.2_ti2v_5b": 5.0e9, "wan2.2_t2v_a14b": 28.6e9,
    "wan2.2_i2v_a14b": 28.6e9,
}  # fmt: skip


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def test_every_size_is_there() -> None:
    assert sorted([*PARAMETERS, *WAN]) == options("model")


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_builds_and_runs_on_meta_and_is_as_large_as_its_name(name: str) -> None:
    network = make_network(compose("info", take_apart([f"model={name}"])))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert sum(parameters_by_part(network).values()) == pytest.approx(PARAMETERS[name], rel=0.15)

    transformer = network.transformer
    assert name in ("tiny", "small") or transformer.head_dim == 128
    assert transformer.blocks[0].text == ("cross" if name in ("1.3b", "5b", "14b") else "joint")
    grid, patch = Grid(3, 2, 2), transformer.patch
    values = torch.zeros(1, grid.num_tokens, patch.t * patch.h * patch.w * transformer.channels, device="meta")
    place = token_places(grid, patch, 8.0, transformer.reference_rate)[None].to("meta")
    marks = torch.zeros(1, grid.num_tokens, dtype=torch.bool, device="meta")
    stream = Stream(values, place, torch.zeros(1, 2, device="meta"), marks.long(), marks, marks)
    outputs, _ = network({"video": stream}, ["a red circle"])
    assert outputs["video"].shape == values.shape


@pytest.mark.parametrize("name", WAN)
def test_wan_builds_and_runs_on_meta_and_is_as_large_as_published(name: str) -> None:
    network = make_network(compose("info", take_apart([f"model={name}", "text.dim=4096"])))
    transformer = network.transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(WAN[name], rel=0.01)
    sizes = [len(transformer.blocks), transformer.blocks[0].heads]
    assert transformer.head_dim == 128 and sizes in ([30, 12], [40, 40], [30, 24], [80, 40])


def test_tiny_names_every_key_and_the_others_the_same() -> None:
    import inspect

    from dit_video.model.transformer import VideoTransformer

    arguments = set(inspect.signature(VideoTransformer.__init__).parameters) - {"self"}
    for name in PARAMETERS:
        config = compose("info", take_apart([f"model={name}"])).model
        assert set(config) - {"_target_"} == arguments
    # and the comments of tiny say what each is
    lines = (conf_folder() / "model" / "tiny.yaml").read_text().splitlines()[2:]
    assert all("  # " in line for line in lines)


@pytest.mark.parametrize("name", [name for name in options("model/attention") if name != "flash"])
def test_attention_is_a_function(name: str) -> None:
    attend = make(compose("info", take_apart([f"model/attention={name}"])).model.attention)
    query = torch.randn(1, 2, 3, 8)
    assert attend(query, query, query, None, None).shape == query.shape


def test_flash_is_built_where_it_can_be() -> None:
    from dit_video.model.attention import Flash

    config = compose("info", take_apart(["model/attention=flash"]))
    try:
        assert isinstance(make(config.model.attention), Flash)
    except Exception as error:
        assert "set model/attention=sdpa" in str(error)


@pytest.mark.parametrize("name", options("text"))
def test_text_encoder_builds(name: str) -> None:
    config = compose("info", take_apart([f"text={name}", *STATED.get(("text", name), [])]))
    network = make_network(config)
    assert network.text.dim == config.text.dim == config.model.context_dim
    assert network.text.pooled_dim == config.text.get("pooled_dim", config.text.dim) == config.model.pooled_dim


def test_a_second_stream_from_the_command_line() -> None:
    audio = "{audio:{_target_:dit_video.model.transformer.StreamSpec,token_dim:10,width:24}}"
    network = make_network(compose("info", take_apart([f"model.other_streams={audio}"])))
    assert network.transformer.ends["audio"].patch.out_features == 24


def test_whole_numbers_and_lists_are_taken() -> None:
    network = make_network(compose("info", take_apart(["model.patch=[1,4,4]", "model.reference_rate=6", "model.mlp_ratio=3"])))
    assert network.transformer.patch == Patch(1, 4, 4)


CHOICES = [
    (group, option)
    for group in (
        "data", "text", "autoencoder", "image_encoder", "model", "model/attention", "objective", "objective/levels", "sampler",
        "sampler/solver", "sampler/schedule", "optimisers", "eval", "logger", "trainer", "experiment", "debug", "device", "lora",
    )
    for option in options(group)
]  # fmt: skip


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_choice_composes_and_builds(group: str, option: str) -> None:
    from dit_video.build import make_objective, make_sampler
    from dit_video.compose import check_targets

    if (group, option) == ("model/attention", "flash"):
        return  # see test_flash_is_built_where_it_can_be
    stated = ["data.shards=unused.tar", *STATED.get((group, option), [])]
    config = compose("plan" if group == "device" else "train", take_apart([f"{group}={option}", *stated]))
    check_targets(config)
    assert all(parameter.is_meta for parameter in make_network(config).parameters())
    assert make(config.autoencoder).compression.t >= 1
    assert make_objective(config).tasks
    assert make_sampler(config).steps >= 1
    assert make(config.optimisers).build(torch.nn.Linear(2, 2))
    for part in ("suites", "metrics") if config.eval else ():
        assert all(make(entry) is not None for entry in config.eval[part].values())


def test_every_yaml_of_a_group_is_tried_above() -> None:
    tried = {f"{group}/{option}" for group, option in CHOICES}
    found = {path.relative_to(conf_folder()).with_suffix("").as_posix() for path in conf_folder().rglob("*/*.yaml")}
    assert found <= tried, found - tried
