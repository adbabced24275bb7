"""Captions against reference captions: the same words, and CIDEr-D.

The tokenizer, stated because every n-gram score depends on it: Unicode NFKC, lower case, typographic apostrophes made
plain; English clitics are split off (`dog's` is `dog 's`, `don't` is `do n't`, as the Penn Treebank does); a word is a
run of letters and digits with hyphens or apostrophes inside, or a number with points; everything else is left out.
Languages written without spaces come out as one word a phrase, and need spaces put in before.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS = 4
SIGMA = 6.0
FACTOR = 10.0

Ngram = tuple[str, ...]

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_WORD = re.compile(r"(?<!\S)(?:n't|'(?:s|m|d|re|ve|ll))(?!\S)|\d+(?:[.,]\d+)+|[^\W_]+(?:[-'][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a caption (see the top of this file)."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("‘", "'")
    return _WORD.findall(_CLITIC.sub(r" \1 ", text))


def same_words(candidate: str, references: Sequence[str]) -> bool:
    """Whether a caption has the very words of one of the references; of one without words, such as a sign, the very
    characters.
    """
    return any(_told(candidate) == _told(reference) for reference in references)


def _told(text: str) -> list[str]:
    return words(text) or ["", text.strip().casefold()]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, section 7): tf-idf weighted n-grams that captions share.

    n-grams of 1 to 4 words are weighted by count x log(items / items whose references have it). Per order: cosine of
    candidate and reference, the candidate's weights clipped to the reference's, times exp(-(difference in words)^2 /
    (2 x 6^2)); the mean over orders and references, times 10. 10 is a candidate that is its only reference and has four
    words or more. Papers that print 107 mean 1.07 of this scale. Words are left as they are (the paper stems them, the
    code that everybody runs does not).

    Document frequencies are of the references given here, so a score belongs to its set of items: compare models on the
    same items only, and many of them.

    Args:
        references: the reference captions of each item, one or more each; two items or more, or every n-gram is in all
            documents and weighs nothing.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        assert len(references) > 1 and all(references)
        counted = [[_counts(words(text)) for text in texts] for texts in references]
        seen = Counter(ngram for item in counted for ngram in set().union(*item))
        self._idf = {ngram: math.log(len(references) / number) for ngram, number in seen.items()}
        self._unseen = math.log(len(references))
        self._references = [[self._weigh(counts) for counts in item] for item in counted]

    def score(self, candidate: str, item: int, *, without: int | None = None) -> float:
        """CIDEr-D of a caption for an item, 0 to 10.

        Args:
            candidate: the caption.
            item: index of the item.
            without: index of a reference that does not count, such as the candidate itself.
        """
        mine = self._weigh(_counts(words(candidate)))
        against = [theirs for number, theirs in enumerate(self._references[item]) if number != without]
        return FACTOR * sum(_similarity(mine, theirs) for theirs in against) / len(against)

    def _weigh(self, counts: Counter[Ngram]) -> _Weighed:
        orders: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
        for ngram, number in counts.items():
            orders[len(ngram) - 1][ngram] = number * self._idf.get(ngram, self._unseen)
        norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in orders]
        return _Weighed(orders, norms, sum(number for ngram, number in counts.items() if len(ngram) == 1))


@dataclass(frozen=True)
class _Weighed:
    """A caption: n-gram -> weight and the norm of these, for each order; and its number of words."""

    orders: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def _counts(tokens: Sequence[str]) -> Counter[Ngram]:
    sizes = range(1, ORDERS + 1)
    return Counter(tuple(tokens[at : at + size]) for size in sizes for at in range(len(tokens) - size + 1))


def _similarity(mine: _Weighed, theirs: _Weighed) -> float:
    """The mean over orders, 0 to 1."""
    total = 0.0
    for order, others, *norms in zip(mine.orders, theirs.orders, mine.norms, theirs.norms, strict=True):
        shared = sum(min(weight, others[ngram]) * others[ngram] for ngram, weight in order.items() if ngram in others)
        total += shared / (norms[0] * norms[1]) if all(norms) else 0.0
    return total / ORDERS * math.exp(-((mine.length - theirs.length) ** 2) / (2 * SIGMA**2))
