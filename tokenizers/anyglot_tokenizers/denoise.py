"""`fit_denoising`: an encoder learns to give spoiled media the codes of clean media.

Codebooks and decoder stay as they are, so codes go on meaning what they meant. An encoder that never saw spoiled media
gives it codes of other things, and a language model would have to learn them all. The idea is that of
augmentation-invariant units (Gat et al. 2022, arXiv 2209.15483); here the encoder itself is trained on, towards the
latents or the codes that it gave to the clean media before. What spoils is the caller's business.

Shapes: B items, D latent dims, N positions (any grid), M positions that count, K quantizers, C codes, d dims of an
entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from anyglot_tokenizers.batches import ENDLESS, Batch, TokenizerDataModule
from anyglot_tokenizers.errors import AnyglotError, ManifestError, MediaError, UnsupportedError
from anyglot_tokenizers.keep import CHECKPOINT, KeepLast, saved_step
from anyglot_tokenizers.product import ProductQuantizer
from anyglot_tokenizers.quantize import Quantizer, ResidualQuantizer
from anyglot_tokenizers.tokenizer import Tokenizer, full_precision
from anyglot_tokenizers.train import Line, LitTokenizer, train_on, twin_of

Aim = Literal["latents", "codes"]
SHARE = 0.2
COMMIT = 0.25
SAMPLED = 256
"""Entries whose nearest neighbours are looked for."""


class LitDenoiser(LitTokenizer):
    """Trains what makes the latents of `tokenizer`; what else it has gets no gradient. AdamW, without decay.

    Muon's first steps would throw away what is known (docs/log.md, 2026-11-30).

    Args:
        tokenizer: trained in place; its class must give `to_latents`.
        teacher: whose latents or codes of the clean media it is to give to the spoiled.
        aim: "latents": the squared distance to the clean latents, in units of their variance; "codes": `code_loss`.
        max_steps: length of the schedule, see `LitTokenizer`.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
    """

    def __init__(
        self, tokenizer: Tokenizer, teacher: Tokenizer, *, aim: Aim, max_steps: int, lr: float, warmup_steps: int
    ) -> None:
        super().__init__(tokenizer, max_steps=max_steps, lr=lr, warmup_steps=warmup_steps, loss=nn.Identity())
        self.aim = aim
        self._teachers = (teacher,)  # no module of this one: no checkpoint holds it

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar."""
        (teacher,), device, lengths = self._teachers, self.tokenizer.device, batch.get("lengths")
        with torch.no_grad(), full_precision(device):
            clean_BDN, counts_BN = teacher.to(device).to_latents(batch["clean"], lengths)
        spoiled_BDN, _ = self.tokenizer.to_latents(batch["media"], lengths)
        with torch.autocast(device.type, enabled=False):
            clean_MD, spoiled_MD = (z_BDN.float().movedim(1, -1)[counts_BN] for z_BDN in (clean_BDN, spoiled_BDN))
            if self.aim == "latents":
                spread = (clean_MD - clean_MD.mean(0)).square().mean().clamp(min=1e-6)
                return (spoiled_MD - clean_MD).square().mean() / spread
            quantizer: Any = teacher.quantizer
            return code_loss(quantizer, clean_MD, spoiled_MD)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step. Raises AnyglotError when the loss is no longer finite."""
        loss = self.loss_of(batch)
        if not bool(torch.isfinite(loss)):
            raise AnyglotError(
                f"step {self.global_step}: loss is {loss.item()}; start again with a lower learning rate"
            )
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list) and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        self._update(loss, optimizer, counted=True)
        schedule.step()
        self.parts = {"loss": loss.detach()}
        self.log_dict(self.parts)

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule that is a function of the step alone."""
        optimizer = torch.optim.AdamW(self.tokenizer.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_share)]


def code_loss(quantizer: Quantizer, clean_MD: Tensor, spoiled_MD: Tensor) -> Tensor:
    """Cross-entropy of the codes of clean latents under those of spoiled ones, and commitment, means over codebooks.

    An entry's logit is the negative squared distance to it, in units of `SHARE` of what entries are away from their
    nearest neighbours on average: one scale for every codebook. Alone it drives latents ever further from all entries
    (docs/log.md, 2026-11-30), so `COMMIT` times the squared distance to the right entry, in those distances, is added.
    Residuals are those after the clean codes.

    Raises UnsupportedError for quantizers of another kind than `ResidualQuantizer` and `ProductQuantizer`.
    """
    losses = []
    for entries_Cd, target_M, spoiled_Md in _met(quantizer, clean_MD, spoiled_MD):
        away_EC = torch.cdist(entries_Cd[:SAMPLED], entries_Cd).square()
        apart = away_EC.fill_diagonal_(math.inf).amin(1).mean().clamp(min=1e-6)
        logits_MC = (2 * spoiled_Md @ entries_Cd.T - entries_Cd.square().sum(1)) / (SHARE * apart)  # |z|² falls out
        commitment = (spoiled_Md - entries_Cd[target_M]).square().sum(1).mean() / apart
        losses.append(F.cross_entropy(logits_MC, target_M) + COMMIT * commitment)
    return torch.stack(losses).mean()


def _met(
    quantizer: Quantizer | nn.Module, clean_MD: Tensor, spoiled_MD: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each codebook its entries, the clean codes, and the spoiled latents as it meets them."""
    if isinstance(quantizer, ProductQuantizer):
        parts = zip(clean_MD.split(quantizer.dims, 1), spoiled_MD.split(quantizer.dims, 1), strict=True)
        for part, (clean_Mp, spoiled_Mp) in zip(quantizer.parts, parts, strict=True):
            yield from _met(part, clean_Mp, spoiled_Mp)
        return
    if not isinstance(quantizer, ResidualQuantizer):
        kind = type(quantizer).__name__
        raise UnsupportedError(f'{kind} is neither a ResidualQuantizer nor a product of such; take aim="latents"')
    codes_KM = quantizer.encode(clean_MD.T[None])[0]
    spoiled_Md = quantizer.project_in(spoiled_MD)
    for entries_Cd, target_M in zip(quantizer.codebooks, codes_KM, strict=True):
        yield entries_Cd, target_M, spoiled_Md
        spoiled_Md = spoiled_Md - entries_Cd[target_M]


class _Steps(Dataset[Batch]):
    def __init__(self, batches: Callable[[int], Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> Batch:
        return self.batches(step)


def fit_denoising(
    tokenizer: Tokenizer,
    batches: Callable[[int], Batch],
    *,
    run_dir: str | Path,
    max_steps: int,
    teacher: Tokenizer | None = None,
    aim: Aim = "latents",
    lr: float = 4e-3,
    warmup_steps: int = 50,
    checkpoint_every: int = 200,
    log_every: int = 50,
    accelerator: str = "auto",
    resume: bool = True,
) -> Tokenizer:
    """Train the encoder of a trained tokenizer on, in place, and return it in eval mode.

    A run that was killed goes on from `run_dir/last.ckpt` when called again with the same arguments. On one device, in
    float32.

    Args:
        tokenizer: a trained one whose class gives `to_latents`: `AudioCodec`, `ImageVQ`, `TwoToneVQ`.
        batches: what a step, 0 and up, sees: `{"clean": ..., "media": ...}`, the same media clean and spoiled, of one
            shape, float32 `[B, 3, H, W]` or `[B, C, samples]` as the tokenizer takes it, for audio with `"lengths"`
            int64 `[B]`. A function of the step alone makes a run repeatable; that it is the same one is not checked.
        run_dir: holds `last.ckpt` and `logs/from_step_*/metrics.csv`.
        max_steps: optimizer steps; the learning rate reaches zero there.
        teacher: whose codes of clean media are wanted; None = the tokenizer's as it is now.
        aim: see `LitDenoiser`. Codes are better where clean latents lie close to their entries and much of what latents
            say changes no code, as with `TwoToneVQ`; elsewhere they are worse (docs/log.md, 2026-11-30).
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        checkpoint_every: steps.
        log_every: steps.
        accelerator: as in Lightning.
        resume: False ignores an existing checkpoint (and overwrites it).

    Returns:
        The tokenizer. Its fingerprint is another one; `agreement` says how many codes of clean media are.

    Raises:
        CheckpointError: the checkpoint is unreadable or from a run with other settings.
        ManifestError: impossible settings.
        MediaError: media that does not fit the tokenizer, or is not of one shape.
        UnsupportedError: a tokenizer that gives no latents, or codes that `code_loss` does not know.
    """
    if min(max_steps, checkpoint_every, log_every) < 1 or lr <= 0:
        raise ManifestError(
            f"max_steps {max_steps}, checkpoint_every {checkpoint_every}, log_every {log_every} and lr {lr} must be "
            "positive"
        )
    if aim not in get_args(Aim):
        raise ManifestError(f"aim {aim!r} must be one of {', '.join(get_args(Aim))}")
    teacher = twin_of(tokenizer) if teacher is None else teacher.eval()
    module = LitDenoiser(tokenizer, teacher, aim=aim, max_steps=max_steps, lr=lr, warmup_steps=warmup_steps)
    first = batches(0)
    clean, spoiled = first["clean"], first["media"]
    if clean.shape != spoiled.shape:
        raise MediaError("batch 0", f"clean {list(clean.shape)}, spoiled {list(spoiled.shape)}", "need one shape")
    for media in (clean, spoiled):
        tokenizer.encode(media[:1])
    with torch.no_grad():  # fails early, too
        module.loss_of({name: value.to(tokenizer.device) for name, value in first.items()})
    module.settings = {
        "class": type(tokenizer).__name__,
        "start": tokenizer.fingerprint,
        "teacher": teacher.fingerprint,
        "aim": aim,
        "max_steps": max_steps,
        "lr": lr,
        "warmup_steps": warmup_steps,
    }
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    start = saved_step(path, module.settings) if resume and path.exists() else None
    callbacks = [Line(log_every), KeepLast(path, checkpoint_every)]
    train_on(module, TokenizerDataModule(_Steps(batches)), folder, start, callbacks, log_every, accelerator=accelerator)
    return tokenizer.eval()


@torch.no_grad()
def agreement(tokenizer: Tokenizer, teacher: Tokenizer, batches: Iterable[Batch]) -> dict[str, list[float]]:
    """How many codes are those that `teacher` gives to the clean media, both in eval mode.

    Args:
        tokenizer: whose codes are compared.
        teacher: whose codes are wanted.
        batches: as for `fit_denoising`.

    Returns:
        "clean" and "spoiled": of each quantizer the share of codes of the clean, and of the spoiled media, 0 to 1.
    """
    same_K: dict[str, Tensor | int] = {"clean": 0, "spoiled": 0}
    count = 0
    for batch in batches:
        lengths = batch.get("lengths")
        wanted = teacher.encode(batch["clean"], lengths)
        wanted_BKN = wanted.codes.cpu()
        counts_BN = torch.ones_like(wanted_BKN[:, 0], dtype=torch.bool)
        if wanted.lengths is not None:
            counts_BN = torch.arange(counts_BN.shape[1]) < wanted.lengths.cpu()[:, None]
        count += int(counts_BN.sum())
        for name, media in (("clean", batch["clean"]), ("spoiled", batch["media"])):
            equal_BKN = (tokenizer.encode(media, lengths).codes.cpu() == wanted_BKN) & counts_BN[:, None]
            same_K[name] += equal_BKN.transpose(0, 1).flatten(1).sum(1)
    return {name: [round(int(k) / max(count, 1), 4) for k in torch.as_tensor(same)] for name, same in same_K.items()}
