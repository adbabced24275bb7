"""The `nano_denoise` recipe: the encoders of a nanoworld model learn to give spoiled media the codes of clean media,
and the decoders of its codecs to make sound of those codes alone that the language model writes.

model -> each of its three tokenizers, trained on (`anyglot_tokenizers.denoise`) with training scenes and what
`spoil.py` does to them -> decoders (`fit_tokenizer`, `from_codes`) -> the model with these tokenizers. Its language
model stays as it is: clean media keeps its codes but for some, so that it goes on working, and `nano_more --start`
acquaints it with those. Every stage continues where it was killed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import spoil
from anyglot_recipes.chain import Run, seed_of
from anyglot_recipes.nano import ASSISTANT_VOICE, IMAGE_SIZE, another_speed, descriptions
from anyglot_recipes.reading import reading_strings
from anyglot_recipes.shipped import NANO
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe, question
from anyglot_synth.nanoworld.records import generate
from anyglot_synth.nanoworld.scene import Split, sample_scene
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers import Codes, load
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from anyglot_tokenizers.batches import Batch

MODALITIES = ("image", "speech", "music")
CLEAN = 0.25
"""Share of a training batch that is not spoiled, so that clean media keeps its codes."""
COMPARED = 256
"""Recordings of held-out scenes on which codes are compared, and about as many pictures and crops."""


@dataclass
class DenoiseConfig:
    """How one encoder is trained on.

    Args:
        aim: "latents" or "codes", see `anyglot_tokenizers.denoise`.
        max_steps: optimizer steps; 0 leaves the tokenizer as it is.
        batch_size: items per step; pictures are drawn anew for each.
        lr: peak learning rate.
    """

    aim: str = "codes"
    max_steps: int = 1500
    batch_size: int = 32
    lr: float = 4e-3

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each part that is trained."""
        return (self.max_steps,)


@dataclass
class SoundDenoiseConfig(DenoiseConfig):
    """How the encoder of a codec is trained on.

    Args:
        aim: as of pictures.
        max_steps: as of pictures.
        batch_size: crops per step.
        lr: as of pictures.
        num: recordings made for it.
        crop_seconds: length of a crop.
        decoder_steps: optimizer steps of the decoder afterwards, on as many recordings again (half of those of speech
            in the voice and of the kinds that the model answers with); 0 leaves it as it is.
        decoder_lr: its peak learning rate.
    """

    aim: str = "latents"
    batch_size: int = 24
    num: int = 2500
    crop_seconds: float = 1.6
    decoder_steps: int = 0
    decoder_lr: float = 1e-3

    @property
    def steps(self) -> tuple[int, ...]:
        """Of encoder and decoder."""
        return self.max_steps, self.decoder_steps


@dataclass
class NanoDenoiseConfig:
    """The nano_denoise recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        model: folder of a model of nanoworld, default the shipped one.
        varied: share of recordings of speech whose speed and pitch are changed.
        guests: share of descriptions that voices of another engine speak, where there is one.
        workers: processes that make media.
        image: its tokenizer.
        speech: its codec.
        music: its codec.
    """

    run_dir: str = "runs/nano_denoise"
    seed: int = 0
    model: str = str(NANO)
    varied: float = 0.5
    guests: float = 0.4
    workers: int = 2
    image: DenoiseConfig = field(default_factory=DenoiseConfig)
    speech: SoundDenoiseConfig = field(default_factory=SoundDenoiseConfig)
    music: SoundDenoiseConfig = field(default_factory=SoundDenoiseConfig)

    def check(self) -> None:
        """Raises `ManifestError`: a share that is none, or a schedule that cannot be."""
        if not 0 <= self.varied <= 1 or not 0 <= self.guests <= 1:
            raise ManifestError(f"varied {self.varied} and guests {self.guests} must lie in 0..1")
        steps = [count for name in MODALITIES for count in getattr(self, name).steps]
        if min(steps) < 0 or not any(steps):
            raise ManifestError(f"max_steps and decoder_steps {steps}: none below 0, and one above")
        for name in MODALITIES:
            how = getattr(self, name)
            free = ("aim", "max_steps", "decoder_steps")
            wrong = [key for key, value in vars(how).items() if key not in free and value <= 0]
            if wrong or how.aim not in ("latents", "codes"):
                said = ", ".join(f"{name}.{key} {getattr(how, key)}" for key in [*wrong, "aim"])
                raise ManifestError(f"{said}: numbers must be positive, an aim latents or codes")


def nano_denoise(config: NanoDenoiseConfig) -> dict[str, Any]:
    """Train encoders and decoders on; the model is `run_dir/model`.

    Returns:
        By modality, of held-out scenes the shares of codes of each quantizer that are those which the model's own
        tokenizer gives to the clean media: "spoiled before", "spoiled", "clean". Where a decoder was trained, also what
        `SpectralLoss` sees when the old decoder, and the new, make recordings of held-out scenes of the codes of the
        new encoder that the model writes: "decoder before", "decoder". (Answers of a word are no others than before.)

    Raises:
        ManifestError: settings that cannot work, or a model that is no folder of its own, such as an adapter.
    """
    from anyglot_lm.backbone import stored_dtype

    config.check()
    source = Path(config.model)
    start = UnifiedModel.from_pretrained(source, dtype=stored_dtype(source))
    if missing := [name for name in MODALITIES if name not in start.tokenizers]:
        raise ManifestError(f"{source} has no tokenizer of {', '.join(missing)}; give a model of nanoworld")
    weights = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    settings = {k: v for k, v in vars(config).items() if k != "run_dir"}
    run = Run(config.run_dir, settings | {"model": [weights, *(t.fingerprint for t in start.tokenizers.values())]})
    trained = {
        name: _trained(run, config, name, start.tokenizers[name], start.vocabulary.block(name).num_quantizers)
        for name in MODALITIES
        if any(getattr(config, name).steps)
    }

    def make(folder: Path) -> None:
        vocabulary = start.vocabulary.with_fingerprints({name: t.fingerprint for name, t in trained.items()})
        tokenizers = {**start.tokenizers, **trained}
        UnifiedModel(start.model, vocabulary, start.template, start.text, tokenizers).save_pretrained(folder)

    run.once("model", make)
    report = {
        name: _compared(run, config, name, t, start.tokenizers[name], start.vocabulary.block(name).num_quantizers)
        for name, t in trained.items()
    }
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _trained(run: Run, config: NanoDenoiseConfig, name: str, start: Tokenizer, num_quantizers: int) -> Tokenizer:
    from anyglot_tokenizers.denoise import fit_denoising
    from anyglot_tokenizers.train import fit_tokenizer

    how = getattr(config, name)

    def make(folder: Path) -> None:
        trained = copy.deepcopy(start)
        if how.max_steps:
            fit_denoising(
                trained,
                batches_of(config, name, start, "train"),
                run_dir=run.dir / "training" / name,
                teacher=start,
                max_steps=how.max_steps,
                aim=how.aim,
                lr=how.lr,
            )
        if getattr(how, "decoder_steps", 0):
            fit_tokenizer(
                trained,
                written(config, name, "train"),
                held_out=written(config, name, "test"),
                run_dir=run.dir / "training" / f"{name}_decoder",
                max_steps=how.decoder_steps,
                batch_size=how.batch_size,
                lr=how.decoder_lr,
                seed=config.seed,
                crop_seconds=how.crop_seconds,
                from_codes=num_quantizers,
            )
        halves = all(torch.equal(p, p.half().to(p.dtype)) for p in start.parameters())
        trained.save_pretrained(folder, dtype=torch.float16 if halves else None)  # codebooks are to stay as they are

    return load(run.once(f"tokenizers/{name}", make))


def _compared(
    run: Run, config: NanoDenoiseConfig, name: str, trained: Tokenizer, start: Tokenizer, num_quantizers: int
) -> dict[str, Any]:
    from anyglot_tokenizers.batches import StepBatches, held_out_batches
    from anyglot_tokenizers.denoise import agreement
    from anyglot_tokenizers.train import crop_of, loss_for

    how = getattr(config, name)

    def make(folder: Path) -> None:
        draw_batch = batches_of(config, name, start, "test", kept=0.0)
        batches = [draw_batch(step) for step in range(-(-COMPARED // how.batch_size))]
        before = agreement(start, start, batches)["spoiled"]
        report: dict[str, Any] = {"spoiled before": before, **agreement(trained, start, batches)}
        if getattr(how, "decoder_steps", 0):
            clips = StepBatches(
                written(config, name, "test"), batch_size=how.batch_size, crop=crop_of(start, how.crop_seconds)
            )
            loss = loss_for(trained, {}).to(trained.device)
            lost = {"decoder before": 0.0, "decoder": 0.0}
            for batch in held_out_batches(clips, clips.num_items):
                media = batch["media"].to(trained.device)
                codes = trained.encode(media, batch["lengths"], num_quantizers=num_quantizers)
                for key, tokenizer in zip(lost, (start, trained), strict=True):
                    made = tokenizer.to(trained.device).decode(Codes(codes.codes, codes.lengths))
                    lost[key] += float(loss(made, media)[0]) * len(media) / clips.num_items
            report |= {key: round(value, 4) for key, value in lost.items()}
        (folder / "report.json").write_text(json.dumps(report))
        run.say(f"{name}: {report}")

    found: dict[str, Any] = json.loads((run.once(f"compared/{name}", make) / "report.json").read_text())
    return found


def batches_of(
    config: NanoDenoiseConfig, name: str, tokenizer: Tokenizer, split: Split, kept: float = CLEAN
) -> Callable[[int], Batch]:
    """What a step sees of a modality, see `fit_denoising`: pictures, or crops of descriptions or melodies, of a split.

    `kept` is the share that is not spoiled. Recordings are made here, as many as are trained on or compared.
    """
    how = getattr(config, name)
    seed = seed_of(config.seed, "denoise", name, split) % 2**31
    if name == "image":
        return partial(_pictures, seed, split, how.batch_size, kept)
    from anyglot_tokenizers.train import crop_of

    num = how.num if split == "train" else min(how.num, COMPARED)
    crop = crop_of(tokenizer, how.crop_seconds)
    return partial(
        _crops, seed, _recordings(config, name, split, num, seed), how.batch_size, crop, kept, name == "music"
    )


def _recordings(config: NanoDenoiseConfig, name: str, split: Split, num: int, seed: int) -> list[np.ndarray]:
    """What users play, or say in voices of their own."""
    records = list(generate(split, num, seed, workers=config.workers, parts=[name]))
    if name == "music":
        return [record.music for record in records]
    rng = np.random.default_rng(seed_of(seed, "voices"))
    spoken = descriptions(records, SpeechCache(default_cache_dir(), config.workers), config.guests, rng)
    return [another_speed(audio, rng, config.varied) for audio in spoken]


def written(config: NanoDenoiseConfig, name: str, split: Split) -> list[np.ndarray]:
    """What a decoder is trained, or measured on: what users say or play, and half of speech what the model answers:
    descriptions, answers to questions, and words that it reads aloud.
    """
    how = getattr(config, name)
    num = how.num if split == "train" else min(how.num, COMPARED)
    seed = seed_of(config.seed, "decoder", name, split) % 2**31
    if name == "music":
        return _recordings(config, name, split, num, seed)
    rng = np.random.default_rng(seed_of(seed, "answers"))
    said = [describe(sample_scene(rng, split), rng, "spoken") for _ in range(num // 4)]
    said += [question(sample_scene(rng, split), rng)[1] for _ in range(num // 8)]
    said += reading_strings(num // 8, rng)
    cache = SpeechCache(default_cache_dir(), config.workers)
    cache.prefetch_said((text, ASSISTANT_VOICE) for text in said)
    answers = [cache.say(text, ASSISTANT_VOICE) for text in said]
    return _recordings(config, name, split, num - len(answers), seed) + answers


def _pictures(seed: int, split: Split, count: int, kept: float, step: int) -> Batch:
    rng = np.random.default_rng([seed, step])
    pictures: list[tuple[np.ndarray, np.ndarray]] = []
    for places in rng.integers(2**31, size=count):
        scene = sample_scene(rng, split)
        clean = draw(scene, np.random.default_rng(places), IMAGE_SIZE)
        spoiled = clean if rng.random() < kept else spoil.picture(scene, rng, np.random.default_rng(places))
        pictures.append((clean, spoiled))
    both = torch.from_numpy(np.stack([np.stack(pair) for pair in zip(*pictures, strict=True)]))
    clean_BCHW, spoiled_BCHW = both.permute(0, 1, 4, 2, 3).float() / 255
    return {"clean": clean_BCHW, "media": spoiled_BCHW}


def _crops(
    seed: int, recordings: list[np.ndarray], count: int, crop: int, kept: float, tuned: bool, step: int
) -> Batch:
    """`tuned`: half of the spoiled ones are out of tune as well."""
    rng = np.random.default_rng([seed, step])
    clean_BCS, spoiled_BCS, lengths = torch.zeros(count, 1, crop), torch.zeros(count, 1, crop), []
    for row, index in enumerate(rng.integers(len(recordings), size=count)):
        audio = recordings[index]
        length = min(len(audio), crop)
        begin = int(rng.integers(len(audio) - length + 1))
        clean = spoiled = audio[begin : begin + length]
        if rng.random() >= kept:
            noisy = spoil.sound(audio, rng)  # all of it: silence has noise, too
            cents = rng.uniform(-spoil.CENTS, spoil.CENTS) if tuned and rng.random() < 0.5 else 0.0
            spoiled = spoil.detuned_part(noisy, begin, length, cents)
        lengths.append(length)
        clean_BCS[row, 0, :length], spoiled_BCS[row, 0, :length] = torch.from_numpy(clean), torch.from_numpy(spoiled)
    return {"clean": clean_BCS, "media": spoiled_BCS, "lengths": torch.tensor(lengths)}
