"""The encoder of first frames on small random towers in the published layout: transformers' states, frame by frame, and clear errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_video.model.headers import num_weights
from dit_video.model.pretrained_image import PROCESSOR, ImageEncoder

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 10,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
FRAMES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)).save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


def encoder_of(folder: Path | str, **changes: Any) -> ImageEncoder:
    return ImageEncoder(**{"folder": str(folder), "dim": 10, "tokens": 5, **changes})


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = path / "model.safetensors"
    save_file({name: change(weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})


def indexed(path: Path, name: str) -> None:
    """The weights are in a pickled file, which an index names."""
    held = load_file(path / "model.safetensors")
    torch.save(held, path / name)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, name)}))


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_states_are_those_of_transformers(folder: Path, layer: int) -> None:
    model = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=[Image.fromarray(frame.numpy()) for frame in FRAMES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixels, output_hidden_states=True).hidden_states[layer]
    encoder = encoder_of(folder, layer=layer)
    found = encoder(FRAMES)
    assert found.shape == (3, 5, 10) and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder(FRAMES[1:2])[0], found[1])  # whatever shares its batch


def test_a_whole_clip_model_has_a_picture_tower(folder: Path, tmp_path: Path) -> None:
    config = transformers.CLIPConfig(vision_config=SIZES, text_config={**SIZES, "vocab_size": 20}, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(images=FRAMES.numpy(), return_tensors="pt")[
        "pixel_values"
    ]
    model = transformers.CLIPVisionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model(pixels, output_hidden_states=True).hidden_states[-2]
    encoder = encoder_of(tmp_path, processor=str(folder))
    torch.testing.assert_close(encoder(FRAMES), wanted, atol=1e-5, rtol=1e-5)
    assert encoder.device_bytes() == encoder_of(folder).device_bytes()  # the tower for text is not among them


def test_nothing_of_it_is_trained_saved_or_made_without_contents(folder: Path) -> None:
    encoder = encoder_of(folder)
    assert not [*encoder.parameters()] and not encoder.state_dict() and not encoder(FRAMES).requires_grad
    assert encoder_of("nowhere")(FRAMES.to("meta")).shape == (3, 5, 10)
    assert encoder.device_bytes() == 4 * num_weights([folder / "model.safetensors"], "image_encoder.folder")
    assert encoder_of(folder, placement="offload").device_bytes() == 0
    half = encoder_of(folder, dtype="bfloat16")
    assert half.device_bytes() == encoder.device_bytes() // 2 and (half(FRAMES) - encoder(FRAMES)).abs().max() < 0.1


def test_the_name_changes_with_whatever_states_depend_on(folder: Path, tmp_path: Path) -> None:
    names = {encoder_of(folder).name, encoder_of(folder, layer=-1).name, encoder_of(folder, dtype="bfloat16").name}
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert encoder_of(copy).name in names
    before = encoder_of(copy)(FRAMES)
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.0, 0.0, 0.0]}}))
    assert encoder_of(copy).name in names and torch.equal(encoder_of(copy)(FRAMES), before)  # it is not looked at
    changed(copy / PROCESSOR, image_mean=[0.5, 0.5, 0.5])
    assert len(names | {encoder_of(copy).name}) == 4


Change = Callable[[Path], Any]
WRONG: dict[str, tuple[Change, dict[str, Any], str]] = {
    "no folder": (lambda path: None, {"folder": None}, "set image_encoder.folder"),
    "another folder": (lambda path: None, {"folder": "nowhere"}, "nowhere is not a folder; set image_encoder.folder"),
    "no processor": (lambda path: (path / PROCESSOR).unlink(), {}, "preprocessor_config.json is not there; set image_encoder.processor"),
    "a processor of nothing": (lambda path: (path / PROCESSOR).write_text("{"), {}, "preprocessor_config.json cannot be used.*processor"),
    "another kind": (
        lambda path: (path / "config.json").write_text('{"model_type": "bert"}'), {}, "model_type bert.*set image_encoder.folder",
    ),
    "pickled": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), {}, "is pickled and never read.*image_encoder",
    ),
    "cut off": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]), {},
        "model.safetensors is damaged or cut off.*image_encoder.folder",
    ),
    "another width": (lambda path: None, {"dim": 12}, "gives 5 states of width 10, 5 of 12 are expected; set image_encoder.tokens"),
    "other patches": (lambda path: None, {"tokens": 257}, "257 of 10 are expected; set image_encoder.tokens"),
    "an adapter": (
        lambda path: (path / "adapter_config.json").write_text("{}"), {}, "adapter_config.json is of an adapter.*image_encoder.folder",
    ),
    "no such layer": (lambda path: None, {"layer": 9}, "has no layer 9.*set image_encoder.layer"),
    "no file of safetensors": (
        lambda path: indexed(path, "weights.bin"), {}, "index.json names 'weights.bin'.*set image_encoder.folder",
    ),
    "quantised": (
        lambda path: weights(path, lambda x: (100 * x).to(torch.int8)), {},
        "as I8: quantised weights are not read; set image_encoder.folder",
    ),
    "no numbers": (
        lambda path: weights(path, lambda x: x * float("nan")), {},
        "no numbers in float32; set image_encoder.dtype or image_encoder.folder",
    ),
    "another shape": (
        lambda path: changed(path / "config.json", intermediate_size=17), {},
        "in other shapes: .*encoder.layers.0.mlp.fc1.bias and .*image_encoder.folder",
    ),
    "a million layers": (
        lambda path: changed(path / "config.json", num_hidden_layers=10**6), {}, "asks for num_hidden_layers 1000000.*image_encoder.folder",
    ),
    "a large one": (
        lambda path: changed(path / "config.json", intermediate_size=10**9), {}, "asks for [0-9]+ weights, and its files hold",
    ),
    "a deep config": (
        lambda path: (path / "config.json").write_text("[" * 10**5), {}, "config.json cannot be read.*image_encoder.folder",
    ),
    "a deep processor": (
        lambda path: (path / PROCESSOR).write_text("[" * 10**5), {}, "cannot be used.*set image_encoder.processor",
    ),
    "fewer layers": (
        lambda path: changed(path / "config.json", num_hidden_layers=5), {}, "lacks weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_refused_in_a_line(folder: Path, tmp_path: Path, case: str) -> None:
    change, words, message = WRONG[case]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    with pytest.raises(ValueError, match=message) as found:
        encoder_of(**{"folder": copy, **words})(FRAMES)
    assert "\n" not in str(found.value)
