"""Presets train what they say and nothing else, to the byte, and merged models are plain models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from anyglot_lm.tuning import Lora, SplitRows, choose_trained, merge, output_rows
from anyglot_tokenizers.errors import ManifestError

TEXT, ROWS = 40, 64
BACKBONES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3)}


def backbone(name: str = "llama", *, tied: bool = True) -> PreTrainedModel:
    config_class, model_class = BACKBONES[name]
    config = config_class(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config)
    return model


def train(model: PreTrainedModel, steps: int = 3) -> None:
    """A few steps of AdamW with a strong decay on every parameter that trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, ROWS, (2, 12), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of both ends and of one layer's matrix."""
    return {
        "input": model.get_input_embeddings().weight.detach().clone(),
        "head": model.get_output_embeddings().weight.detach().clone(),
        "layer": model.model.layers[0].self_attn.q_proj.weight.detach().clone(),
        "norm": model.model.norm.weight.detach().clone(),
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("preset", ["rows", "lora", "full"])
def test_old_rows_keep_every_byte_and_new_rows_learn(name: str, tied: bool, preset: str) -> None:
    model = backbone(name, tied=tied)
    before = weights(model)
    ids = torch.arange(ROWS)[None, :30]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    choose_trained(model, preset, first_new=TEXT, lora=Lora(r=4))  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-6)
    train(model)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    merge(model)
    after = weights(model)
    for end in ("input", "head"):
        assert torch.equal(after[end][:TEXT], before[end][:TEXT])
        assert (after[end][TEXT:] != before[end][TEXT:]).any(1).all(), "every new row learns"
    assert torch.equal(after["layer"], before["layer"]) == (preset == "rows")
    assert torch.equal(after["norm"], before["norm"]) == (preset != "full")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_reloads_in_plain_transformers(tied: bool, tmp_path: Path) -> None:
    model = backbone(tied=tied)
    choose_trained(model, "lora", first_new=TEXT)
    train(model)
    ids = torch.randint(0, ROWS, (2, 12))
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
    merge(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, trained, rtol=0, atol=1e-5)


def test_full_with_old_rows_moves_all() -> None:
    model = backbone()
    before = weights(model)
    choose_trained(model, "full", first_new=TEXT, train_old_rows=True)
    assert not isinstance(model.get_input_embeddings(), SplitRows)
    train(model)
    assert (weights(model)["input"] != before["input"]).any(1).all()


def test_freezing_by_pattern() -> None:
    model = backbone()
    before = weights(model)
    choose_trained(model, "full", first_new=TEXT, freeze=[r"layers\.0\.", "norm"])
    train(model)
    after = weights(merge(model))
    assert torch.equal(after["layer"], before["layer"]) and torch.equal(after["norm"], before["norm"])
    assert not torch.equal(after["input"], before["input"])


def test_only_the_new_rows_have_optimizer_states() -> None:
    model = backbone(tied=False)
    choose_trained(model, "rows", first_new=TEXT)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"model.embed_tokens.new": (ROWS - TEXT, 32), "lm_head.new": (ROWS - TEXT, 32)}
    old, new = output_rows(model)
    assert len(old) == TEXT and len(new) == ROWS - TEXT and not old.requires_grad
    assert len(dict(choose(backbone(tied=True)).named_parameters())) == len(dict(backbone().named_parameters())) + 1


def choose(model: PreTrainedModel) -> PreTrainedModel:
    choose_trained(model, "rows", first_new=TEXT)
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "half"}, "preset 'half'; use rows, lora or full"),
        ({"preset": "rows", "train_old_rows": True}, "train_old_rows is for preset full"),
        ({"preset": "rows", "first_new": 65}, "has 64 rows; give the vocabulary's text_size"),
        ({"preset": "full", "freeze": ["tower"]}, "'tower' is found in no parameter's name"),
        ({"preset": "rows", "freeze": ["."]}, "nothing is left to train"),
        ({"preset": "lora", "lora": Lora(targets=["missing"])}, "lora.targets"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ManifestError, match=message):
        choose_trained(backbone(), **{"first_new": TEXT, **settings})
