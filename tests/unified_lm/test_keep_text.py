"""Plain text is kept, not learnt: its loss is the divergence from the model before, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from anyglot_lm.loss import IGNORE
from anyglot_lm.model import hidden_states, new_llama
from anyglot_lm.packed import PackedLM
from anyglot_lm.tuning import Lora, before_training, choose_trained
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import ManifestError

VOCABULARY = Vocabulary.build(20, BlockSpec("image", "i", 8, grid=(1, 2)))
BOS, USER, ASSISTANT, EOS = (VOCABULARY.controls[name] for name in ("bos", "user", "assistant", "eos"))
PLAIN = [BOS, ASSISTANT, 3, 4, 5, EOS]
TALK = [BOS, USER, 3, ASSISTANT, 4, EOS]
PICTURE = VOCABULARY.span("image", np.array([[[2, 5]]])).tolist()
DRAWN = [BOS, USER, 7, ASSISTANT, *PICTURE, EOS]


def batch(*rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows of documents -> ids, positions, labels of what follows the first two ids of each, padded."""
    length = max(sum(len(document) - 1 for document in row) for row in rows)
    ids = torch.full((len(rows), length), VOCABULARY.pad_id)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for b, row in enumerate(rows):
        at = 0
        for document in row:
            n = len(document) - 1
            ids[b, at : at + n] = torch.tensor(document[:-1])
            positions[b, at : at + n] = torch.arange(n)
            labels[b, at + 1 : at + n] = torch.tensor(document[2:])
            at += n
    return ids, positions, labels


def packed(keep_text: float, *, sliced: bool = True) -> PackedLM:
    """A model with LoRA that does nothing yet."""
    model = new_llama(VOCABULARY, hidden_size=32, num_layers=2, num_heads=2, max_length=64)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # says something
    torch.manual_seed(3)
    choose_trained(model, "lora", first_new=VOCABULARY.text_size, lora=Lora(r=4, alpha=8.0))
    return PackedLM(model, VOCABULARY, sliced=sliced, keep_text=keep_text)


@torch.no_grad()
def move(model: PreTrainedModel, by: float) -> None:
    """All that trains, as training might."""
    torch.manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=by * (0.2 if p.std() == 0 else p.std().item()))


def test_a_model_that_says_text_only_pays_nothing_for_plain_text() -> None:
    lm = packed(2.0)
    with torch.no_grad():  # of what is no text nothing is said
        lm.model.get_output_embeddings().new.zero_()
    out = lm(*batch([PLAIN, PLAIN], [PLAIN]))
    said = [n for n in (3, 4, 5) for _ in range(3)]
    assert out.kept is not None and out.kept[1] == len(said)  # eos is learnt
    assert (out.nll.slice_class >= 0).sum() == 3
    out.total.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    assert gradients and all(torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("sliced", [True, False])
def test_plain_text_costs_its_divergence_and_the_rest_its_nll(sliced: bool) -> None:
    lm, learning = packed(2.0, sliced=sliced), packed(0.0, sliced=sliced)
    ids, positions, labels = batch([DRAWN, PLAIN, TALK], [TALK, DRAWN])
    plain = torch.zeros_like(ids, dtype=torch.bool)
    plain[0, len(DRAWN) : len(DRAWN) + 3] = True  # the words; eos is learnt, as everywhere
    assert labels[plain].tolist() == [3, 4, 5]
    last = VOCABULARY.open_size if sliced else VOCABULARY.size

    def logits(model: PreTrainedModel) -> Tensor:
        hidden = hidden_states(model.base_model, ids, positions)[plain]
        return (hidden @ model.get_output_embeddings().weight.T)[:, :last]

    before = logits(lm.model)[:, : VOCABULARY.text_size].log_softmax(-1).detach()
    move(lm.model, 0.3), move(learning.model, 0.3)  # rows, too: the reference stays
    rest = learning(ids, positions, labels.masked_fill(plain, IGNORE)).total
    after = logits(lm.model).log_softmax(-1)[:, : VOCABULARY.text_size]
    kl = F.kl_div(after, before, reduction="sum", log_target=True)
    assert kl > 0.01
    out = lm(ids, positions, labels)
    torch.testing.assert_close(out.total, rest + 2.0 * kl, rtol=1e-4, atol=1e-4)
    assert (out.nll.slice_class.view(ids.shape)[plain] == -1).all()
    assert out.kept is not None and out.kept.tolist() == pytest.approx([kl.item(), len(before)], rel=1e-3)
    lm.eval()  # held-out text is measured, whatever training does with text
    measured, usual = lm(ids, positions, labels), learning(ids, positions, labels)
    torch.testing.assert_close(measured.nll.nll, usual.nll.nll)


def test_before_training_is_what_was_and_is_undone() -> None:
    lm = packed(1.0)
    ids, positions, _ = batch([TALK])
    expected = hidden_states(lm.model.base_model, ids, positions)
    move(lm.model, 0.3)
    with before_training(lm.model):
        torch.testing.assert_close(hidden_states(lm.model.base_model, ids, positions), expected)
    again = hidden_states(lm.model.base_model, ids, positions)
    assert not torch.allclose(again, expected, atol=1e-3)


def test_training_pulls_the_text_back_to_the_start() -> None:
    lm = packed(1.0)
    move(lm.model, 0.3)
    data = batch([PLAIN, [BOS, ASSISTANT, 9, 1, 3, 3, EOS]])
    optimizer = torch.optim.Adam([p for p in lm.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # its cache of casts must not lose the gradients
            out = lm(*data)
        out.total.backward()
        optimizer.step()
        losses.append(out.kept[0].item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("factor", [-1.0, 1.0])
def test_factors_that_make_no_sense(factor: float) -> None:
    with pytest.raises(ManifestError, match="choose preset lora, or leave keep_text out"):
        PackedLM(new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2), VOCABULARY, keep_text=factor)
