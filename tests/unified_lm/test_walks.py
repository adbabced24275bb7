"""Random walks of the grammar: vocabularies, requests and budgets of every kind, ids chosen evenly, with a bias, or by
the engine at temperature 2 from models that were never trained.

`ANYGLOT_WALKS=100000 pytest -s tests/unified_lm/test_walks.py` walks that often in both ways and prints what was said.
Shrinkable examples of the same are in `test_grammar.py`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from anyglot_lm.engine import Sampling, generate
from anyglot_lm.grammar import Request, Span, SpanGrammar
from anyglot_lm.model import new_llama
from anyglot_lm.patterns import PATTERNS, pattern
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

REQUESTS, WALKS = 3, 6  # of each vocabulary, of each request
SAMPLED = 50  # requests that one random model answers
NAMES = ("image", "speech", "music", "video")


def random_block(rng: random.Random, name: str) -> BlockSpec:
    """A block of any pattern; those that cannot end anywhere, and half of the others, have a fixed grid."""
    order = rng.choice(list(PATTERNS))
    quantizers = 1 if order == "first" else rng.randint(1, 4)
    grid: tuple[int, ...] | None = None
    if order == "raster":
        grid = (rng.randint(1, 3), rng.randint(1, 3))
    elif order == "layer_major" or rng.random() < 0.5:
        grid = (rng.randint(1, 4),)
    frames = rng.randint(1, 6) if grid is None and rng.random() < 0.6 else None
    return BlockSpec(name, name, rng.choice([1, 2, 5, 64]), quantizers, order, None, grid, frames)


def random_request(rng: random.Random, vocabulary: Vocabulary, grammar: SpanGrammar) -> Request:
    """Any request that can be fulfilled, with a budget from the tightest to a wide one."""
    names = ["text", *vocabulary.modalities]
    lengths, fewest, most = {}, {}, {}
    for block in vocabulary.blocks:
        if block.length is None and rng.random() < 0.6:
            order = pattern(block.pattern)
            known = order.num_frames(block.max_length, block.num_quantizers) if block.max_length else 6
            fewest[block.modality] = least = rng.randint(1, known)
            if rng.random() < 0.6:
                most[block.modality] = rng.randint(least, known + 2)
            if rng.random() < 0.4:
                lengths[block.modality] = order.num_flat(least, block.num_quantizers) + rng.randint(0, 7)
    min_text = rng.randint(1, 3)
    if rng.random() < 0.4:
        lengths["text"] = min_text + rng.randint(0, 4)
    request = Request(max_length=lengths, min_text=min_text, min_frames=fewest, max_frames=most)
    if rng.random() < 0.5:
        request = replace(request, order=tuple(rng.choices(names, k=rng.randint(1, 4))))
    else:
        usable = set(rng.sample(names, rng.randint(1, len(names))))
        allowed, forbidden = (usable, frozenset()) if rng.random() < 0.5 else (None, frozenset(names) - usable)
        required = frozenset(name for name in usable if rng.random() < 0.4)
        request = replace(request, allowed=allowed, forbidden=forbidden, required=required)
    return replace(request, max_ids=grammar.shortest(request) + rng.choice([0, 1, 2, rng.randint(3, 80)]))


def walk(grammar: SpanGrammar, request: Request, rng: random.Random) -> list[int]:
    """Ids chosen evenly, evenly among ranges, or as a model would that is sure of one thing."""
    by_id, sharp = rng.random() < 0.3, rng.choice([1.0, 1.0, 6.0, 0.1])
    favourite = rng.choice([None, None, 0, -1])  # the first range holds text, the last one starts
    state, ids, draw = grammar.start(request), [], rng.random
    while not grammar.finished(state):
        ranges = grammar.allowed(state)
        if len(ranges) == 1:
            low, high = ranges[0]
        elif favourite is not None and draw() < 0.8:
            low, high = ranges[favourite]
        elif by_id:
            low, high = rng.choices(ranges, [high - low for low, high in ranges])[0]
        else:
            low, high = ranges[int(draw() * len(ranges))]
        ids.append(low if high - low == 1 else min(high - 1, low + int(draw() ** sharp * (high - low))))
        state = grammar.advance(state, ids[-1])
    return ids


def check(grammar: SpanGrammar, request: Request, ids: list[int]) -> list[Span]:
    """The spans of an answer, which is whole, within its budget, decodable, and what the request says."""
    vocabulary = grammar.vocabulary
    assert len(ids) <= request.max_ids, (request, ids)
    assert ids[-1] == vocabulary.controls["eos"] and ids.count(ids[-1]) == 1
    spans = grammar.parse(ids)
    names = [span.modality for span in spans]
    if request.order is not None:
        assert tuple(names) == request.order
    assert set(request.required) <= set(names), (request, names)
    assert not set(request.forbidden) & set(names)
    assert request.allowed is None or set(names) <= set(request.allowed)
    size = 1 + sum(pair == ("text", "text") for pair in pairwise(names))
    for name, content in ((span.modality, span.content) for span in spans):
        if name == "text":
            assert request.min_text <= len(content) <= request.max_length.get("text", request.max_ids)
            assert content.min() >= 0 and content.max() < vocabulary.text_size
            size += len(content)
            continue
        block = vocabulary.block(name)
        assert len(content) == block.num_quantizers
        assert content.min() >= 0 and content.max() < block.codebook_size
        if block.grid is not None:
            assert content.shape[1:] == block.grid
        else:
            frames = content.shape[1]
            assert request.min_frames.get(name, 1) <= frames <= request.max_frames.get(name, frames)
        flat = pattern(block.pattern).num_flat(content[0].size, block.num_quantizers)
        assert flat <= (block.max_length or flat) and (block.grid or flat <= request.max_length.get(name, flat))
        size += flat + 2
    assert size == len(ids)
    return spans


def sample_all(rng: random.Random) -> tuple[SpanGrammar, list[tuple[Request, list[int]]]]:
    """A vocabulary, a random model, and requests of all kinds answered at once, with their answers."""
    vocabulary = random_vocabulary(rng)
    grammar = SpanGrammar(vocabulary)
    requests = [random_request(rng, vocabulary, grammar) for _ in range(SAMPLED)]
    with torch.random.fork_rng():
        torch.manual_seed(rng.getrandbits(32))
        model = new_llama(vocabulary, hidden_size=16, num_layers=1, num_heads=2, max_length=256)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=rng.choice([0.1, 1.0, 5.0]))
    prompts = [[vocabulary.controls["bos"], *(rng.randrange(vocabulary.size) for _ in range(rng.randint(0, 5)))]
               for _ in requests]  # fmt: skip
    hot = dict.fromkeys(["text", *vocabulary.modalities], Sampling(temperature=2.0))
    answers = generate(model, vocabulary, prompts, requests, hot, rng.getrandbits(32), batch_size=rng.choice([7, 64]))
    return grammar, list(zip(requests, answers, strict=True))


def random_vocabulary(rng: random.Random) -> Vocabulary:
    """One to three modalities beside text."""
    return Vocabulary.build(
        rng.choice([1, 3, 40]), *(random_block(rng, name) for name in rng.sample(NAMES, rng.randint(1, 3)))
    )


def walk_all(rng: random.Random) -> tuple[SpanGrammar, list[tuple[Request, list[int]]]]:
    """A vocabulary, and some walks of each of some requests."""
    vocabulary = random_vocabulary(rng)
    grammar = SpanGrammar(vocabulary)
    requests = [random_request(rng, vocabulary, grammar) for _ in range(REQUESTS)]
    return grammar, [(request, walk(grammar, request, rng)) for request in requests for _ in range(WALKS)]


@pytest.mark.parametrize(("way", "share"), [(walk_all, 1.0), (sample_all, 0.4)])
def test_random_walks(way: Callable[[random.Random], Any], share: float) -> None:
    everywhere = os.environ.get("ANYGLOT_WALKS")
    wanted = int(everywhere) if everywhere else int(5000 * share)
    rng, seen, done, began = random.Random(0), Counter[str](), 0, time.process_time()
    while done < wanted:
        grammar, walks = way(rng)
        done += len(walks)
        for request, ids in walks:
            seen["ids"] += len(ids)
            for span in check(grammar, request, ids):
                block = None if span.modality == "text" else grammar.vocabulary.block(span.modality)
                seen["text" if block is None else f"{block.pattern} {block.num_quantizers}"] += 1
    took = time.process_time() - began
    kinds = {f"{name} {k}" for name in PATTERNS for k in ((1,) if name == "first" else (1, 2, 3, 4))} | {"text"}
    assert set(seen) == kinds | {"ids"}, seen
    counts = ", ".join(f"{kind}: {number}" for kind, number in sorted(seen.items()))
    print(f"\n{done} walks in {took:.1f} s of CPU, {done / took:.0f} a second; {counts}")
