"""Backends that make music of descriptions, by the names that recipes use."""

from __future__ import annotations

from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.engines import build

BACKENDS = {
    "nanoworld": "anyglot_synth.music.nanoworld:NanoworldMelodies",
    "musicgen": "anyglot_synth.music.musicgen:MusicGen",
    "midi": "anyglot_synth.music.midi:MidiMusic",
    "folder": "anyglot_synth.folder:MusicFolder",
}


def build_music(config: Any) -> Backend:
    """A backend from a recipe, such as `{engine: midi, path: tunes}`. Raises `AnyglotError` naming the choices."""
    backend: Backend = build(BACKENDS, config, "music")
    return backend
