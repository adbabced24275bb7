"""From a recipe to a dataset folder: nanoworld's dialogues with pictures and melodies, whole and graded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.dialogue import Dialogue
from anyglot_synth.nanoworld.listen import listen
from anyglot_synth.nanoworld.scene import Scene, score
from anyglot_synth.nanoworld.see import see
from anyglot_synth.recipe import build
from anyglot_synth.run import run
from anyglot_synth.store import Store
from anyglot_synth.validate import validate

RECIPE: dict[str, Any] = {
    "name": "nanoworld-chats",
    "seed": 3,
    "num": 30,
    "source": {"source": "nanoworld-grammar", "speech": 0.0},
    "stages": [
        {"stage": "illustrate", "pictures": {"engine": "nanoworld"}, "music": {"engine": "nanoworld"}},
    ],
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(out: Path, workers: int, num: int = 30) -> None:
    recipe = build(RECIPE)
    summary = run(recipe.source, recipe.stages, out, name=recipe.name, num=num, workers=workers)
    assert (summary.ok, summary.failed) == (num - summary.filtered, 0) and summary.filtered < 3


def test_a_recipe_gives_a_whole_dataset(tmp_path: Path) -> None:
    make(tmp_path / "two", 2)
    make(tmp_path / "one", 1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    report = validate(tmp_path / "one")
    assert not report.problems and not report.num_extra
    store, scores = Store(tmp_path / "one"), []
    for line in (tmp_path / "one" / "samples.jsonl").read_text().splitlines():
        dialogue = Dialogue.from_dict(json.loads(line))
        for entry in dialogue.meta["truth"]:
            part = dialogue.turns[entry["turn"]].parts[entry["part"]]
            if part.media and part.modality == "image":
                scores.append(score(Scene.from_dict(entry["scene"]), see(store.picture(part.media) / 255)))
            elif part.media and part.modality == "music":
                scores.append(score(Scene.from_dict(entry["scene"]), listen(store.sound(part.media)[0])))
    assert len(scores) > 20 and np.mean(scores) == 1.0
