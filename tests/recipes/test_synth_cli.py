"""`anyglot synth`: recipes are read, changed and run from the command line; wrong ones end with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anyglot_recipes.cli import main
from anyglot_recipes.synth_cli import RECIPES, names
from anyglot_synth.dataset import media_of, read_items
from anyglot_synth.recipe import build, read_settings
from anyglot_synth.validate import validate

DATA = {
    "speech-instruct": [{"instruction": "Name 2 colors.", "input": "", "output": "Red and blue."}],
    "tts-corpus": [{"text": "The weather was fine.", "speech": {"text": "The weather was fine."}}],
    "spoken-vqa": [{"image": "picture.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is in the picture?"}, {"from": "gpt", "value": "A gray glow."},
    ]}],
    "any-instruct": [{"turns": [
        {"role": "user", "text": "Draw this. [image: a small red circle in the center]"},
        {"role": "assistant", "text": "Here you are."},
    ]}],
}  # fmt: skip
MEDIA = {
    "any-instruct": {"image"},
    "nanoworld-chat": set(),  # two dialogues of any kind
    "speech-instruct": {"speech"},
    "spoken-vqa": {"image", "speech"},
    "tts-corpus": {"speech"},
}
"""What every dataset holds at least."""


def data_of(name: str, folder: Path) -> list[str]:
    """The arguments that give a recipe its data."""
    if name not in DATA:
        return []
    Image.radial_gradient("L").save(folder / "picture.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in DATA[name]))
    return ["--source.data", str(path)]


def test_which_recipes_there_are() -> None:
    assert names() == ["any-instruct", "nanoworld-chat", "speech-instruct", "spoken-vqa", "tts-corpus"]


@pytest.mark.parametrize("name", names())
def test_every_recipe_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["synth", name, "--out", str(out), "--num", "2", "--workers", "1", "--json", *data_of(name, tmp_path)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = 1 if name in DATA else 2
    ended = "".join((out / file).read_text() for file in ("rejects.jsonl", "errors.jsonl"))
    assert (found["ok"], found["filtered"], found["failed"]) == (wanted, 0, 0), ended
    modalities = {medium.part.modality for item in read_items(out) for medium in media_of(item.dialogue)}
    assert modalities >= MEDIA[name]
    assert validate(out).exit_code == 0 and (out / "README.md").is_file()
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["earlier"] == wanted


def test_records_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for num, earlier in ((1, 0), (2, 1)):
        assert main(["synth", "nanoworld", "--out", out, "--num", str(num), "--workers", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"out": out, "records": num, "earlier": earlier}


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    changes = {"source.max_rounds": 1, "stages.1.engines.0.engine": "espeak-ng", "seed": 7}
    recipe = build(read_settings(RECIPES / "nanoworld-chat.yaml", changes))
    assert recipe.settings["stages"][1]["engines"][0]["engine"] == "espeak-ng"
    source: Any = recipe.source
    assert source.max_rounds == 1 and source.seed == 7 and recipe.stages[1].config()["seed"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-such"], "there is no recipe 'nothing-such'; use nanoworld, any-instruct"),
        (["nanoworld-chat", "--source.data"], "'--source.data' is no change of a setting"),
        (["nanoworld-chat", "--source.rounds", "3"], "has no option 'rounds'; it has: split"),
        (["nanoworld-chat", "--sources.seed", "3"], "--sources.seed: there is no sources; there are name"),
        (["nanoworld-chat", "--stages.9.seed", "3"], "--stages.9.seed: there is no stages.9; it has 4 entries"),
        (["nanoworld-chat", "--stages.0.stage", "dance"], "there is no stage 'dance'"),
        (["nanoworld-chat", "--stages.3.filter", "dust"], "there is no filter 'dust'"),
        (["nanoworld-chat", "--colour", "red"], "there is no key 'colour'; use name, seed, num, source, stages"),
        (["nanoworld-chat", "--num", "0"], "--num is 0"),
        (["nanoworld-chat", "--split", "test"], "--split is of the records of nanoworld"),
        (["nanoworld", "--dry-run"], "records of nanoworld have no recipe"),
        (["nanoworld", "--timeout", "300"], "records of nanoworld have no recipe"),
        (["nanoworld", "--attempts", "3"], "records of nanoworld have no recipe; give --out, --num"),
        (["nanoworld", "--start-timeout", "9"], "records of nanoworld have no recipe"),
        (["nanoworld-chat", "--timeout", "nan"], "--timeout is nan; give seconds, more than 0"),
        (["nanoworld-chat", "--start-timeout", "-1"], "--start-timeout is -1.0; give seconds"),
        (["nanoworld-chat", "--dry-run", "--on", "ray"], "says nothing of a cluster; leave out --on"),
        (["nanoworld-chat", "--source.speech", "much"], "chat.yaml: source 'nanoworld-grammar': speech is 'mu"),
        (["nanoworld-chat", "--stages.1.gpus", "x"], "nanoworld-chat.yaml, stage 2: gpus is 'x'; give a number"),
        (["nanoworld-chat", "--num", "3", "--stages.0", "[a]"], "stage 1: ['a'] names no stage"),
        (["speech-instruct"], "data names no file; give a path"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
