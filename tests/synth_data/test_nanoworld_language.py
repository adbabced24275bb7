"""Sentences: every description is inverted, every question and edit is true."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.nanoworld import language
from anyglot_synth.nanoworld.scene import HELD_OUT, Scene, Thing, sample_scene

seeds = st.integers(0, 2**32 - 1)
styles = st.sampled_from(["text", "spoken"])
RED_AND_BLUE = Scene(
    (Thing("circle", "red", "large", "top", "left"), Thing("square", "blue", "small", "bottom", "right"))
)


@given(seeds, styles)
def test_parse_inverts_describe(seed: int, style: language.Style) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, "test" if seed % 2 else "train")
    text = language.describe(scene, rng, style)
    assert language.parse(text) == scene
    assert language.parse(text.upper().replace("CENTER", "CENTRE")) == scene
    assert language.parse(" ".join(language.words(text))) == scene
    assert language.parse(language.describe(scene, None, style)) == scene


@given(seeds)
def test_spoken_words_are_a_closed_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    assert set(language.words(language.describe(scene, rng, "spoken"))) <= set(language.WORDS)
    assert set(language.spoken_clauses(scene, rng)) <= set(language.all_spoken_clauses())


def test_all_spoken_clauses_differ() -> None:
    clauses = language.all_spoken_clauses()
    assert len(clauses) == len(set(clauses)) == 864


def test_descriptions_vary() -> None:
    texts = {language.describe(RED_AND_BLUE, np.random.default_rng(seed)) for seed in range(300)}
    assert len(texts) >= 25


@pytest.mark.parametrize(
    "text",
    [
        "large red circle top left small blue square bottom right",
        "top left large red circle small blue square bottom right",
        "A big, red circle in the upper left corner; and there is a little blue square at the lower right.",
        "i see a red large circle at the left top and a small square blue at the bottom right",
    ],
)
def test_parse_is_tolerant(text: str) -> None:
    assert language.parse(text) == RED_AND_BLUE


def test_the_middle_place_has_short_names() -> None:
    scene = Scene((Thing("cross", "white", "small", "middle", "center"),))
    for place in ("middle center", "center", "the Centre", "middle"):
        assert language.parse(f"a small white cross in the {place}") == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "red",
        "large red circle",
        "large red top left",
        "where is the large red circle?",
        "make the large red circle at the top left blue",
        "move the large red circle to the top left",
        "large large red circle top left",
        "large red circle top",
        "large red circle top left small blue square top left",
        "large red circle top left small blue square",
        "large red circle small blue square top left top right extra",
        " ".join(f"large red circle {place}" for place in ("top left", "top right", "bottom left", "bottom right")),
    ],
)
def test_other_texts_are_no_description(text: str) -> None:
    assert language.parse(text) is None


@given(st.text(max_size=60))
def test_parse_never_fails(text: str) -> None:
    language.parse(text)


@given(st.lists(st.sampled_from(language.WORDS), max_size=16))
def test_parse_never_fails_on_known_words(found: list[str]) -> None:
    scene = language.parse(" ".join(found))
    assert scene is None or len(found) in range(4 * len(scene), 5 * len(scene) + 1)


def test_known_questions() -> None:
    asked = dict(language.questions(RED_AND_BLUE))
    assert asked["what color is the square?"] == "blue"
    assert asked["where is the large circle?"] == "top left"
    assert asked["how many things are there?"] == "two"
    assert asked["what is at the bottom right?"] == "small blue square"
    assert "what color is the red circle?" not in asked


@given(seeds)
def test_questions_have_one_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    pairs = language.questions(scene)
    assert len(dict(pairs)) == len({*pairs})
    text, reply = language.question(scene, rng)
    assert language.answer(scene, text.upper()) == reply
    assert language.parse(text) is None


def test_ambiguous_references_are_not_used() -> None:
    scene = Scene((Thing("circle", "red", "large", "top", "left"), Thing("circle", "blue", "large", "top", "right")))
    asked = dict(language.questions(scene))
    assert "where is the circle?" not in asked and "where is the large circle?" not in asked
    assert asked["where is the blue circle?"] == "top right"
    assert language.answer(scene, "where is the circle?") is None
    assert language.apply_edit(scene, "remove the circle") is None


def shared(scene: Scene, question: str) -> tuple[int, int]:
    """How many attributes a question of presence names, and how many of them the thing that fits best has."""
    said = set(language.words(question)) - {"is", "there", "a", "thing"}
    return len(said), max(len(said & {t.size, t.color, t.shape}) for t in scene.things)


@given(seeds)
def test_presence_is_true_and_absence_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, "test" if seed % 2 else "train")
    for hard in (False, True):
        question, reply = language.presence(scene, rng, True, hard)
        named, found = shared(scene, question)
        assert reply == "yes" and found == named >= 1 + hard
        question, reply = language.presence(scene, rng, False, hard)
        named, found = shared(scene, question)
        assert reply == "no" and found < named
        if hard:
            assert found == named - 1 >= 1, "one attribute differs from a thing that is there"


@given(seeds)
def test_training_scenes_do_not_tell_what_is_held_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, "train")
    for present in (False, True):
        said = language.words(language.presence(scene, rng, present, hard=bool(seed % 2))[0])[3:]
        assert len(said) < 3 or (said[2], said[1], said[0]) not in HELD_OUT


@pytest.mark.parametrize("hard", [False, True])
def test_what_a_question_names_does_not_tell_the_answer(hard: bool) -> None:
    rng = np.random.default_rng(0)
    counts = {}
    for present in (True, False):
        asked = [language.presence(sample_scene(rng), rng, present, hard)[0] for _ in range(3000)]
        kinds = [tuple(language._KINDS.get(w, w) for w in language.words(q)[3:]) for q in asked]
        counts[present] = {kind: kinds.count(kind) / len(kinds) for kind in kinds}
    assert counts[True].keys() == counts[False].keys() and len(counts[True]) == (4 if hard else 7)
    assert all(abs(counts[True][kind] - counts[False][kind]) < 0.04 for kind in counts[True])


@pytest.mark.parametrize("hard", [False, True])
def test_questions_of_presence_cannot_be_answered_without_looking(hard: bool) -> None:
    rng = np.random.default_rng(1)
    asked = [language.presence(sample_scene(rng), rng, i % 2 == 0, hard) for i in range(6000)]
    answers: dict[str, list[str]] = {}
    for question, reply in asked[:4000]:
        answers.setdefault(question, []).append(reply)
    usual = {question: max(("yes", "no"), key=found.count) for question, found in answers.items()}
    assert np.mean([usual.get(question) == reply for question, reply in asked[4000:]]) < 0.57


def test_same_answer() -> None:
    assert language.same_answer("Top left.", "at the left top")
    assert language.same_answer("2", "two")
    assert language.same_answer("a small blue square", "small blue square")
    assert language.same_answer("middle centre", "middle center")
    assert not language.same_answer("top left", "top")
    assert not language.same_answer("red", "blue")
    assert not language.same_answer("", "the")


def test_known_edits() -> None:
    changed = language.apply_edit(RED_AND_BLUE, "Make the square green")
    assert changed is not None and changed.things[1].color == "green"
    removed = language.apply_edit(RED_AND_BLUE, "remove the red circle")
    assert removed == Scene(RED_AND_BLUE.things[1:])
    moved = language.apply_edit(RED_AND_BLUE, "move the circle to the middle center")
    assert moved is not None and moved.things[0].place == ("middle", "center")
    added = language.apply_edit(RED_AND_BLUE, "add a small white cross at the top right")
    assert added is not None and len(added) == 3
    assert language.apply_edit(RED_AND_BLUE, "paint it black") is None


@given(seeds)
def test_edits_change_one_thing_and_stay_in_the_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    text, changed = language.edit(scene, rng)
    assert changed != scene and not changed.has_held_out
    assert language.apply_edit(scene, text) == changed
    assert len(set(scene.things) ^ set(changed.things)) <= 2


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="style is 'sung'"):
        language.describe(RED_AND_BLUE, None, "sung")  # type: ignore[arg-type]


def test_things_that_look_alike_can_be_edited_by_place() -> None:
    things = tuple(Thing("circle", "blue", "small", "top", column) for column in ("left", "center", "right"))
    made = language.edits(Scene(things))
    assert any(text == "make the thing at the top left large" for text, _ in made)
    assert all(len(result) in (2, 3) for _, result in made)
