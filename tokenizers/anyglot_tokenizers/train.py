"""Training of tokenizers: one Lightning module, exactly resumable batches, and `fit_tokenizer`.

Everything random is a function of (seed, step), and the position in the data is a single number kept in the
checkpoint; so a run that is killed at any moment and started again ends with the same bits as one that was
not. This file knows the losses but no architecture, and trains on one process.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from anyglot_tokenizers.errors import AnyglotError, CheckpointError, ManifestError, MediaError
from anyglot_tokenizers.losses import ImageLoss, SpectralLoss
from anyglot_tokenizers.media import atomic_write
from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.quantize import ResidualQuantizer, code_statistics
from anyglot_tokenizers.tokenizer import Tokenizer

CHECKPOINT = "last.ckpt"
ENDLESS = 2**40  # batches in the one virtual epoch; max_steps ends the run
Batch = dict[str, Tensor]


class StepBatches(Dataset[Batch]):
    """Batch b as a pure function of (seed, b): epochs of shuffled items, random crops of audio.

    Args:
        media: images uint8 `[N, H, W, 3]`, or a sequence of float mono arrays `[samples]` at the tokenizer's
            rate.
        batch_size: items per batch; batches run on across epoch ends.
        seed: of order and crops.
        crop: samples per audio item; shorter items are padded with silence and come with their length.

    A batch is `{"media": float32 [B, 3, H, W] or [B, 1, crop]}`, for audio with `"lengths"` int64 `[B]`.
    Raises MediaError for empty, misshapen or non-finite media.
    """

    def __init__(
        self,
        media: Tensor | np.ndarray | Sequence[Any],
        *,
        batch_size: int,
        seed: int = 0,
        crop: int | None = None,
    ) -> None:
        if batch_size < 1 or (crop is not None and crop < 1):
            raise ManifestError(f"batch_size {batch_size} and crop {crop} must be positive")
        if len(media) == 0:
            raise MediaError("training media", "no items", "give at least one")
        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.images: Tensor | None = None
        self.sounds: list[Tensor] = []
        if isinstance(media, Tensor | np.ndarray):
            self.images = torch.as_tensor(media)
            if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
                shape = f"{self.images.dtype}{list(self.images.shape)}"
                raise MediaError("training images", f"are {shape}", "need uint8[items, height, width, 3]")
        else:
            if crop is None:
                raise ManifestError("audio batches need crop, in samples")
            self.sounds = [_sound(index, torch.as_tensor(sound)) for index, sound in enumerate(media)]
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def num_items(self) -> int:
        """Items in the collection."""
        return len(self.sounds) if self.images is None else len(self.images)

    @property
    def fingerprint(self) -> str:
        """sha256 over seed, batch size, crop and the media (shapes and samples of the content)."""
        digest = hashlib.sha256(f"{self.seed}/{self.batch_size}/{self.crop}/{self.num_items}".encode())
        picks = {round(position) for position in np.linspace(0, self.num_items - 1, 64)}
        for item in range(self.num_items):
            content = self.sounds[item] if self.images is None else self.images[item]
            digest.update(f"{content.dtype}{list(content.shape)}".encode())
            if item in picks:
                digest.update(content.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, batch: int) -> Batch:
        first = batch * self.batch_size
        items = [self._item(position) for position in range(first, first + self.batch_size)]
        if self.images is not None:
            return {"media": self.images[items].permute(0, 3, 1, 2).contiguous().float() / 255}
        assert self.crop is not None
        rng = np.random.default_rng([self.seed, 1, batch])
        media_B1S = torch.zeros(self.batch_size, 1, self.crop)
        lengths_B = torch.empty(self.batch_size, dtype=torch.int64)
        for row, item in enumerate(items):
            sound = self.sounds[item]
            start = int(rng.integers(0, max(len(sound) - self.crop, 0) + 1))
            piece = sound[start : start + self.crop]
            media_B1S[row, 0, : len(piece)] = piece
            lengths_B[row] = len(piece)
        return {"media": media_B1S, "lengths": lengths_B}

    def _item(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_items)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_items))
        return int(self._order[1][offset])


def _sound(index: int, sound: Tensor) -> Tensor:
    name = f"training sound {index}"
    if sound.ndim != 1 or not sound.is_floating_point() or sound.numel() == 0:
        raise MediaError(name, f"is {sound.dtype}{list(sound.shape)}", "need float[samples], not empty")
    if not bool(torch.isfinite(sound).all()):
        raise MediaError(name, "holds NaN or infinite samples", "clean or drop it")
    return sound


class _From(Sampler[int]):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, ENDLESS))

    def __len__(self) -> int:
        return ENDLESS


class TokenizerDataModule(L.LightningDataModule):
    """`StepBatches` for a Trainer; its state is the number of steps done, from which the next run goes on."""

    def __init__(self, batches: StepBatches) -> None:
        super().__init__()
        self.batches = batches
        self.start = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches from the current step on."""
        return DataLoader(self.batches, batch_size=None, sampler=_From(self.start))

    def state_dict(self) -> dict[str, Any]:
        """Steps done.

        The trainer's own batch counter lags by one where checkpoints are written, so it is not used.
        """
        return {"step": self.trainer.global_step if self.trainer else self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step."""
        self.start = int(state_dict["step"])


class LitTokenizer(L.LightningModule):
    """Trains any `Tokenizer` to reconstruct: `ImageLoss` or `SpectralLoss` by modality, plus commitment.

    `MuonAdamW`, linear warm-up, cosine to zero at `max_steps`.

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
        foreground_weight: float = 20.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_steps, self.lr, self.warmup_steps = max_steps, lr, warmup_steps
        self.weight_decay, self.betas, self.commit_weight, self.seed = (
            weight_decay,
            betas,
            commit_weight,
            seed,
        )
        self.muon = muon
        self.is_image = tokenizer.modality == "image"
        self.loss: ImageLoss | SpectralLoss
        if self.is_image:
            self.loss = ImageLoss(foreground_weight)
        else:
            sample_rate = tokenizer.config["sample_rate"]
            self.loss = SpectralLoss(int(sample_rate))
        self.settings: dict[str, Any] = {}
        self.parts: dict[str, Tensor] = {}
        self.counts: Tensor | None = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from (seed, step), so that a resumed run draws what an uninterrupted one draws."""
        digest = hashlib.blake2b(f"{self.seed}/{self.global_step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Reconstruction plus commitment loss. Raises AnyglotError when the loss is no longer finite."""
        media, lengths = batch["media"], batch.get("lengths")
        output = self.tokenizer(media, lengths)
        if self.is_image:
            loss, parts = self.loss(output.media, media)
        else:
            target_BS = torch.nn.functional.pad(media[:, 0], (0, output.media.shape[2] - media.shape[2]))
            loss, parts = self.loss(output.media[:, 0], target_BS)
        total: Tensor = loss + self.commit_weight * output.commit_loss
        if not bool(torch.isfinite(total)):
            raise AnyglotError(
                f"step {self.global_step}: loss is {float(total)}; start again with a lower learning rate"
            )
        self.parts = {"loss": total.detach(), **parts, "commit": output.commit_loss.detach()}
        counts = output.stats["counts"]
        self.counts = counts if self.counts is None else self.counts + counts
        self.log_dict(self.parts)
        for name in ("perplexity", "usage"):
            self.log_dict({f"{name}/{index}": value for index, value in enumerate(output.stats[name])})
        return total

    def configure_optimizers(self) -> Any:
        """The optimizer and a schedule that is a function of the step alone."""
        optimizer = MuonAdamW(self.tokenizer, self.lr, weight_decay=self.weight_decay, betas=self.betas, muon=self.muon)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_share(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1.0)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings, which a resumed run must share."""
        checkpoint["anyglot"] = self.settings


class _Last(Callback):
    """Writes `last.ckpt` every so many steps and at the end, through a temporary name."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            with atomic_write(self.path) as temporary:
                trainer.save_checkpoint(temporary)


class _Line(Callback):
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
        speed = (step - self.mark[0]) / max(time.monotonic() - self.mark[1], 1e-9)
        words = [f"{pl_module.tokenizer.modality} step {step}/{trainer.max_steps}"]
        words += [f"{name} {float(value):.4g}" for name, value in pl_module.parts.items()]
        if pl_module.counts is not None:
            stats = code_statistics(pl_module.counts)
            words.append("usage " + "/".join(f"{share:.0%}" for share in stats["usage"].tolist()))
            words.append("perplexity " + "/".join(f"{value:.0f}" for value in stats["perplexity"].tolist()))
        print("  ".join([*words, f"{speed:.2f} steps/s"]), file=sys.stderr, flush=True)
        pl_module.counts = None
        self.mark = (step, time.monotonic())


def fit_tokenizer(
    tokenizer: Tokenizer,
    data: Tensor | np.ndarray | Sequence[Any],
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
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    **loss_options: Any,
) -> Tokenizer:
    """Train `tokenizer` in place and return it in eval mode.

    A run that was killed goes on from `run_dir/last.ckpt` when called again with the same arguments, to the
    same bits.

    Args:
        tokenizer: any native tokenizer.
        data: images uint8 `[N, H, W, 3]`, or mono float arrays at the tokenizer's sample rate.
        run_dir: holds `last.ckpt` and `logs/from_step_*/metrics.csv`.
        max_steps: optimizer steps; the learning rate reaches zero there.
        batch_size: items per step.
        lr, warmup_steps: see `LitTokenizer`.
        seed: of data order, crops and quantizers (initial weights are the tokenizer's own `seed`).
        precision: "32-true", "bf16-mixed", or "auto": bf16-mixed on hardware that computes it natively.
            Quantizer and STFT are float32 in any case.
        checkpoint_every, log_every: steps.
        crop_seconds: length of audio items, rounded to whole codes.
        resume: False ignores an existing checkpoint (and overwrites it).
        callbacks: further Lightning callbacks.
        loss_options: `weight_decay`, `betas`, `commit_weight`, `foreground_weight` of `LitTokenizer`.

    Raises:
        CheckpointError: the checkpoint is unreadable or from a run with other settings or data.
        MediaError, ManifestError: unusable data or settings.
    """
    if max_steps < 1 or checkpoint_every < 1 or log_every < 1:
        raise ManifestError(
            f"max_steps {max_steps}, checkpoint_every {checkpoint_every}, log_every {log_every} must be positive"
        )
    precision = resolve_precision(precision)
    _check_stages(tokenizer, max_steps)
    crop = None
    if tokenizer.modality != "image":
        hop_length = tokenizer.spec.hop_length
        crop = max(1, round(crop_seconds * tokenizer.config["sample_rate"] / hop_length)) * hop_length
    batches = StepBatches(data, batch_size=batch_size, seed=seed, crop=crop)
    tokenizer.encode(batches[0]["media"][:1])  # fails early on media that do not fit
    module = LitTokenizer(tokenizer, max_steps=max_steps, lr=lr, warmup_steps=warmup_steps, seed=seed, **loss_options)
    module.settings = {
        "class": type(tokenizer).__name__,
        "config": tokenizer.config,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "seed": seed,
        "precision": precision,
        "loss_options": {name: list(v) if isinstance(v, tuple) else v for name, v in sorted(loss_options.items())},
        "data": batches.fingerprint,
    }
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    start = _saved_step(path, module.settings) if resume and path.exists() else None
    if start is None:
        tokenizer.fit_statistics(torch.cat([batches[index]["media"] for index in range(4)]))
    with _quiet(), torch.random.fork_rng():
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            max_steps=max_steps,
            max_epochs=-1,
            precision=precision,  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            logger=CSVLogger(folder, name="logs", version=f"from_step_{start or 0}"),
            callbacks=[_Line(log_every), _Last(path, checkpoint_every), *callbacks],
            log_every_n_steps=log_every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        tokenizer.train()
        trainer.fit(
            module,
            TokenizerDataModule(batches),
            ckpt_path=path if start is not None else None,
            weights_only=True,
        )
    return tokenizer.eval()


def resolve_precision(precision: str) -> str:
    """ "auto" becomes "bf16-mixed" where matrix products in bfloat16 are native, else "32-true"."""
    if precision not in ("auto", "32-true", "bf16-mixed"):
        raise ManifestError(f"precision {precision!r} is not one of auto, 32-true, bf16-mixed")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return "bf16-mixed" if native else "32-true"


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


def _saved_step(path: Path, settings: dict[str, Any]) -> int:
    """Step of a checkpoint. Raises CheckpointError if it is unreadable or of another run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = checkpoint["anyglot"], int(checkpoint["global_step"])
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); delete it or pass resume=False") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{path}: from a run with {name} {_short(saved.get(name))}, now {_short(value)}; "
                "use another run_dir, or resume=False to overwrite it"
            )
    return step


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on hardware, workers and log folders."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*resuming from a checkpoint.*",
                ".*Experiment logs directory.*",
                ".*LeafSpec.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
