"""Reading aloud and writing down words in any order: training samples that teach speech word by word.

Descriptions of scenes are few sentences, and a model that has heard all of them learns which words never meet: after
"small red" there was never a "circle", so it says "square" where a circle is asked for. Strings of the world's words in
random order have no such habits; what is left to learn is which sound is which word. Every other string is a
description with words from outside of the world in it ("small red kettle, top left"): after "small red" may then come
many words, and only the text tells which. To be read aloud, half of these are given as sentences ("there is a small
red kettle at the top left"), as scenes are. A held-out combination (`scene.HELD_OUT`) stands in no string, in whatever
order. For training only: nothing here is graded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from anyglot_lm.segments import Sample, Segment
from anyglot_recipes.chain import encode_audio
from anyglot_synth.nanoworld.language import CLAUSES, JOINERS, NUMBERS, SPOKEN_CLAUSES, SPOKEN_JOINER, WORDS
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, HELD_OUT, ROWS, SHAPES, SIZES
from anyglot_synth.nanoworld.voices import SpeechCache, Voice
from anyglot_tokenizers.tokenizer import Tokenizer

TASKS = ("write down", "read aloud")
MOST_WORDS = 6
FOREIGN: dict[str, tuple[str, ...]] = {
    "size": ("heavy", "wooden", "broken", "hollow", "quiet", "gentle", "narrow", "silver"),
    "color": ("orange", "brown", "golden", "copper", "marble", "velvet", "cotton", "rusty"),
    "shape": (
        "kettle",
        "ladder",
        "window",
        "pencil",
        "garden",
        "lemon",
        "rabbit",
        "button",
        "candle",
        "hammer",
        "basket",
        "feather",
        "island",
        "pillow",
        "rocket",
        "saddle",
        "tiger",
        "violin",
        "walnut",
        "anchor",
        "bottle",
        "carpet",
        "dragon",
        "engine",
    ),
}
"""Words of no scene, by the place they take in a description."""
OWN = {"size": SIZES, "color": COLORS, "shape": SHAPES}


def word_string(rng: np.random.Generator) -> str:
    """Two to six words of the world."""
    known = (*WORDS, *NUMBERS)
    return " ".join(known[int(i)] for i in rng.integers(len(known), size=int(rng.integers(2, MOST_WORDS + 1))))


def foreign_description(rng: np.random.Generator) -> tuple[str, str]:
    """(in writing, aloud): one or two things as scenes are described, in each of which at least one word is foreign."""
    written, spoken = [], []
    template = CLAUSES[int(rng.integers(len(CLAUSES)))]
    for _ in range(int(rng.integers(1, 3))):
        kinds = list(FOREIGN)
        foreign = {kinds[int(rng.integers(len(kinds)))], *(kind for kind in kinds if rng.random() < 0.2)}
        chosen = (FOREIGN[kind] if kind in foreign else OWN[kind] for kind in kinds)
        thing = " ".join(words[int(rng.integers(len(words)))] for words in chosen)
        place = " ".join(words[int(rng.integers(len(words)))] for words in (ROWS, COLUMNS))
        written.append(template.format(thing=thing, place=place))
        spoken.append(SPOKEN_CLAUSES[int(rng.integers(len(SPOKEN_CLAUSES)))].format(thing=thing, place=place))
    _, last = JOINERS[int(rng.integers(len(JOINERS)))]
    return last.join(written), SPOKEN_JOINER.join(spoken)


def reading_pairs(num: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`num` texts as (in writing, aloud): descriptions with foreign words and strings of words, which are alike, by
    turns."""
    return [_allowed(foreign_description if i % 2 == 0 else _string_twice, rng) for i in range(num)]


def reading_strings(num: int, rng: np.random.Generator) -> list[str]:
    """`num` strings as they are said, of both kinds by turns."""
    return [spoken for _, spoken in reading_pairs(num, rng)]


def _string_twice(rng: np.random.Generator) -> tuple[str, str]:
    string = word_string(rng)
    return string, string


def _allowed(make: Callable[[np.random.Generator], tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    while True:
        pair = make(rng)
        if not any(set(triple) <= set(re.findall(r"\w+", pair[1])) for triple in HELD_OUT):
            return pair


def reading_samples(
    num: int,
    seed: int,
    speech: Tokenizer,
    cache: SpeechCache,
    voices: tuple[Voice, ...],
    assistant: str,
    vary: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[str, Sample]]:
    """`num` strings as (task, sample): written down from any of `voices`, as `vary` changes each recording, and read
    aloud in the assistant's, every other description from a sentence.
    """
    rng = np.random.default_rng([seed, 79])
    pairs = reading_pairs(num, rng)
    strings = [spoken for _, spoken in pairs]
    users = [voices[int(i)] for i in rng.integers(len(voices), size=num)]
    cache.prefetch_said([*zip(strings, users, strict=True), *((text, assistant) for text in strings)])
    heard = encode_audio(speech, [vary(cache.say(text, voice)) for text, voice in zip(strings, users, strict=True)])
    said = encode_audio(speech, [cache.say(text, assistant) for text in strings])
    for i, ((written, text), user, reply) in enumerate(zip(pairs, heard, said, strict=True)):
        yield TASKS[0], Sample([Segment("speech", user, "user"), Segment("text", text, "assistant")])
        given = written if i % 4 == 0 else text
        yield TASKS[1], Sample([Segment("text", given, "user"), Segment("speech", reply, "assistant")])
