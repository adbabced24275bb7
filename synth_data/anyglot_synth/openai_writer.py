"""`OpenAIWriter`: a language model behind any server that speaks OpenAI's chat completions: vLLM, llama.cpp, ours.

Plain HTTP of the standard library. A busy or broken server is asked again after a while, a request that is wrong is
not. Nothing that was sent or received is logged, and the key is read from the environment and kept nowhere.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anyglot_synth.dialogue import Json
from anyglot_synth.llm import Request, Writer, WriterError, cut
from anyglot_synth.seeds import rng_of

_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect stays an error."""
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class OpenAIWriter(Writer):
    """See the module.

    Args:
        model: its name on the server.
        base_url: such as `http://127.0.0.1:8000/v1`.
        key_variable: environment variable that holds the key; none is sent where it is not set.
        batch_size: requests in flight at once.
        timeout_s: of one attempt, from connecting to the last byte.
        tries: attempts per request.
        wait_s: before the second attempt; twice that before the third, and so on, up to a minute.
        max_bytes: of an answer's body.
        send_stop: whether the server knows `stop`; answers are cut here in any case.
        extra: more fields of the request, such as `{"top_p": 0.9}`.
        licence: SPDX name for what it writes.
    """

    name = "openai"

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        batch_size: int = 8,
        timeout_s: float = 120.0,
        tries: int = 5,
        wait_s: float = 1.0,
        max_bytes: int = 1 << 20,
        send_stop: bool = True,
        extra: Mapping[str, Any] | None = None,
        licence: str = "unknown",
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise WriterError(f"base_url {base_url!r}; use one that begins with http:// or https://")
        if min(batch_size, tries, max_bytes) < 1 or timeout_s <= 0 or wait_s < 0:
            raise WriterError("batch_size, tries and max_bytes must be 1 or more, timeout_s above 0, wait_s 0 or more")
        self.model, self.base_url, self.key_variable = model, base_url.rstrip("/"), key_variable
        self.batch_size, self.timeout_s, self.tries, self.wait_s = batch_size, timeout_s, tries, wait_s
        self.max_bytes, self.send_stop, self.extra, self.licence = max_bytes, send_stop, dict(extra or {}), licence

    def identity(self) -> Json:
        """Server, model and extra fields. A server does not say which weights are behind a name."""
        return {"engine": self.name, "url": self.base_url, "model": self.model, "extra": self.extra}

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Answers, all requests in flight at once."""
        if len(requests) == 1:
            return [self._answer(requests[0])]
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Request) -> str:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        if request.prefix:
            messages[-1]["content"] += f"\n\nBegin your answer with exactly these words: {request.prefix}"
        body: Json = {
            "model": self.model,
            "messages": messages,
            "seed": request.seed % (1 << 31),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            **({"stop": list(request.stop)} if request.stop and self.send_stop else {}),
            **self.extra,
        }
        for attempt in range(self.tries):
            try:
                found = json.loads(self._post(json.dumps(body).encode()))
                text = found["choices"][0]["message"]["content"]
                if not isinstance(text, str):
                    raise TypeError("the answer has no text")
                begun = request.prefix if text.startswith(request.prefix) else ""
                return begun + cut(text[len(begun) :], request.stop)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                asked = error.headers.get("Retry-After", "")
                error.close()
                if error.code not in _BUSY:
                    raise WriterError(f"{self.base_url}: {problem}; check model, key and fields") from None
            except (OSError, http.client.HTTPException) as error:
                problem, asked = f"no answer ({error!r})", ""
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise WriterError(f"{self.base_url}: not a chat completion ({error!r}); check base_url") from None
            if attempt + 1 < self.tries:
                spread = 0.5 + rng_of(request.seed, "wait", attempt).random()
                wait = min(60.0, float(asked) if asked.isdigit() else self.wait_s * 2**attempt * spread)
                time.sleep(wait)
        raise WriterError(f"{self.base_url}: {problem}, {self.tries} times; see that it runs", retryable=True)

    def _post(self, body: bytes) -> bytes:
        """The answer's body. Raises OSError, also where it takes too long; ValueError where it is too large."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url}/chat/completions"
        end = time.monotonic() + self.timeout_s
        request = urllib.request.Request(url, body, headers)
        with _OPENER.open(request, timeout=self.timeout_s) as answer:
            received = bytearray()
            while piece := answer.read1(1 << 16):
                received += piece
                if len(received) > self.max_bytes:
                    raise ValueError(f"more than {self.max_bytes} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"more than {self.timeout_s:g} s")
        return bytes(received)
