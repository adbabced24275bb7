"""Grades the `field` model on a speaker, pictures and chorales never met in training.

Words are compared exactly. What the model draws and says is read by the judges of `field_graders.py`; captions are
ranked by likelihood among twenty, emoji that it draws by their colors among ten. Drawings, speech and music are graded
as they come, and where the model has made eight and taken the best by its own reading (`candidates.best_of`). Every
row has its chance, a 95 % interval and, where a judge or a tokenizer limits it, that limit. `field.py` trains,
`field_page.py` shows; this file only measures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from anyglot_recipes.field import WORDS, Clip, FieldData, FieldDataConfig, Picture, draw_emoji, play_key, say, sign
from anyglot_recipes.field_graders import (
    NETWORKS,
    TEST_TAKES,
    interval,
    lowest_tone,
    sphinx_digits,
    train_digit_listener,
    train_key_listener,
    train_photo_classifier,
)
from anyglot_recipes.field_meaning import seen_variants, to_tensor
from anyglot_recipes.field_music import play

GREEDY = dict.fromkeys(("text", "image", "speech", "music"), Sampling(temperature=0.0))
GUIDED = {"image": 4.0, "speech": 2.0, "music": 4.0}
"""Scales of guidance by the word that is asked for (docs/log.md)."""
DRAWN = {**GREEDY, "image": Sampling(temperature=0.6)}
SPOKEN = {**GREEDY, "speech": Sampling(temperature=0.5)}
PLAYED = {**GREEDY, "music": Sampling(temperature=0.5)}
NOTHING = Segment("text", "", "user")
"""The prompt of a document whose condition was dropped."""
Judge = Callable[[Sequence[Any]], Sequence[int | None]]
TEN, TWENTY = 10, 20
PRIOR = 0.75
"""How much of a caption's own likelihood is taken off, chosen for SmolLM2 on training emoji left out (docs/log.md)."""
VERSIONS = 4
"""Of a held-out emoji: itself, and three augmented ones."""
CANDIDATES = 8
CHOSEN = f"{CANDIDATES} such answers drawn, and the one taken that the model itself reads best as the word"
DRAWING, SPEAKING, PLAYING, ANSWERING = "speech->photo", "word->speech", "word->chorale", "speech->chorale"
NAMING = f"emoji->caption of {TWENTY}"
NAMER = ", SmolLM2"
"""Ends the names of rows of the model of `field_captions.py`."""


@dataclass(frozen=True)
class Way:
    """How a word is asked for in a medium: the task's name in training, the prompt, the decoding."""

    task: str
    ask: Callable[[str], Segment]
    sampling: dict[str, Sampling]


WAYS = {
    "image": Way("text->photo", sign, DRAWN),
    "speech": Way("text->speech", say, SPOKEN),
    "music": Way("text->music", play_key, PLAYED),
}


@dataclass(frozen=True)
class Shown:
    """An answer, and the digit that each judge reads in it (or None).

    Args:
        task: what was asked for.
        given: what was given, in words.
        digit: the digit that was meant.
        outputs: the answer.
        read: by judge.
    """

    task: str
    given: str
    digit: int
    outputs: Sequence[Output]
    read: dict[str, int | None]


def evaluate_field(
    model: UnifiedModel,
    data: FieldData,
    config: FieldDataConfig,
    namer: UnifiedModel | None = None,
    *,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Shown]]:
    """The report of the field trial, one row per measure, and the answers that were the best of several.

    `namer` is a second model, which only reads emoji.
    """
    started = time.perf_counter()
    heard, hear_fails = _hear(model, data)
    photos = _photo_to_word(model, data)
    shown: list[Shown] = []
    rows = [heard, photos, *_speech_to_photo(model, data, seed, shown)]
    rows += [*_word_to_speech(model, data, config, seed, shown), *_music(model, data, seed, shown)]
    rows += _emoji(model, data, namer, seed)
    for row in rows:
        say(f"{row['task']:32s} n {row['n']:4d}  score {row['score']:.3f}  {row['interval']}  limit {row['limit']}")
    return {"rows": rows, "misheard": hear_fails, "seconds": round(time.perf_counter() - started, 1)}, shown


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
    model: UnifiedModel,
    given: Sequence[Segment],
    order: tuple[str, ...],
    sampling: dict[str, Sampling],
    seed: int = 0,
    guidance: dict[str, float] | None = None,
) -> list[list[Output]]:
    request = Request(order=order, max_ids=256)
    return model.respond([Sample([g]) for g in given], request, sampling=sampling, seed=seed, guidance=guidance)


def best_answers(
    model: UnifiedModel, asked: Sequence[Segment], modality: str, seed: int, told: Sequence[str]
) -> list[list[Output]]:
    """Of the guided answers of `_respond` and others, drawn alike, those that the model reads best as what is told."""
    sampling = WAYS[modality].sampling
    return best_of(
        model,
        [Sample([a]) for a in asked],
        Request(order=(modality,), max_ids=256),
        num=CANDIDATES,
        temperature=sampling[modality].temperature,
        sampling=sampling,
        seed=seed,
        guidance=GUIDED,
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


def _speech_to_photo(model: UnifiedModel, data: FieldData, seed: int, shown: list[Shown]) -> list[dict[str, Any]]:
    classify = train_photo_classifier([p for p in data.pictures if p.kind == "sign"], seed)
    photos = [p for p in data.test_pictures if p.kind == "sign"]
    wanted = [WORDS.index(p.word) for p in photos]
    read = classify(to_tensor(photos))
    rebuilt = classify(model.tokenizers["image"].decode(torch.from_numpy(_codes(model, photos))))
    clips = data.test_clips[::2]
    heard = as_heard(model, [c.audio for c in clips])
    digits = [c.digit for c in clips]
    words = _respond(model, heard, ("text",), GREEDY)
    told = [out[0].text or "" for out in words]
    asked, meant = [sign(word) for word in told], [_digit(out[0]) for out in words]
    both = _respond(model, heard, ("text", "image"), DRAWN, seed)
    best = best_answers(model, asked, "image", seed, told)
    drawn = (both, _respond(model, asked, ("image",), DRAWN, seed, GUIDED), best)
    at_once, found, found_best = (classify(torch.stack([_media(out[-1]) for out in made])) for made in drawn)
    how = (
        "the sign after the word in one answer, read by the judge of photos (a quarter of the training that drawing by "
    )
    how += "word had); limit: held-out photos through the tokenizer"
    way = "the model writes the word, is asked to `sign` it, and draws, guided"
    written = "the same drawings against the word written before them"
    limit = _share(rebuilt, wanted)
    rows = [
        _row(f"{DRAWING} at once", _same(at_once, digits), 0.1, limit, how),
        _row("- the word of these, as drawn", _same(at_once, [_digit(out[0]) for out in both]), 0.1, limit, written),
        _row(f"{DRAWING} by way of text", _same(found, digits), 0.1, limit, way),
        _row("- the word of these, as drawn", _same(found, meant), 0.1, limit, written),
        _row(f"{DRAWING}, best of {CANDIDATES}", _same(found_best, digits), 0.1, limit, CHOSEN),
        _row("- the word of these, as drawn", _same(found_best, meant), 0.1, limit, written),
        _row(
            "judge of photos",
            _same(read, wanted),
            0.1,
            None,
            f"held-out photos themselves; the judge is the mean of {NETWORKS} networks",
        ),
    ]
    answers = [[*word, *picture] for word, picture in zip(words, best, strict=True)]
    shown += _shown(DRAWING, [_spoken(c) for c in clips], digits, answers, {"judge of photos": found_best})
    return rows


def _spoken(clip: Clip) -> str:
    return f"{clip.speaker} says {WORDS[clip.digit]} (take {clip.take})"


def _shown(
    task: str,
    given: Sequence[str],
    digits: Sequence[int],
    answers: Sequence[Sequence[Output]],
    read: dict[str, Sequence[int | None]],
) -> list[Shown]:
    return [
        Shown(task, given[i], digits[i], answers[i], {judge: found[i] for judge, found in read.items()})
        for i in range(len(answers))
    ]


def _media(output: Output) -> Tensor:
    assert output.media is not None
    return output.media


def _word_to_speech(
    model: UnifiedModel, data: FieldData, config: FieldDataConfig, seed: int, shown: list[Shown]
) -> list[dict[str, Any]]:
    listen, classify = sphinx_digits(), train_digit_listener(data.clips, seed)
    clips = [c for c in data.clips if c.speaker == config.reply_speaker][::5]
    wanted = [c.digit for c in clips]
    used = model.vocabulary.block("speech").num_quantizers
    codes = encode_audio(model.tokenizers["speech"], [c.audio for c in clips], 64)
    rebuilt = model.decode_media("speech", [k[:used] for k in codes])
    digits = list(range(10)) * 10
    asked, words = [say(WORDS[d]) for d in digits], [WORDS[d] for d in digits]
    answers = _respond(model, asked, ("speech",), SPOKEN, seed, GUIDED)
    best = best_answers(model, asked, "speech", seed, words)
    spoken, better = ([_media(out[0]) for out in given] for given in (answers, best))
    known = [c for c in data.clips if c.take < TEST_TAKES]
    real = [c.audio for c in clips]
    rows: list[dict[str, Any]] = []
    read: dict[str, Sequence[int | None]] = {}
    judges: dict[str, Judge] = {
        "pocketsphinx": lambda sounds: [listen(sound) for sound in sounds],
        "judge of digits": classify,
    }
    for name, judge in judges.items():
        limit = _share(judge(rebuilt), wanted)
        how = f"{name}, ten answers a digit, guided; limit: the speaker's real clips through the codec (uncoded: "
        how += f"{_share(judge(real), wanted):.2f})"
        rows.append(_row(f"{SPEAKING}, {name}", _same(judge(spoken), digits), 0.1, limit, how))
        read[name] = judge(better)
        rows.append(_row(f"- best of {CANDIDATES}", _same(read[name], digits), 0.1, limit, CHOSEN))
    shown += _shown(SPEAKING, [f"say {word}" for word in words], digits, best, read)
    for name, group in (("new takes of its speakers", known), ("the held-out speaker", data.test_clips)):
        found = classify([c.audio for c in group])
        right = _same(found, [c.digit for c in group])
        rows.append(_row(f"judge of digits, {name}", right, 0.1, None, "real clips"))
    return rows


def _music(model: UnifiedModel, data: FieldData, seed: int, shown: list[Shown]) -> list[dict[str, Any]]:
    real, wanted = [play(c) for c in data.test_chorales], [c.digit for c in data.test_chorales]
    codes = encode_audio(model.tokenizers["music"], real, 64)
    named = _respond(model, [Segment("music", k, "user") for k in codes], ("text",), GREEDY)
    used = model.vocabulary.block("music").num_quantizers
    rebuilt = model.decode_media("music", [k[:used] for k in codes])
    right: dict[str, list[bool]] = {}
    for out, chorale in zip(named, data.test_chorales, strict=True):
        right.setdefault(chorale.name, []).append(out[0].text == WORDS[chorale.digit])
    how = "exact word; every held-out piece in ten keys, and their mean"
    rows = [_row("chorale->word", [float(np.mean(keys)) for keys in right.values()], 0.1, None, how)]
    clips = data.test_clips[::5]
    heard = _respond(model, as_heard(model, [c.audio for c in clips]), ("text",), GREEDY)
    digits = list(range(10)) * 10
    told = [*(WORDS[d] for d in digits), *(out[0].text or "" for out in heard)]
    asked = [play_key(word) for word in told]
    answers = _respond(model, asked, ("music",), PLAYED, seed, GUIDED)
    best = best_answers(model, asked, "music", seed, told)
    played, better = ([_media(out[0]) for out in given] for given in (answers, best))
    by_word, by_voice = slice(0, len(digits)), slice(len(digits), None)
    said = [c.digit for c in clips]
    judges: dict[str, Judge] = {
        "judge of keys": train_key_listener(data.chorales, seed),
        "lowest tone": lambda sounds: [lowest_tone(sound) for sound in sounds],
    }
    read: dict[str, Sequence[int | None]] = {}
    for name, judge in judges.items():
        limit, found, read[name] = _share(judge(rebuilt), wanted), judge(played), judge(better)
        how = f"{name}, ten answers a digit, guided; limit: held-out chorales through the codec (uncoded: "
        how += f"{_share(judge(real), wanted):.2f})"
        way = f"{name}; the model writes the word, is asked to `play` it, and plays, guided"
        for task, part, meant, note in ((PLAYING, by_word, digits, how), (ANSWERING, by_voice, said, way)):
            rows.append(_row(f"{task}, {name}", _same(found[part], meant), 0.1, limit, note))
            rows.append(_row(f"- best of {CANDIDATES}", _same(read[name][part], meant), 0.1, limit, CHOSEN))
    made = [[*word, *music] for word, music in zip(heard, best[by_voice], strict=True)]
    by = [{name: found[part] for name, found in read.items()} for part in (by_word, by_voice)]
    shown += _shown(PLAYING, [f"play {WORDS[d]}" for d in digits], digits, best[by_word], by[0])
    shown += _shown(ANSWERING, [_spoken(c) for c in clips], said, made, by[1])
    return rows


def _digit(output: Output) -> int | None:
    return WORDS.index(output.text) if output.text in WORDS else None


def _named(
    model: UnifiedModel,
    emoji: Sequence[Picture],
    others: Sequence[Sequence[int]],
    new: Sequence[bool],
    seed: int,
    by: str = "",
    how: str = "",
) -> list[dict[str, Any]]:
    """Rows of `model` that names emoji: the rank of each one's caption among those of `others`, itself first.

    `new` says whose caption no training emoji has.
    """
    versions_of = seen_variants(model.tokenizers["seen"], emoji, VERSIONS, seed)
    shown = [Segment("seen", codes, "user") for _, codes in versions_of]
    said = [Segment("text", p.word, "assistant") for p in emoji]
    alone = _nats(model, [Sample([NOTHING, caption]) for caption in said])
    pairs = [Sample([given, said[j]]) for k, given in enumerate(shown) for j in others[k % len(emoji)]]
    gain_VNC = PRIOR * alone[torch.tensor(others)] - _nats(model, pairs).view(VERSIONS, len(emoji), TWENTY)
    seen, gain_NC = shown[: len(emoji)], gain_VNC[0]
    right, five = _first(gain_NC, 1), _first(gain_NC, 5)
    captions = [str(out[0].content) for out in _respond(model, seen, ("text",), {"text": GREEDY["text"]})]
    exact = [float(c == p.word) for c, p in zip(captions, emoji, strict=True)]
    of_new = [score for score, is_new in zip(right, new, strict=True) if is_new]
    ranking = f"the likeliest of 20 held-out captions: log p(caption, given the emoji) - {PRIOR} log p(caption); "
    ranking += f"{np.mean(of_new):.2f} of the {len(of_new)} whose caption no training emoji has"
    versions = "the same, of the mean over the emoji and others turned, scaled, moved and lit at random"
    return [
        _row(f"{NAMING}{by}", right, 0.05, None, ranking + how),
        _row("- among the first five", five, 0.25, None, "the same ranking"),
        _row(f"- by {VERSIONS} versions", _first(gain_VNC.mean(0), 1), 0.05, None, versions),
        _row(f"emoji->caption (exact){by}", exact, 0.0, None, "the very caption, written freely"),
    ]


def _first(gain_NC: Tensor, places: int) -> list[float]:
    """1 for each item whose first candidate is among the best `places` of its candidates; a tie is no knowledge."""
    return ((gain_NC[:, 1:] >= gain_NC[:, :1]).sum(1) < places).float().tolist()


def _emoji(model: UnifiedModel, data: FieldData, namer: UnifiedModel | None, seed: int) -> list[dict[str, Any]]:
    emoji = [p for p in data.test_pictures if p.kind == "emoji"]
    rng = np.random.default_rng([seed, 9])
    others = []
    for i, picture in enumerate(emoji):
        different = [j for j, other in enumerate(emoji) if other.word != picture.word]
        others.append([i, *rng.choice(different, TWENTY - 1, replace=False)])
    known = {p.word for p in data.pictures if p.kind == "emoji"}
    words = {word for caption in known for word in caption.split()}
    lacking = sum(not words.issuperset(p.word.split()) for p in emoji)
    new = [p.word not in known for p in emoji]
    rows = _named(model, emoji, others, new, seed, how=f"; {lacking} have a word that no training caption has")
    if namer is not None:
        rows += _named(namer, emoji, others, new, seed, NAMER, "; a second model, which only does this")
    drawn = torch.stack(
        [_media(out[0]) for out in _respond(model, [draw_emoji(p.word) for p in emoji], ("image",), GREEDY)]
    )
    looks, wanted = _look(drawn), _look(to_tensor(emoji))
    rebuilt = _look(model.tokenizers["image"].decode(torch.from_numpy(_codes(model, emoji))))

    def nearest(looks_ND: Tensor) -> list[float]:
        return [float(int((looks_ND[i] - wanted[o[:TEN]]).norm(dim=1).argmin()) == 0) for i, o in enumerate(others)]

    return [
        *rows,
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
