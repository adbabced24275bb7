"""`speakable`: any text -> what a voice can say, or why it should not be said.

English only. The result holds ASCII letters, spaces and `.,?!;:'-`; it has no digits, and speaking it again gives the
same text. What is dropped rather than said: code, formulas, big tables, other scripts, long texts. Meaning is not
judged, and nothing is shortened, except URLs (see `words.addresses`).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from anyglot_synth.speakable import words
from anyglot_synth.speakable.arithmetic import arithmetic
from anyglot_synth.speakable.markup import Unspeakable, plain
from anyglot_synth.speakable.quantities import say_quantities

MAX_CHARACTERS = 20_000
"""A longer text is dropped before it is looked at."""
MAX_WORD = 60
"""Characters of a word."""


@dataclass(frozen=True)
class Spoken:
    """What a voice is given."""

    text: str


@dataclass(frozen=True)
class Dropped:
    """A text that should not be spoken.

    Args:
        reason: "code", "maths", "table", "emoji", "symbols", "script", "no-language", "long", "long-word" or "empty".
        detail: one line.
    """

    reason: str
    detail: str


@dataclass(frozen=True)
class Limits:
    """What is still spoken.

    Args:
        max_words: of the spoken text.
        max_emoji: in a text; each is named.
        max_cells: of a table.
        max_symbols: share of the characters that are neither letters, digits nor usual punctuation.
        day_first: whether 3/4/2025 is a day in April.
    """

    max_words: int = 200
    max_emoji: int = 3
    max_cells: int = 12
    max_symbols: float = 0.15
    day_first: bool = False


def speakable(text: str, limits: Limits = Limits()) -> Spoken | Dropped:
    """What a voice can say of an English text. Never raises.

    Args:
        text: plain text, Markdown or light HTML.
        limits: what is too much.
    """
    try:
        said = _once(text, limits)
        for _ in range(3):  # rarely, words that came out are such as are said differently
            again = _once(said, limits)
            if again == said:
                break
            said = again
    except Unspeakable as why:
        return Dropped(why.reason, why.detail)
    return Spoken(said)


def _once(text: str, limits: Limits) -> str:
    if len(text) > MAX_CHARACTERS:
        raise Unspeakable("long", f"{len(text)} characters; {MAX_CHARACTERS} are the limit")
    text = plain(words.standard(text), limits.max_cells)
    text, pictures = words.emoji(text)
    if pictures > limits.max_emoji:
        raise Unspeakable("emoji", f"{pictures} emoji; {limits.max_emoji} are the limit")
    text = words.addresses(text)
    _check_symbols(text, limits.max_symbols)
    _check_word(text)
    text = re.sub(r"[ \t]+", " ", text)
    text = words.abbreviations(text).replace("\n", " ")
    text = words.comparisons(arithmetic(text))
    text = say_quantities(text, limits.day_first)
    text = words.roman_numerals(words.symbols(text))
    text = words.fold(text)
    _check_script(text)
    _check_language(text)
    text = punctuated(words.acronyms(text))
    _check_words(text, limits.max_words)
    return text


_USUAL = frozenset(".,!?;:'\"-()/&%$€£@# \n\t…—–")


def _check_symbols(text: str, max_share: float) -> None:
    odd = [c for c in text if not (c.isalnum() or c in _USUAL or unicodedata.combining(c))]
    solid = sum(not c.isspace() for c in text)
    if len(odd) >= 5 and len(odd) > max_share * solid:
        raise Unspeakable("symbols", f"{len(odd)} of {solid} characters are symbols")


def _check_word(text: str) -> None:
    for word in text.split():
        if len(word) > MAX_WORD and (found := max(re.split(r"[-/,.;:—–]", word), key=len)) and len(found) > MAX_WORD:
            raise Unspeakable("long-word", f"{found[:20]!r}... has {len(found)} characters")


def _check_script(text: str) -> None:
    if text.isascii():
        return
    for character in text:
        if not character.isascii() and character.isalpha():
            name = unicodedata.name(character, "UNKNOWN").split()[0].lower()
            raise Unspeakable("script", f"it holds {character!r} ({name}); voices of English say Latin letters")


def _check_words(text: str, max_words: int) -> None:
    count = len(text.split())
    if not count:
        raise Unspeakable("empty", "there are no words in it")
    if count > max_words:
        raise Unspeakable("long", f"{count} words; {max_words} are the limit")


def _check_language(text: str) -> None:
    longer = [word for word in re.findall(r"[A-Za-z]{4,}", text) if not word.isupper()]
    mute = sum(not re.search(r"[aeiouyAEIOUY]", word) for word in longer)
    if mute >= 3 and mute > 2 / 3 * len(longer):
        raise Unspeakable("no-language", f"{mute} of {len(longer)} words have no vowel")


_QUOTED_END = re.compile(r"([.,!?])[\"')\]]+")
_BRACKETS = re.compile(r"[()\[\]{}|]")
_DASHES = re.compile(r"[ ]?[—–][ ]?|[ ]-{1,3}[ ]|--+")
_DOTS = re.compile(r"\.{2,}(?=(\s*[\"')\]]*\s*[a-z,;:])?)")
_TOKEN = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|[.,!?;:]")
_STRENGTH = {mark: rank for rank, mark in enumerate(",:;.!?")}


def punctuated(text: str) -> str:
    """Words and single marks of punctuation only, the stronger of two marks, one at the end."""
    text = _DOTS.sub(lambda m: ", " if m[1] else ". ", text)
    text = _BRACKETS.sub(" , ", _QUOTED_END.sub(r"\1 ", text))
    text = _DASHES.sub(" , ", text).replace("/", " ")
    found: list[str] = []
    for token in _TOKEN.findall(text):
        if token not in _STRENGTH:
            found.append(_calm(token))
        elif found and found[-1] not in _STRENGTH:
            found.append(token)
        elif found and _STRENGTH[token] > _STRENGTH[found[-1]]:
            found[-1] = token
    if found and found[-1] in ",:;":
        found[-1] = "."
    elif found and found[-1] not in _STRENGTH:
        found.append(".")
    return re.sub(r" (?=[.,!?;:])", "", " ".join(found))


def _calm(word: str) -> str:
    """ "sooooooo" -> "soo": no letter more than twice in a row, where there were four."""
    return re.sub(r"([A-Za-z])\1{3,}", r"\1\1", word)
