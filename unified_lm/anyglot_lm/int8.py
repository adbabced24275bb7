"""Weights in int8, for machines with little memory: one scale per output row, activations as they are.

A quarter of the memory of float32 and, where a step waits for memory, up to as much less time; logits change by about
1 % of their spread. Only the engine uses it: a model so quantized does not train and is not saved. torch's own operator
multiplies without unpacking the matrix on a CPU; elsewhere the matrix is unpacked into the activations' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    if x.device.type == "cpu":
        flat = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight_NK, scales_N)
        product: Tensor = flat.view(*x.shape[:-1], -1)
    else:
        product = F.linear(x, weight_NK.to(x.dtype)) * scales_N
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
