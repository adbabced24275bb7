"""Attention for training on a CPU: torch's fused kernel there is slow backwards in bf16, plain products are not.

`faster_on_cpu` puts it in the place of "sdpa" in a model, through transformers' own registry of attention functions.
For short rows in bf16 attention is two matrix products and a softmax, without copies of grouped keys and values;
anything else (float32, long rows whose scores would fill the memory, other devices) goes to
`scaled_dot_product_attention` as before. Masks are made by transformers as for sdpa.

Shape suffixes: B rows, H heads, K heads of keys and values, G = H / K, T positions, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_plain_on_cpu"
MOST_POSITIONS = 1024
"""Longer rows go to sdpa: memory for scores grows with the square."""


def faster_on_cpu(model: PreTrainedModel) -> None:
    """Let a model that runs "sdpa" use this file's attention, in place; others are left alone."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query `[B, H, T, D]`, key and value `[B, K, T, D]` -> `[B, T, H, D]`."""
    mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    short = query.shape[2] == key.shape[2] <= MOST_POSITIONS
    in_bf16 = query.device.type == "cpu" and (mixed or query.dtype == torch.bfloat16)
    usual = attention_mask is None or attention_mask.dtype == torch.bool
    if not (in_bf16 and short and usual) or any(kwargs.get(name) for name in ("dropout", "softcap")):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    with torch.autocast("cpu", enabled=False):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return _plain((query * scale).bfloat16(), key.bfloat16(), value.bfloat16(), attention_mask), None


def _plain(query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
    batch, heads, length, size = query_BHTD.shape
    grouped = key_BKTD.shape[1], heads // key_BKTD.shape[1]
    if mask_B1TT is None:  # what transformers leaves to sdpa's is_causal
        mask_B1TT = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    bias_B11TT = torch.zeros(mask_B1TT.shape, dtype=torch.bfloat16).masked_fill_(~mask_B1TT, -torch.inf)[:, :, None]
    query_BKQD = query_BHTD.reshape(batch, grouped[0], -1, size)
    scores_BKQT = query_BKQD @ key_BKTD.transpose(2, 3)
    shares = (scores_BKQT.view(batch, *grouped, length, length) + bias_B11TT).softmax(-1)
    output = shares.view(scores_BKQT.shape) @ value_BKTD
    return output.view(batch, heads, length, size).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
