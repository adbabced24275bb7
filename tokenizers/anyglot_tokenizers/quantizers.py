"""Quantizers other than the residual one with moving averages, behind the same interface, and `make_quantizer`.

Finite scalars (FSQ, arXiv 2309.15505) and codebooks behind a linear map (SimVQ, arXiv 2411.02038) are layers of
vector-quantize-pytorch (Lucidrains). Lookup-free bits (LFQ, MAGVIT-v2, arXiv 2310.05737) are finite scalars of two
levels with an entropy loss of our own: the library's holds positions x codes probabilities at once and, over several
processes, throws the sum over them away. Residual loops, dropout, masks and the single straight-through are shared.

This file knows nothing of encoders, media or files. Shapes as in `quantize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.quantize import Quantizer, ResidualQuantizer, nearest, sum_over_processes, world_size

KINDS = ("rvq", "fsq", "lfq", "simvq")


def make_quantizer(
    kind: str,
    dim: int,
    num_quantizers: int,
    codebook_size: int,
    *,
    dropout: float = 0.1,
    stage_steps: int = 50,
    **options: Any,
) -> Quantizer:
    """A quantizer of one of four kinds.

    Args:
        kind: "rvq", codebooks that follow the latents by moving averages, the best at small scale; "fsq", a fixed grid
            and no loss; "lfq", one bit per dim; "simvq", random codebooks behind a learnt linear map.
        dim: latent dims D.
        num_quantizers: K; all kinds are residual, so the first k codes decode alone.
        codebook_size: C; for "fsq" a product of factors up to 8, for "lfq" a power of two.
        dropout: probability that a training item uses only its first k quantizers.
        stage_steps: see `ResidualQuantizer`; other kinds start at once.
        options: further options of the class: `ResidualQuantizer`, `FiniteScalarQuantizer`, `LookupFreeQuantizer`,
            `SimpleQuantizer`.

    Raises ValueError for an unknown kind and impossible sizes, TypeError for options that the kind does not have.
    """
    if kind == "rvq":
        return ResidualQuantizer(
            dim, num_quantizers, codebook_size, dropout=dropout, stage_steps=stage_steps, **options
        )
    if kind == "fsq":
        return FiniteScalarQuantizer(dim, num_quantizers, codebook_size, dropout=dropout, **options)
    if kind == "lfq":
        return LookupFreeQuantizer(dim, num_quantizers, codebook_size, dropout=dropout, **options)
    if kind == "simvq":
        return SimpleQuantizer(dim, num_quantizers, codebook_size, dropout=dropout, **options)
    raise ValueError(f"unknown quantizer {kind!r}; known are {', '.join(KINDS)}")


class FiniteScalarQuantizer(Quantizer):
    """Each dim of a few is rounded to one of its levels (FSQ); a code is the combination.

    The levels of a dim lie evenly in [-1, 1]; what rounding leaves is at most one L-th of the range that was rounded,
    so quantizer i rounds to the same levels times L^-i, as the library's ResidualFSQ. Latents are bounded to that range
    by tanh, so that every level serves the same share of it. The straight-through is around all rounding together.

    Args:
        dim: latent dims D; a linear map leads to one dim per entry of `levels` and back, where they differ.
        num_quantizers: K.
        codebook_size: C, the product of the levels; `levels_of` finds them.
        levels: give them instead; then `codebook_size` must be their product.
        dropout: see `Quantizer`.
    """

    levels: Tensor
    bounded = True

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        levels: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        from vector_quantize_pytorch import FSQ

        if codebook_size > 2**24:
            raise ValueError(f"codebook_size {codebook_size} is more than 2**24, beyond which float32 ids are inexact")
        levels = levels_of(codebook_size) if levels is None else list(levels)
        if not levels or min(levels) < 2 or math.prod(levels) != codebook_size:
            raise ValueError(f"levels {levels} must be 2 or more each, with codebook_size {codebook_size} as product")
        if codebook_size * len(levels) > 2**25:
            raise ValueError(
                f"a table of {codebook_size} codes of {len(levels)} levels is too large; use more quantizers"
            )
        super().__init__(dim, num_quantizers, codebook_size, codebook_dim=len(levels), dropout=dropout)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        with torch.device("cpu"):  # it cannot be made for "meta"
            layer = FSQ(levels, preserve_symmetry=True, bound_hard_clamp=True)
        self.layer = layer.to(torch.empty(0).device)

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(int(level) for level in self.levels)

    def _quantize(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_Md = self._bound(x_Md)
        used_KM = torch.ones(num_used, len(x_Md), dtype=torch.bool, device=x_Md.device)
        if self.training:
            self.steps += 1
            depth_M = self._depths(batch, num_used, x_Md.device)[item_M]
            used_KM = torch.arange(num_used, device=x_Md.device)[:, None] < depth_M
        q_Md, codes_KM, residual_KMd = self._round(x_Md, used_KM)
        return x_Md + (q_Md - x_Md).detach(), codes_KM, self._loss(residual_KMd, used_KM), used_KM

    def _assign(self, x_Md: Tensor, num_used: int) -> Tensor:
        used_KM = torch.ones(num_used, len(x_Md), dtype=torch.bool, device=x_Md.device)
        return self._round(self._bound(x_Md), used_KM)[1]

    def _round(self, x_Md: Tensor, used_KM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the rounded, codes `[k, M]`, and what each quantizer saw `[k, M, d]` in units of its own scale."""
        total_Md = torch.zeros_like(x_Md)
        codes, residuals = [], []
        for index, used_M in enumerate(used_KM):
            scale_d = self.levels**-index
            residual_Md = (x_Md - total_Md) / scale_d
            with torch.no_grad():
                entry_1Md, code_1M = self.layer(residual_Md[None])
                total_Md = total_Md + entry_1Md[0] * scale_d * used_M[:, None]
                codes.append(code_1M[0].long() * used_M)
            residuals.append(residual_Md)
        return total_Md, torch.stack(codes), torch.stack(residuals)

    def _bound(self, x_Md: Tensor) -> Tensor:
        reach_d = self.levels / (self.levels - 1)
        return reach_d * torch.tanh(x_Md / reach_d)

    def _loss(self, residual_KMd: Tensor, used_KM: Tensor) -> Tensor:
        return residual_KMd.new_zeros(())

    def _entries(self, index: int) -> Tensor:
        entries_Cd: Tensor = self.layer.implicit_codebook * self.levels**-index
        return entries_Cd


class LookupFreeQuantizer(FiniteScalarQuantizer):
    """Each dim of log2 C is rounded to its sign (LFQ); a code is the bits, the first dim the lowest.

    The loss is commitment plus `entropy_weight` times the entropy loss of MAGVIT-v2: each position should be sure of
    its code (low mean entropy), and the batch use all codes (high entropy of the mean). Both are exact. Bits of a
    position are independent given its latents, so its entropy is the sum over bits; and the mean over positions of the
    joint probabilities is one matrix product of those of the lower and of the upper half of the bits, with no positions
    x codes matrix. Over several processes the batch is that of all.

    Args:
        dim: latent dims D; a linear map leads to log2 C dims and back, where they differ.
        num_quantizers: K; quantizer i takes the signs of what is left over, times 2^-i.
        codebook_size: C, a power of two.
        entropy_weight: of the entropy loss, relative to the commitment loss.
        diversity: weight of the batch's entropy within the entropy loss.
        inverse_temperature: of the softmax over codes, for the entropies only; logits are twice the product.
        dropout: see `Quantizer`.
    """

    bounded = False

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        inverse_temperature: float = 10.0,
        dropout: float = 0.0,
    ) -> None:
        bits = codebook_size.bit_length() - 1
        if codebook_size != 2**bits or bits < 1:
            raise ValueError(f"codebook_size {codebook_size} must be a power of two for lookup-free bits")
        super().__init__(dim, num_quantizers, codebook_size, levels=[2] * bits, dropout=dropout)
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.inverse_temperature = inverse_temperature

    def _bound(self, x_Md: Tensor) -> Tensor:
        return x_Md

    def _loss(self, residual_KMd: Tensor, used_KM: Tensor) -> Tensor:
        losses = []
        for index, (residual_Md, used_M) in enumerate(zip(residual_KMd, used_KM, strict=True)):
            residual_Rd = residual_Md[used_M]
            sign_Rd = torch.where(residual_Rd < 0, -1.0, 1.0)
            loss = F.mse_loss(residual_Rd, sign_Rd) * 4.0**-index if len(residual_Rd) else residual_Rd.sum()
            if self.training and self.entropy_weight > 0:
                sure, diverse = self._entropies(residual_Rd)
                loss = loss + self.entropy_weight * (sure - self.diversity * diverse)
            losses.append(loss)
        return torch.stack(losses).mean()

    def _entropies(self, x_Rd: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of the positions' codes; entropy of their mean over all processes. Both in nats."""
        logit_Rd = 4 * self.inverse_temperature * x_Rd  # of +1 against -1
        each = (F.softplus(logit_Rd) - logit_Rd * logit_Rd.sigmoid()).sum() / max(len(x_Rd), 1)
        half = -(-self.codebook_dim // 2)
        low_RC, high_RC = self._joint(logit_Rd[:, :half]), self._joint(logit_Rd[:, half:])
        sum_C = (high_RC.T @ low_RC).flatten()
        if world_size() > 1:
            total = sum_over_processes(torch.cat([sum_C.detach(), sum_C.new_tensor([len(x_Rd)])]))
            own_C = sum_C * world_size() / total[-1].clamp(min=1)  # gradients are averaged over processes
            mean_C = own_C + (total[:-1] / total[-1].clamp(min=1) - own_C).detach()
        else:
            mean_C = sum_C / max(len(x_Rd), 1)
        return each, torch.special.entr(mean_C.clamp(min=1e-12)).sum()

    def _joint(self, logit_Rd: Tensor) -> Tensor:
        """Probabilities of all combinations of bits, `[R, 2 ** bits]`, the first bit the lowest."""
        joint_RC = logit_Rd.new_ones(len(logit_Rd), 1)
        for logit_R in logit_Rd.unbind(1):
            on_R1 = logit_R.sigmoid()[:, None]
            joint_RC = torch.cat([joint_RC * (1 - on_R1), joint_RC * on_R1], dim=1)
        return joint_RC


class SimpleQuantizer(Quantizer):
    """Random codebooks that never change, each behind a linear map that is learnt (SimVQ): all entries move together.

    The loss pulls latents to entries (commitment) and, through the map, entries to latents.

    Args:
        dim: latent dims D.
        num_quantizers: K; each has a codebook and a map of its own and quantizes what the ones before left over.
        codebook_size: C.
        codebook_dim: see `Quantizer`.
        codebook_weight: of the pull of entries to latents, relative to the commitment loss.
        dropout: see `Quantizer`.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        codebook_weight: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        from vector_quantize_pytorch import SimVQ

        super().__init__(dim, num_quantizers, codebook_size, codebook_dim=codebook_dim, dropout=dropout)
        self.codebook_weight = codebook_weight
        # codebook and map only: the library's forward would give each quantizer a straight-through of its own
        self.layers = nn.ModuleList(SimVQ(self.codebook_dim, codebook_size) for _ in range(num_quantizers))

    def _quantize(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        used_KM = torch.ones(num_used, len(x_Md), dtype=torch.bool, device=x_Md.device)
        if self.training:
            self.steps += 1
            depth_M = self._depths(batch, num_used, x_Md.device)[item_M]
            used_KM = torch.arange(num_used, device=x_Md.device)[:, None] < depth_M
        total_Md = torch.zeros_like(x_Md)
        losses, codes = [], []
        for index, used_M in enumerate(used_KM):
            residual_Md = x_Md - total_Md
            code_M = nearest(residual_Md.detach(), *self._table(index)) * used_M
            entry_Md = self._mapped(index, code_M) * used_M[:, None]
            losses.append(self._pull(residual_Md[used_M], entry_Md[used_M]))
            total_Md = total_Md + entry_Md.detach()
            codes.append(code_M)
        return x_Md + (total_Md - x_Md).detach(), torch.stack(codes), torch.stack(losses).mean(), used_KM

    def _assign(self, x_Md: Tensor, num_used: int) -> Tensor:
        total_Md = torch.zeros_like(x_Md)
        codes = []
        for index in range(num_used):
            embed_Cd, half_C = self._table(index)
            codes.append(nearest(x_Md - total_Md, embed_Cd, half_C))
            total_Md = total_Md + F.embedding(codes[-1], embed_Cd)
        return torch.stack(codes)

    def _pull(self, residual_Rd: Tensor, entry_Rd: Tensor) -> Tensor:
        if len(residual_Rd) == 0:
            return (residual_Rd + entry_Rd).sum()
        commit = F.mse_loss(residual_Rd, entry_Rd.detach())
        return commit + self.codebook_weight * F.mse_loss(entry_Rd, residual_Rd.detach())

    def _mapped(self, index: int, code_M: Tensor) -> Tensor:
        """Entries of codes, with the gradient of the map."""
        layer: Any = self.layers[index]
        entry_Md: Tensor = layer.code_transform(F.embedding(code_M, layer.frozen_codebook))
        return entry_Md

    def _entries(self, index: int) -> Tensor:
        layer: Any = self.layers[index]
        entries_Cd: Tensor = layer.codebook
        return entries_Cd

    def _sources(self, index: int) -> list[Tensor]:
        layer: Any = self.layers[index]
        return [layer.frozen_codebook, layer.code_transform.weight]


def levels_of(codebook_size: int, most: int = 8) -> list[int]:
    """The fewest levels from 2 to `most` whose product is `codebook_size`, as even as can be, largest first.

    Raises ValueError if there are none.
    """

    def search(size: int, most: int) -> list[list[int]]:
        if size == 1:
            return [[]]
        return [
            [level, *rest]
            for level in range(min(size, most), 1, -1)
            if size % level == 0
            for rest in search(size // level, level)
        ]

    found = search(codebook_size, most) if codebook_size > 1 else []
    if not found:
        raise ValueError(
            f"codebook_size {codebook_size} is no product of levels up to {most}; give levels, or a size such as "
            "512 (8 8 8) or 1000 (8 5 5 5)"
        )
    return min(found, key=lambda levels: (len(levels), -min(levels)))
