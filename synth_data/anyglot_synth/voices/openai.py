"""`OpenAIVoice`: any server that has OpenAI's `/v1/audio/speech`, ours (`anyglot serve`) among them.

The server's answers are trusted in nothing: their size and time are bounded. Busy servers (429, 5xx) are asked again,
after what they ask for or ever longer pauses. It keeps no voices: their names are the user's.
"""

from __future__ import annotations

import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, ClassVar

import numpy as np
import soundfile as sf

from anyglot_synth.voices.base import Float32, SpeechBackend, positive
from anyglot_synth.voices.programs import SpeechError

MAX_PAUSE_S = 30.0
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}


class OpenAIVoice(SpeechBackend):
    """Asks a server for WAV files.

    Args:
        url: of the server, as of OpenAI's clients: "http://localhost:8000/v1".
        model: name of the model there.
        voices: names of voices there.
        licence: SPDX name, or the terms, of what the server makes.
        language: tag of what the voices speak, if it is one.
        api_key_env: name of the environment variable that holds the key, if the server wants one.
        timeout_s: between any two signs of life of the server, and ten times that for a whole answer.
        retries: how often a busy server is asked again.
        pause_s: before the first of these; doubled each time.
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
        timeout_s: float = 60.0,
        retries: int = 4,
        pause_s: float = 0.5,
        max_bytes: int = 50_000_000,
        seed: bool = False,
        version: str = "",
    ) -> None:
        super().__init__(voices, licence)
        parsed = urllib.parse.urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.username or parsed.query:
            raise SpeechError(f"url of a speech server is {url!r}; give http(s)://host:port/v1, the key by api_key_env")
        self.url, self.model, self.language, self.version = url.rstrip("/"), model, language, version
        self.api_key_env = api_key_env
        self.timeout_s, self.pause_s = positive(timeout_s, "timeout_s"), positive(pause_s, "pause_s")
        self.retries, self.max_bytes = int(retries), int(positive(max_bytes, "max_bytes"))
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
        self._headers()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "audio/wav"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "")
            if not key.strip():
                raise SpeechError(f"the environment variable {self.api_key_env} holds no key for {self.url}; set it")
            headers["Authorization"] = f"Bearer {key.strip()}"
        return headers

    def _speak(self, text: str, voice: str, rate: float, pitch: float, seed: int) -> tuple[Float32, int]:
        self.find_voice(voice)
        asked: dict[str, Any] = {"model": self.model, "input": text, "voice": voice, "response_format": "wav"}
        asked |= {"speed": round(rate, 4)} if rate != 1 else {}
        asked |= {"seed": seed % 2**31} if self.seeded else {}
        answer = self._ask(json.dumps(asked).encode())
        try:
            audio, sample_rate = sf.read(io.BytesIO(answer), dtype="float32", always_2d=True)
        except sf.LibsndfileError as error:
            raise SpeechError(
                f"{self.url} answered with {len(answer)} bytes that are no WAV file ({error.error_string})",
                retryable=True,
            ) from error
        return np.ascontiguousarray(audio[:, 0]), sample_rate

    def _ask(self, body: bytes) -> bytes:
        headers, pause = self._headers(), self.pause_s
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(f"{self.url}/audio/speech", body, headers, method="POST")
            wait = pause
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    return self._read(answer)
            except urllib.error.HTTPError as error:
                problem = f"answered {error.code}: {_message(error)}"
                if error.code not in _AGAIN:
                    raise SpeechError(f"{self.url} {problem}") from None
                wait = max(pause, _seconds(error.headers.get("Retry-After")))
            except (OSError, HTTPException) as error:  # refused, cut off, no sign of life; URLError is one of these
                problem = f"cannot be reached or broke off: {getattr(error, 'reason', None) or error!r}"
            if attempt < self.retries:
                time.sleep(min(wait, MAX_PAUSE_S))
                pause *= 2
        raise SpeechError(f"{self.url} {problem} ({self.retries + 1} attempts)", retryable=True)

    def _read(self, answer: Any) -> bytes:
        end, pieces, size = time.monotonic() + 10 * self.timeout_s, [], 0
        while piece := answer.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > self.max_bytes:
                raise SpeechError(f"{self.url} answered with more than {self.max_bytes} bytes: that is no utterance")
            if time.monotonic() > end:
                raise SpeechError(f"{self.url} did not finish within {10 * self.timeout_s:g} s", retryable=True)
        if answer.length:  # of what Content-Length promised, this is missing
            raise OSError(f"{answer.length} bytes of the answer are missing")
        return b"".join(pieces)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says in an error's body, shortened."""
    try:
        text = error.read(2_000).decode(errors="replace")
    except (OSError, HTTPException):
        return "(no message)"
    try:
        told = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):  # not OpenAI's shape: the body as it is
        told = text
    return str(told.get("message", told) if isinstance(told, dict) else told)[:300]


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
