"""Perplexity of plain text: how well a model still knows the language it started from.

The text is cut into windows of equal length without overlap, each from a fresh start and without control ids, and every
id but a window's first counts. A unified model is measured over the slice that text competes in (text, controls, start
ids), so codes that text never contains cost it nothing. It knows nothing of media.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyglot_lm.loss import IGNORE, SliceTable, span_nll
from anyglot_lm.segments import TextCodec
from anyglot_lm.tuning import output_rows
from anyglot_tokenizers.errors import ManifestError


@torch.inference_mode()
def text_perplexity(
    model: PreTrainedModel, codec: TextCodec, text: str, *, rows: int | None = None, window: int = 512, batch: int = 4
) -> float:
    """exp of the mean negative log-likelihood (nats) per id of `text`.

    Args:
        model: a causal LM.
        codec: its text tokenizer.
        text: at least one window of ids; what is left of the last whole window is left out.
        rows: ids that text competes with, `[0, rows)`: a vocabulary's `open_size`; default all.
        window: ids per window.
        batch: windows at once.

    Raises:
        ManifestError: a text shorter than a window.
    """
    ids = torch.tensor(codec.encode(text))
    windows_WT = ids[: len(ids) // window * window].view(-1, window)
    if not len(windows_WT):
        raise ManifestError(f"a text of {len(ids)} ids is shorter than one window of {window}; give a longer one")
    was_training = model.training
    model.eval()
    head = output_rows(model)
    size = rows or (len(head) if isinstance(head, Tensor) else sum(map(len, head)))
    table = SliceTable([0], [size], torch.zeros(size, dtype=torch.long))
    total, count = 0.0, 0
    for part_BT in windows_WT.split(batch):
        hidden_BTD = model.base_model(input_ids=part_BT, use_cache=False).last_hidden_state
        labels_BT = torch.cat([part_BT[:, 1:], torch.full_like(part_BT[:, :1], IGNORE)], 1)
        out = span_nll(hidden_BTD.flatten(0, 1), head, labels_BT.flatten(), table)
        total, count = total + float(out.nll.double().sum()), count + int((labels_BT != IGNORE).sum())
    model.train(was_training)
    return math.exp(total / count)
