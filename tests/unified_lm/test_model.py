"""Backbones: seeded Llamas, pretrained models with more rows, and packed rows that do not leak."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.exc import InductorError
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from anyglot_lm.model import (
    assert_no_leak,
    expand_vocabulary,
    extend_vocabulary,
    hidden_states,
    new_llama,
    start_from_codebooks,
)
from anyglot_lm.rows import new_rows
from anyglot_lm.vocabulary import BlockSpec, Vocabulary, id_map
from anyglot_tokenizers.errors import AnyglotError, UnsupportedError

TEXT = 150
VOCABULARY = Vocabulary.build(TEXT, BlockSpec("image", "i", 32, grid=(2, 2)))
BACKBONES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm2": (LlamaConfig, LlamaForCausalLM),  # grouped heads, 3 of them
    "mistral": (MistralConfig, MistralForCausalLM),
}


def pretrained(
    name: str, *, tied: bool = True, rows: int = TEXT, attention: str = "sdpa", **more: Any
) -> PreTrainedModel:
    config_class, model_class = BACKBONES[name]
    shape = {"num_attention_heads": 3, "hidden_size": 48} if name == "smollm2" else {}
    config = config_class(
        **{
            "vocab_size": rows,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "attn_implementation": attention,
            **shape,
            **more,
        }
    )
    model: PreTrainedModel = model_class(config).eval()
    return model


def test_normalised_queries_and_keys() -> None:
    model = new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2, qk_norm=True).eval()
    assert_no_leak(model)
    plain = new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2)
    more = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {name.split(".")[-2] for name in more} == {"q_norm", "k_norm"}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[0].self_attn, name).weight.mul_(7)
        torch.testing.assert_close(model(ids).logits, before)


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


@pytest.mark.parametrize("init", ["random", "mean", "covariance", "codebook"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm2"])
def test_expansion_keeps_every_old_bit(name: str, tied: bool, init: Any) -> None:
    model = pretrained(name, tied=tied)
    ids = torch.randint(0, TEXT, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    old = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    codebooks = {"image": torch.randn(1, 32, 4)}
    state = torch.get_rng_state()
    expand_vocabulary(model, VOCABULARY, init=init, codebooks=codebooks, head_noise=1.0, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (new[0] is new[1]) == tied
    for before, after in zip(old, new, strict=True):
        assert len(after) == VOCABULARY.size and VOCABULARY.size % 128 == 0
        assert torch.equal(after[:TEXT], before)
        assert len(after[TEXT:].unique(dim=0)) == VOCABULARY.size - TEXT
        assert after[TEXT:].std().item() == pytest.approx(before.std().item(), rel=0.2)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY.size
    assert (model.config.eos_token_id, model.generation_config.pad_token_id) == (TEXT + 2, TEXT)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :TEXT], logits)
        assert model(input_ids=VOCABULARY.size - 1 - ids % 100).logits.isfinite().all()


def correlated(rows: int, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator) + 2


def test_covariance_rows_have_the_covariance_of_the_old_ones() -> None:
    vocabulary = Vocabulary.build(TEXT, BlockSpec("image", "i", 4000, grid=(2, 2)), BlockSpec("speech", "s", 4000))
    known = correlated(4000)
    wanted = torch.cov(known.T)
    drawn = {}
    for init in ("covariance", "mean"):
        rows = new_rows(known, vocabulary, TEXT, init=init, noise=0.5, deviation=0.02)  # type: ignore[arg-type]
        for block in vocabulary.blocks:
            own = rows[block.first_id - TEXT : block.stop_id - TEXT]
            torch.testing.assert_close(own.mean(0), known.mean(0), atol=0.3, rtol=0)
            drawn[init, block.modality] = torch.cov(own.T) / 0.25
    for modality in ("image", "speech"):
        assert (drawn["covariance", modality] - wanted).norm() < 0.15 * wanted.norm()
        assert (drawn["mean", modality] - wanted).norm() > 0.5 * wanted.norm()
        assert (drawn["mean", modality].diagonal() / wanted.diagonal() - 1).abs().max() < 0.15


def test_codebook_rows_lie_like_their_entries_around_the_old_mean() -> None:
    vocabulary = Vocabulary.build(TEXT, BlockSpec("speech", "s", 64, num_quantizers=2), BlockSpec("image", "i", 32))
    known, codebooks = correlated(500, 64), {"speech": torch.randn(3, 64, 8) * 5 + 7}
    codebooks["speech"][1, 10:20] = 7  # dead entries
    rows = new_rows(known, vocabulary, TEXT, init="codebook", noise=1.0, deviation=0.02, codebooks=codebooks)
    plain = new_rows(known, vocabulary, TEXT, init="mean", noise=1.0, deviation=0.02)
    speech, image = vocabulary.block("speech"), vocabulary.block("image")
    assert torch.equal(
        rows[image.end_id - TEXT : image.stop_id - TEXT], plain[image.end_id - TEXT : image.stop_id - TEXT]
    )
    low, high = (i - TEXT for i in speech.codebook_slice(0))
    scaled = (rows[low:high] - known.mean(0)) / known.std(0)
    assert scaled.std().item() == pytest.approx(1, rel=0.15) and scaled.mean().abs() < 0.1
    kept = torch.corrcoef(torch.stack([torch.pdist(codebooks["speech"][0]), torch.pdist(scaled)]))[0, 1]
    assert kept > 0.6
    low, high = (i - TEXT for i in speech.codebook_slice(1))
    assert len(rows[low:high].unique(dim=0)) == 64


def test_rows_of_a_modality_do_not_depend_on_the_others() -> None:
    known = correlated(200)
    image, speech = BlockSpec("image", "i", 40), BlockSpec("speech", "s", 50)
    one, two = Vocabulary.build(TEXT, speech), Vocabulary.build(TEXT, image, speech)
    drawn = []
    for vocabulary in (one, two):
        rows = new_rows(known, vocabulary, TEXT, init="covariance", noise=1.0, deviation=0.02)
        block = vocabulary.block("speech")
        drawn.append(rows[block.end_id - TEXT : block.stop_id - TEXT])
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-5, atol=1e-4)


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


@pytest.mark.parametrize("tied", [True, False])
def test_controls_start_from_words_of_the_model(tied: bool) -> None:
    model = pretrained("llama", tied=tied)
    expand_vocabulary(model, VOCABULARY, controls_from={"eos": 3, "user": [5, 6]})
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        spread = weight[:TEXT].std().item()
        for name, wanted in (("eos", weight[3]), ("user", weight[[5, 6]].mean(0))):
            got = weight[VOCABULARY.controls[name]]
            assert 0 < (got - wanted).abs().max().item() < 0.1 * spread
        assert (weight[VOCABULARY.controls["bos"]] - weight[3]).abs().max().item() > 0.1 * spread
    for wrong in ({"start": 3}, {"eos": TEXT}, {"eos": []}):
        with pytest.raises(AnyglotError, match="the controls are pad, bos, eos, user, assistant"):
            expand_vocabulary(pretrained("llama"), VOCABULARY, controls_from=wrong)


@pytest.mark.parametrize("tied", [True, False])
def test_rare_text_makes_room_for_codes(tied: bool) -> None:
    model = pretrained("qwen3", tied=tied, rows=300)
    vocabulary = Vocabulary.build(200, BlockSpec("image", "i", 32, grid=(2, 2)))
    ids = torch.randint(0, 200, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        expected = model.get_input_embeddings().weight[250].clone()
        expand_vocabulary(model, vocabulary, overwrite=True, controls_from={"eos": 250})
        after = model(input_ids=ids).logits
    assert torch.equal(after[..., :200], before[..., :200])
    assert torch.equal(after[..., 256:], before[..., 256:]), "rows beyond the vocabulary are left"
    assert not (after[..., 200:256] == before[..., 200:256]).all(-1).all(-1).any()
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 300
    got = model.get_input_embeddings().weight[vocabulary.controls["eos"]]
    assert (got - expected).abs().max().item() < 0.1 * expected.std().item(), "an id that was overwritten itself"
    for text_size, rows in ((300, 300), (200, 255)):
        with pytest.raises(AnyglotError, match=f"inside the model's {rows} rows"):
            expand_vocabulary(
                pretrained("llama", rows=rows), Vocabulary.build(text_size, BlockSpec("image", "i", 32)), overwrite=True
            )


def test_a_vocabulary_with_too_little_text_is_refused() -> None:
    model = pretrained("llama", rows=TEXT + 1)
    with pytest.raises(
        AnyglotError, match="has 151 rows but .* only 150 text ids; build .* or overwrite the rows of r"
    ):
        expand_vocabulary(model, VOCABULARY)
    with pytest.raises(AnyglotError, match="init='huh'; use one of random, mean, covariance, codebook"):
        expand_vocabulary(pretrained("llama"), VOCABULARY, init="huh")  # type: ignore[arg-type]
    with pytest.raises(AnyglotError, match="needs the tokenizers' codebooks"):
        expand_vocabulary(pretrained("llama"), VOCABULARY, init="codebook")
    with pytest.raises(AnyglotError, match=r"image: .* needs \[1, 32\]"):
        expand_vocabulary(pretrained("llama"), VOCABULARY, init="codebook", codebooks={"image": torch.zeros(1, 31, 2)})


@pytest.mark.parametrize("init", ["mean", "covariance", "codebook"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_modality_is_added_to_a_trained_model(tied: bool, init: Any) -> None:
    old = Vocabulary.build(TEXT, BlockSpec("image", "i", 32, grid=(2, 2)), BlockSpec("speech", "s", 16, 2))
    new = old.extended(BlockSpec("music", "m", 40))
    model = pretrained("llama", tied=tied)
    expand_vocabulary(model, old)
    ids = torch.tensor([[TEXT + 1, 3, old.block("image").start_id, *range(old.block("image").end_id, old.size - 40)]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        extend_vocabulary(model, old, new, init=init, codebooks={"music": torch.randn(1, 40, 4)})
        places = torch.from_numpy(id_map(old, new))
        after = model(input_ids=places[ids]).logits
    used = (places >= 0).nonzero()[:, 0]
    torch.testing.assert_close(after[..., places[used]], before[..., used], rtol=0, atol=1e-6)
    weight = model.get_input_embeddings().weight
    assert (weight is model.get_output_embeddings().weight) == tied
    assert len(weight) == new.size == model.config.vocab_size and len(weight.unique(dim=0)) == new.size
    with pytest.raises(AnyglotError, match="384 rows, the old vocabulary 640"):
        extend_vocabulary(model, Vocabulary.build(600), Vocabulary.build(600))


ATTENTIONS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
WINDOWS = {"llama": {}, "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}}


def packed_model(name: str, attention: str) -> PreTrainedModel:
    more = {"mistral": {"sliding_window": 4}, **WINDOWS}.get(name, {})
    return pretrained(name, attention=attention, **more).train()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_packed_documents_do_not_leak(name: str, attention: str) -> None:
    model = packed_model(name, attention)
    try:
        assert_no_leak(model)
    except InductorError:  # torch 2.13: code for 3 heads and several shapes is no C++
        pytest.skip("Inductor writes C++ that does not compile for flex_attention with these shapes on a CPU")
    assert model.training, "the mode comes back"


def with_a_mask(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return decoder(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state


def with_the_default_cache(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder(input_ids=ids, position_ids=positions).last_hidden_state


def without_restarts(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder(input_ids=ids, use_cache=False).last_hidden_state


def first_row_only(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([positions[:1], torch.arange(ids.shape[1])[None].expand(len(ids) - 1, -1)])
    return hidden_states(decoder, ids, positions)


@pytest.mark.parametrize("wrong", [with_a_mask, with_the_default_cache, without_restarts, first_row_only])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_known_wrong_calls_leak(name: str, attention: str, wrong: Any) -> None:
    with pytest.raises(AnyglotError, match="leak into each other .* as model.hidden_states does"):
        assert_no_leak(packed_model(name, attention), forward=wrong)


def test_backbones_whose_documents_cannot_be_found_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(UnsupportedError, match="gpt2 has no rotary positions"):
        assert_no_leak(gpt2)
    model = pretrained("llama")
    model.config.rope_parameters["mrope_section"] = [2, 3, 3]
    with pytest.raises(UnsupportedError, match="several axes"):
        assert_no_leak(model)


def test_flash_attention_gets_one_row() -> None:
    model = pretrained("llama")
    shapes = []

    def decoder(**inputs: Any) -> Any:
        shapes.append((tuple(inputs["input_ids"].shape), tuple(inputs["position_ids"].shape)))
        return model.base_model(**inputs)

    ids, positions = torch.randint(0, TEXT, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    with torch.no_grad():
        rows = hidden_states(decoder, ids, positions)
        decoder.config = SimpleNamespace(_attn_implementation="flash_attention_2")  # type: ignore[attr-defined]
        flat = hidden_states(decoder, ids, positions)
    assert shapes == [((2, 6), (2, 6)), ((1, 12), (1, 12))]
    torch.testing.assert_close(flat, rows, rtol=0, atol=1e-5)


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
