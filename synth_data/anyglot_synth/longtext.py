"""Long texts: split where a speaker would breathe, spoken piece by piece, joined as if said at once.

An engine bears so many characters. A text that is longer is cut at ends of sentences, a sentence that is longer at
clauses, a clause at spaces; never inside a word (scripts without spaces, Chinese and Japanese, may break between
characters). `split` goes by punctuation, of any script, with the abbreviations of some European languages; where it is
in doubt it does not split. This file knows no engine.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.backends import Backend, BackendError, Made, silent
from anyglot_synth.seeds import seed_of

Float32 = NDArray[np.float32]

VERSION = 1
"""Counts changes of how texts are split and pieces joined: part of a sound's content address."""
MAX_CHARACTERS = 1_000
"""Of a piece, for engines that do not say what they bear."""
PARAGRAPH, SENTENCE, CLAUSE, WORD = "paragraph", "sentence", "clause", "word"
PAUSES_S: Mapping[str, float] = {PARAGRAPH: 0.6, SENTENCE: 0.35, CLAUSE: 0.18, WORD: 0.04}
"""Of silence after a piece, by how it ends."""
MARGIN_S = 0.02
FADE_S = 0.005
SILENCE_DB = -45.0
MAX_GAIN_DB = 6.0

_STOPS = ".!?\u2026\u203d\u037e\u0589\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4\u3002\uff01\uff1f\uff61"
_FULL_WIDTH = "\u3002\uff01\uff1f\uff61"  # end a sentence without a space
_CLAUSES = ",;:\u2014\u2013\u060c\u061b\u3001\uff0c\uff1b\uff1a\u0387\u1363"
_CLOSERS = "\"')\\]}\u00bb\u2019\u201d\u300d\u300f\uff09\u203a"
_END = re.compile(f"(?:[{_FULL_WIDTH}]+[{_CLOSERS}]*)|(?:[{_STOPS}]+[{_CLOSERS}]*(?=\\s))")
_CLAUSE_END = re.compile(f"[{_CLAUSES}]+[{_CLOSERS}]*(?=\\s)|[\u3001\uff0c\uff1b\uff1a]")
_ABBREVIATIONS = frozenset(
    # titles and names; words before numbers; months and days; Latin; German; French; Spanish and Italian
    re.findall(
        r"\S+",
        """dr mr mrs ms mx prof st sr jr rev hon gen col maj capt cmdr lt sgt gov sen rep pres mt ft
        no nos nr fig figs vol vols ch chap sec pp p pg art eq ed eds approx est dept inc ltd co corp bros ave blvd rd
        jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun
        vs etc al cf ca viz e.g i.e eg ie a.m p.m ph.d
        bzw usw z.b d.h u.a o.ä bspw vgl str hr fr abs evtl inkl
        mme mlle mm me av env
        sra srta dra ud uds pág sig dott avv""",
    )
)
_ENDS_SENTENCES_TOO = frozenset(["etc", "usw", "a.m", "p.m", "inc", "ltd", "co", "corp", "jr", "sr", "al", "ave"])
_STARTERS = frozenset(
    re.findall(
        r"\w+",
        """a an and at but every for he her his how however i if in it its my no now on one our she so that the their
        then there these they this those we what when where which who why yes you your""",
    )
)
"""English words that, with a capital, show that a sentence begins after an abbreviation."""


@dataclass(frozen=True)
class Piece:
    """Part of a text, and how it ends: "paragraph", "sentence", "clause" or "word"."""

    text: str
    end: str


def sentences(text: str) -> list[str]:
    """The sentences of one paragraph, with their punctuation; together they are the text but for spaces between."""
    found, start = [], 0
    for match in _END.finditer(text):
        if _ends_here(text, start, match):
            found.append(text[start : match.end()].strip())
            start = match.end()
    return [sentence for sentence in [*found, text[start:].strip()] if sentence]


def _ends_here(text: str, start: int, match: re.Match[str]) -> bool:
    following = text[match.end() :].lstrip().lstrip("\"'([{\u00ab\u2018\u201c\u00bf\u00a1")
    if not following or match.group()[0] in _FULL_WIDTH:
        return True
    first = following[0]
    if first.islower():  # "e.g. this", "What?! he said"
        return False
    if match.group()[0] != ".":
        return True
    if match.group().startswith(".."):  # an ellipsis ends a sentence if a capital follows
        return first.isupper() or not first.isalpha()
    word = text[start : match.start()].rsplit(maxsplit=1)[-1:]
    before = word[0].lstrip("\"'([{\u00ab\u2018\u201c").lower() if word else ""
    next_word = re.split(r"[^\w']", following, maxsplit=1)[0]
    begins = next_word.lower() in _STARTERS and next_word[:1].isupper()
    if before in _ABBREVIATIONS:
        return begins and before in _ENDS_SENTENCES_TOO
    if re.fullmatch(r"\w(?:\.\w)*", before) and not before.isdigit():  # initials and U.S.
        return begins and before != "i" and ("." in before or len(before) > 1)
    if before.isdigit() and len(before) <= 2:  # "am 3. Oktober", "1. First": an ordinal or the number of a list
        return begins and text[start : match.start()].strip() != before
    return True


def split(text: str, max_characters: int = MAX_CHARACTERS) -> list[Piece]:
    """Cuts a text into as few pieces as whole sentences allow, each of at most `max_characters`.

    A line end followed by an empty line ends a paragraph, other white space counts as a space.

    Raises:
        BackendError: there is a word longer than that.
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    pieces: list[Piece] = []
    for paragraph in filter(None, paragraphs):
        parts: list[Piece] = []
        for sentence in sentences(paragraph):
            parts += [Piece(sentence, SENTENCE)] if len(sentence) <= max_characters else _cut(sentence, max_characters)
        packed = _pack(parts, max_characters)
        pieces += [*packed[:-1], Piece(packed[-1].text, PARAGRAPH)]
    # Pieces without a word, a line of dashes, would be silence: only their pause is kept.
    return [piece for piece in pieces if any(map(str.isalnum, piece.text))]


def _cut(sentence: str, max_characters: int) -> list[Piece]:
    """A sentence at its clauses, and where these are too long at its words."""
    parts, start = [], 0
    for match in _CLAUSE_END.finditer(sentence):
        parts.append(sentence[start : match.end()].strip())
        start = match.end()
    parts = [part for part in [*parts, sentence[start:].strip()] if part]
    pieces: list[Piece] = []
    for part in parts:
        if len(part) <= max_characters:
            pieces.append(Piece(part, CLAUSE))
            continue
        words = _pack([Piece(word, WORD) for word in _words(part, max_characters)], max_characters)
        pieces += [*words[:-1], Piece(words[-1].text, CLAUSE)]
    return [*pieces[:-1], Piece(pieces[-1].text, SENTENCE)]


def _words(text: str, max_characters: int) -> list[str]:
    words: list[str] = []
    for word in text.split():
        if len(word) <= max_characters:
            words.append(word)
        elif all(unicodedata.east_asian_width(c) in "WF" for c in word):
            words += [word[i : i + max_characters] for i in range(0, len(word), max_characters)]
        else:
            raise BackendError(f"a word of {len(word)} characters ({word[:30]!r}...) cannot be spoken: shorten it")
    return words


def _pack(parts: Sequence[Piece], max_characters: int) -> list[Piece]:
    """Joins neighbours as long as they fit."""
    packed: list[Piece] = []
    for part in parts:
        if packed and len(packed[-1].text) + 1 + len(part.text) <= max_characters:
            tight = packed[-1].text[-1] in _FULL_WIDTH + "\u3001\uff0c\uff1b\uff1a" or (
                packed[-1].end == WORD and _wide(packed[-1].text[-1]) and _wide(part.text[0])
            )
            packed[-1] = Piece(packed[-1].text + ("" if tight else " ") + part.text, part.end)
        else:
            packed.append(part)
    return packed


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def limit(backend: Backend) -> int:
    """The most characters that an engine is given at once."""
    return int(getattr(backend, "max_characters", MAX_CHARACTERS))


def speak(backend: Backend, text: str, style: Mapping[str, Any], seed: int) -> Made:
    """Has an engine speak a text of any length.

    Returns:
        one sound, without silence before and after it, beyond 20 ms.

    Raises:
        BackendError: the engine fails, or there is nothing to say.
    """
    pieces = split(text, limit(backend))
    if not pieces:
        raise BackendError(f"cannot speak {text[:60]!r}: give at least one word")
    made = [
        backend.make(piece.text, style, seed if number == 0 or not backend.seeded else seed_of(seed, number))
        for number, piece in enumerate(pieces)
    ]
    rate = made[0].sample_rate
    if rate is None or any(one.sample_rate != rate for one in made):
        raise BackendError(f"{backend.name} gave pieces of one text at several sample rates; use one voice")
    audio = join([one.array for one in made], [piece.end for piece in pieces], rate)
    if silent(audio):
        raise BackendError(f"{backend.name} made only silence for {text[:60]!r}", retryable=True)
    return Made(audio, rate, {"pieces": len(pieces)} if len(pieces) > 1 else {})


def join(sounds: Sequence[Float32], ends: Sequence[str], sample_rate: int) -> Float32:
    """Joins spoken pieces: equally loud, trimmed, faded to zero at both ends, with pauses by how each ends.

    Args:
        sounds: float32 `[samples]` each.
        ends: "paragraph", "sentence", "clause" or "word" each.
        sample_rate: Hz of all.
    """
    trimmed = [trim(sound, sample_rate) for sound in sounds]
    levels = [_level(sound) for sound in trimmed]
    heard = [level for level in levels if level > 0]
    common = float(np.exp(np.mean(np.log(heard)))) if heard else 0.0
    most = 10 ** (MAX_GAIN_DB / 20)
    pieces: list[Float32] = []
    for number, (sound, level, end) in enumerate(zip(trimmed, levels, ends, strict=True)):
        if len(trimmed) > 1 and level > 0:
            sound = sound * np.float32(min(most, max(1 / most, common / level)))
        pieces.append(sound)
        if number < len(trimmed) - 1:
            pieces.append(np.zeros(round(PAUSES_S[end] * sample_rate), np.float32))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def trim(sound: Float32, sample_rate: int) -> Float32:
    """Without its mean and without silence beyond 20 ms at either end, which fades to zero; empty if it is silence."""
    if not len(sound):
        return sound
    sound = sound - sound.mean(dtype=np.float64).astype(np.float32)
    hop = max(1, sample_rate // 200)
    levels = _frame_levels(sound, hop)
    if levels.max() < 1e-4:
        return np.zeros(0, np.float32)
    heard = np.flatnonzero(levels > levels.max() * 10 ** (SILENCE_DB / 20))
    margin = round(MARGIN_S * sample_rate)
    sound = sound[max(0, int(heard[0]) * hop - margin) : (int(heard[-1]) + 1) * hop + margin].copy()
    fade = min(round(FADE_S * sample_rate), len(sound) // 2)
    ramp = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
    sound[:fade] *= ramp
    sound[len(sound) - fade :] *= ramp[::-1]
    return sound


def _frame_levels(sound: Float32, hop: int) -> NDArray[np.float64]:
    frames = np.pad(sound, (0, -len(sound) % hop)).reshape(-1, hop)
    levels: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / hop)
    return levels


def _level(sound: Float32) -> float:
    """Level of what is said: of the frames within 25 dB of the loudest; 0 for silence."""
    if not len(sound):
        return 0.0
    levels = _frame_levels(sound, max(1, len(sound) // 200))
    said = levels[levels > levels.max() * 10 ** (-25 / 20)]
    return float(np.sqrt(np.mean(said**2))) if len(said) else 0.0
