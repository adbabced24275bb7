"""Attention of training on a CPU: what sdpa gives, packed documents kept apart, and used where it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from anyglot_lm import attention
from anyglot_lm.engine import generate
from anyglot_lm.grammar import Request
from anyglot_lm.model import assert_no_leak, hidden_states
from anyglot_lm.packed import PackedLM
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(60, BlockSpec("image", "i", 16, grid=(2, 2)))
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY.size,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "attn_implementation": "sdpa",
}


def backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def no_sdpa(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("sdpa was called")


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("packed", [True, False])
def test_forward_and_gradients_are_those_of_sdpa(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, VOCABULARY.size, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).repeat(2, 1)
    if packed:
        positions = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    exact = backbone(name)
    expected = hidden_states(exact.base_model, ids, positions)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    model = backbone(name)
    attention.faster_on_cpu(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", no_sdpa)
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_states(model.base_model, ids, positions)
    (found * weights).sum().backward()
    assert F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.999
    for p, wanted in zip(model.base_model.parameters(), exact.base_model.parameters(), strict=True):
        assert p.grad is not None and wanted.grad is not None
        assert F.cosine_similarity(p.grad.flatten(), wanted.grad.flatten(), dim=0) > 0.995


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_documents_do_not_leak_in_bf16(name: str) -> None:
    model = backbone(name)
    attention.faster_on_cpu(model)

    def in_bf16(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return hidden_states(decoder, ids, positions)

    assert_no_leak(model, forward=in_bf16, tolerance=0.05)

    def wrong(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return decoder(input_ids=ids, use_cache=False).last_hidden_state

    with pytest.raises(Exception, match="leak into each other"):
        assert_no_leak(model, forward=wrong, tolerance=0.05)


def test_float32_and_long_rows_stay_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = backbone("llama"), backbone("llama")
    attention.faster_on_cpu(model)
    ids, positions = torch.randint(0, 60, (1, 12)), torch.arange(12)[None]
    with torch.no_grad():
        expected = hidden_states(plain.base_model, ids, positions)
        assert torch.equal(hidden_states(model.base_model, ids, positions), expected)
        monkeypatch.setattr(attention, "MOST_POSITIONS", 11)
        monkeypatch.setattr(attention, "_plain", no_sdpa)
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states(model.base_model, ids, positions)


def test_a_model_in_training_still_generates() -> None:
    model = backbone("llama")
    request = Request(order=("image",), max_ids=20)
    before = generate(model, VOCABULARY, [[1, 2]], request)
    PackedLM(model, VOCABULARY)
    assert model.config._attn_implementation == attention.NAME
    assert generate(model, VOCABULARY, [[1, 2]], request) == before


def test_other_implementations_are_left_alone() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "attn_implementation": "eager"}))
    attention.faster_on_cpu(model)
    assert model.config._attn_implementation == "eager"
