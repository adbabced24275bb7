"""The `nano_denoise` recipe: the encoders of a nanoworld model learn to give spoiled media the codes of clean ones.

model -> each of its three tokenizers, trained on (`anyglot_tokenizers.denoise`) with training scenes and what
`spoil.py` does to them -> the model with these tokenizers. Its language model stays as it is: clean media keeps its
codes but for a few, so that it goes on working, and `nano_more --start` acquaints it with those few.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyglot_lm.files import read_json
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import spoil
from anyglot_recipes.chain import Run, seed_of
from anyglot_recipes.nano import IMAGE_SIZE, another_speed, descriptions
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.records import generate
from anyglot_synth.nanoworld.scene import Split, sample_scene
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers import load
from anyglot_tokenizers.denoise import Aim, Pair, agreement, fit_denoising
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.tokenizer import Tokenizer
from anyglot_tokenizers.train import crop_of

SHIPPED = Path(__file__).parent / "weights" / "nano"
MODALITIES = ("image", "speech", "music")
CLEAN = 0.25
"""Share of a batch that is not spoiled, so that clean media keeps its codes."""
HELD_OUT = 256
"""Items of held-out scenes on which codes are compared."""


@dataclass
class DenoiseConfig:
    """How one encoder is trained on.

    Args:
        aim: "latents" or "codes", see `anyglot_tokenizers.denoise`.
        num: recordings made for it; pictures are drawn anew for each step.
        max_steps: optimizer steps; 0 leaves the tokenizer as it is.
        batch_size: items per step.
        lr: peak learning rate.
        crop_seconds: audio only, length of training crops.
    """

    aim: Aim = "latents"
    num: int = 2500
    max_steps: int = 1000
    batch_size: int = 24
    lr: float = 4e-3
    crop_seconds: float = 1.6


@dataclass
class NanoDenoiseConfig:
    """The nano_denoise recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        model: folder of a model of nanoworld, default the shipped one.
        varied: share of recordings whose speed and pitch are changed.
        guests: share of descriptions that voices of another engine speak, where there is one.
        workers: processes that make media.
        image: its tokenizer.
        speech: its codec.
        music: its codec.
    """

    run_dir: str = "runs/nano_denoise"
    seed: int = 0
    model: str = str(SHIPPED)
    varied: float = 0.5
    guests: float = 0.4
    workers: int = 2
    image: DenoiseConfig = field(default_factory=DenoiseConfig)
    speech: DenoiseConfig = field(default_factory=DenoiseConfig)
    music: DenoiseConfig = field(default_factory=DenoiseConfig)


def nano_denoise(config: NanoDenoiseConfig) -> dict[str, Any]:
    """Train the encoders on; the model is `run_dir/model`.

    Returns:
        By modality, of held-out scenes the shares of codes of each quantizer that are those which the model's own
        tokenizer gives to the clean media: "spoiled before", "spoiled", "clean".

    Raises:
        ManifestError: settings that cannot work, or a model that is no folder of its own, such as an adapter.
    """
    stored = read_json(Path(config.model) / "config.json").get("dtype", "float32")
    start = UnifiedModel.from_pretrained(config.model, dtype=getattr(torch, stored))
    steps = {name: getattr(config, name).max_steps for name in start.tokenizers if name in MODALITIES}
    if len(steps) < len(MODALITIES) or min(steps.values()) < 0 or not any(steps.values()):
        raise ManifestError(
            f"nano_denoise: {config.model} must have tokenizers of {', '.join(MODALITIES)}, and one at least max_steps "
            f"above 0, none below: {steps}"
        )
    run = Run(config.run_dir, {k: v for k, v in vars(config).items() if k != "run_dir"})
    trained = {name: _trained(run, config, name, start.tokenizers[name]) for name, count in steps.items() if count}
    report = {}
    for name, tokenizer in trained.items():
        pair = media(config, name, "test", HELD_OUT)(0, HELD_OUT, None, 0.0)
        clean, spoiled = agreement(tokenizer, start.tokenizers[name], pair)
        _, before = agreement(start.tokenizers[name], start.tokenizers[name], pair)
        report[name] = {"spoiled before": before, "spoiled": spoiled, "clean": clean}
        run.say(f"{name}: {report[name]}")

    def make(folder: Path) -> None:
        vocabulary = start.vocabulary.for_tokenizers({name: t.fingerprint for name, t in trained.items()})
        tokenizers = {**start.tokenizers, **trained}
        UnifiedModel(start.model, vocabulary, start.template, start.text, tokenizers).save_pretrained(folder)

    run.once("model", make)
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _trained(run: Run, config: NanoDenoiseConfig, name: str, start: Tokenizer) -> Tokenizer:
    how: DenoiseConfig = getattr(config, name)

    def make(folder: Path) -> None:
        pairs = media(config, name, "train", how.num)
        crop = crop_of(start, how.crop_seconds) if start.spec.sample_rate else None
        trained = fit_denoising(
            copy.deepcopy(start),
            lambda step: pairs(step, how.batch_size, crop, CLEAN),
            run_dir=run.dir / "training" / name,
            aim=how.aim,
            max_steps=how.max_steps,
            lr=how.lr,
        )
        trained.save_pretrained(folder, dtype=torch.float16)

    return load(run.once(f"tokenizers/{name}", make))


Pairs = Callable[[int, int, int | None, float], Pair]
"""(step, items, samples of a crop or None for whole recordings, share that is not spoiled) to what a step sees."""


def media(config: NanoDenoiseConfig, name: str, split: Split, num: int) -> Pairs:
    """Pictures, or crops of `num` descriptions or melodies, of scenes of a split."""
    seed = seed_of(config.seed, "denoise", name, split) % 2**31
    if name == "image":
        return partial(_pictures, seed, split)
    records = list(generate(split, num, seed, workers=config.workers, parts=[name]))
    rng = np.random.default_rng([seed, 96])
    if name == "music":
        return partial(_sounds, seed, [record.music for record in records], True)
    cache = SpeechCache(default_cache_dir(), config.workers)
    spoken = descriptions(records, cache, config.guests, rng)
    return partial(_sounds, seed, [another_speed(audio, rng, config.varied) for audio in spoken], False)


def _pictures(seed: int, split: Split, step: int, count: int, _: int | None, kept: float) -> Pair:
    rng = np.random.default_rng([seed, step])
    pictures: list[tuple[np.ndarray, np.ndarray]] = []
    for places in rng.integers(2**31, size=count):
        scene = sample_scene(rng, split)
        clean = draw(scene, np.random.default_rng(places), IMAGE_SIZE)
        spoiled = clean if rng.random() < kept else spoil.picture(scene, rng, np.random.default_rng(places))
        pictures.append((clean, spoiled))
    both = torch.from_numpy(np.stack([np.stack(pair) for pair in zip(*pictures, strict=True)]))
    clean_BCHW, spoiled_BCHW = both.permute(0, 1, 4, 2, 3).float() / 255
    return Pair(clean_BCHW, spoiled_BCHW)


def _sounds(
    seed: int, recordings: list[np.ndarray], tuned: bool, step: int, count: int, crop: int | None, kept: float
) -> Pair:
    """`tuned`: crops may also be out of tune. Whole recordings would end elsewhere, and their codes not lie beside."""
    rng = np.random.default_rng([seed, step])
    chosen = [recordings[i] for i in rng.integers(len(recordings), size=count)]
    size = crop or max(map(len, chosen))
    both_2BCS, lengths = torch.zeros(2, count, 1, size), []
    for row, clean in enumerate(chosen):
        length = min(len(clean), size)
        begin = int(rng.integers(len(clean) - length + 1))
        part = spoiled = clean[begin : begin + length]
        if rng.random() >= kept:
            noisy = spoil.sound(clean, rng)  # all of it: silence has noise, too
            cents = rng.uniform(-spoil.CENTS, spoil.CENTS) if tuned and crop and rng.random() < 0.5 else 0.0
            spoiled = spoil.detuned_part(noisy, begin, length, cents)
        lengths.append(length)
        both_2BCS[0, row, 0, :length], both_2BCS[1, row, 0, :length] = map(torch.from_numpy, (part, spoiled))
    return Pair(both_2BCS[0], both_2BCS[1], torch.tensor(lengths))
