"""All tasks: what is given has no loss, what is asked has, and both are what the task's name says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.segments import Sample
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.nano import ASSISTANT_VOICE, NEVER_HEARD, WorldConfig, guest_voices, make_items, readings
from anyglot_recipes.quiz import QUESTIONS, quiz
from anyglot_recipes.reading import reading_samples
from anyglot_recipes.shots import HELD_OUT, RULES
from anyglot_recipes.tasks import (
    CHAINED,
    CHAT,
    COMBINED,
    EXTRA,
    PAIRS,
    QUIZ,
    SHOTS,
    TASKS,
    THROUGH,
    TURNED,
    WRITTEN,
    Item,
    prompt,
    right_words,
    sample,
    split_task,
)
from anyglot_synth.nanoworld.language import answer, parse
from anyglot_synth.nanoworld.scene import Scene, Thing, sample_scene
from anyglot_synth.nanoworld.voices import (
    MORE_ESPEAK_VOICES,
    VOICES,
    SpeechCache,
    default_cache_dir,
    has_espeak,
    has_flite,
    installed_voices,
)

needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
SCENE = Scene((Thing("circle", "red", "large", "top", "left"),))
EDITED = Scene((Thing("circle", "blue", "large", "top", "left"),))


def codes(value: int, *grid: int) -> np.ndarray:
    return np.full((2, *grid), value)


@pytest.fixture
def item() -> Item:
    return Item(
        scene=SCENE,
        text="at the top left, a large red circle",
        codes={"image": codes(1, 4, 4), "speech": codes(2, 9), "reply": codes(3, 8), "music": codes(4, 12)},
        question="what color is the circle?",
        answer="red",
        question_speech=codes(5, 6),
        answer_speech=codes(6, 2),
        instruction="make the circle blue",
        edited=EDITED,
        edited_image=codes(7, 4, 4),
        written_question="is there a blue thing?",
        written_answer="no",
        second_question="where is the circle?",
        second_answer="top left",
        second_question_speech=codes(8, 6),
        second_answer_speech=codes(9, 3),
        shown=[(SCENE.things[0], codes(10 + i, 4, 4)) for i in range(3)],
        rule=("place", "color"),
        reply="top left, large red circle",
        quiz=[("is there a circle?", "yes"), ("what size is the circle?", "large")],
    )


def test_guests_are_no_voice_of_the_world_nor_of_the_benchmark() -> None:
    assert not {*VOICES, NEVER_HEARD} & {*guest_voices()}
    assert {*guest_voices()} <= {*installed_voices(), *MORE_ESPEAK_VOICES}
    assert len(guest_voices()) == (9 if has_flite() and has_espeak() else 0)


def test_the_tasks() -> None:
    assert len(PAIRS) == 12 and len(COMBINED) == 3 and len(set(TASKS)) == 16 and not set(EXTRA) & set(TASKS)
    assert split_task("text+image->speech") == (("text", "image"), ("speech",))


@pytest.mark.parametrize("task", TASKS)
def test_given_has_no_loss_and_asked_has(item: Item, task: str) -> None:
    made = sample(item, task, np.random.default_rng(0))
    given = [s for s in made.segments if s.role == "user"]
    asked = [s for s in made.segments if s.role == "assistant"]
    assert list(made.segments) == [*given, *asked]
    sources, targets = split_task(task)
    assert tuple(s.modality for s in given) == sources and tuple(s.modality for s in asked) == targets
    assert not any(s.loss for s in given) and all(s.loss for s in asked)


@pytest.mark.parametrize("task", [*PAIRS, "speech->image+speech"])
def test_contents_show_the_scene(item: Item, task: str) -> None:
    wanted = {"image": 1, "music": 4}
    for segment in sample(item, task, np.random.default_rng(1)).segments:
        if segment.modality == "text":
            assert isinstance(segment.content, str) and parse(segment.content) == SCENE
            continue
        speech = 2 if segment.role == "user" else 3  # any user's voice, the assistant's own
        assert np.asarray(segment.content).flat[0] == wanted.get(segment.modality, speech)


def test_spoken_question_about_a_picture(item: Item) -> None:
    contents = [np.asarray(s.content).flat[0] for s in sample(item, "image+speech->speech").segments]
    assert contents == [1, 5, 6]


def contents(made: Sample) -> list[object]:
    return [s.content if isinstance(s.content, str) else int(s.content.flat[0]) for s in made.segments]


def test_questions_answered_in_writing(item: Item) -> None:
    assert contents(sample(item, WRITTEN)) == [1, "is there a blue thing?", "no"]
    assert contents(sample(item, CHAINED)) == [1, 5, "what color is the circle?", "red", 6]


def test_what_is_given_can_be_turned(item: Item) -> None:
    assert contents(sample(item, "text+image->text")) == ["is there a blue thing?", 1, "no"]
    assert contents(sample(item, "speech+image->text+text+speech")) == [5, 1, "what color is the circle?", "red", 6]
    for task, usual in TURNED.items():
        a, b, *asked = contents(sample(item, usual))
        assert contents(sample(item, task)) == [b, a, *asked] and contents(prompt(item, task)) == [b, a]
        assert split_task(task) == (split_task(usual)[0][::-1], split_task(usual)[1])


def test_pairs_by_way_of_text(item: Item) -> None:
    assert len(THROUGH) == 6 and not any("text" in pair for pair in THROUGH)
    assert contents(sample(item, THROUGH["image->speech"])) == [1, item.reply, 3]  # what is written is what is said
    given, text, asked = contents(sample(item, THROUGH["speech->music"], np.random.default_rng(0)))
    assert (given, asked) == (2, 4) and isinstance(text, str) and parse(text) == SCENE


def test_longer_forms_are_asked_up_to_the_last_answer(item: Item) -> None:
    assert contents(sample(item, CHAT)) == [1, 5, 6, 8, 9] and contents(prompt(item, CHAT)) == [1, 5, 6, 8]
    said = "top left red"
    assert contents(sample(item, SHOTS)) == [10, said, 11, said, 12, said]
    assert contents(prompt(item, SHOTS)) == [10, said, 11, said, 12]
    quiz = [word for turn in item.quiz for word in turn]
    assert contents(sample(item, QUIZ)) == [1, item.text, *quiz]
    assert contents(prompt(item, QUIZ)) == [1, item.text, *quiz[:-1]]  # a benchmark puts the model's own words there
    learnt = [contents(sample(item, QUIZ, np.random.default_rng(seed))) for seed in range(20)]
    assert {len(made) for made in learnt} == {len(quiz) + 1, len(quiz) + 2}
    assert all(made == [1, *quiz] or made == [1, item.text, *quiz] for made in learnt)
    for task in EXTRA:
        made = sample(item, task).segments
        assert all(s.loss == (s.role == "assistant") for s in made)
        assert made[-1].modality == split_task(task)[1][-1]


def test_the_words_of_an_answer(item: Item) -> None:
    found = {task: right_words(item, task) for task in (*TASKS, *EXTRA)}
    assert {task: said for task, said in found.items() if said is not None} == {
        "image+speech->speech": "red",
        "image+text->text": "no",
        CHAINED: "red",
        CHAT: "top left",
        SHOTS: "top left red",
        QUIZ: "large",
        "text+image->text": "no",
        "speech+image->speech": "red",
        "speech+image->text+text+speech": "red",
    }


@needs_voices
def test_items_have_what_every_task_needs(
    tiny_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path))
    tokenizers, cache = dict(tiny_model.tokenizers), SpeechCache(default_cache_dir())
    items = make_items("train", 8, 3, tokenizers, cache, 1)
    again = make_items("train", 8, 3, tokenizers, cache, 1)
    asked = [(item.written_question, item.written_answer) for item in items if "is there" in item.written_question]
    assert [reply for _, reply in asked] == ["yes", "no"] * 2
    for item, same in zip(items, again, strict=True):
        for task in (*TASKS, *EXTRA):
            assert sample(item, task) == sample(same, task)
        for q, a in ((item.question, item.answer), (item.second_question, item.second_answer)):
            assert answer(item.scene, q) == a
        assert item.question != item.second_question
        assert len(item.shown) == 3 and item.rule in RULES
        assert not any(Scene((thing,)).has_held_out for thing, _ in item.shown)
        assert parse(item.reply) == item.scene
        about = [asked for asked, _ in item.quiz if "is there" not in asked]
        assert all(answer(item.scene, q) == dict(item.quiz)[q] for q in about)
    visited = make_items("train", 8, 3, tokenizers, cache, 1, guests=1.0)
    for item, other in zip(items, visited, strict=True):
        same = [task for task in (*TASKS, *EXTRA) if sample(item, task) == sample(other, task)]
        assert "image->text" in same and ("speech->text" in same) == (not guest_voices())
    for item, other in zip(items, make_items("train", 8, 3, tokenizers, cache, 1, varied=1.0), strict=True):
        said = ("question_speech", "second_question_speech"), ("answer_speech", "second_answer_speech")
        same = [[np.array_equal(getattr(item, n), getattr(other, n)) for n in names] for names in said]
        assert same == [[False, False], [True, True]], "speeds are those of what users say"
        assert sample(item, "text->speech") == sample(other, "text->speech")
        assert sample(item, "speech->text") != sample(other, "speech->text")
    spoiled = make_items("train", 8, 3, tokenizers, cache, 1, spoiled=1.0)
    changed = set()
    for item, other in zip(items, spoiled, strict=True):
        assert {*other.seen} == {"image", "music"} and not item.seen
        for task in (*TASKS, *EXTRA):
            for mine, theirs in zip(sample(item, task).segments, sample(other, task).segments, strict=True):
                if mine != theirs:
                    assert mine.role == "user" and mine.modality != "text", f"{task}: only what users show is spoiled"
                    changed.add((task, mine.modality))
        for name in ("question_speech", "second_question_speech"):
            if not np.array_equal(getattr(item, name), getattr(other, name)):  # a level may leave codes as they are
                changed.add((name, "speech"))
    assert changed >= {
        ("image->text", "image"),
        ("speech->text", "speech"),
        ("music->text", "music"),
        ("text+image->image", "image"),
        ("image+speech->speech", "image"),
        ("quiz", "image"),
        ("question_speech", "speech"),
        ("second_question_speech", "speech"),
    }
    assert not changed & {("shots", "image")}
    quiet, loud = (
        list(readings(WorldConfig(readings=6, varied=0, guests=0, spoiled=share), 3, tokenizers["speech"], cache))
        for share in (0.0, 1.0)
    )
    same = [a == b for a, b in zip(quiet, loud, strict=True)]  # written down and read aloud by turns
    assert not all(same[::2]) and all(same[1::2])
    held_out = make_items("test", 4, 3, tokenizers, cache, 1)
    for item in held_out:
        assert [Scene((thing,)).has_held_out for thing, _ in item.shown] == [False, False, True]
        assert item.rule not in HELD_OUT


@needs_voices
def test_strings_are_read_by_the_assistant_and_varied_where_users_say_them(
    tiny_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path))
    speech, cache = tiny_model.tokenizers["speech"], SpeechCache(default_cache_dir())
    plain, slow = (
        dict(reading_samples(1, 3, speech, cache, VOICES, ASSISTANT_VOICE, vary))
        for vary in (lambda audio: audio, lambda audio: audio.repeat(2))
    )
    assert plain["read aloud"] == slow["read aloud"]
    (heard, text), (slowly, same) = (said["write down"].segments for said in (plain, slow))
    given = str(plain["read aloud"].segments[0].content)  # the first description is given as a sentence
    assert given != text.content and set(re.findall(r"\w+", str(text.content))) <= set(re.findall(r"\w+", given))
    assert text == same and abs(np.shape(slowly.content)[1] - 2 * np.shape(heard.content)[1]) <= 1


def test_edit(item: Item) -> None:
    text, given, asked = sample(item, "text+image->image").segments
    assert text.content == "make the circle blue"
    assert np.asarray(given.content).flat[0] == 1 and np.asarray(asked.content).flat[0] == 7


@pytest.mark.parametrize("task", TASKS)
def test_prompt_is_the_user_side(item: Item, task: str) -> None:
    given = [s for s in sample(item, task).segments if s.role == "user"]
    made = prompt(item, task).segments
    assert [(s.modality, s.role, s.loss) for s in made] == [(s.modality, s.role, s.loss) for s in given]
    assert all(np.array_equal(a.content, b.content) for a, b in zip(made, given, strict=True))


def test_wording_follows_the_generator(item: Item) -> None:
    def wordings(seed: int) -> list[object]:
        rng = np.random.default_rng(seed)
        return [sample(item, "image->text", rng).segments[-1].content for _ in range(10)]

    assert wordings(0) == wordings(0) and len(set(wordings(0))) > 1
    assert sample(item, "image->text").segments[-1].content == sample(item, "image->text").segments[-1].content


def test_a_quiz_is_half_about_presence_and_balanced() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "train") for _ in range(300)]
    quizzes = [quiz(scene, rng) for scene in scenes]
    assert all(len(asked) == len(dict(asked)) == QUESTIONS for asked in quizzes)
    said = [[reply for question, reply in asked if question.startswith("is there a")] for asked in quizzes]
    assert all(sorted(replies) == ["no"] * (QUESTIONS // 4) + ["yes"] * (QUESTIONS // 4) for replies in said)
    for scene in scenes[:50]:
        for question, reply in quiz(scene, rng):
            if question.startswith("is there a"):
                named = {*question.removesuffix("?").split()[3:]} - {"thing"}
                there = [named <= {t.size, t.color, t.shape} for t in scene.things]
                assert (reply == "yes") == any(there), question
    first = [asked[0][0].startswith("is there a") for asked in quizzes]
    assert 0.4 < np.mean(first) < 0.6  # in any order
