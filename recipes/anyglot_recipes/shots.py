"""Few-shot documents of nanoworld: pictures and what a rule, which no word of them tells, has one say about each.

A rule names one or two attributes in an order; some rules are held out of training. This file makes documents; training
on them is `nano_shots.py`, and nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from anyglot_lm.segments import Sample, Segment, with_examples
from anyglot_synth.nanoworld.language import place_words
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, ROWS, SHAPES, SIZES, Thing

Rule = tuple[str, ...]
NAMES = ("color", "shape", "size", "place")
HELD_OUT: tuple[Rule, ...] = (("shape", "color"), ("place", "shape"), ("size", "place"))
"""Rules of no training document. Each names in one order what a training rule names in the other."""
RULES: tuple[Rule, ...] = tuple(rule for count in (1, 2) for rule in permutations(NAMES, count) if rule not in HELD_OUT)
"""Rules of the training: one attribute, or two in an order."""
Picture = tuple[Thing, np.ndarray]
"""What is alone in a picture, and the picture's codes int64 [K, h, w]."""
KINDS = {
    word: name
    for name, values in zip(NAMES, (COLORS, SHAPES, SIZES, (*ROWS, *COLUMNS)), strict=True)
    for word in values
}
"""Word of an answer -> the attribute it is of."""


def say(thing: Thing, rule: Rule) -> str:
    """What a rule has one say: `("place", "color")` gives "top left red"."""
    return " ".join(place_words(thing) if name == "place" else getattr(thing, name) for name in rule)


def document(shown: Sequence[Picture], rule: Rule) -> Sample:
    """Turns of a picture and its answer; all answers are learnt, the first of which nothing tells the rule of."""
    turns = [
        Sample([Segment("image", codes, "user"), Segment("text", say(thing, rule), "assistant")])
        for thing, codes in shown
    ]
    return with_examples(turns[:-1], turns[-1])
