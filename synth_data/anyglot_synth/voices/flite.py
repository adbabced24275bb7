"""`FliteVoice`: the small English voices of flite (https://github.com/festvox/flite, CMU licence)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from anyglot_synth.voices.base import Float32, SpeechBackend, positive
from anyglot_synth.voices.programs import (
    ENGINE_TIMEOUT_S,
    SpeechError,
    engine_version,
    flite_command,
    has_flite,
    missing,
    run_program,
    speak_into_file,
)

_KNOWN = {
    "awb": {"language": "en-GB", "gender": "male", "accent": "Scottish"},
    "kal": {"language": "en-US", "gender": "male", "accent": "American"},
    "kal16": {"language": "en-US", "gender": "male", "accent": "American"},
    "rms": {"language": "en-US", "gender": "male", "accent": "American"},
    "slt": {"language": "en-US", "gender": "female", "accent": "American"},
}
_CLOCK = "awb_time"  # can tell the time and nothing else


@cache
def _installed() -> tuple[str, ...]:
    if not has_flite():
        raise missing("flite")
    listed = run_program(["flite", "-lv"], "listing its voices").partition(":")[2].split()
    return tuple(sorted(set(listed) - {_CLOCK}))


class FliteVoice(SpeechBackend):
    """Flite, a process per text. Without `voices`: awb, rms and slt, its best.

    Args:
        voices: of those that `flite -lv` lists.
        licence: see `SpeechBackend`.
        timeout_s: of one text.
    """

    name: ClassVar[str] = "flite"
    licence = "Festival"  # SPDX name of the terms of flite and its voices
    seeded = False

    def __init__(
        self, voices: Sequence[str] | None = None, licence: str | None = None, timeout_s: float = ENGINE_TIMEOUT_S
    ) -> None:
        super().__init__(("awb", "rms", "slt") if voices is None else voices, licence)
        self.timeout_s = positive(timeout_s, "timeout_s")

    def identity(self) -> dict[str, Any]:
        """Engine and version."""
        return {"engine": self.name, "version": engine_version("flite")}

    def known_voices(self) -> list[dict[str, Any]]:
        """Those of this machine's flite."""
        return [{"voice": name, **_KNOWN.get(name, {})} for name in _installed()]

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        if voice not in _installed():  # flite itself would take its default voice
            raise SpeechError(f"flite has no voice {voice!r}; it has: {', '.join(_installed())}")
        return speak_into_file(
            lambda text_path, wav_path: flite_command(voice, f"{1 / rate:.4f}", text_path, wav_path),
            text,
            f"speaking {text[:60]!r} with voice {voice}",
            timeout_s=self.timeout_s,
        )
