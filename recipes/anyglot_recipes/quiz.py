"""Written questions by turns: about a picture, and about a text of things that are in no picture.

A quiz about a text is one about a scene in which words are exchanged for words from outside of the world ("is there a
wooden orange kettle?"), the same in description, questions and answers. What is said of such things can be known from
the text alone, word by word, whatever met what in training; a held-out combination (`scene.HELD_OUT`) stands in none.
Such texts are for training only; quizzes about pictures are graded, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from anyglot_lm.segments import ROLES, Role, Sample, Segment
from anyglot_recipes.reading import FOREIGN, OWN
from anyglot_synth.nanoworld import language
from anyglot_synth.nanoworld.scene import Scene, sample_scene

LOOK_UP = "look up"
"""The task of `lookups`."""
QUESTIONS = 12
"""Of one quiz."""
EXCHANGED = 0.5
"""Share of the world's words that a text exchanges."""
_OWN = re.compile(rf"\b({'|'.join(word for words in OWN.values() for word in words)})(e?s)?\b")


def quiz(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`QUESTIONS` different written questions about a scene in any order: half about presence, half of these yes."""
    asked: dict[str, str] = {}
    while len(asked) < QUESTIONS:
        i = len(asked)
        if i % 2:
            found = language.presence(scene, rng, present=i % 4 == 1, hard=bool(rng.integers(2)))
        else:
            found = language.question(scene, rng)
        asked.setdefault(*found)
    pairs = list(asked.items())
    return [pairs[i] for i in rng.permutation(len(pairs))]


def lookups(num: int, seed: int) -> Iterator[tuple[str, Sample]]:
    """(task, sample) of `num` texts of the user, which the assistant says in other words and is then asked about."""
    rng = np.random.default_rng([seed, 93])
    for _ in range(num):
        scene, words = sample_scene(rng, "train"), foreign_words(rng)
        said: list[tuple[Role, str]] = [(role, language.describe(scene, rng)) for role in ROLES]
        for question, answer in quiz(scene, rng):
            said += [("user", question), ("assistant", answer)]
        yield LOOK_UP, Sample([Segment("text", exchange(text, words), role) for role, text in said])


def foreign_words(rng: np.random.Generator) -> dict[str, str]:
    """What stands for some of the world's words; no two have the same."""
    return {
        word: foreign
        for kind, own in OWN.items()
        for word, foreign in zip(own, rng.permutation(FOREIGN[kind]).tolist(), strict=False)
        if rng.random() < EXCHANGED
    }


def exchange(text: str, words: Mapping[str, str]) -> str:
    """The text with these words in it, singular and plural, in the place of the world's."""
    return _OWN.sub(lambda m: words[m[1]] + ("s" if m[2] else "") if m[1] in words else m[0], text)
