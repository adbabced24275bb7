"""How much meaning codes carry: linear probes on them, and mutual information with labels.

Best reconstruction is not best language modelling: a linear classifier that reads words, phones or classes off the
codes says more about the second. Items of a held-out group (another speaker, say) are what counts, else a probe may
recognise the group. This file knows codes and labels, no tokenizers and no files.

Shapes: N items, K quantizers, T positions on the first grid axis, C codebook entries, D feature dims, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.metrics import interval


def bag_of_codes(codes: Tensor, codebook_sizes: Sequence[int], parts: int = 1) -> Tensor:
    """Feature vector of one item: how often each code occurs, float32 `[parts * sum(codebook_sizes)]`.

    Args:
        codes: int64 `[K, *grid]`.
        codebook_sizes: of the K quantizers.
        parts: cut the first grid axis into so many equal parts, one histogram each: a little order.

    Returns:
        Square roots of shares (Hellinger), so that Euclidean distances are those of distributions.
    """
    histograms = []
    for part in range(parts):
        first, last = (codes.shape[1] * edge // parts for edge in (part, part + 1))
        for row, size in zip(codes[:, first:last].flatten(1), codebook_sizes, strict=True):
            count = torch.bincount(row.cpu(), minlength=size).float()
            histograms.append((count / max(int(row.numel()), 1)).sqrt())
    return torch.cat(histograms)


def mean_entries(codes: Tensor, codebooks_KCD: Tensor) -> Tensor:
    """Feature vector of one item: mean over positions of the codebook entries of each quantizer, float32 `[K * D]`."""
    rows = codes.cpu().flatten(1)
    return torch.cat([F.embedding(row, book.cpu()).mean(0) for row, book in zip(rows, codebooks_KCD, strict=False)])


def context_entries(codes_T: Tensor, codebook_CD: Tensor, context: int = 2) -> Tensor:
    """Feature vectors of every position: the entries of a code and of `context` neighbours to each side,
    float32 `[T, (2 * context + 1) * D]`; for probes of phones, where each position has a label."""
    entries_TD = F.pad(F.embedding(codes_T.cpu(), codebook_CD.cpu()), (0, 0, context, context))
    return entries_TD.unfold(0, 2 * context + 1, 1).flatten(1)


def label_information(codes_N: Tensor, labels_N: Tensor) -> float:
    """Share of the labels' entropy that the codes explain, 0 to 1: I(label; code) / H(label).

    With phone labels this is HuBERT's phone-normalised mutual information (arXiv 2106.07447). It rises with the number
    of codes for want of data, so compare equal codebook sizes on equal data only.
    """
    joint = torch.zeros(int(labels_N.max()) + 1, int(codes_N.max()) + 1, dtype=torch.float64)
    joint.index_put_((labels_N.cpu(), codes_N.cpu()), torch.ones(len(codes_N), dtype=torch.float64), accumulate=True)
    joint = joint / joint.sum()
    label, code = joint.sum(1), joint.sum(0)

    def entropy(share: Tensor) -> Tensor:
        return torch.special.entr(share).sum()

    if entropy(label) == 0:
        raise AnyglotError("label information: all labels are the same; give at least two classes")
    return float((entropy(label) + entropy(code) - entropy(joint)) / entropy(label))


def fit_linear(x_ND: Tensor, y_N: Tensor, num_classes: int, *, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: weights `[D, L]` and biases `[L]`, float32.

    Minimises the mean cross-entropy plus `decay / 2` times the squared weights, a convex problem with one solution.
    """
    weight = torch.zeros(x_ND.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x_ND @ weight + bias, y_N) + decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)
    return weight.detach(), bias.detach()


def linear_probe(
    x_ND: Tensor,
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    folds: int = 5,
    decay: float = 1e-3,
) -> dict[str, Any]:
    """Accuracy of a linear classifier on items whose group it never saw.

    Groups are dealt to `folds` folds (one group each, if there are no more groups than folds) and each fold is
    predicted by a classifier trained on the others; features are centred and scaled by one factor.

    Args:
        x_ND: features, a row per item.
        labels: class of each item.
        groups: what must not be on both sides, such as the speaker; None = every item on its own.
        folds: at most so many.
        decay: see `fit_linear`.

    Returns:
        `accuracy` with its bootstrap interval `low` and `high`, `n`, `classes`, `groups`, `folds`, and `chance`: the
        accuracy of always saying the training items' commonest class.

    Raises:
        AnyglotError: fewer than two classes, or fewer than two groups.
    """
    names = sorted(set(labels))
    owners = [str(index) for index in range(len(labels))] if groups is None else list(groups)
    held_out = sorted(set(owners))
    if len(names) < 2 or len(held_out) < 2:
        raise AnyglotError(f"a probe needs two classes and two groups, got {names[:5]} and {held_out[:5]}")
    order = np.random.default_rng(0).permutation(len(held_out))
    fold_of = {held_out[group]: place % folds for place, group in enumerate(order)}
    fold_N = torch.tensor([fold_of[owner] for owner in owners])
    y_N = torch.tensor([names.index(label) for label in labels])
    right, chance = torch.zeros(len(y_N)), torch.zeros(len(y_N))
    for fold in fold_N.unique().tolist():
        train, test = fold_N != fold, fold_N == fold
        centre = x_ND[train].mean(0)
        scale = (x_ND[train] - centre).square().sum(1).mean().sqrt().clamp(min=1e-12)
        weight, bias = fit_linear((x_ND[train] - centre) / scale, y_N[train], len(names), decay=decay)
        right[test] = (((x_ND[test] - centre) / scale @ weight + bias).argmax(1) == y_N[test]).float()
        chance[test] = (y_N[test] == y_N[train].bincount().argmax()).float()
    accuracy, low, high = interval(right.tolist())
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": float(chance.mean()),
        "n": len(labels),
        "classes": len(names),
        "groups": len(held_out),
        "folds": len(fold_N.unique()),
    }
