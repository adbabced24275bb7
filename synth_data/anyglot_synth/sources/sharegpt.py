"""Conversations: ShareGPT's `from`/`value`, OpenAI's `role`/`content`, and the like.

Rules: an unknown role or an empty turn makes the row bad; what follows the last answer is left out, since nothing is
learned from it; a row without any answer is bad. Roles of tools are unknown here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import ASSISTANT, IMAGE, SYSTEM, TEXT, USER, Dialogue, DialogueError, Part, Turn
from anyglot_synth.sources.base import RowSource, text_of
from anyglot_synth.sources.media import take_picture
from anyglot_synth.store import Store
from anyglot_tokenizers.media import MediaBytes

ROLES_OF = {
    **dict.fromkeys(("system", "developer", "context"), SYSTEM),
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question", "client", "customer"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bard", "bing", "claude", "llm"), ASSISTANT),
    **dict.fromkeys(("chatbot", "answer", "response", "gpt4", "gpt-4", "agent"), ASSISTANT),
}
"""Their names of roles, in lower case -> ours."""
_LISTS = ("conversations", "conversation", "messages", "items", "turns", "dialogue", "dialog", "chat")


class ShareGpt(RowSource):
    """Rows with a list of turns. Content may be OpenAI's list of parts (text, `image_url` with a data URL or a path).

    Args: see `RowSource`.
    """

    name: ClassVar[str] = "sharegpt"

    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """See `RowSource`."""
        turns = [Turn(role, _parts(content, store, folder, i)) for i, (role, content) in enumerate(turns_of(row), 1)]
        yield Dialogue(with_system(row, answered(turns)), self.data_name, language=self.language)


def turns_of(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(our role, content) of every turn of a row, whatever its fields are called. Raises `DialogueError`."""
    name = next((name for name in _LISTS if name in row), None)
    if name is None:
        raise DialogueError(f"it has no {_LISTS[0]!r} or {_LISTS[2]!r}; it has: {', '.join(map(str, row))[:200]}")
    turns = row[name]
    if not isinstance(turns, list):
        raise DialogueError(f"{name!r} is a {type(turns).__name__}, not a list of turns")
    flat = [turn for entry in turns for turn in (entry if isinstance(entry, list) else [entry])]
    for number, turn in enumerate(flat, start=1):
        if not isinstance(turn, Mapping):
            raise DialogueError(f"turn {number} is a {type(turn).__name__}, not an object with a role and a text")
        role = next((turn[key] for key in ("from", "role", "speaker") if turn.get(key) is not None), None)
        content = next((turn[key] for key in ("value", "content", "text", "message") if turn.get(key) is not None), "")
        ours = ROLES_OF.get(role.strip().lower()) if isinstance(role, str) else None
        if ours is None:
            raise DialogueError(f"turn {number} is of an unknown role {role!r}")
        yield ours, content


def answered(turns: list[Turn]) -> list[Turn]:
    """The turns up to the last answer. Raises `DialogueError` where there is none."""
    last = max((i for i, turn in enumerate(turns) if turn.role == ASSISTANT), default=None)
    if last is None:
        raise DialogueError("the assistant says nothing in it")
    return turns[: last + 1]


def with_system(row: Mapping[str, Any], turns: list[Turn]) -> tuple[Turn, ...]:
    """The turns after a field `system` or `system_prompt` of the row, if it has one and they do not begin so."""
    system = text_of(row, "system", "system_prompt", needed=False)
    if system and turns and turns[0].role != SYSTEM:
        return (Turn(SYSTEM, (Part(TEXT, system),)), *turns)
    return tuple(turns)


def _parts(content: Any, store: Store, folder: Path, number: int) -> tuple[Part, ...]:
    if isinstance(content, str):
        if not content.strip():
            raise DialogueError(f"turn {number} is empty")
        return (Part(TEXT, content.strip()),)
    if not isinstance(content, list) or not content:
        raise DialogueError(f"turn {number} has a content of kind {type(content).__name__}; text is needed")
    parts = [_part(entry, store, folder, number) for entry in content]
    return tuple(part for part in parts if part.text or part.media)


def _part(entry: Any, store: Store, folder: Path, number: int) -> Part:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(entry.get("text"), str):
        return Part(TEXT, entry["text"].strip())
    if kind in ("image_url", "input_image", "image"):
        found = entry.get("image_url", entry.get("image"))
        url = found.get("url") if isinstance(found, Mapping) else found
        if isinstance(url, str) and url.startswith("data:"):
            try:
                content = base64.b64decode(url.partition(",")[2], validate=True)
            except ValueError as error:
                raise DialogueError(f"turn {number} has a picture that is no base64 ({error})") from None
            return Part(IMAGE, "", media=take_picture(store, MediaBytes(f"picture of turn {number}", content), folder))
        if isinstance(url, str) and "://" not in url:
            return Part(IMAGE, "", media=take_picture(store, url, folder))
        raise DialogueError(f"turn {number} has a picture at {str(url)[:80]!r}; fetch it and give its path")
    raise DialogueError(f"turn {number} has a part of an unknown type {kind!r}")
