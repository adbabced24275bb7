"""Sections of the benchmark that make media anew: speech in other voices and its word errors, and spoiled inputs.

Word errors here are of what is said about a scene: a description, written or heard, is first put into the words and the
order of the plainest spoken one, so that only what it says counts. Rates of several clips are all errors over all
words. Spoiled inputs are made from the records behind the held-out items, so that rows can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage

from anyglot_recipes.chain import encode_audio, encode_images
from anyglot_recipes.evaluate import Graded, Recogniser, chance, row_of, shares
from anyglot_recipes.nano import ASSISTANT_VOICE, NEVER_HEARD, guest_voices, world_seed
from anyglot_recipes.spoil import detuned
from anyglot_recipes.tasks import Item
from anyglot_synth.augment import augment
from anyglot_synth.nanoworld.draw import BACKGROUND, draw
from anyglot_synth.nanoworld.judge import SpeechJudge
from anyglot_synth.nanoworld.language import content_words, describe, parse
from anyglot_synth.nanoworld.records import Record, generate, stream_of
from anyglot_synth.nanoworld.scene import score
from anyglot_synth.nanoworld.sphinx import SphinxJudge
from anyglot_synth.nanoworld.voices import SAMPLE_RATE, VOICES, SpeechCache, default_cache_dir
from anyglot_synth.scoring import word_errors
from anyglot_tokenizers.errors import AnyglotError

if TYPE_CHECKING:
    from anyglot_recipes.benchmark import Bench

Row = dict[str, Any]
Way = Callable[[Record, np.random.Generator], np.ndarray]

# --- speech ---


def spoken_form(text: str) -> str:
    """A description in the words of the plainest spoken one; of other texts the words that say something."""
    scene = parse(text)
    return " ".join(content_words(text if scene is None else describe(scene, None, "spoken")))


def error_row(task: str, condition: str, said: Sequence[str], heard: Sequence[str], **more: Any) -> Row:
    """A row of word errors, where less is better: the score is the rate, and `weights` are the words of each item."""
    errors = [word_errors(spoken_form(a), spoken_form(b)) for a, b in zip(said, heard, strict=True)]
    more.update(section="speech", condition=condition, measure="word errors", weights=[e.total for e in errors])
    return row_of(task, [e.rate for e in errors], **more)


def speech(bench: Bench) -> list[Row]:
    """Word errors of `speech->text` by voice, and of judges on generated and on real speech."""
    rows = [*_by_voice(bench), *_by_judge(bench)]
    for row in rows:
        shown = row.get("skipped") or f"{row['score']:.3f} word errors"
        bench.progress(f"speech: {row['task']}, {row['condition']}: {shown}")
    return rows


def _by_voice(bench: Bench) -> list[Row]:
    """A quarter of the scenes, the same for every voice. What was heard in training is as the recipe `nano` has it."""
    items = bench.items[: max(1, len(bench.items) // 4)]
    cache, judge = SpeechCache(default_cache_dir()), SpeechJudge.load()
    rng = np.random.default_rng([bench.seed, 87])
    texts = [describe(item.scene, rng, "spoken") for item in items]
    guests = guest_voices()
    others = (*guests, NEVER_HEARD) if guests else ()
    rows: list[Row] = []
    for voice in (*VOICES, *others):
        clips = [cache.say(text, voice) for text in texts]
        codes = encode_audio(bench.model.tokenizers["speech"], clips)
        asked = [replace(item, codes={**item.codes, "speech": c}) for item, c in zip(items, codes, strict=True)]
        graded = bench.ask(asked, "speech->text")
        judged = error_row("", "", texts, judge.transcribe(clips))
        more = {
            "ceiling": judged["score"],
            **shares(graded),
            "accuracy": float(np.mean([g.score for g in graded])),
        }
        kind = "of training" if voice in VOICES else "never heard" if voice == NEVER_HEARD else "guest of training"
        rows.append(
            error_row("speech->text", f"voice {voice.name}, {kind}", texts, [g.heard[0] for g in graded], **more)
        )
    if not others:
        why = "no other engine can speak here; install one: pip install espeakng-loader, or apt-get install espeak-ng"
        rows.append({"section": "speech", "task": "speech->text", "condition": "voices never heard", "skipped": why})
    return rows


def _by_judge(bench: Bench) -> list[Row]:
    """What two recognisers hear in the model's speech, in real speech, and in real speech through the tokenizer."""
    cache, tokenizer = SpeechCache(default_cache_dir()), bench.model.tokenizers["speech"]
    texts = [describe(item.scene, None, "spoken") for item in bench.items]
    real = [cache.say(text, ASSISTANT_VOICE) for text in texts]
    kept = bench.model.vocabulary.block("speech").num_quantizers
    through = bench.model.decode_media("speech", [codes[:kept] for codes in encode_audio(tokenizer, real)])
    sources: dict[str, Sequence[Any]] = {
        "real": real,
        "real, through the tokenizer": through,
        "generated": _spoken(bench.graded("text->speech")),
    }
    if chosen := bench.chosen.get("text->speech"):
        sources[f"generated, {bench.best}"] = _spoken(chosen)
    rows: list[Row] = []
    for name, load in (("own judge", SpeechJudge.load), ("pocketsphinx", SphinxJudge)):
        try:
            judge: Recogniser = load()
        except AnyglotError as error:
            rows.append({"section": "speech", "task": "text->speech", "condition": name, "skipped": str(error)})
            continue
        for source, media in sources.items():
            audio = [np.zeros(0, np.float32) if m is None else np.asarray(m, np.float32).reshape(-1) for m in media]
            full = [i for i, clip in enumerate(audio) if len(clip)]
            found = dict(zip(full, judge.transcribe([audio[i] for i in full]), strict=True))
            heard = [found.get(i, "") for i in range(len(audio))]
            more = {"missing": 1 - len(full) / len(audio)} if source.startswith("generated") else {}
            rows.append(error_row("text->speech", f"{source}, heard by {name}", texts, heard, **more))
    return rows


def _spoken(graded: Sequence[Graded]) -> list[Any]:
    return [next((o.content for o in g.outputs if o.modality == "speech"), None) for g in graded]


# --- robustness ---


def _drawn(record: Record, **how: Any) -> np.ndarray:
    """The record's own picture, float64 [64, 64, 3] in 0..255, drawn otherwise."""
    rng = stream_of(record.split, record.seed, record.index, "image")
    return draw(record.scene, rng, **how).astype(np.float64)


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _noisy(audio: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    return augment(audio, SAMPLE_RATE, {"noise": {"kind": "white", "snr_db": snr_db}}, rng)


WAYS: dict[str, dict[str, Way]] = {
    "image": {
        "lighter background": lambda record, rng: _pixels(
            _drawn(record, background=tuple(value + 24 for value in BACKGROUND))
        ),
        "colors jittered by 15 %": lambda record, rng: _pixels(_drawn(record) * rng.uniform(0.85, 1.15, 3)),
        "noise of 12/255": lambda record, rng: _pixels(_drawn(record) + rng.normal(0, 12, (64, 64, 3))),
        "blur of 0.8 pixels": lambda record, rng: _pixels(ndimage.gaussian_filter(_drawn(record), (0.8, 0.8, 0))),
        "half a pixel aside": lambda record, rng: _pixels(_drawn(record, offset=(0.5, 0.5))),
    },
    "speech": {
        "noise, 20 dB SNR": lambda record, rng: _noisy(record.speech, 20, rng),
        "noise, 10 dB SNR": lambda record, rng: _noisy(record.speech, 10, rng),
        "12 dB softer": lambda record, rng: record.speech * np.float32(10 ** (-12 / 20)),
    },
    "music": {
        "noise, 20 dB SNR": lambda record, rng: _noisy(record.music, 20, rng),
        "noise, 10 dB SNR": lambda record, rng: _noisy(record.music, 10, rng),
        "30 cents sharp": lambda record, rng: detuned(record.music, 30),
    },
}
"""Modality -> how its input is spoiled -> the spoiled medium of a record."""


def robustness(bench: Bench) -> list[Row]:
    """Each modality into text, clean and spoiled. `ceiling` is what a program reads in the spoiled input itself."""
    seed = world_seed(bench.seed, "test")
    records = list(generate("test", len(bench.items), seed))
    luck = chance(bench.items, "image->text")
    rows: list[Row] = []
    for number, (modality, ways) in enumerate(WAYS.items()):
        task = f"{modality}->text"
        clean = bench.graded(task)
        more: Row = {"chance": luck, "ceiling": _readable(bench, modality, [getattr(r, modality) for r in records])}
        rows.append(bench.row("robustness", f"{modality}: clean", clean, show=False, **more))
        for way, spoil in ways.items():
            media = [spoil(r, np.random.default_rng([seed, 89, number, r.index])) for r in records]
            graded = bench.ask(_given(bench, modality, media), task)
            more["ceiling"] = _readable(bench, modality, media)
            rows.append(bench.row("robustness", f"{modality}: {way}", graded, clean, against="clean", **more))
    return rows


def _given(bench: Bench, modality: str, media: list[np.ndarray]) -> list[Item]:
    tokenizer = bench.model.tokenizers[modality]
    codes = encode_images(tokenizer, np.stack(media)) if modality == "image" else encode_audio(tokenizer, media)
    return [
        replace(item, codes={**item.codes, modality: c}, seen={}) for item, c in zip(bench.items, codes, strict=True)
    ]


def _readable(bench: Bench, modality: str, media: list[np.ndarray]) -> float:
    """Mean score of the checker on the media themselves."""
    shown: list[Any] = [torch.from_numpy(m) for m in media]
    if modality == "image":
        shown = [m.permute(2, 0, 1).float() / 255 for m in shown]
    read = bench.checkers.read(modality, shown)
    return float(np.mean([score(item.scene, scene) for item, (_, scene) in zip(bench.items, read, strict=True)]))
