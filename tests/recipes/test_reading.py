"""Strings of words: never a held-out combination, whatever stands between its words."""

from __future__ import annotations

import numpy as np

from anyglot_recipes.reading import MOST_WORDS, word_string
from anyglot_synth.nanoworld.language import NUMBERS, WORDS
from anyglot_synth.nanoworld.scene import HELD_OUT


def test_no_string_holds_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    strings = [word_string(rng).split() for _ in range(4000)]
    assert all(2 <= len(words) <= MOST_WORDS and set(words) <= {*WORDS, *NUMBERS} for words in strings)
    assert not any(set(triple) <= set(words) for words in strings for triple in HELD_OUT)
    assert len({tuple(words) for words in strings}) > 2500
