"""State to words in many ways: synonyms of every value and sentences of many shapes, for models that are to follow what is meant.

They come in three splits: `training` is what captions of clips are made of, `tuning` is for choosing a recipe, `unseen` for its final
numbers. No sentence and no phrase of the latter two occurs in a caption of a clip, though a word of a phrase may ("roof shape"). What is
asked in a sentence of theirs is a paraphrase that was never seen; how many of its phrases are new, too, is the caller's choice.
Results: experiments/002_paraphrases.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal, TypeVar, get_args

import numpy as np

from dit_video.world.state import ATTRIBUTES

Words = Literal["training", "tuning", "unseen"]
Phrases = dict[Words, tuple[str, ...]]
Choice = TypeVar("Choice")


def _split(training: str, tuning: str, unseen: str) -> Phrases:
    """Phrases that commas stand between, by split."""
    lists = zip(get_args(Words), (training, tuning, unseen), strict=True)
    return {split: tuple(" ".join(phrase.split()) for phrase in phrases.split(",")) for split, phrases in lists}


_SIZES = {
    "small": _split(
        """small, little, tiny, miniature, compact, petite, smallish, mini, minute, wee, undersized, pint-sized, puny,
        microscopic, dinky, diminutive, itty-bitty, toy-sized, pocket-sized, pea-sized, shrunken, rather small, very small,
        small-sized, minuscule""",
        "bite-sized, thumbnail-sized",
        "teeny, dwarf",
    ),
    "large": _split(
        """large, big, huge, giant, gigantic, massive, enormous, oversized, sizable, bulky, hefty, immense, jumbo,
        extra-large, king-sized, vast, towering, whopping, humongous, hulking, rather large, very big, large-sized, colossal""",
        "largish, outsized",
        "mammoth, tremendous",
    ),
}
_COLOURS = {
    "red": _split(
        """red, crimson, scarlet, cherry, reddish, maroon, burgundy, rosy, blood-red, tomato, brick-red, strawberry,
        wine-red, fire-engine red, rust-red, lipstick-red, bright red, dark red, deep red, red-coloured, raspberry,
        cranberry, rouge, flame-red, ruby""",
        "carmine, merlot",
        "garnet, vermilion",
    ),
    "green": _split(
        """green, emerald, lime, olive, mint, greenish, forest-green, grassy, moss, leaf-green, bottle green, avocado,
        shamrock, sage, hunter green, pine-coloured, lawn-green, bright green, dark green, deep green, green-coloured,
        lettuce-green, chartreuse, spinach, jade""",
        "clover, kiwi",
        "fern, verdant",
    ),
    "blue": _split(
        """blue, navy, azure, royal blue, cobalt, bluish, indigo, sky-blue, midnight blue, ocean-blue, cerulean, cornflower,
        denim, baby-blue, electric blue, steel-blue, Prussian blue, blueberry, bright blue, dark blue, deep blue,
        blue-coloured, powder-blue, marine, sapphire""",
        "bluebell, gentian",
        "ultramarine, lapis",
    ),
    "yellow": _split(
        """yellow, golden, gold, canary, yellowish, banana, mustard, amber, sunny, honey, buttercup, blond, corn-coloured,
        sunflower, straw, butter, bumblebee yellow, taxi-yellow, bright yellow, pale yellow, deep yellow, yellow-coloured,
        primrose, lemon""",
        "flaxen, dandelion",
        "saffron, daffodil",
    ),
    "purple": _split(
        """purple, violet, lavender, plum, mauve, magenta, purplish, grape, orchid, aubergine, eggplant, royal purple,
        wisteria, fuchsia, imperial purple, blackcurrant, bright purple, dark purple, deep purple, purple-coloured, heather,
        thistle, boysenberry, lilac, amethyst""",
        "periwinkle, heliotrope",
        "mulberry, iris",
    ),
    "cyan": _split(
        """cyan, teal, turquoise, aqua, blue-green, greenish-blue, sea-green, bluish green, swimming-pool blue, robin's-egg
        blue, ice-blue, Caribbean blue, peacock, duck-egg blue, Tiffany blue, bright cyan, bright aqua, pale aqua, deep cyan,
        cyan-coloured, teal-blue, glacier, sea-glass, aquamarine""",
        "verdigris, tropical-sea",
        "seafoam, lagoon",
    ),
}
_SHAPES = {
    "circle": _split(
        """circle, ball, dot, disc, disk, orb, sphere, round shape, circular shape, round object, circular thing, coin,
        button, marble, wheel, spot, bead, rounded shape, round blob, round thing, circular patch, balloon, globe""",
        "ring, pancake",
        "bubble, pearl",
    ),
    "square": _split(
        """square, box, block, cube, tile, square shape, four-sided shape, square object, square patch, boxy shape,
        rectangle, square panel, cardboard box, quadrilateral, square block, square thing, package, brick, square card,
        four-cornered shape, square figure, crate""",
        "container, slab",
        "carton, parcel",
    ),
    "triangle": _split(
        """triangle, pyramid, triangular shape, three-sided shape, triangular object, triangular patch, wedge, tent, pizza
        slice, three-cornered shape, triangular figure, equilateral triangle, triangular sign, triangular thing, triangular
        block, triangular panel, shape with three corners, prism, teepee, three-pointed shape, triangle shape, triangular
        flag, arrowhead, cone""",
        "delta, isosceles triangle",
        "pennant, roof shape",
    ),
}
# What follows a verb of travel.
_WAYS = {
    "left": _split(
        """left, leftward, leftwards, to the left, towards the left, to the left side, to the left-hand side, from right to
        left, left across the frame, towards the left edge, over to the left, off to the left, further left, in a straight
        line to the left, toward the left border, to its left, towards the viewer's left""",
        "due left, sideways to the left",
        "out to the left, in the left direction, from the right towards the left",
    ),
    "right": _split(
        """right, rightward, rightwards, to the right, towards the right, to the right side, to the right-hand side, from
        left to right, right across the frame, towards the right edge, over to the right, off to the right, further right, in
        a straight line to the right, toward the right border, to its right, towards the viewer's right""",
        "due right, sideways to the right",
        "out to the right, in the right direction, from the left towards the right",
    ),
    "up": _split(
        """up, upward, upwards, skyward, to the top, towards the top, straight up, from bottom to top, up the frame, towards the upper
        edge, higher, up and up, toward the ceiling, toward the sky, to the top of the picture, into the air, vertically up, from below
        to above""",
        "aloft, to the upper side",
        "toward the heavens, in the upward direction, from the bottom towards the top",
    ),
    "down": _split(
        """down, downward, downwards, groundward, to the bottom, towards the bottom, straight down, from top to bottom, down
        the frame, towards the lower edge, lower, down and down, toward the floor, toward the ground, to the bottom of the
        picture, vertically down, from above to below""",
        "below, to the lower side",
        "toward the earth below, in the downward direction, from the top towards the bottom",
    ),
}
# Verbs of travel, and whole actions: as "it moves" and as "moving", a hyphen for a space.
_TRAVELS = _split(
    """moves moving, slides sliding, drifts drifting, glides gliding, goes going, travels travelling, floats floating, shifts shifting,
    heads heading, rolls rolling, passes passing, flies flying, creeps creeping, cruises cruising, sails sailing, proceeds proceeding,
    makes-its-way making-its-way, is-pushed being-pushed, advances advancing, crawls crawling, zooms zooming, coasts coasting""",
    "slips slipping, swims swimming",
    "journeys journeying, wanders wandering, progresses progressing",
)
_ACTIONS = {
    "up": _split(
        """rises rising, ascends ascending, climbs climbing, goes-up going-up, lifts-off lifting-off, levitates levitating, gains-height
        gaining-height, rises-to-the-top rising-to-the-top, is-lifted-up being-lifted-up, soars soaring, shoots-up shooting-up,
        takes-off taking-off, floats-up floating-up, moves-up moving-up, is-raised being-raised""",
        "is-hoisted being-hoisted, mounts mounting",
        "gains-altitude gaining-altitude, is-pulled-up being-pulled-up, elevates elevating",
    ),
    "down": _split(
        """falls falling, drops dropping, descends descending, sinks sinking, plunges plunging, plummets plummeting, goes-down
        going-down, comes-down coming-down, loses-height losing-height, falls-to-the-bottom falling-to-the-bottom, is-lowered
        being-lowered, drops-to-the-floor dropping-to-the-floor, dives diving, moves-down moving-down, tumbles-down tumbling-down""",
        "nosedives nosediving, subsides subsiding",
        "loses-altitude losing-altitude, is-pulled-down being-pulled-down, settles settling",
    ),
    "bounce": _split(
        """bounces bouncing, rebounds rebounding, ricochets ricocheting, bounces-off-the-edge bouncing-off-the-edge, bounces-back
        bouncing-back, rebounds-off-the-wall rebounding-off-the-wall, hits-the-edge-and-comes-back hitting-the-edge-and-coming-back,
        strikes-the-wall-and-returns striking-the-wall-and-returning, bounces-against-the-side bouncing-against-the-side,
        bumps-into-the-wall-and-bounces bumping-into-the-wall-and-bouncing, collides-with-the-border-and-turns-back
        colliding-with-the-border-and-turning-back, bounces-like-a-rubber-ball bouncing-like-a-rubber-ball,
        goes-to-the-edge-and-back going-to-the-edge-and-back, reverses-at-the-edge reversing-at-the-edge,
        turns-around-at-the-edge turning-around-at-the-edge, is-deflected-by-the-edge being-deflected-by-the-edge,
        springs-back-from-the-edge springing-back-from-the-edge, bounces-off-the-wall bouncing-off-the-wall,
        jumps-back-from-the-wall jumping-back-from-the-wall, touches-the-side-then-heads-back touching-the-side-then-heading-back""",
        "caroms-off-the-wall caroming-off-the-wall, is-reflected-by-the-border being-reflected-by-the-border",
        """hits-the-wall-and-reverses hitting-the-wall-and-reversing, bounds-off-the-side bounding-off-the-side,
        bounces-away-from-the-border bouncing-away-from-the-border""",
    ),
    "still": _split(
        """stays-still staying-still, does-not-move not-moving, is-motionless being-motionless, remains-in-place remaining-in-place,
        stands-still standing-still, stays-put staying-put, rests resting, is-stationary being-stationary, sits-there-without-moving
        sitting-there-without-moving, is-frozen being-frozen, keeps-still keeping-still, holds-its-position holding-its-position,
        is-at-rest being-at-rest, stays-where-it-is staying-where-it-is, remains-unmoving remaining-unmoving, does-not-budge
        not-budging, is-static being-static, remains-immobile remaining-immobile, never-moves never-moving,
        stays-in-the-same-place staying-in-the-same-place""",
        "does-not-stir not-stirring, lingers-in-place lingering-in-place",
        "sits-still sitting-still, stays-without-motion staying-without-motion, does-not-shift not-shifting",
    ),
}

# {moves} is an action as "moves left", {moving} as "moving left".
_SENTENCES: Phrases = {
    "training": (
        "a {size} {colour} {shape} {moves}",
        "a {colour} {size} {shape} {moves}",
        "a {size}, {colour} {shape} {moves}",
        "the {size} {colour} {shape} {moves}",
        "{size} {colour} {shape} {moving}",
        "{colour} {size} {shape}, {moving}",
        "a {size} {colour} {shape}, {moving}",
        "a {size} {colour} {shape} {moving}",
        "{shape}, {colour}, {size}, {moving}",
        "there is a {size} {colour} {shape} that {moves}",
        "there is a {colour} {shape} of {size} size and it {moves}",
        "a short clip of a {size} {colour} {shape} {moving}",
        "a video of a {size} {colour} {shape} {moving}",
        "a clip in which a {size} {colour} {shape} {moves}",
        "footage of a {size} {colour} {shape} that {moves}",
        "a video where the {colour} {shape} {moves}. it is a {size} one",
        "a {size} {colour} {shape} {moves} on a plain dark background",
        "a {size} {colour} {shape} on a plain dark background {moves}, fixed camera",
        "on a dark background, a {size} {colour} {shape} {moves}",
        "in front of a black backdrop a {size} {colour} {shape} {moves}",
        "static shot: a {colour} {shape}, {size} in size, {moves}",
        "the camera does not move while a {size} {colour} {shape} {moves}",
        "a {shape} that is {size} and {colour} {moves}",
        "a {shape}, {size} and {colour}, {moves}",
        "a {shape} which {moves}, {colour} and {size}",
        "a {colour} {shape} {moves}; it is {size}",
        "a {colour} {shape}, {size}, {moving}",
        "a {size} {shape} {moves}; its colour is {colour}",
        "a {size} {shape} in {colour} {moves}",
        "the {shape} is {colour} and {size}, and it {moves}",
        "the {shape} is {colour}. the {shape} is {size}. the {shape} {moves}",
        "the {colour} {shape} looks {size} and {moves}",
        "it {moves}: a {shape}, {colour}, {size}",
        "it is {size}, it is {colour}, it is a {shape} and it {moves}",
        "what {moves} is a {size} {colour} {shape}",
        "{moving}, a {size} {colour} {shape}",
        "{moving} on a plain background: a {size} {colour} {shape}",
        "slowly {moving}, we see a {colour} {shape} that is {size}",
        "we see a {size} {colour} {shape} {moving}",
        "you can see one {size} {colour} {shape}, and it {moves}",
        "I want a {size} {colour} {shape} which {moves}",
        "make a video of a {colour} {shape} that {moves} and is {size}",
        "show a {colour} {shape} {moving}. the {shape} is {size}",
        "one {size} {colour} {shape}, alone in the frame, {moves}",
        "{colour} and {size}, the {shape} {moves}",
        "a single {colour} object, a {size} {shape}, {moves}",
        "an object {moves}: it is a {colour} {shape} and it is {size}",
        "some {size} {shape} {moves}, and its colour is {colour}",
        "this {size} thing is a {colour} {shape} and it {moves}",
        "in the video a {size} {colour} {shape} {moves}",
        "animation: {size} {colour} {shape}, {moving}",
        "a {size} {colour} {shape} is seen {moving}",
        "a simple animation with a {colour} {shape}, {size}, that {moves}",
        "against darkness, some {size} {colour} {shape} {moves} at an even pace",
        "across the empty scene a {size} {colour} {shape} {moves}",
        "a {colour} {shape} keeps {moving}. it is {size}",
        "there it is, a {size} {shape} of {colour} colour, {moving}",
        "{size} {shape} ({colour}), {moving}",
        "({colour}, {size}) a {shape} {moves}",
        "can you show me a {size} {colour} {shape} that {moves}?",
        "what does it look like when a {size} {colour} {shape} {moves}?",
        "please animate a {colour} {shape}, {size}, {moving}",
        "I would like to see a {colour} {shape} that {moves}, and it should be {size}",
        "generate a {size} {colour} {shape} {moving}, plain background",
        "draw me a {shape}. make it {colour}, make it {size}, and it {moves}",
        "the clip begins: a {size} {colour} {shape} {moves} until the end",
        "for about one second, a {size} {colour} {shape} {moves}",
        "look at this {size} {colour} {shape}, it {moves}",
        "notice the {colour} {shape}: {size}, and it {moves}",
        "imagine a {shape}, all {colour}, {size}, {moving}",
        "think of a {size} {shape} in a {colour} tone that {moves}",
        "the subject is a {size} {colour} {shape}; the action: it {moves}",
        "subject: {size} {colour} {shape}. action: {moving}. camera: fixed",
        "shape: {shape}, colour: {colour}, size: {size}, motion: it {moves}",
        "minimal 2D animation, {size} {colour} {shape} {moving}, clean background",
        "a low-resolution clip, dark scene, a {colour} {shape} that is {size} {moves}",
        "computer graphics of a {size} {colour} {shape} as it {moves}",
        "a tidy, simple scene with one {colour} {shape}; the {shape} is {size} and {moves}",
        "nobody is around, only a {size} {colour} {shape} that {moves}",
        "only one thing is visible: a {size} {colour} {shape}, {moving}",
        "in the dark, {moving}, there is a {colour} {shape} and it is {size}",
        "on the screen a {size} {colour} {shape} {moves} steadily",
        "the viewer sees a {colour} {shape} of {size} build {moving}",
        "at a constant speed a {size} {colour} {shape} {moves}",
        "without any sound, a {size} {colour} {shape} {moves}",
        "a {colour} coloured {shape}, {size} as it is, {moves}",
        "a {shape} with a {colour} fill, {size}, {moves}",
        "a solid {colour} {shape} of {size} size is {moving}",
        "a {size} {shape} painted in {colour} is {moving}",
        "something {size} and {colour}, namely a {shape}, {moves}",
        "a {size} thing in the form of a {colour} {shape} {moves}",
        "that {shape} is {size}; {colour} is its colour; and it {moves}",
        "of all things, a {size} {colour} {shape} {moves} here",
        "and now a {size} {colour} {shape} {moves}",
        "first and last frame show a {size} {colour} {shape}; in between it {moves}",
        "while nothing else happens, the {colour} {shape}, which is {size}, {moves}",
        "as the video plays, the {size} {colour} {shape} {moves}",
        "with smooth motion a {size} {colour} {shape} {moves}",
        "close to the middle of the scene or not, a {size} {colour} {shape} {moves}",
        "everything is dark except for a {size} {colour} {shape} {moving}",
    ),
    "tuning": (
        "here a {size} {colour} {shape} {moves} all the time",
        "footage of one {colour} {shape}, {size} in extent, as it {moves}",
        "{size} in scale and {colour} in hue, another {shape} {moves}",
        "please make me a {colour}, {size} {shape} that simply {moves}",
        "a recording: {moving}, {colour}, {size}, a {shape}",
        "nothing but a {shape} appears, {colour} and {size}; it {moves}",
    ),
    "unseen": (
        "watch how the {size} {colour} {shape} {moves}",
        "in this scene, a {size} and {colour} {shape} {moves} from start to finish",
        "a lone {shape} of {colour} colour and {size} dimensions keeps {moving}",
        "the camera films a {colour} {shape}, rather {size}, {moving} over black",
        "{colour} {shape} ({size}) {moving}",
        "picture a {size} {colour} {shape}: it {moves} across an empty screen",
        "could you draw a {shape} that {moves}? I would like it {colour} and {size}",
        "two seconds of a {size} {shape}, painted {colour}, {moving}",
        "{colour} is the {shape}, {size} too, and look, it {moves}",
        "a {size} object shaped like a {shape} {moves}, coloured {colour}",
        "night scene, minimalist, {size} {colour} {shape} {moving}, smooth motion",
        "our hero is a {colour} {shape}. being {size}, it {moves} by itself",
    ),
}  # fmt: skip


def synonyms(attribute: str, value: str, words: Words) -> tuple[str, ...]:
    """How a split says a value; a motion as "moves left"."""
    if attribute == "motion":
        return tuple(moves for moves, _ in _motions(value, words))
    return {"size": _SIZES, "colour": _COLOURS, "shape": _SHAPES}[attribute][value][words]


def sentences(words: Words) -> tuple[str, ...]:
    """The sentences of a split, with a place for each attribute."""
    return _SENTENCES[words]


def paraphrase(
    rng: np.random.Generator, attributes: Mapping[str, str], words: Words = "training", new_words: int | None = None
) -> str:
    """Says these attributes, all or some, by a sentence of a split, drawn, and synonyms, each drawn as often as any other.

    `new_words` of the attributes, drawn, are said in the split's own phrases and the others in those of training; None: all of them.
    """
    if words not in get_args(Words):
        raise ValueError(f"words are of split {', '.join(get_args(Words))}, got {words!r}; set words")
    if new_words is not None and not 0 <= new_words <= len(ATTRIBUTES):
        raise ValueError(f"0 to {len(ATTRIBUTES)} attributes can be said in new words, got {new_words}; set new_words")
    named = [name for name in ATTRIBUTES if name in attributes]
    new = rng.permutation(named)[:new_words]
    split: dict[str, Words] = {name: words if name in new else "training" for name in named}
    said = {"size": "", "colour": "", "shape": "object"} | {
        name: _draw(rng, synonyms(name, attributes[name], split[name])) for name in named if name != "motion"
    }
    moves, moving = _draw(rng, _motions(attributes["motion"], split["motion"])) if "motion" in split else ("", "")
    usable = sentences(words)
    if len(named) < len(ATTRIBUTES):  # those in which what is left open leaves no gap
        usable = tuple(each for each in usable if "{size} {colour} {shape} {mov" in each)
    text = " ".join(_draw(rng, usable).format(**said, moves=moves, moving=moving).split())
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", re.sub(r" (?=[,.;:?])", "", text))


@cache
def _motions(value: str, words: Words) -> tuple[tuple[str, str], ...]:
    """Actions as "moves left" and as "moving left"; travels by whole actions as often as by a verb and a way, where there are both."""
    actions = [_pair(action) for action in _ACTIONS.get(value, {}).get(words, ())]
    travels = [
        (f"{moves} {way}", f"{moving} {way}")
        for moves, moving in map(_pair, _TRAVELS[words])
        for way in _WAYS.get(value, {}).get(words, ())
    ]
    return tuple(actions * max(len(travels) // max(len(actions), 1) // 2, 1) + travels)


def _pair(action: str) -> tuple[str, str]:
    moves, moving = (form.replace("-", " ") for form in action.split())
    return moves, moving


def _draw(rng: np.random.Generator, choices: tuple[Choice, ...]) -> Choice:
    return choices[rng.integers(len(choices))]
