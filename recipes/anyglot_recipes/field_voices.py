"""Digits spoken by synthetic voices: more speakers for what the `field` recipe hears with, where engines are installed.

flite and espeak-ng are programs of their own; without them the recipe goes on with the human speakers alone, and says
so. Nothing here is trained on and nothing reaches the model's own voice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from anyglot_synth.voices.base import SpeechBackend
from anyglot_synth.voices.espeak import EspeakVoice
from anyglot_synth.voices.flite import FliteVoice
from anyglot_synth.voices.programs import SpeechError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLE_RATE = 16_000
LEVEL = 0.08
FLITE_RATES = (1.0, 1.3)
ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbcwmd")
VARIANTS = ("", *(f"+f{i}" for i in range(1, 6)), *(f"+m{i}" for i in range(1, 9)))
OTHERS = [
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Annie",
    "Denis",
    "Diogo",
    "Gene",
    "Gene2",
    "Henrique",
    "Hugo",
    "Jacky",
    "Lee",
    "Marco",
    "Mario",
    "Michael",
    "Mike",
    "Reed",
    "adam",
    "anika",
    "announcer",
    "antonio",
    "aunty",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "grandma",
    "grandpa",
    "gustave",
    "ian",
    "iven",
    "iven2",
    "john",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "linda",
    "marcelo",
    "max",
    "michel",
    "miguel",
    "norbert",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph",
    "travis",
    "victor",
    "zac",
]
"""Variants of espeak-ng that sound like people, more or less."""


@dataclass
class Voices:
    """Spoken digits: mono float32 at 16 kHz, of one level."""

    digits: list[int]
    audio: list[np.ndarray]


def _styles(rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str | float]]]:
    """(engine, style) of every clip of one word."""
    for voice in ("awb", "kal", "kal16", "rms", "slt"):
        for rate in FLITE_RATES:
            yield "flite", {"voice": voice, "rate": rate}
    for base, names in ((ACCENTS, VARIANTS), (ACCENTS[:1], tuple(f"+{name}" for name in OTHERS))):
        for accent in base:
            for name in names:
                if rng.random() < 0.5:  # half of the voices for each word: as many speakers for half of the time
                    rate, pitch = float(rng.uniform(0.8, 1.3)), float(rng.uniform(-4, 4))
                    yield "espeak", {"voice": accent + name, "rate": rate, "pitch": pitch}


def write_voices(folder: Path, say: Callable[[str], None], seed: int = 0) -> None:
    """Speak every digit in every voice there is and store it as `voices.npz`."""
    rng = np.random.default_rng([seed, 31])
    engines: dict[str, SpeechBackend] = {"flite": FliteVoice(), "espeak": EspeakVoice()}
    lacking: set[str] = set()
    digits, audio = [], []
    for digit, word in enumerate(WORDS):
        for engine, style in _styles(rng):
            voice = f"{engine} {style['voice']}"
            if voice in lacking:
                continue
            try:
                made = engines[engine].make(word, style, seed)
            except SpeechError as error:
                lacking.add(voice)
                say(f"without {voice}: {error}")
                continue
            assert made.sample_rate is not None
            sound = soxr.resample(made.array.reshape(-1), made.sample_rate, SAMPLE_RATE).astype(np.float32)
            digits.append(digit)
            audio.append((sound * (LEVEL / max(float(np.sqrt(np.mean(sound**2))), 1e-6))).clip(-1, 1))
    say(f"{len(digits)} digits by synthetic voices")
    lengths = np.array([len(a) for a in audio], np.int64)
    joined = np.concatenate([*audio, np.zeros(0, np.float32)]).astype(np.float16)
    np.savez(folder / "voices.npz", digits=np.array(digits, np.int64), lengths=lengths, audio=joined)


def read_voices(folder: Path) -> Voices:
    """What `write_voices` stored."""
    with np.load(folder / "voices.npz") as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        audio = np.split(stored["audio"].astype(np.float32), ends) if len(stored["digits"]) else []
        return Voices(stored["digits"].tolist(), audio)
