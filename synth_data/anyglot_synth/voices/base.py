"""`SpeechBackend`: what all speech engines share: styles, checks of the text, and checks of what came out.

A style is `{"voice": "slt", "rate": 1.1, "pitch": -2}`: the name of a voice, how fast (1 is the voice's own pace) and
how high (semitones above its own). An engine that knows no pitch gets it by playing what it says faster or slower, and
having it speak slower or faster by as much: the voice then sounds like that of a smaller or larger person.

This file knows no engine, and does not split long texts (`longtext.py`).
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.backends import Backend, Made, silent
from anyglot_synth.voices.programs import SpeechError

Float32 = NDArray[np.float32]

RATES = (0.5, 2.0)
PITCHES = (-12.0, 12.0)


class SpeechBackend(Backend):
    """An engine with voices. Subclasses say what there is in `known_voices` and speak in `_speak`.

    Args:
        voices: names of the voices to use; None takes those of `known_voices`.
        licence: SPDX name of the licence of what it says; None takes what the engine is known for.

    Raises:
        SpeechError: `voices` is no list of names.
    """

    modality: ClassVar[str] = "speech"
    max_characters: int = 1_000
    """Of a text that it speaks well at once."""
    has_rate: bool = True
    """Whether it can speak faster and slower."""
    has_pitch: bool = False
    """Whether it can itself speak higher and lower."""

    def __init__(self, voices: Sequence[str] | None = None, licence: str | None = None) -> None:
        if voices is not None and (isinstance(voices, str) or not voices or not all(map(_is_name, voices))):
            raise SpeechError(f"voices of {self.name} is {voices!r}; give a list of names")
        self.voices = None if voices is None else tuple(voices)
        if licence is not None:
            self.licence = licence

    @abstractmethod
    def known_voices(self) -> list[dict[str, Any]]:
        """Voices that a user would choose from: `voice`, and where known `language` (BCP-47), `gender`, `accent`."""

    def find_voice(self, name: str) -> dict[str, Any]:
        """What is known of a voice. Raises `SpeechError`, naming those there are."""
        known = self.known_voices()
        for voice in known:
            if voice["voice"] == name:
                return voice
        names = ", ".join(str(voice["voice"]) for voice in known[:40]) or "none"
        raise SpeechError(f"{self.name} has no voice {name!r}; it has: {names}")

    def styles(self) -> list[Mapping[str, Any]]:
        """The voices chosen, with what is known of them. Raises `SpeechError` for an unknown one."""
        if self.voices is None:
            return list(self.known_voices())
        return [self.find_voice(name) for name in self.voices]

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """Speaks a text.

        Args:
            text: plain words and punctuation.
            style: `voice`, and if wanted `rate` (0.5 to 2) and `pitch` (-12 to 12 semitones).
            seed: of engines that draw.

        Raises:
            SpeechError: nothing to say, an unknown voice, an impossible style, or a result that cannot be speech.
        """
        text = check_text(text)
        voice, rate, pitch = self._check_style(style)
        factor = 1.0 if self.has_pitch else 2 ** (pitch / 12)
        audio, sample_rate = self._speak(text, voice, rate / factor if self.has_rate else rate, pitch, seed)
        sample_rate = round(sample_rate * factor)
        problem = problem_of_speech(audio, sample_rate, text, rate)
        if problem:  # an engine that always says the same is not asked again
            doing = f"{self.name} speaking {text[:60]!r} with voice {voice}"
            raise SpeechError(f"{doing}: it {problem}", retryable=not self.deterministic)
        return Made(audio, sample_rate)

    @abstractmethod
    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        """(float32 `[samples]`, sample rate) of a checked text. `pitch` matters only where `has_pitch`."""

    def _check_style(self, style: Mapping[str, Any]) -> tuple[str, float, float]:
        unknown = sorted(set(style) - {"voice", "rate", "pitch"})
        if unknown or not _is_name(style.get("voice")):
            raise SpeechError(f"style {dict(style)!r} of {self.name}: give voice, and if wanted rate and pitch")
        rate, pitch = style.get("rate", 1.0), style.get("pitch", 0.0)
        for name, value, (low, high) in (("rate", rate, RATES), ("pitch", pitch, PITCHES)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise SpeechError(f"{name} of a voice is {value!r}; give a number from {low:g} to {high:g}")
        if rate != 1 and not self.has_rate:
            raise SpeechError(f"{self.name} speaks at its own pace only; leave out rate {rate}")
        return str(style["voice"]), float(rate), float(pitch)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not value.startswith("-") and "\0" not in value


def check_text(text: str) -> str:
    """The text with single spaces. Raises `SpeechError` where there is nothing that could be said."""
    text = " ".join(text.split())
    if "\0" in text or not any(map(str.isalnum, text)):
        raise SpeechError(f"cannot speak {text!r}: give at least one word")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SpeechError(f"cannot speak {text[:60]!r}: it is no valid Unicode") from None
    return text


def most_seconds(text: str, rate: float = 1.0) -> float:
    """No voice needs longer for a text: some five times a calm pace; digits and ideographs count as syllables."""
    slow = sum(c.isdigit() or unicodedata.east_asian_width(c) in "WF" for c in text)
    symbols = sum(not c.isalnum() and not c.isspace() for c in text)
    return (5.0 + 0.3 * len(text) + 0.7 * slow + 0.5 * symbols) / rate


def problem_of_speech(audio: Float32, sample_rate: int, text: str, rate: float) -> str:
    """Why this cannot be that text spoken: wrong shape, not finite, silence, far too long; or nothing."""
    if audio.ndim != 1 or audio.dtype != np.float32 or sample_rate <= 0:
        return f"made {audio.dtype}{list(audio.shape)} at {sample_rate} Hz instead of one channel of sound"
    if not np.isfinite(audio).all():
        return "made samples that are no numbers"
    if silent(audio):
        return "made only silence; give it words it can pronounce"
    seconds, most = len(audio) / sample_rate, most_seconds(text, rate)
    return (
        f"made {seconds:.0f} s of sound for {len(text)} characters, {most:.0f} s are the most" if seconds > most else ""
    )


@contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Whatever an engine that runs in this process raises becomes a `SpeechError`."""
    try:
        yield
    except SpeechError:
        raise
    except ImportError as error:
        raise SpeechError(f"{doing}: the package {error.name} is not installed: pip install {error.name}") from error
    except Exception as error:
        raise SpeechError(f"{doing}: {type(error).__name__}: {error}") from error


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Of the bytes of files in order, 64 hex digits. Raises `SpeechError` where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SpeechError(f"{path}: cannot be read ({error.strerror}); give the path of a voice's file") from error
    return digest.hexdigest()


def positive(value: Any, name: str) -> float:
    """A setting that is a number above 0. Raises `SpeechError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SpeechError(f"{name} is {value!r}; give a number above 0")
    return float(value)
