"""The span loss and KL against float64 log-softmaxes over whole logits with the illegal ids masked out.

Ranks, accumulation and weights: `test_weighting.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyglot_lm.loss import IGNORE, SliceTable, class_sums, span_kl, span_nll
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import AnyglotError

VOCABULARY = Vocabulary.build(
    20, BlockSpec("image", "i", 16, grid=(2, 2)), BlockSpec("speech", "s", 8, num_quantizers=2, max_frames=5)
)
WIDTH = 12
CHUNK = 4 * 7 * 7  # tiles of 7 x 7: several per slice, the last ones ragged
OLD = 22  # text rows and two controls: the open slice straddles the parts (old rows, new rows)


def table() -> SliceTable:
    lo, hi, class_of_id = VOCABULARY.slice_table()
    return SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id))


def batch(count: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(count, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY.size, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY.blocks[-1].first_id + 16, (count,))
    labels[::7] = IGNORE
    return hidden, weight, labels


def split(weight: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
    old, new = weight.detach()[:OLD].clone(), weight.detach()[OLD:].clone()
    return old.requires_grad_(not frozen), new.requires_grad_()


def masked_log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor, sliced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities [N, V], logsumexp [N], valid [N]) in float64; ids outside the label's slice have -inf."""
    t = table()
    logits = hidden.double() @ weight.double().T
    valid = labels != IGNORE
    if sliced:
        classes = t.class_of_id[labels.clamp_min(0)]
        ids = torch.arange(len(weight))
        legal = (ids >= torch.tensor(t.lo)[classes, None]) & (ids < torch.tensor(t.hi)[classes, None])
        logits = logits.masked_fill(~legal, -torch.inf)
    return logits.log_softmax(-1), logits.logsumexp(-1), valid


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, sliced: bool) -> tuple[Tensor, Tensor, Tensor]:
    logp, lse, valid = masked_log_softmax(hidden, weight, labels, sliced)
    nll = -logp.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(valid, nll, 0), torch.where(valid, lse, 0), torch.where(valid, logp.argmax(-1), -1)


def mixed(nll: Tensor, lse: Tensor) -> Tensor:
    """A scalar whose gradient differs from position to position, in nll and in lse."""
    factor = torch.linspace(-1, 2, len(nll), dtype=nll.dtype)
    return (factor * nll + 0.1 * factor.flip(0) * lse.square()).sum()


@pytest.mark.parametrize("chunk", [CHUNK, 4, None])
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_values_and_gradients_in_float32(parts: int, sliced: bool, chunk: int | None) -> None:
    hidden, weight, labels = batch()
    rows = (weight,) if parts == 1 else split(weight)
    out = span_nll(hidden, rows if parts == 2 else weight, labels, table(), sliced=sliced, chunk=chunk)
    whole = torch.cat(rows)
    nll, lse, predicted = reference(hidden, whole, labels, sliced)
    torch.testing.assert_close(out.nll.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.predicted, predicted)
    assert torch.equal(out.correct, predicted == labels)
    valid = labels != IGNORE
    assert torch.equal(out.slice_class, torch.where(valid, table().class_of_id[labels.clamp_min(0)], -1))
    wanted = torch.autograd.grad(mixed(nll, lse), (hidden, *rows))
    for got, want in zip(torch.autograd.grad(mixed(out.nll, out.lse), (hidden, *rows)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sliced", [True, False])
def test_gradcheck_in_float64(sliced: bool) -> None:
    hidden, weight, labels = batch(9, torch.float64)

    def run(hidden: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        out = span_nll(hidden, (old, new), labels, table(), sliced=sliced, chunk=CHUNK)
        return out.nll, out.lse

    assert torch.autograd.gradcheck(run, (hidden, *split(weight)), fast_mode=True)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("sliced", [True, False])
def test_bfloat16(sliced: bool, autocast: bool) -> None:
    hidden, weight, labels = batch(200, torch.bfloat16)
    rows = split(weight)
    args = [t.detach().float().requires_grad_() for t in (hidden, *rows)] if autocast else [hidden, *rows]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = span_nll(args[0], args[1:], labels, table(), sliced=sliced, chunk=CHUNK)
        total = mixed(out.nll, out.lse)
    assert out.nll.dtype == out.lse.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (hidden, *rows)]
    nll, lse, _ = reference(exact[0], torch.cat(exact[1:]), labels, sliced)
    # Logits of about ±10 are rounded to 8 bits, so to 0.03; values here are up to 20.
    torch.testing.assert_close(out.nll.double(), nll, rtol=0.01, atol=0.08)
    wanted = torch.autograd.grad(mixed(nll, lse), exact)
    for got, want, arg in zip(torch.autograd.grad(total, args), wanted, args, strict=True):
        assert got.dtype == arg.dtype
        assert (got.double() - want).norm() < 0.01 * want.norm()


def test_bfloat16_rows_gather_their_gradient_in_float32() -> None:
    """4,096 equal positions in tiles of 8: added up in bfloat16 the gradient would stop growing at 256 steps."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(VOCABULARY.size, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.long)
    span_nll(hidden, weight, labels, table(), chunk=4 * 8 * 8).nll.sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(4096 * (1 / VOCABULARY.open_size - 1), rel=0.005)


def test_a_label_competes_inside_its_slice_only() -> None:
    hidden, weight, labels = batch()
    labels[:] = VOCABULARY.block("image").first_id
    block = VOCABULARY.block("image")
    span_nll(hidden, weight, labels, table()).nll.sum().backward()
    assert weight.grad is not None
    touched = weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == list(range(block.end_id, block.first_id + block.codebook_size))


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.work += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, True), (False, False, True), (True, False, False)]
)
def test_what_needs_no_gradient_gets_none_and_costs_no_product(trained: tuple[bool, bool, bool]) -> None:
    hidden, weight, labels = batch()
    tensors = [t.detach().requires_grad_(needed) for t, needed in zip((hidden, *split(weight)), trained, strict=True)]
    out = span_nll(tensors[0], tensors[1:], labels, table(), sliced=False, chunk=CHUNK)
    with Products() as products:
        out.nll.sum().backward()
    assert tuple(t.grad is not None for t in tensors) == trained
    one = int((labels != IGNORE).sum()) * WIDTH  # work of one product with one row
    # With every part: its logits again if anything needs them, the gradient of the hidden states, its own.
    work = [
        len(part) * one * ((trained[0] or needed) + trained[0] + needed)
        for part, needed in zip(tensors[1:], trained[1:], strict=True)
    ]
    assert products.work == sum(work)


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("count", [5, 0])
def test_no_valid_label_is_zero_and_reaches_every_parameter(count: int, sliced: bool) -> None:
    layer, (old, new) = nn.Linear(WIDTH, WIDTH), split(torch.randn(VOCABULARY.size, WIDTH))
    labels = torch.full((count,), IGNORE)
    hidden = layer(torch.randn(count, WIDTH))
    out = span_nll(hidden, (old, new), labels, table(), sliced=sliced)
    kl = span_kl(hidden, (old, new), hidden, new.new_zeros(VOCABULARY.size, WIDTH), labels, table(), sliced=sliced)
    assert not out.nll.any() and not out.lse.any() and not kl.any()
    assert out.predicted.tolist() == out.slice_class.tolist() == [-1] * count and not out.correct.any()
    for total in (mixed(out.nll, out.lse), kl.sum()):
        for parameter in (*layer.parameters(), old, new):
            parameter.grad = None
        total.backward(retain_graph=True)
        for parameter in (*layer.parameters(), old, new):
            assert parameter.grad is not None and not parameter.grad.any()


def test_labels_of_no_slice_are_ignored() -> None:
    hidden, weight, labels = batch()
    unused = labels.clone()
    unused[labels == IGNORE] = VOCABULARY.size - 1
    unused[0] = -1
    assert labels[0] == IGNORE, "any negative label is none"
    a, b = (span_nll(hidden, weight, y, table()) for y in (labels, unused))
    assert torch.equal(a.nll, b.nll) and torch.equal(a.slice_class, b.slice_class)


def test_too_few_rows_are_refused() -> None:
    hidden, weight, labels = batch()
    with pytest.raises(AnyglotError, match=f"has 30 rows .* need {VOCABULARY.blocks[-1].stop_id}"):
        span_nll(hidden, weight[:30], labels, table())
    with pytest.raises(AnyglotError, match=f"has {VOCABULARY.size} rows, the reference's 90"):
        span_kl(hidden, weight, hidden, weight[:90], labels, table())


@pytest.mark.parametrize(("sliced", "size"), [(True, None), (False, None), (True, 13), (False, 13)])
def test_kl_and_its_gradients(sliced: bool, size: int | None) -> None:
    hidden, weight, labels = batch()
    if size is not None:  # a reference that says the first ids only, hence in the first slice only
        labels = torch.where(labels < VOCABULARY.open_size, labels, IGNORE)
    rows = split(weight)
    other_hidden = torch.randn(len(labels), 5, requires_grad=True)
    other_weight = torch.randn(VOCABULARY.size, 5, requires_grad=True)
    other_rows = (other_weight[:50], other_weight[50:])  # another width, cut elsewhere
    how: dict[str, Any] = {"sliced": sliced, "reference_size": size, "chunk": CHUNK}
    got = span_kl(hidden, rows, other_hidden, other_rows, labels, table(), **how)
    policy, _, valid = masked_log_softmax(hidden, torch.cat(rows), labels, sliced)
    other, _, _ = masked_log_softmax(other_hidden.detach(), other_weight.detach(), labels, sliced)
    if size is not None:
        other[:, size:] = -torch.inf
        other = other.log_softmax(-1)
    gap = torch.where(other.exp() > 0, other - policy.nan_to_num(neginf=0), 0)
    want = torch.where(valid, (other.exp() * gap).sum(-1), 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    factor = torch.linspace(-1, 2, len(labels))
    wanted = torch.autograd.grad((factor * want).sum(), (hidden, *rows))
    (factor * got).sum().backward()
    for tensor, gradient in zip((hidden, *rows), wanted, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=2e-5)
    assert other_hidden.grad is None and other_weight.grad is None


def test_kl_gradcheck_in_float64_and_zero_to_itself() -> None:
    hidden, weight, labels = batch(9, torch.float64)
    other = batch(9, torch.float64)[:2]
    old, new = split(weight)

    def run(hidden: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return span_kl(hidden, (old, new), *other, labels, table(), chunk=CHUNK)

    assert torch.autograd.gradcheck(run, (hidden, old, new), fast_mode=True)
    same = span_kl(hidden, (old, new), hidden, weight, labels, table(), chunk=CHUNK)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-13)
    for gradient in torch.autograd.grad(same.sum(), (hidden, old, new)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


def test_logits_are_never_whole() -> None:
    """No tensor of the two passes is larger than the gradients themselves."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.seen = max(self.seen, out.untyped_storage().nbytes())
            return out

    hidden, weight, labels = batch(1000)
    with Largest() as largest:
        span_nll(hidden, weight, labels, table(), sliced=False, chunk=1 << 12).nll.sum().backward()
    assert largest.seen == hidden.nbytes < hidden.shape[0] * weight.shape[0] * 4


def test_sums_per_class() -> None:
    hidden, weight, labels = batch()
    got = span_nll(hidden, weight, labels, table())
    nll, _, predicted = reference(hidden, weight, labels, True)
    classes = torch.where(labels == IGNORE, -1, table().class_of_id[labels.clamp_min(0)])
    sums = class_sums(got.nll, got.slice_class, 4)
    for c in range(4):
        of_class = classes == c
        torch.testing.assert_close(sums[c].double(), nll[of_class].sum(), rtol=1e-5, atol=1e-5)
        assert class_sums(got.correct, got.slice_class, 4)[c] == (predicted == labels)[of_class].sum()
    (gradient,) = torch.autograd.grad(sums[2], hidden)
    (wanted,) = torch.autograd.grad(nll[classes == 2].sum(), hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-5)
