"""Published weights through the programs: train them or adapters beside them, go on, sample, and hand them back to diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import QUIET, dit_video, same, tensors
from wan_models import reference, tokens_of

import dit_video as package
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
    return dit_video(
        "train", "model=wan2.1_t2v_1.3b", "model.width=28", "model.depth=2", "model.heads=2", "model.mlp_dim=40", "model.level_dim=32",
        "text.dim=32", "text.buckets=64", f"init_from={pretrained}/wan", f"autoencoder.folder={pretrained}/vae",
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

    export = ["checkpoint", "export", f"run={tmp_path}/straight", f"out={tmp_path}/adapters", "layout=diffusers"]
    assert dit_video(*export) == 0
    theirs = WanTransformer3DModel.from_pretrained(pretrained / "wan").eval()
    plain = outputs(tmp_path / "straight", theirs)[1]
    theirs.load_lora_adapter(tmp_path / "adapters" / "pytorch_lora_weights.safetensors", prefix="transformer")
    ours, other = outputs(tmp_path / "straight", theirs)
    assert (ours - other).abs().max() < 1e-5 * other.abs().max()
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()


def test_what_cannot_be_a_base_is_refused_in_a_line(
    pretrained: Path, world_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (("lora=default", "init_from=null"), "set init_from"),
        (("lora=default", "model.depth=3"), "lacks"),
        (("lora=default", "lora.targets=[nothing]"), "set lora.targets"),
        ((f"init_from={tmp_path}/nowhere",), "init_from"),
    ):
        assert train(pretrained, world_shards, tmp_path / "runs", "refused", *words) == 1
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
