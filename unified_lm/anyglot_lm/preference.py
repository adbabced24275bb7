"""Preference tuning on packed rows: log-probabilities of whole documents, and the DPO loss of pairs of them.

Pure functions of `span_nll`'s values per position, for the policy and for the reference (the model before tuning, run
without gradients). They load no pairs and run no model. An exact KL to the reference per position, as a penalty, is
`loss.span_kl`.

Shapes: N positions, S documents, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_lm.loss import SpanNLL


@dataclass(frozen=True)
class DPOLoss:
    """Per pair [P]: `loss` (differentiable); the rest is for the log, detached.

    Attributes:
        chosen_reward: beta x (policy - reference) log-probability of the chosen document.
        rejected_reward: the same of the rejected one.
        margin: chosen_reward - rejected_reward.
        accuracy: 1 where the margin is positive, else 0.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    margin: Tensor
    accuracy: Tensor


def sequence_logps(nll: SpanNLL, segment_N: Tensor, documents: int, *, mean: bool = False) -> Tensor:
    """log p of every document: the sum over its valid positions.

    Args:
        nll: from `span_nll`.
        segment_N: int64, the document each position belongs to, in [0, documents); anything where it is ignored.
        documents: S.
        mean: divide by the document's number of valid positions.

    Returns:
        float64 [S] (float32 on MPS, which has no other), since DPO compares sums of thousands of nats to a fraction of
        one. 0 for a document without a valid position.
    """
    wide = torch.float32 if nll.nll.device.type == "mps" else torch.float64
    valid_N = nll.slice_class >= 0
    at_N = torch.where(valid_N, segment_N, 0)
    zeros_S = torch.zeros(documents, dtype=wide, device=nll.nll.device)
    logp_S = zeros_S.index_add(0, at_N, -nll.nll.to(wide))
    if not mean:
        return logp_S
    return logp_S / zeros_S.index_add(0, at_N, valid_N.to(wide)).clamp_min(1)


def dpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_nll_P: Tensor | None = None,
    nll_weight: float = 1.0,
) -> DPOLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of pairs of documents.

    Args:
        policy_chosen_P: log p of the chosen documents under the policy, from `sequence_logps`; the others likewise.
        beta: strength of the tie to the reference.
        label_smoothing: share of pairs believed to be labelled the wrong way round, in [0, 0.5) (conservative DPO,
            Mitchell 2023, "A note on DPO with noisy preferences").
        chosen_nll_P: nll per id of the chosen documents (`-sequence_logps(..., mean=True)`), added with `nll_weight`
            (Pang et al. 2024, arXiv 2404.19733), which keeps the chosen documents likely.
        nll_weight: factor of `chosen_nll_P`.
    """
    chosen_P = beta * (policy_chosen_P - reference_chosen_P.detach())
    rejected_P = beta * (policy_rejected_P - reference_rejected_P.detach())
    margin_P = chosen_P - rejected_P
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)
    if chosen_nll_P is not None:
        loss_P = loss_P + nll_weight * chosen_nll_P
    margin_P = margin_P.detach()
    return DPOLoss(loss_P, chosen_P.detach(), rejected_P.detach(), margin_P, (margin_P > 0).to(margin_P.dtype))
