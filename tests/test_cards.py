"""Cards: whatever weights ship, a card says what they are, and its figures are those of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"
WEIGHTS = sorted({path.parent for path in ROOT.glob("*/anyglot_*/**/weights/**/*.safetensors")})


def card_of(folder: Path) -> Path | None:
    """The card of the weights in a folder: beside them, or above, where a model's tokenizers lie inside it."""
    return next((f / "README.md" for f in (folder, *folder.parents) if (f / "README.md").is_file()), None)


def read(card: Path) -> tuple[dict, str]:
    """The header, as the Hub reads it, and the text below."""
    from huggingface_hub import ModelCard

    loaded = ModelCard(card.read_text("utf-8"))  # refuses what is no header, and results that are none
    _, header, text = card.read_text("utf-8").split("---\n", 2)
    assert loaded.data.to_dict()
    return yaml.safe_load(header), text


def test_weights_are_found() -> None:
    assert {NANO, NANO / "tokenizers" / "image"} < set(WEIGHTS) and len(WEIGHTS) >= 5


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda path: path.name)
def test_every_weights_folder_has_a_card(folder: Path) -> None:
    card = card_of(folder)
    assert card is not None and "weights" in card.parent.parts, f"{folder} has no card"
    header, text = read(card)
    assert header["license"] == "apache-2.0" and header["pipeline_tag"] and header["language"]
    for part in ("**Data**", "| terms", "**Meant for**", "**Not for**", "## Limits"):
        assert part in text, part
    commands = re.findall(r"`?(?:anyglot (?:train|eval) \w+|python -m [\w.]+ (?:train|test))", text)
    assert len(commands) >= 2, "name the commands that train and that measure"


def test_the_card_of_nano_is_about_these_weights() -> None:
    header, text = read(NANO / "README.md")
    training = json.loads((NANO / "training.json").read_text())
    assert training["plan"][:12] in text, "other weights lie here: write their card ('this version' and known failures)"
    (result,) = header["model-index"][0]["results"]
    told = re.search(r"\*\*mean over the 12 pairs\*\* \| \*\*([\d.]+)\*\*", (ROOT / "README.md").read_text("utf-8"))
    assert told is not None
    assert result["metrics"][0]["value"] == float(told[1]), "the mean differs from the README's table"


def test_the_card_of_the_judge_says_what_its_config_says() -> None:
    card = ROOT / "synth_data" / "anyglot_synth" / "nanoworld" / "weights" / "judge"
    _, text = read(card / "README.md")
    config = json.loads((card / "config.json").read_text())
    assert f"the {len(config['words'])} words" in text
    assert all(voice.removeprefix("en-us+") in text for voice in config["trained"]["voices"])


def test_the_data_card_has_a_header() -> None:
    _, header, text = (ROOT / "docs" / "nanoworld.md").read_text("utf-8").split("---\n", 2)
    assert set(yaml.safe_load(header)) >= {"pretty_name", "license", "language", "task_categories"}
    recipes = {path.stem for path in (ROOT / "recipes" / "anyglot_recipes" / "synth").glob("*.yaml")}
    assert recipes == set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE))
