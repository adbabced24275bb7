"""Weights in int8, for machines with little memory: one scale per output row.

A quarter of the memory of float32; logits change by about 1 % of their spread. Only the engine uses it: a model so
quantized does not train and is not saved. On a CPU products run in bfloat16, whatever the activations' dtype: there
torch's operator multiplies a few rows without unpacking the matrix, which makes steps of small batches faster than
float32 (`benchmarks/decoding.py`); its float32 form is many times slower than float32 weights. More rows, and other
devices, unpack the matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8
"""Up to so many rows of activations, not unpacking the matrix is faster (2 cores with AVX-512)."""


class Int8Linear(nn.Module):
    """`nn.Linear` with an int8 matrix `[N, K]` and float scales `[N]`."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        super().__init__()
        scales = weight_NK.float().abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight_NK.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(weight_NK.dtype))
        self.register_buffer("bias", bias_N)

    def forward(self, x: Tensor) -> Tensor:
        return int8_product(x, self.weight, self.scales, self.bias)


def int8_product(x: Tensor, weight_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`[*, K] -> [*, N]`; rows of the matrix may be a slice."""
    flat_MK = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        flat_MK = flat_MK.bfloat16()
    if x.device.type == "cpu" and len(flat_MK) <= FEW_ROWS:
        flat_MN = torch.ops.aten._weight_int8pack_mm(flat_MK, weight_NK, scales_N.bfloat16()).to(x.dtype)
    else:
        flat_MN = F.linear(flat_MK, weight_NK.to(flat_MK.dtype)).to(x.dtype) * scales_N
    product = flat_MN.view(*x.shape[:-1], -1)
    return product if bias_N is None else product + bias_N


@torch.no_grad()
def quantize_int8(model: nn.Module) -> None:
    """Every `nn.Linear` of a model becomes an `Int8Linear`, in place; embeddings stay.

    A tied head becomes a matrix of its own.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
