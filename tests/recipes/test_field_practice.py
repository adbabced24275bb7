"""Practice of the field model: its own best answers are trained on beside what was recorded, and read better after."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import field_eval
from anyglot_recipes.chain import LMConfig, Run, seed_of, write_shards
from anyglot_recipes.field import WEIGHTS, WORDS, sign
from anyglot_recipes.field_practice import OWN, PracticeConfig, answers, practise, shared
from anyglot_tokenizers.errors import ManifestError

LM = LMConfig(hidden_size=32, num_layers=1, num_heads=2, seq_len=128, batch_size=4, compile=False, precision="32-true")


def test_answers_are_the_best_to_every_word_in_every_medium(
    field_model: UnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field_eval, "CANDIDATES", 2)
    made = list(answers(field_model, 2, 5))
    assert Counter(task for task, _ in made) == dict.fromkeys(
        (f"{task}{OWN}" for task in ("text->photo", "text->speech", "text->music")), 2 * len(WORDS)
    )
    asked = [str(sample.segments[0].content) for _, sample in made]
    assert asked == [f"{verb} {word}" for verb in ("sign", "say", "play") for word in WORDS for _ in range(2)]
    for (task, sample), prompt in zip(made, asked, strict=True):
        given, answer = sample.segments
        assert (given.role, answer.role) == ("user", "assistant") and answer.loss
        assert answer.modality == {"sign": "image", "say": "speech", "play": "music"}[prompt.split()[0]], task
    drawn = [sample for task, sample in made if task == f"text->photo{OWN}"]
    prompts, words = [sign(word) for word in WORDS for _ in range(2)], [word for word in WORDS for _ in range(2)]
    best = field_eval.best_answers(field_model, prompts, "image", 5, words)
    for sample, (output,) in zip(drawn, best, strict=True):
        assert output.codes is not None
        np.testing.assert_array_equal(np.asarray(sample.segments[1].content), output.codes.numpy())
    assert len({np.asarray(sample.segments[1].content).tobytes() for sample in drawn}) > len(drawn) // 2


def test_weights_of_tasks_are_kept() -> None:
    found = shared(WEIGHTS, 0.25)
    assert sum(found.values()) == pytest.approx(sum(WEIGHTS.values()))
    assert found[f"text->photo{OWN}"] == pytest.approx(0.25 * WEIGHTS["text->photo"])
    assert found["text->photo"] == pytest.approx(0.75 * WEIGHTS["text->photo"])
    assert found["speech->text"] == WEIGHTS["speech->text"]


def test_the_model_is_trained_on_by_its_answers(
    field_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it starts from, and not from nothing; begun again it continues; its own answers become likelier."""
    monkeypatch.setattr(field_eval, "CANDIDATES", 2)
    before = {name: tensor.clone() for name, tensor in field_model.model.state_dict().items()}
    folder, shards = tmp_path / "model", tmp_path / "shards"
    field_model.save_pretrained(folder)
    recorded = [(task.removesuffix(OWN), sample) for task, sample in answers(field_model, 1, 9)]
    write_shards(shards, recorded, field_model.vocabulary, field_model.text, LM.seq_len)
    weights = dict.fromkeys(("text->photo", "text->speech", "text->music"), 1.0)
    run, config = Run(tmp_path / "run", {}), PracticeConfig(num=1, max_steps=12, lr=3e-3)
    trained = UnifiedModel.from_pretrained(practise(run, config, LM, folder, shards, weights, 0))
    assert trained.vocabulary == field_model.vocabulary
    moved = [
        float((tensor.float() - before[name].float()).norm() / (before[name].float().norm() + 1e-9))
        for name, tensor in trained.model.state_dict().items()
    ]
    assert 0 < max(moved) < 1  # a new model of the same seed's shape would be further away
    own = [sample for _, sample in answers(field_model, 1, seed_of(0, "practice"))]
    nats = [np.mean([-float(x) for x in log_likelihoods(m, own) if x is not None]) for m in (field_model, trained)]
    assert nats[1] < nats[0]
    again = practise(run, config, LM, folder, shards, weights, 0)
    assert sum("practice" in str(path) for path in again.parents) and (again / "training.json").exists()
    with pytest.raises(ManifestError, match="started with other settings"):
        practise(run, replace(config, num=2), LM, folder, shards, weights, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PracticeConfig(num=-1), "practice.num -1 must be 0 or more"),
        (PracticeConfig(num=1, share=1.0), "practice.share 1.0 between 0 and 1"),
        (PracticeConfig(num=1, max_steps=0), "must be positive"),
    ],
)
def test_settings_that_cannot_be(config: PracticeConfig, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        config.check(LM)


def test_the_second_training_starts_no_rows_anew() -> None:
    found = PracticeConfig(num=1, max_steps=20, lr=1e-3).settings(replace(LM, codebook_rows=True, warmup_steps=100))
    assert not found.codebook_rows and found.max_steps == 20 and found.warmup_steps == 4 and found.lr == 1e-3
    assert found.hidden_size == LM.hidden_size
