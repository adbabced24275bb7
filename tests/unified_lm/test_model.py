"""Backbones: seeded Llamas, pretrained models with more rows, and packed rows that do not leak."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from anyglot_lm.model import assert_no_leak, expand_vocabulary, hidden_states, new_llama, start_from_codebooks
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import AnyglotError

TEXT = 150
VOCABULARY = Vocabulary.build(TEXT, BlockSpec("image", "i", 32, grid=(2, 2)))
BACKBONES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def pretrained(name: str, *, tied: bool = True, rows: int = TEXT) -> PreTrainedModel:
    config_class, model_class = BACKBONES[name]
    config = config_class(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    model: PreTrainedModel = model_class(config).eval()
    return model


def test_same_seed_same_bytes_and_global_state_untouched() -> None:
    before = torch.get_rng_state()
    a, b, c = (new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.state_dict() for m in (a, b, c)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[2][name])
    assert a.get_input_embeddings().weight is a.get_output_embeddings().weight
    assert a.config.vocab_size == VOCABULARY.size and a.config.intermediate_size == 64
    assert a.config.eos_token_id == VOCABULARY.controls["eos"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_expansion_keeps_every_old_bit(name: str, tied: bool) -> None:
    model = pretrained(name, tied=tied)
    ids = torch.randint(0, TEXT, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    old = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    state = torch.get_rng_state()
    expand_vocabulary(model, VOCABULARY, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (new[0] is new[1]) == tied
    for before, after in zip(old, new, strict=True):
        assert len(after) == VOCABULARY.size and VOCABULARY.size % 128 == 0
        assert torch.equal(after[:TEXT], before)
        assert len(after[TEXT:].unique(dim=0)) == VOCABULARY.size - TEXT
        assert after[TEXT:].std().item() == pytest.approx(before.std().item(), rel=0.2)
    assert model.config.vocab_size == VOCABULARY.size
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :TEXT], logits)
        assert model(input_ids=VOCABULARY.size - 1 - ids % 100).logits.isfinite().all()


def test_expansion_is_seeded() -> None:
    model = pretrained("llama", tied=False)
    weights = model.state_dict()
    rows = []
    for seed in (0, 0, 1):
        again = pretrained("llama", tied=False)
        again.load_state_dict(weights)
        expand_vocabulary(again, VOCABULARY, seed=seed)
        rows.append(again.get_input_embeddings().weight)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_vocabulary_with_too_little_text_is_refused() -> None:
    model = pretrained("llama", rows=TEXT + 1)
    with pytest.raises(AnyglotError, match="has 151 rows but the vocabulary keeps only 150 text ids; build"):
        expand_vocabulary(model, VOCABULARY)


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_documents_do_not_leak(name: str) -> None:
    model = pretrained(name).train()
    assert_no_leak(model)
    assert model.training, "the mode comes back"


def test_a_leak_is_found() -> None:
    model = pretrained("llama")

    def one_document(**inputs: Any) -> Any:
        ids = inputs["input_ids"]
        return model.base_model(**{**inputs, "position_ids": torch.arange(ids.shape[1])[None]})

    leaking = SimpleNamespace(
        training=False,
        eval=lambda: None,
        train=lambda mode: None,
        base_model=one_document,
        get_input_embeddings=model.get_input_embeddings,
    )
    with pytest.raises(AnyglotError, match="leak into each other .*; use an attention implementation"):
        assert_no_leak(leaking)  # type: ignore[arg-type]


def test_hidden_states_of_packed_rows() -> None:
    model = pretrained("qwen3")
    ids = torch.randint(0, TEXT, (2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        packed = hidden_states(model.base_model, ids, positions)
        alone = hidden_states(model.base_model, ids[:1, 5:], positions[:1, 5:])
    assert packed.shape == (2, 8, 32)
    torch.testing.assert_close(packed[:1, 5:], alone, rtol=0, atol=1e-5)


def test_untied_rows_are_larger_than_the_head() -> None:
    model = new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2, tied=False)
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert rows is not head
    assert 0.9 < rows.std().item() < 1.1 and head.std().item() < 0.1


def test_rows_start_with_the_geometry_of_their_codebooks() -> None:
    vocabulary = Vocabulary.build(
        TEXT,
        BlockSpec("image", "i", 32, grid=(2, 2)),
        BlockSpec("speech", "s", 64, num_quantizers=2, pattern="frame_major"),
    )
    model = new_llama(vocabulary, hidden_size=64, num_layers=1, num_heads=2, tied=False)
    before = model.get_input_embeddings().weight.clone()
    head = model.get_output_embeddings().weight.clone()
    codebooks = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0)) * 5 + 7
    start_from_codebooks(model, vocabulary, {"speech": codebooks})
    after = model.get_input_embeddings().weight
    speech = vocabulary.block("speech")
    changed = (after != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == list(range(speech.codebook_slice(0)[0], speech.codebook_slice(1)[1]))
    assert torch.equal(model.get_output_embeddings().weight, head)
    for index in range(2):
        first, last = speech.codebook_slice(index)
        rows = after[first:last].detach()
        assert abs((rows.std() / before[first:last].std()).item() - 1) < 0.15
        near, kept = torch.pdist(codebooks[index]), torch.pdist(rows)
        assert float(torch.corrcoef(torch.stack([near, kept]))[0, 1]) > 0.6
        lost = torch.pdist(before[first:last].detach())
        assert abs(float(torch.corrcoef(torch.stack([near, lost]))[0, 1])) < 0.2
    with pytest.raises(AnyglotError, match=r"speech.*needs \[2, 64\]"):
        start_from_codebooks(model, vocabulary, {"speech": codebooks[:1]})
