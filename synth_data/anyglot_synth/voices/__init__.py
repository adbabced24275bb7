"""Voices: engines that speak a text, behind one shape (`Backend`, modality "speech").

`BACKENDS` maps the names that users write to classes, which are imported when they are looked up. This file imports no
engine.
"""

from __future__ import annotations

from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.registry import Registry
from anyglot_synth.voices.programs import SpeechError

BACKENDS: Registry[Backend] = Registry(
    "speech engine",
    SpeechError,
    {
        "espeak-ng": "anyglot_synth.voices.espeak:EspeakVoice",
        "flite": "anyglot_synth.voices.flite:FliteVoice",
        "hf": "anyglot_synth.voices.hf:HFVoice",
        "kokoro": "anyglot_synth.voices.kokoro:KokoroVoice",
        "openai": "anyglot_synth.voices.openai:OpenAIVoice",
        "piper": "anyglot_synth.voices.piper:PiperVoice",
    },
    key="engine",
)
"""Name in a recipe -> class, imported on first use."""


def backend(engine: str, **settings: Any) -> Backend:
    """The engine of that name with its settings (plain YAML values; see its class).

    Raises:
        SpeechError: there is no such engine, or it has no such setting; the message names those there are.
    """
    return BACKENDS.build(engine, **settings)


__all__ = ["BACKENDS", "SpeechError", "backend"]
