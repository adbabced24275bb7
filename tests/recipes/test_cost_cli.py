"""`anyglot plan cost`: the docs' commands print the docs' numbers; wrong use has a way out; the GPU benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cost_cli import add_cost_parser
from anyglot_tokenizers.errors import ManifestError

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"
EXAMPLES = re.findall(r"^\$ (anyglot plan cost .*)\n((?:.+\n)*?)```$", (ROOT / "docs" / "scale.md").read_text(), re.M)


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_cost_parser(parser.add_subparsers())
    arguments = parser.parse_args(["cost", *words])
    assert arguments.run(arguments) == 0


def test_docs_have_examples_for_every_machine() -> None:
    text = " ".join(command for command, _ in EXAMPLES)
    assert len(EXAMPLES) == 8 and all(output for _, output in EXAMPLES)
    assert all(word in text for word in ("weights/nano", "smollm2-135m", "qwen3-0.6b", "llama-7b", "--fsdp 8"))


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=lambda text: text[:40].replace("/", "-"))
def test_docs_print_what_the_command_prints(
    command: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run(*shlex.split(command)[3:])
    assert capsys.readouterr().out == output


def test_json_of_a_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", str(NANO), "--train_old_rows", "--json")
    content = json.loads(capsys.readouterr().out)
    weights = UnifiedModel.from_pretrained(NANO).model
    assert content["parameters"] == content["trained"] == sum(p.numel() for p in weights.parameters())
    assert content["setting"]["name"] == "nano" and content["days"] is None


def test_vocabulary_of_a_folder_says_which_rows_are_new(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("--model", str(NANO), "--preset", "rows", "--json")
    content = json.loads(capsys.readouterr().out)
    manifest = json.loads((NANO / "vocabulary.json").read_text())
    config = json.loads((NANO / "config.json").read_text())
    new = config["vocab_size"] - manifest["text_size"]
    assert content["trained"] == new * config["hidden_size"] > 0
    (tmp_path / "config.json").write_text((NANO / "config.json").read_text())  # alone, it is a model before expansion
    run("--model", str(tmp_path / "config.json"), "--preset", "rows", "--vocab_size", "8000", "--json")
    assert json.loads(capsys.readouterr().out)["trained"] == (8000 - config["vocab_size"]) * config["hidden_size"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "gpt-5"], "'gpt-5'.*llama-7b.*--model DIR"),
        (["--model", "none"], "none: cannot be read"),
        (["--model", "."], "config.json: cannot be read"),
        (["--config", "llama-7b", "--preset", "rows"], "no new rows"),
        (["--config", "llama-7b", "--device", "abacus"], "'abacus'.*h100"),
        (["--config", "llama-7b", "--gpus", "8", "--fsdp", "3"], "does not divide"),
    ],
)
def test_wrong_use(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match=said):
        run(*words)


def test_error_of_a_config_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ManifestError, match="config.json: model_type 'mamba'"):
        run("--model", str(tmp_path))


def test_gpu_benchmark_runs_on_a_cpu() -> None:
    command = ["benchmarks/gpu_training.py", "--device", "cpu", "--tiny", "--steps", "2", "--warmup", "1"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == "gpu_training" and last["ratios"]["mfu_tiny"] > 0


def test_gpu_benchmark_refuses_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_training", ROOT / "benchmarks" / "gpu_training.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = module.vocabulary_for(module.TINY, True)
    config = LlamaConfig(
        vocab_size=vocabulary.size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    batch, lengths = module.rows_of(vocabulary, 1, 256, "cpu")
    precision = torch.autocast("cpu", torch.bfloat16)
    module.check_no_leak(model, batch, lengths, precision)

    def leaking(decoder: Any, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids_BT)  # with any mask, transformers does not look for documents
        return decoder(input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, use_cache=False)[0]

    monkeypatch.setattr(module, "hidden_states", leaking)
    with pytest.raises(AssertionError, match="leak"):
        module.check_no_leak(model, batch, lengths, precision)
