"""`anyglot export` of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main


def test_export(tiny_model: UnifiedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    words = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main([*words, "--dtype", "bf16", "--license", "mit", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "out": str(tmp_path / "out"),
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "auto_tokenizer": False,
        "modalities": list(tiny_model.vocabulary.modalities),
    }
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text()
    assert UnifiedModel.from_pretrained(tmp_path / "out").vocabulary.fingerprint == tiny_model.vocabulary.fingerprint
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "LlamaForCausalLM, float32, text by AnyglotProcessor only" in capsys.readouterr().err
    assert main(["export", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "cannot be read" in capsys.readouterr().err
