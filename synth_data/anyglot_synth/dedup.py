"""Near-duplicates of texts in a stream: MinHash signatures, one table of bands, memory that does not grow.

Two texts are alike when their sets of character n-grams overlap (Jaccard similarity). A signature of 128 minima
estimates that (Broder 1997: On the resemblance and containment of documents); texts that agree in a band of 4
minima are compared. Tables are fixed arrays in which a newer text takes an older one's place, so a stream of any length
takes the same memory and the last `capacity` texts are remembered; `tests/synth_data/test_dedup.py` measures what is
found. Answers depend on the order of the stream and nothing else: run it where the order is known (in the source), not
in workers. Embeddings, and other languages' notion of a word, are not its business.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.dialogue import Dialogue
from anyglot_tokenizers.errors import AnyglotError

BANDS, ROWS = 32, 4
NUM_HASHES = BANDS * ROWS
VERSION = 2
"""Counts changes of what is called alike."""


def normal(text: str) -> str:
    """Lower-case letters and digits (of any script) with single spaces: what is compared."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def shingles(text: str, n: int = 5, about: str = "") -> NDArray[np.uint64]:
    """Hashes [at least 1] of the distinct character n-grams of a text; a shorter text is one gram.

    Texts that are about different things (`about`, any string) have no gram in common.
    """
    letters = np.frombuffer(normal(text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(letters) < n:
        letters = np.concatenate([letters, np.zeros(n - len(letters), np.uint64)])
    start = int.from_bytes(hashlib.sha256(about.encode()).digest()[:8], "little") if about else 0
    hashes = np.full(len(letters) - n + 1, start, np.uint64)
    for i in range(n):
        hashes = _mix(hashes ^ letters[i : len(letters) - n + 1 + i])
    return np.unique(hashes)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection that spreads every bit (the finaliser of splitmix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_FACTORS = _mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64)) | np.uint64(1)
_OFFSETS = _mix(np.arange(NUM_HASHES + 1, 2 * NUM_HASHES + 1, dtype=np.uint64))


def signature(text: str, n: int = 5, about: str = "") -> NDArray[np.uint32]:
    """128 minima [128]: the share of equal ones of two texts estimates how alike they are."""
    grams, found = shingles(text, n, about)[:, None], np.full(NUM_HASHES, 2**32 - 1, np.uint32)
    for i in range(0, len(grams), 4096):  # a long text would take 1 kB for each letter
        mixed = grams[i : i + 4096] * _FACTORS + _OFFSETS  # wraps around: multiply and shift
        found = np.minimum(found, (mixed >> np.uint64(32)).astype(np.uint32).min(axis=0))
    return found


@dataclass(frozen=True)
class Match:
    """An earlier text (its number in the stream, from 0) and how alike it is, 0 to 1."""

    number: int
    similarity: float


class Deduplicator:
    """Remembers texts; finds an earlier one that is much alike.

    Args:
        threshold: least similarity of a duplicate, above 0 and up to 1.
        n: letters of a gram; 3 suits titles and topics, 5 sentences and longer.
        capacity: texts remembered; older ones are forgotten. Memory is 1 kB for each, whatever is seen.

    Raises:
        AnyglotError: a threshold, n or capacity that cannot be.
    """

    def __init__(self, threshold: float = 0.7, n: int = 5, capacity: int = 1 << 16) -> None:
        if not 0 < threshold <= 1 or n < 1 or capacity < 1:
            raise AnyglotError(
                f"threshold {threshold}, n {n}, capacity {capacity}: use a threshold above 0 and up to 1, n and "
                "capacity of 1 or more"
            )
        self.threshold, self.n, self.capacity = threshold, n, capacity
        self.count = 0
        """Texts remembered since the beginning."""
        self._mask = np.uint64((1 << (2 * capacity - 1).bit_length()) - 1)
        self._signatures = np.zeros((capacity, NUM_HASHES), np.uint32)
        self._tables = np.zeros((BANDS, int(self._mask) + 1), np.int64)  # number + 1 of the last text; 0: none
        self._numbers = np.zeros(capacity, np.int64)  # of the text in the stream
        self._seen = 0

    def add(self, text: str, about: str = "") -> Match | None:
        """The most alike earlier text about the same, or None, in which case this one is remembered."""
        number, self._seen = self._seen, self._seen + 1
        made = signature(text, self.n, about)
        bands = np.zeros(BANDS, np.uint64)
        for i in range(ROWS):
            bands = _mix(bands ^ made.reshape(BANDS, ROWS)[:, i])
        slots = (np.arange(BANDS), (bands & self._mask).astype(np.int64))
        found = np.unique(self._tables[slots]) - 1
        found = found[(found >= 0) & (found >= self.count - self.capacity)]
        if len(found):
            similarity = (self._signatures[found % self.capacity] == made).mean(axis=1)
            best = int(similarity.argmax())
            if similarity[best] >= self.threshold:
                return Match(int(self._numbers[found[best] % self.capacity]), float(similarity[best]))
        place = self.count % self.capacity
        self._signatures[place], self._numbers[place] = made, number
        self.count += 1
        self._tables[slots] = self.count
        return None


def words_of(dialogue: Dialogue) -> str:
    """All words of a dialogue: what makes two dialogues near-duplicates."""
    return " ".join(part.text for turn in dialogue.turns for part in turn.parts)


def given_of(dialogue: Dialogue) -> str:
    """The files that came with a dialogue: with others, equal words are no near-duplicates."""
    found = [part.media for turn in dialogue.turns for part in turn.parts if part.media is not None]
    return " ".join(media.sha256 for media in found if media.origin.get("given"))
