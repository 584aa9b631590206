"""Captions in many words: every split says every value, and what is unseen is never said in a caption of a clip."""

import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from dit_video.world.paraphrases import Words, _motions, paraphrase, sentences, synonyms
from dit_video.world.state import ATTRIBUTES, combinations

MOTIONS = dict(pair for words in get_args(Words) for value in ATTRIBUTES["motion"] for pair in _motions(value, words))
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


@pytest.mark.parametrize("words", ["tuning", "unseen"])
def test_new_words_are_as_many_as_asked_for(words: Words) -> None:
    """A sentence of a split is always one that no caption was made of; each attribute's words are training's, or the split's own."""
    found = combinations("train", 9)
    told = {paraphrase(np.random.default_rng(i), found[i % len(found)]) for i in range(2000)}
    for new_words in (0, 1, 2, None):
        counted: Counter[str] = Counter()
        for number in range(80):
            attributes = found[number % len(found)]
            text = paraphrase(np.random.default_rng(number), attributes, words, new_words)
            assert text not in told
            new = [name for name in ATTRIBUTES if said(text, synonyms(name, attributes[name], words))]
            old = [name for name in ATTRIBUTES if said(text, synonyms(name, attributes[name], "training"))]
            assert len(new) == (4 if new_words is None else new_words), (text, new)
            assert {*new, *old} == {*ATTRIBUTES}, text
            counted.update(new)
        if new_words == 1:
            assert {*counted} == {*ATTRIBUTES} and min(counted.values()) > 8
    with pytest.raises(ValueError, match="0 to 4 attributes.*got 5; set new_words"):
        paraphrase(np.random.default_rng(0), found[0], words, 5)


def said(text: str, phrases: tuple[str, ...]) -> bool:
    """Whether a text has one of these phrases, a motion as "moves left" or as "moving left"."""
    both = [*phrases, *(moving for moves, moving in MOTIONS.items() if moves in phrases)]
    return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", text) for each in both)


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
