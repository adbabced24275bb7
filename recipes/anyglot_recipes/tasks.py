"""Nanoworld's tasks: which media a sample gives, which it asks for, and what the right answer is.

`Item` is one record with its media as codes; `sample` turns an item into a training `Sample` of any task: the 12
ordered pairs of text, image, speech and music, three that combine media, one that asks in words about a picture, and
the longer forms of `EXTRA`. The same functions build evaluation prompts. Nothing here runs a model.

`CHAINS` write down first what they are about to answer (chain of modality, SpeechGPT, arXiv 2305.11000): text is the
modality that all others are paired with most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, permutations

import numpy as np

from anyglot_lm.grammar import TEXT
from anyglot_lm.segments import Role, Sample, Segment
from anyglot_recipes.shots import Picture, Rule, document, say
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import Scene

_Parts = list[tuple[str, str | np.ndarray | None]]
MODALITIES = ("text", "image", "speech", "music")
PAIRS: tuple[str, ...] = tuple(f"{a}->{b}" for a, b in permutations(MODALITIES, 2))
COMBINED: tuple[str, ...] = ("image+speech->speech", "speech->image+speech", "text+image->image")
SPOKEN = "image+speech->speech"
"""A spoken question about a picture, answered directly."""
WRITTEN = "image+text->text"
"""A written question about a picture, half of the time whether something is there, answered in writing."""
TASKS: tuple[str, ...] = (*PAIRS, *COMBINED, WRITTEN)
CHAINED = "image+speech->text+text+speech"
"""`SPOKEN` by way of text (`grammar.CHAIN`): the question in writing, the answer in writing, the answer spoken."""
THROUGH: dict[str, str] = {f"{a}->{b}": f"{a}->{TEXT}+{b}" for a, b in permutations(MODALITIES[1:], 2)}
"""Each pair without text -> the same by way of text: a description, and then what it describes."""
CHAINS: tuple[str, ...] = (CHAINED, *THROUGH.values())
"""Tasks graded by what they end with. `CHAINED` needs version 2 of the template."""
CHAT = "chat"
"""`SPOKEN`, and then a second spoken question about the same picture, answered aloud. The second answer is graded."""
SHOTS = "shots"
"""Pictures with answers by a rule that nothing names, and a last picture (`shots.document`). The last is graded."""
QUIZ = "quiz"
"""A picture, its description, and written questions and answers about it by turns. The last answer is graded. Half of
those to learn from have no description and begin as `WRITTEN` does."""
TURNED: dict[str, str] = {
    "text+image->text": WRITTEN,
    "speech+image->speech": SPOKEN,
    "speech+image->text+text+speech": CHAINED,
    "image+text->image": "text+image->image",
}
"""A task that gives two media the other way round -> the same as it is elsewhere. People do either."""
EXTRA: tuple[str, ...] = (*CHAINS, CHAT, SHOTS, QUIZ, *TURNED)
"""Longer forms, not part of `TASKS`."""


@dataclass
class Item:
    """A record with its media as codes int64[K, *grid].

    `codes` has "image", "speech" (any user's voice), "reply" (the assistant's voice, what speech targets are made of)
    and "music" of the scene; `reply` is what the reply says. `seen` has the picture and the melody as a user shows
    them, where those are not `codes` (what users say is theirs alone, and needs no second place). Other tasks need
    more: a spoken question and its spoken answer, and a second of both; an edit with the codes of the edited picture; a
    written question and its answer; pictures of single things, the last of which is asked about, with the rule of their
    answers; more written questions with their answers.
    """

    scene: Scene
    text: str
    codes: dict[str, np.ndarray]
    question: str = ""
    answer: str = ""
    question_speech: np.ndarray | None = None
    answer_speech: np.ndarray | None = None
    instruction: str = ""
    edited: Scene | None = None
    edited_image: np.ndarray | None = None
    written_question: str = ""
    written_answer: str = ""
    second_question: str = ""
    second_answer: str = ""
    second_question_speech: np.ndarray | None = None
    second_answer_speech: np.ndarray | None = None
    shown: Sequence[Picture] = ()
    rule: Rule = ()
    reply: str = ""
    quiz: Sequence[tuple[str, str]] = ()
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)


def split_task(task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`"text+image->speech"` -> (("text", "image"), ("speech",)). Of longer forms: what a turn gives and asks."""
    source, _, target = {CHAT: SPOKEN, SHOTS: "image->text", QUIZ: WRITTEN}.get(task, task).partition("->")
    return tuple(source.split("+")), tuple(target.split("+"))


def right_words(item: Item, task: str) -> str | None:
    """The words that answer a question; None where the answer is a scene."""
    task = TURNED.get(task, task)
    if task == SHOTS:
        return say(item.shown[-1][0], item.rule)
    if task == QUIZ:
        return item.quiz[-1][1]
    answers = {WRITTEN: item.written_answer, CHAT: item.second_answer}
    return answers.get(task, item.answer if task in (SPOKEN, CHAINED) else None)


def _given(item: Item, modality: str, rng: np.random.Generator | None = None) -> str | np.ndarray:
    if modality == "text":
        return describe(item.scene, rng)
    return item.seen[modality] if modality in item.seen else item.codes[modality]


def _asked(item: Item, modality: str, rng: np.random.Generator | None) -> str | np.ndarray:
    if modality == "text":
        return describe(item.scene, rng)
    return item.codes["reply" if modality == "speech" else modality]


def sample(item: Item, task: str, rng: np.random.Generator | None = None) -> Sample:
    """The sample of `task` for one item: user segments without loss, assistant segments with.

    Args:
        item: record with codes.
        task: one of `TASKS` or `EXTRA`.
        rng: chooses the wording of written descriptions, and whether a quiz has one; None takes the first wording, and
            a quiz then says `item.text`.
    """
    if task in TURNED:
        one, other, *rest = sample(item, TURNED[task], rng).segments
        return Sample([other, one, *rest])
    if task == SHOTS:
        return document(item.shown, item.rule)
    if task == CHAT:
        second = _turn(task, [("speech", item.second_question_speech)], [("speech", item.second_answer_speech)])
        return Sample([*sample(item, SPOKEN).segments, *second])
    if task == QUIZ:
        turns = [_turn(task, [("text", question)], [("text", reply)]) for question, reply in item.quiz]
        said: _Parts = [("text", item.text)] if rng is None or rng.integers(2) else []
        return Sample([*_turn(task, [("image", _given(item, "image"))], said), *chain.from_iterable(turns)])
    given: _Parts = [("image", _given(item, "image"))]
    if task == WRITTEN:
        given.append(("text", item.written_question))
        asked: _Parts = [("text", item.written_answer)]
    elif task in (SPOKEN, CHAINED):
        given.append(("speech", item.question_speech))
        asked = [("text", item.question), ("text", item.answer)] if task == CHAINED else []
        asked.append(("speech", item.answer_speech))
    elif task == "text+image->image":
        given = [("text", item.instruction), *given]
        asked = [("image", item.edited_image)]
    else:
        sources, targets = split_task(task)
        given = [(m, _given(item, m, rng)) for m in sources]
        asked = [(m, _asked(item, m, rng)) for m in targets]
        if targets == (TEXT, "speech"):
            asked[0] = (TEXT, item.reply)
    return Sample(_turn(task, given, asked))


def _turn(task: str, given: _Parts, asked: _Parts) -> list[Segment]:
    segments = []
    turns: tuple[tuple[Role, _Parts], ...] = (("user", given), ("assistant", asked))
    for role, parts in turns:
        for modality, content in parts:
            assert content is not None, f"{task} needs {modality}, which this item lacks"
            segments.append(Segment(modality, content, role, loss=role == "assistant"))
    return segments


def prompt(item: Item, task: str, rng: np.random.Generator | None = None) -> Sample:
    """`sample` without what the assistant says last."""
    segments = list(sample(item, task, rng).segments)
    while segments[-1].role == "assistant":
        segments.pop()
    return Sample(segments)
