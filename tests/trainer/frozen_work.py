"""What every rank of a test of frozen weights does: encoders that are cut over ranks, beside the same ones whole."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dit_video.model.frozen import Frozen, met_before
from dit_video.model.pretrained_autoencoder import DiffusersAutoencoder
from dit_video.model.pretrained_text import PretrainedText
from dit_video.seeding import seeded
from dit_video.trainer.layout import RankFailed, all_gathered, together

ROUNDS = [  # of captions, by rank: some that a rank knows already, some that both are new to, some that one alone must read
    (["a red circle", "snow"], ["snow", "rain"]),
    (["a red circle"], ["hail"]),
    (["snow", ""], ["hail"]),
    (["fog"], ["fog"]),
]


def encoding(folder: Path) -> dict[str, Any]:
    """Whether states and clips of what is cut are those of what is whole, and how many bytes are held between uses."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    texts = {
        kind: PretrainedText(str(folder / "umt5"), 24, dtype="bfloat16", no_caption="encoded", placement=kind)  # type: ignore[arg-type]
        for kind in ("device", "shard")
    }
    same = []
    for captions in ROUNDS:
        one, other = (text(captions[rank % 2]) for text in texts.values())
        same.append(torch.equal(one.states, other.states) and torch.equal(one.lengths, other.lengths))
    coders = {
        kind: DiffusersAutoencoder((4, 8, 8), 16, str(folder / "vae"), placement=kind)  # type: ignore[arg-type]
        for kind in ("device", "shard")
    }
    video = torch.rand(1 + rank, 5, 16, 24, 3, generator=seeded(rank)) * 2 - 1  # as many clips as each rank likes
    latents = [coder.encode(video) for coder in coders.values()]
    same += [torch.equal(*latents), torch.equal(*(coder.decode(latents[0]) for coder in coders.values()))]
    held = {}
    for name, whole, cut in (
        ("text", texts["device"].pretrained, texts["shard"].pretrained),
        ("autoencoder", coders["device"].scaled, coders["shard"].scaled),
    ):
        held[name] = bytes_of(cut) / bytes_of(whole)
    dist.destroy_process_group()
    return {"same": same, "held": held, "encoded": texts["shard"].counts.encoded}


def failing(folder: Path) -> list[str]:
    """What a rank is told where rank 0 fails while the other goes on to what is cut, and where rank 0 cannot load it; then it works."""
    dist.init_process_group("gloo")
    rank, told = dist.get_rank(), []
    coder = DiffusersAutoencoder((4, 8, 8), 16, str(folder / "vae"), placement="shard")
    latents = torch.zeros(1, 2, 2, 2, 16)

    def work() -> None:
        if rank == 0:
            raise OSError("a disk is gone")
        coder.decode(latents)

    load = coder.scaled._load
    for attempt in ("work", "load", "nothing"):
        if attempt == "load" and rank == 0:
            coder.scaled._load = lambda: (_ for _ in ()).throw(ValueError("no weights"))
        try:
            with met_before(lambda: all_gathered(None)):
                together(work if attempt == "work" else lambda: coder.decode(latents))
            told.append("done")
        except RankFailed as error:
            told.append(str(error))
        coder.scaled._load = load
    dist.destroy_process_group()
    return told


def bytes_of(frozen: Frozen) -> int:
    """Bytes of all storages that a frozen module keeps alive."""
    module, pieces = frozen._module, frozen._pieces
    assert module is not None
    tensors = [*module.parameters(), *module.buffers(), *([] if pieces is None else [pieces.part])]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
