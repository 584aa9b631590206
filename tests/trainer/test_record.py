import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from dit_video.trainer.record import JsonlRecord, Mirror


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_call_and_no_nan_in_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    record = JsonlRecord(path)
    record.log_metrics({"train/loss": 0.5, "clips": 8}, step=1)
    record.log_metrics({"train/loss": float("nan"), "a": float("inf")}, step=2)
    assert lines(path) == [{"step": 1, "train/loss": 0.5, "clips": 8}, {"step": 2, "train/loss": "nan", "a": "inf"}]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = JsonlRecord(path)
    for step in range(1, 9):
        record.log_metrics({"x": float(step)}, step)
    with path.open("a") as file:
        file.write('{"step": 2, "x"')  # cut off by a crash
    again = JsonlRecord(path, resume_step=5)
    again.log_metrics({"x": 60.0}, 6)
    assert [line["x"] for line in lines(path)] == [1, 2, 3, 4, 5, 60]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


class Broken(Logger):
    """A service that is down after its first line."""

    name, version = "broken", ""

    def __init__(self) -> None:
        super().__init__()
        self.lines = 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines += 1
        if self.lines > 1:
            raise ConnectionError("no route to host")


def test_a_mirror_that_fails_is_told_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    target = Broken()
    with caplog.at_level(logging.WARNING):
        mirror = Mirror(lambda: target)
        mirror.log_hyperparams({"a": 1})
        for step in range(4):
            mirror.log_metrics({"x": 1.0}, step)
        mirror.finalize("success")
    assert target.lines == 2
    assert caplog.text.count("no route to host") == 1


def test_a_mirror_that_cannot_start_does_not_stop_training(caplog: pytest.LogCaptureFixture) -> None:
    def start() -> Logger:
        raise OSError("no account")

    with caplog.at_level(logging.WARNING):
        mirror = Mirror(start)
        mirror.log_metrics({"x": 1.0}, 1)
        mirror.log_video("samples", ["a.mp4"], ["a"], 1)
        mirror.finalize("success")
    assert "left out from here on: no account" in caplog.text


class Slow(Broken):
    """A service that answers when it is let."""

    def __init__(self, let: threading.Event, at: str) -> None:
        super().__init__()
        self.let, self.at = let, at

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.at == "metrics":
            self.let.wait()
        self.lines += 1

    def finalize(self, status: str) -> None:
        if self.at == "closing":
            self.let.wait()


@pytest.mark.parametrize("at", ["start", "metrics", "closing"])
def test_a_mirror_that_hangs_holds_nothing_up(at: str, caplog: pytest.LogCaptureFixture) -> None:
    let = threading.Event()
    slow = Slow(let, at)

    def start() -> Logger:
        if at == "start":
            let.wait()
        return slow

    with caplog.at_level(logging.WARNING):
        mirror = Mirror(start, patience=0.2, room=3)
        for step in range(6):
            mirror.log_metrics({"x": 1.0}, step)
        mirror.finalize("success")
        mirror.finalize("success")  # Lightning closes loggers too
    assert caplog.text.count("did not close within 0.2 s") == 1 and "does not keep up" in caplog.text or at == "closing"
    assert slow.lines == 0 or at == "closing"
    let.set()
    mirror.thread.join()
    mirror.log_metrics({"x": 1.0}, 9)


def test_all_that_was_recorded_is_handed_on_before_the_end(tmp_path: Path) -> None:
    mirror = Mirror(lambda: JsonlRecord(tmp_path / "metrics.jsonl"))
    for step in range(500):
        mirror.log_metrics({"x": float(step)}, step)
    mirror.finalize("success")
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(500))
