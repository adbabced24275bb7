"""`anyglot demo`: every direction with the shipped model, as one page that plays, and `report.json`.

Runs the nanoworld benchmark on held-out scenes and shows a few samples of every task with the checker's verdict beside
each: the first ones, whatever became of them. Two tasks stand at the top, as stories. The page itself is
`gallery.py`'s, its table `benchmark_report.py`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.benchmark_report import as_html, score_line, tables
from anyglot_recipes.evaluate import Checkers, Graded, evaluate
from anyglot_recipes.gallery import page, section
from anyglot_recipes.nano import test_items
from anyglot_tokenizers.files import atomic_write

STORIES = {
    "speech->image+speech": "Speak: see the picture, hear the answer",
    "image->music": "Draw: hear the tune",
}
"""Titles of the tasks at the top, which show `TOLD` samples each."""
TOLD = 2


def demo(
    model_dir: str | Path,
    out: str | Path,
    *,
    num: int = 50,
    shown: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `out/index.html` and `out/report.json`; returns the report.

    Args:
        model_dir: folder of a unified model.
        out: folder of the page, made when needed.
        num: held-out samples per task.
        shown: samples per task on the page.
        progress: called with one line per finished task.
    """
    started = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = UnifiedModel.from_pretrained(model_dir)
    items = test_items(model, num)
    galleries: dict[str, list[Graded]] = {}

    def keep(graded: list[Graded]) -> None:
        galleries[graded[0].task] = graded[:shown]

    report = evaluate(model, items, checkers=Checkers(), keep=keep, progress=progress)
    sections: dict[str, str] = {}
    for row in report["rows"]:
        task, line = row["task"], score_line(row)
        if task in STORIES:
            line, galleries[task] = f"{task}: {line}", galleries[task][:TOLD]
        sections[task] = section(model, folder, task, line, galleries[task], STORIES.get(task))
    stories = [sections.pop(task) for task in STORIES]
    report["seconds"] = round(time.perf_counter() - started, 1)
    intro = (
        "One small language model reads and writes text, pictures, speech and music of nanoworld. Every scene below "
        "holds a combination of shape, color and size that never occurred in training. Checkers read each answer back "
        f"without the model. Mean score over the 12 directions: <b>{report['mean']}</b>. "
        f"This page took {report['seconds']} s. Speak and draw yourself: <code>anyglot serve</code>."
    )
    with atomic_write(folder / "index.html") as path:
        shown_tables = as_html(tables(report["rows"]), galleries)
        title = "Anyglot: any modality in, any modality out"
        path.write_text(page(title, intro, shown_tables, list(sections.values()), stories), "utf-8")
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report
