"""Melodies of nanoworld: a description is read by `nanoworld.language.parse` and played, with its MIDI file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.backends import Backend, Made
from anyglot_synth.dialogue import MUSIC, Json
from anyglot_synth.nanoworld.melody import SAMPLE_RATE, Note, notes, render, write_midi
from anyglot_synth.pictures.nanoworld import scene_of

VERSION = 1
"""Counts changes of what is played."""


class NanoworldMelodies(Backend):
    """Plays scenes at 16 kHz; loudness varies with the seed."""

    modality = MUSIC
    name = "nanoworld"
    licence = "CC0-1.0"

    def identity(self) -> Json:
        """Name and version."""
        return {"engine": self.name, "version": VERSION}

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """The melody of `style["scene"]`, if there is one, else of the description."""
        scene = scene_of(text, style)
        sound = render(scene, np.random.default_rng(seed), SAMPLE_RATE)
        return Made(sound, SAMPLE_RATE, midi=midi_bytes(notes(scene)))


def midi_bytes(played: Sequence[Note]) -> bytes:
    """A standard MIDI file of notes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.mid"
        write_midi(path, played)
        return path.read_bytes()
