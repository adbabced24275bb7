"""Sentences about nanoworld scenes: descriptions and their inverse, questions and answers, edits.

All text is lower-case English made from templates, so that :func:`parse` can invert every description
exactly. This file makes and reads text only; speaking it is the business of ``voices.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Literal

import numpy as np

from anyglot_synth.nanoworld.scene import (
    COLORS,
    COLUMNS,
    HELD_OUT,
    MAX_THINGS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

Style = Literal["text", "spoken"]

NUMBERS = ("zero", "one", "two", "three")
WORDS: tuple[str, ...] = (*SIZES, *COLORS, *SHAPES, *ROWS, *COLUMNS)
"""The closed vocabulary of spoken descriptions (18 words)."""

CLAUSES: tuple[str, ...] = (
    "a {thing} at the {place}",
    "there is a {thing} at the {place}",
    "{place}: a {thing}",
    "at the {place} is a {thing}",
    "a {thing} sits at the {place}",
    "the {place} holds a {thing}",
    "a {thing} in the {place}",
)
"""Clause templates of written descriptions."""

JOINERS: tuple[tuple[str, str], ...] = (
    (" and ", " and "),
    (", ", ", "),
    (". ", ". "),
    (", ", " and "),
    ("; ", "; "),
)
"""(between things, before the last thing)."""

SPOKEN_CLAUSES: tuple[str, ...] = ("{thing}, {place}", "{place}, {thing}")
"""Clause templates of spoken descriptions."""

SPOKEN_JOINER = ". "

_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an the this it there i we you see can is are has holds shows also then and with at in on of "
        "sits placed located position corner picture image melody scene",
    )
)
_SYNONYMS = {
    "centre": "center",
    "colour": "color",
    "big": "large",
    "little": "small",
    "tiny": "small",
    "upper": "top",
    "lower": "bottom",
    **{str(number): word for number, word in enumerate(NUMBERS)},
}
_KINDS: dict[str, str] = {
    word: kind
    for kind, values in (
        ("size", SIZES),
        ("color", COLORS),
        ("shape", SHAPES),
        ("row", ROWS),
        ("column", COLUMNS),
    )
    for word in values
}
_THING_KINDS = frozenset({"size", "color", "shape"})
_PLACE_KINDS = frozenset({"row", "column"})


def words(text: str) -> list[str]:
    """Lower-case words of a text without punctuation, spelling variants unified ("centre" -> "center")."""
    return [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())]


def content_words(text: str) -> list[str]:
    """`words` without those that say nothing about a scene ("a", "there", "is", ...)."""
    return [word for word in words(text) if word not in _FILLERS]


def thing_words(thing: Thing) -> str:
    """For example ``"large red circle"``."""
    return f"{thing.size} {thing.color} {thing.shape}"


def place_words(thing: Thing) -> str:
    """For example ``"top left"``."""
    return f"{thing.row} {thing.column}"


def _pick(rng: np.random.Generator | None, count: int) -> int:
    return 0 if rng is None else int(rng.integers(count))


def _fill(template: str, thing: Thing) -> str:
    return template.format(thing=thing_words(thing), place=place_words(thing))


def spoken_clauses(scene: Scene, rng: np.random.Generator | None = None) -> list[str]:
    """One short clause per thing, such as ``"large red circle, top left"``; one word order per scene."""
    template = SPOKEN_CLAUSES[_pick(rng, len(SPOKEN_CLAUSES))]
    return [_fill(template, thing) for thing in scene.things]


def all_spoken_clauses() -> list[str]:
    """Every clause that :func:`spoken_clauses` can return (864 of them), in a fixed order."""
    things = [Thing(*values) for values in product(SHAPES, COLORS, SIZES, ROWS, COLUMNS)]
    return [_fill(template, thing) for template in SPOKEN_CLAUSES for thing in things]


def describe(scene: Scene, rng: np.random.Generator | None = None, style: Style = "text") -> str:
    """Say what is in a scene, in reading order.

    Args:
        scene: what to describe.
        rng: chooses the templates; ``None`` takes the first of each.
        style: ``text`` (full sentences) or ``spoken`` (only words of :data:`WORDS`, one clause per thing).

    Raises:
        ValueError: unknown style.
    """
    if style == "spoken":
        return SPOKEN_JOINER.join(spoken_clauses(scene, rng))
    if style != "text":
        raise ValueError(f"style is {style!r}; use 'text' or 'spoken'")
    template = CLAUSES[_pick(rng, len(CLAUSES))]
    between, last = JOINERS[_pick(rng, len(JOINERS))]
    clauses = [_fill(template, thing) for thing in scene.things]
    return last.join([*filter(None, [between.join(clauses[:-1])]), clauses[-1]])


def _take(tokens: list[str], start: int, kinds: frozenset[str]) -> tuple[dict[str, str], int]:
    """Read words of distinct kinds from ``start`` on, stopping at the first that does not belong."""
    found: dict[str, str] = {}
    while start < len(tokens):
        kind = _KINDS[tokens[start]]
        if kind not in kinds or kind in found:
            break
        found[kind] = tokens[start]
        start += 1
    return found, start


def parse(text: str) -> Scene | None:
    """Read a description back into a scene; ``None`` when the text is not a complete description.

    Understands every template of :func:`describe`, with or without punctuation and in any letter case,
    attributes in any order ("red large circle"), "centre", and "the center" or "the middle" for the middle
    place. Words outside the grammar, missing or doubled attributes, two things at one place and more than
    three things all give ``None``.
    """
    tokens = content_words(text)
    if not tokens or any(token not in _KINDS for token in tokens):
        return None
    parts: list[dict[str, str]] = []
    start = 0
    while start < len(tokens):
        kinds = _PLACE_KINDS if _KINDS[tokens[start]] in _PLACE_KINDS else _THING_KINDS
        found, start = _take(tokens, start, kinds)
        if found in ({"row": "middle"}, {"column": "center"}):
            found = {"row": "middle", "column": "center"}
        if found.keys() != kinds:
            return None
        parts.append(found)
    if len(parts) % 2 or len(parts) > 2 * MAX_THINGS:
        return None
    merged = [first | second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    if any(len(values) != len(_THING_KINDS) + len(_PLACE_KINDS) for values in merged):
        return None
    things = tuple(Thing(**values) for values in merged)
    if len({thing.position for thing in things}) != len(things):
        return None
    return Scene(things)


def _references(scene: Scene, target: Thing, hidden: str | None = None) -> Iterator[str]:
    """Noun phrases that fit ``target`` and nothing else in the scene, not naming its ``hidden`` attribute."""
    for names in (
        ("shape",),
        ("size", "shape"),
        ("color", "shape"),
        ("size", "color", "shape"),
        ("size", "color"),
    ):
        if hidden in names:
            continue
        fitting = [thing for thing in scene.things if all(getattr(thing, n) == getattr(target, n) for n in names)]
        if len(fitting) == 1:
            yield " ".join(getattr(target, name) for name in names) + ("" if "shape" in names else " thing")


def _question_kinds(scene: Scene) -> list[list[tuple[str, str]]]:
    kinds: dict[str, list[tuple[str, str]]] = {name: [] for name in ("color", "size", "shape", "where", "what")}
    for thing in scene.things:
        for attribute in ("color", "size", "shape"):
            answer = getattr(thing, attribute)
            for reference in _references(scene, thing, hidden=attribute):
                kinds[attribute].append((f"what {attribute} is the {reference}?", answer))
            kinds[attribute].append((f"what {attribute} is the thing at the {place_words(thing)}?", answer))
        for reference in _references(scene, thing):
            kinds["where"].append((f"where is the {reference}?", place_words(thing)))
        kinds["what"].append((f"what is at the {place_words(thing)}?", thing_words(thing)))
    counted = [("how many things are there?", NUMBERS[len(scene)])]
    for attribute, plural in (("shape", "{}s"), ("color", "{} things"), ("size", "{} things")):
        for value, count in sorted(Counter(getattr(thing, attribute) for thing in scene.things).items()):
            name = "crosses" if value == "cross" else plural.format(value)
            counted.append((f"how many {name} are there?", NUMBERS[count]))
    return [*filter(None, kinds.values()), counted]


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Every unambiguous (question, answer) pair about a scene."""
    return [pair for kind in _question_kinds(scene) for pair in kind]


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A random unambiguous (question, answer) pair, such as ``("what color is the square?", "red")``.

    The kind of question (color, size, shape, where, what, how many) is drawn evenly first.
    """
    kinds = _question_kinds(scene)
    kind = kinds[int(rng.integers(len(kinds)))]
    return kind[int(rng.integers(len(kind)))]


_NAMED: tuple[tuple[str, ...], ...] = tuple(
    names for count in (1, 2, 3) for names in combinations(("size", "color", "shape"), count)
)
"""What a question of presence can name of a thing, in the order it is said."""


def _phrases(scene: Scene, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All values of these attributes. Held-out triples only where the scene has some: else a training scene would tell
    that they never are.
    """
    found = product(*({"size": SIZES, "color": COLORS, "shape": SHAPES}[name] for name in names))
    if len(names) < 3 or scene.has_held_out:
        return list(found)
    return [(size, color, shape) for size, color, shape in found if (shape, color, size) not in HELD_OUT]


def presence(scene: Scene, rng: np.random.Generator, present: bool, hard: bool = False) -> tuple[str, str]:
    """A question whether something is in a scene, such as ``("is there a large red circle?", "yes")``.

    One to three of size, color and shape are named. How many, and which, does not depend on the answer.

    Args:
        scene: what is asked about.
        rng: draws the question.
        present: whether the answer is ``yes``.
        hard: name two attributes at least. An absent thing then differs from one that is there in a single one of
            them, as the adversarial negatives of POPE do (Li et al. 2023); else it is any that is absent.
    """
    here = {names: [tuple(getattr(thing, n) for n in names) for thing in scene.things] for names in _NAMED}
    absent = {names: [values for values in _phrases(scene, names) if values not in here[names]] for names in _NAMED}
    if hard:
        for names in _NAMED:
            absent[names] = [
                values
                for values in absent[names]
                if any(sum(a != b for a, b in zip(values, there, strict=True)) == 1 for there in here[names])
            ]
    kinds = [names for names in _NAMED if absent[names] and len(names) > hard]
    names = kinds[int(rng.integers(len(kinds)))]
    values = (here if present else absent)[names]
    said = " ".join(values[int(rng.integers(len(values)))])
    return f"is there a {said}{'' if 'shape' in names else ' thing'}?", "yes" if present else "no"


def answer(scene: Scene, text: str) -> str | None:
    """The true answer to a question of this grammar; ``None`` when it is none, or not clear in the scene."""
    asked = words(text)
    return next((reply for query, reply in questions(scene) if words(query) == asked), None)


_ANSWER_FILLERS = frozenset({"a", "an", "the", "at", "in", "on", "it", "is", "its", "there", "are", "thing", "things"})


def same_answer(a: str, b: str) -> bool:
    """Whether two short answers say the same, whatever their case, punctuation, articles and word order."""

    def core(text: str) -> list[str]:
        return sorted(word for word in words(text) if word not in _ANSWER_FILLERS)

    return bool(core(a)) and core(a) == core(b)


def _edit_kinds(scene: Scene) -> list[list[tuple[str, tuple[Thing, ...]]]]:
    places = {thing.place for thing in scene.things}
    free = [place for place in product(ROWS, COLUMNS) if place not in places]
    kinds: dict[str, list[tuple[str, tuple[Thing, ...]]]] = {}

    def add(kind: str, instruction: str, things: tuple[Thing, ...]) -> None:
        if scene.has_held_out or all(thing.triple not in HELD_OUT for thing in things):
            kinds.setdefault(kind, []).append((instruction, things))

    for index, thing in enumerate(scene.things):
        rest = scene.things[:index] + scene.things[index + 1 :]
        # Three things that look alike have no names of their own: then the place tells them apart.
        for reference in list(_references(scene, thing)) or [f"thing at the {place_words(thing)}"]:
            for color in COLORS:
                if color != thing.color:
                    add("color", f"make the {reference} {color}", (*rest, replace(thing, color=color)))
            size = SIZES[1 - SIZES.index(thing.size)]
            add("size", f"make the {reference} {size}", (*rest, replace(thing, size=size)))
            for shape in SHAPES:
                if shape != thing.shape:
                    add("shape", f"turn the {reference} into a {shape}", (*rest, replace(thing, shape=shape)))
            if rest:
                add("remove", f"remove the {reference}", rest)
            for row, column in free:
                moved = replace(thing, row=row, column=column)
                add("move", f"move the {reference} to the {row} {column}", (*rest, moved))
    if len(scene) < MAX_THINGS:
        for values in product(SHAPES, COLORS, SIZES):
            for row, column in free:
                new = Thing(*values, row, column)
                add("add", f"add a {thing_words(new)} at the {row} {column}", (*scene.things, new))
    return list(kinds.values())


def edits(scene: Scene) -> list[tuple[str, Scene]]:
    """Every unambiguous (instruction, resulting scene) pair; see :func:`edit`."""
    return [(text, Scene(things)) for kind in _edit_kinds(scene) for text, things in kind]


def edit(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """A random (instruction, new scene) pair, such as ``("make the circle blue", ...)``.

    The kind of edit (color, size, shape, move, remove, add) is drawn evenly first. A scene without held-out
    things is never turned into one with held-out things, so edits of training scenes stay in the training
    split.
    """
    kinds = _edit_kinds(scene)
    kind = kinds[int(rng.integers(len(kinds)))]
    instruction, things = kind[int(rng.integers(len(kind)))]
    return instruction, Scene(things)


def apply_edit(scene: Scene, instruction: str) -> Scene | None:
    """The scene after an instruction of this grammar; ``None`` when it is no clear edit of the scene."""
    asked = words(instruction)
    return next((result for text, result in edits(scene) if words(text) == asked), None)
