"""Published weights through the programs: train them or adapters beside them, go on, sample, and hand them back to diffusers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_towers import picture_tower
from safetensors.torch import load_file
from small_run import QUIET, dit_video, records, same, tensors
from wan_models import reference, tokens_of

import dit_video as package
from dit_video.data.loader import ClipLoader
from dit_video.data_tools.random_autoencoder import write_random_autoencoder
from dit_video.seeding import seeded
from dit_video.shapes import Context, Stream

pytest.importorskip("diffusers")
SIZES = {"in_channels": 16, "out_channels": 16, "text_dim": 32}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random autoencoder and a random Wan, as diffusers saves them."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_random_autoencoder(str(folder / "vae"))
    reference("t2v", **SIZES).save_pretrained(folder / "wan")  # type: ignore[operator]
    return folder


def train(pretrained: Path, shards: Path, runs: Path, name: str, *words: object) -> int:
    return begin(pretrained, shards, runs, name, "model=wan2.1_t2v_1.3b", f"init_from={pretrained}/wan", *words)


def begin(pretrained: Path, shards: Path, runs: Path, name: str, *words: object) -> int:
    return dit_video(
        "train", "model.width=28", "model.depth=2", "model.heads=2", "model.mlp_dim=40", "model.level_dim=32",
        "text.dim=32", "text.buckets=64", f"autoencoder.folder={pretrained}/vae",
        "autoencoder.dtype=float32", "optimisers=adamw", "optimisers.warmup_clips=8", "data.batch_size=4", "max_clips=24", "logger=none",
        "sampler.steps=2", "ema_decay=0.5", "trainer.precision=32-true", *QUIET, f"runs={runs}", f"name={name}",
        f"data.shards={shards}/*.tar", *words,
    )  # fmt: skip


def outputs(run: Path, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a run's network and a model of diffusers make of the same clip."""
    trained = package.load(run).trained
    generator = seeded(0, "clip")
    latents, states = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.randn(2, 7, 32, generator=generator)
    text = torch.nn.functional.pad(states, (0, 0, 0, 505))
    grid = trained.tokens.grid(9, 32, 32)
    n = grid.num_tokens
    nothing = torch.zeros(2, n, dtype=torch.bool)
    stream = Stream(
        tokens_of(latents), trained.tokens.places(grid, 8.0).expand(2, -1, -1), torch.tensor([[0.3], [0.8]]), nothing.long(),
        nothing, nothing,
    )  # fmt: skip
    with torch.no_grad():
        ours = trained.network.transformer({"video": stream}, Context(states, torch.tensor([7, 7])))[0]["video"]
        other = theirs(latents, torch.tensor([300.0, 800.0]), text, return_dict=False)[0]
    return ours, tokens_of(other)


def test_weights_are_trained_and_go_back(pretrained: Path, world_shards: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    assert train(pretrained, world_shards, tmp_path, "full") == 0
    for layout in ("diffusers", "original"):
        assert dit_video("checkpoint", "export", f"run={tmp_path}/full", f"out={tmp_path}/{layout}", f"layout={layout}") == 0
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers").eval()
    ours, other = outputs(tmp_path / "full", theirs)
    assert (ours - other).abs().max() < 1e-5 * other.abs().max()
    before = load_file(pretrained / "wan" / "diffusion_pytorch_model.safetensors")
    assert not all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())

    # what was exported is a start for another run, in either layout
    assert train(pretrained, world_shards, tmp_path, "on", "max_clips=8", f"init_from={tmp_path}/original") == 0
    video = package.load(tmp_path / "full").sample("a small red circle moves left", num_frames=5, height=16, width=16)
    assert video.shape == (5, 16, 16, 3) and video.dtype == np.uint8


def test_adapters_are_trained_alone_and_go_back(pretrained: Path, world_shards: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    words = ("lora=default", "lora.rank=3", "lora.alpha=6", "every.save=8", "optimisers.adamw_lr=0.02")
    assert train(pretrained, world_shards, tmp_path, "straight", *words) == 0
    names = {name.split("/", 1)[1] for name in tensors(tmp_path / "straight") if name.startswith("network/transformer")}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)

    # stopped half-way it goes on to the same weights, though its base is in no checkpoint
    with pytest.raises(SystemExit, match="143"):
        train(pretrained, world_shards, tmp_path, "resumed", *words, "trainer.max_hours=1e-9")
    assert train(pretrained, world_shards, tmp_path, "resumed", *words) == 0
    assert same(tensors(tmp_path / "straight"), tensors(tmp_path / "resumed"))

    wide, rounded = (package.load(tmp_path / "straight", dtype=dtype) for dtype in ("float32", "bfloat16"))
    few = replace(rounded.sampler, steps=2)
    assert np.array_equal(*(run.sample("snow", sampler=few) for run in (wide, rounded)))

    export = ["checkpoint", "export", f"run={tmp_path}/straight", f"out={tmp_path}/adapters", "layout=diffusers"]
    assert dit_video(*export) == 0
    theirs = WanTransformer3DModel.from_pretrained(pretrained / "wan").eval()
    plain = outputs(tmp_path / "straight", theirs)[1]
    theirs.load_lora_adapter(tmp_path / "adapters" / "pytorch_lora_weights.safetensors", prefix="transformer")
    ours, other = outputs(tmp_path / "straight", theirs)
    assert (ours - other).abs().max() < 1e-5 * other.abs().max()
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.slow
def test_a_model_that_looks_at_first_frames(
    pretrained: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Online and from the cache it has the same losses; another encoder's cache is refused; it samples from a frame alone."""
    for name, seed in {"clip": 0, "other": 1}.items():
        picture_tower(pretrained / name, seed)
    model = (
        "model=wan2.1_i2v_14b",
        "image_encoder.dim=10",
        "image_encoder.tokens=5",
        "data.random_start=false",
        "data.decoder=pyav",
    )
    clip, other = (f"image_encoder.folder={pretrained}/{name}" for name in ("clip", "other"))
    encode = (
        "data", "encode", f"data.shards={world_shards}/*.tar", "data=shards", "data.num_frames=9", "data.height=32", "data.width=32",
        "data.fps=8", "text=words", f"autoencoder.folder={pretrained}/vae", "autoencoder.dtype=float32", "dtype=float32",
    )  # fmt: skip
    assert dit_video(*encode, *model, clip, f"out={tmp_path}/encoded") == 0

    def losses(shards: Path, name: str, *words: str) -> list[float]:
        assert begin(pretrained, shards, tmp_path, name, *model, "every.record=8", *words) == 0
        return [line["train/loss"] for line in records(tmp_path / name)]

    online = losses(world_shards, "online", clip)
    assert len(online) == 3 and losses(tmp_path / "encoded", "cached", clip) == online
    assert losses(tmp_path / "encoded", "gone", "image_encoder.folder=null", "autoencoder.folder=null") == online
    assert losses(world_shards, "otherwise", other) != online

    capsys.readouterr()
    assert begin(pretrained, tmp_path / "encoded", tmp_path, "no", *model, other) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.count("clip_vision_model") == 2 and "set image_encoder" in line
    bare = ("model=wan2.1_t2v_1.3b", "data.random_start=false", "data.decoder=pyav", f"out={tmp_path}/bare")
    assert dit_video(*encode, *bare) == 0
    assert begin(pretrained, tmp_path / "bare", tmp_path, "no", *model, clip) == 1
    assert "by no image encoder" in capsys.readouterr().err.strip().splitlines()[-1]

    text = ("model=wan2.1_t2v_1.3b", "model.width=28", "data.random_start=false", "data.decoder=pyav", "every.record=8")
    assert begin(pretrained, tmp_path / "encoded", tmp_path, "text", *text) == 0  # what a model does not look at is no harm
    assert [line["train/loss"] for line in records(tmp_path / "text")]
    size = {"num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
    for images in (True, False):
        loader = ClipLoader(f"{tmp_path}/encoded/*.tar", 4, **size, images=images, micro_batches=2)
        batch = next(loader.batches())
        assert (batch.image is not None) == images
        assert [part.image.shape[0] for part in batch.micro_batches() if part.image is not None] == [2, 2] * images

    run, frame = package.load(tmp_path / "online"), np.full((1, 32, 32, 3), 90, np.uint8)
    one, another = (run.sample("snow", 0, given=each, task="image_to_video", **size) for each in (frame, frame + 90))
    assert one.shape == (9, 32, 32, 3) and (one != another).any()
    with pytest.raises(ValueError, match="from its first frame"):
        run.sample("snow", 0, **size)


@pytest.mark.slow
def test_frozen_weights_may_lie_elsewhere_by_now(
    pretrained: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export is opened with the autoencoder's new place, in Python and by the programs; another one is refused."""
    before = shutil.copytree(pretrained / "vae", tmp_path / "before")
    assert train(pretrained, world_shards, tmp_path, "run", f"autoencoder.folder={before}") == 0
    assert dit_video("checkpoint", "export", f"run={tmp_path}/run", f"out={tmp_path}/exported") == 0
    size = {"num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
    wanted = package.load(tmp_path / "run").sample("snow", 0, **size)
    now = before.rename(tmp_path / "now")
    write_random_autoencoder(str(tmp_path / "another"), seed=3)
    opened = package.load(tmp_path / "exported")  # which needs no autoencoder yet
    with pytest.raises(ValueError, match="before.*set autoencoder.folder"):
        opened.sample("snow", 0, **size)
    run = package.load(tmp_path / "exported", folders={"autoencoder.folder": str(now)})
    assert np.array_equal(run.sample("snow", 0, **size), wanted)
    with pytest.raises(ValueError, match="autoencoder.folder now holds"):
        package.load(tmp_path / "exported", folders={"autoencoder.folder": str(tmp_path / "another")})
    shutil.copytree(tmp_path / "another", before)  # in the old place, and so not named
    with pytest.raises(ValueError, match="autoencoder.folder now holds"):
        package.load(tmp_path / "exported")
    shutil.rmtree(before)
    wrong = {"autoencoder.channels": "is no place of frozen weights", "image_encoder.folder": "has no image_encoder.folder"}
    for key, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            package.load(tmp_path / "exported", folders={key: str(now)})

    sample = ("sample", f"run={tmp_path}/exported", "prompt=snow", f"out={tmp_path}/out")
    assert dit_video(*sample, f"autoencoder.folder={now}") == 0 and (tmp_path / "out" / "0000.mp4").is_file()
    capsys.readouterr()
    assert dit_video(*sample, f"autoencoder.folder={tmp_path}/another") == 1
    assert "autoencoder.folder now holds" in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_a_base_is_refused_in_a_line(
    pretrained: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "umt5"}')
    for words, said in (
        (("lora=default", "init_from=null"), "set init_from"),
        (("lora=default", "model.depth=3"), "lacks"),
        (("lora=default", "lora.targets=[nothing]"), "set lora.targets"),
        (("model.heads=1",), "wan/config.json is of a model with heads 2, got 1; set model.heads"),
        (("lora=default", "model.eps=0.1"), "set model.eps"),
        (("lora=default", "lora.targets=patch"), "set lora.targets"),
        ((f"init_from={tmp_path}/nowhere",), f"there is no folder {tmp_path}/nowhere; set init_from"),
        ((f"init_from={pretrained}/wan/config.json",), "there is no folder"),
        ((f"init_from={tmp_path}/encoder",), "encoder/config.json has no config of a run"),
    ):
        assert train(pretrained, world_shards, tmp_path / "runs", "refused", *words) == 1
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
