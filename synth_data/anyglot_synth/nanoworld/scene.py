"""The scenes of nanoworld: what there is, which combinations are held out, and how a guess is scored.

A scene is one to three coloured shapes on a 3 x 3 grid. This file knows nothing about how a scene is said,
drawn, played or recognised; see the sibling modules for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
MAX_THINGS = 3
COUNT_PROBABILITIES = (0.6, 0.25, 0.15)
"""Chance that a sampled scene holds one, two or three things."""

Triple = tuple[str, str, str]
Split = Literal["train", "test"]

HELD_OUT: frozenset[Triple] = frozenset(
    {
        ("circle", "red", "small"),
        ("square", "green", "large"),
        ("triangle", "blue", "small"),
        ("cross", "yellow", "large"),
        ("circle", "purple", "large"),
        ("square", "white", "small"),
    }
)
"""(shape, color, size) triples that no training scene holds; each pair of their values does occur there."""

_ALL: tuple[Triple, ...] = tuple((shape, color, size) for shape in SHAPES for color in COLORS for size in SIZES)
_TRAIN: tuple[Triple, ...] = tuple(triple for triple in _ALL if triple not in HELD_OUT)
_TEST: tuple[Triple, ...] = tuple(triple for triple in _ALL if triple in HELD_OUT)
_CHOICES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "row": ROWS, "column": COLUMNS}


@dataclass(frozen=True)
class Thing:
    """One coloured shape at one place of the grid.

    Raises:
        ValueError: an attribute is not one of the world's values.
    """

    shape: str
    color: str
    size: str
    row: str
    column: str

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"a thing's {name} is {value!r}; use one of {', '.join(choices)}")

    @property
    def triple(self) -> Triple:
        """(shape, color, size): what :data:`HELD_OUT` is about."""
        return self.shape, self.color, self.size

    @property
    def place(self) -> tuple[str, str]:
        """(row, column)."""
        return self.row, self.column

    @property
    def position(self) -> int:
        """Place as a number 0..8 in reading order."""
        return ROWS.index(self.row) * len(COLUMNS) + COLUMNS.index(self.column)


@dataclass(frozen=True)
class Scene:
    """One to three things at distinct places, always kept in reading order (row by row).

    Raises:
        ValueError: no thing, more than three things, or two things at one place.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.things, key=lambda thing: thing.position))
        if not 1 <= len(ordered) <= MAX_THINGS:
            raise ValueError(f"a scene has {len(ordered)} things; use 1 to {MAX_THINGS}")
        if len({thing.position for thing in ordered}) != len(ordered):
            raise ValueError("a scene has two things at one place; give every thing its own place")
        object.__setattr__(self, "things", ordered)

    def __len__(self) -> int:
        return len(self.things)

    @property
    def has_held_out(self) -> bool:
        """Whether any thing is of a held-out combination."""
        return any(thing.triple in HELD_OUT for thing in self.things)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form: ``{"things": [{"shape": ..., "color": ..., ...}, ...]}``."""
        return {"things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scene:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: the dictionary does not describe a scene.
        """
        try:
            things = tuple(Thing(**{name: thing[name] for name in _CHOICES}) for thing in data["things"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a scene: {data!r} ({error!r}); expected {{'things': [{{{', '.join(_CHOICES)}}}, ...]}}"
            ) from error
        return cls(things)


def sample_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """Draw a random scene.

    Args:
        rng: source of randomness.
        split: ``train`` scenes hold no held-out triple; ``test`` scenes hold at least one, the rest being any triple.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; use 'train' or 'test'")
    count = 1 + int(rng.choice(MAX_THINGS, p=COUNT_PROBABILITIES))
    places = rng.choice(len(ROWS) * len(COLUMNS), size=count, replace=False)
    pool = _TRAIN if split == "train" else _ALL
    triples = [pool[int(rng.integers(len(pool)))] for _ in range(count)]
    if split == "test":
        triples[int(rng.integers(count))] = _TEST[int(rng.integers(len(_TEST)))]
    return Scene(
        tuple(
            Thing(*triple, ROWS[int(place) // len(COLUMNS)], COLUMNS[int(place) % len(COLUMNS)])
            for triple, place in zip(triples, places, strict=True)
        )
    )


ATTRIBUTES = ("shape", "color", "size", "place")
"""What `score` counts of a matched pair of things."""


def _right(truth: Thing, guess: Thing) -> list[bool]:
    return [getattr(truth, name) == getattr(guess, name) for name in ATTRIBUTES]


def _matched(truth: Scene, guess: Scene) -> list[list[bool]]:
    """For each pair of the assignment that is best for the guess, what is right of `ATTRIBUTES`."""
    short, long = sorted((truth.things, guess.things), key=len)
    orders = permutations(long, len(short))
    return max(
        ([_right(a, b) for a, b in zip(short, order, strict=True)] for order in orders),
        key=lambda pairs: sum(map(sum, pairs)),
    )


def score(truth: Scene, guess: Scene | None) -> float:
    """Share of attributes that a guess gets right, 0..1.

    Things are matched by the assignment that is best for the guess. A matched pair earns a quarter for each
    of shape, color, size and place (row and column both right); the sum is divided by the larger number of
    things, so missing and invented things both cost. ``None`` (nothing recognised) scores 0.
    """
    if guess is None:
        return 0.0
    right = sum(map(sum, _matched(truth, guess)))
    return right / len(ATTRIBUTES) / max(len(truth), len(guess))


def attributes(truth: Scene, guess: Scene | None) -> dict[str, float]:
    """`score` in parts: for each of `ATTRIBUTES` the share that a guess gets right, 0..1; their mean is the score.

    Also ``count``: 1 where the number of things is right.
    """
    if guess is None:
        return dict.fromkeys((*ATTRIBUTES, "count"), 0.0)
    pairs, most = _matched(truth, guess), max(len(truth), len(guess))
    found = {name: sum(pair[i] for pair in pairs) / most for i, name in enumerate(ATTRIBUTES)}
    return {**found, "count": float(len(truth) == len(guess))}
