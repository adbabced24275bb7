"""Grades: the truth scores 1 with the real checkers, chance is the score of another answer, nothing scores 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes import nano
from anyglot_recipes.evaluate import Checkers, Graded, chance, evaluate, grade, truth
from anyglot_recipes.nano import ASSISTANT_VOICE
from anyglot_recipes.tasks import PAIRS, TASKS, Item, split_task
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe, edit, question
from anyglot_synth.nanoworld.melody import render
from anyglot_synth.nanoworld.scene import Scene, Thing, sample_scene
from anyglot_synth.nanoworld.voices import SpeechCache, installed_voices

needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)


@dataclass
class Truths:
    """Items and their perfect answers."""

    items: list[Item]
    pictures: list[np.ndarray]
    edited: list[np.ndarray]
    speech: list[np.ndarray]
    answers: list[np.ndarray]
    music: list[np.ndarray]


@pytest.fixture(scope="module")
def checkers() -> Checkers:
    return Checkers()


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    rng = np.random.default_rng(0)
    cache = SpeechCache(tmp_path_factory.mktemp("voices"))
    found = Truths([], [], [], [], [], [])
    for _ in range(12):
        scene = sample_scene(rng, "test")
        asked, answer = question(scene, rng)
        instruction, edited = edit(scene, rng)
        found.items.append(Item(scene, describe(scene, rng), {}, asked, answer, instruction=instruction, edited=edited))
        found.pictures.append(draw(scene, rng))
        found.edited.append(draw(edited, rng))
        found.music.append(render(scene, rng))
        if ASSISTANT_VOICE in {v.name for v in installed_voices()}:
            found.speech.append(cache.say(describe(scene, rng, style="spoken"), ASSISTANT_VOICE))
            found.answers.append(cache.say(answer, ASSISTANT_VOICE))
    return found


def picture(pixels: np.ndarray) -> Output:
    return Output("image", media=torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def sound(modality: str, audio: np.ndarray) -> Output:
    return Output(modality, media=torch.from_numpy(audio)[None])


def mean(graded: list[Graded]) -> float:
    return float(np.mean([g.score for g in graded]))


def test_true_text_scores_1(truths: Truths, checkers: Checkers) -> None:
    outputs = [[Output("text", text=item.text)] for item in truths.items]
    graded = grade(truths.items, "image->text", outputs, checkers)
    assert mean(graded) == 1
    assert [g.heard for g in graded] == [[item.text] for item in truths.items]


def test_true_pictures_score_1(truths: Truths, checkers: Checkers) -> None:
    assert mean(grade(truths.items, "text->image", [[picture(p)] for p in truths.pictures], checkers)) == 1
    edited = grade(truths.items, "text+image->image", [[picture(p)] for p in truths.edited], checkers)
    assert mean(edited) == 1
    assert mean(grade(truths.items, "text+image->image", [[picture(p)] for p in truths.pictures], checkers)) < 1


def test_true_melodies_score_1(truths: Truths, checkers: Checkers) -> None:
    outputs = [[sound("music", m)] for m in truths.music]
    assert mean(grade(truths.items, "speech->music", outputs, checkers)) > 0.98


@needs_voices
def test_true_speech_scores_1(truths: Truths, checkers: Checkers) -> None:
    outputs = [[sound("speech", s)] for s in truths.speech]
    assert mean(grade(truths.items, "text->speech", outputs, checkers)) > 0.95
    answers = [[sound("speech", a)] for a in truths.answers]
    assert mean(grade(truths.items, "image+speech->speech", answers, checkers)) > 0.9
    both = [[picture(p), *s] for p, s in zip(truths.pictures, outputs, strict=True)]
    graded = grade(truths.items, "speech->image+speech", both, checkers)
    assert mean(graded) > 0.95 and all(len(g.heard) == 2 for g in graded)
    half = grade(truths.items, "speech->image+speech", outputs, checkers)
    assert all(0 < g.score <= 0.5 for g in half), "the picture is missing"


@pytest.mark.parametrize("task", TASKS)
def test_nothing_scores_0(truths: Truths, checkers: Checkers, task: str) -> None:
    empty = [Output(m, text="" if m == "text" else None) for m in split_task(task)[1]]
    silent = [Output(m, text="", media=torch.zeros(1, 0)) for m in split_task(task)[1] if m in ("text", "speech")]
    outputs = ([[], empty, silent] * len(truths.items))[: len(truths.items)]
    assert [g.score for g in grade(truths.items, task, outputs, checkers)] == [0.0] * len(truths.items)


def test_chance_by_hand() -> None:
    a = Thing("circle", "red", "large", "top", "left")
    b = replace(a, color="blue")
    c = Thing("square", "green", "small", "bottom", "right")
    d = replace(c, shape="cross", color="white")
    items = [
        Item(Scene((a,)), "", {}, answer="red", edited=Scene((c,))),
        Item(Scene((b,)), "", {}, answer="the red one", edited=Scene((c,))),
        Item(Scene((c,)), "", {}, answer="two", edited=Scene((d,))),
    ]
    # a-b share 3 of 4 attributes, c shares none with either: six ordered pairs.
    assert chance(items, "text->image") == pytest.approx(2 * 0.75 / 6)
    # Edited: c-c is whole, c-d shares size and place.
    assert chance(items, "text+image->image") == pytest.approx((2 * 1 + 4 * 0.5) / 6)
    assert truth(items[0], "text+image->image") == Scene((c,)) and truth(items[0], "text->image") == Scene((a,))
    assert truth(items[0], "image+text->image") == Scene((c,))
    assert chance(items[:1], "text->image") == 0


def test_chance_of_answers() -> None:
    scene = Scene((Thing("circle", "red", "large", "top", "left"),))
    items = [Item(scene, "", {}, answer=answer) for answer in ("red", "Red.", "two")]
    assert chance(items, "image+speech->speech") == pytest.approx(2 / 6)


@needs_voices
def test_the_whole_benchmark_with_an_untrained_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkers: Checkers, tiny_model: UnifiedModel
) -> None:
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path))
    items = nano.test_items(tiny_model, 2)
    kept: list[Graded] = []
    lines: list[str] = []
    report = evaluate(tiny_model, items, checkers=checkers, keep=kept.extend, progress=lines.append)
    assert [row["task"] for row in report["rows"]] == list(TASKS) and len(lines) == 16 and len(kept) == 32
    for row in report["rows"]:
        assert row["n"] == 2 and all(0 <= row[key] <= 1 for key in ("score", "chance", "ceiling"))
    assert report["mean"] == pytest.approx(
        np.mean([r["score"] for r in report["rows"] if r["task"] in PAIRS]), abs=1e-3
    )
    assert evaluate(tiny_model, items, tasks=["text->image"], checkers=checkers)["rows"] == [report["rows"][0]]
