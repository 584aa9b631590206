import json

import numpy as np
import pytest

from dit_video.eval.estimate import bootstrap_mean
from dit_video.eval.judge import Judgement, Metric, Suite, evaluate, gallery
from dit_video.sampler.generate import Request


class Plain(Suite):
    protocol = "plain clips"

    def __init__(self, count: int, width: int = 6) -> None:
        self.count, self.width = count, width

    def requests(self) -> list[Request]:
        return [Request(f"clip {number}", number, 3, 4, self.width, 8.0) for number in range(self.count)]


class Brightness(Metric):
    protocol = "mean pixel value"

    def __init__(self, suites: list[str] | None = None) -> None:
        self.suites = suites

    def __call__(self, requests, videos):
        return {"mean": bootstrap_mean([video.mean() for video in videos], seed=0)}

    def judgements(self, requests, videos):
        return [Judgement(video.mean() < 5, "dark enough") for video in videos]


class Wide(Brightness):
    def suits(self, requests):
        return requests[0].width > 6


def as_seeded(requests: list[Request]) -> list[np.ndarray]:
    return [np.full((request.num_frames, request.height, request.width, 3), request.seed, np.uint8) for request in requests]


def test_every_suite_is_sampled_once_in_batches_and_in_order():
    sizes = []

    def generate(requests):
        sizes.append(len(requests))
        return as_seeded(requests)

    found = evaluate(
        {"a": Plain(7), "b": Plain(2, width=8)}, {"one": Brightness(), "two": Brightness(["a"]), "wide": Wide()}, generate, 3
    )
    assert sizes == [3, 3, 1, 2]
    assert sorted(found.metrics) == ["one.a.mean", "one.b.mean", "two.a.mean", "wide.b.mean"]
    assert found.metrics["one.a.mean"].value == 3.0 and found.metrics["one.a.mean"].count == 7
    assert [clip.request.seed for clip in found.clips] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert [clip.judgement.right for clip in found.clips[:7]] == [True] * 5 + [False] * 2
    assert found.protocol == {
        "suite.a": "plain clips", "suite.b": "plain clips",
        "metric.one": "mean pixel value", "metric.two": "mean pixel value", "metric.wide": "mean pixel value",
    }  # fmt: skip


def test_written_json_holds_every_number(tmp_path):
    found = evaluate({"a": Plain(4)}, {"one": Brightness()}, as_seeded, 9)
    found.write(tmp_path / "run" / "evaluation.json")
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert stored["metrics"]["one.a.mean"].keys() == {"value", "low", "high", "count"}
    assert stored["protocol"]["metric.one"] == "mean pixel value"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["evaluation.json"]


def test_gallery_swaps_in_failures():
    found = evaluate({"a": Plain(9), "b": Plain(3)}, {"one": Brightness()}, as_seeded, 9)
    assert [clip.request.seed for clip in gallery(found.clips, per_suite=4, wrong=2)] == [0, 1, 5, 6, 0, 1, 2]
    assert len(gallery(found.clips, per_suite=100, wrong=2)) == 12


def test_mistakes_are_named_before_anything_is_sampled():
    def never(requests):
        raise AssertionError("sampled")

    with pytest.raises(ValueError, match="'c'.*a, b"):
        evaluate({"a": Plain(2), "b": Plain(2)}, {"one": Brightness(["c"])}, never, 2)
    with pytest.raises(ValueError, match=r"wide.*eval\.metrics\.wide\.suites"):
        evaluate({"a": Plain(2)}, {"wide": Wide(["a"])}, never, 2)
    with pytest.raises(ValueError, match=r"eval\.suites\.a"):
        evaluate({"a": Plain(0)}, {}, never, 2)
    with pytest.raises(ValueError, match=r"eval\.batch_size"):
        evaluate({"a": Plain(2)}, {}, never, 0)


@pytest.mark.parametrize(
    "broken",
    [lambda videos: videos[1:], lambda videos: [video[1:] for video in videos], lambda videos: [video / 255 for video in videos]],
)
def test_videos_other_than_asked_for_are_refused(broken):
    with pytest.raises(ValueError, match="suite a: asked for"):
        evaluate({"a": Plain(2)}, {}, lambda requests: broken(as_seeded(requests)), 2)
