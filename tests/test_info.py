"""`dit-video info` prints what was composed, and refuses what cannot be."""

import re

import pytest

from dit_video.cli import main


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["info", *words]) == 0
    return capsys.readouterr().out


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    assert "80 (5 x 4 x 4), each 2x8x8 pixels" in out
    for part in ("MLP", "attention", "text encoder", "modulation", "head", "Muon's momentum", "moving average"):
        assert re.search(rf"^ *{part} ", out, re.M), part
    assert re.search(r"all +2,105,792", out)
    assert max(map(len, out.splitlines())) <= 80


def test_sizes_are_in_pixels_and_latents_are_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "model=1.3b", "num_frames=81", "height=480", "width=832")
    assert "32,760 (21 x 30 x 52), each 4x16x16 pixels" in out
    out = printed(capsys, "model=base", "autoencoder.compression=[4,4,4]", "num_frames=18", "height=160", "width=160")
    assert "2,400 (6 x 20 x 20)" in out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("height=33", "set height"),
        ("num_frames=0", "set num_frames"),
        ("batch_size=0", "set batch_size"),
        ("caption_words=65", "set text.max_words"),
        ("model.heads=3", "set model.heads"),
        ("fps=0", "set fps"),
        ("autoencoder=wan autoencoder.compression=[4,8]", "set autoencoder.compression"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *word.split()]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
