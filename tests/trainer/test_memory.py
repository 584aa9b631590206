"""The ledger counts what lives, and what it predicts of a step without contents is what it measures of a real one."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from layout_work import errors, planned, run_ranks  # noqa: E402

from dit_video.build import make_network  # noqa: E402
from dit_video.compose import compose, take_apart  # noqa: E402
from dit_video.plan import check  # noqa: E402
from dit_video.plan.step import Choice, find_buckets, make_batch, predict_step, unstarted  # noqa: E402
from dit_video.train import make_module  # noqa: E402
from dit_video.trainer.fit import fit  # noqa: E402
from dit_video.trainer.hollow import _autocast_of_a_gpu  # noqa: E402
from dit_video.trainer.memory import Ledger, Memory, along  # noqa: E402

NARROW = ("model.width=64", "model.depth=3", "model.heads=4", "text.dim=32", "data.batch_size=6")
CONFIGS = {
    "as it is": (),
    "float32, sdpa, recompute full": ("model/attention=sdpa", "trainer.precision=32-true", "trainer.recompute=full", "model.depth=8"),
    "AdamW, cross-attention, a long bucket, micro-batches": (
        "optimisers=adamw", "model.text=cross", "data.buckets=[{num_frames: 1}, {num_frames: 17, height: 48}]", "data.micro_batches=3",
    ),
    "recompute selective, no pooled text, velocity": (
        "trainer.recompute=selective", "model.pooled_dim=0", "objective.predict=velocity", "model.mlp_ratio=6",
    ),
    "uneven micro-batches, long captions": ("data.batch_size=11", "data.micro_batches=3", "caption_words=60", "data.num_frames=1"),
    "wide and few tokens: Muon is the peak": ("model.width=256", "data.batch_size=1", "model.patch=[4,16,16]"),
    "another attention's shape, float32 Muon": ("model.head_dim=24", "model/attention=sdpa", "+optimisers.muon_precision=float32"),
}  # fmt: skip
LAYOUTS = {
    "fsdp 2": ("trainer.devices=2", "trainer.layout.shard=2"),
    "fsdp 2, AdamW, recompute full": ("trainer.devices=2", "trainer.layout.shard=2", "optimisers=adamw", "trainer.recompute=full"),
    "fsdp 2, weights travel in bfloat16, two averages": (
        "trainer.devices=2", "trainer.layout.shard=2", "trainer.gather_precision=bfloat16", "ema_decay=[0.9,0.99]",
        "sampler.precision=bfloat16",
    ),
    "ddp 2, micro-batches": ("trainer.devices=2", "trainer.layout.replicate=2", "data.micro_batches=6"),
    "hsdp 2x2": ("trainer.devices=4", "trainer.layout.replicate=2", "trainer.layout.shard=2", "data.micro_batches=4"),
    "context 2": ("trainer.devices=2", "trainer.layout.context=2", "trainer.recompute=selective"),
    "fsdp x context 2x2, float32": ("trainer.devices=4", "trainer.layout.shard=2", "trainer.layout.context=2", "trainer.precision=32-true"),
}  # fmt: skip


def test_storages_count_from_birth_to_end() -> None:
    ledger = Ledger()
    with ledger:
        ledger.phase = "forward"
        kept = torch.zeros(1000)
        ledger.name("kept", [kept])
        view = kept.unflatten(0, (10, 100))[3:]  # the same memory
        twice = (view * 2) + 1  # of which the product is gone when the sum is made
        ledger.phase = "backward"
        del twice
        kept.untyped_storage().resize_(0)  # as sharding frees gathered weights
        other = torch.zeros(10)
    found = ledger.read(1)
    assert found.peaks["forward"] == {"kept": 4000, "temporaries": 2 * 2800}
    assert found.peak == 9600 and found.worst == "forward"
    assert found.most == {"kept": 4000, "temporaries": 5600}
    assert other.numel() == 10 and torch.UntypedStorage.resize_ is ledger._resize


def test_products_are_counted() -> None:
    query = torch.randn(2, 3, 40, 16)
    with Ledger() as ledger:
        ledger.phase = "forward"
        torch.randn(4, 5) @ torch.randn(5, 6)
        assert ledger.flops["forward"] == 2 * 4 * 5 * 6
        F.scaled_dot_product_attention(query, query, query)
        assert ledger.flops["forward"] == 2 * 4 * 5 * 6 + 2 * 2 * 2 * 3 * 40 * 40 * 16


@pytest.mark.parametrize("name", list(CONFIGS)[:3])
def test_a_prediction_is_what_is_measured(name: str) -> None:
    assert max(map(abs, errors(*planned([*NARROW, *CONFIGS[name]])).values())) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS)[3:])
def test_other_predictions_are_what_is_measured(name: str) -> None:
    assert max(map(abs, errors(*planned([*NARROW, *CONFIGS[name]])).values())) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prediction_of_many_ranks_is_what_each_measures(name: str) -> None:
    """Of three measurements the nearest: on a busy machine gloo's threads let go of what they have sent late, which only adds to one."""
    ranks = int(LAYOUTS[name][0].partition("=")[2])
    for again in (True, True, False):
        furthest = max(
            max(map(abs, errors(predicted, found).values()))
            for predicted, found in run_ranks(ranks, planned, [*NARROW, *LAYOUTS[name]])
        )
        if furthest < 0.1 or not again:
            break
    assert furthest < 0.1


def test_the_allocator_of_a_cpu_says_the_same() -> None:
    """Beside the ledger torch's profiler is asked, which hears of every allocation."""
    config = compose("plan", take_apart([*NARROW, "data.shards=nowhere.tar", "objective.caption_dropout=0"]))
    network, choice = make_network(config), Choice(check(config), 1)
    (bucket,), _ = find_buckets(config, network, choice)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module = make_module(unstarted(config), None, choice.hardware)
        fit(module, (make_batch(config, network, bucket, choice) for _ in range(3)), [], [], choice.hardware)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert predict_step(config, network, bucket, choice).peak == pytest.approx(max(held), rel=0.01)


def test_a_gpu_norms_in_float32_under_autocast() -> None:
    """And only while it is imitated; gradients pass."""
    x, wide = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(4, 8)

    def types() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [F.rms_norm(x, (8,)).dtype, x.softmax(-1).dtype, torch.addcmul(x, x, wide).dtype, (wide @ wide.mT).dtype]

    with _autocast_of_a_gpu():
        assert types() == [torch.float32, torch.float32, torch.float32, torch.bfloat16]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.rms_norm(x, (8,)).sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert types()[:2] == [torch.bfloat16, torch.bfloat16]


def test_memory_of_more_blocks_lies_on_a_line() -> None:
    few, more = (Memory({p: {"a": 10 * n} for p in ("forward", "backward", "update")}, {"a": 10 * n}, {}, {}, {}) for n in (3, 5))
    assert along(few, more, 1.5).most == {"a": 60} and along(few, more, 1.5).peak == 60
