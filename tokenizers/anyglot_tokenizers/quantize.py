"""What all quantizers share, and the residual quantizer with moving-average codebooks.

The codebooks and their moving averages are `vector_quantize_pytorch.VectorQuantize` layers (Lucidrains); the residual
loop, starts, restarts, synchronisation and search are our own. The library's own residual class multiplies the encoder
gradient by the number of quantizers, runs k-means in eval mode, decides at construction whether processes are
synchronised, does not guard CPU autocast, and searches with a one-hot matrix. Recipe: SoundStream (arXiv 2107.03312),
EnCodec (arXiv 2210.13438); quantizers that start one after the other, after Mimi (arXiv 2410.00037), by k-means++;
per-item dropout after DAC (arXiv 2306.06546).

This file knows nothing of encoders, media or files; the other kinds are in `quantizers.py`. Shapes: B items, N
positions (any grid), M positions of all items that are not masked, R of them that reach a codebook, D latent dims,
d dims of a codebook's entries, K quantizers, C codes, E entries, W processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_count, check_ids

CACHE_BYTES = 2**22  # distances searched at once on a CPU: in its cache, twice as fast as from memory
DEVICE_BYTES = 2**28  # and elsewhere, to bound memory
MOST = 1024  # quantizers
ONE_HOT_BYTES = 2**28  # a training step whose one-hot matrix is larger leaves the library's path


class Quantizer(nn.Module, ABC):
    """Latents to K codes per position and back. Always computes and keeps float32, whatever autocast or `.to` ask.

    Subclasses give `_quantize`, `_assign` and `_entries`. Nothing is initialised or changed in eval mode.

    Args:
        dim: latent dims D.
        num_quantizers: K.
        codebook_size: C.
        codebook_dim: dims d of the entries; with d != D a linear map leads in and one out. None = D.
        dropout: probability that a training item uses only its first k quantizers, k uniform in 1..K.
    """

    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        if min(dim, num_quantizers, codebook_dim) < 1 or num_quantizers > MOST or codebook_size < 2:
            raise ValueError(
                f"need dim, codebook_dim >= 1, num_quantizers in 1..{MOST} and codebook_size >= 2: "
                f"{dim}, {num_quantizers}, {codebook_dim}, {codebook_size}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout {dropout} is not a probability")
        self.dim = dim
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.dropout = dropout
        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._tables: dict[int, tuple[list[tuple[Tensor, int]], Tensor, Tensor]] = {}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of each quantizer."""
        return (self.codebook_size,) * self.num_quantizers

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes of the digits of an id, the fastest first: C alone, or its factors where ids are combinations."""
        return (self.codebook_size,)

    @property
    def codebooks(self) -> Tensor:
        """All entries, float32 `[K, C, d]`."""
        return torch.stack([self._entries(index) for index in range(self.num_quantizers)])

    def forward(
        self, x_BDN: Tensor, num_quantizers: int | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Quantize with one straight-through gradient, the same whatever the number of quantizers.

        Args:
            x_BDN: latents `[B, D, *grid]`, any float dtype.
            num_quantizers: use only the first so many.
            mask: bool `[B, *grid]`, False = padding: not quantized, not learnt from, zeros in the output.

        Returns:
            quantized float32 `[B, D, *grid]`; codes int64 `[B, k, *grid]` (0 where masked, dropped out or not
            started); the quantizer's own loss, a scalar, the mean over quantizers (commitment, and what else a kind
            needs); statistics of this batch: `perplexity` `[k]`, `usage` (fraction of codes met) `[k]`, `counts`
            `[k, C]`.
        """
        num_used = check_count(num_quantizers, self.num_quantizers)
        with torch.autocast(x_BDN.device.type, enabled=False):
            batch, grid = x_BDN.shape[0], x_BDN.shape[2:]
            x_MD = self._rows(x_BDN)
            item_M = torch.arange(batch, device=x_MD.device).repeat_interleave(grid.numel())
            if mask is not None:
                x_MD, item_M = x_MD[mask.reshape(-1)], item_M[mask.reshape(-1)]
            q_Md, codes_KM, loss, used_KM = self._quantize(self.project_in(x_MD), item_M, batch, num_used)
            q_MD = self.project_out(q_Md)
            stats = self._stats(codes_KM, used_KM)
            if mask is not None:
                keep = mask.reshape(-1)
                q_MD = q_MD.new_zeros(len(keep), self.dim).masked_scatter(keep[:, None], q_MD)
                codes_KM = codes_KM.new_zeros(num_used, len(keep)).masked_scatter(keep[None], codes_KM)
            q_BDN = q_MD.reshape(batch, *grid, self.dim).movedim(-1, 1)
            return q_BDN, codes_KM.reshape(num_used, batch, *grid).transpose(0, 1), loss, stats

    @torch.no_grad()
    def encode(self, x_BDN: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Nearest codes, int64 `[B, k, *grid]`. The same in training and eval mode; changes no state."""
        num_used = check_count(num_quantizers, self.num_quantizers)
        with torch.autocast(x_BDN.device.type, enabled=False):
            codes_KM = self._assign(self.project_in(self._rows(x_BDN)), num_used)
            return codes_KM.reshape(num_used, len(x_BDN), *x_BDN.shape[2:]).transpose(0, 1).contiguous()

    def decode(self, codes_BKN: Tensor) -> Tensor:
        """Sum of the entries, float32 `[B, D, *grid]`, for codes int64 `[B, k, *grid]` of the first k <= K quantizers.

        Raises CodesError for more than K quantizers or ids out of range.
        """
        check_ids(codes_BKN, self.codebook_sizes, None, empty=True)
        with torch.autocast(codes_BKN.device.type, enabled=False):
            total = torch.zeros((), device=codes_BKN.device)
            for index in range(codes_BKN.shape[1]):
                total = total + self._look_up(index, codes_BKN[:, index])
            return self.project_out(total).movedim(-1, 1)

    def train(self, mode: bool = True) -> Self:
        """Switch mode as usual; also forgets what eval mode keeps for the search."""
        self._tables.clear()
        return super().train(mode)

    @abstractmethod
    def _quantize(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized rows with their gradient, codes `[k, M]`, loss, and which codes count `[k, M]`."""

    @abstractmethod
    def _assign(self, x_Md: Tensor, num_used: int) -> Tensor:
        """Codes `[k, M]` without changing anything."""

    @abstractmethod
    def _entries(self, index: int) -> Tensor:
        """Entries of codebook `index`, `[C, d]`."""

    def _look_up(self, index: int, ids: Tensor) -> Tensor:
        """Entries `[*, d]` of codebook `index` for ids int64 `[*]`."""
        return F.embedding(ids, self._entries(index))

    def _sources(self, index: int) -> list[Tensor]:
        """Tensors that `_entries` computes from."""
        return []

    def _table(self, index: int) -> tuple[Tensor, Tensor]:
        """Entries `[C, d]` and half their squared norms `[C]`, in eval mode kept until a source is written to.

        Sources are compared by identity and version counter. Writes through `.data` do not count: the library updates
        its codebooks so, hence nothing is kept in training; call `eval()` after your own.
        """
        sources = self._sources(index)
        keeps = not self.training and not torch.compiler.is_compiling() and not any(s.is_inference() for s in sources)
        kept = self._tables.get(index) if keeps else None
        if kept and all(s is one and s._version == version for s, (one, version) in zip(sources, kept[0], strict=True)):
            return kept[1], kept[2]
        if keeps and torch.is_inference_mode_enabled():  # what is kept must also serve outside
            with torch.inference_mode(False):
                return self._table(index)
        with torch.no_grad():
            embed_Cd = self._entries(index)
            half_C = embed_Cd.square().sum(1) / 2
        if keeps:
            self._tables[index] = [(source, source._version) for source in sources], embed_Cd, half_C
        return embed_Cd, half_C

    def _rows(self, x_BDN: Tensor) -> Tensor:
        return x_BDN.float().flatten(2).transpose(1, 2).reshape(-1, self.dim)

    def _depths(self, batch: int, num_used: int, device: torch.device) -> Tensor:
        """Quantizers that each training item uses, `[B]`."""
        depth_B = torch.full((batch,), num_used, device=device)
        if self.dropout > 0 and num_used > 1:
            dropped_B = torch.rand(batch, device=device) < self.dropout
            depth_B = torch.where(dropped_B, torch.randint(1, num_used + 1, (batch,), device=device), depth_B)
        return depth_B

    def _stats(self, codes_KM: Tensor, used_KM: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            counts = torch.zeros(codes_KM.shape[0], self.codebook_size, device=codes_KM.device)
            counts.scatter_add_(1, codes_KM, used_KM.float())
            return {**code_statistics(counts), "counts": counts}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices as usual; changes of a floating dtype are left out."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._tables.clear()
        return super()._apply(move, recurse)


class ResidualQuantizer(Quantizer):
    """K codebooks, each quantizing what the ones before it left over.

    In training, quantizer i starts (k-means++ on the residual it will see) at training step `(i + 1) *
    stage_steps`; until the first has started, latents pass through unquantized. A codebook that has not
    started yet holds zeros, so that codes can be encoded and decoded at any moment.

    Where several processes train (torch.distributed is initialised when `forward` is called, however late), they learn
    one codebook from all their batches: usage and sums are added up over processes, and starts and restarts are drawn
    from the rows of all of them, so that codebooks stay equal to the last bit. All must then call `forward` equally
    often, with the same `num_quantizers`; batches may differ in size.

    Args:
        dim: latent dims D.
        num_quantizers: K.
        codebook_size: C.
        codebook_dim: see `Quantizer`.
        decay: of the moving averages of usage and entries.
        dead_code_ratio: entries used less than this fraction of uniform usage are restarted from the batch.
        stage_steps: training steps between the starts of consecutive quantizers; 0 starts all at once.
        dropout: probability that a training item uses only its first k quantizers, k uniform in 1..K.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        decay: float = 0.99,
        dead_code_ratio: float = 0.03,
        stage_steps: int = 50,
        dropout: float = 0.1,
    ) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(dim, num_quantizers, codebook_size, codebook_dim=codebook_dim, dropout=dropout)
        if not 0.0 < dead_code_ratio < 1.0 or not 0.0 <= decay < 1.0 or stage_steps < 0:
            raise ValueError(
                f"impossible dead_code_ratio {dead_code_ratio}, decay {decay} or stage_steps {stage_steps}"
            )
        self.decay = decay
        self.dead_code_ratio = dead_code_ratio
        self.stage_steps = stage_steps
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=self.codebook_dim,
                codebook_size=codebook_size,
                decay=decay,
                kmeans_init=True,  # never run by the library: `_update` fills the codebook first
                threshold_ema_dead_code=0,  # restarts are made in `_update`
                commitment_weight=0.0,  # computed here, over the whole stack
                rotation_trick=False,
                sync_codebook=False,  # synchronised in `_average`
            )
            for _ in range(num_quantizers)
        )
        for index in range(num_quantizers):  # random entries, so that an untrained tokenizer has lively codes
            self._codebook(index).embed.normal_(std=0.5 ** (index + 1))

    @torch.no_grad()
    def restore_averages(self) -> None:
        """Rebuild the running sums from entries and usage, after loading weights that leave the sums out."""
        for index in range(self.num_quantizers):
            codebook = self._codebook(index)
            usage, total = codebook.cluster_size, codebook.cluster_size.sum(-1, keepdim=True)
            smooth = (usage + codebook.eps) / (total + self.codebook_size * codebook.eps) * total
            codebook.embed_avg.copy_(codebook.embed * smooth[..., None])

    def _codebook(self, index: int) -> Any:
        """The library's moving-average codebook number `index`; Any, because the library is untyped."""
        return self.layers[index]._codebook

    def _entries(self, index: int) -> Tensor:
        embed_Cd: Tensor = self._codebook(index).embed[0]
        return embed_Cd

    def _sources(self, index: int) -> list[Tensor]:
        return [self._codebook(index).embed]

    def _quantize(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.training:
            q_Md, codes_KM, commit, used_KM = self._quantize_train(x_Md, item_M, batch, num_used)
        else:
            q_Md, codes_KM, commit = self._quantize_eval(x_Md, num_used)
            used_KM = torch.ones_like(codes_KM, dtype=torch.bool)
        return x_Md + (q_Md - x_Md).detach(), codes_KM, commit, used_KM

    def _assign(self, x_Md: Tensor, num_used: int) -> Tensor:
        return self._quantize_eval(x_Md, num_used)[1]

    def _quantize_eval(self, x_Md: Tensor, num_used: int) -> tuple[Tensor, Tensor, Tensor]:
        total_Md = torch.zeros_like(x_Md)
        commits, codes = [], []
        for index in range(num_used):
            embed_Cd, half_C = self._table(index)
            residual_Md = x_Md - total_Md
            code_M = nearest(residual_Md.detach(), embed_Cd, half_C)
            entry_Md = F.embedding(code_M, embed_Cd)
            commits.append(F.mse_loss(residual_Md, entry_Md) if len(x_Md) else x_Md.sum())
            codes.append(code_M)
            total_Md = total_Md + entry_Md
        return total_Md, torch.stack(codes), torch.stack(commits).mean()

    def _quantize_train(
        self, x_Md: Tensor, item_M: Tensor, batch: int, num_used: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = int(self.steps)
        self.steps += 1
        if step == 0:
            for index in range(self.num_quantizers):
                codebook = self._codebook(index)
                if not codebook.initted:
                    codebook.embed.zero_()
        started = self.num_quantizers if self.stage_steps == 0 else min(self.num_quantizers, step // self.stage_steps)
        count, alone = x_Md.shape[0], world_size() == 1
        codes_KM = torch.zeros(num_used, count, dtype=torch.int64, device=x_Md.device)
        used_KM = torch.zeros(num_used, count, dtype=torch.bool, device=x_Md.device)
        if started == 0 or (count == 0 and alone):
            return x_Md, codes_KM, x_Md.sum() * 0.0, used_KM
        depth_M = self._depths(batch, num_used, x_Md.device)[item_M]
        total_Md = torch.zeros_like(x_Md)
        commits = []
        for index in range(min(num_used, started)):
            rows = (depth_M > index).nonzero()[:, 0]
            if len(rows) == 0 and alone:  # with others, take part in what they exchange
                break
            residual_Rd = x_Md[rows] - total_Md[rows]
            entry_Rd, code_R = self._update(index, residual_Rd.detach())
            if len(rows):
                commits.append(F.mse_loss(residual_Rd, entry_Rd))
            total_Md = total_Md.index_add(0, rows, entry_Rd)
            codes_KM[index, rows] = code_R
            used_KM[index, rows] = True
        return total_Md, codes_KM, torch.stack(commits).mean() if commits else x_Md.sum() * 0.0, used_KM

    @torch.no_grad()
    def _update(self, index: int, x_Rd: Tensor) -> tuple[Tensor, Tensor]:
        """One training step of codebook `index`: start, assignment, moving averages, restarts.

        Starts and restarts draw entries with a chance proportional to the squared distance from the nearest entry
        (k-means++, Arthur & Vassilvitskii 2007). Drawn evenly, they would go where the data is dense: a plain
        background would be split among hundreds of codes, which a language model then has to tell apart.
        """
        codebook = self._codebook(index)
        uniform = rows_over_processes(x_Rd) / self.codebook_size
        if not codebook.initted and uniform > 0:
            seeds_Cd = shared_seeds(x_Rd, self.codebook_size)
            codebook.embed.copy_(seeds_Cd[None])
            codebook.embed_avg.copy_(seeds_Cd[None] * uniform)
            codebook.cluster_size.fill_(uniform)
            codebook.initted.fill_(True)
        if world_size() == 1 and 8 * len(x_Rd) * self.codebook_size <= ONE_HOT_BYTES:
            entry_1Rd, code_1R, _ = self.layers[index](x_Rd[None])
            entry_Rd, code_R = entry_1Rd[0], code_1R[0]
        else:
            entry_Rd, code_R = self._average(index, x_Rd)
        dead = (codebook.cluster_size[0] < self.dead_code_ratio * uniform).nonzero()[:, 0]
        if len(dead):
            error_R = (x_Rd - entry_Rd).square().sum(1) + 1e-12
            fresh_Ed = draw_rows(x_Rd, error_R, len(dead))
            codebook.embed[0, dead] = fresh_Ed
            codebook.embed_avg[0, dead] = fresh_Ed * uniform
            codebook.cluster_size[0, dead] = uniform
        return entry_Rd, code_R

    def _average(self, index: int, x_Rd: Tensor) -> tuple[Tensor, Tensor]:
        """What the library's training step computes, without a one-hot matrix and over all processes."""
        codebook = self._codebook(index)
        embed_Cd, half_C = self._table(index)
        code_R = nearest(x_Rd, embed_Cd, half_C)
        entry_Rd = F.embedding(code_R, embed_Cd)
        sums_Cd1 = x_Rd.new_zeros(self.codebook_size, self.codebook_dim + 1)
        sums_Cd1.index_add_(0, code_R, F.pad(x_Rd, (0, 1), value=1.0))  # the last column counts
        sums_Cd1 = sum_over_processes(sums_Cd1)
        codebook.cluster_size[0].lerp_(sums_Cd1[:, -1], 1 - self.decay)
        codebook.embed_avg[0].lerp_(sums_Cd1[:, :-1], 1 - self.decay)
        codebook.update_ema()
        return entry_Rd, code_R


@torch.no_grad()
def nearest(x_Md: Tensor, embed_Cd: Tensor, half_C: Tensor, max_bytes: int | None = None) -> Tensor:
    """Index of the entry nearest to each row, int64 `[M]`.

    argmin |e|^2 / 2 - x.e, which orders entries as the distance does; one matrix product, no one-hot. Rows are searched
    in chunks where the distances would take more than `max_bytes`.

    Args:
        x_Md: rows, float32.
        embed_Cd: entries, float32.
        half_C: half the squared norms of the entries.
        max_bytes: of distances held at once; None = what suits the device.
    """
    if max_bytes is None:
        max_bytes = CACHE_BYTES if x_Md.device.type == "cpu" else DEVICE_BYTES
    rows = max(1, max_bytes // (4 * len(embed_Cd)))
    if len(x_Md) <= rows:
        return torch.addmm(half_C, x_Md, embed_Cd.T, alpha=-1).argmin(1)
    found_M = torch.empty(len(x_Md), dtype=torch.int64, device=x_Md.device)
    far_RC = x_Md.new_empty(rows, len(embed_Cd))  # one for all chunks: fresh ones would pile up between small results
    for part_Rd, found_R in zip(x_Md.split(rows), found_M.split(rows), strict=True):
        distances_RC = torch.addmm(half_C, part_Rd, embed_Cd.T, alpha=-1, out=far_RC[: len(part_Rd)])
        torch.argmin(distances_RC, 1, out=found_R)
    return found_M


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


def world_size() -> int:
    """Processes that train together now; asked at every step, since a process group often comes after the model."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over processes, equal on all of them to the last bit; overwrites `tensor`."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def rows_over_processes(x_RD: Tensor) -> int:
    """Rows that all processes hold together."""
    if world_size() == 1:
        return len(x_RD)
    return int(sum_over_processes(torch.tensor(len(x_RD), device=x_RD.device)))


def shared_seeds(x_RD: Tensor, count: int) -> Tensor:
    """`spread_seeds` of the rows of all processes (of which some may have none), drawn by the first for all."""
    world = world_size()
    if world == 1:
        return spread_seeds(x_RD, count)
    sizes = [torch.zeros((), dtype=torch.int64, device=x_RD.device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor(len(x_RD), device=x_RD.device))
    longest = max(int(size) for size in sizes)
    parts = [x_RD.new_zeros(longest, x_RD.shape[1]) for _ in range(world)]
    distributed.all_gather(parts, F.pad(x_RD, (0, 0, 0, longest - len(x_RD))))
    seeds_SD = x_RD.new_zeros(count, x_RD.shape[1])
    if distributed.get_rank() == 0:
        seeds_SD = spread_seeds(torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]), count)
    distributed.broadcast(seeds_SD, 0)
    return seeds_SD


def draw_rows(x_RD: Tensor, weight_R: Tensor, count: int) -> Tensor:
    """`count` rows `[count, D]` with chances proportional to `weight_R`, of all processes and equal on all of them.

    Each process proposes `count` of its rows; the first decides whose proposal is taken at each place.
    """
    world = world_size()
    if world == 1 or len(x_RD):
        own_ED = x_RD[torch.multinomial(weight_R, count, replacement=count > len(x_RD))]
    else:
        own_ED = x_RD.new_zeros(count, x_RD.shape[1])
    if world == 1:
        return own_ED
    proposals = [torch.empty_like(own_ED) for _ in range(world)]
    distributed.all_gather(proposals, own_ED)
    weights = [weight_R.new_zeros(()) for _ in range(world)]
    distributed.all_gather(weights, weight_R.sum())
    winner_E = torch.multinomial(torch.stack(weights), count, replacement=True)
    distributed.broadcast(winner_E, 0)
    return torch.stack(proposals)[winner_E, torch.arange(count, device=x_RD.device)]
