"""Cross-entropy under the span grammar: each label competes only inside its legal slice of the vocabulary.

At every position the grammar of decoding allows one contiguous range of ids (`Vocabulary.slice_table`): text,
controls and start ids; or codebook 0 of a modality and its end id; or a deeper codebook. `span_cross_entropy`
multiplies only that slice of the output matrix, so training optimises exactly the distribution that constrained
decoding samples from, at a fraction of the cost of the whole matrix; `sliced=False` is the plain softmax over the
whole vocabulary (needed when the model will be sampled without the grammar).

It does not shift labels (the data plan already did) and knows nothing about Lightning or ranks: it returns raw sums,
the caller normalises.

Shapes: N positions, D hidden width, V vocabulary size, C slice classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


@dataclass
class SliceTable:
    """Slices of the vocabulary: class c owns ids [lo[c], hi[c]); `class_of_id[v]` is the class of label v."""

    lo: list[int]
    hi: list[int]
    class_of_id: Tensor


@dataclass
class LossSums:
    """Raw sums over one micro-batch, one entry per slice class (float32, detached unless said).

    `total` is the differentiable scalar: sum over positions of weight(class) x (cross-entropy + z_loss x logsumexp²).
    """

    total: Tensor
    nll: Tensor
    count: Tensor
    correct: Tensor


def span_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    table: SliceTable,
    *,
    class_weights: Tensor | None = None,
    sliced: bool = True,
    z_loss: float = 0.0,
    chunk: int = 4096,
) -> LossSums:
    """Summed cross-entropy of `labels_N` given final hidden states.

    Args:
        hidden_ND: final hidden states, any float dtype.
        weight_VD: output matrix (the tied embedding or the LM head).
        labels_N: int64 labels, already shifted; -100 is ignored.
        table: the vocabulary's slices.
        class_weights: float[C] factor per slice class, default 1.
        sliced: compete inside the label's slice (True) or over the whole vocabulary (False).
        z_loss: factor of logsumexp² (PaLM, arXiv 2204.02311), on the same labels.
        chunk: rows multiplied at once, bounds the size of the logits.

    Returns:
        LossSums. A batch without a valid label gives `total` = 0 that still reaches every parameter, so that
        distributed ranks do not wait for each other.
    """
    n_classes = len(table.lo)
    nll_C = hidden_ND.new_zeros(n_classes, dtype=torch.float32)
    count_C, correct_C = torch.zeros_like(nll_C), torch.zeros_like(nll_C)
    total = hidden_ND.sum().float() * 0.0 + weight_VD.sum().float() * 0.0
    valid_N = labels_N != IGNORE
    class_N = torch.where(valid_N, table.class_of_id[labels_N.clamp_min(0)], -1)
    for c in range(n_classes):
        rows_all = (class_N == c).nonzero()[:, 0]
        lo, hi = (table.lo[c], table.hi[c]) if sliced else (0, weight_VD.shape[0])
        for rows_R in rows_all.split(chunk):
            logits_RS = (hidden_ND[rows_R] @ weight_VD[lo:hi].T).float()
            target_R = labels_N[rows_R] - lo
            nll_R = F.cross_entropy(logits_RS, target_R, reduction="none")
            term = nll_R.sum()
            if z_loss:
                term = term + z_loss * logits_RS.logsumexp(-1).square().sum()
            total = total + (term if class_weights is None else class_weights[c] * term)
            with torch.no_grad():
                nll_C[c] += nll_R.sum()
                count_C[c] += len(rows_R)
                correct_C[c] += (logits_RS.argmax(-1) == target_R).sum()
    return LossSums(total, nll_C, count_C, correct_C)
