"""`OpenAIVoice`: any server that has OpenAI's `/v1/audio/speech`, ours (`anyglot serve`) among them.

How a server is asked, and when again, is in `http_client.py`. It keeps no voices: their names are the user's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import soundfile as sf

from anyglot_synth.http_client import HttpClient
from anyglot_synth.voices.base import Float32, SpeechBackend
from anyglot_synth.voices.programs import SpeechError


class OpenAIVoice(SpeechBackend):
    """Asks a server for WAV files.

    Args:
        url: of the server, as of OpenAI's clients: "http://localhost:8000/v1".
        model: name of the model there.
        voices: names of voices there.
        licence: SPDX name, or the terms, of what the server makes.
        language: tag of what the voices speak, if it is one.
        api_key_env: name of the environment variable that holds the key for this server, see `http_client.py`.
        timeout_s: of one attempt. All attempts should fit into the time for an item (300 s unless a run says another).
        retries: how often a busy server is asked again.
        pause_s: before the first of these; about doubled each time.
        max_bytes: of an answer.
        seed: whether the server takes a `seed` (OpenAI's does not): then its results are taken to depend on it alone.
        version: anything that tells this model from later ones of the same name.
    """

    name: ClassVar[str] = "openai"
    max_characters = 4_000

    def __init__(
        self,
        url: str,
        model: str,
        voices: Sequence[str],
        licence: str | None = None,
        language: str | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 50.0,
        retries: int = 4,
        pause_s: float = 0.5,
        max_bytes: int = 50_000_000,
        seed: bool = False,
        version: str = "",
    ) -> None:
        super().__init__(voices, licence)
        self.client = HttpClient(url, api_key_env, timeout_s, retries + 1, pause_s, max_bytes, SpeechError)
        self.url, self.model, self.language, self.version = self.client.url, model, language, version
        self.seeded = self.deterministic = bool(seed)

    def identity(self) -> dict[str, Any]:
        """Server, model and version as they were given."""
        return {"engine": self.name, "url": self.url, "model": self.model, "version": self.version}

    def known_voices(self) -> list[dict[str, Any]]:
        """Those that were given."""
        known = {"language": self.language} if self.language else {}
        return [{"voice": name, **known} for name in self.voices or ()]

    def setup(self) -> None:
        """Checks that the key is there."""
        self.client.key()

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.find_voice(voice)
        asked: dict[str, Any] = {"model": self.model, "input": text, "voice": voice, "response_format": "wav"}
        asked |= {"speed": round(rate, 4)} if rate != 1 else {}
        asked |= {"seed": seed % 2**31} if self.seeded else {}
        answer = self.client.post("/audio/speech", json.dumps(asked).encode())
        try:
            with sf.SoundFile(io.BytesIO(answer)) as file:
                if file.frames * file.channels > self.client.max_bytes:  # what is packed may unpack to anything
                    raise SpeechError(f"{self.url} answered with {file.frames} samples: that is no utterance")
                audio, sample_rate = file.read(dtype="float32", always_2d=True), file.samplerate
        except sf.LibsndfileError as error:
            raise SpeechError(
                f"{self.url} answered with {len(answer)} bytes that are no WAV file ({error.error_string})",
                retryable=True,
            ) from error
        return np.ascontiguousarray(audio[:, 0]), sample_rate
