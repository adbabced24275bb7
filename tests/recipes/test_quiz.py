"""Quizzes about texts: what they say is true of the text, and of nothing that is held out."""

from __future__ import annotations

import re

import numpy as np

from anyglot_recipes.quiz import LOOK_UP, QUESTIONS, exchange, foreign_words, lookups
from anyglot_recipes.reading import FOREIGN, OWN
from anyglot_synth.nanoworld import language
from anyglot_synth.nanoworld.scene import HELD_OUT


def test_words_are_exchanged_one_for_one() -> None:
    own = {word for words in OWN.values() for word in words}
    foreign = {word for words in FOREIGN.values() for word in words}
    for seed in range(50):
        words = foreign_words(np.random.default_rng(seed))
        assert words.keys() < own and set(words.values()) <= foreign and len(set(words.values())) == len(words)
    words = {"circle": "kettle", "cross": "ladder", "red": "orange"}
    said = exchange("how many circles, crosses and red squares? a redder cross, a circle", words)
    assert said == "how many kettles, ladders and orange squares? a redder ladder, a kettle"


def test_the_answers_are_those_of_the_text() -> None:
    foreign = 0
    for task, sample in lookups(40, seed=3):
        texts = [str(segment.content) for segment in sample.segments]
        assert task == LOOK_UP and len(texts) == 2 * (QUESTIONS + 1)
        assert [segment.loss for segment in sample.segments] == [False, True] * (QUESTIONS + 1)
        held_out = [f"{size} {color} {shape}" for shape, color, size in HELD_OUT]
        assert not any(phrase in text for text in texts for phrase in held_out)
        unknown = {word for text in texts for word in re.findall(r"\w+", text)} & {
            w for v in FOREIGN.values() for w in v
        }
        foreign += bool(unknown)
        back = {}
        for kind, own in OWN.items():  # any exchange back gives a scene of which the same is true
            free = [word for word in own if not any(re.search(rf"\b{word}(e?s)?\b", text) for text in texts)]
            back |= dict(zip(sorted(unknown & {*FOREIGN[kind]}), free, strict=False))
        plain = [re.sub(r"\b(%s)(s?)\b" % "|".join(back), lambda m: back[m[1]] + m[2], t) if back else t for t in texts]  # noqa: UP031, B023
        scene = language.parse(plain[0].replace("crosss", "crosses"))
        assert scene is not None and language.parse(plain[1]) == scene
        for question, answer in zip(plain[2::2], plain[3::2], strict=True):
            if question.startswith("is there"):
                named = re.findall(r"\w+", question.removeprefix("is there a "))
                here = any({*named} - {"thing"} <= {t.size, t.color, t.shape} for t in scene.things)
                assert answer == ("yes" if here else "no"), (question, plain[0])
            else:
                assert language.same_answer(language.answer(scene, question.replace("crosss", "crosses")) or "", answer)
    assert foreign > 30
