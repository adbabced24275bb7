"""`fit_denoising`: an encoder learns to give spoiled media the codes that it gave clean ones.

Codebooks and decoder stay as they are, so what was trained on the codes goes on working, and hears through noise. An
encoder that never saw spoiled media gives it codes of other things, and a language model would have to learn them all.
The idea is that of augmentation-invariant units (Gat et al. 2022, arXiv 2209.15483); here the encoder itself is trained
on, towards the latents or the codes of the clean media. What spoils is the caller's business.

Shapes: B items, D latent dims, N positions (any grid), M positions that count, K quantizers, C codes, d dims of an
entry.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anyglot_tokenizers.errors import ManifestError, UnsupportedError
from anyglot_tokenizers.product import ProductQuantizer
from anyglot_tokenizers.quantize import Quantizer, ResidualQuantizer
from anyglot_tokenizers.quiet import quiet
from anyglot_tokenizers.tokenizer import Tokenizer

Aim = Literal["latents", "codes"]


class Pair(NamedTuple):
    """The same media twice.

    Attributes:
        clean: float32 `[B, 3, H, W]` or `[B, C, samples]`, as the tokenizer takes it.
        spoiled: the same, of the same shape.
        lengths: int64 `[B]` samples per item; None = all.
    """

    clean: Tensor
    spoiled: Tensor
    lengths: Tensor | None = None


class LitDenoiser(L.LightningModule):
    """Trains all that makes the latents of `tokenizer`; what else it has gets no gradient.

    Args:
        tokenizer: trained in place; its class must give `unquantized`.
        aim: "latents": the squared distance to the clean latents, in units of their variance; "codes": `code_loss`.
        max_steps: length of the schedule: linear warm-up, then a cosine to zero.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
    """

    def __init__(self, tokenizer: Tokenizer, *, aim: Aim, max_steps: int, lr: float, warmup_steps: int = 50) -> None:
        super().__init__()
        self.tokenizer, self.aim, self.max_steps = tokenizer, aim, max_steps
        self.lr, self.warmup_steps = lr, warmup_steps
        self.teacher = copy.deepcopy(tokenizer).eval().requires_grad_(False)

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        with torch.no_grad():
            clean_BDN, counts_BN = self.teacher.unquantized(batch.clean, batch.lengths)
        spoiled_BDN, _ = self.tokenizer.unquantized(batch.spoiled, batch.lengths)
        with torch.autocast(spoiled_BDN.device.type, enabled=False):
            clean_MD, spoiled_MD = _rows(clean_BDN, counts_BN), _rows(spoiled_BDN, counts_BN)
            if self.aim == "latents":
                loss = (spoiled_MD - clean_MD).square().mean() / clean_MD.var(0).mean()
            else:
                quantizer: Any = self.teacher.quantizer
                loss = code_loss(quantizer, clean_MD, spoiled_MD)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW without decay: Muon's first steps throw away what is known (docs/log.md)."""
        optimizer = torch.optim.AdamW(self.tokenizer.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_share(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1.0)))


def code_loss(quantizer: Quantizer, clean_MD: Tensor, spoiled_MD: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per digit, of the codes of clean latents under those of spoiled ones.

    An entry's logit is its squared distance in units of what a clean latent is away from its own entry on average: the
    same scale for every codebook, however far apart its entries lie. Residuals are those after the clean codes.

    Raises UnsupportedError for quantizers of another kind than `ResidualQuantizer` and `ProductQuantizer`.
    """
    losses = []
    for entries_Cd, target_M, clean_Md, spoiled_Md in _digits(quantizer, clean_MD, spoiled_MD):
        unit = (clean_Md - entries_Cd[target_M]).square().sum(1).mean().clamp(min=1e-6)
        away_MC = torch.cdist(spoiled_Md, entries_Cd, compute_mode="use_mm_for_euclid_dist").square()
        losses.append(F.cross_entropy(-away_MC / unit, target_M))
    return torch.stack(losses).mean()


def _digits(
    quantizer: Quantizer, clean_MD: Tensor, spoiled_MD: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each codebook its entries, the clean codes, and clean and spoiled latents as it meets them."""
    if isinstance(quantizer, ProductQuantizer):
        pairs = zip(clean_MD.split(quantizer.dims, 1), spoiled_MD.split(quantizer.dims, 1), strict=True)
        for part, (clean_Mp, spoiled_Mp) in zip(quantizer.parts, pairs, strict=True):
            assert isinstance(part, ResidualQuantizer)
            yield from _digits(part, clean_Mp, spoiled_Mp)
        return
    if not isinstance(quantizer, ResidualQuantizer):
        raise UnsupportedError(f"{type(quantizer).__name__} has no codebooks to aim at; denoise residual codes")
    clean_Md, spoiled_Md = quantizer.project_in(clean_MD), quantizer.project_in(spoiled_MD)
    for entries_Cd, target_M in zip(
        quantizer.codebooks, quantizer._assign(clean_Md, quantizer.num_quantizers), strict=True
    ):
        yield entries_Cd, target_M, clean_Md, spoiled_Md
        clean_Md, spoiled_Md = clean_Md - entries_Cd[target_M], spoiled_Md - entries_Cd[target_M]


def _rows(x_BDN: Tensor, counts_BN: Tensor) -> Tensor:
    return x_BDN.float().movedim(1, -1)[counts_BN]


class _Pairs(Dataset[Pair]):
    def __init__(self, pair: Callable[[int], Pair], count: int) -> None:
        self.pair, self.count = pair, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Pair:
        return self.pair(step)


def fit_denoising(
    tokenizer: Tokenizer,
    pairs: Callable[[int], Pair],
    *,
    run_dir: str | Path,
    max_steps: int,
    aim: Aim = "latents",
    lr: float = 4e-3,
    warmup_steps: int = 50,
    accelerator: str = "auto",
    log_every: int = 50,
) -> Tokenizer:
    """Train the encoder of a trained tokenizer on, in place.

    Args:
        tokenizer: a trained one; see `LitDenoiser` for which.
        pairs: the batch of a step, 0 and up, drawn anew each time: a function of the step alone makes a run repeatable.
        run_dir: where the losses are logged.
        max_steps: optimizer steps.
        aim: see `LitDenoiser`. Codes are better where clean latents lie close to their entries and much of what latents
            say changes no code, as with `TwoToneVQ`; elsewhere they are worse (docs/log.md).
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        accelerator: as in Lightning.
        log_every: steps between log lines.

    Returns:
        The tokenizer in eval mode. Its fingerprint is another one: clean media has the same codes but for those near
        a border, and what names the old fingerprint must be told (`agreement` says how many those are).

    Raises:
        ManifestError: no steps, or an aim that there is not.
        UnsupportedError: a tokenizer that cannot be trained, or whose codes `code_loss` does not know.
    """
    if max_steps < 1 or lr <= 0 or aim not in get_args(Aim):
        raise ManifestError(
            f"max_steps {max_steps} and lr {lr} must be positive, aim {aim!r} one of {', '.join(get_args(Aim))}"
        )
    module = LitDenoiser(tokenizer, aim=aim, max_steps=max_steps, lr=lr, warmup_steps=warmup_steps)
    with quiet(), torch.random.fork_rng():
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=max_steps,
            gradient_clip_val=1.0,
            logger=CSVLogger(run_dir, name="logs", version=""),
            log_every_n_steps=log_every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        tokenizer.train()
        trainer.fit(module, DataLoader(_Pairs(pairs, max_steps), batch_size=None))
    return tokenizer.eval()


@torch.no_grad()
def agreement(tokenizer: Tokenizer, teacher: Tokenizer, media: Pair) -> tuple[list[float], list[float]]:
    """Shares of codes, of each quantizer, that `tokenizer` gives as `teacher` gives them to the clean media.

    Returns:
        of the clean media, of the spoiled.
    """
    wanted = teacher.encode(media.clean, media.lengths)
    counts_BN = torch.ones_like(wanted.codes[:, 0], dtype=torch.bool)
    if wanted.lengths is not None:
        counts_BN = torch.arange(counts_BN.shape[1]) < wanted.lengths[:, None].cpu()
    found = [tokenizer.encode(given, media.lengths).codes == wanted.codes for given in (media.clean, media.spoiled)]
    clean, spoiled = ([float(same[:, k][counts_BN].float().mean()) for k in range(same.shape[1])] for same in found)
    return clean, spoiled
