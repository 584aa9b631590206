import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from dit_video.data.video_file import write_mp4
from dit_video.eval.estimate import wilson
from dit_video.eval.judge import Clip, Evaluation, Judgement
from dit_video.eval.report import write_report
from dit_video.runs import write_clips
from dit_video.sampler.generate import Request, Sampler

ATTACK = "<script>alert('x')</script>\" onload=\"alert(1)"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, text and attribute values, with every element closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.values, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.values += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def run_dir(tmp_path):
    """What a finished run leaves, with text that attacks the page wherever text can come from outside."""
    run = tmp_path / "demo"
    estimates = {
        f"adherence.{suite}.{name}": wilson(60, 64) for suite in ("seen", "held_out") for name in ("all", "colour", ATTACK)
    }
    clips = [
        Clip(
            "seen",
            Request(ATTACK, 0, 3, 32, 32, 8.0),
            np.full((3, 32, 32, 3), 40, np.uint8),
            Judgement(False, f"colour is {ATTACK}"),
        ),
        Clip(
            "seen", Request("a red circle", 1, 3, 32, 32, 8.0), np.full((3, 32, 32, 3), 90, np.uint8), Judgement(True, "as asked")
        ),
        Clip(ATTACK, Request("a street", 2, 3, 32, 32, 8.0), np.full((3, 32, 32, 3), 90, np.uint8)),
    ]
    Evaluation({"metric.adherence": f"protocol {ATTACK}", "suite.seen": ATTACK}, estimates, clips).write(run / "evaluation.json")
    write_clips(run / "evaluation", clips, Sampler())
    rows = [
        {
            "step": step,
            "clips": 32 * step,
            "train/loss": 2 / step,
            f"train/loss/task/{ATTACK}": 1 / step,
            "perf/clips_per_second": step,
        }
        | {f"train/loss/level/0.{level}-0.{level + 1}": level / step for level in range(9)}
        for step in range(1, 900)
    ]
    rows += [{"clips": 32 * step, "eval/adherence.seen.all": step / 900, "val/loss": 3 / step} for step in (300, 600, 899)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    (run / "summary.json").write_text(
        json.dumps({"clips": 28768, "core_seconds": 301.5, "commit": ATTACK, "parameters": 1523456})
    )
    bucket = {"shape": {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}, "clips": {ATTACK: 1234, "photos": 7}}
    bucket |= {"clips_per_step": 16, "tokens_per_clip": 216, "cost_per_clip": 2e9}
    image = {"shape": {"num_frames": 1, "height": 32, "width": 48, "fps": 8.0}, "clips_per_step": 64, "cost_per_clip": 4e8}
    data = {"buckets": [bucket, image, ATTACK], "refused": {ATTACK: 3, "beyond max_clips": 0}, "problems": [ATTACK]}
    (run / "data.json").write_text(json.dumps(data))
    (run / "config.yaml").write_text(f"prompt: {ATTACK}\n")
    return run


def test_report_is_one_well_formed_file_that_loads_nothing(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.values)
    assert "<script" not in text.lower() and ATTACK in page.text
    for name, value in page.values:
        if name in ("src", "href", "action", "poster", "data"):
            assert value.startswith("data:video/mp4;base64,")
    assert not re.search(r"https?://|url\(|@import|//[a-z]", text)
    assert "default-src 'none'" in text


def test_report_shows_every_part(run_dir):
    out = run_dir.parent / "elsewhere" / "page.html"
    page = Page(write_report(run_dir, out).read_text(encoding="utf-8"))
    assert page.tags.count("video") == 3 and not (run_dir / "report.html").exists()
    for words in (
        "93.8%",
        "right",
        "wrong",
        "not judged",
        "seed 1",
        "1,523,456",
        "Clips per second",
        "damaged",
        "0.3-0.4",
        "n = 64",
        "1,234",
        "216",
        "80.0%",
        "Left out: 3",
    ):
        assert words in page.text, words
    low, high = (f"{100 * end:.1f}%" for end in (wilson(60, 64).low, wilson(60, 64).high))
    assert f"{low} – {high}" in page.text


def test_missing_parts_are_said(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for name in ("summary.json", "evaluation.json", "metrics.jsonl", "evaluation/index.jsonl", "data.json", "config.yaml"):
        assert name in page.text
    with pytest.raises(ValueError, match="run="):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "{",
        '{"metrics": 3, "protocol": []}',
        '{"metrics": {"a.b.c": {"value": NaN}, "a": 1}}',
        '{"buckets": 3}',
        '{"buckets": [{}, 1], "refused": 4, "problems": 5}',
    ],
)
def test_damaged_parts_do_not_stop_the_report(run_dir, content):
    for name in ("summary.json", "evaluation.json", "metrics.jsonl", "evaluation/index.jsonl", "data.json"):
        (run_dir / name).write_text(content)
    Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_only_clips_of_the_gallery_are_embedded(run_dir):
    write_mp4(run_dir / "private.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    (run_dir / "evaluation" / "linked.mp4").symlink_to(run_dir / "private.mp4")
    names = ["../private.mp4", str(run_dir / "private.mp4"), "linked.mp4", "../config.yaml", "", "absent.mp4"]
    (run_dir / "evaluation" / "index.jsonl").write_text(
        "".join(json.dumps({"file": name, "prompt": "x"}) + "\n" for name in names)
    )
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "video" not in page.tags and "6 more clips are not shown" in page.text


def test_report_stays_small(run_dir):
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    clips = [Clip("noise", Request("noise", number, 9, 64, 64, 8.0), noise) for number in range(80)]
    shutil.rmtree(run_dir / "evaluation", ignore_errors=True)
    write_clips(run_dir / "evaluation", clips, Sampler())
    report = write_report(run_dir)
    assert report.stat().st_size < 5_000_000
    assert "more clips are not shown" in report.read_text(encoding="utf-8")
