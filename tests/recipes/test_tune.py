"""From a folder of somebody's own pictures to a model trained on them: prepare, tune, ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import LMConfig, Run, train_lm
from anyglot_recipes.cli import main
from anyglot_recipes.pairs import write_pairs
from anyglot_tokenizers.errors import ManifestError


@pytest.fixture
def prepared(tmp_path: Path, tiny_model: UnifiedModel) -> tuple[Path, Path]:
    """(a model folder, a folder prepared with it) from four captioned pictures."""
    source, model, out = tmp_path / "pictures", tmp_path / "model", tmp_path / "codes"
    source.mkdir()
    rng = np.random.default_rng(0)
    rows = ["image,text"]
    for index, caption in enumerate(("red", "green", "blue", "white")):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(source / f"{index}.png")
        rows.append(f"{index}.png,{caption}")
    (source / "metadata.csv").write_text("\n".join(rows))
    tiny_model.save_pretrained(model)
    assert main(["prepare", str(source), "--model", str(model), "--out", str(out)]) == 0
    return model, out


def test_every_pair_becomes_a_sample(prepared: tuple[Path, Path], tiny_model: UnifiedModel) -> None:
    _, out = prepared
    reader = ShardReader(out / "shards", tiny_model.vocabulary)
    assert sorted(reader.task_names) == ["image->text", "text->image"]
    assert len(reader) == 8
    written = {
        str(s.content) for i in range(8) for s in reader.sample(i, tiny_model.text).segments if s.modality == "text"
    }
    assert written == {"red", "green", "blue", "white"}


def test_shards_are_written_anew(prepared: tuple[Path, Path]) -> None:
    model, out = prepared
    assert write_pairs(out, model) == (8, 0)


def test_tune_trains_the_model_on(
    prepared: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = prepared
    command = [
        "train",
        "tune",
        "--model",
        str(model),
        "--prepared",
        json.dumps([str(out)]),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    command += ["--lm.max_steps=10", "--lm.batch_size=1", "--lm.checkpoint_every=10", "--lm.compile=false"]
    assert main([*command, "--lm.precision=32-true"]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    before = UnifiedModel.from_pretrained(model).model.get_input_embeddings().weight
    tuned = UnifiedModel.from_pretrained(report["model"])
    assert report["loss"] > 0
    assert not torch.equal(before, tuned.model.get_input_embeddings().weight)

    command += ["--lm.precision=32-true", "--lm.rows_lr=0", f"--run_dir={tmp_path / 'rows'}"]
    assert main(command) == 0
    kept = UnifiedModel.from_pretrained(tmp_path / "rows" / "model").model.state_dict()
    start = UnifiedModel.from_pretrained(model).model.state_dict()
    same = {name for name in start if torch.equal(start[name].bfloat16(), kept[name])}
    assert "model.embed_tokens.weight" in same and not any("_proj" in name for name in same)


@pytest.mark.parametrize("recipe", [["tune", "--prepared=[p]"], ["nano_chat"], ["nano_shots"]])
@pytest.mark.parametrize("setting", ["factored", "codebook_rows"])
def test_rows_of_a_trained_model_are_not_started_anew(
    recipe: list[str], setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *recipe, "--model=nowhere", f"--run_dir={tmp_path / 'run'}", f"--lm.{setting}=true"]) == 2
    assert "leave them out" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_rows_of_codebooks_need_tokenizers_with_codebooks(tmp_path: Path, tiny_model: UnifiedModel) -> None:
    run, factored = Run(tmp_path, {}), LMConfig(factored=True)
    with pytest.raises(ManifestError, match="need tokenizers with codebooks"):
        train_lm(run, factored, [], tiny_model.vocabulary, tiny_model.text, {}, 0)
    with pytest.raises(ManifestError, match="one that is trained on keeps its own"):
        train_lm(run, factored, [], tiny_model.vocabulary, tiny_model.text, {}, 0, start=lambda: tiny_model.model)


def test_tune_without_data_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tune"]) == 2
    assert "--prepared" in capsys.readouterr().err
