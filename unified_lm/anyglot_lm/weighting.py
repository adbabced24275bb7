"""Weights of the loss: fixed factors per modality and per codebook, or weights learned from the uncertainty of each.

`SpanWeights` holds them, `weighted_sum` makes the one scalar to differentiate from `span_nll`'s values per position.
The scalar is a plain sum over positions whose weights do not depend on the batch, so that dividing it by a constant
makes accumulation, and ranks with uneven numbers of targets, exact. It computes no logits and logs nothing.

Shapes: N positions, C slice classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anyglot_lm.loss import SpanNLL, class_sums
from anyglot_tokenizers.errors import ManifestError

LIMIT = 4.0
"""Learned log-variances stay within ±LIMIT."""


class SpanWeights(nn.Module):
    """A weight per slice class, 1 on average.

    Fixed: `factors` scaled so that their mean, weighted by `shares`, is 1.

    Learned (Kendall et al. 2018, arXiv 1705.07115, in its form for classification): with a parameter s_c per class,
    each position of class c costs factor_c (exp(-s_c) nll + s_c / 2), least at exp(-s_c) = 1 / (2 x mean nll of c): a
    class that stays hard weighs less. Three things keep it from running away: the penalty is paid per position, as
    the gain is, so that a class is neither pushed nor pulled by batches without it; s_c = 4 tanh(`log_variance` / 4)
    stays within ±4, also for a class whose nll goes to 0; and all is divided by the mean weight (held constant in the
    gradient, so that it moves no optimum), which keeps the scale of the loss and of the learning rate. Give
    `log_variance` no weight decay.

    Args:
        class_names: of the slice classes: "text", "image", "speech/0", "speech/1", ...
        factors: by class name or modality, default 1; the name of one codebook beats that of its modality.
        shares: expected share (or number) of targets per class, default equal.
        learned: learn s_c.

    Raises:
        ManifestError: a name that is no class or modality, or factors or shares that are negative or all 0.
    """

    factor_C: Tensor
    share_C: Tensor

    def __init__(
        self,
        class_names: Sequence[str],
        factors: Mapping[str, float] | None = None,
        *,
        shares: Sequence[float] | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        factors, shares = factors or {}, [1.0] * len(class_names) if shares is None else shares
        modalities = [name.partition("/")[0] for name in class_names]
        known = list(dict.fromkeys([*modalities, *class_names]))
        unknown = sorted(factors.keys() - set(known))
        if unknown:
            kind = "codebook" if "/" in unknown[0] else "modality"
            raise ManifestError(f"loss weights: no {kind} {unknown[0]!r}; there are {', '.join(known)}")
        chosen = [
            factors.get(name, factors.get(modality, 1.0))
            for name, modality in zip(class_names, modalities, strict=True)
        ]
        if len(shares) != len(class_names):
            raise ManifestError(f"loss weights: {len(shares)} shares for {len(class_names)} classes; give one for each")
        for what, values in (("factor", chosen), ("share", shares)):
            for name, value in zip(class_names, values, strict=True):
                if not (math.isfinite(value) and value >= 0):
                    raise ManifestError(f"loss weights: the {what} of {name!r} is {value}; give 0 or a positive number")
        total = sum(share * factor for share, factor in zip(shares, chosen, strict=True))
        if total == 0:
            raise ManifestError("loss weights: no class with a share of the targets has a factor; nothing would train")
        self.class_names = list(class_names)
        scale = sum(shares) / total
        self.register_buffer("factor_C", torch.tensor([scale * factor for factor in chosen]), persistent=False)
        self.register_buffer("share_C", torch.tensor([share / sum(shares) for share in shares]), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(len(class_names))) if learned else None

    def weights(self) -> tuple[Tensor, Tensor]:
        """(weight of the nll [C], constant cost of a position [C]); the second is 0 for fixed weights."""
        if self.log_variance is None:
            return self.factor_C, torch.zeros_like(self.factor_C)
        s_C = LIMIT * torch.tanh(self.log_variance.to(self.factor_C.dtype) / LIMIT)
        weight_C = self.factor_C * (-s_C).exp()
        mean = (self.share_C * weight_C).sum().detach()
        return weight_C / mean, self.factor_C * s_C / 2 / mean

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={w:.3g}" for name, w in zip(self.class_names, self.weights()[0].tolist(), strict=True)
        )


def weighted_sum(nll: SpanNLL, weights: SpanWeights, z_loss: float = 0.0) -> Tensor:
    """Sum over the valid positions of weight x nll + z_loss x factor x lse²: one differentiable scalar.

    `z_loss` (PaLM, arXiv 2204.02311) keeps the normaliser near 1; it is weighted by the fixed factors only.
    A batch without a valid label gives 0, and gradients of 0 everywhere.
    """
    weight_C, cost_C = weights.weights()
    classes = len(weight_C)
    total = (weight_C * class_sums(nll.nll, nll.slice_class, classes)).sum()
    if weights.log_variance is not None:
        total = total + (cost_C * class_sums(nll.slice_class >= 0, nll.slice_class, classes)).sum()
    if z_loss:
        total = total + z_loss * (weights.factor_C * class_sums(nll.lse.square(), nll.slice_class, classes)).sum()
    return total
