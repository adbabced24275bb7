"""Training of tokenizers: one Lightning module for every modality, and `fit_tokenizer`.

Everything random is a function of (seed, step), and the position in the data is a single number kept in the
checkpoint; so a run that is killed at any moment and started again ends with the same bits as one that was
not. Optimisation is manual: one optimizer for the tokenizer and, from `adversary_start` on, one for its adversary.
This file knows the losses but no architecture; batches are in `batches.py`, adversaries in `adversarial.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from anyglot_tokenizers.adversarial import Adversary, adversary_for
from anyglot_tokenizers.batches import (
    NONE,
    Augment,
    Batch,
    MediaSet,
    StepBatches,
    TokenizerDataModule,
    held_out_batches,
)
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.keep import CHECKPOINT, KeepLast, plain, saved_step, start_of, weights_of
from anyglot_tokenizers.losses import ImageLoss, SpectralLoss, psnr_per_item
from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.plots import write_reconstructions
from anyglot_tokenizers.precision import resolve_precision
from anyglot_tokenizers.quantize import Quantizer, ResidualQuantizer, code_statistics
from anyglot_tokenizers.quiet import interruptible, quiet
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, full_precision, seeded

__all__ = [
    "Augment",
    "LitTokenizer",
    "StepBatches",
    "TokenizerDataModule",
    "crop_of",
    "fit_tokenizer",
    "loss_for",
    "validate",
]
BEST = "best"
VERSION = 2  # of the checkpoint
SHOWN = 8  # reconstructions written each time


class LitTokenizer(L.LightningModule):
    """Trains any `Tokenizer` to reconstruct: `ImageLoss` or `SpectralLoss` by modality, plus commitment.

    To these come the adversary's losses and what the tokenizer itself asks for: `extra_losses` of its reconstruction,
    a dict of losses already weighted, where it has one (`AudioReconstruction`).
    `MuonAdamW`, linear warm-up, cosine to zero at `max_steps`, gradients clipped to a norm of 1.

    With `from_codes` the decoder alone is trained on, to make media of the codes that the trained encoder gives now: no
    id changes its meaning. It is for who writes these codes only; media of more codebooks may become worse.

    Args:
        tokenizer: trained in place.
        max_steps: length of the schedule.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        weight_decay: on hidden matrices.
        betas: of AdamW.
        muon: Muon for hidden matrices and convolutions (three times fewer steps here), else AdamW everywhere.
        commit_weight: weight of the commitment loss.
        foreground_weight: see `ImageLoss`.
        seed: together with the step, seeds torch before each step (quantizer dropout, k-means, restarts).
        loss: options of `ImageLoss` or `SpectralLoss`, or a module (output, target) -> (loss, parts) of one's own.
        ema_decay: of the averaged weights, which are then what is evaluated and saved; 0 keeps none.
        adversary_start: step from which a discriminator is trained and heard; None builds none.
        adversary: options of `adversarial.adversary_for`.
        adversary_lr: peak learning rate of the discriminator.
        from_codes: train the decoder alone, on the codes of this many quantizers; None trains everything. A model that
            writes the first codebook only (`first`) wants 1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_steps: int,
        lr: float = 1e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        muon: bool = True,
        commit_weight: float = 0.25,
        foreground_weight: float = 0.0,
        seed: int = 0,
        loss: Mapping[str, Any] | nn.Module | None = None,
        ema_decay: float = 0.0,
        adversary_start: int | None = None,
        adversary: Mapping[str, Any] | None = None,
        adversary_lr: float = 1e-4,
        from_codes: int | None = None,
    ) -> None:
        super().__init__()
        most = tokenizer.spec.num_quantizers
        if from_codes is not None and not 1 <= from_codes <= most:
            raise ManifestError(f"from_codes {from_codes} must lie in 1..{most}, the quantizers of the tokenizer")
        if not 0 <= ema_decay < 1 or (adversary_start is not None and adversary_start < 0):
            raise ManifestError(
                f"ema_decay {ema_decay} must lie in [0, 1), adversary_start {adversary_start} at 0 or up"
            )
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.max_steps, self.lr, self.warmup_steps = max_steps, lr, warmup_steps
        self.weight_decay, self.betas, self.muon = weight_decay, betas, muon
        self.commit_weight, self.ema_decay, self.seed = commit_weight, ema_decay, seed
        self.from_codes = from_codes
        options = {"foreground_weight": foreground_weight} if tokenizer.modality == "image" else {}
        self.loss = loss if isinstance(loss, nn.Module) else loss_for(tokenizer, {**options, **(loss or {})})
        self.averaged = twin_of(tokenizer) if ema_decay else None
        self.adversary_start, self.adversary_lr = adversary_start, adversary_lr
        self.adversary: Adversary | None = None
        if adversary_start is not None:
            with seeded(seed):
                self.adversary = adversary_for(tokenizer.modality, tokenizer.spec.channels, adversary or {})
        self.settings: dict[str, Any] = {}
        self.parts: dict[str, Tensor] = {}
        self.counts: Tensor | None = None

    @property
    def result(self) -> Tokenizer:
        """What is evaluated and saved: the averaged weights where they are kept."""
        return self.tokenizer if self.averaged is None else self.averaged

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from (seed, step), so that a resumed run draws what an uninterrupted one draws."""
        digest = hashlib.blake2b(f"{self.seed}/{self.global_step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the tokenizer and, where there is one, of its adversary.

        Raises AnyglotError when the loss is no longer finite.
        """
        media, lengths = batch["media"], batch.get("lengths")
        output = self.tokenizer(media, lengths) if self.from_codes is None else self._decoded(media, lengths)
        target = _fitted(media, output.media)
        total, parts = self.loss(output.media, target)
        judged = self.adversary is not None and self.global_step >= (self.adversary_start or 0)
        if judged:
            assert self.adversary is not None
            total, more = self.adversary.generator(total, output.media, target)
            parts |= more
        total = total + self.commit_weight * output.commit_loss
        for name, extra in getattr(output, "extra_losses", {}).items():
            total = total + extra
            parts[name] = extra.detach()
        if not bool(torch.isfinite(total)):
            raise AnyglotError(
                f"step {self.global_step}: loss is {float(total)}; start again with a lower learning rate"
            )
        parts = {"loss": total.detach(), **parts, "commit": output.commit_loss.detach()}
        main, *other = _listed(self.optimizers())
        schedule, *other_schedule = _listed(self.lr_schedulers())
        self._update(total, main, counted=True)
        schedule.step()
        if judged:
            assert self.adversary is not None
            verdict = self.adversary.judge(output.media, target)
            parts["discriminator"] = verdict.detach()
            self._update(verdict, other[0], counted=False)
            other_schedule[0].step()
        self._average()
        self._note(parts, output.stats)

    def _decoded(self, media: Tensor, lengths: Tensor | None) -> Reconstruction:
        """A reconstruction whose gradient reaches the decoder alone."""
        with torch.no_grad(), full_precision(media.device):
            z_BDN, counts_BN = self.tokenizer.to_latents(media, lengths)
            quantizer: Any = self.tokenizer.quantizer
            codes_BKN = quantizer.encode(z_BDN.flatten(2), self.from_codes)
            q_BDN = quantizer.decode(codes_BKN).unflatten(2, z_BDN.shape[2:])
            used_KM = codes_BKN.transpose(0, 1)[:, counts_BN.flatten(1)]
            stats = quantizer._stats(used_KM, torch.ones_like(used_KM))
        media = self.tokenizer.from_latents(q_BDN, counts_BN)
        return Reconstruction(media, codes_BKN.unflatten(2, z_BDN.shape[2:]), media.new_zeros(()), stats)

    def _update(self, loss: Tensor, optimizer: LightningOptimizer, *, counted: bool) -> None:
        """Backward, clip and step. Only steps that are `counted` advance `global_step`, which would add up both."""
        with torch.autocast(self.device.type, enabled=False):  # as automatic optimisation, outside of the forward
            optimizer.zero_grad()
            self.manual_backward(loss)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            (optimizer if counted else optimizer.optimizer).step()

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        step = self.global_step
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        current = self.tokenizer.state_dict()
        for name, mean in self.averaged.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])

    def _note(self, parts: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        self.parts = parts
        counts = stats["counts"]
        self.counts = counts if self.counts is None else self.counts + counts
        self.log_dict(parts)
        for name in ("perplexity", "usage"):
            self.log_dict({f"{name}/{index}": value for index, value in enumerate(stats[name])})

    def configure_optimizers(self) -> Any:
        """The optimizers and schedules that are functions of the step alone."""
        main = MuonAdamW(self.tokenizer, self.lr, weight_decay=self.weight_decay, betas=self.betas, muon=self.muon)
        schedule = torch.optim.lr_scheduler.LambdaLR(main, self.lr_share)
        if self.adversary is None:
            return [main], [schedule]
        start = self.adversary_start or 0
        other = torch.optim.AdamW(self.adversary.parameters(), self.adversary_lr, betas=(0.5, 0.9), weight_decay=0.0)
        other_schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: self.lr_share(step + start, start))
        return [main, other], [schedule, other_schedule]

    def lr_share(self, step: int, start: int = 0) -> float:
        """Share of the peak learning rate at a step, warm-up beginning at `start`."""
        warm = min(1.0, (step - start + 1) / max(self.warmup_steps, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1.0)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings, which a resumed run must share."""
        checkpoint["anyglot"] = self.settings


def _listed(found: Any) -> list[Any]:
    """Lightning gives a single optimizer or schedule bare."""
    return found if isinstance(found, list) else [found]


def twin_of(tokenizer: Tokenizer) -> Tokenizer:
    """A copy in eval mode that is not trained; what is attached from outside (a teacher) stays with the original."""
    twin = type(tokenizer)(**tokenizer.config)
    twin.load_state_dict(tokenizer.state_dict())
    return twin.to(tokenizer.device).eval().requires_grad_(False)


def loss_for(tokenizer: Tokenizer, options: Mapping[str, Any]) -> nn.Module:
    """`ImageLoss` or `SpectralLoss` with `options`, by the tokenizer's modality. Raises ManifestError for neither."""
    sample_rate = tokenizer.spec.sample_rate
    try:
        if tokenizer.modality == "image":
            return ImageLoss(**options)
        if sample_rate is not None:
            return SpectralLoss(sample_rate, **options)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"loss: {error}") from error
    raise ManifestError(f"{tokenizer.modality} has no loss of its own: pass loss=, a module (output, target)")


def _fitted(media: Tensor, output: Tensor) -> Tensor:
    """The target: `media`, with silence where the output goes on to fill its last code."""
    missing = output.shape[-1] - media.shape[-1]
    return torch.nn.functional.pad(media, (0, missing)) if media.ndim == 3 and missing else media


@torch.no_grad()
def validate(
    tokenizer: Tokenizer, loss: nn.Module, batches: Iterable[Batch], num_quantizers: int | None = None
) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
    """Encode and decode held-out batches as a user would.

    Args:
        tokenizer: in eval mode.
        loss: (output, target) -> (loss, parts).
        batches: media with lengths.
        num_quantizers: use the first so many; None = all.

    Returns:
        Means over items of `loss`, its parts and, for images, `psnr` (of each picture alone, in dB); `usage/K` (share
        of codes met) and `perplexity/K` per quantizer over all batches; and up to 8 (original, reconstruction) pairs.
    """
    sums: dict[str, float] = {}
    counts_KC = torch.zeros(num_quantizers or tokenizer.spec.num_quantizers, max(tokenizer.spec.codebook_sizes))
    shown: list[tuple[Tensor, Tensor]] = []
    count = 0
    for batch in batches:
        media, lengths = (batch[name].to(tokenizer.device) if name in batch else None for name in ("media", "lengths"))
        assert media is not None
        codes = tokenizer.encode(media, lengths, num_quantizers=num_quantizers)
        output = tokenizer.decode(codes)
        target = _fitted(media, output)
        value, parts = loss(output, target)
        parts = {"loss": value, **parts}
        if tokenizer.modality == "image":
            parts["psnr"] = psnr_per_item(output, target).mean()
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + float(part) * len(media)
        count += len(media)
        for index in range(len(media)):
            flat_KN = codes.item(index).flatten(1).cpu()
            counts_KC.scatter_add_(1, flat_KN, torch.ones(flat_KN.shape))
            if len(shown) < SHOWN:
                end = media.shape[-1] if lengths is None else int(lengths[index])
                shown.append((target[index, ..., :end].cpu(), output[index, ..., :end].cpu()))
    metrics = {name: total / max(count, 1) for name, total in sums.items()}
    for index, size in enumerate(tokenizer.spec.codebook_sizes[: len(counts_KC)]):
        statistics = code_statistics(counts_KC[index : index + 1, :size])
        metrics |= {f"{name}/{index}": float(value) for name, value in statistics.items()}
    return metrics, shown


class _Validation(Callback):
    """Every so many steps and at the end: measures on held-out media, `samples/STEP`, and the best weights so far."""

    def __init__(self, folder: Path, batches: StepBatches, every: int, items: int) -> None:
        self.folder, self.batches, self.every, self.items = folder, batches, every, items
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The best and the last figures."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with an earlier run's best."""
        self.best, self.last = dict(state_dict["best"]), dict(state_dict["last"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if (step % self.every and step != trainer.max_steps) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LitTokenizer)
        tokenizer, training = pl_module.result, pl_module.result.training
        tokenizer.eval()
        used = pl_module.from_codes
        metrics, shown = validate(tokenizer, pl_module.loss, held_out_batches(self.batches, self.items), used)
        if not self.best or metrics["loss"] < self.best["loss"]:  # always of the same items
            self.best = {"step": float(step), **metrics}
            tokenizer.save_pretrained(self.folder / BEST)
        if step == trainer.max_steps and self.items < self.batches.num_items:
            everything = held_out_batches(self.batches, self.batches.num_items)
            metrics = validate(tokenizer, pl_module.loss, everything, used)[0]
        self.last = {"step": float(step), **metrics}
        with atomic_write(self.folder / "validation.json") as temporary:
            temporary.write_text(json.dumps(self.state_dict(), indent=1) + "\n", encoding="utf-8")
        targets, outputs = zip(*shown, strict=True)
        write_reconstructions(self.folder / "samples" / f"{step:07d}", targets, outputs, tokenizer.spec.sample_rate)
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"held_out/{name}": value for name, value in metrics.items()}, step)
        words = [f"{name} {value:.4g}" for name, value in metrics.items()]
        print("  ".join([f"{tokenizer.modality} held out at step {step}", *words]), file=sys.stderr, flush=True)
        tokenizer.train(training)


class Line(Callback):
    """One line on stderr every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.mark = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mark = (trainer.global_step, time.monotonic())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(pl_module, LitTokenizer)
        counts = pl_module.counts
        pl_module.counts = None
        if counts is not None and trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        if not trainer.is_global_zero:
            return
        speed = (step - self.mark[0]) / max(time.monotonic() - self.mark[1], 1e-9)
        words = [f"{pl_module.tokenizer.modality} step {step}/{trainer.max_steps}"]
        words += [f"{name} {float(value):.4g}" for name, value in pl_module.parts.items()]
        if counts is not None:
            stats = code_statistics(counts)
            words.append("usage " + "/".join(f"{share:.0%}" for share in stats["usage"].tolist()))
            words.append("perplexity " + "/".join(f"{value:.0f}" for value in stats["perplexity"].tolist()))
        print("  ".join([*words, f"{speed:.2f} steps/s"]), file=sys.stderr, flush=True)
        self.mark = (step, time.monotonic())


def fit_tokenizer(
    tokenizer: Tokenizer,
    data: Tensor | np.ndarray | Sequence[Any] | MediaSet,
    *,
    run_dir: str | os.PathLike[str],
    max_steps: int,
    batch_size: int,
    lr: float = 1e-3,
    warmup_steps: int = 50,
    seed: int = 0,
    precision: str = "auto",
    checkpoint_every: int = 200,
    log_every: int = 50,
    crop_seconds: float = 1.5,
    crop: int | None = None,
    augment: Augment = NONE,
    held_out: Tensor | np.ndarray | Sequence[Any] | MediaSet | None = None,
    validate_every: int = 500,
    validate_items: int = 512,
    channels_last: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    num_workers: int = 0,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Tokenizer:
    """Train `tokenizer` in place and return it in eval mode, with averaged weights if they are kept (`ema_decay`).

    A run that was killed goes on from `run_dir/last.ckpt` when called again with the same arguments, to the
    same bits; `tokenizer` is the one that it began with, built or loaded again, or the same object.

    Args:
        tokenizer: any native tokenizer.
        data: images uint8 `[N, H, W, 3]`; float arrays `[samples]` or `[C, samples]` at the tokenizer's sample rate; or
            a `MediaSet`.
        run_dir: holds `last.ckpt`, `logs/from_step_*/metrics.csv`, and with `held_out` also `samples/STEP` (pictures,
            sounds, spectrograms), `validation.json` and `best`, the tokenizer with the lowest held-out loss.
        max_steps: optimizer steps; the learning rate reaches zero there.
        batch_size: items per step, over all devices.
        lr, warmup_steps: see `LitTokenizer`.
        seed: of data order, crops and quantizers (initial weights are the tokenizer's own `seed`).
        precision: "32-true", "bf16-mixed", or "auto": bf16-mixed on hardware that computes it natively.
            Quantizer and STFT are float32 in any case.
        checkpoint_every, log_every: steps.
        crop_seconds: length of audio items, rounded to whole codes.
        crop: pixels per side of image items (None = as they are), or samples of other items, instead of `crop_seconds`.
        augment: random changes of training items.
        held_out: media never trained on, of the same kind as `data`; `validate_items` of them are measured on every
            `validate_every` steps, all at the end.
        channels_last: keep image weights and features channels last, which is faster on most hardware.
        accelerator, devices, num_nodes: as in Lightning; more than one device trains with DDP.
        num_workers: loader processes.
        resume: False ignores an existing checkpoint (and overwrites it).
        callbacks: further Lightning callbacks.
        options: further options of `LitTokenizer`.

    Raises:
        CheckpointError: the checkpoint is unreadable or from a run with other settings or data.
        MediaError, ManifestError: unusable data or settings.
        UnsupportedError: a tokenizer that cannot be trained, or with `from_codes` one without `from_latents`.
    """
    if min(max_steps, checkpoint_every, log_every, validate_every, validate_items) < 1:
        raise ManifestError(
            f"max_steps {max_steps}, checkpoint_every {checkpoint_every}, log_every {log_every}, validate_every "
            f"{validate_every} and validate_items {validate_items} must be positive"
        )
    tokenizer.check_trainable()
    lr, options = float(lr), {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
    precision = resolve_precision(precision)
    decoder_alone = options.get("from_codes") is not None
    _check_trained(tokenizer) if decoder_alone else _check_stages(tokenizer, max_steps)
    if crop is None and tokenizer.modality != "image":
        crop = crop_of(tokenizer, crop_seconds)
    batches = StepBatches(data, batch_size=batch_size, seed=seed, crop=crop, augment=augment)
    media, lengths = batches[0]["media"][:1], batches[0].get("lengths")
    tokenizer.encode(media)  # fails early on media that do not fit
    module = LitTokenizer(tokenizer, max_steps=max_steps, lr=lr, warmup_steps=warmup_steps, seed=seed, **options)
    if decoder_alone:
        with torch.no_grad():  # fails early on tokenizers that cannot
            module._decoded(media.to(tokenizer.device), None if lengths is None else lengths[:1])
    module.settings = {
        "version": VERSION,
        "class": type(tokenizer).__name__,
        "config": tokenizer.config,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "seed": seed,
        "precision": precision,
        "options": {name: plain(value) for name, value in sorted(options.items())},
        "data": batches.fingerprint,
        "channels_last": channels_last,
        "teacher": str(distillation := getattr(tokenizer, "distillation", None)),
        "teacher_weights": weights_of(getattr(distillation, "teacher", None)),
        "start": start_of(tokenizer, Path(run_dir)),
    }
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    start = saved_step(path, module.settings) if resume and path.exists() else None
    if start is None:
        if not decoder_alone:  # the encoder uses them, too
            tokenizer.fit_statistics(torch.cat([batches[index]["media"] for index in range(4)]))
        if module.averaged is not None:
            module.averaged.load_state_dict(tokenizer.state_dict())
    if channels_last:
        tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own: list[Callback] = [Line(log_every), KeepLast(path, checkpoint_every)]
    if held_out is not None:  # before `KeepLast`, so that a checkpoint knows the figures of its own step
        measured = StepBatches(held_out, batch_size=batch_size, crop=crop)
        own.insert(1, _Validation(folder, measured, validate_every, validate_items))
    train_on(
        module,
        TokenizerDataModule(batches, num_workers),
        folder,
        start,
        [*own, *callbacks],
        log_every,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=precision,
    )
    if module.averaged is not None:
        tokenizer.load_state_dict(module.averaged.state_dict())
    return tokenizer.eval()


def train_on(
    module: LitTokenizer,
    data: TokenizerDataModule,
    folder: Path,
    start: int | None,
    callbacks: list[Callback],
    log_every: int,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    **machines: Any,
) -> None:
    """Train from the beginning, or from `folder`'s checkpoint of step `start`; `machines` are as in Lightning."""
    with quiet(), interruptible(), torch.random.fork_rng():
        trainer = L.Trainer(
            devices=devices,
            num_nodes=num_nodes,
            strategy="ddp_find_unused_parameters_true" if devices * num_nodes > 1 else "auto",
            use_distributed_sampler=False,  # batches are shared out by `StepBatches`
            max_steps=module.max_steps,
            max_epochs=-1,
            logger=CSVLogger(folder, name="logs", version=f"from_step_{start or 0}"),
            callbacks=callbacks,
            log_every_n_steps=log_every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **machines,
        )
        module.tokenizer.train()
        trainer.fit(module, data, ckpt_path=folder / CHECKPOINT if start is not None else None, weights_only=True)


def crop_of(tokenizer: Tokenizer, seconds: float) -> int:
    """`seconds` in samples, rounded to whole codes. Raises ManifestError for media without a sample rate."""
    sample_rate = tokenizer.spec.sample_rate
    if sample_rate is None:
        raise ManifestError(f"{tokenizer.modality} has no sample rate: pass crop, in samples")
    hop_length = tokenizer.spec.hop_length
    return max(1, round(seconds * sample_rate / hop_length)) * hop_length


def _check_trained(tokenizer: Tokenizer) -> None:
    for module in tokenizer.modules():
        if isinstance(module, Quantizer):
            needed, steps = module.num_quantizers * getattr(module, "stage_steps", 0), int(module.steps)
            if steps <= needed:
                raise ManifestError(
                    f"from_codes is for a trained tokenizer; this one had {steps} steps, its codebooks need more than "
                    f"{needed}: train it without from_codes first"
                )


def _check_stages(tokenizer: Tokenizer, max_steps: int) -> None:
    for module in tokenizer.modules():
        if isinstance(module, ResidualQuantizer):
            needed = module.num_quantizers * module.stage_steps
            if int(module.steps) + max_steps <= needed:
                raise ManifestError(
                    f"max_steps {max_steps} ends before all {module.num_quantizers} quantizers have started "
                    f"(step {needed}); "
                    f"train longer or build the tokenizer with stage_steps below {module.stage_steps}"
                )
