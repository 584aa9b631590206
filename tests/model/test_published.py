"""Published weights: untouched they come out bit for bit in both layouts, trained ones serve in diffusers, and nothing hostile is run."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_models import CHANNELS, KINDS, clip, ours, reference, tokens_of

from dit_video.model.network import Network
from dit_video.model.published import (
    Layout,
    PublishedError,
    export,
    is_published,
    load,
    make_transformer,
    module_name,
    opened,
    own_module_name,
    published_name,
    sizes_of,
)  # fmt: skip
from dit_video.model.text import WordEncoder
from dit_video.model.wan import WanExperts, WanTransformer
from dit_video.seeding import seeded
from dit_video.shapes import Grid

pytest.importorskip("diffusers")
STEM = "diffusion_pytorch_model"

# The official names, after scripts/convert_wan_to_diffusers.py of diffusers, from its side: each diffusers name and the original's.
OFFICIAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0", "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0", "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0", "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3", "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img",
    "add_v_proj": "v_img", "norm_added_k": "norm_k_img", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3",
}  # fmt: skip


def official(name: str) -> str:
    """A diffusers name in the original layout."""
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation") if name.startswith("blocks") else "head.modulation"
    for theirs, original in sorted(OFFICIAL.items(), key=lambda pair: -len(pair[0])):
        start = name.find(theirs)
        if start >= 0 and (start == 0 or name[start - 1] == ".") and name[start + len(theirs)] == ".":
            name = name[:start] + original + name[start + len(theirs) :]
    return name


def write_original(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, shards: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """A folder of the original layout, made without the tables under test."""
    theirs = reference(kind, seed)
    tensors = {official(name): value.to(dtype) for name, value in theirs.state_dict().items()}
    folder.mkdir(parents=True)
    config = theirs.config
    kinds = {"t2v": "t2v", "ti2v": "ti2v", "i2v": "i2v", "i2v_2.2": "i2v"}
    (folder / "config.json").write_text(json.dumps({
        "_class_name": "WanModel", "model_type": kinds[kind], "dim": config.num_attention_heads * config.attention_head_dim,
        "ffn_dim": config.ffn_dim, "num_heads": config.num_attention_heads, "num_layers": config.num_layers,
        "in_dim": config.in_channels, "out_dim": config.out_channels, "freq_dim": config.freq_dim, "text_dim": config.text_dim,
        "text_len": 512, "eps": config.eps,
    }))  # fmt: skip
    if shards == 1:
        save_file(tensors, folder / f"{STEM}.safetensors")
        return tensors
    names = sorted(tensors)
    files = {f"{STEM}-{n + 1:05d}-of-{shards:05d}.safetensors": names[n::shards] for n in range(shards)}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def kept(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, types, shapes and bits."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
    )


def read(folder: Path) -> WanTransformer | WanExperts:
    transformer = make_transformer(folder)
    load(transformer, folder)
    return transformer


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_and_back_to_the_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In bfloat16 diffusers keeps norms and modulation in float32, and so the folder is of two types."""
    reference(kind).save_pretrained(tmp_path / "all")  # type: ignore[operator]
    theirs = type(reference(kind)).from_pretrained(tmp_path / "all", torch_dtype=dtype)  # type: ignore[attr-defined]
    theirs.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    assert {value.dtype for value in kept(tmp_path / "in").values()} == {torch.float32, dtype}
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    found = opened(tmp_path / "in", prefix="")
    export(read(tmp_path / "in"), tmp_path / "out", dtypes=found.dtypes(), file_bytes=5000)
    assert same(kept(tmp_path / "in"), kept(tmp_path / "out"))
    files = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 1 and f"{STEM}-00001-of-{len(files):05d}.safetensors" in files

    told, wanted = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("out", "in"))
    assert all(
        told.get(key) == wanted.get(key)
        for key in wanted
        if key not in ("_diffusers_version", "_name_or_path", "rope_max_seq_len")
    )
    again = type(theirs).from_pretrained(tmp_path / "out", torch_dtype=dtype)  # type: ignore[attr-defined]
    assert same(dict(theirs.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_original_and_back_to_the_bit(tmp_path: Path, kind: str, dtype: torch.dtype, shards: int) -> None:
    before = write_original(tmp_path / "in", kind, dtype, shards)
    transformer, dtypes = read(tmp_path / "in"), opened(tmp_path / "in", prefix="").dtypes()
    export(transformer, tmp_path / "out", "original", dtypes=dtypes)
    assert same(before, kept(tmp_path / "out"))
    wanted = json.loads((tmp_path / "in" / "config.json").read_text())
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: told[key] for key in wanted} == wanted or kind == "ti2v"  # which is told by 48 channels, and this one has fewer

    export(transformer, tmp_path / "across", dtypes=torch.float32)  # and the one layout is the other
    theirs = type(reference(kind)).from_pretrained(tmp_path / "across")  # type: ignore[attr-defined]
    assert same({official(n): v.to(dtype) for n, v in theirs.state_dict().items()}, before)


def test_official_names_are_those_of_diffusers_own_converter(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    for kind in KINDS:
        tensors = write_original(tmp_path / kind, kind)
        assert set(convert_wan_transformer_to_diffusers(dict(tensors))) == set(reference(kind).state_dict())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_every_parameter_has_a_name_of_its_own(layout: Layout) -> None:
    with torch.device("meta"):
        transformer = WanTransformer(32, 11, 2, 8, control_channels=20, image_dim=8)
    names = [published_name(name, layout) for name, _ in transformer.named_parameters()]
    assert len(set(names)) == len(names)
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert own_module_name(module_name(name, layout), layout) == name


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_rows_are_rows_of_the_whole(tmp_path: Path, layout: Layout) -> None:
    """What a rank reads of weights that are cut over several."""
    export(ours(tmp_path / "in", "i2v"), tmp_path / "out", layout)
    found = opened(tmp_path / "out")
    for name, whole in found.tensors("network").items():
        assert tuple(whole.shape) == found.shapes("network")[name]
        for rows in (slice(0, 1), slice(1, len(whole)), slice(len(whole), len(whole))):
            assert torch.equal(found.read("any", name, rows), whole[rows]), name
    found.close()


def test_a_network_starts_from_published_weights_as_from_a_checkpoint(tmp_path: Path) -> None:
    from dit_video.trainer.checkpoint import fitting, warm_start

    reference("t2v").save_pretrained(tmp_path)  # type: ignore[operator]
    found = opened(tmp_path)
    network = Network(WordEncoder(20, heads=2), make_transformer(tmp_path))
    split = fitting(network, found, "ema")
    assert (
        split["kept"] == sorted(name for name in network.state_dict() if name.startswith("transformer.")) and not split["dropped"]
    )
    assert all(name.startswith("text.") for name in split["new"])
    warm_start(network, found, "ema")
    assert same(dict(network.transformer.state_dict()), dict(read(tmp_path).state_dict()))


def test_five_steps_later_diffusers_says_the_same(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    transformer, batch = ours(tmp_path / "in", "ti2v"), clip("ti2v", Grid(3, 2, 2))
    optimiser = torch.optim.AdamW(transformer.parameters(), 1e-2)
    target, losses = torch.randn_like(batch.stream.values), []
    for _ in range(5):
        loss = (transformer({"video": batch.stream}, batch.context)[0]["video"] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    export(transformer, tmp_path / "out")
    theirs = type(reference("ti2v")).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = transformer({"video": batch.stream}, batch.context)[0]["video"]
        found = tokens_of(theirs(**batch.theirs())[0])
    far = float((found - wanted).abs().max() / wanted.abs().max())
    record_property("output", f"{far:.1e}")
    assert far <= 1e-5


# --------------------------------------------------------------------------- pipelines and experts


def test_a_pipelines_folder(tmp_path: Path) -> None:
    one = reference("t2v")
    one.save_pretrained(tmp_path / "transformer")  # type: ignore[operator]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": None}))
    assert isinstance(make_transformer(tmp_path), WanTransformer)
    assert "transformer.ends.video.patch.weight" in opened(tmp_path).shapes()

    reference("t2v", seed=1).save_pretrained(tmp_path / "transformer_2")  # type: ignore[operator]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.8}))
    two = read(tmp_path)
    assert isinstance(two, WanExperts) and two.boundary == 0.8
    assert torch.equal(two.high.text.out.weight, one.condition_embedder.text_embedder.linear_2.weight)
    assert not torch.equal(two.low.text.out.weight, two.high.text.out.weight)
    assert set(opened(tmp_path).shapes()) == {f"transformer.{name}" for name in two.state_dict()}

    export(two, tmp_path / "out")
    for part in ("transformer", "transformer_2"):
        assert same(kept(tmp_path / part), kept(tmp_path / "out" / part))


THERE = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize(
    ("index", "missing"),
    [
        ({"transformer": THERE, "transformer_2": THERE}, "transformer_2"),
        ({"boundary_ratio": 0.875}, "transformer_2"),
        ({"transformer": THERE, "transformer_2": [None, None]}, "transformer"),
    ],
)
def test_a_pipeline_without_an_expert_that_it_names_is_none(
    tmp_path: Path, index: dict[str, Any], missing: str, dangling: bool
) -> None:
    """It would be sampled as one model otherwise."""
    for part in {"transformer", "transformer_2"} - {missing}:
        reference("t2v").save_pretrained(tmp_path / part)  # type: ignore[operator]
    if dangling:
        (tmp_path / missing).symlink_to(tmp_path / "nowhere")
    if missing == "transformer_2":
        assert isinstance(make_transformer(tmp_path), WanTransformer)  # which says nothing of a second
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(PublishedError, match=f"model_index.json names {missing}, which is missing; .*set run or init_from"):
        make_transformer(tmp_path)


@pytest.mark.parametrize("told", ["abc", [1], True, 2.0, 10**400])
def test_a_boundary_that_is_no_level_is_refused(tmp_path: Path, told: object) -> None:
    for part in ("transformer", "transformer_2"):
        reference("t2v").save_pretrained(tmp_path / part)  # type: ignore[operator]
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": told}))
    with pytest.raises(PublishedError, match="model_index.json: boundary_ratio must be a number in"):
        make_transformer(tmp_path)


@pytest.mark.parametrize(("kind", "boundary"), [("t2v", 0.875)])
def test_two_experts_of_the_original_layout(tmp_path: Path, kind: str, boundary: float) -> None:
    for seed, part in enumerate(("high_noise_model", "low_noise_model")):
        write_original(tmp_path / "in" / part, kind, seed=seed)
    two = read(tmp_path / "in")
    assert isinstance(two, WanExperts) and two.boundary == boundary
    export(two, tmp_path / "out", "original")
    for part in ("high_noise_model", "low_noise_model"):
        assert same(kept(tmp_path / "in" / part), kept(tmp_path / "out" / part))
    (tmp_path / "in" / "low_noise_model").rename(tmp_path / "elsewhere")
    with pytest.raises(PublishedError, match="no low_noise_model/"):
        opened(tmp_path / "in")


def test_what_is_published_is_told_from_runs_and_exports(tmp_path: Path) -> None:
    assert not is_published(tmp_path) and not is_published(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"seed": 0}, "clips": 1}))  # of an export of this project
    (tmp_path / "model.safetensors").touch()
    assert not is_published(tmp_path)
    reference("t2v").save_pretrained(tmp_path / "a" / "transformer")  # type: ignore[operator]
    assert is_published(tmp_path / "a") and is_published(tmp_path / "a" / "transformer")


# --------------------------------------------------------------------------- what is wrong with a folder


class Bomb:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('it ran')",)


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def to_pickle(folder: Path, name: str) -> None:
    (folder / f"{STEM}.safetensors").unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Bomb(), file)


def pickle_under_a_safe_name(folder: Path) -> None:
    with (folder / f"{STEM}.safetensors").open("wb") as file:
        pickle.dump(Bomb(), file)


def cut(folder: Path, by: int) -> None:
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-by])


def changed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / f"{STEM}.safetensors")), folder / f"{STEM}.safetensors")


QUERY = "blocks.1.attn2.to_q.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "is no mapping"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
    "another model": (partial(set_config, _class_name="FluxTransformer2DModel"), "_class_name is 'FluxTransformer2DModel'"),
    "no class": (partial(set_config, _class_name="gone"), "_class_name is None"),
    "a size is missing": (partial(set_config, ffn_dim="gone"), "ffn_dim must be a whole number"),
    "a size is a word": (partial(set_config, num_layers="2"), "num_layers must be a whole number"),
    "a size is true": (partial(set_config, num_layers=True), "num_layers must be a whole number"),
    "a size is huge": (partial(set_config, ffn_dim=10**12), "ffn_dim must be a whole number"),
    "depth without end": (partial(set_config, num_layers=100_000), "num_layers must be a whole number from 1 to 1000"),
    "a patch of two": (partial(set_config, patch_size=[1, 2]), "patch_size must be three"),
    "an eps of nan": (partial(set_config, eps=float("nan")), "eps must be a number"),
    "an eps that no float holds": (partial(set_config, eps=10**400), "eps must be a number above 0"),
    "an eps of nothing": (partial(set_config, eps=0), "eps must be a number above 0, got 0"),
    "an eps of true": (partial(set_config, eps=True), "eps must be a number above 0, got True"),
    "an odd head": (partial(set_config, attention_head_dim=15), "config.json: attention_head_dim must be even, got 15"),
    "an odd level": (partial(set_config, freq_dim=33), "config.json: freq_dim must be even, got 33"),
    "a level of one": (partial(set_config, freq_dim=1), "config.json: freq_dim must be even, got 1"),
    "a huge product": (
        partial(set_config, num_attention_heads=1 << 20, attention_head_dim=1 << 20), "config.json: width must be a whole number"
    ),
    "a patch of true": (partial(set_config, patch_size=[True, 2, 2]), "patch_size must be three"),
    "endless brackets": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json cannot be read"),
    "another norm": (partial(set_config, qk_norm="layer_norm"), "qk_norm must be 'rms_norm_across_heads'"),
    "fewer in than out": (partial(set_config, in_channels=2), "in_channels must be at least"),
    "more layers told": (partial(set_config, num_layers=3), "lacks 27 of .* no blocks.2."),
    "fewer layers told": (partial(set_config, num_layers=1), "holds blocks.1..*knows nothing of"),
    "another width told": (partial(set_config, ffn_dim=41), "blocks.0.ffn.net.0.proj.weight has shape .*40.* tells of .*41"),
    "the other layout's names": (changed(lambda t: {official(name): value for name, value in t.items()}), "no .*, but .*"),
    "a tensor is missing": (changed(lambda t: {n: v for n, v in t.items() if n != QUERY}), f"lacks 1 of .* no {QUERY}"),
    "a tensor too many": (changed(lambda t: t | {"spy": torch.ones(1)}), "holds spy, which config.json knows nothing of"),
    "another shape": (changed(lambda t: t | {QUERY: torch.ones(2, 28)}), f"{QUERY} has shape"),
    "whole numbers": (changed(lambda t: t | {QUERY: t[QUERY].int()}), f"{QUERY} is I32"),
    "eight bits": (changed(lambda t: t | {QUERY: t[QUERY].to(torch.float8_e4m3fn)}), f"{QUERY} is F8_E4M3"),
    "cut off": (partial(cut, by=100), "cannot be read as safetensors"),
    "empty": (lambda f: (f / f"{STEM}.safetensors").write_bytes(b""), "cannot be read as safetensors"),
    "a pickle by its name": (pickle_under_a_safe_name, "cannot be read as safetensors"),
    "bin": (partial(to_pickle, name=f"{STEM}.bin"), f"but {STEM}.bin, which is pickled and is never opened"),
    "pth": (partial(to_pickle, name="Wan2.1.pth"), "but Wan2.1.pth, which is pickled and is never opened"),
    "ckpt": (partial(to_pickle, name="wan.ckpt"), "but wan.ckpt, which is pickled"),
    "pt": (partial(to_pickle, name="wan.pt"), "but wan.pt, which is pickled"),
    "nothing": (lambda f: (f / f"{STEM}.safetensors").unlink(), f"has no {STEM}.safetensors;"),
    "a part alone": (
        lambda f: (f / f"{STEM}.safetensors").rename(f / f"{STEM}-00001-of-00002.safetensors"), "nor, for weights in several files,"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_one_clear_line_where_a_folder_is_wrong(tmp_path: Path, what: str) -> None:
    reference("t2v").save_pretrained(tmp_path)  # type: ignore[operator]
    do, told = WRONG[what]
    do(tmp_path)
    with pytest.raises(PublishedError, match=told) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def mapped(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        path = folder / f"{STEM}.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))

    return do


WRONG_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda f: (f / f"{STEM}.safetensors.index.json").write_text("x"), "index.json cannot be read"),
    "no map": (lambda f: (f / f"{STEM}.safetensors.index.json").write_text("{}"), "weight_map must say"),
    "a map of numbers": (mapped(lambda m: m | {QUERY: 3}), "weight_map must say"),
    "an entry is missing": (
        mapped(lambda m: {n: f for n, f in m.items() if n != QUERY}),
        f"holds {QUERY}, for which .* says None",
    ),
    "an entry too many": (mapped(lambda m: m | {"spy": m[QUERY]}), "holds spy, and it does not"),
    "a file outside": (mapped(lambda m: m | {QUERY: "../a.safetensors"}), "no safetensors file beside it"),
    "a pickled file": (mapped(lambda m: m | {QUERY: f"{STEM}.bin"}), "no safetensors file beside it"),
    "a file is missing": (lambda f: next(f.glob(f"{STEM}-*.safetensors")).unlink(), "which is missing"),
}


@pytest.mark.parametrize("what", WRONG_INDEX)
def test_one_clear_line_where_an_index_is_wrong(tmp_path: Path, what: str) -> None:
    reference("t2v").save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    opened(tmp_path).close()
    do, told = WRONG_INDEX[what]
    do(tmp_path)
    with pytest.raises(PublishedError, match=told) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PublishedError, match="is no folder"):
        opened(tmp_path / "missing")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PublishedError, match="a pipeline without transformer/"):
        opened(tmp_path)


def test_another_models_weights_are_refused_before_anything_changes(tmp_path: Path) -> None:
    reference("t2v").save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.device("meta"):
        other = WanTransformer(28, 2, 2, 41, 20, CHANNELS, level_dim=32)
    with pytest.raises(PublishedError, match="blocks.0.mlp.into.bias is .40,., the model's .41,."):
        load(other, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("heads", 1), ("heads", 7), ("patch", (2, 2, 1)), ("eps", 0.1), ("text_length", 8)])
@pytest.mark.parametrize("experts", [False, True])
def test_what_shapes_do_not_show_is_compared(tmp_path: Path, key: str, value: object, experts: bool) -> None:
    for part in ("transformer", "transformer_2")[: 1 + experts]:
        reference("t2v").save_pretrained(tmp_path / part)  # type: ignore[operator]
    sizes = sizes_of(tmp_path / "transformer") | {key: value}
    other = WanExperts(partial(WanTransformer, **sizes), 0.875) if experts else WanTransformer(**sizes)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    where = "model.expert" if experts else "model"
    with pytest.raises(PublishedError, match=f"transformer/config.json is of a model with {key} .*; set {where}.{key}"):
        load(other, tmp_path)
    assert same(dict(other.state_dict()), before)


def test_an_unread_norm_of_some_published_folders_is_passed_over(tmp_path: Path) -> None:
    """norm_added_q, which diffusers passes over too."""
    reference("i2v").save_pretrained(tmp_path)  # type: ignore[operator]
    changed(lambda t: t | {"blocks.0.attn2.norm_added_q.weight": torch.ones(28)})(tmp_path)
    assert opened(tmp_path).shapes()


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    transformer = ours(tmp_path)
    with pytest.raises(ValueError, match="set out to a new folder"):
        export(transformer, tmp_path)
    export(
        transformer,
        tmp_path / "half",
        weights={n: seeded_like(n, v) for n, v in transformer.state_dict().items()},
        dtypes=torch.float16,
    )
    assert all(value.dtype == torch.float16 for value in kept(tmp_path / "half").values())


def seeded_like(name: str, value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=seeded(3, name))
