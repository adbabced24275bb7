"""`GrammarWriter`: any-to-any dialogues about nanoworld with known truth, without a language model and without end.

A dialogue opens with a picture, a melody or words, then goes on about the same scene: questions, edits, "draw what I
said", "play me what you see", "what color was it?". Number `index` is a function of (seed, splits, index) alone. Scenes
of the test split hold combinations, and its people use phrasings, that never occur in training.

`dialogue.meta["truth"]` says what a program may check: for each part that shows or describes a scene
`{"turn", "part", "kind": "scene", "scene"}`, for each answer `{"turn", "part", "kind": "answer", "answer"}`.
Media are descriptions still: voices, pictures and melodies come later (`illustrate.py`). Two indices may, rarely, give
the same dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from anyglot_synth.dialogue import ASSISTANT, IMAGE, MUSIC, SPEECH, TEXT, USER, Dialogue, Json, Part, Turn
from anyglot_synth.grammar_phrases import ANSWERS, phrasings
from anyglot_synth.nanoworld.language import NUMBERS, describe, edit, place_words, question
from anyglot_synth.nanoworld.scene import Scene, Split, sample_scene
from anyglot_synth.seeds import rng_of
from anyglot_synth.sources.base import BadRow, Source
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

VERSION = 1
"""Counts changes of what an index gives."""


@dataclass
class _Talk:
    """A dialogue while it is written: what has been said, and the scene that it is about."""

    rng: np.random.Generator
    scenes: Split
    words: str
    user: str
    assistant: str
    scene: Scene = field(init=False)
    before: Scene | None = None
    medium: str = IMAGE
    """What an edit is answered in: the medium of the last picture or melody."""
    given: set[str] = field(default_factory=set)
    """Modalities in which the dialogue holds the scene."""
    turns: list[Turn] = field(default_factory=list)
    truth: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scene = self.sample()

    def sample(self) -> Scene:
        return sample_scene(self.rng, self.scenes)

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def phrase(self, name: str) -> str:
        return str(self.pick(phrasings(name, self.words)))

    def describe(self, scene: Scene, modality: str) -> str:
        return describe(scene, self.rng, style="spoken" if modality == SPEECH else "text")

    def shows(self, modality: str, scene: Scene | None = None) -> tuple[Part, Json]:
        """A part that gives a scene, with its truth: a picture, a melody, or a description."""
        scene = scene or self.scene
        truth = {"kind": "scene", "scene": scene.to_dict()}
        return Part(modality, self.describe(scene, modality)), truth

    def words_of(self, name: str, modality: str) -> tuple[Part, Json | None]:
        """A part that asks for something, with the scene in it where the phrase has a place for it."""
        phrase = self.phrase(name)
        if "{scene}" not in phrase:
            return Part(modality, phrase), None
        text = phrase.format(scene=self.describe(self.scene, modality))
        return Part(modality, text), {"kind": "asked", "scene": self.scene.to_dict()}

    def turn(self, role: str, *parts: tuple[Part, Json | None]) -> None:
        for number, (_, truth) in enumerate(parts):
            if truth is not None:
                self.truth.append({"turn": len(self.turns), "part": number, **truth})
        self.turns.append(Turn(role, tuple(part for part, _ in parts)))

    def ask(self, *parts: tuple[Part, Json | None]) -> None:
        """What the user gives, in either order."""
        self.turn(USER, *(parts if self.rng.random() < 0.5 else parts[::-1]))

    def give(self, modality: str) -> None:
        """The assistant gives the scene; a picture or melody may come with a word."""
        parts: list[tuple[Part, Json | None]] = [self.shows(modality)]
        if modality in (IMAGE, MUSIC):
            if self.rng.random() < 0.4:
                parts.insert(0, (Part(self.assistant, self.phrase("done")), None))
            self.medium = modality
        self.turn(ASSISTANT, *parts)
        self.given.add(modality)

    def answer(self, kind: str, answer: str) -> None:
        text = self.pick(ANSWERS[kind]).format(answer)
        if answer == "one":
            text = text.replace("there are", "there is")
        self.turn(ASSISTANT, (Part(self.assistant, text), {"kind": "answer", "answer": answer}))


def _from_medium(asked: str, medium: str, given: str | None) -> Callable[[_Talk], None]:
    """The user gives a picture or melody; the assistant gives it in another way (None: in words)."""

    def act(talk: _Talk) -> None:
        talk.ask(talk.shows(medium), talk.words_of(asked, talk.user))
        talk.given, talk.medium = {medium}, medium
        talk.give(given or talk.assistant)

    return act


def _from_words(asked: str, given: str) -> Callable[[_Talk], None]:
    """The user asks in words, the scene among them or known already; the assistant gives it."""

    def act(talk: _Talk) -> None:
        talk.ask(talk.words_of(asked, talk.user))
        talk.give(given)

    return act


def _say(talk: _Talk) -> None:
    talk.ask(talk.words_of("say", TEXT))
    talk.give(SPEECH)


def _draw_and_say(talk: _Talk) -> None:
    talk.ask(talk.words_of("draw_and_say", talk.user))
    talk.turn(ASSISTANT, talk.shows(IMAGE), talk.shows(SPEECH))
    talk.given, talk.medium = {IMAGE, SPEECH}, IMAGE


def _tell(talk: _Talk) -> None:
    talk.ask(talk.words_of("tell", talk.user))
    talk.turn(ASSISTANT, (Part(talk.assistant, talk.phrase("understood")), None))
    talk.given.add(talk.user)


def _compare(talk: _Talk) -> None:
    if talk.rng.random() < 0.5:
        other = talk.sample()
        more = len(talk.scene) - len(other)
        asked, answer = "more", "the first" if more > 0 else "the second" if more < 0 else "the same"
    else:
        other = talk.scene if talk.rng.random() < 0.5 else talk.sample()
        asked, answer = "same", "yes" if other == talk.scene else "no"
    talk.turn(USER, talk.shows(IMAGE), talk.shows(IMAGE, other), talk.words_of(asked, talk.user))
    talk.answer("word", answer)


def _question(talk: _Talk) -> None:
    asked, answer = question(talk.scene, talk.rng)
    talk.ask((Part(talk.user, asked), None))
    first, second = asked.split()[:2]
    kind = first if first in ("where", "how") else second
    talk.answer(kind if kind in ANSWERS else "what", answer)


def _count(talk: _Talk) -> None:
    talk.ask(talk.words_of("count_it", talk.user))
    talk.answer("how", NUMBERS[len(talk.scene)])


def _pronoun(talk: _Talk) -> None:
    kind = talk.pick(("color", "size", "shape", "where"))
    thing = talk.scene.things[0]
    talk.ask(talk.words_of(kind, talk.user))
    talk.answer(kind, place_words(thing) if kind == "where" else getattr(thing, kind))


def _edit(talk: _Talk) -> None:
    instruction, after = edit(talk.scene, talk.rng)
    talk.ask((Part(talk.user, talk.phrase("edit").format(edit=instruction)), None))
    talk.before, talk.scene, talk.given = talk.scene, after, set()
    talk.give(talk.medium)


def _before(talk: _Talk) -> None:
    talk.ask(talk.words_of("before", talk.user))
    talk.turn(ASSISTANT, talk.shows(talk.assistant, talk.before))


OPENINGS: dict[str, Callable[[_Talk], None]] = {
    "see": _from_medium("see", IMAGE, None),
    "hear": _from_medium("hear", MUSIC, None),
    "play-seen": _from_medium("play_seen", IMAGE, MUSIC),
    "draw-heard": _from_medium("draw_heard", MUSIC, IMAGE),
    "draw": _from_words("draw", IMAGE),
    "play": _from_words("play", MUSIC),
    "say": _say,
    "draw-and-say": _draw_and_say,
    "tell": _tell,
    "compare": _compare,
}
"""What a dialogue begins with."""

FOLLOWING: dict[str, Callable[[_Talk], None]] = {
    "question": _question,
    "count": _count,
    "pronoun": _pronoun,
    "edit": _edit,
    "before": _before,
    "draw-it": _from_words("draw_it", IMAGE),
    "play-it": _from_words("play_it", MUSIC),
    "say-it": _from_words("say_it", SPEECH),
    "write-it": _from_words("write_it", TEXT),
}
"""What it goes on with."""


def _fits(talk: _Talk, act: str, last: str) -> bool:
    """Whether an act makes sense now."""
    if act == "pronoun":
        return len(talk.scene) == 1 and last != "edit"
    if act == "before":
        return talk.before is not None and last == "edit"
    again = {"draw-it": IMAGE, "play-it": MUSIC, "say-it": SPEECH, "write-it": TEXT}
    return again.get(act) not in talk.given and act != last


class GrammarWriter(Source):
    """See the module.

    Args:
        split: whose scenes are used: "train" or "test".
        seed: another seed gives other dialogues.
        phrasings: whose ways to ask are used; None takes those of `split`.
        max_rounds: most rounds (a user's turn and its answer); the number is drawn evenly from 1 up.
        speech: chance that the user speaks, and that the assistant answers in speech.
        num: dialogues that `read` gives; without end where it is None.

    Raises:
        AnyglotError: a setting that cannot be.
    """

    name = "nanoworld-grammar"

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        *,
        phrasings: str | None = None,
        max_rounds: int = 4,
        speech: float = 0.5,
        num: int | None = None,
    ) -> None:
        phrasings = phrasings or split
        if {split, phrasings} - {"train", "test"}:
            raise AnyglotError(f"split {split!r}, phrasings {phrasings!r}; use 'train' or 'test'")
        if max_rounds < 1 or not 0 <= speech <= 1:
            raise AnyglotError(f"max_rounds {max_rounds}, speech {speech}; use 1 or more rounds, speech of 0 to 1")
        self.split: Split = "train" if split == "train" else "test"
        self.seed, self.phrasings, self.max_rounds, self.speech = seed, phrasings, max_rounds, speech
        self.num = num

    def config(self) -> Json:
        """JSON of all that changes what is written."""
        return {"writer": "grammar", "version": VERSION, **vars(self)}

    def dialogue(self, index: int) -> Dialogue:
        """Dialogue number `index`, from 0."""
        rng = rng_of(self.seed, "grammar", self.split, self.phrasings, index)
        user, assistant = (SPEECH if chance < self.speech else TEXT for chance in rng.random(2))
        rounds = 1 + int(rng.integers(self.max_rounds))
        talk = _Talk(rng, self.split, self.phrasings, user, assistant)
        acts = [talk.pick(list(OPENINGS))]
        OPENINGS[acts[0]](talk)
        while len(acts) < rounds and acts[0] != "compare":  # of two pictures: there is no one scene to go on about
            acts.append(talk.pick([act for act in FOLLOWING if _fits(talk, act, acts[-1])]))
            FOLLOWING[acts[-1]](talk)
        meta: Json = {"writer": "grammar", "split": self.split, "phrasings": self.phrasings, "seed": self.seed}
        meta |= {"index": index, "acts": acts, "truth": talk.truth}
        return Dialogue(tuple(talk.turns), "nanoworld-grammar", "CC0-1.0", "nanoworld-chat", meta=meta)

    def dialogues(self, num: int | None = None, start: int = 0) -> Iterator[Dialogue]:
        """Dialogues from `start` on; without end where `num` is None."""
        numbers = count(start) if num is None else range(start, start + num)
        return map(self.dialogue, numbers)

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """As a source of a pipeline. Nothing is put into the store: media come later."""
        return self.dialogues(self.num)
