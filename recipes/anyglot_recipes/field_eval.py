"""Grades the `field` model on a speaker and on pictures never seen in training.

Words are compared exactly. Photos that the model makes are read by a small classifier trained on training photos only
(its own accuracy on held-out photos is in the table as the row's ceiling, after the tokenizer); spoken digits by
pocketsphinx with a grammar of ten words, a judge that knows nothing of this project. Emoji and captions are graded by
retrieval among ten held-out emoji. `field.py` trains; this file only measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import encode_audio, encode_images
from anyglot_recipes.field import WORDS, FieldData, Picture, draw_emoji, say, vary_picture

GREEDY = dict.fromkeys(("text", "image", "speech"), Sampling(temperature=0.0))
TEN = 10


def evaluate_field(model: UnifiedModel, data: FieldData, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The report of the field trial: one row per task with n, score, chance and ceiling."""
    started = time.perf_counter()
    rows = [
        _speech_to_word(model, data),
        _photo_to_word(model, data),
        _speech_to_photo(model, data, seed),
        _word_to_speech(model, data, seed),
        *_emoji(model, data, seed),
    ]
    for row in rows:
        say(
            f"{row['task']:24s} n {row['n']:4d}  score {row['score']:.3f}  "
            f"chance {row['chance']:.2f}  ceiling {row['ceiling']}"
        )
    return {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}


def _row(task: str, right: Sequence[float], chance: float, ceiling: float | None, how: str) -> dict[str, Any]:
    return {
        "task": task,
        "n": len(right),
        "score": round(float(np.mean(right)), 4),
        "chance": chance,
        "ceiling": None if ceiling is None else round(ceiling, 4),
        "how": how,
    }


def _answers(model: UnifiedModel, given: list[Segment], to: str) -> list[Any]:
    request = Request(order=(to,), max_ids=256)
    outputs = model.respond([Sample([g]) for g in given], [request] * len(given), sampling=GREEDY, seed=0)
    return [out[0].content for out in outputs]


def _heard(model: UnifiedModel, data: FieldData) -> list[Segment]:
    codes = encode_audio(model.tokenizers["speech"], [c.audio for c in data.test_clips], 64)
    return [Segment("speech", k, "user") for k in codes]


def _speech_to_word(model: UnifiedModel, data: FieldData) -> dict[str, Any]:
    words = _answers(model, _heard(model, data), "text")
    right = [float(w == WORDS[c.digit]) for w, c in zip(words, data.test_clips, strict=True)]
    return _row("speech->word", right, 0.1, None, "exact word, every clip of the held-out speaker")


def _photo_to_word(model: UnifiedModel, data: FieldData) -> dict[str, Any]:
    photos = [p for p in data.test_pictures if p.kind == "sign"]
    codes = encode_images(model.tokenizers["image"], np.stack([p.pixels for p in photos]))
    words = _answers(model, [Segment("image", k, "user") for k in codes], "text")
    right = [float(w == p.word) for w, p in zip(words, photos, strict=True)]
    return _row("photo->word", right, 0.1, None, "exact word, held-out photos")


def _speech_to_photo(model: UnifiedModel, data: FieldData, seed: int) -> dict[str, Any]:
    classify = train_photo_classifier([p for p in data.pictures if p.kind == "sign"], seed)
    photos = [p for p in data.test_pictures if p.kind == "sign"]
    pixels = np.stack([p.pixels for p in photos])
    tokenizer = model.tokenizers["image"]
    codes = torch.from_numpy(np.stack(encode_images(tokenizer, pixels)))[
        :, : model.vocabulary.block("image").num_quantizers
    ]
    read = classify(tokenizer.decode(codes))
    ceiling = float(np.mean([r == WORDS.index(p.word) for r, p in zip(read, photos, strict=True)]))
    every = list(range(0, len(data.test_clips), 2))
    heard = _heard(model, data)
    drawn = torch.stack(_answers(model, [heard[i] for i in every], "image"))
    right = [float(r == data.test_clips[i].digit) for r, i in zip(classify(drawn), every, strict=True)]
    how = "a classifier of training photos reads the drawn sign; ceiling: held-out photos through the tokenizer"
    return _row("speech->photo", right, 0.1, ceiling, how)


def _word_to_speech(model: UnifiedModel, data: FieldData, seed: int) -> dict[str, Any]:
    clips = data.test_clips[::5]
    tokenizer = model.tokenizers["speech"]
    used = model.vocabulary.block("speech").num_quantizers
    codes = encode_audio(tokenizer, [c.audio for c in clips], 64)
    rebuilt = model.decode_media("speech", [k[:used] for k in codes])
    listen = sphinx_digits()
    ceiling = float(np.mean([listen(a) == c.digit for a, c in zip(rebuilt, clips, strict=True)]))
    digits = list(range(10)) * 10
    request = Request(order=("speech",), max_ids=256)
    spoken = model.respond(
        [Sample([say(WORDS[d])]) for d in digits],
        [request] * len(digits),
        sampling={"speech": Sampling(temperature=0.7), "text": Sampling(temperature=0.0)},
        seed=seed,
    )
    right = [float(listen(out[0].media) == d) for out, d in zip(spoken, digits, strict=True)]
    how = (
        "pocketsphinx with ten words, ten takes a digit; ceiling: real clips of the held-out speaker through the codec"
    )
    return _row("word->speech", right, 0.1, ceiling, how)


def _emoji(model: UnifiedModel, data: FieldData, seed: int) -> list[dict[str, Any]]:
    emoji = [p for p in data.test_pictures if p.kind == "emoji"]
    rng = np.random.default_rng([seed, 9])
    others = [
        [i, *rng.choice([j for j in range(len(emoji)) if j != i], TEN - 1, replace=False)] for i in range(len(emoji))
    ]
    truth = torch.stack([torch.from_numpy(p.pixels).permute(2, 0, 1).float() / 255 for p in emoji])
    drawn = torch.stack(_answers(model, [draw_emoji(p.word) for p in emoji], "image"))
    looks, wanted = _look(drawn), _look(truth)
    rebuilt = _look(model.tokenizers["image"].decode(torch.from_numpy(_codes(model, emoji))))

    def nearest(looks_ND: Tensor) -> list[float]:
        return [float(int((looks_ND[i] - wanted[o]).norm(dim=1).argmin()) == 0) for i, o in enumerate(others)]

    how = "nearest of ten held-out emoji in 8x8 colors; ceiling: the emoji itself through the tokenizer"
    rows = [_row("caption->emoji", nearest(looks), 0.1, float(np.mean(nearest(rebuilt))), how)]
    seen = [Segment("image", k, "user") for k in _codes(model, emoji)]
    captions = _answers(model, seen, "text")
    right = []
    for i, choices in enumerate(others):
        overlap = [_overlap(captions[i], emoji[j].word) for j in choices]
        best = max(overlap)
        right.append(float(overlap[0] == best) / overlap.count(best))
    rows.append(
        _row(
            "emoji->caption",
            right,
            0.1,
            None,
            "caption sharing most words among ten held-out ones, ties shared",
        )
    )
    exact = [float(c == p.word) for c, p in zip(captions, emoji, strict=True)]
    rows.append(_row("emoji->caption (exact)", exact, 0.0, None, "the very caption"))
    return rows


def _codes(model: UnifiedModel, pictures: Sequence[Picture]) -> np.ndarray:
    codes = encode_images(model.tokenizers["image"], np.stack([p.pixels for p in pictures]))
    return np.stack(codes)[:, : model.vocabulary.block("image").num_quantizers]


def _look(images_NCHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images_NCHW, 8).flatten(1)


def _overlap(a: str, b: str) -> float:
    left, right = set(a.split()), set(b.split())
    return len(left & right) / len(left | right) if left | right else 0.0


def train_photo_classifier(photos: Sequence[Picture], seed: int, steps: int = 400) -> Callable[[Tensor], list[int]]:
    """A small convolutional classifier of signed digits, trained on `photos` with augmentation.

    Returns:
        A function from images float32 [N, 3, 64, 64] in [0, 1] to digits.
    """
    rng = np.random.default_rng([seed, 11])
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
            ]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 10))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(steps):
            chosen = [photos[i] for i in rng.integers(len(photos), size=64)]
            x = torch.from_numpy(np.stack([vary_picture(p, rng) for p in chosen])).permute(0, 3, 1, 2).float() / 255
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) if rng.random() < 0.5 else x
            target = torch.tensor([WORDS.index(p.word) for p in chosen])
            loss = F.cross_entropy(network(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()

    @torch.inference_mode()
    def classify(images: Tensor) -> list[int]:
        digits: list[int] = network(images).argmax(1).tolist()
        return digits

    return classify


def sphinx_digits() -> Callable[[Any], int | None]:
    """A function from mono audio at 16 kHz to the digit pocketsphinx hears in it, or None."""
    from pocketsphinx import Decoder

    decoder = Decoder(lm=None, samprate=16000, loglevel="FATAL")
    decoder.add_jsgf_string("digits", f"#JSGF V1.0; grammar digits; public <digit> = {' | '.join(WORDS)};")
    decoder.activate_search("digits")

    def listen(audio: Any) -> int | None:
        samples = np.asarray(audio, dtype=np.float32).reshape(-1)
        quiet = np.zeros(3200, np.float32)
        pcm = (np.concatenate([quiet, samples, quiet]).clip(-1, 1) * 32767).astype("<i2").tobytes()
        decoder.start_utt()
        decoder.process_raw(pcm, full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return WORDS.index(hypothesis.hypstr) if hypothesis and hypothesis.hypstr in WORDS else None

    return listen


def markdown(report: dict[str, Any], speaker: str) -> str:
    """The table of a report."""
    lines = [
        "# Field trial: human speech, photos and emoji",
        "",
        "Made by `anyglot train field --data.root ../shared/data/real --table docs/field.md`, unedited.",
        f"The speaker `{speaker}` and a tenth of the photos and emoji (by a hash of the picture) were never seen in",
        "training, neither by the tokenizers nor by the language model nor by the graders. The same hands may occur on",
        "both sides.",
        "",
        "| task | n | score | chance | ceiling | how |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ceiling = "" if row["ceiling"] is None else f"{row['ceiling']:.2f}"
        lines.append(
            f"| {row['task']} | {row['n']} | {row['score']:.2f} | {row['chance']:.2f} | {ceiling} | {row['how']} |"
        )
    return "\n".join([*lines, ""])
