"""The recipe of encoders that hear through noise: what changes, what stays, and what nano takes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import nano_denoise as recipe
from anyglot_recipes.nano import ASSISTANT_VOICE, weights_of
from anyglot_recipes.nano_denoise import SHIPPED, NanoDenoiseConfig, media, nano_denoise
from anyglot_recipes.train import find_recipe, parse_recipe
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers.errors import ManifestError

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
SHORT = ["--image.max_steps=40", "--speech.max_steps=2", "--speech.num=6", "--speech.batch_size=2", "--workers=1"]


@needs_voices
def test_the_recipe_changes_encoders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "HELD_OUT", 16)
    function, config = parse_recipe(
        find_recipe("nano_denoise"), [f"--run_dir={tmp_path}", "--music.max_steps=0", *SHORT]
    )
    report: Any = function(config)
    assert set(report) == {"image", "speech"} and len(report["speech"]["clean"]) == 2
    image = report["image"]
    assert image["spoiled"][0] > image["spoiled before"][0] + 0.02 and image["clean"][0] > 0.95
    old, new = UnifiedModel.from_pretrained(SHIPPED), UnifiedModel.from_pretrained(tmp_path / "model")
    prints = [{name: t.fingerprint for name, t in model.tokenizers.items()} for model in (old, new)]
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"image", "speech"}
    codes = torch.randint(4096, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(old.tokenizers["image"].decode(codes), new.tokenizers["image"].decode(codes))
    assert all(torch.equal(a, b) for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True))
    _, more = parse_recipe(find_recipe("nano_more"), [f"--start={tmp_path / 'model'}", "--lm.factored=false"])
    assert weights_of(tmp_path / "model", more.lm) == weights_of(SHIPPED, more.lm)
    assert function(config) == report
    with pytest.raises(ManifestError, match="config.json"):
        nano_denoise(NanoDenoiseConfig(run_dir=str(tmp_path / "small"), model=str(SHIPPED.parent / "small")))


def test_pairs_differ_by_what_spoils_them_alone() -> None:
    pairs = media(NanoDenoiseConfig(), "image", "train", 0)
    pair, again, other = pairs(3, 24, None, 0.5), pairs(3, 24, None, 0.5), pairs(4, 24, None, 0.5)
    assert torch.equal(pair.spoiled, again.spoiled) and not torch.equal(pair.clean, other.clean)
    same = (pair.clean == pair.spoiled).flatten(1).all(1)
    assert 6 < int(same.sum()) < 20
    assert 0 < float((pair.clean - pair.spoiled).abs().mean()) < 0.06  # the same things at the same places
    melodies = media(NanoDenoiseConfig(workers=1), "music", "train", 3)
    whole, crop = melodies(0, 4, None, 0.0), melodies(0, 4, 8000, 0.0)
    assert whole.clean.shape == whole.spoiled.shape and int(whole.lengths.max()) == whole.clean.shape[2]
    assert crop.clean.shape == (4, 1, 8000) and torch.equal(crop.lengths, whole.lengths.clamp(max=8000))
    assert not torch.equal(crop.clean, crop.spoiled)
    many = melodies(1, 24, 8000, 0.5)
    same = (many.clean == many.spoiled).flatten(1).all(1)
    assert 6 < int(same.sum()) < 20


@pytest.mark.parametrize("steps", [{"image": 0, "speech": 0, "music": 0}, {"image": -1}])
def test_settings_that_cannot_work_are_refused(steps: dict[str, int], tmp_path: Path) -> None:
    parts = {name: recipe.DenoiseConfig(max_steps=count) for name, count in steps.items()}
    with pytest.raises(ManifestError, match="max_steps"):
        nano_denoise(NanoDenoiseConfig(run_dir=str(tmp_path), **parts))
