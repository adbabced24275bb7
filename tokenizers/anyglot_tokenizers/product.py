"""`ProductQuantizer`: one id that says several things, each from a codebook of its own.

The latent is cut into parts, each part goes to the nearest entry of its codebook, and the id is the number whose digits
are the entries (product quantization, Jégou et al. 2011, doi 10.1109/TPAMI.2010.57). There are as many ids as
combinations, but only the sum of the codebooks to learn: an id that was never met is understood from its digits, if
what is built on it keeps them apart, as `anyglot_lm.factored` does. What is in a part is the encoder's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from anyglot_tokenizers.quantize import Quantizer, ResidualQuantizer


class ProductQuantizer(Quantizer):
    """Latents of D dims to one id per position, `digit_0 + size_0 * (digit_1 + size_1 * ...)`.

    Args:
        dims: latent dims of each part; D is their sum.
        sizes: entries of each part's codebook; the number of ids is their product, 2^20 at most.
        stage_steps: training steps before the codebooks start, see `ResidualQuantizer`.

    Raises ValueError for sizes that cannot be.
    """

    def __init__(self, dims: Sequence[int], sizes: Sequence[int], *, stage_steps: int = 50) -> None:
        if len(dims) != len(sizes) or len(sizes) < 2 or min(sizes) < 2 or math.prod(sizes) > 2**20:
            raise ValueError(
                f"dims {list(dims)} and sizes {list(sizes)} must be two or more of each, sizes of 2 at least, with a "
                "product of 2^20 at most"
            )
        super().__init__(sum(dims), 1, math.prod(sizes))
        self.dims, self.sizes = tuple(dims), tuple(sizes)
        self.parts = nn.ModuleList(
            ResidualQuantizer(dim, 1, size, stage_steps=stage_steps, dropout=0.0)
            for dim, size in zip(dims, sizes, strict=True)
        )

    @property
    def _quantizers(self) -> Iterator[ResidualQuantizer]:
        return (part for part in self.parts if isinstance(part, ResidualQuantizer))

    @property
    def factors(self) -> tuple[int, ...]:
        return self.sizes

    def _quantize(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.training:
            self.steps += 1
        found = [
            part._quantize(x_Mp, item_M, batch, num_used)
            for part, x_Mp in zip(self._quantizers, x_Md.split(self.dims, 1), strict=True)
        ]
        quantized, codes, losses, used = zip(*found, strict=True)
        return torch.cat(quantized, 1), self._joined(codes), torch.stack(losses).mean(), used[0]

    def _assign(self, x_Md: Tensor, num_used: int) -> Tensor:
        parts = zip(self._quantizers, x_Md.split(self.dims, 1), strict=True)
        return self._joined([part._assign(x_Mp, num_used) for part, x_Mp in parts])

    def _joined(self, codes: Sequence[Tensor]) -> Tensor:
        joined = codes[-1]
        for code_1M, size in zip(reversed(codes[:-1]), reversed(self.sizes[:-1]), strict=True):
            joined = code_1M + size * joined
        return joined

    def _look_up(self, index: int, ids: Tensor) -> Tensor:
        entries = []
        for part, size in zip(self._quantizers, self.sizes, strict=True):
            entries.append(part._look_up(0, ids % size))
            ids = ids // size
        return torch.cat(entries, -1)

    def _entries(self, index: int) -> Tensor:
        return self._look_up(index, torch.arange(self.codebook_size, device=self.steps.device))
