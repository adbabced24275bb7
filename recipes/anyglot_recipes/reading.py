"""Reading aloud and writing down words in any order: training samples that teach speech word by word.

Descriptions of scenes are few sentences, and a model that has heard all of them learns which words never meet: after
"small red" there was never a "circle", so it says "square" where a circle is asked for. Strings of the world's words in
random order have no such habits; what is left to learn is which sound is which word. A held-out combination
(`scene.HELD_OUT`) stands in no string, in whatever order. For training only: nothing here is graded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from anyglot_lm.segments import Sample, Segment
from anyglot_recipes.chain import encode_audio
from anyglot_synth.nanoworld.language import NUMBERS, WORDS
from anyglot_synth.nanoworld.scene import HELD_OUT
from anyglot_synth.nanoworld.voices import SpeechCache, Voice
from anyglot_tokenizers.tokenizer import Tokenizer

TASKS = ("write down", "read aloud")
MOST_WORDS = 6


def word_string(rng: np.random.Generator) -> str:
    """Two to six words of the world."""
    known = (*WORDS, *NUMBERS)
    while True:
        chosen = [known[int(i)] for i in rng.integers(len(known), size=int(rng.integers(2, MOST_WORDS + 1)))]
        if not any(set(triple) <= set(chosen) for triple in HELD_OUT):
            return " ".join(chosen)


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
    aloud in the assistant's.
    """
    rng = np.random.default_rng([seed, 79])
    strings = [word_string(rng) for _ in range(num)]
    users = [voices[int(i)] for i in rng.integers(len(voices), size=num)]
    heard = encode_audio(speech, [vary(cache.say(text, voice)) for text, voice in zip(strings, users, strict=True)])
    said = encode_audio(speech, [cache.say(text, assistant) for text in strings])
    for text, user, reply in zip(strings, heard, said, strict=True):
        yield TASKS[0], Sample([Segment("speech", user, "user"), Segment("text", text, "assistant")])
        yield TASKS[1], Sample([Segment("text", text, "user"), Segment("speech", reply, "assistant")])
