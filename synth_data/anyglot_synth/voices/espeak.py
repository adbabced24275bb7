"""`EspeakVoice`: espeak-ng (https://github.com/espeak-ng/espeak-ng): over 100 languages, small and synthetic.

Its licence is GPL-3: it only ever runs as a program of its own. The library of the package `espeakng-loader` is
preferred to a program on the PATH, because the program seeds the noise of some voices with the time.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from anyglot_synth.voices.base import Float32, SpeechBackend, positive
from anyglot_synth.voices.programs import (
    ENGINE_TIMEOUT_S,
    SpeechError,
    engine_version,
    espeak_command,
    espeak_library,
    espeak_library_version,
    has_espeak_library,
    missing,
    run_program,
    speak_into_file,
)

RATE_WPM = 165
VARIANTS = ("", "+f2", "+f4", "+f5", "+m3", "+m7")


@cache
def _listed() -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """({name or tag in lower case: (language tag, gender)}, {variant such as "f2": gender})."""
    if has_espeak_library():
        listed = run_program([*espeak_library(), "--voices"], "listing voices")
        rows = [line.split("\t") for line in listed.splitlines()]
    elif shutil.which("espeak-ng"):
        rows = []
        for option in ("--voices", "--voices=variant"):
            for line in run_program(["espeak-ng", option], "listing voices").splitlines()[1:]:
                _, language, age_gender, name, file = line.split()[:5]
                rows.append([language, age_gender[-1].lower(), name.replace("_", " "), file])
    else:
        raise missing("espeak-ng")
    voices: dict[str, tuple[str, str]] = {}
    variants: dict[str, str] = {}
    for language, letter, name, file in rows:
        gender = "female" if letter == "f" else "male"
        if file.startswith("!v/"):
            variants[file.removeprefix("!v/")] = gender
        else:
            for key in (name.lower(), language.lower(), file.rsplit("/", 1)[-1].lower()):
                voices.setdefault(key, (language, gender))
    return voices, variants


class EspeakVoice(SpeechBackend):
    """espeak-ng, a process per text (it is not thread-safe and carries state from text to text).

    Args:
        voices: names such as "en-us", "de+f2" (a language and a variant); None takes six of `language`.
        licence: see `SpeechBackend`.
        language: tag of the voices taken without `voices`.
        timeout_s: of one text.
    """

    name: ClassVar[str] = "espeak-ng"
    licence = "unknown"  # the program's GPL-3 says nothing of what it speaks
    seeded = False
    has_pitch = True

    def __init__(
        self,
        voices: Sequence[str] | None = None,
        licence: str | None = None,
        language: str = "en-us",
        timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> None:
        super().__init__([language + variant for variant in VARIANTS] if voices is None else voices, licence)
        self.timeout_s = positive(timeout_s, "timeout_s")
        self.deterministic = has_espeak_library()

    def identity(self) -> dict[str, Any]:
        """Engine and version, and whether it is the library or the program."""
        library = has_espeak_library()
        version = espeak_library_version() if library else engine_version("espeak-ng")
        return {"engine": self.name, "version": version, "as": "library" if library else "program"}

    def known_voices(self) -> list[dict[str, Any]]:
        """Every language it has, in its basic voice and the usual variants."""
        names = sorted({language for language, _ in _listed()[0].values()})
        return [self.find_voice(name + variant) for name in names for variant in VARIANTS]

    def find_voice(self, name: str) -> dict[str, Any]:
        """What is known of a voice. Raises `SpeechError`."""
        voices, variants = _listed()
        base, _, variant = name.partition("+")
        if base.lower() not in voices:
            raise SpeechError(f"espeak-ng has no voice {base!r}; take a language such as en-us, de or fr")
        if variant and variant not in variants:
            raise SpeechError(f"espeak-ng has no variant {variant!r} of voices; it has: {', '.join(sorted(variants))}")
        language, gender = voices[base.lower()]
        return {"voice": name, "language": language, "gender": variants.get(variant, gender), "accent": language}

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.find_voice(voice)
        # Its pitch of 0 to 99 is a factor of 2 ** ((pitch - 50) / 50).
        number = min(99, max(0, round(50 + pitch * 50 / 12)))

        def command(text_path: Any, wav_path: Any) -> list[str]:
            wpm = str(round(RATE_WPM * rate))
            return espeak_command(voice, wpm, str(number), text_path, wav_path, prefer_library=True)

        doing = f"speaking {text[:60]!r} with voice {voice}"
        return speak_into_file(command, text, doing, timeout_s=self.timeout_s)
