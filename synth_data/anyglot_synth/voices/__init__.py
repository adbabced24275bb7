"""Voices: engines that speak a text, behind one shape (`Backend`, modality "speech").

`BACKENDS` maps the names that users write to classes, which are imported when they are looked up. This file imports no
engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.voices.programs import SpeechError

_CLASSES = {
    "espeak-ng": "espeak:EspeakVoice",
    "flite": "flite:FliteVoice",
    "hf": "hf:HFVoice",
    "kokoro": "kokoro:KokoroVoice",
    "openai": "openai:OpenAIVoice",
    "piper": "piper:PiperVoice",
}


class _Backends(Mapping[str, type[Backend]]):
    """Engine names to classes, imported when looked up."""

    def __getitem__(self, name: str) -> type[Backend]:
        module, _, class_name = _CLASSES[name].partition(":")
        found: type[Backend] = getattr(importlib.import_module(f"anyglot_synth.voices.{module}"), class_name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


BACKENDS: Mapping[str, type[Backend]] = _Backends()


def backend(engine: str, **settings: Any) -> Backend:
    """The engine of that name with its settings (plain YAML values; see its class).

    Raises:
        SpeechError: there is no such engine, or it has no such setting; the message names those there are.
    """
    import inspect

    if engine not in BACKENDS:
        raise SpeechError(f"there is no speech engine {engine!r}; choose one of: {', '.join(BACKENDS)}")
    known = inspect.signature(BACKENDS[engine]).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise SpeechError(f"the speech engine {engine} has no setting {unknown[0]!r}; it has: {', '.join(known)}")
    try:
        return BACKENDS[engine](**settings)
    except TypeError as error:
        raise SpeechError(f"the speech engine {engine} cannot be set up so: {error}") from None


__all__ = ["BACKENDS", "SpeechError", "backend"]
