"""Residual vector quantizer with exponential-moving-average codebooks.

The codebooks, their k-means and their dead-code restarts are `vector_quantize_pytorch.VectorQuantize` layers
(Lucidrains); the residual loop is our own, because the library's own residual class multiplies the encoder
gradient by the number of quantizers, runs k-means in eval mode and does not guard CPU autocast. Recipe:
SoundStream (arXiv 2107.03312), EnCodec (arXiv 2210.13438); staged k-means after Mimi (arXiv 2410.00037);
per-item dropout after DAC (arXiv 2306.06546).

This file knows nothing of encoders, media or files. Shapes: B items, N positions, D latent dims, K
quantizers, C codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.errors import AnyglotError, CodesError


class ResidualQuantizer(nn.Module):
    """K codebooks, each quantizing what the ones before it left over. Always computes in float32.

    In training, quantizer i starts (k-means on the residual it will see) at training step `(i + 1) *
    stage_steps`; until the first has started, latents pass through unquantized. A codebook that has not
    started yet holds zeros, so that codes can be encoded and decoded at any moment. Nothing is ever
    initialised or changed in eval mode.

    Args:
        dim: latent dims D; codebook entries have the same dims (put projections outside).
        num_quantizers: K.
        codebook_size: C.
        decay: of the moving averages of usage and entries.
        dead_code_ratio: entries used less than this fraction of uniform usage are restarted from the batch.
        stage_steps: training steps between the starts of consecutive quantizers; 0 starts all at once.
        dropout: probability that a training item uses only its first k quantizers, k uniform in 1..K.
    """

    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        decay: float = 0.99,
        dead_code_ratio: float = 0.03,
        stage_steps: int = 50,
        dropout: float = 0.1,
    ) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        if min(dim, num_quantizers) < 1 or codebook_size < 2:
            raise ValueError(
                f"need dim, num_quantizers >= 1 and codebook_size >= 2: {dim}, {num_quantizers}, {codebook_size}"
            )
        if not 0.0 < dead_code_ratio < 1.0 or not 0.0 <= dropout <= 1.0 or stage_steps < 0:
            raise ValueError(
                f"impossible dead_code_ratio {dead_code_ratio}, dropout {dropout} or stage_steps {stage_steps}"
            )
        self.dim = dim
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        self.dead_code_ratio = dead_code_ratio
        self.stage_steps = stage_steps
        self.dropout = dropout
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=dim,
                codebook_size=codebook_size,
                decay=decay,
                kmeans_init=True,  # never run by the library: `_update` fills the codebook first
                threshold_ema_dead_code=0,  # restarts are made in `_update`
                commitment_weight=0.0,  # computed here, over the whole stack
                rotation_trick=False,
                sync_codebook=False,
            )
            for _ in range(num_quantizers)
        )
        for index in range(num_quantizers):  # random entries, so that an untrained tokenizer has lively codes
            self._codebook(index).embed.normal_(std=0.5 ** (index + 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def codebooks(self) -> Tensor:
        """All entries, float32 `[K, C, D]`."""
        return torch.stack([self._embed(index) for index in range(self.num_quantizers)])

    def forward(
        self, x_BDN: Tensor, num_quantizers: int | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Quantize with a straight-through gradient of scale 1, whatever the number of quantizers.

        Args:
            x_BDN: latents `[B, D, N]`, any float dtype.
            num_quantizers: use only the first so many.
            mask: bool `[B, N]`, False = padding: not quantized, not learnt from, zeros in the output.

        Returns:
            quantized float32 `[B, D, N]`; codes int64 `[B, k, N]` (0 where masked, dropped out or not
            started); commitment loss, a scalar, the mean over quantizers; statistics of this batch:
            `perplexity` `[k]`, `usage` (fraction of codes met) `[k]`, `counts` `[k, C]`.
        """
        num_used = self._num_used(num_quantizers)
        with torch.autocast(x_BDN.device.type, enabled=False):
            batch, _, length = x_BDN.shape
            x_MD = x_BDN.float().transpose(1, 2).reshape(batch * length, self.dim)
            item_M = torch.arange(batch, device=x_MD.device).repeat_interleave(length)
            if mask is not None:
                x_MD, item_M = x_MD[mask.reshape(-1)], item_M[mask.reshape(-1)]
            if self.training:
                q_MD, codes_KM, commit, used_KM = self._quantize_train(x_MD, item_M, batch, num_used)
            else:
                q_MD, codes_KM, commit = self._quantize_eval(x_MD, num_used)
                used_KM = torch.ones_like(codes_KM, dtype=torch.bool)
            q_MD = x_MD + (q_MD - x_MD).detach()
            stats = self._stats(codes_KM, used_KM)
            if mask is not None:
                keep = mask.reshape(-1)
                q_MD = q_MD.new_zeros(batch * length, self.dim).masked_scatter(keep[:, None], q_MD)
                codes_KM = codes_KM.new_zeros(num_used, batch * length).masked_scatter(keep[None], codes_KM)
            q_BDN = q_MD.reshape(batch, length, self.dim).transpose(1, 2)
            codes_BKN = codes_KM.reshape(num_used, batch, length).transpose(0, 1)
            return q_BDN, codes_BKN, commit, stats

    @torch.no_grad()
    def encode(self, x_BDN: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Nearest codes, int64 `[B, k, N]`. The same in training and eval mode; changes no state."""
        num_used = self._num_used(num_quantizers)
        with torch.autocast(x_BDN.device.type, enabled=False):
            batch, _, length = x_BDN.shape
            x_MD = x_BDN.float().transpose(1, 2).reshape(batch * length, self.dim)
            codes_KM = self._quantize_eval(x_MD, num_used)[1]
            return codes_KM.reshape(num_used, batch, length).transpose(0, 1).contiguous()

    def decode(self, codes_BKN: Tensor) -> Tensor:
        """Sum of the entries, float32 `[B, D, N]`, for codes `[B, k, N]` of the first k <= K quantizers.

        Raises CodesError for more than K quantizers or ids out of range.
        """
        if codes_BKN.ndim != 3 or not 1 <= codes_BKN.shape[1] <= self.num_quantizers:
            raise CodesError(
                f"codes of shape {list(codes_BKN.shape)} do not fit: "
                f"need [batch, 1..{self.num_quantizers} quantizers, positions]"
            )
        if codes_BKN.is_floating_point() or codes_BKN.dtype == torch.bool:
            raise CodesError(f"codes must be integers, got {codes_BKN.dtype}")
        codes_BKN = codes_BKN.long()
        if codes_BKN.numel():
            low, high = (int(value) for value in torch.aminmax(codes_BKN))
            if low < 0 or high >= self.codebook_size:
                raise CodesError(
                    f"code {low if low < 0 else high} is outside 0..{self.codebook_size - 1}; "
                    "is this another tokenizer's?"
                )
        total = torch.zeros((), device=codes_BKN.device)
        for index in range(codes_BKN.shape[1]):
            total = total + F.embedding(codes_BKN[:, index], self._embed(index))
        return total.transpose(1, 2)

    @torch.no_grad()
    def restore_averages(self) -> None:
        """Rebuild the running sums from entries and usage, after loading weights that leave the sums out."""
        for index in range(self.num_quantizers):
            codebook = self._codebook(index)
            usage, total = codebook.cluster_size, codebook.cluster_size.sum(-1, keepdim=True)
            smooth = (usage + codebook.eps) / (total + self.codebook_size * codebook.eps) * total
            codebook.embed_avg.copy_(codebook.embed * smooth[..., None])

    def _num_used(self, num_quantizers: int | None) -> int:
        if num_quantizers is None:
            return self.num_quantizers
        if not 1 <= num_quantizers <= self.num_quantizers:
            raise CodesError(f"num_quantizers {num_quantizers} is outside 1..{self.num_quantizers}")
        return num_quantizers

    def _codebook(self, index: int) -> Any:
        """The library's EMA codebook number `index`; Any, because the library is untyped."""
        return self.layers[index]._codebook

    def _embed(self, index: int) -> Tensor:
        embed_CD: Tensor = self._codebook(index).embed[0]
        return embed_CD

    def _quantize_eval(self, x_MD: Tensor, num_used: int) -> tuple[Tensor, Tensor, Tensor]:
        """Plain nearest neighbours: argmin |e|^2/2 - x.e with one addmm, no one-hot."""
        total_MD = torch.zeros_like(x_MD)
        commits, codes = [], []
        for index in range(num_used):
            embed_CD = self._embed(index)
            residual_MD = x_MD - total_MD
            code_M = torch.addmm(embed_CD.square().sum(1) / 2, residual_MD.detach(), embed_CD.T, alpha=-1).argmin(1)
            entry_MD = F.embedding(code_M, embed_CD)
            commits.append(F.mse_loss(residual_MD, entry_MD))
            codes.append(code_M)
            total_MD = total_MD + entry_MD
        return total_MD, torch.stack(codes), torch.stack(commits).mean()

    def _quantize_train(
        self, x_MD: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise AnyglotError("tokenizer training runs on one process: codebooks are not synchronised; use devices=1")
        step = int(self.steps)
        self.steps += 1
        if step == 0:
            for index in range(self.num_quantizers):
                codebook = self._codebook(index)
                if not codebook.initted:
                    codebook.embed.zero_()
        started = self.num_quantizers if self.stage_steps == 0 else min(self.num_quantizers, step // self.stage_steps)
        count = x_MD.shape[0]
        codes_KM = torch.zeros(num_used, count, dtype=torch.int64, device=x_MD.device)
        used_KM = torch.zeros(num_used, count, dtype=torch.bool, device=x_MD.device)
        if started == 0 or count == 0:
            return x_MD, codes_KM, x_MD.sum() * 0.0, used_KM
        depth_B = torch.full((batch,), num_used, device=x_MD.device)
        if self.dropout > 0 and num_used > 1:
            dropped_B = torch.rand(batch, device=x_MD.device) < self.dropout
            depth_B = torch.where(dropped_B, torch.randint(1, num_used + 1, (batch,), device=x_MD.device), depth_B)
        depth_M = depth_B[item_M]
        total_MD = torch.zeros_like(x_MD)
        commits = []
        for index in range(min(num_used, started)):
            rows = (depth_M > index).nonzero()[:, 0]
            if rows.numel() == 0:
                break
            residual_RD = x_MD[rows] - total_MD[rows]
            entry_RD, code_R = self._update(index, residual_RD.detach())
            commits.append(F.mse_loss(residual_RD, entry_RD))
            total_MD = total_MD.index_add(0, rows, entry_RD)
            codes_KM[index, rows] = code_R
            used_KM[index, rows] = True
        return total_MD, codes_KM, torch.stack(commits).mean(), used_KM

    @torch.no_grad()
    def _update(self, index: int, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """One training step of codebook `index`: start, assignment, moving averages, restarts.

        Starts and restarts draw entries with a chance proportional to the squared distance from the nearest entry
        (k-means++, Arthur & Vassilvitskii 2007). Drawn evenly, they would go where the data is dense: a plain
        background would be split among hundreds of codes, which a language model then has to tell apart.
        """
        codebook = self._codebook(index)
        uniform = x_RD.shape[0] / self.codebook_size
        if not codebook.initted:
            seeds_CD = spread_seeds(x_RD, self.codebook_size)
            codebook.embed.copy_(seeds_CD[None])
            codebook.embed_avg.copy_(seeds_CD[None] * uniform)
            codebook.cluster_size.fill_(uniform)
            codebook.initted.fill_(True)
        entry, code, _ = self.layers[index](x_RD[None])
        dead = (codebook.cluster_size[0] < self.dead_code_ratio * uniform).nonzero()[:, 0]
        if len(dead):
            error_R = (x_RD - entry[0]).square().sum(1) + 1e-12
            fresh_ED = x_RD[torch.multinomial(error_R, len(dead), replacement=len(dead) > len(error_R))]
            codebook.embed[0, dead] = fresh_ED
            codebook.embed_avg[0, dead] = fresh_ED * uniform
            codebook.cluster_size[0, dead] = uniform
        return entry[0], code[0]

    def _stats(self, codes_KM: Tensor, used_KM: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            counts = torch.zeros(codes_KM.shape[0], self.codebook_size, device=codes_KM.device)
            counts.scatter_add_(1, codes_KM, used_KM.float())
            return {**code_statistics(counts), "counts": counts}


def spread_seeds(x_RD: Tensor, count: int, rounds: int = 16) -> Tensor:
    """`count` rows of `x_RD`, `[count, D]`, drawn by k-means++ in a few rounds; with a little noise if too few."""
    seeds_SD = x_RD[torch.randint(len(x_RD), (1,), device=x_RD.device)]
    nearest_R = (x_RD - seeds_SD).square().sum(1)
    while len(seeds_SD) < count:
        draws = min(-(-count // rounds), count - len(seeds_SD))
        fresh_ED = x_RD[torch.multinomial(nearest_R + 1e-12, draws, replacement=draws > len(x_RD))]
        nearest_R = torch.minimum(nearest_R, torch.cdist(x_RD, fresh_ED).square().amin(1))
        seeds_SD = torch.cat([seeds_SD, fresh_ED])
    if count > len(x_RD):
        seeds_SD = seeds_SD + 1e-2 * x_RD.std(unbiased=False) * torch.randn_like(seeds_SD)
    return seeds_SD


def code_statistics(counts_KC: Tensor) -> dict[str, Tensor]:
    """`perplexity` (exp of the entropy) and `usage` (fraction of codes met), each `[K]`, from counts `[K, C]`."""
    share = counts_KC / counts_KC.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1)
    return {"perplexity": entropy.exp(), "usage": (counts_KC > 0).float().mean(1)}
