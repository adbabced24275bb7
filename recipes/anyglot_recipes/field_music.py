"""Chorales whose key is a digit: the music of the `field` recipe.

A chorale ends on a chord whose lowest note is the tone that it is in. Digit d stands for the key d semitones above C:
the last seconds of each chorale (a MIDI file) are transposed into ten keys and played with the timbres of nanoworld.
This file reads and plays; it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anyglot_recipes.field_voices import LEVEL, SAMPLE_RATE, WORDS
from anyglot_synth.nanoworld.melody import Note, read_midi, waveform
from anyglot_tokenizers.errors import ManifestError

SECONDS = 4.0
INSTRUMENTS = ("clarinet", "strings")  # not the flute, nearly a sine: its keys are lost in the codec (docs/log.md)


@dataclass(frozen=True)
class Chorale:
    """The last seconds of a chorale, in the key of a digit."""

    digit: int
    name: str
    notes: tuple[Note, ...]


def read_chorales(folder: Path) -> list[tuple[bytes, list[Chorale]]]:
    """(bytes of the file, its end in the ten keys) of each MIDI file of a folder.

    Raises:
        ManifestError: there are none, or one has no notes.
        MediaError: a damaged file.
    """
    found = []
    for path in sorted(folder.glob("*.mid")):
        notes = read_midi(path, otherwise="strings")
        if not notes:
            raise ManifestError(f"{path}: a MIDI file without notes; remove it")
        found.append((path.read_bytes(), in_ten_keys(path.stem, notes)))
    if not found:
        raise ManifestError(f"{folder}: no MIDI files (*.mid) of chorales; set --data.root to the folder with the data")
    return found


def in_ten_keys(name: str, notes: Sequence[Note]) -> list[Chorale]:
    """The end of a piece in the keys of the digits, moved by six semitones at most."""
    end = max(note.start_s + note.duration_s for note in notes)
    last = [note for note in notes if note.start_s + note.duration_s > end - 0.05]
    tonic = min(note.midi_pitch for note in last) % 12
    start = end - SECONDS
    kept = []
    for note in notes:
        if note.start_s + note.duration_s > start + 0.05:
            begins = max(note.start_s - start, 0.0)
            kept.append(replace(note, start_s=begins, duration_s=note.start_s + note.duration_s - start - begins))
    return [
        Chorale(digit, name, tuple(replace(n, midi_pitch=n.midi_pitch + (digit - tonic + 6) % 12 - 6) for n in kept))
        for digit in range(len(WORDS))
    ]


def play(chorale: Chorale, rng: np.random.Generator | None = None) -> np.ndarray:
    """Mono float32 at 16 kHz, `SECONDS` long.

    `rng` chooses the instrument, how loud each note is, and up to 0.1 s of delay; without it the instrument depends on
    name and key alone.
    """
    instrument = INSTRUMENTS[sum(chorale.name.encode(), chorale.digit) % len(INSTRUMENTS)]
    delay = 0
    if rng is not None:
        instrument, delay = str(rng.choice(INSTRUMENTS)), int(rng.integers(0, SAMPLE_RATE // 10))
    audio = np.zeros(int(SECONDS * SAMPLE_RATE), np.float32)
    for note in chorale.notes:
        wave = waveform(instrument, note.midi_pitch, round(note.duration_s, 3), SAMPLE_RATE)
        start = round(note.start_s * SAMPLE_RATE) + delay
        gain = 1.0 if rng is None else 10 ** (rng.uniform(-3, 3) / 20)
        audio[start : start + len(wave)] += np.float32(gain) * wave[: max(len(audio) - start, 0)]
    level = LEVEL / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
    return (audio * min(level, 0.95 / max(float(np.abs(audio).max()), 1e-6))).astype(np.float32)
