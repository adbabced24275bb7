"""Layers that the published audio codecs share, made to run and not to train.

Everything works on `[B, T, C]`, channels last: on a CPU these convolutions are up to 1.8 times as fast as those of
`[B, C, T]`, a kernel of one is a matrix product, and a transposed convolution whose kernel is twice its stride is two.
Parameters have the names and shapes of PyTorch's own layers, so that checkpoints load as they are; only their order in
memory differs. This file knows no codec.

Shapes: B items, T positions, C channels, K quantizers, E entries of a codebook, D dims of an entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE = 2**17
"""Elements that fit into a core's cache several times over."""


class Conv1d(nn.Module):
    """`nn.Conv1d` over `[B, T, C]`, `[outputs, inputs, kernel]` the weight."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        bound = (inputs * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, kernel, inputs).uniform_(-bound, bound).transpose(1, 2))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.kernel == self.stride == 1:
            return F.linear(x_BTC, self.weight[:, :, 0], self.bias)
        x_BC1T = x_BTC.contiguous()[:, None].permute(0, 3, 1, 2)  # channels last, without moving anything
        stride, padding, dilation = (1, self.stride), (0, self.padding), (1, self.dilation)
        y_BC1T = F.conv2d(x_BC1T, self.weight[:, :, None], self.bias, stride, padding, dilation)
        return y_BC1T.permute(0, 2, 3, 1)[:, 0]

    def add_to(self, x_BTC: Tensor, h_BTC: Tensor) -> Tensor:
        """`x + self(h)` for a kernel of one, in place of x."""
        if self.bias is not None:
            x_BTC.add_(self.bias)
        return x_BTC.baddbmm_(h_BTC, self.weight[:, :, 0].T.expand(len(x_BTC), -1, -1))


class ConvTranspose1d(nn.Module):
    """`nn.ConvTranspose1d` over `[B, T, C]`, whose kernel is twice its stride, `[inputs, outputs, kernel]` the weight.

    Each output block of `stride` positions is then a product of two inputs: its own, and the one before. `padding` is
    taken off at both ends, `output_padding` left on at the second.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, padding: int = 0, output_padding: int = 0) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.output_padding = 2 * stride, stride, padding, output_padding
        bound = (outputs * self.kernel) ** -0.5
        weight_kOC = torch.empty(self.kernel, outputs, inputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight_kOC.permute(2, 1, 0))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = self.between(F.pad(x_BTC, (0, 0, 1, 1)))
        return y_BTC[:, self.padding : y_BTC.shape[1] - self.padding + self.output_padding]

    def between(self, x_BTC: Tensor) -> Tensor:
        """The (T - 1) * stride outputs that depend on two inputs of `x_BTC` each; nothing is taken off."""
        inputs, outputs, _ = self.weight.shape
        now_OC, before_OC = self.weight.permute(2, 1, 0).reshape(2, self.stride * outputs, inputs)
        y_BTO = F.linear(x_BTC[:, 1:], now_OC, self.bias.repeat(self.stride))
        y_BTO.baddbmm_(x_BTC[:, :-1], before_OC.T.expand(len(x_BTC), -1, -1))
        return y_BTO.reshape(len(x_BTC), -1, outputs)


class Snake(nn.Module):
    """x + sin(a x)^2 / a, with one a per channel (Ziyin et al., arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x_BTC: Tensor, inplace: bool = False) -> Tensor:
        alpha_C = self.alpha[0, :, 0]
        inverse_C = (alpha_C + 1e-9).reciprocal()
        if torch.compiler.is_compiling() or not x_BTC.is_cpu:
            return x_BTC + inverse_C * (x_BTC * alpha_C).sin().square()
        x_BTC = x_BTC.contiguous()
        y_BTC = x_BTC if inplace else torch.empty_like(x_BTC)
        rows = max(PIECE // len(alpha_C), 1)
        flat_NC, out_NC = x_BTC.view(-1, len(alpha_C)), y_BTC.view(-1, len(alpha_C))
        for piece, result in zip(flat_NC.split(rows), out_NC.split(rows), strict=True):
            torch.addcmul(piece, (piece * alpha_C).sin_().square_(), inverse_C, out=result)
        return y_BTC


class Codebooks(nn.Module):
    """Residual quantizer of plain Euclidean codebooks: each codes what the ones before it left over."""

    embed: Tensor

    def __init__(self, num_quantizers: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(num_quantizers, codebook_size, dim))
        self._norms: tuple[object, Tensor] | None = None

    def encode(self, x_BTD: Tensor, num_quantizers: int) -> Tensor:
        """Codes int64 `[B, k, T]`."""
        rest_ND = x_BTD.reshape(-1, x_BTD.shape[2])
        codes = []
        for embed_ED, norm_E in zip(self.embed[:num_quantizers], self._half_norms(), strict=False):
            codes.append(torch.addmm(norm_E, rest_ND, embed_ED.T, alpha=-1).argmin(1))
            rest_ND = rest_ND - F.embedding(codes[-1], embed_ED)
        return torch.stack(codes).unflatten(1, x_BTD.shape[:2]).transpose(0, 1)

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """Sum of the entries, `[B, T, D]`."""
        total_BTD = F.embedding(codes_BKT[:, 0], self.embed[0])
        for index in range(1, codes_BKT.shape[1]):
            total_BTD = total_BTD + F.embedding(codes_BKT[:, index], self.embed[index])
        return total_BTD

    def _half_norms(self) -> Tensor:
        """|e|^2 / 2, `[K, E]`; computed once for given entries."""
        if self.embed.is_inference():  # has no version
            return self.embed.square().sum(2) / 2
        key = (self.embed.data_ptr(), self.embed._version)
        if self._norms is None or self._norms[0] != key:
            self._norms = (key, self.embed.square().sum(2) / 2)
        return self._norms[1]

    def train(self, mode: bool = True) -> Self:
        """Switch mode as usual; also forgets what is kept of the entries."""
        self._norms = None
        return super().train(mode)


def encoder_context(layers: Iterable[nn.Module], hop: int) -> tuple[int, int]:
    """Hops of input to the left and right of its own that a code depends on, for convolutions in running order."""
    low = high = 0
    for layer in reversed([layer for layer in layers if isinstance(layer, Conv1d)]):
        low = low * layer.stride - layer.padding
        high = high * layer.stride - layer.padding + (layer.kernel - 1) * layer.dilation
    return -(low // hop), max(high // hop, 0)


def decoder_context(layers: Iterable[nn.Module], hop: int) -> tuple[int, int]:
    """Codes to the left and right of its own that a hop of output depends on, for convolutions in running order."""
    low, high = 0, hop - 1
    for layer in reversed([layer for layer in layers if isinstance(layer, Conv1d | ConvTranspose1d)]):
        if isinstance(layer, ConvTranspose1d):
            low = -((layer.kernel - 1 - layer.padding - low) // layer.stride)
            high = (high + layer.padding) // layer.stride
        else:
            low, high = low - layer.padding, high - layer.padding + (layer.kernel - 1) * layer.dilation
    return -low, high


def fold_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the parts of weight-normed weights (Salimans & Kingma, arXiv 1602.07868) by the weights themselves.

    Knows both spellings, `weight_g` and `weight_v`, and those of `torch.nn.utils.parametrizations`. Raises ValueError
    for a part that is no scale, one number for each index of the first or the last axis.
    """
    folded = dict(tensors)
    for scale, direction in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        for name in [name for name in tensors if name.endswith(scale)]:
            stem = name.removesuffix(scale)
            if f"{stem}{direction}" in folded:
                g, v = folded.pop(name).float(), folded.pop(f"{stem}{direction}").float()
                scales = ([size if at == axis else 1 for at, size in enumerate(v.shape)] for axis in (0, v.ndim - 1))
                if list(g.shape) not in scales:
                    raise ValueError(f"{name} is {list(g.shape)}, {stem}{direction} is {list(v.shape)}")
                dims = [dim for dim, size in enumerate(g.shape) if size == 1]
                folded[f"{stem}weight"] = v * (g / v.square().sum(dims, keepdim=True).sqrt())
    return folded
