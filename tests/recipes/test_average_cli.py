"""`anyglot average`: the mean of two models, and what has none."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyglot_lm.average import RECORD
from anyglot_lm.parts import TEMPLATE_FILE
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main


@pytest.fixture
def two(tiny_model: UnifiedModel, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one model in bfloat16, the second with other weights."""
    folders = tmp_path / "one", tmp_path / "two"
    tiny_model.save_pretrained(folders[0])
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    weights = load_file(folders[0] / "model.safetensors")
    shutil.copytree(*folders)
    generator = torch.Generator().manual_seed(0)
    for folder, spread in zip(folders, (0.0, 1.0), strict=True):
        moved = {name: v + spread * torch.randn(v.shape, generator=generator) for name, v in weights.items()}
        half = {name: value.bfloat16() for name, value in moved.items()}
        save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


def test_the_mean(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mean"
    assert main(["average", *map(str, two), "--weights", "0.25", "0.75", "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((out / RECORD).read_text())
    assert [(of["model"], of["weight"]) for of in said["mean_of"]] == [(str(two[0]), 0.25), (str(two[1]), 0.75)]
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in two]
    assert [of["sha256"] for of in said["mean_of"]] == digests
    one, other, mean = (load_file(folder / "model.safetensors") for folder in (*two, out))
    assert mean.keys() == one.keys()
    for name, value in mean.items():
        assert value.dtype == torch.bfloat16 and not torch.equal(value, one[name])
        torch.testing.assert_close(value, (0.25 * one[name].float() + 0.75 * other[name].float()).bfloat16())
    kept = [path.relative_to(two[0]) for path in (two[0] / "tokenizers").rglob("*") if path.is_file()]
    kept += [Path(name) for name in ("vocabulary.json", "template.json")]
    assert all((out / path).read_bytes() == (two[0] / path).read_bytes() for path in kept)
    UnifiedModel.from_pretrained(out)
    same = ["average", str(two[0]), str(two[0]), "--weights", "0.5", "0.5", "--out", str(out)]
    assert main(same) == 2 and "exists" in capsys.readouterr().err
    assert main([*same, "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() == (two[0] / "model.safetensors").read_bytes()


def test_what_has_no_mean(
    two: tuple[Path, Path], tiny_model: UnifiedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["average", *words, "--out", str(tmp_path / "mean")]) == 2
        assert not (tmp_path / "mean").exists()
        return capsys.readouterr().err

    one, other = map(str, two)
    assert "must be 0 or more and have the sum 1" in refused(one, other, "--weights", "0.5", "0.6")
    assert "must be 0 or more" in refused(one, other, "--weights", "1.5", "-0.5")
    assert "must be 0 or more" in refused(one, other, "--weights", "nan", "nan")
    assert "two models or more" in refused(one, "--weights", "1")
    assert "as many weights" in refused(one, other, "--weights", "1")
    assert "cannot be read" in refused(str(tmp_path / "none"), other, "--weights", "0.5", "0.5")
    config = json.loads((two[1] / "config.json").read_text())
    (two[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    said = refused(one, other, "--weights", "0.5", "0.5")
    assert "differs from" in said and "in rms_norm_eps;" in said
    (two[1] / "config.json").write_text(json.dumps(config))
    replace(tiny_model.template, version=2).save(two[1] / TEMPLATE_FILE)
    assert "has other ids or turns" in refused(one, other, "--weights", "0.5", "0.5")
