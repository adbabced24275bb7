"""`SpanLogitsProcessor` in `model.generate` of transformers: the engine's answers, and nothing that does not parse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyglot_lm.engine import GREEDY, generate
from anyglot_lm.grammar import GrammarError, Request, RequestError, SpanGrammar
from anyglot_lm.hf_processor import SpanLogitsProcessor
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import CheckpointError

VOCABULARY = Vocabulary.build(
    60,
    BlockSpec("image", "i", 16, 2, "raster", grid=(2, 3)),
    BlockSpec("speech", "s", 16, 3, "delay", "first", max_frames=6),
    BlockSpec("music", "m", 16, 2, "frame_major", max_frames=9),
)
GRAMMAR = SpanGrammar(VOCABULARY)
EOS, PAD = VOCABULARY.controls["eos"], VOCABULARY.pad_id
REQUESTS = [
    Request(order=("image",), max_ids=40),
    Request(order=("text", "speech"), max_ids=60, max_length={"text": 9}),
    Request(order=("speech", "music"), max_ids=60, min_frames={"music": 2}, max_frames={"music": 4}),
    Request(max_ids=40),
    Request(required={"image", "text"}, max_ids=50),
    Request(forbidden={"text"}, max_ids=45),
    Request(allowed={"text", "music"}, max_ids=20, min_text=2),
    Request(order=("text",), max_ids=1 + 7),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size + 64,  # a head with more rows than ids
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=VOCABULARY.controls["bos"],
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[61, 63, *rng.integers(0, 60, rng.integers(0, 12)).tolist(), 64] for _ in range(count)]


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def answer_of(ids: Sequence[int]) -> list[int]:
    """Up to eos; what follows must be pad."""
    ids = list(ids)
    stop = ids.index(EOS) + 1
    assert set(ids[stop:]) <= {PAD}
    return ids[:stop]


def check(ids: Sequence[int], request: Request) -> None:
    """A whole answer of the request."""
    assert len(ids) <= request.max_ids and ids[-1] == EOS
    names = [span.modality for span in GRAMMAR.parse(ids)]
    if request.order is not None:
        assert tuple(names) == request.order
    assert set(request.required) <= set(names) and not set(request.forbidden) & set(names)
    assert request.allowed is None or set(names) <= set(request.allowed)


def greedy(model: Any, rows: list[list[int]], requests: list[Request]) -> list[list[int]]:
    return generate(model, VOCABULARY, rows, requests, dict.fromkeys(("text", *VOCABULARY.modalities), GREEDY))


def test_greedy_equals_the_engine(model: LlamaForCausalLM) -> None:
    rows = prompts(16)
    requests = [REQUESTS[i % len(REQUESTS)] for i in range(16)]
    processor = SpanLogitsProcessor(VOCABULARY, requests)
    inputs = padded(rows)
    found = model.generate(
        **inputs, logits_processor=[processor], max_new_tokens=processor.max_new_tokens, do_sample=False
    )
    width = inputs["input_ids"].shape[1]
    assert [answer_of(ids) for ids in found[:, width:].tolist()] == greedy(model, rows, requests)


@pytest.mark.parametrize("cache", [True, False])
def test_whatever_is_sampled_parses(model: LlamaForCausalLM, cache: bool) -> None:
    requests = [REQUESTS[i % len(REQUESTS)] for i in range(64)]
    processor = SpanLogitsProcessor(VOCABULARY, requests)
    inputs = padded(prompts(64, seed=3))
    torch.manual_seed(5)
    found = model.generate(
        **inputs,
        logits_processor=[processor],
        max_new_tokens=processor.max_new_tokens,
        do_sample=True,
        temperature=2.0,
        top_k=30,
        use_cache=cache,
    )
    said: set[str] = set()
    for ids, request in zip(found[:, inputs["input_ids"].shape[1] :].tolist(), requests, strict=True):
        check(answer_of(ids), request)
        said |= {span.modality for span in GRAMMAR.parse(answer_of(ids))}
    assert said == {"text", "image", "speech", "music"}


def test_several_answers_of_a_prompt_and_a_begun_answer(model: LlamaForCausalLM) -> None:
    image = VOCABULARY.span("image", np.arange(12).reshape(2, 2, 3)).tolist()
    rows = [[61, 63, 1, 64, *image[:5]], [61, 63, 1, 2, 3, 64]]
    inputs = padded(rows)
    width = inputs["input_ids"].shape[1]
    begun = [width - 5, width]
    requests = [REQUESTS[0], REQUESTS[1]]
    processor = SpanLogitsProcessor(VOCABULARY, requests, [begun[0]] * 3 + [begun[1]] * 3)
    found = model.generate(
        **inputs, logits_processor=[processor], max_new_tokens=60, do_sample=True, num_return_sequences=3
    )
    for i, ids in enumerate(found.tolist()):
        answer = answer_of(ids[begun[i // 3] :])
        check(answer, requests[i // 3])
        assert i >= 3 or answer[:5] == image[:5]


def test_only_legal_scores_survive_and_the_input_is_not_changed() -> None:
    processor = SpanLogitsProcessor(VOCABULARY, [REQUESTS[0], REQUESTS[7]])
    scores = torch.randn(2, VOCABULARY.size + 3)
    before = scores.clone()
    ids = torch.tensor([[61, 64], [61, 64]])
    found = processor(ids, scores)
    assert torch.equal(scores, before)
    assert found[0].isfinite().nonzero().flatten().tolist() == [VOCABULARY.block("image").start_id]
    assert found[1].isfinite().nonzero().flatten().tolist() == list(range(60))
    assert torch.equal(found[1, :60], before[1, :60])
    after = processor(torch.cat([ids, torch.tensor([[VOCABULARY.block("image").start_id], [5]])], 1), scores)
    low, high = VOCABULARY.block("image").codebook_slice(0)
    assert after[0].isfinite().nonzero().flatten().tolist() == list(range(low, high))
    assert after[1].isfinite().nonzero().flatten().tolist() == [*range(60), EOS]


def test_done_rows_write_pad_only() -> None:
    processor = SpanLogitsProcessor(VOCABULARY, Request(max_ids=1))
    ids = torch.tensor([[61, 64]])
    for expected in (EOS, PAD, PAD):
        scores = processor(ids, torch.randn(1, VOCABULARY.size))
        assert scores.isfinite().nonzero()[:, 1].tolist() == [expected]
        ids = torch.cat([ids, torch.tensor([[expected]])], 1)


def test_beams_and_second_calls_are_one_clear_error(model: LlamaForCausalLM) -> None:
    inputs = padded(prompts(2))
    with pytest.raises(GrammarError, match=r"use greedy decoding or sampling \(num_beams=1\)"):
        processor = SpanLogitsProcessor(VOCABULARY, REQUESTS[3])
        model.generate(**inputs, logits_processor=[processor], max_new_tokens=40, num_beams=4, do_sample=False)
    processor = SpanLogitsProcessor(VOCABULARY, REQUESTS[0])
    model.generate(**inputs, logits_processor=[processor], max_new_tokens=20, do_sample=False)
    with pytest.raises(GrammarError, match="new SpanLogitsProcessor for each call of generate"):
        model.generate(**inputs, logits_processor=[processor], max_new_tokens=20, do_sample=False)


def test_reordered_rows_are_found() -> None:
    processor = SpanLogitsProcessor(VOCABULARY, Request(order=("text",)))
    ids, scores = torch.tensor([[61, 64], [61, 64]]), torch.zeros(2, VOCABULARY.size)
    processor(ids, scores)
    ids = torch.cat([ids, torch.tensor([[1], [2]])], 1)
    processor(ids, scores)
    with pytest.raises(GrammarError, match="row 0 does not go on from the step before: rows were reordered"):
        processor(torch.cat([ids.flip(0), torch.tensor([[3], [3]])], 1), scores)


def test_ids_that_were_not_allowed_are_found() -> None:
    processor = SpanLogitsProcessor(VOCABULARY, Request(order=("text",)))
    processor(torch.tensor([[61, 64]]), torch.zeros(1, VOCABULARY.size))
    with pytest.raises(GrammarError, match="row 0: id 63 is not legal"):
        processor(torch.tensor([[61, 64, 63]]), torch.zeros(1, VOCABULARY.size))


def test_wrong_use() -> None:
    ids, scores = torch.tensor([[61, 64]] * 3), torch.zeros(3, VOCABULARY.size)
    with pytest.raises(RequestError, match="order names 'video'"):
        SpanLogitsProcessor(VOCABULARY, Request(order=("video",)))
    with pytest.raises(RequestError, match="requests is empty"):
        SpanLogitsProcessor(VOCABULARY, [])
    with pytest.raises(RequestError, match="3 rows and 2 requests"):
        SpanLogitsProcessor(VOCABULARY, REQUESTS[:2])(ids, scores)
    with pytest.raises(RequestError, match=r"prompt_length \[9, 9, 9\] for 3 rows of 2 columns"):
        SpanLogitsProcessor(VOCABULARY, REQUESTS[0], 9)(ids, scores)
    with pytest.raises(CheckpointError, match="the model has 100 logits and the vocabulary 256 ids"):
        SpanLogitsProcessor(VOCABULARY, REQUESTS[0])(ids, scores[:, :100])
