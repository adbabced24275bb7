"""Text -> what a voice can say: `speakable(text)` gives `Spoken` or `Dropped`; `SpeakableStage` is its stage."""

from __future__ import annotations

from anyglot_synth.speakable.stage import SpeakableStage
from anyglot_synth.speakable.text import Dropped, Limits, Spoken, speakable

__all__ = ["Dropped", "Limits", "SpeakableStage", "Spoken", "speakable"]
