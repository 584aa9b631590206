"""State to words: captions built like strong prompts (subject, action, setting, camera), in several wordings and lengths.

An under-specified caption leaves attributes out on purpose; `state.conditional` knows the true distribution of what it leaves
open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit_video.world.state import ATTRIBUTES, Scene, combinations

UNDER_SPECIFIED = 0.25  # of all captions drawn leave something out
LEFT_OUT = (0.6, 0.3, 0.1)  # how often those leave out 1, 2, 3 attributes

# How an action is said plainly, at more length, and after "a clip of".
_ACTIONS = {
    "left": ("moves left", "slides to the left", "moving left"),
    "right": ("moves right", "slides to the right", "moving right"),
    "up": ("moves up", "slides to the top", "moving up"),
    "down": ("moves down", "slides to the bottom", "moving down"),
    "bounce": ("bounces", "bounces off the edge", "bouncing"),
    "still": ("stays still", "does not move", "staying still"),
    "": ("", "", ""),
}
_PLAIN = "{subject} {plain}"
# The plain wording is drawn as often as all others together: prompts are mostly short.
_WORDINGS = (
    _PLAIN,
    "{subject} {longer}",
    "a short clip of {subject} {after}",
    "{subject} {plain} on a plain dark background",
    "{subject} on a plain dark background {longer}, fixed camera",
)
_STILL_WORDINGS = (_PLAIN, "a picture of {subject}", "{subject} on a plain dark background")


@dataclass(frozen=True)
class Caption:
    """A text and what it states: attribute names of `state.ATTRIBUTES` to values; what is absent is left open."""

    text: str
    attributes: dict[str, str]


def word(attributes: Mapping[str, str], wording: int = 0, num_frames: int | None = None) -> Caption:
    """Says these attributes in one of the wordings, counted round; 0 is the plain one, as in "a small red circle moves left".

    One frame has no motion: with num_frames=1 it is left out.
    """
    stated = {name: attributes[name] for name in ATTRIBUTES if name in attributes and (name != "motion" or num_frames != 1)}
    words = [stated.get("size"), stated.get("colour"), stated.get("shape", "object")]
    named = " ".join(each for each in words if each)
    subject = f"{'an' if named[0] in 'aeiou' else 'a'} {named}"
    plain, longer, after = _ACTIONS[stated.get("motion", "")]
    wordings = _STILL_WORDINGS if num_frames == 1 else _WORDINGS
    text = wordings[wording % len(wordings)].format(subject=subject, plain=plain, longer=longer, after=after)
    return Caption(" ".join(text.split()).replace(" ,", ","), stated)


def caption(rng: np.random.Generator, scene: Scene) -> Caption:
    """Draws a caption of a scene; what it leaves out does not depend on the scene's attributes, so `conditional` stays true."""
    kept = scene.attributes
    if scene.num_frames == 1:
        del kept["motion"]
    if rng.random() < UNDER_SPECIFIED:
        most = len(kept) - 1  # at least one attribute is stated
        odds = np.array(LEFT_OUT[:most])
        dropped = rng.choice(list(kept), size=1 + rng.choice(most, p=odds / odds.sum()), replace=False)
        kept = {name: value for name, value in kept.items() if name not in dropped}
    return word(kept, _draw_wording(rng), scene.num_frames)


def prompts(split: Literal["seen", "held_out"], count: int, seed: int, num_frames: int | None = None) -> list[Caption]:
    """Fully specified prompts to evaluate with: every combination of the split as often as any other, in all wordings.

    Fewer are the first of more.
    """
    if split not in ("seen", "held_out"):
        raise ValueError(f"prompts are of split seen or held_out, got {split!r}; set split")
    rng = np.random.default_rng([seed, split == "held_out"])
    found = combinations("train" if split == "seen" else "held_out", num_frames)
    asked: list[Caption] = []
    while len(asked) < count:
        asked += [word(found[index], _draw_wording(rng), num_frames) for index in rng.permutation(len(found))]
    return asked[:count]


def underspecified(count: int, seed: int, num_frames: int | None = None) -> list[Caption]:
    """Plain prompts that leave one or two attributes open, each such set as often as any other, and agree with training."""
    rng = np.random.default_rng([seed, 2])
    found = combinations("train", num_frames)
    names = [name for name in ATTRIBUTES if name != "motion" or num_frames != 1]
    open_sets = [{name} for name in names] + [{a, b} for i, a in enumerate(names) for b in names[i + 1 :]]
    chosen = []
    for index in range(count):
        attributes = found[rng.integers(len(found))]
        left_out = open_sets[index % len(open_sets)]
        chosen.append(word({name: attributes[name] for name in names if name not in left_out}, 0, num_frames))
    return chosen


def _draw_wording(rng: np.random.Generator) -> int:
    return 0 if rng.random() < 0.5 else int(rng.integers(1, 60))
