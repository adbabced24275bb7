"""Word and letter errors between what was to be said and what was heard, after one normaliser for both.

The normaliser: Unicode NFKC, lower case, apostrophes dropped (`don't` is `dont`), every other mark is a space. What
English text has in digits is read out: `3.5` three point five, `21st` twenty first, `$3.50` three dollars fifty cents,
`50%` fifty percent, `4:05` four oh five, `&` and. A whole number can be read in more than one way (`1984` is nineteen
eighty four, one thousand nine hundred eighty four, or one nine eight four), so a text with digits has up to three
readings, and the pair of readings with the fewest errors counts. Words are never turned into digits: `twenty twenty`
may be two numbers, a year or a score of eyes. An `and` within a number counts as nothing. Fillers (`uh`, `hm`) are
words like others: they are said. Digits in other languages stay digits, and spelling variants (`colour`) are errors.

Rates are of jiwer (edit distance over words or letters); rates of many clips are all errors over all words, not a mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyglot_synth.speakable.numbers import cardinal, digits, ordinal, plural, year

CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
UNITS = {"%": " percent ", "&": " and ", "+": " plus ", "=": " equals ", "°": " degrees ", "@": " at "}
_NUMBER_WORDS = "|".join(dict.fromkeys(cardinal(n).split("-")[0] for n in range(100)))
_AND = re.compile(rf"\b(hundred|thousand|million|billion|dollars?|euros?|pounds?) and (?={_NUMBER_WORDS})")
_A_HUNDRED = re.compile(r"\ba (?=(?:hundred|thousand|million|billion)\b)")
_MONEY = re.compile(r"([$€£])\s?(\d[\d,]*+)(?:\.(\d++))?(?: (hundred|thousand|million|billion|trillion)\b)?")
_TIME = re.compile(r"\b(\d{1,2}):(\d\d)\b")
_ORDINAL = re.compile(r"\b(\d{1,12})(?:st|nd|rd|th)\b")
_DECADE = re.compile(r"\b(\d{2,4})['’]?s\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_DECIMAL = re.compile(r"(?<!\d)(\d++)\.(\d++)")

Reading = Callable[[str], str]


def _whole(text: str) -> str:
    """As a quantity; with a leading zero, or longer than fifteen digits, digit by digit."""
    return digits(text) if (len(text) > 1 and text[0] == "0") or len(text) > 15 else cardinal(int(text))


def _year(text: str) -> str:
    return year(int(text)) if len(text) == 4 and text[0] != "0" else _whole(text)


def _money(found: re.Match[str]) -> str:
    (big, small), whole, parts, scale = CURRENCIES[found[1]], found[2].replace(",", ""), found[3], found[4]
    if scale or (parts and len(parts) != 2):
        amount = _whole(whole) + (f" point {digits(parts)}" if parts else "")
        return f"{amount} {scale or ''} {big}s "
    cents = int(parts or 0)
    count = int(whole[:16])  # whether it is 0, 1 or more: any number of digits would be too much for `int`
    said = f"{_whole(whole)} {big}{'s' * (count != 1)}" if count or not cents else ""
    if cents:
        said += f" {cardinal(cents)} {small if cents == 1 else 'pence' if small == 'penny' else small + 's'}"
    return said + " "


def _time(found: re.Match[str]) -> str:
    hour, minute = int(found[1]), int(found[2])
    return cardinal(hour) + ("" if not minute else f" oh {cardinal(minute)}" if minute < 10 else f" {cardinal(minute)}")


def _read_out(text: str, whole: Reading) -> str:
    """English: everything in digits as words."""
    text = _MONEY.sub(_money, text)
    text = _TIME.sub(_time, text)
    text = _THOUSANDS.sub("", text)
    text = _ORDINAL.sub(lambda found: ordinal(int(found[1])), text)
    text = _DECADE.sub(lambda found: plural(_year(found[1])), text)
    text = _DECIMAL.sub(lambda found: f" {_whole(found[1])} point {digits(found[2])} ", text)
    for mark, words in UNITS.items():
        text = text.replace(mark, words)
    return re.sub(r"[0-9]+", lambda found: f" {whole(found[0])} ", text)


def normal(text: str, language: str = "en", whole: Reading = _whole) -> str:
    """The words of a text, lower case, with single spaces (see the top of this file).

    Args:
        text: anything.
        language: BCP-47 tag; digits are read out in English.
        whole: how a whole number is read.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    if (english := language.split("-")[0].lower() == "en") and any(mark in text for mark in "0123456789%&+=°@"):
        text = _read_out(text, whole)
    text = re.sub(r"['’‘ʼ]", "", text)
    text = " ".join(re.sub(r"[\W_]+", " ", text).split())
    if english:
        text = _A_HUNDRED.sub("one ", _AND.sub(r"\1 ", text)).replace("per cent", "percent")
    return text


def readings(text: str, language: str = "en") -> list[str]:
    """The different ways to say a text: one, or up to three where it holds digits."""
    return list(dict.fromkeys(normal(text, language, whole) for whole in (_whole, _year, digits)))


@dataclass(frozen=True)
class Errors:
    """Edits needed to make what was heard into what was said, of `total` words (or letters) that were said."""

    edits: int
    total: int

    @property
    def rate(self) -> float:
        """Edits over words: above 1 where more was heard than said; of no words at all, the edits themselves."""
        return self.edits / max(1, self.total)

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.edits + other.edits, self.total + other.total)


def word_errors(said: str, heard: str, language: str = "en") -> Errors:
    """Of the best pair of readings."""
    return _best(said, heard, language, str.split)


def letter_errors(said: str, heard: str, language: str = "en") -> Errors:
    """As `word_errors`, over letters and the spaces between words: what to use where words have no spaces."""
    return _best(said, heard, language, list)


def wer(said: Sequence[str], heard: Sequence[str], language: str = "en") -> float:
    """Word error rate of many clips together."""
    return sum((word_errors(a, b, language) for a, b in zip(said, heard, strict=True)), Errors(0, 0)).rate


def cer(said: Sequence[str], heard: Sequence[str], language: str = "en") -> float:
    """Letter error rate of many clips together."""
    return sum((letter_errors(a, b, language) for a, b in zip(said, heard, strict=True)), Errors(0, 0)).rate


def _best(said: str, heard: str, language: str, cut: Callable[[str], list[str]]) -> Errors:
    import jiwer

    measure = jiwer.process_words if cut is str.split else jiwer.process_characters
    found = []
    for wanted in readings(said, language):
        for got in readings(heard, language):
            out = measure(wanted, got)
            found.append(Errors(out.substitutions + out.deletions + out.insertions, len(cut(wanted))))
    return min(found, key=lambda errors: (errors.rate, errors.total))


def missed_end(said: str, heard: str, language: str = "en") -> int:
    """Words at the end of a text after the last one that was heard right: what a voice that stopped early left out."""
    import jiwer

    found = []
    for wanted in readings(said, language):
        for got in readings(heard, language):
            chunks = jiwer.process_words(wanted, got).alignments[0]
            found.append(len(wanted.split()) - max((c.ref_end_idx for c in chunks if c.type == "equal"), default=0))
    return min(found)
