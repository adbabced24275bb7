"""Rows of `anyglot eval data`: what each metric says of the outputs, with chance and ceiling.

A row has the value with its 95 % bootstrap interval over items, `chance` (the model's own outputs, each given to other
items that have no right answer in common with its own: what outputs are worth that ignore the input; exact where it is
known) and, where one exists, `ceiling` (the right answers through the tokenizer, or one reference against the others).
An answer that is missing counts as wrong; an item without what a metric compares with has no value and is not in `n`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, stack

from anyglot_recipes.data_eval.evidence import Evidence, Side
from anyglot_recipes.data_eval.items import TEXT, Task
from anyglot_recipes.metrics.captions import CiderD, same_words
from anyglot_recipes.metrics.joint import clip_score, cosine
from anyglot_recipes.metrics.joint import retrieval as first_of
from anyglot_recipes.metrics.speech import error_rate
from anyglot_tokenizers.metrics import interval

T = TypeVar("T")
Score = tuple[float, float]
"""A value and its weight."""
Rate = Callable[[str], int | None]
"""Modality -> Hz of its sounds, None of pictures and text."""
CLIP, CLAP = "clip", "clap"
SIDES: tuple[Side, Side, Side] = ("output", "original", "rebuilt")


def medium_of(task: Task, rate: Rate, space: str) -> str | None:
    """The medium that CLIP or CLAP compares with text: what is asked for, or of what is given if that is text."""
    names = task.given if task.asked == TEXT else (task.asked,)
    return next((m for m in names if m != TEXT and (rate(m) is not None) == (space == CLAP)), None)


@dataclass
class Result:
    """One row: a value for each item (None where it cannot be measured), and what the mean is to be seen beside.

    `details` are more facts of each item, by name.
    """

    name: str
    better: str
    scores: list[Score | None]
    missing: int = 0
    chance: float | None = None
    ceiling: float | None = None
    note: str = ""
    details: dict[str, list[Any]] = field(default_factory=dict)

    def row(self) -> dict[str, str | int | float | None]:
        """JSON-able form."""
        known = _known(self.scores)
        value, low, high = interval([v for v, _ in known], [w for _, w in known]) if known else (None, None, None)
        if len(known) < 2:
            low = high = None
        numbers = {"value": value, "low": low, "high": high, "chance": self.chance, "ceiling": self.ceiling}
        shown = {name: None if number is None else round(number, 4) for name, number in numbers.items()}
        row: dict[str, str | int | float | None] = {"metric": self.name, "better": self.better, "n": len(known)}
        return row | {"missing": self.missing, **shown, "note": self.note}


def _known(scores: Sequence[Score | None]) -> list[Score]:
    return [score for score in scores if score is not None and score[1] > 0]


def mean(scores: Sequence[Score | None]) -> float | None:
    """The weighted mean of what is known."""
    known = _known(scores)
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None


def compared(
    evidence: Evidence,
    name: str,
    better: str,
    answers: Sequence[T | None],
    compare: Callable[[T, int], Score | None],
    *,
    wrong: Callable[[int], Score | None],
    ceiling: Sequence[T | None] | None = None,
    note: str = "",
) -> Result:
    """The result of a metric that compares each answer with its item.

    Args:
        evidence: items and, for each, others.
        name, better, note: of the row.
        answers: something for each item, None where it is missing.
        compare: answer and item to a score; None where the item has nothing to compare with.
        wrong: the score of a missing answer.
        ceiling: what stands for perfect answers.
    """

    def score(answer: T | None, i: int) -> Score | None:
        return wrong(i) if answer is None else compare(answer, i)

    scores = [score(answer, i) for i, answer in enumerate(answers)]
    shuffled = [score(answers[j], i) for i, others in enumerate(evidence.others) for j in others]
    best = None if ceiling is None else mean([compare(a, i) for i, a in enumerate(ceiling) if a is not None])
    missing = sum(answer is None for answer, value in zip(answers, scores, strict=True) if value and value[1] > 0)
    return Result(name, better, scores, missing, mean(shuffled), best, note)


# Text


def exact(evidence: Evidence) -> list[Result]:
    """The very words of a reference."""

    def compare(text: str, i: int) -> Score | None:
        references = evidence.items[i].texts()
        return (float(same_words(text, references)), 1.0) if references else None

    def nothing_right(i: int) -> Score | None:
        return (0.0, 1.0) if evidence.items[i].texts() else None

    note = "the same words as a reference; case and marks do not count"
    return [compared(evidence, "exact", "higher", evidence.texts, compare, wrong=nothing_right, note=note)]


def cider(evidence: Evidence) -> list[Result]:
    """CIDEr-D of captions."""
    places = {i: place for place, i in enumerate(i for i, item in enumerate(evidence.items) if item.texts())}
    measure = CiderD([evidence.items[i].texts() for i in places])

    def compare(text: str, i: int) -> Score | None:
        return (measure.score(text, places[i]), 1.0) if i in places else None

    fewest = min(len(evidence.items[i].texts()) for i in places)
    note = f"CIDEr-D, 0 to 10 (papers print it times 100), {len(places)} items of {fewest} references or more"
    result = compared(evidence, "cider", "higher", evidence.texts, compare, wrong=lambda i: compare("", i), note=note)
    each = [
        (measure.score(text, places[i], without=number), 1.0)
        for i in places
        if len(texts := evidence.items[i].texts()) > 1
        for number, text in enumerate(texts)
    ]
    result.ceiling = mean(each)
    return [result]


def error_rates(evidence: Evidence, *, letters: bool) -> list[Result]:
    """Word or letter error rate of what was written, or of what the recogniser hears in what was said."""
    judges, items, name = evidence.judges, evidence.items, "cer" if letters else "wer"

    def compare(heard: str, i: int) -> Score | None:
        references = items[i].texts()
        return error_rate(heard, references, letters=letters, language=judges.language) if references else None

    note = f"{'letters' if letters else 'words'}: all errors over all of the references; language {judges.language}"
    if evidence.task.asked == TEXT:
        return [compared(evidence, name, "lower", evidence.texts, compare, wrong=lambda i: compare("", i), note=note)]
    assert judges.recogniser is not None
    heard, rebuilt = evidence.transcripts("output"), evidence.transcripts("rebuilt")
    note = f"{note}; heard by {judges.recogniser.name}"
    result = compared(
        evidence, name, "lower", heard, compare, wrong=lambda i: compare("", i), ceiling=rebuilt, note=note
    )
    result.details["heard"] = list(heard)
    return [result]


# Media


def _joint(evidence: Evidence, space: str) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Vectors of the answers, of what they are compared with, and of right answers."""
    judge = evidence.judges.clip if space == CLIP else evidence.judges.clap
    medium = medium_of(evidence.task, evidence.rate, space)
    assert judge is not None and medium is not None
    asked, other = (TEXT, medium) if evidence.task.asked == TEXT else (medium, TEXT)
    return (
        evidence.vectors(judge, asked, "output"),
        evidence.vectors(judge, other, "original"),
        evidence.vectors(judge, asked, "rebuilt"),
    )


def clip(evidence: Evidence) -> list[Result]:
    """CLIPScore of picture and text."""
    note = "2.5 x max(cosine, 0) of picture and text"
    outputs, others, right = _joint(evidence, CLIP)
    return [_against(evidence, "clip", clip_score, outputs, others, right, note)]


def clap(evidence: Evidence) -> list[Result]:
    """Cosine of sound and text in CLAP's space."""
    outputs, others, right = _joint(evidence, CLAP)
    return [_against(evidence, "clap", cosine, outputs, others, right, "cosine of sound and text")]


def clip_image(evidence: Evidence) -> list[Result]:
    """Cosine of CLIP's vectors of a drawn picture and the item's own."""
    judge, asked = evidence.judges.clip, evidence.task.asked
    assert judge is not None
    drawn, own, rebuilt = (evidence.vectors(judge, asked, side) for side in SIDES)
    return [_against(evidence, "clip_image", cosine, drawn, own, rebuilt, "cosine of the drawn and the true picture")]


def speaker(evidence: Evidence) -> list[Result]:
    """Cosine of the voices of what was said and of the item's own speech."""
    said, own, rebuilt = (evidence.voices(side) for side in SIDES)
    return [_against(evidence, "speaker", cosine, said, own, rebuilt, "cosine of the voice and the item's own")]


def retrieval(evidence: Evidence) -> list[Result]:
    """Whether the answer finds its own item among all of them, in CLIP's or CLAP's space."""
    space = CLIP if medium_of(evidence.task, evidence.rate, CLIP) else CLAP
    outputs, others, right = _joint(evidence, space)
    there = [i for i, other in enumerate(others) if other is not None]
    keys_ND = stack([other for other in others if other is not None])
    items = evidence.items
    own = {i: np.array([i == j or bool(items[i].keys & items[j].keys) for j in there]) for i in there}

    def compare(vector: Tensor, i: int) -> Score | None:
        return (first_of(vector, keys_ND, own[i]), 1.0) if i in own else None

    def wrong(i: int) -> Score | None:
        return (0.0, 1.0) if i in own else None

    note = f"R@1 among {len(there)} items, by {space.upper()}"
    result = compared(evidence, "retrieval", "higher", outputs, compare, wrong=wrong, ceiling=right, note=note)
    result.chance = float(np.mean([right_N.mean() for right_N in own.values()]))
    return [result]


def _against(
    evidence: Evidence,
    name: str,
    alike: Callable[[Tensor, Tensor], float],
    outputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    note: str,
) -> Result:
    """Each answer's vector against another one of its item."""

    def compare(vector: Tensor, i: int) -> Score | None:
        other = others[i]
        return None if other is None else (alike(vector, other), 1.0)

    def wrong(i: int) -> Score | None:
        return None if others[i] is None else (0.0, 1.0)

    return compared(evidence, name, "higher", outputs, compare, wrong=wrong, ceiling=right, note=note)
