"""`HttpClient`: how voices, recognisers and writers ask a server that speaks OpenAI's API. Its answers are not trusted.

Redirects are not followed, since they would carry the key and the data to another host; the size of an answer and the
time for one are bounded, but for a server that trickles its headers: of these only each silence is. Busy servers and
broken lines are tried again after ever longer pauses, bad requests are not.

A key is sent only to the server that it is for: to a URL beside which the user named the variable that holds it, or,
where none is named, `OPENAI_API_KEY` to https://api.openai.com alone. A named key also goes over plain http, where
anyone on the way can read it: use https for servers that are not on this machine. Proxies of the environment are used,
but not for this machine. Keys are read when they are sent, and kept, logged and told nowhere: where a server's message
repeats one, it becomes "***".
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from anyglot_synth.backends import BackendError
from anyglot_synth.seeds import rng_of

BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_PAUSE_S = 60.0
OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect stays an error."""
        return None


@dataclass(frozen=True)
class HttpClient:
    """Asks one server.

    Args:
        url: such as `https://host:port/v1`, without user name, password, query or fragment. A slash at its end goes.
        key_env: environment variable with the key; None: see the top of this file.
        timeout_s: of one attempt, to the last byte; until the body begins, of each silence.
        attempts: per request, 1 or more.
        pause_s: before the second attempt; twice that before the third, and so on, up to a minute; longer where the
            server asks for it.
        max_bytes: of an answer.
        error: what is raised.

    Raises:
        BackendError: (`error`) one of these cannot be.
    """

    url: str
    key_env: str | None = None
    timeout_s: float = 120.0
    attempts: int = 5
    pause_s: float = 1.0
    max_bytes: int = 1 << 20
    error: type[BackendError] = BackendError

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not _is_base(self.url):
            shown = "" if "@" in str(self.url) or "?" in str(self.url) else f" {self.url!r}"  # may hold a key
            raise self.error(
                f"the URL{shown} of a server cannot be used; give http(s)://host:port/v1, and the key in an "
                "environment variable"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))
        for name, least in (("timeout_s", 1e-3), ("pause_s", 0), ("attempts", 1), ("max_bytes", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e12:
                raise self.error(f"{name} for {self.url} is {value!r}; give a number of {least} or more")

    def key(self) -> str | None:
        """The key to send. Raises `BackendError` where the variable that was named holds none."""
        name = self.key_env
        if name is None:
            parts = urlsplit(self.url)
            if (parts.scheme, parts.hostname) != ("https", OPENAI_HOST) or not os.environ.get(OPENAI_KEY):
                return None
            name = OPENAI_KEY
        key = os.environ.get(name, "").strip()
        if not key or not all("!" <= c <= "~" for c in key):
            raise self.error(f"the environment variable {name} holds no key for {self.url}; set it")
        return key

    def post(self, path: str, body: bytes, kind: str = "application/json") -> bytes:
        """The body of a good answer.

        Args:
            path: after the URL, such as "/chat/completions".
            body: of the request.
            kind: its content type.

        Raises:
            BackendError: (`error`) retryable: it is busy or away, or its answers broke off or took too long, each
                time; else it refused the request, or its answer is too large.
        """
        headers = {"Content-Type": kind}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        url = self.url + path
        handlers = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if _is_here(url) else [])]
        opener = urllib.request.build_opener(*handlers)
        for attempt in range(self.attempts):
            asked, end = 0.0, time.monotonic() + self.timeout_s
            try:
                with opener.open(urllib.request.Request(url, body, headers), timeout=self.timeout_s) as answer:
                    return self._read(answer, end)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_message(error, end, key)}"
                asked = _seconds(error.headers.get("Retry-After"))
                if error.code not in BUSY:
                    raise self.error(f"{url}: {problem}") from None
            except (OSError, HTTPException) as error:  # refused, cut off, no sign of life; URLError is one of these
                problem = _hidden(f"no answer ({getattr(error, 'reason', error) or repr(error)})", key)
            if attempt + 1 < self.attempts:
                spread = 0.5 + rng_of(zlib.crc32(body), "pause", attempt).random()
                time.sleep(min(MAX_PAUSE_S, max(asked, self.pause_s * 2.0 ** min(attempt, 20) * spread)))
        raise self.error(f"{url}: {problem}, {self.attempts} times; see that the server runs", retryable=True)

    def _read(self, answer: Any, end: float) -> bytes:
        received = bytearray()
        while piece := answer.read1(1 << 16):
            received += piece
            if len(received) > self.max_bytes:
                raise self.error(f"{self.url}: answered with more than {self.max_bytes} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"more than {self.timeout_s:g} s")
        if answer.length:  # of what Content-Length promised, this is missing
            raise OSError(f"{answer.length} bytes of the answer are missing")
        return bytes(received)


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as `socket` does: an empty or a long part is none
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and not set(url) & set(" @?#\\")
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hidden(text: str, key: str | None) -> str:
    """The text without the key."""
    return text.replace(key, "***") if key else text


def _message(error: urllib.error.HTTPError, end: float, key: str | None) -> str:
    """What the server says in an error's body, on one line, without the key, shortened."""
    received = b""
    try:
        with error:
            while len(received) < 20_000 and time.monotonic() < end and (piece := error.read1(2_000)):
                received += piece
    except (OSError, HTTPException):
        received = received or b"(no message)"
    text = received.decode(errors="replace")
    try:
        told = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):  # not OpenAI's shape: the body as it is
        told = text
    told = told.get("message", told) if isinstance(told, dict) else told
    return " ".join(_hidden(str(told), key)[:300].split())


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date: our own pauses do
        return 0.0
