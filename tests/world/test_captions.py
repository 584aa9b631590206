import numpy as np
import pytest

from dit_video.world.captions import Caption, caption, prompts, underspecified, word
from dit_video.world.state import ATTRIBUTES, Scene, is_held_out, sample_scene


def scene_of(index: int, num_frames: int = 9) -> Scene:
    return sample_scene(np.random.default_rng([5, index]), num_frames=num_frames, height=32, width=32, fps=8)


def drawn(count: int, num_frames: int = 9) -> list[tuple[Scene, Caption]]:
    return [(scene, caption(np.random.default_rng([6, i]), scene)) for i in range(count) for scene in [scene_of(i, num_frames)]]


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("a small red circle moves left", ("small", "red", "circle", "left")),
        ("a large blue square bounces", ("large", "blue", "square", "bounce")),
        ("a small green triangle stays still", ("small", "green", "triangle", "still")),
    ],
)
def test_the_plain_wording(text: str, attributes: tuple[str, ...]) -> None:
    assert word(dict(zip(ATTRIBUTES, attributes, strict=True))).text == text


def test_captions_state_what_they_say_they_state_and_nothing_else() -> None:
    words_of = {"left": {"left"}, "right": {"right"}, "up": {"up", "top"}, "down": {"down", "bottom"},
                "bounce": {"bounces", "bouncing"}, "still": {"still", "not"}}  # fmt: skip
    for scene, said in drawn(800):
        found = set(said.text.replace(",", "").split())
        for name, value in scene.attributes.items():
            spoken = bool(found & words_of.get(value, {value}))
            assert spoken == (name in said.attributes), said
            assert said.attributes.get(name, value) == value


def test_the_vocabulary_is_small_and_lower_case() -> None:
    texts = [said.text for frames in (1, 9) for _, said in drawn(1500, frames)]
    vocabulary = {each for text in texts for each in text.replace(",", "").split()}
    assert len(vocabulary) < 80 and all(each.isalpha() and each.islower() for each in vocabulary)
    assert len({len(text.split()) for text in texts}) >= 6
    assert not any("  " in text or text != text.strip() or " ," in text for text in texts)


def test_a_quarter_leaves_something_out_whatever_the_scene() -> None:
    captions = drawn(4000)
    open_ones = [len(said.attributes) < 4 for _, said in captions]
    assert 0.22 < np.mean(open_ones) < 0.28
    assert min(len(said.attributes) for _, said in captions) == 1
    for colour in ("red", "cyan"):
        share = np.mean(["size" not in said.attributes for scene, said in captions if scene.colour == colour])
        assert 0.04 < share < 0.16


def test_one_frame_says_nothing_about_motion() -> None:
    for _, said in drawn(300, num_frames=1):
        assert "motion" not in said.attributes
        assert not set(said.text.split()) & {"moves", "bounces", "stays", "slides", "left", "right", "up", "down", "clip"}


@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_prompts_cover_their_split_evenly(split: str) -> None:
    asked = prompts(split, 512, seed=0)  # type: ignore[arg-type]
    assert asked == prompts(split, 512, seed=0) != prompts(split, 512, seed=1)  # type: ignore[arg-type]
    assert asked[:100] == prompts(split, 100, seed=0)  # type: ignore[arg-type]
    counts: dict[tuple[str, ...], int] = {}
    for each in asked:
        assert len(each.attributes) == 4
        held_out = is_held_out(each.attributes["colour"], each.attributes["shape"], each.attributes["motion"])
        assert held_out == (split == "held_out")
        counts[tuple(each.attributes.values())] = counts.get(tuple(each.attributes.values()), 0) + 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({len(each.text.split()) for each in asked}) >= 4


def test_underspecified_prompts_leave_every_attribute_open_at_times() -> None:
    asked = underspecified(40, seed=0)
    assert {len(each.attributes) for each in asked} == {2, 3}
    assert {name for each in asked for name in ATTRIBUTES if name not in each.attributes} == set(ATTRIBUTES)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="seen"):
        prompts("train", 4, seed=0)  # type: ignore[arg-type]
