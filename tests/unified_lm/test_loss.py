"""The sliced cross-entropy against a float64 reference that takes one position at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anyglot_lm.loss import IGNORE, LossSums, SliceTable, span_cross_entropy
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(
    20, BlockSpec("image", "i", 16, grid=(2, 2)), BlockSpec("speech", "s", 8, num_quantizers=2, max_frames=5)
)
WIDTH = 12


def table() -> SliceTable:
    lo, hi, class_of_id = VOCABULARY.slice_table()
    return SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id))


def batch(count: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(count, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY.size, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY.blocks[-1].first_id + 16, (count,))
    labels[::7] = IGNORE
    return hidden, weight, labels


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor | None, sliced: bool, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = table()
    sums = torch.zeros(3, len(t.lo), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(hidden.double(), labels.tolist(), strict=True):
        if label == IGNORE:
            continue
        c = int(t.class_of_id[label])
        lo, hi = (t.lo[c], t.hi[c]) if sliced else (0, len(weight))
        logits = weight[lo:hi].double() @ row
        nll = logits.exp().sum().log() - logits[label - lo]
        factor = 1.0 if factors is None else float(factors[c])
        total = total + factor * (nll + z_loss * logits.exp().sum().log() ** 2)
        right = float(logits.argmax() == label - lo)
        sums[:, c] += torch.tensor([nll.item(), 1, right], dtype=torch.float64)
    return total, sums[0], sums[1], sums[2]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sliced", [True, False])
def test_equals_the_reference(sliced: bool, weighted: bool, z_loss: float) -> None:
    hidden, weight, labels = batch()
    factors = torch.tensor([1.0, 0.5, 2.0, 0.0]) if weighted else None
    got = span_cross_entropy(
        hidden, weight, labels, table(), class_weights=factors, sliced=sliced, z_loss=z_loss, chunk=7
    )
    total, nll, count, correct = reference(hidden, weight, labels, factors, sliced, z_loss)
    torch.testing.assert_close(got.total.double(), total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.nll.double(), nll, rtol=1e-5, atol=1e-4)
    assert got.count.tolist() == count.tolist() and got.correct.tolist() == correct.tolist()
    expected = torch.autograd.grad(total, (hidden, weight))
    for gradient, wanted in zip(torch.autograd.grad(got.total, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_label_competes_inside_its_slice_only() -> None:
    hidden, weight, labels = batch()
    labels[:] = VOCABULARY.block("image").first_id
    block = VOCABULARY.block("image")
    span_cross_entropy(hidden, weight, labels, table()).total.backward()
    assert weight.grad is not None
    touched = weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == list(range(block.end_id, block.first_id + block.codebook_size))


@pytest.mark.parametrize("sliced", [True, False])
def test_bfloat16_hidden_states(sliced: bool) -> None:
    hidden, weight, labels = batch(dtype=torch.bfloat16)
    got = span_cross_entropy(hidden, weight, labels, table(), sliced=sliced)
    total, _, count, _ = reference(hidden, weight, labels, None, sliced, 0.0)
    assert got.total.dtype == got.nll.dtype == torch.float32
    assert got.count.tolist() == count.tolist()
    assert got.total.item() == pytest.approx(total.item(), rel=0.01)


def test_no_valid_label_is_zero_and_reaches_every_parameter() -> None:
    layer, head = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(VOCABULARY.size, WIDTH))
    labels = torch.full((5,), IGNORE)
    got = span_cross_entropy(layer(torch.randn(5, WIDTH)), head, labels, table(), z_loss=1e-2)
    assert got.total.item() == 0 and got.count.sum() == 0
    got.total.backward()
    for parameter in (*layer.parameters(), head):
        assert parameter.grad is not None and not parameter.grad.any()


def test_micro_batches_add_up() -> None:
    hidden, weight, labels = batch(61)
    whole = span_cross_entropy(hidden, weight, labels, table(), z_loss=1e-3)
    parts: list[LossSums] = [
        span_cross_entropy(h, weight, y, table(), z_loss=1e-3)
        for h, y in zip(hidden.split(16), labels.split(16), strict=True)
    ]
    for name in ("total", "nll", "count", "correct"):
        added = torch.stack([getattr(part, name) for part in parts]).sum(0)
        torch.testing.assert_close(added, getattr(whole, name), rtol=1e-5, atol=1e-4)
    gradient = torch.autograd.grad(whole.total, weight)[0]
    added = torch.stack([torch.autograd.grad(part.total, weight, retain_graph=True)[0] for part in parts]).sum(0)
    torch.testing.assert_close(added, gradient, rtol=1e-4, atol=1e-5)
