"""Layers in plain operations, on a cache of slots, give what transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from anyglot_lm.decoder import HFDecoder, PlainDecoder, decoder_of, is_plain
from anyglot_lm.int8 import Int8Linear, quantize_int8
from anyglot_lm.tuning import Lora, choose_trained, output_rows

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama, yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
}


def made(name: str, **more: Any) -> PreTrainedModel:
    config_class, model_class, special = KINDS[name]
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = config_class(**{**shape, **heads, "initializer_range": 0.2, **special, **more})
    model = model_class(config).eval()
    with torch.no_grad():  # biases and scales that are not those of the start
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def whole(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("way", [PlainDecoder, HFDecoder])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_slots_that_grow_at_their_own_pace(kind: str, way: Any) -> None:
    """Prompts of different lengths, steps, one that joins, one that leaves, one that goes on from what it remembers."""
    model = made(kind)
    assert is_plain(model)
    decoder = way(model)
    cache = decoder.new_cache(5, 40)
    generator = torch.Generator().manual_seed(1)
    said = [torch.randint(0, 50, (n,), generator=generator).tolist() for n in (7, 3, 7)]
    found = decoder.prefill(cache, cache.open(3), said)

    def check() -> None:
        for row, ids in zip(found, said, strict=True):
            torch.testing.assert_close(row, whole(model, ids)[-1], rtol=1e-4, atol=1e-4)

    def step() -> torch.Tensor:
        new = torch.randint(0, 50, (len(said),), generator=generator)
        for ids, token in zip(said, new.tolist(), strict=True):
            ids.append(token)
        return decoder.step(cache, new)

    check()
    for _ in range(3):
        found = step()
        check()
    remembered, length = cache.read(1), cache.lengths[1]
    assert length == 6 and remembered.shape[3] == 6
    assert cache.close(0) == 2
    said = [said[2], said[1]]
    said.append([1, 2, 3, 4])
    joined = decoder.prefill(cache, cache.open(1), [said[2]])
    found = torch.cat([found[[2, 1]], joined])
    check()
    slot = cache.open(1)
    cache.copy(0, slot)
    said.append(said[0][:])
    found = step()
    check()
    slot = cache.open(1)
    cache.restore(slot, remembered[..., :5, :])
    said.append([*said[1][:5], 9, 8, 7])
    found = torch.cat([found, decoder.prefill(cache, slot, [[9, 8, 7]])])
    check()
    found = step()
    check()


@torch.inference_mode()
def test_streams_of_equal_length_need_no_mask() -> None:
    model = made("llama")
    decoder = decoder_of(model)
    cache = decoder.new_cache(2, 20)
    said = [[1, 2, 3], [4, 5, 6]]
    decoder.prefill(cache, cache.open(2), said)
    found = decoder.step(cache, torch.tensor([7, 8]))
    assert cache.mask is None
    for row, ids in zip(found, ([1, 2, 3, 7], [4, 5, 6, 8]), strict=True):
        torch.testing.assert_close(row, whole(model, ids)[-1], rtol=1e-4, atol=1e-4)


def test_who_is_plain() -> None:
    assert isinstance(decoder_of(made("qwen3")), PlainDecoder)
    assert not is_plain(made("mistral", sliding_window=4))
    assert not is_plain(made("llama", hidden_act="gelu"))
    tuned = made("llama")
    choose_trained(tuned, "lora", first_new=40, lora=Lora(r=2))
    assert isinstance(decoder_of(tuned), HFDecoder)


@torch.inference_mode()
def test_int8() -> None:
    model, exact = made("qwen2"), made("qwen2")
    quantize_int8(model)
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear) and head.weight.dtype == torch.int8 and is_plain(model)
    ids = torch.randint(0, 50, (1, 12))
    expected = exact(input_ids=ids).logits
    found = model(input_ids=ids).logits
    assert 0 < (found - expected).square().mean().sqrt() < 0.05 * expected.std()
    rows, exactly = output_rows(model), exact.get_output_embeddings().weight
    assert isinstance(rows, torch.Tensor) and (rows - exactly).abs().max() <= 0.51 * exactly.abs().max() / 127
    decoder = decoder_of(model)
    cache = decoder.new_cache(1, 20)
    hidden = decoder.prefill(cache, cache.open(1), [ids[0].tolist()])
    assert (head(hidden)[0] - found[0, -1]).square().mean().sqrt() < 0.02 * expected.std()  # products are in bfloat16


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_steps() -> None:
    model = made("llama")
    decoder = decoder_of(model, compile=True)
    cache = decoder.new_cache(3, 40)
    said = [[1, 2, 3], [4, 5]]
    decoder.prefill(cache, cache.open(2), said)
    for token in range(10, 16):
        for ids in said:
            ids.append(token)
        found = decoder.step(cache, torch.tensor([token, token]))
        for row, ids in zip(found, said, strict=True):
            torch.testing.assert_close(row, whole(model, ids)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_steps_of_any_length_compile_once() -> None:
    model = made("llama")
    decoder = decoder_of(model, compile=True)
    cache = decoder.new_cache(3, 60)
    decoder.prefill(cache, cache.open(2), [[1, 2, 3], [4, 5]])
    for _ in range(2):
        decoder.step(cache, torch.tensor([6, 7]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(40):
            decoder.step(cache, torch.tensor([6, 7]))
