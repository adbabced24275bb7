"""How likely a unified model finds answers that are given: within the slices of the grammar that decoding samples from.

The end of an answer counts, too. Nothing is written; what likelihoods are compared for is the caller's business
(`candidates.py`, and rankings of `anyglot eval data`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anyglot_lm.loss import IGNORE, SliceTable, span_nll
from anyglot_lm.model import hidden_states
from anyglot_lm.preference import sequence_logps
from anyglot_lm.segments import Sample
from anyglot_lm.tuning import output_rows
from anyglot_lm.unified import UnifiedModel
from anyglot_tokenizers.errors import CodesError

BATCH_IDS = 4096
"""Ids of one pass, padding included."""


@torch.inference_mode()
def log_likelihoods(model: UnifiedModel, samples: Sequence[Sample], *, mean: bool = True) -> list[float | None]:
    """Log-probability (nats) of what each sample's assistant says; None where a sample does not fit.

    A sample does not fit if a medium is too long for the vocabulary, or the whole for the model.

    Args:
        model: who is asked; its mode comes back.
        samples: what was said, the answers included.
        mean: per id that is predicted, else of the whole.
    """
    rendered = {}
    for i, sample in enumerate(samples):
        try:
            ids, loss = model.template.render(sample, model.vocabulary, model.text)
        except CodesError:
            continue
        if len(ids) <= model.model.config.max_position_embeddings:
            rendered[i] = torch.from_numpy(ids), torch.from_numpy(np.where(loss, ids, IGNORE))
    lo, hi, class_of_id = model.vocabulary.slice_table()
    table = SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id, device=model.model.device))
    was_training = model.model.training
    model.model.eval()
    found: list[float | None] = [None] * len(samples)
    order = sorted(rendered, key=lambda i: (len(rendered[i][0]), i))
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(rendered[order[count]][0]) <= BATCH_IDS:
            count += 1
        group, order = order[:count], order[count:]
        ids_BT = torch.zeros(count, len(rendered[group[-1]][0]), dtype=torch.long)
        labels_BT = torch.full_like(ids_BT, IGNORE)
        for row, i in enumerate(group):
            ids_T, labels_T = rendered[i]
            ids_BT[row, : len(ids_T)] = ids_T
            labels_BT[row, : len(ids_T) - 1] = labels_T[1:]
        for i, value in zip(group, _logps(model, ids_BT, labels_BT, table, mean), strict=True):
            found[i] = value
    model.model.train(was_training)
    return found


def _logps(model: UnifiedModel, ids_BT: Tensor, labels_BT: Tensor, table: SliceTable, mean: bool) -> list[float]:
    device = table.class_of_id.device
    positions_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
    hidden_BTD = hidden_states(model.model.base_model, ids_BT.to(device), positions_BT)
    nll = span_nll(hidden_BTD.flatten(0, 1), output_rows(model.model), labels_BT.flatten().to(device), table)
    rows_N = torch.arange(len(ids_BT), device=device).repeat_interleave(ids_BT.shape[1])
    values: list[float] = sequence_logps(nll, rows_N, len(ids_BT), mean=mean).tolist()
    return values
