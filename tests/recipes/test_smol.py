"""The recipes of a pretrained language model, on a small one: from the backbone to an adapter that answers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anyglot_lm.adapter import SMOLLM2, WEIGHTS_FILE
from anyglot_lm.tuning import Lora
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main
from anyglot_recipes.nano import ASSISTANT_VOICE
from anyglot_recipes.shipped import NANO
from anyglot_recipes.smol import SmolConfig, _check_adapter, smol
from anyglot_recipes.stage import Stage
from anyglot_recipes.tasks import EXTRA, TASKS
from anyglot_recipes.train import find_recipe, parse_recipe
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers.errors import CheckpointError, ManifestError

needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
STAGE: dict[str, Any] = {
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "checkpoint_every": 2,
    "model.log_every": 1,
}
STAGE |= {"precision": "fp32", "model.frozen_dtype": "fp32", "model.warmup_steps": 1, "export_dtype": "fp32"}
STAGE |= {"data.seq_len": 512, "data.batch_size": 1, "data.packs_per_step": 1}


@pytest.mark.parametrize("name", ["smol_any", "smol_more"])
def test_recipes_learn_only_what_there_is(name: str) -> None:
    _, config = parse_recipe(find_recipe(name), [])
    assert set(config.tasks) <= {*TASKS, *EXTRA, "write down", "read aloud"}
    assert sum(config.tasks.values()) == pytest.approx(1.0) and config.blocks["image"] == {"grid": [8, 8]}


def test_smol_more_trains_on_what_smol_any_made() -> None:
    (_, first), (_, more) = (parse_recipe(find_recipe(name), []) for name in ("smol_any", "smol_more"))
    assert (more.blocks, more.lora["model.lora"]) == (first.blocks, first.lora["model.lora"])
    assert more.seed != first.seed and more.start == first.run_dir
    shipped = NANO.parent / "small"
    digest = hashlib.sha256((shipped / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert _check_adapter(shipped, more, SMOLLM2) == digest  # the one that ships fits its settings, too


def test_no_task_at_all_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smol.yaml").write_text(json.dumps({"program": "smol", "run_dir": str(tmp_path / "run"), "tasks": {}}))
    assert main(["train", str(tmp_path / "smol.yaml")]) == 2
    assert "tasks {}: no task has a share" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": {"image->txt": 1.0}}, "tasks: no task image->txt; there are text->image, "),
        ({"tasks": {"image->text": 1.0, "speech->text": -0.5}}, r"speech->text -0\.5: there must be no share below 0"),
        ({"lora": {"trainer.devices": 2}}, "lora: trainer.devices 2; this recipe trains on one device"),
        ({"rows": {"trainer.devices": "auto"}}, "rows: trainer.devices auto; this recipe trains on one device"),
        ({"replay_share": -0.1}, r"replay_share -0\.1: there must be no share below 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=message):
        smol(SmolConfig(run_dir=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()


@needs_voices
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_the_backbone_to_the_adapter(
    backbone: Path, tiny_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path / "cache"))
    for modality, tokenizer in tiny_model.tokenizers.items():
        tokenizer.save_pretrained(tmp_path / "tokenizers" / modality)
    (tmp_path / "book.txt").write_text("the user asks the assistant\n\n" * 100)
    blocks = {"image": {"grid": [4, 4]}, **{m: {"max_frames": 120} for m in ("speech", "music")}}
    options = {
        "run_dir": str(tmp_path / "run"),
        "backbone": str(backbone),
        "tokenizers": str(tmp_path / "tokenizers"),
        "blocks": blocks,
        "world": {"num_chunks": 1, "chunk": 6, "readings": 6, "workers": 1},
        "tasks": {"text->image": 0.5, "image->text+speech": 0.3, "read aloud": 0.2},
        "max_ids": 512,
        "replay": [str(tmp_path / "book.txt")],
        "held_out_text": str(tmp_path / "book.txt"),
        "rows": STAGE,
        "lora": {**STAGE, "model.lora": {"r": 4, "alpha": 12.0}},
        "n": 2,
    }
    (tmp_path / "small.yaml").write_text(json.dumps({"program": "smol", **options}))
    assert main(["train", str(tmp_path / "small.yaml")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["task"] for row in report["rows"]] == ["text->image", "image->text+speech"]
    assert set(report["perplexity"]) == {"before", "after"}
    adapted = UnifiedModel.from_pretrained(tmp_path / "run" / "adapter")
    merged = UnifiedModel.from_pretrained(tmp_path / "run" / "lora" / "model")
    ids = torch.tensor([merged.text.encode("a large red circle")])
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(ids).logits, merged.model(ids).logits, rtol=1e-2, atol=1e-2)
    assert adapted.generate("image", text="a large red circle").media is not None
    capsys.readouterr()
    assert main(["train", str(tmp_path / "small.yaml")]) == 0  # nothing is done again
    assert "adapter: done before" in capsys.readouterr().err
    still = {**options["lora"], "model.lr": 0.0, "model.rows_lr": 0.0}  # what it begins with is what comes out
    options |= {"start": str(tmp_path / "run"), "run_dir": str(tmp_path / "more"), "seed": 1, "lora": still}
    (tmp_path / "more.yaml").write_text(json.dumps({"program": "smol", **options}))
    assert main(["train", str(tmp_path / "more.yaml")]) == 0
    first, more = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("run", "more"))
    assert first.keys() == more.keys() and all(torch.equal(first[name], more[name]) for name in first)
    alone = [
        "train",
        str(tmp_path / "more.yaml"),
        f"--start={shutil.copytree(tmp_path / 'run' / 'adapter', tmp_path / 'a')}",
    ]
    assert main([*alone, f"--run_dir={tmp_path / 'on'}"]) == 0
    again = load_file(tmp_path / "on" / "adapter" / "adapter.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(first[name], again[name]) for name in first)
    for arguments, message in (
        (["--blocks.image.grid=[2,2]"], "trained another model (vocabulary"),
        (['--lora={"model.lora": {"r": 4, "alpha": 8.0}}'], "alpha of model.lora: 12.0 there, 8.0 here"),
        (['--lora={"model.lora": {"r": 8, "alpha": 12.0}}'], "r of model.lora: 4 there, 8 here"),
        ([f"--start={tmp_path / 'on'}"], f"has no rows/model; give its adapter, {tmp_path / 'on' / 'adapter'}"),
    ):
        capsys.readouterr()
        assert main([*alone, f"--run_dir={tmp_path / 'y'}", *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "y").exists()
    tiny_model.save_pretrained(tmp_path / "another")
    for start, alpha, message in (
        (tmp_path / "run" / "start", 8.0, "has alpha 12.0"),
        (tmp_path / "another", 12.0, "vocab"),
    ):
        stage = Stage(str(start), "lora", Lora(r=4, alpha=alpha), weights_from=str(tmp_path / "a"))
        with pytest.raises(CheckpointError, match=message):
            stage.build()
    other = ["train", str(tmp_path / "more.yaml"), f"--run_dir={tmp_path / 'x'}"]
    for arguments, message in (
        ([f"--start={tmp_path / 'more'}"], "has read the data of seed 1; give another seed"),
        (["--blocks.image.grid=[2,2]"], "trained another model (blocks"),
        (['--lora={"model.lora": {"r": 8, "alpha": 12.0}}'], "trained another model (model.lora"),
        ([f"--start={tmp_path}"], "holds no run of this recipe that is done"),
    ):
        capsys.readouterr()
        assert main([*other, *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
    shutil.move(tmp_path / "run", tmp_path / "moved")  # a path says nothing
    assert main(["train", str(tmp_path / "more.yaml"), f"--start={tmp_path / 'moved'}"]) == 0
    (tmp_path / "moved" / "settings.json").write_text("[]")
    assert main([*other, f"--start={tmp_path / 'moved'}"]) == 2
