"""Document log-probabilities and DPO against formulas written by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anyglot_lm.loss import IGNORE, SliceTable, SpanNLL, span_nll
from anyglot_lm.preference import dpo_loss, sequence_logps

V, WIDTH, DOCUMENTS = 11, 6, 4


def packed() -> tuple[Tensor, Tensor]:
    """Labels and documents of a packed row; document 2 has no target, padding has segment -1."""
    segment = torch.tensor([0] * 5 + [1] * 7 + [2] * 2 + [3] * 4 + [-1] * 3)
    labels = torch.randint(0, V, (len(segment),))
    labels[segment == 2] = IGNORE
    labels[-3:] = IGNORE
    labels[[0, 5]] = IGNORE
    return labels, segment


def nll_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> SpanNLL:
    return span_nll(hidden, weight, labels, SliceTable([0], [V], torch.zeros(V, dtype=torch.long)))


@pytest.mark.parametrize("mean", [False, True])
def test_log_probabilities_of_documents(mean: bool) -> None:
    labels, segment = packed()
    hidden = torch.randn(len(labels), WIDTH, requires_grad=True)
    weight = torch.randn(V, WIDTH)
    got = sequence_logps(nll_of(hidden, weight, labels), segment, DOCUMENTS, mean=mean)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    wanted = []
    for document in range(DOCUMENTS):
        at = [n for n in range(len(labels)) if segment[n] == document and labels[n] != IGNORE]
        one = sum((logp[n, labels[n]] for n in at), torch.zeros((), dtype=torch.float64))
        wanted.append(one / len(at) if mean and at else one)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert got[2] == 0
    factor = torch.arange(1.0, 5.0)
    (want,) = torch.autograd.grad((factor * torch.stack(wanted)).sum(), hidden)
    (factor * got).sum().backward()
    torch.testing.assert_close(hidden.grad, want, rtol=1e-5, atol=1e-6)


def test_long_documents_lose_no_digits() -> None:
    nll = torch.full((100_000,), 7.1)
    none = torch.zeros(100_000, dtype=torch.long)
    got = sequence_logps(SpanNLL(nll, nll, none, none == 0, none), none, 1)
    assert got.item() == pytest.approx(-100_000 * nll[0].double().item(), abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (20 * torch.randn(5, dtype=torch.float64) for _ in range(4))
    tensors = [t.requires_grad_() for t in (chosen, rejected, ref_chosen, ref_rejected)]
    out = dpo_loss(*tensors, beta=0.3, label_smoothing=smoothing)
    out.loss.sum().backward()
    for p, (good, bad, ref_good, ref_bad) in enumerate(zip(*(t.tolist() for t in tensors), strict=True)):
        margin = 0.3 * ((good - ref_good) - (bad - ref_bad))
        right = 1 / (1 + math.exp(-margin))
        wanted = -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right)
        assert out.loss[p].item() == pytest.approx(wanted)
        assert out.chosen_reward[p].item() == pytest.approx(0.3 * (good - ref_good))
        assert out.rejected_reward[p].item() == pytest.approx(0.3 * (bad - ref_bad))
        assert out.margin[p].item() == pytest.approx(margin)
        assert out.accuracy[p].item() == float(margin > 0)
        slope = 0.3 * (right - (1 - smoothing))
        assert chosen.grad is not None and rejected.grad is not None
        assert chosen.grad[p].item() == pytest.approx(slope) and rejected.grad[p].item() == pytest.approx(-slope)
    assert ref_chosen.grad is None and ref_rejected.grad is None


def test_dpo_starts_at_ln_2_and_adds_the_nll_of_the_chosen() -> None:
    logps = torch.randn(3, dtype=torch.float64)
    assert dpo_loss(logps, logps, logps, logps).loss.tolist() == pytest.approx([math.log(2)] * 3)
    nll = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = dpo_loss(logps, logps, logps, logps, chosen_nll_P=nll, nll_weight=0.5)
    assert out.loss.tolist() == pytest.approx([math.log(2) + 0.5 * n for n in (1, 2, 3)])
    out.loss.sum().backward()
    assert nll.grad is not None and nll.grad.tolist() == [0.5] * 3


def test_dpo_learns_to_prefer_the_chosen_documents() -> None:
    labels, segment = packed()
    inputs = torch.randn(len(labels), WIDTH)
    layer = torch.nn.Linear(WIDTH, WIDTH)
    weight = torch.randn(V, WIDTH)
    with torch.no_grad():
        reference = sequence_logps(nll_of(layer(inputs), weight, labels), segment, DOCUMENTS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    margins = []
    for _ in range(30):
        policy = sequence_logps(nll_of(layer(inputs), weight, labels), segment, DOCUMENTS)
        out = dpo_loss(policy[[0]], policy[[1]], reference[[0]], reference[[1]])
        margins.append(out.margin.item())
        optimizer.zero_grad()
        out.loss.sum().backward()
        optimizer.step()
    assert margins[0] == 0 and margins[-1] > 0.5 and out.accuracy.item() == 1
