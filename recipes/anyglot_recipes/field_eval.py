"""Grades the `field` model on a speaker, pictures and chorales never met in training, and writes the page.

Words are compared exactly. What the model draws and says is read by the judges of `field_graders.py`; captions are
ranked by likelihood among twenty, emoji that it draws by their colors among ten. Drawings and speech are graded as they
come, and where the model has drawn eight and taken the best by its own reading (`candidates.best_of`). Every row has
its chance, a 95 % interval and, where a judge or a tokenizer limits it, that limit. `field.py` trains; this file only
measures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_lm.candidates import best_of
from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.chain import encode_audio, encode_images
from anyglot_recipes.field import WORDS, FieldData, FieldDataConfig, Picture, draw_emoji, play_key, say
from anyglot_recipes.field_graders import (
    TEST_TAKES,
    interval,
    lowest_tone,
    sphinx_digits,
    train_digit_listener,
    train_key_listener,
    train_photo_classifier,
)
from anyglot_recipes.field_meaning import to_tensor
from anyglot_recipes.field_music import play

GREEDY = dict.fromkeys(("text", "image", "speech", "music"), Sampling(temperature=0.0))
DRAWN = {**GREEDY, "image": Sampling(temperature=0.6)}
SPOKEN = {**GREEDY, "speech": Sampling(temperature=0.5)}
PLAYED = {**GREEDY, "music": Sampling(temperature=0.5)}
NOTHING = Segment("text", "", "user")
"""The prompt of a document whose condition was dropped."""
TEN, TWENTY = 10, 20
CANDIDATES = 8
CHOSEN = f"{CANDIDATES} answers drawn, and the one taken that the model itself reads best as the word"
SHOWN = 4
"""Drawings a digit on the page."""


def evaluate_field(
    model: UnifiedModel, data: FieldData, config: FieldDataConfig, *, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], Tensor]:
    """The report of the field trial, one row per measure, and drawings `[10 * SHOWN, 3, 64, 64]` for the page."""
    started = time.perf_counter()
    heard, hear_fails = _hear(model, data)
    photos = _photo_to_word(model, data)
    drawing, drawn = _speech_to_photo(model, data, seed)
    rows = [heard, photos, *drawing, *_word_to_speech(model, data, config, seed)]
    rows += [*_music(model, data, seed), *_emoji(model, data, seed)]
    for row in rows:
        say(f"{row['task']:32s} n {row['n']:4d}  score {row['score']:.3f}  {row['interval']}  limit {row['limit']}")
    return {"rows": rows, "misheard": hear_fails, "seconds": round(time.perf_counter() - started, 1)}, drawn


def _row(task: str, right: Sequence[float], chance: float, limit: float | None, how: str) -> dict[str, Any]:
    return {
        "task": task,
        "n": len(right),
        "score": round(float(np.mean(right)), 4),
        "interval": [round(bound, 3) for bound in interval(right)],
        "chance": chance,
        "limit": None if limit is None else round(limit, 4),
        "how": how,
    }


def _same(found: Sequence[int | None], wanted: Sequence[int | None]) -> list[float]:
    return [float(f == w) for f, w in zip(found, wanted, strict=True)]


def _share(found: Sequence[int | None], wanted: Sequence[int | None]) -> float:
    return float(np.mean(_same(found, wanted)))


def _respond(
    model: UnifiedModel, given: Sequence[Segment], order: tuple[str, ...], sampling: dict[str, Sampling], seed: int = 0
) -> list[list[Output]]:
    return model.respond([Sample([g]) for g in given], Request(order=order, max_ids=256), sampling=sampling, seed=seed)


def _best(
    model: UnifiedModel,
    given: Sequence[Segment],
    order: tuple[str, ...],
    sampling: dict[str, Sampling],
    seed: int,
    told: Sequence[str] | None = None,
) -> list[list[Output]]:
    """Of the answers of `_respond` and others, drawn alike, those that the model reads best."""
    return best_of(
        model,
        [Sample([g]) for g in given],
        Request(order=order, max_ids=256),
        num=CANDIDATES,
        temperature=sampling[order[-1]].temperature,
        sampling=sampling,
        seed=seed,
        prior=0.0,
        told=told,
        readers={"image": partial(as_seen, model), "speech": partial(as_heard, model)},
    )


def as_heard(model: UnifiedModel, sounds: Sequence[Tensor | np.ndarray]) -> list[Segment]:
    """Mono sounds at 16 kHz in codes of what is said."""
    mono = [np.asarray(sound).reshape(-1) for sound in sounds]
    return [Segment("heard", k, "user") for k in encode_audio(model.tokenizers["heard"], mono, 64)]


def as_seen(model: UnifiedModel, pictures: Sequence[Tensor]) -> list[Segment]:
    """Pictures `[3, H, W]` in [0, 1] in codes of what is shown."""
    pixels = (torch.stack(list(pictures)).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Segment("seen", k, "user") for k in encode_images(model.tokenizers["seen"], pixels)]


def _hear(model: UnifiedModel, data: FieldData) -> tuple[dict[str, Any], list[list[Any]]]:
    answers = _respond(model, as_heard(model, [c.audio for c in data.test_clips]), ("text",), GREEDY)
    pairs = [(WORDS[c.digit], str(out[0].content)) for c, out in zip(data.test_clips, answers, strict=True)]
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common(5)
    row = _row("speech->word", [float(a == b) for a, b in pairs], 0.1, None, "exact word, every clip of the speaker")
    return row, [[*pair, count] for pair, count in wrong]


def _photo_to_word(model: UnifiedModel, data: FieldData) -> dict[str, Any]:
    photos = [p for p in data.test_pictures if p.kind == "sign"]
    answers = _respond(model, as_seen(model, list(to_tensor(photos))), ("text",), GREEDY)
    right = [float(out[0].content == p.word) for out, p in zip(answers, photos, strict=True)]
    return _row("photo->word", right, 0.1, None, "exact word, held-out photos")


def _speech_to_photo(model: UnifiedModel, data: FieldData, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    classify = train_photo_classifier([p for p in data.pictures if p.kind == "sign"], seed)
    photos = [p for p in data.test_pictures if p.kind == "sign"]
    wanted = [WORDS.index(p.word) for p in photos]
    read = classify(to_tensor(photos))
    rebuilt = classify(model.tokenizers["image"].decode(torch.from_numpy(_codes(model, photos))))
    chosen = list(range(0, len(data.test_clips), 2))
    heard = as_heard(model, [data.test_clips[i].audio for i in chosen])
    answers = _respond(model, heard, ("text", "image"), DRAWN, seed)
    best = _best(model, heard, ("text", "image"), DRAWN, seed)
    drawn, better = (torch.stack([_media(out[1]) for out in given]) for given in (answers, best))
    digits = [data.test_clips[i].digit for i in chosen]
    meant, meant_best = ([_digit(out[0]) for out in given] for given in (answers, best))
    how = "the judge of photos reads the sign drawn after the word; limit: held-out photos through the tokenizer"
    written = "the same drawings against the word written before them"
    rows = [
        _row("speech->photo", _same(classify(drawn), digits), 0.1, _share(rebuilt, wanted), how),
        _row("- the word it wrote, as drawn", _same(classify(drawn), meant), 0.1, None, written),
        _row(f"speech->photo, best of {CANDIDATES}", _same(classify(better), digits), 0.1, None, CHOSEN),
        _row("- the word it wrote, as drawn best", _same(classify(better), meant_best), 0.1, None, written),
        _row(
            "judge of photos",
            _same(read, wanted),
            0.1,
            None,
            "held-out photos themselves",
        ),
    ]
    examples = [[better[i] for i in range(len(better)) if digits[i] == d][:SHOWN] for d in range(10)]
    return rows, torch.stack([picture for row in examples for picture in row])


def _media(output: Output) -> Tensor:
    assert output.media is not None
    return output.media


def _word_to_speech(model: UnifiedModel, data: FieldData, config: FieldDataConfig, seed: int) -> list[dict[str, Any]]:
    listen, classify = sphinx_digits(), train_digit_listener(data.clips, seed)
    clips = [c for c in data.clips if c.speaker == config.reply_speaker][::5]
    wanted = [c.digit for c in clips]
    used = model.vocabulary.block("speech").num_quantizers
    codes = encode_audio(model.tokenizers["speech"], [c.audio for c in clips], 64)
    rebuilt = model.decode_media("speech", [k[:used] for k in codes])
    digits = list(range(10)) * 10
    asked, words = [say(WORDS[d]) for d in digits], [WORDS[d] for d in digits]
    answers = _respond(model, asked, ("speech",), SPOKEN, seed)
    best = _best(model, asked, ("speech",), SPOKEN, seed, words)
    spoken, better = ([_media(out[0]) for out in given] for given in (answers, best))
    known = [c for c in data.clips if c.take < TEST_TAKES]
    real = [c.audio for c in clips]
    rows = []
    judges: dict[str, Callable[[Sequence[Any]], Sequence[int | None]]] = {
        "pocketsphinx": lambda sounds: [listen(sound) for sound in sounds],
        "judge of digits": classify,
    }
    for name, judge in judges.items():
        limit = _share(judge(rebuilt), wanted)
        how = f"{name}, ten takes a digit; limit: the speaker's real clips through the codec (uncoded: "
        how += f"{_share(judge(real), wanted):.2f})"
        rows.append(_row(f"word->speech, {name}", _same(judge(spoken), digits), 0.1, limit, how))
        rows.append(_row(f"- best of {CANDIDATES}", _same(judge(better), digits), 0.1, limit, CHOSEN))
    for name, group in (("new takes of its speakers", known), ("the held-out speaker", data.test_clips)):
        found = classify([c.audio for c in group])
        right = _same(found, [c.digit for c in group])
        rows.append(_row(f"judge of digits, {name}", right, 0.1, None, "real clips"))
    return rows


def _music(model: UnifiedModel, data: FieldData, seed: int) -> list[dict[str, Any]]:
    listen = train_key_listener(data.chorales, seed)
    real, wanted = [play(c) for c in data.test_chorales], [c.digit for c in data.test_chorales]
    codes = encode_audio(model.tokenizers["music"], real, 64)
    read = _respond(model, [Segment("music", k, "user") for k in codes], ("text",), GREEDY)
    used = model.vocabulary.block("music").num_quantizers
    rebuilt = model.decode_media("music", [k[:used] for k in codes])
    digits = list(range(10)) * 10
    asked = [play_key(WORDS[d]) for d in digits]
    played = [_media(out[0]) for out in _respond(model, asked, ("music",), PLAYED, seed)]
    better = [_media(out[0]) for out in _best(model, asked, ("music",), PLAYED, seed, [WORDS[d] for d in digits])]
    clips = data.test_clips[::5]
    heard = as_heard(model, [c.audio for c in clips])
    answers = _respond(model, heard, ("text", "music"), PLAYED, seed)
    said, meant = [c.digit for c in clips], [_digit(out[0]) for out in answers]
    answered = [_media(out[1]) for out in answers]
    rows = [
        _row(
            "chorale->word",
            [float(out[0].text == WORDS[d]) for out, d in zip(read, wanted, strict=True)],
            0.1,
            None,
            "exact word, held-out chorales in ten keys each",
        )
    ]
    judges: dict[str, Callable[[Sequence[Any]], Sequence[int | None]]] = {
        "lowest tone": lambda sounds: [lowest_tone(sound) for sound in sounds],
        "judge of keys": listen,
    }
    for name, judge in judges.items():
        limit = _share(judge(rebuilt), wanted)
        how = f"{name}; limit: held-out chorales through the codec (uncoded: {_share(judge(real), wanted):.2f})"
        rows += [
            _row(f"word->chorale, {name}", _same(judge(played), digits), 0.1, limit, how),
            _row(f"- best of {CANDIDATES}", _same(judge(better), digits), 0.1, limit, CHOSEN),
            _row(f"speech->chorale, {name}", _same(judge(answered), said), 0.1, limit, how),
            _row("- the word it wrote, as played", _same(judge(answered), meant), 0.1, limit, "the same chorales"),
        ]
    return rows


def _digit(output: Output) -> int | None:
    return WORDS.index(output.text) if output.text in WORDS else None


def _emoji(model: UnifiedModel, data: FieldData, seed: int) -> list[dict[str, Any]]:
    emoji = [p for p in data.test_pictures if p.kind == "emoji"]
    rng = np.random.default_rng([seed, 9])
    others = [
        [i, *rng.choice([j for j in range(len(emoji)) if j != i], TWENTY - 1, replace=False)] for i in range(len(emoji))
    ]
    seen = as_seen(model, list(to_tensor(emoji)))
    alone = _nats(model, [Sample([NOTHING, Segment("text", p.word, "assistant")]) for p in emoji])
    pairs = [Sample([seen[i], Segment("text", emoji[j].word, "assistant")]) for i, o in enumerate(others) for j in o]
    gain = alone[torch.tensor(others)] - _nats(model, pairs).view(len(emoji), TWENTY)
    captions = [str(out[0].content) for out in _respond(model, seen, ("text",), GREEDY)]
    drawn = torch.stack(
        [_media(out[0]) for out in _respond(model, [draw_emoji(p.word) for p in emoji], ("image",), GREEDY)]
    )
    looks, wanted = _look(drawn), _look(to_tensor(emoji))
    rebuilt = _look(model.tokenizers["image"].decode(torch.from_numpy(_codes(model, emoji))))

    def nearest(looks_ND: Tensor) -> list[float]:
        return [float(int((looks_ND[i] - wanted[o[:TEN]]).norm(dim=1).argmin()) == 0) for i, o in enumerate(others)]

    return [
        _row(
            "emoji->caption of 20",
            (gain.argmax(1) == 0).float().tolist(),
            0.05,
            None,
            "the likeliest of 20 held-out captions: log p(caption, given the emoji) - log p(caption)",
        ),
        _row(
            "- among the first five",
            ((gain > gain[:, :1]).sum(1) < 5).float().tolist(),
            0.25,
            None,
            "the same ranking",
        ),
        _row(
            "emoji->caption (exact)",
            [float(c == p.word) for c, p in zip(captions, emoji, strict=True)],
            0.0,
            None,
            "the very caption, written freely",
        ),
        _row(
            "caption->emoji of 10",
            nearest(looks),
            0.1,
            float(np.mean(nearest(rebuilt))),
            "nearest of ten held-out emoji in 8x8 colors; limit: the emoji itself through the tokenizer",
        ),
    ]


def _nats(model: UnifiedModel, samples: Sequence[Sample]) -> Tensor:
    return -torch.tensor(log_likelihoods(model, samples, mean=False))


def _codes(model: UnifiedModel, pictures: Sequence[Picture]) -> np.ndarray:
    codes = encode_images(model.tokenizers["image"], np.stack([p.pixels for p in pictures]))
    return np.stack(codes)[:, : model.vocabulary.block("image").num_quantizers]


def _look(images_NCHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images_NCHW, 8).flatten(1)


def sheet(pictures_NCHW: Tensor, columns: int = SHOWN) -> Tensor:
    """Pictures side by side in one, `[3, rows * H, columns * W]`."""
    rows = len(pictures_NCHW) // columns
    return torch.cat([torch.cat(list(part), 2) for part in pictures_NCHW[: rows * columns].split(columns)], 1)


def markdown(report: dict[str, Any], config: FieldDataConfig, picture: str = "", readers: int = 0) -> str:
    """The page of a report; `picture` is the name of the file with drawings, beside it.

    `readers` is the number of clips whose phones were learnt.
    """
    speaker = config.held_out_speaker
    lines = [
        "# Field trial: human speech, photos and emoji",
        "",
        "Made by `anyglot train field --data.root ../shared/data/real --table docs/field.md`, unedited; what is in",
        "that folder, whose it is and under which licence: [recipes](../recipes/README.md#recipes).",
        f"The speaker `{speaker}` and a tenth of the photos and emoji (by a hash of the picture) were never seen in",
        "training, neither by the tokenizers nor by the language model nor by the judges. The same hands may occur on",
        "both sides. Speech and pictures are read as codes of tokenizers that learnt the digit words and captions of",
        "the training split (with synthetic voices, where installed, as further speakers), and are answered in codes",
        "that can be decoded, speech in the",
        f"voice of `{config.reply_speaker}`, the training speaker whom pocketsphinx understands best. In brackets:",
        "95 % of 2,000 resamples of the answers; one training, so its own luck is not in them.",
        "",
        f"*Best of {CANDIDATES}*: the model draws {CANDIDATES} answers, reads them as it reads anything, and takes the",
        "one where the word that was meant is likeliest. Judges have no part in that, but they learnt from the same",
        "training clips and photos.",
    ]
    if readers:
        lines += [
            f"What hears has also learnt the phones of {readers} clips of other people without transcripts, as",
            "pocketsphinx finds them: as a judge it is no stranger to what chooses the best spoken answer.",
        ]
    lines += [
        "",
        "| task | n | score | chance | limit | how |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        low, high = row["interval"]
        score = f"{row['score']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['task']} | {row['n']} | {score} | {row['chance']:.2f} | {limit} | {row['how']} |")
    wrong = ", ".join(f"{said} as {written} ({count})" for said, written, count in report["misheard"])
    lines += ["", f"Most frequent mistakes of hearing: {wrong or 'none'}."]
    if picture:
        lines += [
            "",
            f"Drawn by the model after hearing `{speaker}` say zero (first row) to nine (last row), the best of",
            f"{CANDIDATES} by its own reading, for the first clips of each, not chosen otherwise:",
            "",
            f"![drawn signs]({picture})",
        ]
    return "\n".join([*lines, ""])
