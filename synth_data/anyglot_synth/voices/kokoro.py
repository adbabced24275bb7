"""`KokoroVoice`: Kokoro-82M (https://github.com/thewh1teagle/kokoro-onnx) from a user's files.

It runs in this process by the package `kokoro-onnx` (MIT), which brings a GPL-3 package for phonemes: both are imported
only where a recipe names this engine, and no extra of ours installs them. The weights are Apache-2.0.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyglot_synth.voices.base import Float32, SpeechBackend, engine_errors, sha256_of_files
from anyglot_synth.voices.programs import SpeechError

# The first letter of a voice's name: (language, what espeak-ng calls it, accent).
_LANGUAGES = {
    "a": ("en-US", "en-us", "American"),
    "b": ("en-GB", "en-gb", "British"),
    "e": ("es", "es", None),
    "f": ("fr-FR", "fr-fr", None),
    "h": ("hi", "hi", None),
    "i": ("it", "it", None),
    "j": ("ja", "ja", None),
    "p": ("pt-BR", "pt-br", "Brazilian"),
    "z": ("zh", "cmn", None),
}
_GENDERS = {"f": "female", "m": "male"}


class KokoroVoice(SpeechBackend):
    """Kokoro on the CPU. It draws nothing. Texts are cut well below its limit of 510 phonemes.

    Args:
        model: path of `kokoro-v1.0.onnx`.
        voices_file: path of `voices-v1.0.bin`.
        voices: names such as "af_heart"; None takes all of the file.
        licence: SPDX name.
    """

    name: ClassVar[str] = "kokoro"
    licence = "Apache-2.0"
    seeded = False
    max_characters = 300

    def __init__(
        self, model: str, voices_file: str, voices: Sequence[str] | None = None, licence: str | None = None
    ) -> None:
        super().__init__(voices, licence)
        self.model, self.voices_file = Path(model), Path(voices_file)
        self._identity: dict[str, Any] | None = None
        self._names: tuple[str, ...] | None = None
        self._engine: Any = None

    def identity(self) -> dict[str, Any]:
        """The package's version and the sha256 of the files."""
        if self._identity is None:
            try:
                version = importlib.metadata.version("kokoro-onnx")
            except importlib.metadata.PackageNotFoundError:
                raise SpeechError("the package kokoro-onnx is not installed: pip install kokoro-onnx") from None
            weights = sha256_of_files([self.model, self.voices_file])
            self._identity = {"engine": self.name, "version": version, "weights": weights}
        return self._identity

    def known_voices(self) -> list[dict[str, Any]]:
        """The voices of the file, whose names tell language and gender."""
        if self._names is None:
            with engine_errors(f"{self.voices_file}: cannot be read as voices of kokoro"):
                with np.load(self.voices_file) as archive:  # never a pickle
                    self._names = tuple(sorted(archive.files))
        return [_describe(name) for name in self._names]

    def setup(self) -> None:
        """Loads the weights."""
        if self._engine is None:
            self.known_voices()
            self.identity()
            with engine_errors(f"{self.model}: cannot be loaded as kokoro"):
                from kokoro_onnx import Kokoro

                self._engine = Kokoro(str(self.model), str(self.voices_file))

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.setup()
        self.find_voice(voice)
        language = _LANGUAGES.get(voice[0], _LANGUAGES["a"])[1]
        with engine_errors(f"kokoro speaking {text[:60]!r} with voice {voice}"):
            audio, sample_rate = self._engine.create(text, voice=voice, speed=rate, lang=language)
        return np.asarray(audio, np.float32), int(sample_rate)


def _describe(name: str) -> dict[str, Any]:
    language, _, accent = _LANGUAGES.get(name[:1], (None, "", None))
    found = {"voice": name, "language": language, "gender": _GENDERS.get(name[1:2]), "accent": accent}
    return {key: value for key, value in found.items() if value}
