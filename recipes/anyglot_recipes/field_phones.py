"""Phones of people whose clips have no transcripts, as pocketsphinx hears them, with their times.

More speakers for what the `field` recipe hears with: three people say its digits, and hundreds read books. pocketsphinx
writes their words down and aligns them; its phones are what the tokenizer learns to tell apart (as HuBERT learns the
units of a teacher, arXiv 2106.07447). The teacher errs, and nobody corrects it. Nothing is trained here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyglot_recipes.field_voices import SAMPLE_RATE
from anyglot_synth.recognise import SphinxRecogniser
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write

STEP = SAMPLE_RATE // 100
"""Samples of a frame that the times of phones count."""
PART = 10
"""Clips that a process hears before it gives back what it heard."""
SILENCE = "SIL"

LEXICON: dict[str, tuple[tuple[str, ...], ...]] = {
    word: tuple(tuple(said.split()) for said in spelt)
    for word, spelt in {
        "zero": ("Z IH R OW", "Z IY R OW"),
        "one": ("W AH N",),
        "two": ("T UW",),
        "three": ("TH R IY",),
        "four": ("F AO R",),
        "five": ("F AY V",),
        "six": ("S IH K S",),
        "seven": ("S EH V AH N",),
        "eight": ("EY T",),
        "nine": ("N AY N",),
    }.items()
}
"""The digits' phones (ARPAbet)."""

Word = tuple[str, list[tuple[str, int, int]]]
"""A word, and (phone, first frame, frames) of each of its phones."""


def _hear(clips: Sequence[np.ndarray]) -> list[list[Word]]:
    recogniser = SphinxRecogniser()
    recogniser.setup()
    return [recogniser.align(clip) for clip in clips]


def write_phones(clips: Sequence[np.ndarray], folder: Path) -> None:
    """Have pocketsphinx hear mono clips at 16 kHz and store what it heard as `phones.json`, a list of words a clip.

    Raises:
        BackendError: pocketsphinx is not installed.
    """
    heard: list[list[Word]] = []
    parts = [clips[start : start + PART] for start in range(0, len(clips), PART)]
    with ProcessPoolExecutor(
        max(1, min(os.cpu_count() or 1, len(parts))), multiprocessing.get_context("spawn")
    ) as pool:
        for found in pool.map(_hear, parts):
            heard += found
    with atomic_write(folder / "phones.json") as temporary:
        temporary.write_text(json.dumps(heard))


@dataclass
class Phones:
    """What `read_phones` gives.

    Args:
        names: of phones, silence first.
        clips: audio, and the phone of each 10 ms, int64 `[t]`, as a place in `names`; those in which words were heard.
    """

    names: list[str]
    clips: list[tuple[np.ndarray, np.ndarray]]


def read_phones(folder: Path, clips: Sequence[np.ndarray]) -> Phones:
    """What `write_phones` stored about these clips.

    Raises:
        ManifestError: it was about other clips.
    """
    heard: list[list[Word]] = json.loads((folder / "phones.json").read_text())
    if len(heard) != len(clips):
        raise ManifestError(
            f"{folder / 'phones.json'}: phones of {len(heard)} clips, but there are {len(clips)}; remove the folder "
            "and what was trained after it, or choose another --run_dir"
        )
    others = {phone for words in heard for _, phones in words for phone, _, _ in phones}
    others |= {phone for spelt in LEXICON.values() for phones in spelt for phone in phones}
    names = [SILENCE, *sorted(others - {SILENCE})]
    place = {name: i for i, name in enumerate(names)}
    found = Phones(names, [])
    for clip, words in zip(clips, heard, strict=True):
        if not words:
            continue
        label_t = np.zeros(-(-len(clip) // STEP), np.int64)
        for _, phones in words:
            for phone, start, frames in phones:
                label_t[start : start + frames] = place[phone]
        found.clips.append((clip, label_t))
    return found


def align(log_NP: np.ndarray, phones: Sequence[int]) -> tuple[float, list[int]]:
    """The likeliest path through `phones`, each at least once and in this order, by log probabilities `[N, phones]`.

    The first and the last may be left out (silence around a word). Viterbi's algorithm.

    Returns:
        Its log probability, and the phone of each of the N places. With fewer places than phones some are left out, and
        the probability is of no use (-1e9).
    """
    emitted_NS = log_NP[:, list(phones)]
    score_S = np.full(len(phones), -1e9)
    score_S[:2] = emitted_NS[0, :2]
    moved_NS = np.zeros(emitted_NS.shape, bool)
    for place in range(1, len(emitted_NS)):
        before_S = np.concatenate([[-1e9], score_S[:-1]])
        moved_NS[place] = before_S > score_S
        score_S = np.maximum(score_S, before_S) + emitted_NS[place]
    state = len(phones) - 1 - int(score_S[-2] > score_S[-1])
    total, path = float(score_S[state]), []
    for place in range(len(emitted_NS) - 1, -1, -1):
        path.append(phones[state])
        state -= int(moved_NS[place, state])
    return total, path[::-1]
