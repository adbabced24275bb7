"""The recipe of encoders that hear through noise: what changes, what stays, and what nano takes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes import nano_denoise as recipe
from anyglot_recipes import spoil
from anyglot_recipes.nano import ASSISTANT_VOICE, weights_of
from anyglot_recipes.nano_denoise import (
    DenoiseConfig,
    NanoDenoiseConfig,
    SoundDenoiseConfig,
    batches_of,
    nano_denoise,
)
from anyglot_recipes.shipped import NANO
from anyglot_recipes.train import find_recipe, parse_recipe
from anyglot_synth.nanoworld.language import parse
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers import load
from anyglot_tokenizers.errors import ManifestError

needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
SHORT = [
    "--image.max_steps=80",
    "--speech.max_steps=2",
    "--speech.decoder_steps=0",
    "--speech.num=6",
    "--speech.batch_size=2",
    "--workers=1",
]


@needs_voices
def test_the_recipe_can_change_encoders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "COMPARED", 32)
    monkeypatch.setattr(spoil, "GRAIN", 60.0)  # more than the shipped tokenizer has met
    given = [f"--run_dir={tmp_path}", "--music.max_steps=0", *SHORT]
    function, config = parse_recipe(find_recipe("nano_denoise"), given)
    report: Any = function(config)
    assert set(report) == {"image", "speech"} and len(report["speech"]["clean"]) == 2
    image = report["image"]
    assert image["spoiled"][0] > image["spoiled before"][0] + 0.02 and image["clean"][0] > 0.95
    old, new = UnifiedModel.from_pretrained(NANO), UnifiedModel.from_pretrained(tmp_path / "model")
    prints = [{name: t.fingerprint for name, t in model.tokenizers.items()} for model in (old, new)]
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"image", "speech"}
    codes = torch.randint(4096, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(old.tokenizers["image"].decode(codes), new.tokenizers["image"].decode(codes))
    assert all(torch.equal(a, b) for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True))
    _, more = parse_recipe(find_recipe("nano_more"), [f"--start={tmp_path / 'model'}", "--lm.factored=false"])
    assert weights_of(tmp_path / "model", more.lm) == weights_of(NANO, more.lm)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("anyglot_tokenizers.denoise.fit_denoising", never)
    shutil.rmtree(tmp_path / "model")
    assert function(config) == report and (tmp_path / "model" / "model.safetensors").is_file()
    _, other = parse_recipe(find_recipe("nano_denoise"), [*given, "--image.lr=1e-3"])
    with pytest.raises(ManifestError, match=r"image\.lr"):
        function(other)
    with pytest.raises(ManifestError, match=r"config\.json"):
        nano_denoise(NanoDenoiseConfig(run_dir=str(tmp_path / "small"), model=str(NANO.parent / "small")))


@needs_voices
def test_a_decoder_learns_what_the_model_writes_and_codes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "COMPARED", 32)
    start = tmp_path / "start"
    shutil.copytree(NANO, start)
    codec = load(start / "tokenizers" / "speech")
    with torch.no_grad():  # as if its decoder had not learnt that yet
        codec.head.weight.add_(0.02 * torch.randn(codec.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    fingerprint = codec.save_pretrained(start / "tokenizers" / "speech", dtype=torch.float16)
    Vocabulary.load(start / "vocabulary.json").with_fingerprints({"speech": fingerprint}).save(
        start / "vocabulary.json"
    )
    given = [f"--run_dir={tmp_path}", *(f"--{name}.max_steps=0" for name in recipe.MODALITIES), "--workers=1"]
    given += [f"--model={start}", "--speech.decoder_steps=40", "--speech.num=48", "--speech.batch_size=8"]
    function, config = parse_recipe(find_recipe("nano_denoise"), given)
    report: Any = function(config)
    assert set(report) == {"speech"} and report["speech"]["clean"] == [1.0, 1.0]
    assert report["speech"]["decoder"] < report["speech"]["decoder before"]
    old, new = (UnifiedModel.from_pretrained(folder) for folder in (start, tmp_path / "model"))
    assert new.vocabulary.block("speech").fingerprint == new.tokenizers["speech"].fingerprint
    assert old.tokenizers["music"].fingerprint == new.tokenizers["music"].fingerprint
    audio = torch.from_numpy(recipe.written(config, "speech", "test")[-1])[None, None]
    codes = [model.tokenizers["speech"].encode(audio) for model in (old, new)]
    assert torch.equal(codes[0].codes, codes[1].codes)
    assert not torch.equal(old.tokenizers["speech"].decode(codes[0]), new.tokenizers["speech"].decode(codes[1]))
    sizes = [(model / "tokenizers/speech/model.safetensors").stat().st_size for model in (start, tmp_path / "model")]
    assert sizes[0] == sizes[1]  # half precision, as it was


@needs_voices
def test_half_of_what_a_decoder_hears_is_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, Any]] = []
    say = recipe.SpeechCache.say

    def noted(self: Any, text: str, voice: Any, *more: Any) -> Any:
        said.append((text, voice))
        return say(self, text, voice, *more)

    monkeypatch.setattr(recipe.SpeechCache, "say", noted)
    few = SoundDenoiseConfig(num=32)
    config = NanoDenoiseConfig(workers=1, speech=few, music=few)
    clips = recipe.written(config, "speech", "train")
    ours = [text for text, voice in said if voice == ASSISTANT_VOICE]
    assert len(clips) == 32 and len(ours) == 16
    assert sum(parse(text) is not None for text in ours) >= 8 and sum(len(text.split()) <= 2 for text in ours) >= 2
    assert len(recipe.written(config, "music", "test")) == 32


def test_batches_differ_by_what_spoils_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = UnifiedModel.from_pretrained(NANO).tokenizers
    config = NanoDenoiseConfig(workers=1)
    config.music.num = 3
    for name in ("image", "music"):
        batches = batches_of(config, name, tokenizers[name], "train", 0.5)
        one, again, other = batches(3), batches(3), batches(4)
        assert torch.equal(one["media"], again["media"]) and not torch.equal(one["clean"], other["clean"])
        same = (one["clean"] == one["media"]).flatten(1).all(1)
        assert 6 < int(same.sum()) < 26
    assert one["clean"].shape == (24, 1, 16 * 1600) and int(one["lengths"].max()) <= 16 * 1600
    monkeypatch.setattr(spoil, "GRAIN", 1e-9)
    monkeypatch.setattr(spoil, "TINT", 0.0)
    monkeypatch.setattr(spoil, "SHADE", (0.0, 0.0))
    monkeypatch.setattr(spoil, "QUARTERS", 0)
    pictures = batches_of(config, "image", tokenizers["image"], "train", 0.0)(0)
    assert torch.equal(pictures["clean"], pictures["media"])  # the same things at the same places


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"varied": 1.5}, "varied 1.5"),
        ({"image": DenoiseConfig(max_steps=-1)}, "max_steps"),
        (
            {
                "image": DenoiseConfig(max_steps=0),
                "speech": SoundDenoiseConfig(max_steps=0),
                "music": SoundDenoiseConfig(max_steps=0),
            },
            "max_steps",
        ),
        ({"music": SoundDenoiseConfig(lr=0.0)}, r"music\.lr 0.0"),
        ({"speech": SoundDenoiseConfig(num=0)}, r"speech\.num 0"),
        ({"speech": SoundDenoiseConfig(decoder_steps=-1)}, "decoder_steps"),
        ({"speech": SoundDenoiseConfig(decoder_lr=0.0)}, r"speech\.decoder_lr 0.0"),
        ({"speech": SoundDenoiseConfig(aim="ears")}, r"speech\.aim ears"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=named):
        nano_denoise(NanoDenoiseConfig(run_dir=str(tmp_path), **wrong))
    assert not list(tmp_path.iterdir())
