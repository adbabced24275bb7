"""The shipped model gives README's table, within what so few scenes can tell.

The table is of 200 held-out scenes; here `SCENES` others of the same world are asked about. This is no benchmark: it
notices weights and code that no longer fit, or figures that were never true.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.candidates import best_of
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import nano
from anyglot_recipes.evaluate import SAMPLING, Checkers, evaluate, grade, request
from anyglot_recipes.tasks import PAIRS, TASKS, THROUGH, prompt
from anyglot_synth.nanoworld.voices import FLITE_VOICES, installed_voices

ROOT = Path(__file__).parents[2]
NANO = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"
SCENES, SEED = 40, 1
ERRORS = 4.0  # standard errors that a row may be off

pytestmark = pytest.mark.skipif(
    not {voice.name for voice in installed_voices()} >= {voice.name for voice in FLITE_VOICES},
    reason="the shipped model knows flite's voices, which are not here",
)


CHOSEN = ("text->image", "image->speech")
"""Pairs whose best of several answers is asked for, too."""
BEST = ", best of 8"


def readme_table() -> dict[str, float]:
    """Task -> score, those by way of text under the names of `THROUGH`, `CHOSEN` with `BEST`, and "mean"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {}
    cells = r"^\| (\S+->\S+) \| ([\d.]+) \|[^|]*\| *([\d.]*) *\| *([\d.]*) *\|"
    for task, score, through, best in re.findall(cells, text, re.MULTILINE):
        found[task] = float(score)
        if task in CHOSEN:
            found[task + BEST] = float(best)
        if through:
            found[THROUGH[task]] = float(through)
    mean = re.search(r"^\| \*\*mean over the 12 pairs\*\* \| \*\*([\d.]+)\*\*", text, re.MULTILINE)
    assert mean is not None
    return {**found, "mean": float(mean[1])}


@pytest.mark.slow
def test_the_table_of_the_readme() -> None:
    told = readme_table()
    assert {*told} >= {*TASKS, "mean"} and nano.ASSISTANT_VOICE == "slt"
    model = UnifiedModel.from_pretrained(NANO)
    items = nano.test_items(model, SCENES, SEED)
    rows = evaluate(model, items, tasks=[task for task in told if task != "mean" and BEST not in task])["rows"]
    assert min(row["ceiling"] for row in rows) >= 0.9
    scores = {row["task"]: np.array(row["scores"]) for row in rows}
    for task in CHOSEN:
        outputs = best_of(model, [prompt(item, task) for item in items], request(task), sampling=SAMPLING)
        scores[task + BEST] = np.array([graded.score for graded in grade(items, task, outputs, Checkers())])
    scores["mean"] = np.mean([scores[task] for task in PAIRS], axis=0)
    for name, wanted in told.items():
        error = max(float(scores[name].std(ddof=1)), 0.1) / SCENES**0.5
        found = float(scores[name].mean())
        assert abs(found - wanted) <= ERRORS * error, f"{name}: README says {wanted}, {SCENES} scenes {found:.3f}"
