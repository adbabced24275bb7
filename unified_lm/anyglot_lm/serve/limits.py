"""`Limits`: how much a server takes on, from one client and from all. Each field is a flag of `anyglot serve`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from anyglot_tokenizers.errors import AnyglotError


def _flag(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """Every field is positive; its help says what it bounds.

    Raises:
        AnyglotError: one is not.
    """

    rows: int = _flag(32, "answers that are written at once")
    queue: int = _flag(64, "answers that may wait for that; a request beyond them gets 429")
    max_n: int = _flag(8, "answers that one request may ask for (n)")
    max_ids: int = _flag(4096, "ids of prompt and answer together; the model may have room for fewer")
    max_answer: int = _flag(2048, "ids of an answer")
    max_messages: int = _flag(64, "messages of a conversation")
    max_parts: int = _flag(64, "parts (texts, pictures, sounds) of a conversation")
    max_text: int = _flag(100_000, "characters of text of a request")
    max_seconds: float = _flag(30.0, "seconds of one sound")
    max_pixels: int = _flag(16_000_000, "pixels of one picture")
    max_body: int = _flag(16 * 2**20, "bytes of a request")
    max_buffered: int = _flag(256 * 2**20, "bytes of all requests that are being read or answered; beyond them 503")
    max_depth: int = _flag(16, "nested lists and objects in JSON")
    max_values: int = _flag(100_000, "commas and brackets in JSON")
    max_connections: int = _flag(512, "connections; those beyond them get 503, beyond twice as many they are cut")
    header_timeout: float = _flag(10.0, "seconds until a connection must have sent the head of its next request")
    body_timeout: float = _flag(30.0, "seconds until a request must be there whole")
    write_timeout: float = _flag(30.0, "seconds after which a client that reads nothing is cut off")
    stop_timeout: int = _flag(10, "seconds that a stopping server gives to answers in flight")
    max_kept: int = _flag(2**30, "bytes of files that visitors of the page send, until they are old; beyond them 503")
    workers: int = _flag(2, "threads that decode and encode media")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not 0 < value < float("inf"):
                raise AnyglotError(f"--{entry.name} is {value}; give a positive number")
