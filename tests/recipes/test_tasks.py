"""All fifteen tasks: what is given has no loss, what is asked has, and both are what the task's name says."""

from __future__ import annotations

import numpy as np
import pytest

from anyglot_recipes.tasks import COMBINED, PAIRS, TASKS, Item, prompt, sample, split_task
from anyglot_synth.nanoworld.language import parse
from anyglot_synth.nanoworld.scene import Scene, Thing

SCENE = Scene((Thing("circle", "red", "large", "top", "left"),))
EDITED = Scene((Thing("circle", "blue", "large", "top", "left"),))


def codes(value: int, *grid: int) -> np.ndarray:
    return np.full((2, *grid), value)


@pytest.fixture
def item() -> Item:
    return Item(
        scene=SCENE,
        text="a large red circle at the top left",
        codes={"image": codes(1, 4, 4), "speech": codes(2, 9), "reply": codes(3, 8), "music": codes(4, 12)},
        question="what color is the circle?",
        answer="red",
        question_speech=codes(5, 6),
        answer_speech=codes(6, 2),
        instruction="make the circle blue",
        edited=EDITED,
        edited_image=codes(7, 4, 4),
    )


def test_there_are_twelve_pairs_and_three_combinations() -> None:
    assert len(PAIRS) == 12 and len(COMBINED) == 3 and len(set(TASKS)) == 15
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
