"""Backends that make music of descriptions, by the names that recipes use."""

from __future__ import annotations

from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.registry import Registry
from anyglot_tokenizers.errors import AnyglotError

BACKENDS: Registry[Backend] = Registry(
    "music engine",
    AnyglotError,
    {
        "nanoworld": "anyglot_synth.music.nanoworld:NanoworldMelodies",
        "musicgen": "anyglot_synth.music.musicgen:MusicGen",
        "midi": "anyglot_synth.music.midi:MidiMusic",
        "folder": "anyglot_synth.folder:MusicFolder",
    },
    key="engine",
)
"""Name in a recipe -> class, imported on first use."""


def build_music(config: Any) -> Backend:
    """A backend from a recipe, such as `{engine: midi, path: tunes}`. Raises `AnyglotError` naming the choices."""
    return BACKENDS.make(config, "music")
