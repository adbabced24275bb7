"""Rows that come and go: joining, cancelling, candidates, memory; none changes what another says."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from anyglot_lm.engine import Engine, GenerationError, Guidance, Memory, Sampling, generate, row_seeds
from anyglot_lm.grammar import Request, SpanGrammar
from anyglot_lm.int8 import quantize_int8
from anyglot_lm.packed import PackedLM
from anyglot_lm.tuning import Lora, choose_trained
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(
    60,
    BlockSpec("image", "i", 16, 2, "raster", grid=(3, 4)),
    BlockSpec("speech", "s", 16, 3, "delay", "first", max_frames=6),
)
REQUESTS = [
    Request(order=("image",), max_ids=40),
    Request(order=("text", "speech"), max_ids=60, max_length={"text": 9}),
    Request(max_ids=40),
    Request(order=("image", "text"), max_ids=60, max_length={"text": 5}),
]


@functools.cache
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY.size, **shape, **more)).eval()


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[61, 63, *rng.integers(0, 60, rng.integers(0, 12)).tolist(), 64] for _ in range(count)]


def alone(prompt: list[int], request: Request, seed: int, **more: Any) -> list[int]:
    return generate(tiny_llama(), VOCABULARY, [prompt], request, seed=[seed], **more)[0]


def engine(**options: Any) -> Engine:
    return Engine(tiny_llama(), VOCABULARY, **{"streams": 6, "capacity": 100, **options})


def test_rows_that_come_at_any_time_say_what_they_say_alone() -> None:
    rng = np.random.default_rng(5)
    machine, made, cancelled = engine(), [], set()
    for i, prompt in enumerate(prompts(40)):
        guided = i % 5 == 0
        more: dict[str, Any] = {"unconditional": [61, 63, 64], "scales": {"image": 3.0}} if guided else {}
        made.append(machine.submit(prompt, REQUESTS[i % 4], seed=i, **more))
        for _ in range(int(rng.integers(0, 4))):
            machine.step(most=int(rng.integers(1, 9)))
        if i % 7 == 3:
            victim = made[int(rng.integers(0, len(made)))]
            if not victim.done:
                machine.cancel(victim)
                cancelled.add(victim)
    while machine.busy:
        machine.step()
    assert not machine.cache.lengths and len(cancelled) >= 2
    for i, (row, prompt) in enumerate(zip(made, prompts(40), strict=True)):
        guidance = {"guidance": Guidance([[61, 63, 64]], {"image": 3.0})} if i % 5 == 0 else {}
        expected = alone(prompt, REQUESTS[i % 4], i, **guidance)
        assert row.done and row.ids == (expected[: len(row.ids)] if row in cancelled else expected), i


def test_candidates_share_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = engine(streams=8)
    passes = []
    real = machine.decoder.prefill
    monkeypatch.setattr(machine.decoder, "prefill", lambda c, f, rows: passes.append(len(rows)) or real(c, f, rows))
    seeds = row_seeds(3, 8)
    rows = [machine.submit([61, 63, 5, 6, 64], REQUESTS[0], seed=s) for s in seeds]
    while machine.busy:
        machine.step()
    assert passes == [1] and len({tuple(row.ids) for row in rows}) > 4
    assert [row.ids for row in rows] == [alone([61, 63, 5, 6, 64], REQUESTS[0], s) for s in seeds]


def test_memory_goes_on_where_the_prompts_part() -> None:
    machine = engine()
    first = machine.submit([61, 63, 5, 6, 64], REQUESTS[1], seed=1, keep=True)
    while machine.busy:
        machine.step()
    assert isinstance(first.memory, Memory)
    longer = [61, 63, 5, 6, 64, *first.ids[:-1], 63, 9, 64]
    assert first.memory.shared(longer) >= 5 + len(first.ids) - 4
    assert first.memory.shared([61, 63, 7, 6, 64]) == 2 and first.memory.shared([61]) == 0
    for prompt in (longer, [61, 63, 7, 6, 64], [61, 63], [62, 1]):
        row = machine.submit(prompt, REQUESTS[3], seed=2, memory=first.memory)
        while machine.busy:
            machine.step()
        assert row.ids == alone(prompt, REQUESTS[3], 2)


def test_certain_steps_are_those_of_one_at_a_time() -> None:
    grammar, rng = SpanGrammar(VOCABULARY), np.random.default_rng(0)
    longest = 0
    for request in [*REQUESTS, Request(order=("speech", "image"), max_ids=70, min_frames={"speech": 4})]:
        state = grammar.start(request)
        while not grammar.finished(state):
            certain = grammar.certain(state, 7)
            longest = max(longest, len(certain))
            assert 1 <= len(certain) <= 7
            for ranges in certain:
                assert grammar.allowed(state) == ranges
                low, high = ranges[int(rng.integers(0, len(ranges)))]
                state = grammar.advance(state, int(rng.integers(low, high)))
    assert longest == 7


def test_a_picture_is_written_without_looking() -> None:
    machine = engine()
    row = machine.submit([61, 63, 64], REQUESTS[0], seed=1)
    lengths = []
    while machine.busy:
        machine.step(most=10)
        lengths.append(len(row.ids))
    assert lengths == [1, 11, 21, 27], "start; 24 codes; end and eos are forced"


def test_int8_weights() -> None:
    model = LlamaForCausalLM(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    quantize_int8(model)
    for ids in generate(model, VOCABULARY, prompts(4), REQUESTS[1], seed=1):
        assert [span.modality for span in SpanGrammar(VOCABULARY).parse(ids)] == ["text", "speech"]


def test_too_long_for_the_engine() -> None:
    with pytest.raises(GenerationError, match="the prompt has 90 ids and the answer up to 27, but the model has 100"):
        engine().submit([1] * 90, REQUESTS[0])
    with pytest.raises(GenerationError, match="guidance needs two streams"):
        engine(streams=1).submit([1], REQUESTS[0], unconditional=[1])
    with pytest.raises(GenerationError, match="unknown modality 'video'"):
        engine().submit([1], REQUESTS[0], sampling={"video": Sampling()})


def test_a_broken_model_empties_the_engine() -> None:
    """Logits that are not numbers, in a slice at the very end of the rows; nothing of them is left for later rows."""
    vocabulary = Vocabulary.build(119, BlockSpec("image", "i", 128 + 2, grid=(3, 4)))
    assert vocabulary.size == vocabulary.block("image").stop_id
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": vocabulary.size})
    model = LlamaForCausalLM(config)
    machine = Engine(model, vocabulary, streams=2)
    norm = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
        rows = [machine.submit([1], Request(order=("image",)), keep=True) for _ in range(3)]
        with pytest.raises(GenerationError, match="not finite"):
            while machine.busy:
                machine.step()
        assert not machine.busy and not machine.cache.lengths and all(row.done for row in rows)
        for row in rows:
            machine.cancel(row)
        model.model.norm.weight.copy_(norm)
    again = machine.submit([1], Request(order=("image",)), seed=4)
    while machine.busy:
        machine.step()
    assert again.ids == generate(model, vocabulary, [[1]], Request(order=("image",)), seed=[4])[0]


def test_an_error_while_joining_leaves_no_half_made_row(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = engine()
    rows = [machine.submit(prompt, REQUESTS[0], seed=i) for i, prompt in enumerate(prompts(3))]
    real, calls = machine.decoder.prefill, []

    def fails(cache: Any, first: int, given: list[list[int]]) -> torch.Tensor:
        calls.append(1)
        raise MemoryError

    monkeypatch.setattr(machine.decoder, "prefill", fails)
    with pytest.raises(MemoryError):
        machine.step()
    for row in rows:
        machine.cancel(row)
    monkeypatch.setattr(machine.decoder, "prefill", real)
    row = machine.submit(prompts(1)[0], REQUESTS[0], seed=0)
    while machine.busy:
        machine.step()
    assert calls == [1] and row.ids == alone(prompts(1)[0], REQUESTS[0], 0)


def test_settings_of_a_row_are_its_own() -> None:
    machine, made = engine(), []
    settings = [
        {"text": Sampling(0.0, repetition_penalty=1e4)},
        {"text": Sampling(1.0)},
        {"text": Sampling(2.0, top_k=5)},
        None,
    ]
    request = Request(order=("text",), max_ids=30, min_text=20)
    for i, prompt in enumerate(prompts(8)):
        made.append(machine.submit(prompt, request, sampling=settings[i % 4], seed=i))
    while machine.busy:
        machine.step()
    for i, (row, prompt) in enumerate(zip(made, prompts(8), strict=True)):
        assert row.ids == alone(prompt, request, i, sampling=settings[i % 4])
        assert row.seen_V is None and (i % 4 or len(set(row.ids[:20])) == 20)


def test_rows_stay_shorter_than_an_attention_window() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCABULARY.size, num_key_value_heads=1, sliding_window=30, **shape)
    machine = Engine(MistralForCausalLM(config).eval(), VOCABULARY, streams=1)
    assert machine.capacity == 30
    with pytest.raises(GenerationError, match="but the model has 30 positions"):
        machine.submit([1] * 20, REQUESTS[0])


def test_a_lora_model_in_bf16_generates_while_it_trains() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "attn_implementation": "sdpa"}))
    choose_trained(model, "lora", first_new=VOCABULARY.text_size, lora=Lora(r=2))
    model.to(torch.bfloat16)
    PackedLM(model, VOCABULARY)
    for ids in generate(model, VOCABULARY, prompts(3), REQUESTS[1]):
        assert [span.modality for span in SpanGrammar(VOCABULARY).parse(ids)] == ["text", "speech"]
