from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dit_video.eval.judge import Metric, Suite, evaluate
from dit_video.world.render import render
from dit_video.world.state import sample_scene

CONF = Path(__file__).parents[2] / "conf" / "eval"


def oracle(requests):
    size = [{"num_frames": each.num_frames, "height": each.height, "width": each.width, "fps": each.fps} for each in requests]
    return [
        render(sample_scene(np.random.default_rng(each.seed), split="any", **kind, **each.attributes))
        for each, kind in zip(requests, size, strict=True)
    ]


def compose(name, **changed):
    config = OmegaConf.create({"eval": OmegaConf.load(CONF / f"{name}.yaml")})
    for key, value in changed.items():
        OmegaConf.update(config, f"eval.{key}", value)
    return instantiate(config.eval, _convert_="all")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_config_makes_suites_and_metrics(name):
    found = compose(name, **({"shards": "held_out/*.tar"} if name == "footage" else {}))
    assert all(isinstance(each, Suite) for each in found["suites"].values())
    assert all(isinstance(each, Metric) and each.protocol for each in found["metrics"].values())


def test_world_asks_for_what_is_promised():
    suites = compose("world")["suites"]
    asked = {name: suite.requests() for name, suite in suites.items()}
    assert len(asked["seen"]) == len(asked["held_out"]) == 512 and len(asked["open"]) == 640
    sizes = {name: (each[0].num_frames, each[0].height, each[0].width) for name, each in asked.items()}
    assert sizes["frames_12"] == (12, 32, 32) and sizes["tall_48x32"] == (9, 48, 32) and sizes["wide_32x48"] == (9, 32, 48)


def test_small_world_measures_both_splits():
    found = compose("world_small")
    names = evaluate(found["suites"], found["metrics"], oracle, found["batch_size"]).metrics
    assert {"adherence.seen.all", "adherence.held_out.all", "adherence.held_out.colour"} <= set(names)
    assert all(estimate.value >= 0.96 for estimate in names.values())
