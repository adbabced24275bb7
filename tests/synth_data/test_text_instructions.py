"""Text instructions: right by construction, distinct, from a seed, with their origin."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyglot_synth.llm import Request, Writer
from anyglot_synth.text_instructions import TEMPLATES, instructions, main
from anyglot_tokenizers.errors import AnyglotError


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return instructions(5000)


def test_five_thousand_different_rows_of_every_kind(rows: list[dict[str, Any]]) -> None:
    assert len({(row["instruction"], row["input"]) for row in rows}) == 5000
    kinds = Counter(row["meta"]["kind"] for row in rows)
    assert set(kinds) == set(TEMPLATES)
    assert all(row["meta"]["made_by"] == "template" for row in rows)
    assert all(set(row) == {"instruction", "input", "output", "meta"} for row in rows)
    assert max(len(row["output"].split()) for row in rows) < 30, "short enough to be spoken"


def test_sums_and_stories_are_right(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        said = [int(number) for number in re.findall(r"\d+", row["instruction"])]
        if row["meta"]["kind"] == "sum":
            a, sign, b, result = re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", row["output"]).groups()  # type: ignore[union-attr]
            assert int(result) == (int(a) + int(b) if sign == "plus" else int(a) - int(b))
            assert sorted(said) == sorted([int(a), int(b)])
            checked += 1
        elif row["meta"]["kind"] == "story":
            (result,) = map(int, re.findall(r"\d+", row["output"]))
            assert result == (sum(said) if "more" in row["instruction"] else said[0] - said[1])
            checked += 1
        elif row["meta"]["kind"] == "sort":
            given = row["input"].split(", ")
            assert row["output"].rstrip(".").split(", ") == sorted(given)
            checked += 1
    assert checked > 500


def test_rows_are_a_function_of_the_seed(rows: list[dict[str, Any]]) -> None:
    assert instructions(5000) == rows
    assert instructions(50, seed=1) != instructions(50, seed=2)


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyglot_synth.text_instructions as module

    monkeypatch.setattr(module, "TEMPLATES", {"past": TEMPLATES["past"]})
    with pytest.raises(AnyglotError, match="different instructions, 200 were asked for"):
        instructions(200)


def test_templates_take_any_seed() -> None:
    for make in TEMPLATES.values():
        for seed in range(200):
            instruction, given, output = make(np.random.default_rng(seed))
            assert instruction and output and "{" not in instruction + given + output


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["--out", str(out), "--num", "40"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 40, "by_model": 0, "by_template": 40}
    assert [json.loads(line) for line in out.read_text().splitlines()] == instructions(40)
    assert main(["--out", str(out), "--num", "40", "--written", "3", "--engine", "nothing"]) == 2
    assert "there is no writer 'nothing'" in capsys.readouterr().err
    for wrong, said in (
        (["--out", str(tmp_path)], "is a folder, or in one"),
        (["--out", str(tmp_path / "none" / "rows.jsonl")], "is a folder, or in one"),
        (["--out", str(out), "--num", "-5"], "--num is -5"),
        (["--out", str(out), "--written", "-5"], "--written -5"),
    ):
        assert main(["--written", "3", "--engine", "nothing", *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, "before a writer is looked for"
    with pytest.raises(AnyglotError, match="num is -5"):
        instructions(-5)


class Answers(Writer):
    """Gives answers of SmolLM2-135M in turn, good and bad."""

    name = "answers"
    batch_size = 4
    texts = (
        "People enjoy celebrating their birthday.",
        "1. Take care with the wind, birds can die.",
        "It is all about relaxation and self-care, but also about the potential stress and anxiety that can come wi",
        "I always say, \"Don't forget to wash those clothes.",
        "As an AI language model I have no feelings about it.",
    )

    def __init__(self) -> None:
        self.count = 0

    def identity(self) -> dict[str, Any]:
        return {"engine": self.name}

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        start, self.count = self.count, self.count + len(requests)
        return [self.texts[i % len(self.texts)] for i in range(start, self.count)]


def test_answers_of_a_model_are_marked_and_bad_ones_left_out() -> None:
    rows = instructions(200, writer=Answers(), num_written=20)
    by_model = [row for row in rows if row["meta"]["made_by"] == "language-model"]
    assert {row["output"] for row in by_model} == {Answers.texts[0]}
    assert all(row["meta"]["writer"] == {"engine": "answers"} for row in by_model)
    assert len(by_model) % 3 == 0 and 0 < len(by_model) < 60, "three phrasings of a question have one answer"
    assert len(rows) == 200
