"""Rows that are sums of their digits': what they compute, that they come out plain, and what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from anyglot_lm.factored import factor_rows, unfactor_rows
from anyglot_lm.model import new_llama
from anyglot_lm.packed import PackedLM
from anyglot_lm.tuning import Preset, choose_trained, merge
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers import AnyglotError, TwoToneVQ
from anyglot_tokenizers.errors import ManifestError

SHAPES, COLORS = 6, 5
IDS = SHAPES * COLORS
TEXT = SHAPES + COLORS


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = TwoToneVQ(num_patterns=SHAPES, num_tones=COLORS, pattern_dim=4, tone_dim=2, width=8, channels=(8, 8))
    return Vocabulary.build(TEXT, BlockSpec.from_code_spec(tokenizer.eval().spec, pattern="raster", grid=(1, 1)))


_GENERATOR = torch.Generator().manual_seed(0)
_TONES, _PATTERNS = torch.randn(COLORS, 1, generator=_GENERATOR), torch.randn(SHAPES, 2, generator=_GENERATOR)
CODEBOOK = torch.cat([_TONES.repeat(SHAPES, 1), _PATTERNS.repeat_interleave(COLORS, 0)], 1)[None]


def model_of(vocabulary: Vocabulary, *, tied: bool = True, factored: bool = True) -> LlamaForCausalLM:
    model = new_llama(vocabulary, hidden_size=32, num_layers=2, num_heads=2, max_length=32, tied=tied)
    if factored:
        factor_rows(model, vocabulary, {"image": CODEBOOK}, {"image": (COLORS, SHAPES)})
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_sums_and_come_out_plain(vocabulary: Vocabulary, tied: bool, tmp_path: Path) -> None:
    plain = model_of(vocabulary, tied=tied, factored=False)
    model = model_of(vocabulary, tied=tied)
    first, last = vocabulary.block("image").codebook_slice(0)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = end.weight.detach()
        assert weight.shape == (vocabulary.size, 32)
        rows = (end.rows if hasattr(end, "rows") else end).codebooks[0]
        entries = (CODEBOOK[0] - CODEBOOK[0].mean(0)) / (CODEBOOK[0] - CODEBOOK[0].mean(0)).square().mean().sqrt()
        for code in (0, 7, IDS - 1):
            parts = rows.tables[0][code % COLORS] + rows.tables[1][code // COLORS]
            assert torch.allclose(weight[first + code], parts + entries[code] @ rows.projection_dD, atol=1e-6)
    others = [i for i in range(vocabulary.size) if not first <= i < last]
    assert torch.equal(model.get_input_embeddings().weight[others], plain.get_input_embeddings().weight[others])
    assert (model.get_output_embeddings().rows is model.get_input_embeddings()) == tied
    ids = torch.randint(0, vocabulary.size, (2, 9), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=ids).logits
    names = set(plain.state_dict())
    unfactor_rows(model)
    assert set(model.state_dict()) == names and torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(again(input_ids=ids).logits, before, atol=1e-5)
    assert unfactor_rows(again) is again, "a plain model stays as it is"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factors", [(COLORS, SHAPES), (IDS,)])
def test_rows_start_as_wide_as_plain_ones(vocabulary: Vocabulary, factors: tuple[int, ...], tied: bool) -> None:
    model = new_llama(vocabulary, hidden_size=1024, num_layers=1, num_heads=2, max_length=32, tied=tied)
    codes = slice(*vocabulary.block("image").codebook_slice(0))

    def deviations() -> list[float]:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        return [end.weight[codes].std().item() for end in ends]

    plain = deviations()
    factor_rows(model, vocabulary, {"image": CODEBOOK}, {"image": factors})
    assert deviations() == pytest.approx(plain, rel=0.05)


def test_without_factors_an_id_has_a_free_row_and_its_projection(vocabulary: Vocabulary) -> None:
    model = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=32)
    factor_rows(model, vocabulary, {"image": CODEBOOK, "music": torch.zeros(1, 2, 3)})
    assert [len(table) for table in model.get_input_embeddings().codebooks[0].tables] == [IDS]


def test_what_does_not_fit_is_refused(vocabulary: Vocabulary) -> None:
    model = model_of(vocabulary, factored=False)
    with pytest.raises(AnyglotError, match=r"factors \(5, 5\) do not make 30 ids"):
        factor_rows(model, vocabulary, {"image": CODEBOOK}, {"image": (5, 5)})
    with pytest.raises(AnyglotError, match="has codebooks"):
        factor_rows(model, vocabulary, {"image": CODEBOOK[:, 1:]})


def test_a_model_in_bf16_stays_in_bf16_and_rows_are_factored_once(vocabulary: Vocabulary) -> None:
    model = model_of(vocabulary, factored=False).bfloat16()
    factor_rows(model, vocabulary, {"image": CODEBOOK}, {"image": (COLORS, SHAPES)})
    assert model(input_ids=torch.arange(6)[None]).logits.dtype == torch.bfloat16
    with pytest.raises(AnyglotError, match="plain rows"):
        factor_rows(model, vocabulary, {"image": CODEBOOK})


@pytest.mark.parametrize("preset", ["rows", "lora", "full"])
def test_factored_rows_are_not_split(vocabulary: Vocabulary, preset: Preset) -> None:
    model = model_of(vocabulary)
    with pytest.raises(ManifestError, match=r"call unfactor_rows\(model\) first"):
        choose_trained(model, preset, first_new=TEXT)
    assert all(p.requires_grad for p in model.parameters()), "nothing has changed"
    choose_trained(model, "full", first_new=TEXT, train_old_rows=True)
    assert model.get_output_embeddings().rows is model.get_input_embeddings(), "still tied"
    choose_trained(merge(model), preset, first_new=TEXT)


def right(model: PackedLM, vocabulary: Vocabulary, ids: Tensor) -> float:
    """Share of pairs whose code is the likeliest one."""
    first, last = vocabulary.block("image").codebook_slice(0)
    with torch.no_grad():
        logits = model.model(input_ids=ids[:, :-1]).logits[:, -1, first:last]
    return float((logits.argmax(1) + first == ids[:, -1]).float().mean())


def learn(vocabulary: Vocabulary, factored: bool) -> tuple[float, float]:
    """Trained on pairs of a shape and a color with their code: right for pairs seen, and for pairs never seen."""
    model = PackedLM(model_of(vocabulary, factored=factored), vocabulary)
    block = vocabulary.block("image")
    shape, color = torch.arange(IDS) // COLORS, torch.arange(IDS) % COLORS
    start = torch.full((IDS,), block.start_id)
    ids = torch.stack([shape, SHAPES + color, start, block.codebook_slice(0)[0] + torch.arange(IDS)], 1)
    seen = (shape + color) % COLORS != 0  # every shape but one of its colors, every color but one or two of its shapes
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    labels = torch.full_like(ids[seen][:, :-1], -100)
    labels[:, -1] = ids[seen][:, -1]
    positions = torch.arange(3).expand(len(labels), -1)
    for _ in range(300):
        optimizer.zero_grad()
        (model(ids[seen][:, :-1], positions, labels).total / len(labels)).backward()
        optimizer.step()
    model.eval()
    return right(model, vocabulary, ids[seen]), right(model, vocabulary, ids[~seen])


def test_a_combination_never_met_is_written(vocabulary: Vocabulary) -> None:
    known, never = learn(vocabulary, factored=True)
    assert known == 1 and never >= 0.8
    known, never = learn(vocabulary, factored=False)
    assert known == 1 and never <= 0.2, "free rows cannot know"
