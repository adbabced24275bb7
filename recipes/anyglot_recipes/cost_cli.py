"""`anyglot plan cost`: memory, speed and time of a training run before it is started.

Reads arguments and a config.json; the formulas are in `anyglot_lm.cost`. It loads no weights and measures nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anyglot_tokenizers.errors import ManifestError


def add_cost_parser(plan_commands: Any) -> None:
    """Add `cost` to the actions of `anyglot plan`."""
    cost = plan_commands.add_parser("cost", help="memory, speed and time of a training run")
    which = cost.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="model folder or config.json, before or after expansion")
    which.add_argument("--config", metavar="NAME", help="smollm2-135m, qwen3-0.6b, llama-1.3b or llama-7b")
    cost.add_argument("--vocab_size", type=int, metavar="N", help="rows after expansion (default: as the model has)")
    cost.add_argument("--preset", default="full", help="full, lora or rows (default full)")
    cost.add_argument("--train_old_rows", action="store_true", help="with full: the rows of text train too")
    cost.add_argument("--lora_rank", type=int, default=16, metavar="R", help="default 16")
    cost.add_argument("--optimizer", default="adamw", help="adamw or muon (default adamw)")
    cost.add_argument("--precision", default="bf16-mixed", help="32-true, bf16-mixed (default) or bf16-true")
    cost.add_argument("--seq_len", type=int, default=4096, metavar="T", help="ids of a pack (default 4096)")
    cost.add_argument("--packs", type=int, default=1, help="packs per GPU and micro-batch (default 1)")
    cost.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of every layer")
    cost.add_argument("--gpus", type=int, default=1, help="all of them (default 1)")
    cost.add_argument("--fsdp", type=int, default=1, metavar="N", help="GPUs that share one copy (default 1: DDP)")
    cost.add_argument("--device", default="h100", help="h100 (default), h200, a100 or 4090")
    cost.add_argument("--mfu", type=float, default=0.4, help="share of the device's peak that is reached (default 0.4)")
    cost.add_argument("--tokens", type=float, metavar="N", help="ids to train on, such as 10e9")
    cost.add_argument("--json", action="store_true", help="print one JSON object")
    cost.set_defaults(run=_cost)


def _cost(arguments: argparse.Namespace) -> int:
    from anyglot_lm.cost import estimate

    name, backbone, rows = _backbone(arguments)
    settings = {
        key: getattr(arguments, key)
        for key in (
            *("preset", "train_old_rows", "lora_rank", "optimizer", "precision", "seq_len", "packs", "checkpointing"),
            *("gpus", "fsdp", "device", "mfu", "tokens"),
        )
    }
    rows = rows if arguments.vocab_size is None else arguments.vocab_size
    cost = estimate(backbone, name=name, vocab_size=rows, **settings)
    print(json.dumps(cost.to_dict()) if arguments.json else cost.describe())
    return 0


def _backbone(arguments: argparse.Namespace) -> tuple[str, Any, int]:
    """Its name, its numbers before expansion, and the rows it has.

    The vocabulary.json of a model folder says how many rows were there before expansion.
    """
    from anyglot_lm.cost import BACKBONES, Backbone
    from anyglot_lm.files import read_json

    if arguments.config is not None:
        if arguments.config not in BACKBONES:
            raise ManifestError(
                f"--config {arguments.config!r}: no such model; use {', '.join(BACKBONES)} or --model DIR"
            )
        backbone = BACKBONES[arguments.config]
        return arguments.config, backbone, backbone.vocab_size
    path = Path(arguments.model)
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    content = read_json(file)
    try:
        rows = Backbone.from_config(content).vocab_size
        if (folder / "vocabulary.json").is_file():
            from anyglot_lm.vocabulary import Vocabulary

            content = {**content, "vocab_size": Vocabulary.load(folder / "vocabulary.json").text_size}
        return folder.resolve().name, Backbone.from_config(content), rows
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}") from error
