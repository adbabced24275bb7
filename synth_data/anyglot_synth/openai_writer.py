"""`OpenAIWriter`: a language model behind any server that speaks OpenAI's chat completions: vLLM, llama.cpp, ours.

How a server is asked, and when again, is in `http_client.py`. Nothing that was sent or received is logged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anyglot_synth.dialogue import Json
from anyglot_synth.http_client import HttpClient
from anyglot_synth.llm import Request, Writer, WriterError, cut

_SECRET = re.compile(
    r"authorization|api_?key|headers?$|secret|password|credential|(access|auth|bearer)_?token|(^|_)token$|"
    r"^(auth|bearer|cookie|key|passwd)$"
)


class OpenAIWriter(Writer):
    """See the module.

    Args:
        model: its name on the server.
        base_url: such as `http://127.0.0.1:8000/v1`.
        api_key_env: environment variable that holds the key for this server, see `http_client.py`.
        batch_size: requests in flight at once.
        timeout_s: of one attempt, from connecting to the last byte.
        tries: attempts per request.
        wait_s: before the second attempt; about twice that before the third, and so on, up to a minute.
        max_bytes: of an answer's body.
        send_stop: whether the server knows `stop`; answers are cut here in any case.
        extra: more fields of the request, such as `{"top_p": 0.9}`. It is written into the data set, so keys and
            passwords are refused.
        licence: SPDX name for what it writes.
    """

    name = "openai"
    independent = True

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str | None = None,
        batch_size: int = 8,
        timeout_s: float = 120.0,
        tries: int = 5,
        wait_s: float = 1.0,
        max_bytes: int = 1 << 20,
        send_stop: bool = True,
        extra: Mapping[str, Any] | None = None,
        licence: str = "unknown",
    ) -> None:
        self.client = HttpClient(base_url, api_key_env, timeout_s, tries, wait_s, max_bytes, WriterError)
        if batch_size < 1:
            raise WriterError(f"batch_size is {batch_size}; use 1 or more")
        if found := [name for name in _names(extra or {}) if _SECRET.search(name.lower().replace("-", "_"))]:
            raise WriterError(f"extra holds {found[0]!r}, and is kept in the data set; give a key by api_key_env")
        self.model, self.base_url, self.batch_size = model, self.client.url, batch_size
        self.send_stop, self.extra, self.licence = send_stop, dict(extra or {}), licence

    def identity(self) -> Json:
        """Server, model and extra fields. A server does not say which weights are behind a name."""
        return {"engine": self.name, "url": self.base_url, "model": self.model, "extra": self.extra}

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Answers, all requests in flight at once; "" where the model says nothing (`content: null`)."""
        if len(requests) == 1:
            return [self._answer(requests[0])]
        with ThreadPoolExecutor(self.batch_size) as pool:
            asked = [pool.submit(self._answer, request) for request in requests]
        errors = [error for one in asked if (error := one.exception()) is not None]
        if errors and isinstance(errors[0], WriterError):
            errors[0].answers = {i: one.result() for i, one in enumerate(asked) if one.exception() is None}
        if errors:
            raise errors[0]
        return [one.result() for one in asked]

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
        answer = self.client.post("/chat/completions", json.dumps(body).encode())
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
            text = "" if text is None else text
            if not isinstance(text, str):
                raise TypeError("the answer has no text")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise WriterError(f"{self.base_url}: not a chat completion ({error!r}); check base_url") from None
        begun = request.prefix if text.startswith(request.prefix) else ""
        return begun + cut(text[len(begun) :], request.stop)


def _names(found: Any) -> Iterator[str]:
    """Names of all fields, inner ones too."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield str(name)
            yield from _names(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _names(value)
