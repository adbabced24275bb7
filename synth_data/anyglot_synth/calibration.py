"""What a recogniser and a voice do when all is well: the yardstick for what is not.

A recogniser makes errors of its own, and not the same on every voice, so one threshold on word errors is too strict for
one voice and too lax for the next. `Calibration.measure` takes clips that are known to be good, some 25 a voice, and
keeps for each voice

- `errors`: the word error rate of the recogniser on it (all errors over all words), and `letters`, that over letters;
- `pace`: how long it takes for a text: seconds as a straight line over letters, syllables and inner stops, by least
  squares of ratios, and how far clips are from it (`sigma`, of the logarithm of the ratio).

Filters then ask whether a clip has so many more errors, or is so much shorter or longer, than is usual *for its voice*.
The rate that a voice was asked for is divided out. Clips of quite another kind of text need a calibration of their own.

    anyglot synth recipe.yaml --out trial --num 50       # without the asr filter; listen to some
    python -m anyglot_synth.calibration trial --out voices.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.dataset import media_of, read_items, voice_of
from anyglot_synth.dialogue import SPEECH, MediaFile
from anyglot_synth.filters.base import said_of
from anyglot_synth.filters.sound import silence_of
from anyglot_synth.recognise import Float32, Recogniser, make_recogniser
from anyglot_synth.scoring import Errors, letter_errors, normal, word_errors
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_write

FORMAT = 2
MIN_CLIPS = 8
"""Fewer of a voice say nothing about its spread."""


@dataclass(frozen=True)
class Clip:
    """A sound whose words are known: float32 `[samples]`, its sample rate, the words, who says them and how fast."""

    audio: Float32
    sample_rate: int
    words: str
    voice: str = ""
    language: str = "en"
    rate: float = 1.0


def rate_of(media: MediaFile) -> float:
    """The relative pace that the voice was asked for: 1 unless its style says otherwise."""
    style: Any = media.origin.get("style") or {}
    rate = style.get("rate", 1.0)
    return float(rate) if isinstance(rate, int | float) and rate > 0 else 1.0


def length_features(text: str, language: str = "en") -> list[float]:
    """What the length of an utterance hangs on: a constant, letters, syllables (groups of vowels), inner stops."""
    words = normal(text, language)
    return [
        1.0,
        float(len(words.replace(" ", ""))),
        float(len(re.findall("[aeiouy]+", words))),
        float(len(re.findall(r"[,;:.!?](?=\s)", text.strip()))),
    ]


@dataclass(frozen=True)
class Pace:
    """How long a voice takes.

    Args:
        weights: seconds for each of `length_features`.
        sigma: standard deviation of log(seconds / expected seconds) of good clips.
    """

    weights: tuple[float, ...]
    sigma: float

    @classmethod
    def fit(cls, texts: Sequence[str], seconds: Sequence[float], languages: Sequence[str] | None = None) -> Pace:
        """Least squares of the ratio, so that short and long clips count the same. The language of each, or English."""
        known = languages or ["en"] * len(texts)
        x_NF = np.array([length_features(text, language) for text, language in zip(texts, known, strict=True)])
        y_N = np.maximum(np.array(seconds, dtype=np.float64), 1e-3)
        weights, _, rank, _ = np.linalg.lstsq(x_NF / y_N[:, None], np.ones(len(y_N)), rcond=None)
        logs = -np.log(np.maximum(x_NF @ weights / y_N, 1e-3))
        sigma = math.sqrt(float((logs**2).sum()) / max(1, len(y_N) - int(rank)))
        return cls(tuple(round(float(w), 6) for w in weights), round(sigma, 6))

    def deviation(self, text: str, seconds: float, language: str = "en") -> float:
        """How many sigmas a clip is longer (or, below 0, shorter) than this voice takes for its text."""
        expected = max(0.05, float(np.dot(self.weights, length_features(text, language))))
        return math.log(max(seconds, 1e-3) / expected) / max(self.sigma, 0.02)


@dataclass(frozen=True)
class VoiceCalibration:
    """Of one voice: clips measured, the judge's errors over words and over letters, and the pace."""

    num_clips: int
    errors: Errors
    letters: Errors
    pace: Pace


@dataclass(frozen=True)
class Calibration:
    """Of some voices by one recogniser.

    Args:
        recogniser: its identity.
        voices: by name (`dataset.voice_of`).
    """

    recogniser: Mapping[str, Any]
    voices: Mapping[str, VoiceCalibration]

    @classmethod
    def measure(cls, recogniser: Recogniser, clips: Iterable[Clip]) -> Calibration:
        """From good clips. Raises `AnyglotError` for no clips at all, and for a voice with fewer than 8."""
        said: dict[str, list[tuple[str, float, str, Errors, Errors]]] = {}
        for clip in clips:
            heard = recogniser.transcribe([clip.audio], clip.sample_rate)[0]
            words, letters = (count(clip.words, heard, clip.language) for count in (word_errors, letter_errors))
            seconds = speech_seconds(clip.audio, clip.sample_rate) * clip.rate
            said.setdefault(clip.voice, []).append((clip.words, seconds, clip.language, words, letters))
        if not said:
            raise AnyglotError("there are no clips of a known voice; measure a dataset whose speech was made by voices")
        voices = {}
        for voice, found in sorted(said.items()):
            if len(found) < MIN_CLIPS:
                raise AnyglotError(f"voice {voice!r} has {len(found)} clips; {MIN_CLIPS} are needed, 25 are better")
            texts, lengths, languages, *errors_N = zip(*found, strict=True)
            words, letters = (sum(each, Errors(0, 0)) for each in errors_N)
            voices[voice] = VoiceCalibration(len(found), words, letters, Pace.fit(texts, lengths, languages))
        return cls(recogniser.identity(), voices)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        voices = {
            name: {
                "num_clips": v.num_clips,
                "edits": v.errors.edits,
                "words": v.errors.total,
                "wer": round(v.errors.rate, 4),
                "letter_edits": v.letters.edits,
                "letters": v.letters.total,
                "cer": round(v.letters.rate, 4),
                "pace": {"weights": list(v.pace.weights), "sigma": v.pace.sigma},
            }
            for name, v in sorted(self.voices.items())
        }
        return {"format": FORMAT, "recogniser": dict(self.recogniser), "voices": voices}

    @classmethod
    def from_dict(cls, found: Any, where: str = "calibration") -> Calibration:
        """Reads `to_dict`. Raises `AnyglotError`."""
        try:
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            voices = {
                str(name): VoiceCalibration(
                    int(v["num_clips"]),
                    Errors(int(v["edits"]), int(v["words"])),
                    Errors(int(v["letter_edits"]), int(v["letters"])),
                    Pace(tuple(map(float, v["pace"]["weights"])), float(v["pace"]["sigma"])),
                )
                for name, v in found["voices"].items()
            }
            for name, v in voices.items():
                counts = (v.num_clips, v.errors.edits, v.errors.total, v.letters.edits, v.letters.total, v.pace.sigma)
                if len(v.pace.weights) != len(length_features("")) or not all(map(math.isfinite, v.pace.weights)):
                    raise ValueError(f"weights of {name!r}")
                if not all(math.isfinite(count) and count >= 0 for count in counts):
                    raise ValueError(f"a count or sigma of {name!r}")
            return cls(dict(found["recogniser"]), voices)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AnyglotError(f"{where}: not a calibration ({error!r}); measure it again") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, atomically. Raises `AnyglotError` where the disk refuses."""
        try:
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise AnyglotError(f"{path}: cannot be written ({error.strerror}); give another file") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a file of `save`. Raises `AnyglotError`."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AnyglotError(f"{path}: cannot be read as a calibration ({error})") from error
        return cls.from_dict(found, str(path))


def speech_seconds(audio: Float32, sample_rate: int) -> float:
    """From the first sound to the last: silence before and after is not the voice's pace."""
    found = silence_of(audio, sample_rate)
    return max(0.0, len(audio) / sample_rate - found.lead - found.tail)


def clips_of(folder: str | os.PathLike[str], most: int = 40) -> Iterator[Clip]:
    """Spoken parts of ok items, up to so many of each voice; sounds of no known voice or without words are left out.

    Raises:
        DatasetError: no finished dataset, or a line of it that cannot be read.
    """
    store, counts = Store(folder), Counter[str]()
    for item in read_items(Path(folder)):
        for medium in media_of(item.dialogue):
            voice = voice_of(medium.file)
            if medium.part.modality != SPEECH or not voice or not said_of(medium.part).strip():
                continue
            counts[voice] += 1
            if counts[voice] <= most:
                language, rate = item.dialogue.language, rate_of(medium.file)
                yield Clip(*store.sound(medium.file), said_of(medium.part), voice, language, rate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: measures the voices of a dataset; see --help."""
    parser = argparse.ArgumentParser(prog="python -m anyglot_synth.calibration", description=main.__doc__)
    parser.add_argument("dataset", help="folder of a dataset whose clips are good")
    parser.add_argument("--out", required=True, help="JSON file for the asr filter")
    parser.add_argument("--recogniser", default="sphinx", help='name, or JSON such as {"engine": "hf", "path": "..."}')
    parser.add_argument("--most", type=int, default=40, help="clips of each voice")
    given = parser.parse_args(arguments)
    try:
        if os.path.isdir(given.out) or not os.access(os.path.dirname(given.out) or ".", os.W_OK):
            raise AnyglotError(f"{given.out}: cannot be written; give a file in a folder that is there")
        asked = json.loads(given.recogniser) if given.recogniser.startswith("{") else given.recogniser
        found = Calibration.measure(make_recogniser(asked), clips_of(given.dataset, given.most))
        found.save(given.out)
    except (AnyglotError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, voice in found.voices.items():
        print(f"{name:20} {voice.num_clips:4} clips  word errors {100 * voice.errors.rate:5.1f} %  "
              f"length within {100 * voice.pace.sigma:.1f} %")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
