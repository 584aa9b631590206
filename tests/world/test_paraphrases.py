"""Captions in many words: every split says every value, and what is unseen is never said in a caption of a clip."""

import re
from typing import get_args

import numpy as np
import pytest

from dit_video.world.paraphrases import Words, paraphrase, sentences, synonyms
from dit_video.world.state import ATTRIBUTES, combinations

VALUES = [(name, value) for name, values in ATTRIBUTES.items() for value in values]


@pytest.mark.parametrize("words", get_args(Words))
def test_every_split_has_words_for_every_value(words: Words) -> None:
    for name, value in VALUES:
        found = synonyms(name, value, words)
        assert len({*found}) >= 2, (name, value)  # actions are listed several times, to come as often as travels
    assert len({*sentences(words)}) == len(sentences(words)) >= 4


@pytest.mark.parametrize("words", ["tuning", "unseen"])
def test_what_is_held_out_is_in_no_caption_of_a_clip(words: Words) -> None:
    """Neither a synonym nor, of those that stand alone, its word; and no sentence."""
    told = {each.lower() for name, value in VALUES for each in synonyms(name, value, "training")}
    for name, value in VALUES:
        assert not {each.lower() for each in synonyms(name, value, words)} & told, (name, value)
    assert not {*sentences(words)} & {*sentences("training")}

    rng = np.random.default_rng(0)
    found = combinations("train", 9)
    captions = [paraphrase(rng, found[rng.integers(len(found))]).lower() for _ in range(20_000)]
    text = " | ".join(captions)
    for name, value in VALUES:
        for each in synonyms(name, value, words):
            assert not re.search(rf"\b{re.escape(each.lower())}\b", text), each


def test_a_value_is_said_by_words_of_its_own() -> None:
    for name, values in ATTRIBUTES.items():
        said: dict[str, str] = {}
        for value in values:
            for words in get_args(Words):
                for each in synonyms(name, value, words):
                    assert said.setdefault(each.lower(), value) == value, each


def test_sentences_hold_what_they_are_told_and_nothing_is_left_open() -> None:
    rng = np.random.default_rng(1)
    for words in get_args(Words):
        for attributes in combinations("any", 9)[::7]:
            text = paraphrase(rng, attributes, words)
            assert "{" not in text and "  " not in text and text == text.strip()
            for name in ("size", "colour", "shape"):
                assert any(each.lower() in text.lower() for each in synonyms(name, attributes[name], words)), text
    assert "object" in paraphrase(rng, {"colour": "red"})
    with pytest.raises(ValueError, match="set words"):
        paraphrase(rng, {}, "seen")  # type: ignore[arg-type]


def test_the_same_generator_says_the_same() -> None:
    attributes = combinations("train", 9)[5]
    one, other = ([paraphrase(np.random.default_rng(3), attributes) for _ in range(3)] for _ in range(2))
    assert one == other
