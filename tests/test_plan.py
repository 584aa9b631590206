"""`dit-video plan` says what a training needs, whether its data is there or not, and what to change where it does not fit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import SMALL

from dit_video.build import make_network
from dit_video.cli import main
from dit_video.compose import compose, take_apart
from dit_video.plan import check
from dit_video.plan.search import Found, Search, alternatives, changes
from dit_video.plan.step import Choice, Device, find_buckets, predict_step, step_seconds

WORDS = (*SMALL, "data.shards=nowhere.tar")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_a_plan_of_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *WORDS, "max_clips=800", "price=3", "devices=2", "trainer.accelerator=gpu")
    assert "2 x NVIDIA H100 SXM: replicate 2 x shard 1 x context 1" in out
    for part in (
        "transformer",
        "text encoder",
        "averages",
        "optimisers",
        "gradients",
        "activations",
        "temporaries",
        "batch",
        "all",
    ):
        assert re.search(rf"^ *{part} ", out, re.M), part
    assert "not known yet: nowhere.tar: there is no such shard" in out
    assert re.search(r"max_clips=800: 100 steps, .*FLOPs, .* device-hours, [\d.]+ at 3 an hour", out)
    assert "\nFits: " in out and max(map(len, out.splitlines())) <= 140


def test_every_bucket_has_a_line_and_steps_that_cost_alike(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *WORDS, "data.buckets=[{num_frames: 1}, {num_frames: 9}, {num_frames: 17, width: 48}]")
    lines = {
        shape: re.search(rf"^ *{shape}.*$", out, re.M)[0].split()
        for shape in ("image 32x32", "9 frames 32x32", "17 frames 32x48")
    }
    clips = [int(words[2 if words[0] == "image" else 6 if words[3] == "at" else 5]) for words in lines.values()]
    assert clips[0] > clips[1] > clips[2]


def test_a_pass_over_data_that_is_there(world_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *SMALL, f"data.shards={world_shards}/*.tar", "max_clips=640")
    assert re.search(r"a pass +64 clips: 8 steps", out) and re.search(r"max_clips=640: 80 steps", out)


def test_measuring_prints_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *WORDS, "measure=true")
    (error,) = re.findall(r"^ *peak +\S+ \S+ +\S+ \S+ +([+-][\d.]+)%", out, re.M)
    assert abs(float(error)) < 10


@pytest.mark.parametrize("text", ["umt5", "several"])
def test_what_comes_as_states_is_measured_without_its_encoder(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = [word for word in WORDS if not word.startswith("text.")]
    out = printed(capsys, *own, f"text={text}", "caption_words=40", "measure=true")
    assert abs(float(re.findall(r"^ *peak +\S+ \S+ +\S+ \S+ +([+-][\d.]+)%", out, re.M)[0])) < 10


def test_frozen_weights_that_come_to_the_device_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """MiniLM has 90 MB, more than all the rest; cut over two ranks it needs 45 between uses, and 135 in use."""
    own = [word for word in WORDS if not word.startswith("text.")]
    words = [*own, "text=minilm", "trainer.devices=2", "trainer.layout.shard=2", "margin=0"]

    def said(placement: str, memory: float) -> list[tuple[str, str]]:
        out = printed(capsys, *words, f"text.placement={placement}", f"device.memory={memory}")
        return re.findall(r"^(Fits|Does not fit)(, too)?: ", out, re.M)

    assert said("device", 120e6) == [("Fits", "")]  # they lie there already
    assert said("offload", 120e6) == [("Fits", ""), ("Fits", ", too")]
    assert said("shard", 120e6) == [("Fits", ""), ("Does not fit", ", too")]
    assert said("shard", 160e6) == [("Fits", ""), ("Fits", ", too")]


@pytest.mark.slow
def test_what_is_suggested_fits_when_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """On a device with less memory than the step needs, and one with less than any layout of it leaves free."""
    words = [*WORDS, "data.batch_size=16", "optimisers=adamw"]
    out = printed(capsys, *words, "device.memory=8e6")
    assert "Does not fit" in out
    (typed,) = re.findall(r"^To make it fit.*\n  (.*)$", out, re.M)
    assert "\nFits: " in printed(capsys, *words, "device.memory=8e6", *typed.split())


@pytest.mark.slow
def test_a_suggestion_cuts_weights_or_tokens_where_clips_cannot_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "data.batch_size=2", "trainer.devices=2", "trainer.layout.replicate=2", "model.width=96", "optimisers=adamw"]
    out = printed(capsys, *words, "device.memory=7.5e6", "margin=0")
    (typed,) = re.findall(r"^To make it fit.*\n  (.*)$", out, re.M)
    assert "trainer.layout" in typed
    assert "\nFits: " in printed(capsys, *words, "device.memory=7.5e6", "margin=0", *typed.split())


@pytest.mark.slow
def test_where_nothing_fits_the_plan_says_what_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *WORDS, "device.memory=1e5", "data.batch_size=2")
    assert "Nothing on as many devices fits" in out and "at the peak of the" in out


def test_overrides_lead_from_one_choice_to_another() -> None:
    config = compose("plan", take_apart([*WORDS, "devices=4", "trainer.layout.replicate=4", "trainer.devices=4"]))
    before = Choice(check(config), 1)
    found = [choice for choices in alternatives(before, 8, heads=2) for choice in choices]
    layouts = {choice.hardware.parallel.layout for choice in found}
    assert {(each.replicate, each.shard, each.context) for each in layouts} == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2)}
    assert changes(before, found[0]) == [] and all(choice.hardware.parallel.layout.world_size == 4 for choice in found)
    assert len({tuple(changes(before, choice)) for choice in found}) == len(found)


def test_a_step_lasts_as_long_as_its_greatest_bound() -> None:
    config = compose("plan", take_apart([*WORDS, "utilisation=0.5"]))
    network, choice = make_network(config), Choice(check(config), 1)
    (bucket,), _ = find_buckets(config, network, choice)
    memory = predict_step(config, network, bucket, choice)
    products = sum(memory.flops.values())
    assert products > bucket.flops * bucket.clips  # the optimiser's beside the network's
    slow = Device("slow", 1e12, 1e6, 1e6, 1e15, 1e15)
    assert step_seconds(config, memory, choice.hardware, slow) == (pytest.approx(products / 5e5), "products")
    assert step_seconds(config, memory, choice.hardware, Device("narrow", 1e12, 1e18, 1e18, 1e3, 1e15))[1] == "memory"
    assert Search(config, network, bucket, choice, slow, 1e12).tried(choice) == Found([], memory, products / 5e5)


@pytest.mark.slow
def test_a_large_model_is_planned_in_little_memory() -> None:
    code = (
        "import resource, sys; from dit_video.cli import main; status = main(sys.argv[1:]); "
        "print('KILOBYTES', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    words = "plan model=14b trainer=fsdp trainer.devices=8 data.num_frames=81 data.height=480 data.width=832 data.batch_size=8"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split(), "device.memory=1e13"], capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Fits: " in done.stdout and "clips are latents of 4x8x8 pixels" in done.stdout
    assert int(re.findall(r"KILOBYTES (\d+)", done.stdout)[0]) < 1.5e6


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("utilisation=0", "set utilisation"),
        ("utilisation=1.5", "set utilisation"),
        ("margin=1", "set margin"),
        ("price=-1", "set price"),
        ("network=0", "set network"),
        ("device.memory=0", "set device.memory"),
        ("devices=0", "set devices"),
        ("caption_words=65", "set text.max_words"),
        ("data.height=33", "set height"),
        ("data.buckets=[{frames: 9}]", "data.buckets has no frames"),
        ("trainer.layout.shard=3", "set trainer.layout"),
        ("device=abacus", "device has no option 'abacus'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, word]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_measuring_many_ranks_needs_many_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "devices=2", "measure=true"]) == 1
    assert "torchrun" in capsys.readouterr().err.splitlines()[-1]
