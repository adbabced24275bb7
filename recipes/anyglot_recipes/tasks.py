"""Nanoworld's tasks: which media a sample gives, which it asks for, and how the answer is graded.

`Item` is one record with its media as codes; `samples` turns an item into training `Sample`s of every task: the 12
ordered pairs of text, image, speech and music, and three that combine inputs. The same functions build evaluation
prompts. Nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from anyglot_lm.segments import Role, Sample, Segment
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import Scene

MODALITIES = ("text", "image", "speech", "music")
PAIRS: tuple[str, ...] = tuple(f"{a}->{b}" for a, b in permutations(MODALITIES, 2))
COMBINED: tuple[str, ...] = ("image+speech->speech", "speech->image+speech", "text+image->image")
TASKS: tuple[str, ...] = PAIRS + COMBINED
SPOKEN = "image+speech->speech"
"""A spoken question about a picture, answered directly."""
CHAINED = "image+speech->text+text+speech"
"""The same by way of text (`grammar.CHAIN`): the question in writing, the answer in writing, the answer spoken."""


@dataclass
class Item:
    """A record with its media as codes int64[K, *grid].

    `codes` has "image", "speech" (any user's voice), "reply" (the assistant's voice, what speech targets are made of)
    and "music" of the scene. The combined tasks need more: a spoken question and its spoken answer, and an edit with
    the codes of the edited picture.
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


def split_task(task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`"text+image->speech"` -> (("text", "image"), ("speech",))."""
    source, _, target = task.partition("->")
    return tuple(source.split("+")), tuple(target.split("+"))


def _given(item: Item, modality: str, rng: np.random.Generator | None) -> str | np.ndarray:
    return describe(item.scene, rng) if modality == "text" else item.codes[modality]


def _asked(item: Item, modality: str, rng: np.random.Generator | None) -> str | np.ndarray:
    return item.codes["reply"] if modality == "speech" else _given(item, modality, rng)


def sample(item: Item, task: str, rng: np.random.Generator | None = None) -> Sample:
    """The sample of `task` for one item: user segments without loss, assistant segments with.

    Args:
        item: record with codes.
        task: one of `TASKS`, or `CHAINED` (template version 2).
        rng: chooses the wording of written descriptions; None takes the first.
    """
    if task in (SPOKEN, CHAINED):
        given: list[tuple[str, str | np.ndarray | None]] = [
            ("image", item.codes["image"]),
            ("speech", item.question_speech),
        ]
        asked: list[tuple[str, str | np.ndarray | None]] = [("speech", item.answer_speech)]
        if task == CHAINED:
            asked = [("text", item.question), ("text", item.answer), *asked]
    elif task == "text+image->image":
        given = [("text", item.instruction), ("image", item.codes["image"])]
        asked = [("image", item.edited_image)]
    else:
        sources, targets = split_task(task)
        given = [(m, _given(item, m, rng)) for m in sources]
        asked = [(m, _asked(item, m, rng)) for m in targets]
    segments = []
    turns: tuple[tuple[Role, list[tuple[str, str | np.ndarray | None]]], ...] = (("user", given), ("assistant", asked))
    for role, parts in turns:
        for modality, content in parts:
            assert content is not None, f"{task} needs {modality}, which this item lacks"
            segments.append(Segment(modality, content, role, loss=role == "assistant"))
    return Sample(segments)


def prompt(item: Item, task: str, rng: np.random.Generator | None = None) -> Sample:
    """The user side of `sample`."""
    return Sample([s for s in sample(item, task, rng).segments if s.role == "user"])
