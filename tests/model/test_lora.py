"""LoRA: silent at first, learned alone, kept so that diffusers does the same with it, and merged without a difference."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_models import CHANNELS, HEAD_DIM, HEADS, PATCH, TEXT_DIM, clip, ours, reference, tokens_of

from dit_video.model.layers import initialise, rules_of
from dit_video.model.lora import (
    FILE,
    adapters_of,
    add_adapters,
    check_options,
    is_adapter,
    load_adapters,
    merge_adapters,
    save_adapters,
    under_adapters,
)
from dit_video.model.network import Network
from dit_video.model.published import PublishedError, load, make_transformer, opened
from dit_video.model.text import WordEncoder
from dit_video.model.wan import WanExperts, WanTransformer
from dit_video.seeding import seeded
from dit_video.shapes import Grid

pytest.importorskip("peft")
pytest.importorskip("diffusers")
GRID = Grid(3, 2, 2)


def small() -> WanTransformer:
    return WanTransformer(HEADS * HEAD_DIM, 2, HEADS, 40, TEXT_DIM, CHANNELS, PATCH, text_length=16, level_dim=32)


def stir(transformer: torch.nn.Module) -> None:
    """Adapters as if they had learned something."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if is_adapter(name):
                parameter += 0.2 * torch.randn(parameter.shape, generator=seeded(0, name, "learned"))


def made(transformer: torch.nn.Module, kind: str = "t2v") -> Tensor:
    batch = clip(kind, GRID)
    with torch.no_grad():
        return transformer({"video": batch.stream}, batch.context)[0]["video"]


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


# --------------------------------------------------------------------------- adapters


def test_nothing_changes_at_first_and_adapters_alone_learn(tmp_path: Path) -> None:
    transformer = ours(tmp_path)
    before, weights = made(transformer), {name: value.clone() for name, value in transformer.state_dict().items()}
    add_adapters(transformer, rank=4)
    assert torch.equal(made(transformer), before) and len(adapters_of(transformer)) == 2 * 10
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in transformer.named_parameters() if is_adapter(name)} and len(trained) == 40

    batch = clip("t2v", GRID)
    optimiser = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # in the second step A learns too, as B is zero no longer
        transformer.zero_grad()
        transformer({"video": batch.stream}, batch.context)[0]["video"].square().mean().backward()
        assert all((parameter.grad is not None) == (name in trained) for name, parameter in transformer.named_parameters())
        optimiser.step()
    assert all(parameter.grad.any() for name, parameter in transformer.named_parameters() if name in trained)  # type: ignore[union-attr]
    assert not near(made(transformer), before)
    for name, value in transformer.state_dict().items():
        assert is_adapter(name) or torch.equal(value, weights[name.replace(".base_layer.", ".")])


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    transformer = small()
    add_adapters(transformer, 2, targets=["attention.query", "mlp.out"])
    assert sorted(adapters_of(transformer)) == [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention.query", "mlp.out")]
    with pytest.raises(ValueError, match="'to_q'; set lora.targets"):
        add_adapters(small(), targets=["to_q"])
    with pytest.raises(ValueError, match="set lora.rank"):
        add_adapters(small(), rank=0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(transformer)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rank", (0, 1.5, True, "8", None, 10**400)),
        ("alpha", (0, -3, "x", True, float("nan"), float("inf"), 10**400)),
        ("targets", ([], [1], 3)),
    ],
)
def test_options_that_cannot_be_are_refused(key: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"set lora.{key}"):
            check_options(**{"rank": 4, "alpha": None, "targets": None} | {key: value})


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"alpha": -3.0}, {"targets": []}, {"targets": ""}, {"targets": "patch"}, {"targets": ["video.patch"]}],
)
def test_they_are_refused_before_anything_is_adapted(options: dict) -> None:
    for transformer in (small(), WanExperts(lambda attention: small(), 0.875)):
        with pytest.raises(ValueError, match=f"set lora.{next(iter(options))}"):
            add_adapters(transformer, **options)
        assert not adapters_of(transformer)


def test_a_string_is_one_target() -> None:
    transformer = small()
    add_adapters(transformer, 2, targets="attention.query")
    assert sorted(adapters_of(transformer)) == ["blocks.0.attention.query", "blocks.1.attention.query"]


def test_the_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    transformer = ours(tmp_path)
    base = {name: layer.weight.clone() for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    add_adapters(transformer, rank=4, alpha=12)
    stir(transformer)
    pairs = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in adapters_of(transformer).items()
    }
    merge_adapters(transformer)
    for name, (down, up) in pairs.items():
        assert torch.allclose(transformer.get_submodule(name).weight, base[name] + 3 * up @ down, atol=1e-6)


def test_it_starts_on_the_meta_device_as_everything_does(tmp_path: Path) -> None:
    """Adapters have a beginning, the weights beneath are read from published ones, row by row if need be."""
    from dit_video.trainer.checkpoint import fitting, warm_start

    reference("t2v").save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.device("meta"):
        network = Network(WordEncoder(TEXT_DIM, heads=2), make_transformer(tmp_path))
    add_adapters(network.transformer, rank=2)
    assert all(parameter.is_meta for parameter in network.parameters()) and rules_of(network)
    initialise(network, 5)
    assert {name for name, p in network.transformer.named_parameters() if p.requires_grad} == {
        name for name, _ in network.transformer.named_parameters() if is_adapter(name)
    }  # which survives that memory is given
    for layer in adapters_of(network.transformer).values():
        assert layer.lora_A["default"].weight.std() > 0.1 and not layer.lora_B["default"].weight.any()

    saved = under_adapters(network, opened(tmp_path))
    split = fitting(network, saved, "ema")
    assert not split["dropped"] and all(name.startswith("text.") or is_adapter(name) for name in split["new"])
    warm_start(network, saved, "ema")
    alone = make_transformer(tmp_path)
    load(alone, tmp_path)
    assert torch.equal(made(network.transformer), made(alone))


def test_adapters_are_the_same_every_time() -> None:
    def drawn(seed: int) -> Tensor:
        transformer = small()
        add_adapters(transformer, rank=2, seed=seed)
        return adapters_of(transformer)["blocks.1.cross.key"].lora_A["default"].weight

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
def test_merged_is_not_merged(tmp_path: Path, kind: str, record_property: Callable[[str, object], None]) -> None:
    transformer = ours(tmp_path, kind)
    plain, names = made(transformer, kind), set(transformer.state_dict())
    add_adapters(transformer, rank=3, alpha=5)
    stir(transformer)
    wanted = made(transformer, kind)
    assert not near(wanted, plain)
    merge_adapters(transformer)
    found = made(transformer, kind)
    record_property("output", f"{float((found - wanted).abs().max() / wanted.abs().max()):.1e}")
    assert near(found, wanted)
    assert set(transformer.state_dict()) == names and not adapters_of(transformer)
    assert all(parameter.requires_grad for parameter in transformer.parameters())


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v_2.2", "ti2v"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_does_the_same_with_it(
    tmp_path: Path, kind: str, alpha: float | None, record_property: Callable[[str, object], None]
) -> None:
    transformer, theirs, batch = ours(tmp_path, kind), reference(kind), clip(kind, GRID)
    plain = made(transformer, kind)
    add_adapters(transformer, rank=4, alpha=alpha)
    stir(transformer)
    file = save_adapters(transformer, tmp_path / "lora")
    assert file.name == FILE and all(key.startswith("transformer.blocks.") for key in load_file(file))
    theirs.load_lora_adapter(str(tmp_path / "lora"), weight_name=FILE)  # type: ignore[operator]
    with torch.no_grad():
        found = tokens_of(theirs(**batch.theirs())[0])
    wanted = made(transformer, kind)
    record_property("output", f"{float((found - wanted).abs().max() / wanted.abs().max()):.1e}")
    assert near(found, wanted) and not near(found, plain)


def test_a_pipeline_loads_both_experts(tmp_path: Path) -> None:
    import diffusers

    one, two = reference("t2v"), reference("t2v", seed=1)
    for part, model in (("transformer", one), ("transformer_2", two)):
        model.save_pretrained(tmp_path / part)  # type: ignore[operator]
    transformer = make_transformer(tmp_path)
    load(transformer, tmp_path)
    assert isinstance(transformer, WanExperts)
    add_adapters(transformer, rank=2)
    stir(transformer)
    save_adapters(transformer, tmp_path / "lora")
    pipeline = diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), one, two, boundary_ratio=0.9)
    for part in (False, True):  # diffusers loads the second by a call of its own
        name = f"transformer{'_2' if part else ''}"
        tensors = {key: value for key, value in load_file(tmp_path / "lora" / FILE).items() if key.startswith(f"{name}.")}
        tensors = {key.replace("transformer_2.", "transformer."): value for key, value in tensors.items()}
        pipeline.load_lora_weights(tensors, load_into_transformer_2=part)
    batch = clip("t2v", GRID)
    with torch.no_grad():
        for model, expert in ((one, transformer.high), (two, transformer.low)):
            assert near(tokens_of(model(**batch.theirs())[0]), made(expert))

    again = make_transformer(tmp_path)
    load(again, tmp_path)
    assert isinstance(again, WanExperts)
    load_adapters(again, tmp_path / "lora")
    assert torch.equal(made(again.high), made(transformer.high)) and torch.equal(made(again.low), made(transformer.low))


@pytest.mark.parametrize("scales", [(None, None), (12.0, 12.0), (None, 8.0)])
def test_what_was_saved_is_loaded(tmp_path: Path, scales: tuple[float | None, float | None]) -> None:
    """Into a transformer with adapters of any scale, or with none."""
    first, second, third = (ours(tmp_path) for _ in range(3))
    add_adapters(first, rank=4, alpha=scales[0])
    stir(first)
    save_adapters(first, tmp_path / "lora")
    add_adapters(second, rank=4, alpha=scales[1])
    load_adapters(second, tmp_path / "lora")
    load_adapters(third, tmp_path / "lora" / FILE)
    for other in (second, third):
        assert near(made(other), made(first))
        assert torch.equal(*(adapters_of(x)["blocks.0.mlp.out"].lora_A["default"].weight for x in (first, other)))


def test_a_file_of_diffusers_is_loaded(tmp_path: Path) -> None:
    """With its own account of the scale, and without a prefix."""
    from peft import LoraConfig

    theirs, transformer, batch = reference("t2v"), ours(tmp_path), clip("t2v", GRID)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False))  # type: ignore[operator]
    theirs.save_lora_adapter(tmp_path / "lora", weight_name=FILE)  # type: ignore[operator]
    load_adapters(transformer, tmp_path / "lora")
    with torch.no_grad():
        assert near(made(transformer), tokens_of(theirs(**batch.theirs())[0]))
    assert len(adapters_of(transformer)) == 2 * 6


def written(tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **metadata: str) -> Path:
    transformer = ours(tmp_path)
    add_adapters(transformer, rank=4)
    save_adapters(transformer, tmp_path / "lora")
    tensors = change(load_file(tmp_path / "lora" / FILE))
    save_file(tensors, tmp_path / "lora" / FILE, metadata)
    return tmp_path / "lora"


KEY = "transformer.blocks.0.attn1.to_q.lora_A.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, str], str]] = {
    "half of one": (lambda t: {n: v for n, v in t.items() if n != KEY}, {}, "half of the adapter of blocks.0.attention.query"),
    "another kind of key": (
        lambda t: t | {"lora_unet_blocks_0.alpha": torch.ones(1)},
        {},
        "holds lora_unet_blocks_0.alpha, which is no",
    ),
    "a layer too many": (
        lambda t: t | {n.replace("blocks.0", "blocks.7"): v.clone() for n, v in t.items()},
        {},
        "an adapter of blocks.7",
    ),
    "another kind": (lambda t: t, {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}, "of another kind"),
    "scales of its own": (lambda t: t, {"lora_adapter_metadata": json.dumps({"rank_pattern": {"to_q": 2}})}, "of another kind"),
    "no scale": (lambda t: t, {"lora_adapter_metadata": json.dumps({"r": 0, "lora_alpha": 1})}, "says r 0"),
    "no JSON": (lambda t: t, {"lora_adapter_metadata": "{"}, "cannot be read"),
    "endless brackets": (lambda t: t, {"lora_adapter_metadata": "[" * 100_000}, "cannot be read"),
    "a list": (lambda t: t, {"lora_adapter_metadata": "[]"}, "is no mapping"),
    "a scale of nothing": (
        lambda t: t,
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 0})},
        "alpha 0",
    ),
    "a scale without end": (lambda t: t, {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 10**400})}, "says r 4"),
    "a number alone": (lambda t: t | {KEY: torch.tensor(1.0)}, {}, f"{KEY} must be a matrix"),
    "no rows": (lambda t: t | {KEY: torch.zeros(0, 28)}, {}, f"{KEY} must be a matrix"),
    "whole numbers": (lambda t: t | {KEY: t[KEY].int()}, {}, f"{KEY} must be a matrix"),
    "another shape": (lambda t: t | {KEY.replace("_A", "_B"): torch.zeros(28, 7)}, {}, "lora_B of .* has shape"),
    "a block's own": (lambda t: t | {"transformer.blocks.0.lora_A.weight": torch.zeros(4, 28)}, {}, "which is no adapter"),
    "nothing": (lambda t: {}, {"format": "pt"}, "holds no adapters"),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_clear_line_where_a_file_is_wrong(tmp_path: Path, what: str) -> None:
    change, metadata, told = WRONG[what]
    folder = written(tmp_path, change, **metadata)
    transformer = small()
    names = set(transformer.state_dict())
    with pytest.raises(PublishedError, match=told):
        load_adapters(transformer, folder)
    assert set(transformer.state_dict()) == names and all(weight.requires_grad for weight in transformer.parameters())


def test_each_expert_has_the_scale_that_is_said_of_it(tmp_path: Path) -> None:
    def experts() -> WanExperts:
        return WanExperts(lambda attention: small(), 0.875)

    pair = experts()
    add_adapters(pair, rank=4)
    file = save_adapters(pair, tmp_path)
    told = {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer_2.r": 4,
        "transformer_2.lora_alpha": 8,
        "text_encoder.r": 3,
    }
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(told)})
    fresh = experts()
    load_adapters(fresh, file)
    for name, layer in adapters_of(fresh).items():
        assert layer.scaling == {"default": 1.0 if name.startswith("high.") else 2.0}


def test_files_that_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path / "lora.bin", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(PublishedError, match="no file of adapters in safetensors"):
            load_adapters(small(), path)
    (tmp_path / FILE).write_bytes(b"\x80\x04")
    with pytest.raises(PublishedError, match="cannot be read"):
        load_adapters(small(), tmp_path)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, lambda tensors: tensors)
    for adapt, told in (
        (partial(add_adapters, rank=2), "set lora.rank"),
        (partial(add_adapters, rank=4, targets=["mlp.out"]), "set lora.targets"),
    ):
        transformer = small()
        adapt(transformer)
        with pytest.raises(PublishedError, match=told):
            load_adapters(transformer, folder)
    with pytest.raises(ValueError, match="no adapters to be saved"):
        save_adapters(small(), tmp_path / "none")


def test_muon_and_costs_know_adapters(tmp_path: Path) -> None:
    """Adapters go to AdamW, frozen weights to nobody, and their costs to the layers' parts."""
    from dit_video.model.cost import flops_by_part, parameters_by_part
    from dit_video.trainer.optim import split_parameters

    network = Network(WordEncoder(TEXT_DIM, heads=2), small())
    plain = flops_by_part(network, GRID, 1, 6)
    add_adapters(network.transformer, rank=2)
    hidden, rest = split_parameters(network.transformer)
    assert not hidden and sorted(rest) == sorted(name for name, _ in network.transformer.named_parameters() if is_adapter(name))
    adapted = flops_by_part(network, GRID, 1, 6)
    assert "other" not in parameters_by_part(network) and adapted["MLP"] == plain["MLP"] + 2 * 2 * 12 * 2 * 2 * (28 + 40)
