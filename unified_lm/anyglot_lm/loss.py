"""Cross-entropy and KL under the span grammar: each label competes only inside its legal slice of the vocabulary.

At every position the grammar of decoding allows one contiguous range of ids (`Vocabulary.slice_table`): text,
controls and start ids; or codebook 0 of a modality and its end id; or a deeper codebook. `span_nll` multiplies only
that slice of the output matrix, so training optimises exactly the distribution that constrained decoding samples
from, at a fraction of the cost of the whole matrix; `sliced=False` is the plain softmax over the whole vocabulary
(needed when the model will be sampled without the grammar).

Logits exist one tile at a time (some positions x some ids) and are computed again in the backward pass, so memory
does not grow with N x V. Running maxima and sums join the tiles of a softmax (as in arXiv 1805.02867); once the
normaliser is known, the gradient of a tile needs no other tile.

Products run in the dtype of autocast, else of the hidden states; softmaxes and sums in float32 (float64 for float64).
It does not shift labels (the data plan already did), weighs nothing (`weighting.py`) and knows nothing about
Lightning or ranks: it returns values per position, the caller sums and normalises.

Shapes: N positions, M those that count, D hidden width, V vocabulary size, C slice classes; a tile is [R, S].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anyglot_tokenizers.errors import AnyglotError

IGNORE = -100
Rows = Tensor | Sequence[Tensor]


@dataclass
class SliceTable:
    """Slices of the vocabulary: class c owns ids [lo[c], hi[c]); `class_of_id[v]` is the class of label v."""

    lo: list[int]
    hi: list[int]
    class_of_id: Tensor


@dataclass(frozen=True)
class SpanNLL:
    """Per position [N]: `nll` and `lse` (differentiable, 0 where ignored) in nats, float32 (float64 for float64).

    Attributes:
        nll: -log p(label) within the slice.
        lse: logsumexp of the slice's logits.
        predicted: int64 id with the highest logit of the slice, -1 where ignored.
        correct: bool, `predicted` is the label.
        slice_class: int64 class of the label, -1 where ignored.
    """

    nll: Tensor
    lse: Tensor
    predicted: Tensor
    correct: Tensor
    slice_class: Tensor


def span_nll(
    hidden_ND: Tensor,
    rows: Rows,
    labels_N: Tensor,
    table: SliceTable,
    *,
    sliced: bool = True,
    chunk: int | None = None,
) -> SpanNLL:
    """Cross-entropy of every label given final hidden states.

    Args:
        hidden_ND: final hidden states, any float dtype.
        rows: the output matrix [V, D] (the tied embedding or the LM head), or its parts stacked by rows, such as
            (old rows, new rows). A part that needs no gradient gets none and costs none.
        labels_N: int64 labels, already shifted; negative ones, such as -100, and ids that are in no slice are ignored.
        table: the vocabulary's slices.
        sliced: compete inside the label's slice (True) or over the whole vocabulary (False).
        chunk: bytes of float32 logits held at once; default 16 MiB on a CPU, 256 MiB on an accelerator.

    Returns:
        SpanNLL. Without a valid label all is 0 and still reaches `hidden_ND` and every part (with gradients of 0),
        so that distributed ranks do not wait for each other.

    Raises:
        AnyglotError: the matrix has fewer rows than the slices need.
    """
    parts = _parts(rows)
    order, class_N = _order(labels_N, table, parts, sliced, chunk)
    nll_N, lse_N, predicted_N = _SpanNLL.apply(hidden_ND, labels_N, order, _product_dtype(hidden_ND), *parts)
    return SpanNLL(nll_N, lse_N, predicted_N, predicted_N == labels_N, class_N)


def span_kl(
    hidden_ND: Tensor,
    rows: Rows,
    reference_hidden_NE: Tensor,
    reference_rows: Rows,
    labels_N: Tensor,
    table: SliceTable,
    *,
    sliced: bool = True,
    reference_size: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Exact KL(reference || policy) per position, within the slice of the position's label.

    Arguments as in `span_nll`; the reference has the same vocabulary, its width E and its parts may be others.
    `reference_size`: the reference never says ids from there on, whatever its rows; labels must have slices that begin
    below. Only the policy (`hidden_ND`, `rows`) gets gradients. The labels' values do not matter, only their slices.

    Returns:
        [N] nats, float32 (float64 for float64), 0 where ignored. Rounding may leave a KL of 0 slightly below it.
    """
    parts, reference_parts = _parts(rows), _parts(reference_rows)
    order, _ = _order(labels_N, table, parts, sliced, chunk)
    if _bounds(reference_parts)[-1] != _bounds(parts)[-1]:
        sizes = f"{_bounds(parts)[-1]} rows, the reference's {_bounds(reference_parts)[-1]}"
        raise AnyglotError(f"the policy's output matrix has {sizes}; compare models of one vocabulary")
    size = _bounds(parts)[-1] if reference_size is None else reference_size
    order.cuts += [*_bounds(reference_parts), size]
    dtypes = _product_dtype(hidden_ND), _product_dtype(reference_hidden_NE)
    reference = reference_hidden_NE.detach(), *(part.detach() for part in reference_parts)
    return _SpanKL.apply(hidden_ND, order, dtypes, size, reference, *parts)


def class_sums(values_N: Tensor, slice_class_N: Tensor, classes: int) -> Tensor:
    """Sums values [N] per slice class -> [C], float32 or wider; differentiable, the same on every run."""
    values_N = values_N.to(torch.promote_types(values_N.dtype, torch.float32))
    member_NC = slice_class_N[:, None] == torch.arange(classes, device=slice_class_N.device)
    return torch.where(member_NC, values_N[:, None], 0).sum(0)


@dataclass
class _Order:
    """Positions that count, sorted by class, and the tiles that cover their logits."""

    position_M: Tensor
    runs: list[tuple[int, int, int, int]]
    """(start, stop, lo, hi): sorted positions [start, stop) compete over the ids [lo, hi)."""
    cuts: list[int]
    """Ids where a part of an output matrix begins or ends: no tile crosses one."""
    chunk: int

    def tiles(self) -> Iterator[tuple[int, int, list[slice]]]:
        """Ids [lo, hi) of one part, and the groups of sorted positions to multiply them with."""
        for start, stop, lo, hi in self.runs:
            height = min(stop - start, max(1, isqrt(self.chunk // 4)))
            width = max(1, self.chunk // (4 * height))
            groups = [slice(row, min(row + height, stop)) for row in range(start, stop, height)]
            for first, end in pairwise(sorted({lo, hi, *(cut for cut in self.cuts if lo < cut < hi)})):
                for column in range(first, end, width):
                    yield column, min(column + width, end), groups

    def spread(self, values_M: Tensor, like: Tensor, fill: int = 0) -> Tensor:
        """Values of sorted positions -> [N, ...] in the batch's order, `fill` where ignored."""
        out = values_M.new_full((len(like), *values_M.shape[1:]), fill)
        return out.index_copy_(0, self.position_M, values_M)


def _parts(rows: Rows) -> tuple[Tensor, ...]:
    return (rows,) if isinstance(rows, Tensor) else tuple(rows)


def _bounds(parts: Sequence[Tensor]) -> list[int]:
    return list(accumulate((len(part) for part in parts), initial=0))


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype


def _order(
    labels_N: Tensor, table: SliceTable, parts: tuple[Tensor, ...], sliced: bool, chunk: int | None
) -> tuple[_Order, Tensor]:
    bounds = _bounds(parts)
    if max(table.hi) > bounds[-1]:
        raise AnyglotError(
            f"the output matrix has {bounds[-1]} rows but the vocabulary's slices need {max(table.hi)}; "
            "expand the model to this vocabulary, or use the vocabulary it was made with"
        )
    class_N = torch.where(labels_N >= 0, table.class_of_id[labels_N.clamp_min(0)], -1)
    counts = torch.bincount(class_N + 1, minlength=len(table.lo) + 1).tolist()  # the one wait for the device
    stops = list(accumulate(counts[1:], initial=0))
    if sliced:
        runs = [(*run, *ids) for run, ids in zip(pairwise(stops), zip(table.lo, table.hi, strict=True), strict=True)]
    else:
        runs = [(0, stops[-1], 0, bounds[-1])]
    if chunk is None:
        chunk = 1 << (24 if labels_N.device.type == "cpu" else 28)
    position_M = class_N.argsort(stable=True)[counts[0] :]
    return _Order(position_M, [run for run in runs if run[0] < run[1]], bounds, chunk), class_N


class _Head:
    """Sorted hidden states and output rows of one model, multiplied tile by tile."""

    def __init__(self, hidden_ND: Tensor, parts: Sequence[Tensor], order: _Order, dtype: torch.dtype) -> None:
        self.hidden_MD = hidden_ND[order.position_M].to(dtype)
        self.parts, self.bounds = parts, _bounds(parts)
        self.wide = torch.promote_types(dtype, torch.float32)
        sizes = ((groups[0].stop - groups[0].start) * (hi - lo) for lo, hi, groups in order.tiles())
        self.buffer = hidden_ND.new_empty(
            max(sizes, default=0), dtype=self.wide
        )  # one for all tiles: fresh ones would pile up

    def part(self, lo: int) -> int:
        return next(k for k, (_, end) in enumerate(pairwise(self.bounds)) if lo < end)

    def rows(self, lo: int, hi: int) -> Tensor:
        k = self.part(lo)
        return self.parts[k][lo - self.bounds[k] : hi - self.bounds[k]].to(self.hidden_MD.dtype)

    def logits(self, group: slice, weight_SD: Tensor) -> Tensor:
        """[R, S] in the buffer, valid until the next call."""
        hidden_RD = self.hidden_MD[group]
        out_RS = self.buffer[: len(hidden_RD) * len(weight_SD)].view(len(hidden_RD), len(weight_SD))
        if self.wide == hidden_RD.dtype:
            return torch.mm(hidden_RD, weight_SD.T, out=out_RS)
        return out_RS.copy_(hidden_RD @ weight_SD.T)

    def gradients(
        self,
        order: _Order,
        hidden_ND: Tensor,
        needs: Sequence[bool],
        gradient: Callable[[slice, int, int, Tensor], Tensor],
    ) -> list[Tensor | None]:
        """Gradients of (hidden, *parts), None where not needed; `gradient` turns a tile of logits into theirs."""
        hidden_MD = torch.zeros_like(self.hidden_MD, dtype=self.wide) if needs[0] else None
        parts = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, self.wide)) if need else None
            for part, need in zip(self.parts, needs[1:], strict=True)
        ]
        for lo, hi, groups in order.tiles():
            k = self.part(lo)
            part = parts[k]
            if hidden_MD is None and part is None:
                continue
            weight_SD = self.rows(lo, hi)
            for group in groups:
                slope_RS = gradient(group, lo, hi, self.logits(group, weight_SD)).to(weight_SD.dtype)
                if hidden_MD is not None:
                    _add_product(hidden_MD[group], slope_RS, weight_SD)
                if part is not None:
                    _add_product(part[lo - self.bounds[k] : hi - self.bounds[k]], slope_RS.T, self.hidden_MD[group])
        out = None if hidden_MD is None else order.spread(hidden_MD, hidden_ND).to(hidden_ND.dtype)
        return [out, *(g if g is None else g.to(p.dtype) for g, p in zip(parts, self.parts, strict=True))]


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


class _Softmax:
    """Running peak and mass of softmaxes whose ids arrive tile by tile."""

    def __init__(self, head: _Head) -> None:
        count = len(head.hidden_MD)
        self.peak_M = head.buffer.new_full((count,), -torch.inf)
        self.mass_M = head.buffer.new_zeros(count)
        self.best_M = torch.full((count,), -1, device=head.buffer.device)

    def add(self, group: slice, lo: int, logits_RS: Tensor) -> Tensor:
        """Logits become exp(logits - peak) in place; returns [R], the factor for sums made with the older peak."""
        top_R, column_R = logits_RS.max(1)
        peak_R, old_R = torch.maximum(top_R, self.peak_M[group]), self.peak_M[group].clone()
        self.best_M[group] = torch.where(top_R > old_R, column_R + lo, self.best_M[group])
        shrink_R = (old_R - peak_R).exp()
        mass_R = logits_RS.sub_(peak_R[:, None]).exp_().sum(1)
        self.mass_M[group] = self.mass_M[group] * shrink_R + mass_R
        self.peak_M[group] = peak_R
        return shrink_R

    def lse(self) -> Tensor:
        return self.peak_M + self.mass_M.log()


def _label_columns(labels_R: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Columns [R, 1] of the labels in a tile, clamped into it, and whether they are in it [R, 1]."""
    column_R1 = labels_R[:, None] - lo
    return column_R1.clamp(0, hi - lo - 1), (column_R1 >= 0) & (column_R1 < hi - lo)


class _SpanNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, labels_N: Tensor, order: _Order, dtype: torch.dtype, *parts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = _Head(hidden_ND, parts, order, dtype)
            softmax = _Softmax(head)
            label_M = labels_N[order.position_M]
            logit_M = torch.zeros_like(softmax.mass_M)
            for lo, hi, groups in order.tiles():
                weight_SD = head.rows(lo, hi)
                for group in groups:
                    logits_RS = head.logits(group, weight_SD)
                    column_R1, inside_R1 = _label_columns(label_M[group], lo, hi)
                    logit_M[group] += torch.where(inside_R1, logits_RS.gather(1, column_R1), 0)[:, 0]
                    softmax.add(group, lo, logits_RS)
            lse_M = softmax.lse()
        ctx.save_for_backward(hidden_ND, label_M, lse_M, *parts)
        ctx.order, ctx.dtype = order, dtype
        predicted_N = order.spread(softmax.best_M, labels_N, fill=-1)
        ctx.mark_non_differentiable(predicted_N)
        return order.spread(lse_M - logit_M, labels_N), order.spread(lse_M, labels_N), predicted_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll_grad_N: Tensor, lse_grad_N: Tensor, _: Tensor) -> tuple[Any, ...]:
        hidden_ND, label_M, lse_M, *parts = ctx.saved_tensors
        order: _Order = ctx.order
        with torch.autocast(hidden_ND.device.type, enabled=False):
            nll_grad_M = nll_grad_N[order.position_M]
            softmax_grad_M = nll_grad_M + lse_grad_N[order.position_M]

            def gradient(group: slice, lo: int, hi: int, logits_RS: Tensor) -> Tensor:
                slope_RS = logits_RS.sub_(lse_M[group, None]).exp_().mul_(softmax_grad_M[group, None])
                column_R1, inside_R1 = _label_columns(label_M[group], lo, hi)
                return slope_RS.scatter_add_(1, column_R1, torch.where(inside_R1, -nll_grad_M[group, None], 0))

            head = _Head(hidden_ND, parts, order, ctx.dtype)
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            hidden_grad, *part_grads = head.gradients(order, hidden_ND, needs, gradient)
        return hidden_grad, None, None, None, *part_grads


class _SpanKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        order: _Order,
        dtypes: tuple[torch.dtype, torch.dtype],
        size: int,
        reference: tuple[Tensor, ...],
        *parts: Tensor,
    ) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            policy = _Head(hidden_ND, parts, order, dtypes[0])
            other = _Head(reference[0], reference[1:], order, dtypes[1])
            p, q = _Softmax(policy), _Softmax(other)
            gap_M = torch.zeros_like(q.mass_M)  # sum of exp(reference logit - peak) x (reference - policy logit)
            for lo, hi, groups in order.tiles():
                weight_SD, other_SE = policy.rows(lo, hi), other.rows(lo, hi)
                for group in groups:
                    logits_RS = policy.logits(group, weight_SD)
                    if lo < size:
                        other_RS = other.logits(group, other_SE)
                        gap_RS = other_RS - logits_RS
                        shrink_R = q.add(group, lo, other_RS)
                        gap_M[group] = gap_M[group] * shrink_R + gap_RS.mul_(other_RS).sum(1)
                    p.add(group, lo, logits_RS)
            lse_M, other_lse_M = p.lse(), q.lse()
        ctx.save_for_backward(hidden_ND, lse_M, other_lse_M, *reference, *parts)
        ctx.order, ctx.dtypes, ctx.size, ctx.parts = order, dtypes, size, len(parts)
        return order.spread(gap_M / q.mass_M - other_lse_M + lse_M, hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        hidden_ND, lse_M, other_lse_M, *tensors = ctx.saved_tensors
        order: _Order = ctx.order
        parts, (other_hidden_NE, *other_parts) = tensors[-ctx.parts :], tensors[: -ctx.parts]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            grad_M = grad_N[order.position_M]
            other = _Head(other_hidden_NE, other_parts, order, ctx.dtypes[1])

            def gradient(group: slice, lo: int, hi: int, logits_RS: Tensor) -> Tensor:
                gap_RS = logits_RS.sub_(lse_M[group, None]).exp_()
                if lo < ctx.size:
                    gap_RS -= other.logits(group, other.rows(lo, hi)).sub_(other_lse_M[group, None]).exp_()
                return gap_RS.mul_(grad_M[group, None])

            head = _Head(hidden_ND, parts, order, ctx.dtypes[0])
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
            hidden_grad, *part_grads = head.gradients(order, hidden_ND, needs, gradient)
        return hidden_grad, None, None, None, None, *part_grads
