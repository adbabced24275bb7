"""Instructions of nanoworld: what counts as a right answer, graded on the data's own answers; and pairs as replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes import instruct_eval, nano_pairs
from anyglot_recipes.cli import main
from anyglot_recipes.evaluate import Checkers
from anyglot_recipes.instruct_eval import (
    WORDS,
    Case,
    chance,
    evaluate_instructions,
    grade,
    interval,
    read_cases,
    right_form,
    true_answers,
)
from anyglot_recipes.shipped import NANO
from anyglot_recipes.tasks import TASKS
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_synth.recipe import build
from anyglot_synth.run import run

needs_voices = pytest.mark.skipif(not installed_voices(), reason="no speech engine (flite, espeak-ng) is here")
SILENT: dict[str, Any] = {
    "name": "nanoworld-chat",
    "seed": 3,
    "source": {"source": "nanoworld-grammar", "split": "test", "speech": 0.0, "max_rounds": 2},
    "stages": [{"stage": "illustrate", "pictures": {"engine": "nanoworld"}, "music": {"engine": "nanoworld"}}],
}
SPOKEN = {"say", "say-it", "draw-and-say"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes by the shipped model of held-out dialogues without a spoken word."""
    root = tmp_path_factory.mktemp("instruct")
    recipe = build(SILENT)
    run(recipe.source, recipe.stages, root / "all", name=recipe.name, num=40)
    lines = (root / "all" / "samples.jsonl").read_text().splitlines()
    silent = [line for line in lines if not SPOKEN & set(json.loads(line)["meta"]["acts"])]
    (root / "all" / "silent.jsonl").write_text("".join(f"{line}\n" for line in silent))
    assert main(["prepare", str(root / "all" / "silent.jsonl"), "--out", str(root / "codes")]) == 0
    return root / "codes"


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return UnifiedModel.from_pretrained(NANO)


@pytest.mark.parametrize(
    ("wanted", "given", "right"),
    [
        (("image",), ("image",), True),
        (("image",), ("text", "image"), True),  # here it is
        (("image",), ("text",), False),
        (("image",), ("image", "music"), False),
        (("speech",), ("text", "speech"), True),
        (("text",), ("text", "speech"), False),
        (("text",), ("text",), True),
        ((WORDS,), ("speech",), True),
        ((WORDS,), ("text", "image"), False),
        (("image", "speech"), ("image",), False),
        (("image",), (), False),
    ],
)
def test_what_counts_as_the_right_form(wanted: tuple[str, ...], given: tuple[str, ...], right: bool) -> None:
    assert right_form(wanted, given) is right


def test_the_answers_of_the_data_are_right_and_those_of_others_are_not(prepared: Path, model: UnifiedModel) -> None:
    cases = read_cases(prepared, 5)
    assert len({case.direction for case in cases}) >= 8
    assert max(sum(c.direction == case.direction for c in cases) for case in cases) <= 5
    answers, checkers = true_answers(model, cases), Checkers()
    scores, good = grade(cases, answers, checkers)
    assert good.all() and scores.mean() > 0.95, list(zip(scores, cases, strict=True))
    for modality in ("text", "image", "music"):
        kinds = ("text", WORDS) if modality == "text" else (modality,)
        own = [i for i, case in enumerate(cases) if case.wanted[0] in kinds]
        assert own
        shifted = [answers[i] for i in own[1:] + own[:1]]
        assert grade([cases[i] for i in own], shifted, checkers)[0].mean() < 0.8 * scores[own].mean()
    silence = [[Output("music", media=torch.zeros(1, 16000))]] * len(cases)
    assert grade(cases, silence, checkers)[0].sum() == 0


def test_prompts_end_where_the_answer_begins(prepared: Path, model: UnifiedModel) -> None:
    for case in read_cases(prepared, 3):
        document, _ = model.template.render(case.sample, model.vocabulary, model.text)
        ids = model.prompt(case.sample)
        assert ids == document[: len(ids)].tolist() and ids[-1] == model.vocabulary.controls["assistant"]
        assert model.vocabulary.controls["assistant"] not in document[len(ids) :]


def test_a_report_of_a_model(
    prepared: Path, model: UnifiedModel, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    words = [str(prepared), "--model", str(NANO), "--num", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["instruct_eval", *words])
    instruct_eval.main()
    rows, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert len(rows) >= 8
    for row in rows:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1 and row["score"] <= row["form"] and row["n"] == 1
        assert row["direction"] in printed
    best = evaluate_instructions(model, read_cases(prepared, 2), ceiling=True)
    assert np.mean([row["form"] for row in best]) == 1


def test_chance_and_intervals() -> None:
    sample: Any = None
    cases = [Case("compare two pictures", sample, (WORDS,), (answer,)) for answer in ("yes", "yes", "no")]
    assert chance(cases) == pytest.approx(1 / 3) and chance(cases[:1]) == 0
    low, high = interval(np.array([0.0, 1.0] * 200))
    assert low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)
    assert interval(np.ones(9)) == (1, 1)


@needs_voices
def test_pairs_for_replay(tiny_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "pairs"), "--num", "3"]
    monkeypatch.setattr("sys.argv", ["nano_pairs", *words])
    nano_pairs.main()
    reader = ShardReader(tmp_path / "pairs")
    tasks = [reader.task_names[task] for task in reader.tasks]
    assert len(tasks) > len(TASKS) and set(tasks) == set(TASKS)
    first = [reader.doc(i)[0].tolist() for i in range(len(reader.tasks))]
    nano_pairs.main()  # again: replaced, by the same
    again = ShardReader(tmp_path / "pairs")
    assert [again.doc(i)[0].tolist() for i in range(len(again.tasks))] == first
