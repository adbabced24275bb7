"""The `tokenizer/*` recipes: a folder of pictures or sounds in, a trained tokenizer out, measured on files never seen.

Reads and splits the folder (`anyglot_tokenizers.folder`), for speech may train or load a teacher whose features the
first codebook learns, trains, and stores the tokenizer with a report. Run again with the same settings, a killed run
goes on where it was. Nothing here knows a language model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from anyglot_recipes.chain import Run, build_tokenizer
from anyglot_tokenizers import load
from anyglot_tokenizers.batches import Augment, StepBatches, held_out_batches
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.folder import ERRORS, FolderMedia, Split, audio_folder, image_folder
from anyglot_tokenizers.tokenizer import Tokenizer

COUNTED = 2048  # training items, at most, that the report measures on


@dataclass
class MediaConfig:
    """How files become training items.

    Args:
        side: images: pixels per side of an item.
        keep_side: images: pictures are kept with at most so many pixels on the shorter side; random zooms cut items
            from them.
        crop_seconds: sounds: length of an item.
        max_seconds: sounds: longer files are left out.
        workers: threads that decode.
    """

    side: int = 64
    keep_side: int = 96
    crop_seconds: float = 1.5
    max_seconds: float = 600.0
    workers: int = 2


@dataclass
class TeacherConfig:
    """Speech: whose features the first codebook learns to predict.

    Args:
        source: "" for nobody, "own" to train a small teacher on the same files first, or the folder or hub id of a
            HuBERT, WavLM or wav2vec 2.0 model.
        weight: of the distillation loss.
        axis: "frame" or "dim", see `Distillation`.
        steps: "own": optimizer steps.
    """

    source: str = ""
    weight: float = 1.0
    axis: Literal["frame", "dim"] = "frame"
    steps: int = 600


@dataclass
class FitConfig:
    """The training schedule: arguments of `anyglot_tokenizers.train.fit_tokenizer` and `LitTokenizer`.

    Args:
        max_steps: optimizer steps.
        batch_size: items per step, over all devices.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices and convolutions, else AdamW.
        commit_weight: weight of the commitment loss.
        loss: options of `ImageLoss` or `SpectralLoss`.
        ema_decay: of the averaged weights, which are evaluated and saved; 0 keeps none.
        adversary_start: step from which a discriminator is trained and heard; null builds none.
        adversary: options of `anyglot_tokenizers.adversarial.adversary_for`.
        adversary_lr: peak learning rate of the discriminator.
        from_codes: with `start`: train the decoder alone, on the codes of this many quantizers; null trains everything.
        precision: "32-true", "bf16-mixed" or "auto".
        validate_every: steps between measures on held-out files.
        validate_items: held-out items measured then; all of them at the end.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        channels_last: keep image weights and features channels last.
        accelerator: as in Lightning.
        devices: more than one trains with DDP.
        num_nodes: machines.
        num_workers: loader processes.
    """

    max_steps: int = 1000
    batch_size: int = 32
    lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    muon: bool = True
    commit_weight: float = 0.25
    loss: dict[str, Any] = field(default_factory=dict)
    ema_decay: float = 0.0
    adversary_start: int | None = None
    adversary: dict[str, Any] = field(default_factory=dict)
    adversary_lr: float = 1e-4
    from_codes: int | None = None
    precision: str = "auto"
    validate_every: int = 500
    validate_items: int = 256
    checkpoint_every: int = 200
    log_every: int = 50
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    num_workers: int = 0


@dataclass
class TokenizerRecipe:
    """A tokenizer recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        data: folder of media, or several.
        seed: of all randomness.
        tokenizer: class, as `module:Class`.
        model: its arguments.
        start: folder of a trained tokenizer to go on from, in place of a new one; then `tokenizer`, `model` and
            `teacher` are not used.
        split: which files are never trained on.
        media: how files become training items.
        augment: random changes of training items.
        teacher: speech: whose features the first codebook learns.
        train: the schedule.
    """

    run_dir: str = "runs/tokenizer"
    data: list[str] | str = ""
    seed: int = 0
    tokenizer: str = "anyglot_tokenizers.image:ImageVQ"
    model: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    split: Split = field(default_factory=Split)
    media: MediaConfig = field(default_factory=MediaConfig)
    augment: Augment = field(default_factory=Augment)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: FitConfig = field(default_factory=FitConfig)


def train_tokenizer(config: TokenizerRecipe) -> dict[str, Any] | None:
    """Train a tokenizer on a folder of media; `run_dir/tokenizer` holds it, `run_dir/report.json` its figures.

    Returns:
        The report: figures on all held-out files at the end, on `validate_items` of them where those were best, on
        training files, and how many files there are; None on all but the first of several devices.

    Raises:
        ManifestError: no data, nothing to hold out, or impossible settings.
        CheckpointError: `start` is no folder of a tokenizer.
        UnsupportedError: `start` cannot be trained, or its decoder cannot be alone.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from anyglot_tokenizers.train import crop_of, fit_tokenizer, loss_for, validate

    folders = [config.data] if isinstance(config.data, str) else list(config.data)
    if not all(folders) or not folders:
        raise ManifestError("a tokenizer needs media to train on: give a folder with --data DIR")
    if config.train.from_codes is not None and not config.start:
        raise ManifestError(f"train.from_codes {config.train.from_codes} is for a trained tokenizer: give --start")
    tokenizer = _build(config)
    tokenizer.check_trainable()
    settings = {k: v for k, v in vars(config).items() if k not in ("run_dir", "data")}
    run = Run(config.run_dir, settings | {"start": tokenizer.fingerprint if config.start else ""})
    train, held_out = _read(config, tokenizer, folders, run.dir / "media")
    errors = sum(1 for _ in (run.dir / "media" / ERRORS).open(encoding="utf-8"))
    run.say(f"{len(train)} files to train on, {len(held_out)} held out, {errors} left out (media/{ERRORS})")
    content = {"train": train.fingerprint, "held_out": held_out.fingerprint}
    done = run.dir / "report.json"
    if done.exists():
        report: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        if report["content"] != content:
            raise ManifestError(f"{done}: is of other media; choose another --run_dir")
        run.say("done before")
        return report
    if config.teacher.source and not config.start:
        tokenizer = _taught(config, train, run)
    crop = config.media.side if train.is_image else None
    options = {**vars(config.train), "seed": config.seed, "crop": crop, "crop_seconds": config.media.crop_seconds}
    folder = run.dir / "training"
    fit_tokenizer(tokenizer, train, held_out=held_out, run_dir=folder, augment=config.augment, **options)
    if getattr(rank_zero_only, "rank", 0):
        return None
    tokenizer.save_pretrained(run.dir / "tokenizer")
    validation = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    crop = crop or crop_of(tokenizer, config.media.crop_seconds)
    seen = held_out_batches(StepBatches(train, batch_size=config.train.batch_size, crop=crop), COUNTED)
    metrics, _ = validate(tokenizer, loss_for(tokenizer, config.train.loss), seen, config.train.from_codes)
    report = {
        "held_out": validation["last"],
        "best": validation["best"],
        "train": metrics,
        "files": {"train": len(train), "held_out": len(held_out), "left_out": errors},
        "content": content,
    }
    with atomic_write(done) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    run.say(f"held out: {', '.join(f'{name} {value:.4g}' for name, value in report['held_out'].items())}")
    return report


def _build(config: TokenizerRecipe, **more: Any) -> Tokenizer:
    if config.start:
        return load(config.start)
    return build_tokenizer(config.tokenizer, {"seed": config.seed, **config.model, **more})


def _read(
    config: TokenizerRecipe, tokenizer: Tokenizer, folders: list[str], cache: Path
) -> tuple[FolderMedia, FolderMedia]:
    media, spec = config.media, tokenizer.spec
    if spec.sample_rate is None:
        return image_folder(folders, cache, config.split, side=media.keep_side, workers=media.workers)
    return audio_folder(
        folders,
        cache,
        config.split,
        sample_rate=spec.sample_rate,
        channels=spec.channels,
        max_seconds=media.max_seconds,
        workers=media.workers,
    )


def _taught(config: TokenizerRecipe, train: FolderMedia, run: Run) -> Tokenizer:
    """The tokenizer, built to predict the teacher's features with its first codebook."""
    from anyglot_tokenizers.audio import AudioCodec
    from anyglot_tokenizers.semantic import Distillation, load_teacher, train_teacher

    how, codec = config.teacher, _build(config)
    if not isinstance(codec, AudioCodec):
        raise ManifestError(f"teacher: {config.tokenizer} learns from no teacher; leave teacher.source empty")
    source = run.dir / "teacher" if how.source == "own" else how.source
    if how.source == "own" and not (Path(source) / "config.json").is_file():
        run.say("training the teacher")
        rate = codec.sample_rate
        device = "cuda" if torch.cuda.is_available() else "cpu"
        made = train_teacher(train, sample_rate=rate, steps=how.steps, seed=config.seed, device=device)
        made.save_pretrained(source)
    teacher = load_teacher(source)
    codec = _build(config, semantic_dim=teacher.dim)
    assert isinstance(codec, AudioCodec)
    codec.learn_from(Distillation(teacher, weight=how.weight, axis=how.axis))
    return codec
