"""State to words in many ways: synonyms of every value and sentences of many shapes, for models that are to follow what is meant.

They come in three splits: `training` is what captions of clips are made of, `tuning` is for choosing a recipe, `unseen` for its final
numbers. No synonym and no sentence of the latter two occurs in a caption of a clip, and no word of one that carries its meaning.
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
        """small, little, miniature, compact, petite, smallish, undersized, mini, minute, pint-sized, microscopic, stunted, toy-sized,
        slight, modest, thumbnail-sized, bite-sized, itty-bitty, dwarf, pea-sized, puny, tiddly, dinky, bijou, lilliputian, shrunken,
        scaled-down, teensy, not very big, rather small, small-scale, half-size, bantam, micro, elfin, meagre, palm-sized, low-volume,
        infinitesimal, minor, reduced, lesser""",
        "teeny, kitten-sized, doll-sized, dainty",
        "tiny, wee, diminutive, minuscule, pocket-sized",
    ),
    "large": _split(
        """large, big, huge, giant, sizable, enormous, oversized, bulky, hefty, king-sized, jumbo, great, extra-large, immense, largish,
        broad, ample, voluminous, considerable, humongous, whopping, titanic, towering, outsized, elephantine, full-sized, tremendous,
        wide, grand, XXL, gargantuan, man-sized, stupendous, plus-sized, large-scale, very big, rather large, house-sized,
        hippo-sized, swollen, blown-up, major, greater""",
        "colossal, monstrous, super-sized, mammoth",
        "gigantic, massive, vast, hulking, monumental",
    ),
}
_COLOURS = {
    "red": _split(
        """red, scarlet, ruby, vermilion, reddish, blood-coloured, cardinal, garnet, maroon, rosy, tomato, strawberry, ketchup-coloured,
        lobster, brick, rose, poppy, wine-red, fire-engine red, raspberry, cranberry, rust-red, flame-red, chilli, paprika, beetroot,
        cerise, rouge, fiery, ruddy, postbox red, Ferrari red, lipstick, salsa-coloured, stop-light red, crab-coloured, red-hued,
        coral-red, bright red, dark red, red-coloured""",
        "carmine, burgundy, sanguine",
        "crimson, cherry",
    ),
    "green": _split(
        """green, emerald, lime, olive, mint, greenish, jade, moss, fern, shamrock, leaf-green, grassy, bottle green, avocado, verdant,
        frog-coloured, spinach, cucumber, kelly green, hunter green, broccoli, pickle-coloured, cabbage, kiwi, basil, viridian,
        chartreuse, cactus, army green, tea-green, pistachio, Christmas-tree green, seaweed, gooseberry, green-hued, ivy, bright
        green, dark green, green-coloured""",
        "clover, lettuce-green, pine-coloured",
        "forest-green, lawn-green, parsley-coloured",
    ),
    "blue": _split(
        """blue, azure, sapphire, royal blue, cerulean, bluish, indigo, ocean-blue, midnight blue, cornflower, bluebell, ink-coloured,
        lapis, baby-blue, electric blue, steel-blue, Prussian blue, marine, powder-blue, police-blue, cadet blue, Oxford blue, delft,
        bluejay, whale-blue, forget-me-not, blue-hued, smurf-blue, sky-coloured, deep-sea blue, Facebook blue, gentian, Persian blue,
        bright blue, dark blue, blue-coloured""",
        "denim, ultramarine, Yale blue",
        "navy, cobalt, blueberry",
    ),
    "yellow": _split(
        """yellow, canary, yellowish, amber, mustard, saffron, honey, corn-coloured, dandelion, daffodil, blond, straw, custard, topaz,
        flaxen, egg-yolk, taxi-yellow, sunflower, primrose, cheddar, cheese-coloured, duckling-coloured, mango, pineapple, bumblebee
        yellow, wheat, turmeric, citrus, maize, school-bus yellow, sulphur, yellow-hued, champagne, submarine yellow, bright yellow,
        pale yellow, yellow-coloured""",
        "gold, sunny, butter",
        "golden, lemon, banana, buttercup",
    ),
    "purple": _split(
        """purple, lavender, lilac, mauve, magenta, purplish, grape, amethyst, orchid, thistle, wisteria, iris, heather, blackcurrant,
        eggplant, raisin, royal purple, imperial purple, heliotrope, boysenberry, Tyrian purple, fig-coloured, puce, byzantium, pansy,
        jacaranda, purple-hued, beet-purple, mallow, elderberry, damson, bishop's purple, crocus, Barney purple, hyacinth, bright
        purple, dark purple, purple-coloured""",
        "fuchsia, mulberry, periwinkle",
        "violet, plum, aubergine",
    ),
    "cyan": _split(
        """cyan, teal, aqua, blue-green, greenish-blue, sea-green, seafoam, robin's-egg blue, swimming-pool blue, peacock, verdigris,
        Caribbean blue, glacier, sea-coloured, ice-blue, Tiffany blue, duck-egg blue, cyan-hued, cyan-coloured, aqueous, reef-water,
        green-tinged blue, arctic, spearmint-blue, sea-glass, celeste, curacao, mermaid, Aegean, cyanic, hummingbird, bright cyan,
        pale aqua, blue-and-green, bright aqua""",
        "lagoon, tropical-sea",
        "turquoise, aquamarine",
    ),
}
_SHAPES = {
    "circle": _split(
        """circle, ball, dot, round shape, circular shape, round object, circular thing, coin, bubble, button, marble, wheel, spot, moon,
        bead, plate, pebble, pancake, billiard ball, rounded shape, circular patch, round blob, full circle, pea, planet, pizza,
        cookie, saucer, frisbee, tyre, lens, sun, balloon, football, melon, orange-shaped thing, donut, circular figure, penny,
        manhole cover, round token, pearl, round thing""",
        "globe, ring, roundel, hoop",
        "disc, disk, orb, sphere",
    ),
    "square": _split(
        """square, box, block, square shape, four-sided shape, four-cornered shape, square object, square patch, boxy shape, brick,
        rectangle, square panel, rectangular shape, cardboard box, carton, die, postage stamp, square plate, square window, chessboard
        field, square figure, Lego brick, square block, equal-sided rectangle, shape with four equal sides, square card, container,
        picture frame, napkin, square cushion, polaroid, toolbox, pixel, slab, tea-chest, square slice, paving stone, square thing""",
        "crate, parcel, quadrangle, suitcase",
        "cube, tile, quadrilateral, package",
    ),
    "triangle": _split(
        """triangle, triangular shape, three-sided shape, three-cornered shape, triangular object, triangular patch, three-pointed shape,
        triangular figure, pizza slice, tent, equilateral triangle, triangular sign, wedge, cone, delta, shape with three corners,
        teepee, pennant, trilateral figure, triangular block, roof shape, mountain shape, three-angled shape, polygon with three
        sides, warning-sign shape, triangular thing, slice of cake, three-edged figure, pointed shape, triangular flag, tortilla chip,
        nacho, triangle shape, prism, shark fin, fir-tree shape, isosceles triangle, triangular panel""",
        "spearhead, trigon, party hat",
        "pyramid, arrowhead, yield sign",
    ),
}
# What follows a verb of travel.
_WAYS = {
    "left": _split(
        """left, to the left, towards the left, to the left side, from right to left, left across the frame, towards the left edge, over
        to the left, off to the left, further left, in a straight line to the left, toward the left border, to its left, to the west,
        westwards, towards the viewer's left, away from the right side, toward nine o'clock, away to the left margin, from the right
        towards the left, to port""",
        "due left, sideways to the left, out to the left",
        "leftward, leftwards, to the left-hand side, in the left direction",
    ),
    "right": _split(
        """right, to the right, towards the right, to the right side, from left to right, right across the frame, towards the right edge,
        over to the right, off to the right, further right, in a straight line to the right, toward the right border, to its right, to
        the east, eastwards, towards the viewer's right, away from the left side, toward three o'clock, away to the right margin, from
        the left towards the right, to starboard""",
        "due right, sideways to the right, out to the right",
        "rightward, rightwards, to the right-hand side, in the right direction",
    ),
    "up": _split(
        """up, to the top, towards the top, straight up, from bottom to top, up the frame, towards the upper edge, higher, up and up,
        toward the ceiling, to the top of the picture, from below to above, aloft, to the north, northwards, vertically up, into the
        air, from the bottom towards the top, toward twelve o'clock, to the upper side""",
        "toward the heavens, uphill, to the roof",
        "upward, upwards, skyward, toward the sky",
    ),
    "down": _split(
        """down, to the bottom, towards the bottom, straight down, from top to bottom, down the frame, towards the lower edge, lower,
        down and down, toward the floor, to the bottom of the picture, from above to below, below, to the south, southwards,
        vertically down, to the seabed, from the top towards the bottom, toward six o'clock, to the lower side""",
        "toward the earth, downhill, to the basement",
        "downward, downwards, groundward, toward the ground",
    ),
}
# Verbs of travel, and whole actions: as "it moves" and as "moving", a hyphen for a space.
_TRAVELS = _split(
    """moves moving, slides sliding, goes going, travels travelling, floats floating, shifts shifting, heads heading, rolls rolling,
    passes passing, flies flying, creeps creeping, sails sailing, proceeds proceeding, runs running, walks walking, swims swimming,
    makes-its-way making-its-way, is-pushed being-pushed, advances advancing, wanders wandering, crawls crawling, zooms zooming,
    hovers hovering, skates skating, marches marching, darts darting, migrates migrating, progresses progressing, strolls strolling,
    races racing, scoots scooting, is-carried being-carried, skims skimming""",
    "coasts coasting, slips slipping, journeys journeying",
    "drifts drifting, glides gliding, cruises cruising",
)
_ACTIONS = {
    "up": _split(
        """rises rising, ascends ascending, goes-up going-up, lifts-off lifting-off, levitates levitating, gains-height gaining-height,
        rises-to-the-top rising-to-the-top, is-lifted-up being-lifted-up, soars soaring, shoots-up shooting-up, mounts mounting,
        takes-off taking-off, moves-up moving-up, is-raised being-raised, scales-the-frame scaling-the-frame""",
        "is-hoisted being-hoisted, elevates elevating",
        "climbs climbing, gains-altitude gaining-altitude",
    ),
    "down": _split(
        """falls falling, drops dropping, descends descending, goes-down going-down, comes-down coming-down, loses-height losing-height,
        falls-to-the-bottom falling-to-the-bottom, is-lowered being-lowered, drops-to-the-floor dropping-to-the-floor, moves-down
        moving-down, tumbles-down tumbling-down, nosedives nosediving, slumps slumping, settles settling""",
        "dives diving, subsides subsiding",
        "sinks sinking, plunges plunging, plummets plummeting",
    ),
    "bounce": _split(
        """bounces bouncing, bounces-off-the-edge bouncing-off-the-edge, bounces-back bouncing-back, ricochets ricocheting,
        hits-the-edge-and-comes-back hitting-the-edge-and-coming-back, strikes-the-wall-and-returns striking-the-wall-and-returning,
        bounces-against-the-side bouncing-against-the-side, bumps-into-the-wall-and-bounces bumping-into-the-wall-and-bouncing,
        collides-with-the-border-and-turns-back colliding-with-the-border-and-turning-back, bounces-like-a-rubber-ball
        bouncing-like-a-rubber-ball, goes-to-the-edge-and-back going-to-the-edge-and-back, reverses-at-the-edge reversing-at-the-edge,
        is-reflected-by-the-border being-reflected-by-the-border, touches-the-side-then-heads-back
        touching-the-side-then-heading-back, hops-off-the-border hopping-off-the-border, is-deflected-by-the-edge
        being-deflected-by-the-edge, turns-around-at-the-edge turning-around-at-the-edge, jumps-back-from-the-wall
        jumping-back-from-the-wall, bounds-off-the-side bounding-off-the-side, goes-there-and-back going-there-and-back,
        knocks-against-the-frame-and-reverses knocking-against-the-frame-and-reversing""",
        """boomerangs-off-the-edge boomeranging-off-the-edge, caroms-off-the-wall caroming-off-the-wall, smacks-the-edge-and-recoils
        smacking-the-edge-and-recoiling""",
        "rebounds rebounding, rebounds-off-the-wall rebounding-off-the-wall, springs-back-from-the-edge springing-back-from-the-edge",
    ),
    "still": _split(
        """stays-still staying-still, does-not-move not-moving, remains-in-place remaining-in-place, stands-still standing-still,
        stays-put staying-put, rests resting, is-stationary being-stationary, sits-there-without-moving sitting-there-without-moving,
        is-frozen being-frozen, keeps-still keeping-still, holds-its-position holding-its-position, is-at-rest being-at-rest,
        stays-where-it-is staying-where-it-is, does-nothing doing-nothing, remains-unmoving remaining-unmoving, waits-in-one-spot
        waiting-in-one-spot, lingers-in-place lingering-in-place, never-moves never-moving, is-static being-static,
        stays-in-the-same-place staying-in-the-same-place, is-inert being-inert, is-parked being-parked, is-paused being-paused,
        stays-without-motion staying-without-motion, stands-its-ground standing-its-ground, is-asleep being-asleep""",
        "does-not-stir not-stirring, sits-idle sitting-idle, does-not-twitch not-twitching",
        "is-motionless being-motionless, remains-immobile remaining-immobile, does-not-budge not-budging",
    ),
}

# {moves} is an action as "moves left", {moving} as "moving left".
_SENTENCES: Phrases = {
    "training": (
        "a {size} {colour} {shape} {moves}",
        "a {colour} {size} {shape} {moves}",
        "{size} {colour} {shape} {moving}",
        "{colour} {size} {shape}, {moving}",
        "the {size} {colour} {shape} {moves}",
        "a {size}, {colour} {shape} {moves}",
        "there is a {size} {colour} {shape} that {moves}",
        "a short clip of a {size} {colour} {shape} {moving}",
        "a video of a {size} {colour} {shape} {moving}",
        "a {size} {colour} {shape} {moves} on a plain dark background",
        "a {size} {colour} {shape} on a plain dark background {moves}, fixed camera",
        "on a dark background, a {size} {colour} {shape} {moves}",
        "a {shape} that is {size} and {colour} {moves}",
        "a {shape}, {size} and {colour}, {moves}",
        "a {shape} which {moves}, {colour} and {size}",
        "a {colour} {shape} {moves}; it is {size}",
        "a {colour} {shape}, {size}, {moving}",
        "a {size} {shape} {moves}; its colour is {colour}",
        "a {size} {shape} in {colour} {moves}",
        "the {shape} is {colour} and {size}, and it {moves}",
        "it {moves}: a {shape}, {colour}, {size}",
        "{moving}, a {size} {colour} {shape}",
        "{moving} on a plain background: a {size} {colour} {shape}",
        "we see a {size} {colour} {shape} {moving}",
        "I want a {size} {colour} {shape} which {moves}",
        "one {size} {colour} {shape}, alone in the frame, {moves}",
        "show a {colour} {shape} {moving}. the {shape} is {size}",
        "{colour} and {size}, the {shape} {moves}",
        "a single {colour} object, a {size} {shape}, {moves}",
        "in the video a {size} {colour} {shape} {moves}",
        "animation: {size} {colour} {shape}, {moving}",
        "this {size} thing is a {colour} {shape} and it {moves}",
        "a {size} {colour} {shape} is seen {moving}",
        "against darkness, some {size} {colour} {shape} {moves} at an even pace",
    ),
    "tuning": (
        "here a {size} {colour} {shape} {moves} all the time",
        "footage of one {colour} {shape}, {size} in extent, as it {moves}",
        "{size} in scale and {colour} in hue, another {shape} {moves}",
        "please make me a {colour}, {size} {shape} that simply {moves}",
    ),
    "unseen": (
        "watch how the {size} {colour} {shape} {moves}",
        "in this scene, a {size} and {colour} {shape} {moves} from start to finish",
        "a lone {shape} of {colour} colour and {size} dimensions keeps {moving}",
        "the camera films a {colour} {shape}, rather {size}, {moving} over black",
        "{colour} {shape} ({size}) {moving}",
        "picture a {size} {colour} {shape}: it {moves} across an empty screen",
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


def paraphrase(rng: np.random.Generator, attributes: Mapping[str, str], words: Words = "training") -> str:
    """Says these attributes, all or some, by a sentence and synonyms of a split, each drawn as often as any other."""
    if words not in get_args(Words):
        raise ValueError(f"words are of split {', '.join(get_args(Words))}, got {words!r}; set words")
    named = {name: attributes[name] for name in ATTRIBUTES if name in attributes and name != "motion"}
    said = {"size": "", "colour": "", "shape": "object"} | {
        name: _draw(rng, synonyms(name, value, words)) for name, value in named.items()
    }
    moves, moving = _draw(rng, _motions(attributes["motion"], words)) if "motion" in attributes else ("", "")
    usable = sentences(words)
    if len(attributes) < len(ATTRIBUTES):  # those in which what is left open leaves no gap
        usable = tuple(each for each in usable if "{size} {colour} {shape} {mov" in each)
    text = " ".join(_draw(rng, usable).format(**said, moves=moves, moving=moving).split())
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", re.sub(r" (?=[,.;:])", "", text))


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
