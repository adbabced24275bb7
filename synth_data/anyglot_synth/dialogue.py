"""`Dialogue`: what people and an assistant say, write, show and play to one another, before and after media exist.

A part of speech, image or music begins as words (what is said, or a description) and gets its file later. Everything
is plain JSON; what a dialogue asks for, without its files, has one content address. This file makes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anyglot_tokenizers.errors import AnyglotError

Json = dict[str, Any]

FORMAT = 1
"""Counts changes of what a dialogue holds: part of its id."""
TEXT, SPEECH, IMAGE, MUSIC = MODALITIES = ("text", "speech", "image", "music")
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 20_000
"""Of one part."""
MAX_DEPTH = 64
"""Of lists and mappings inside one another in `meta` and `origin`: what is deeper does not travel between processes."""


class DialogueError(AnyglotError):
    """A dialogue that cannot be used: an unknown role, an empty part, text that is no Unicode."""


def canonical(content: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def address(content: Any) -> str:
    """Content address of a JSON value: 32 hex digits of the sha256 of its canonical text."""
    return hashlib.sha256(canonical(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def escaped(text: str) -> str:
    """The text with what is no Unicode in it (lone surrogates, as of a file's name) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class MediaFile:
    """A file of a dataset.

    Args:
        file: path relative to the dataset's folder, with `/`.
        sha256: of its bytes, 64 hex digits.
        origin: what made it and how (backend, version, style, seed), or where it was taken from; with its licence
            under `licence`.
        sample_rate: of a sound, Hz.
        num_samples: of a sound.
        size: of a picture, (width, height) in pixels.
    """

    file: str
    sha256: str
    origin: Mapping[str, Any] = field(default_factory=dict)
    sample_rate: int | None = None
    num_samples: int | None = None
    size: tuple[int, int] | None = None

    @property
    def seconds(self) -> float | None:
        """Length of a sound."""
        return None if self.num_samples is None or not self.sample_rate else self.num_samples / self.sample_rate

    def to_dict(self) -> Json:
        """JSON-able form, without what is not known."""
        size = None if self.size is None else list(self.size)
        found = {
            "file": self.file,
            "sha256": self.sha256,
            "origin": dict(self.origin),
            "sample_rate": self.sample_rate,
            "num_samples": self.num_samples,
            "size": size,
        }
        return {key: value for key, value in found.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], where: str = "media") -> MediaFile:
        """Reads `to_dict`. Raises `DialogueError`."""
        try:
            size = found.get("size")
            return cls(
                _string(found["file"]),
                _string(found["sha256"]),
                dict(found.get("origin", {})),
                _count(found.get("sample_rate")),
                _count(found.get("num_samples")),
                None if size is None else (int(size[0]), int(size[1])),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise DialogueError(f"{where}: not a media file of a dataset ({error!r})") from None


@dataclass(frozen=True)
class Part:
    """One piece of a turn.

    Args:
        modality: "text", "speech", "image" or "music".
        text: what is written or said; of a picture or music its description (for a file that came with the data it
            may be empty).
        spoken_text: of speech, the words that a voice was given, once they are known.
        media: the file, once there is one.
    """

    modality: str
    text: str
    spoken_text: str | None = None
    media: MediaFile | None = None

    def to_dict(self) -> Json:
        """JSON-able form."""
        found: Json = {"modality": self.modality, "text": self.text}
        if self.spoken_text is not None:
            found["spoken_text"] = self.spoken_text
        if self.media is not None:
            found["media"] = self.media.to_dict()
        return found


@dataclass(frozen=True)
class Turn:
    """What one speaker says at a time: `role` is "system", "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Dialogue:
    """Turns with where they come from.

    Args:
        turns: at least one.
        source: name of the data or recipe it comes from.
        licence: SPDX name of the source's licence, or "unknown".
        task: short name of what it teaches, such as "spoken-chat" or "caption".
        language: BCP-47 tag of its text.
        meta: anything else worth keeping (JSON), such as the topic or the scene.
    """

    turns: tuple[Turn, ...]
    source: str
    licence: str = "unknown"
    task: str = "chat"
    language: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Content address of what is asked for: equal for dialogues that differ in made files only.

        A file that came with the data (its origin says `given`) counts by its sha256, and so does one without words.
        """
        turns = [[turn.role, [_mark(part) for part in turn.parts]] for turn in self.turns]
        return address([FORMAT, self.source, self.task, self.language, turns])

    def map_parts(self, change: Any) -> Dialogue:
        """A copy whose parts are `change(turn_number, part_number, turn, part)`."""
        return replace(
            self,
            turns=tuple(
                replace(turn, parts=tuple(change(i, j, turn, part) for j, part in enumerate(turn.parts)))
                for i, turn in enumerate(self.turns)
            ),
        )

    def to_dict(self) -> Json:
        """JSON-able form."""
        return {"id": self.id, **self._content()}

    def _content(self) -> Json:
        turns = [{"role": turn.role, "parts": [part.to_dict() for part in turn.parts]} for turn in self.turns]
        found: Json = {"task": self.task, "language": self.language, "turns": turns}
        found |= {"source": self.source, "licence": self.licence}
        return found | ({"meta": dict(self.meta)} if self.meta else {})

    @classmethod
    def from_dict(cls, found: Any, where: str = "dialogue") -> Dialogue:
        """Reads `to_dict` (its id is made again). Raises `DialogueError`, whose message begins with `where`."""
        try:
            turns = tuple(
                Turn(
                    _string(turn["role"]),
                    tuple(
                        Part(
                            _string(part["modality"]),
                            _string(part["text"]),
                            None if part.get("spoken_text") is None else _string(part["spoken_text"]),
                            None if part.get("media") is None else MediaFile.from_dict(part["media"], where),
                        )
                        for part in turn["parts"]
                    ),
                )
                for turn in found["turns"]
            )
            strings = {key: _string(found[key]) for key in ("licence", "task", "language") if key in found}
            dialogue = cls(turns, _string(found["source"]), meta=dict(found.get("meta", {})), **strings)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DialogueError(f"{where}: not a dialogue ({error!r}); see docs/formats.md") from None
        dialogue.check(where)
        return dialogue

    def check(self, where: str = "dialogue") -> None:
        """Raises `DialogueError` for what no stage could work on."""
        if not self.turns:
            raise DialogueError(f"{where}: it has no turns")
        for number, turn in enumerate(self.turns, start=1):
            if turn.role not in ROLES:
                raise DialogueError(f"{where}: turn {number} is of an unknown role {turn.role!r}; use {ROLES}")
            if not turn.parts:
                raise DialogueError(f"{where}: turn {number} ({turn.role}) is empty")
            for part in turn.parts:
                if part.modality not in MODALITIES:
                    raise DialogueError(f"{where}: turn {number} has a part of an unknown modality {part.modality!r}")
                if not part.text.strip() and part.media is None:
                    what = "empty" if part.modality in (TEXT, SPEECH) else "without a description and without a file"
                    raise DialogueError(f"{where}: turn {number} has a part ({part.modality}) that is {what}")
                if len(part.text) > MAX_CHARACTERS:
                    raise DialogueError(
                        f"{where}: turn {number} has {len(part.text)} characters, {MAX_CHARACTERS} are the limit"
                    )
        origins = [part.media.origin for turn in self.turns for part in turn.parts if part.media is not None]
        if any(_is_deep(found) for found in (self.meta, *origins)):
            raise DialogueError(f"{where}: it holds lists or mappings that are nested more than {MAX_DEPTH} deep")
        try:
            canonical(self._content()).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DialogueError(f"{where}: it holds {half!r}, half of a character (a lone surrogate)") from None
        except (TypeError, ValueError) as error:
            raise DialogueError(f"{where}: it holds what JSON cannot hold ({error})") from None


def _mark(part: Part) -> list[str]:
    digest = "" if part.media is None else part.media.sha256
    given = part.media is not None and bool(part.media.origin.get("given"))
    return [part.modality, part.text or digest, *([digest] if part.text and given else [])]


def _is_deep(value: Any, left: int = MAX_DEPTH) -> bool:
    if not isinstance(value, Mapping | list | tuple):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return left == 0 or any(_is_deep(one, left - 1) for one in inner)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _count(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not math.isfinite(value)):
        raise TypeError(f"{value!r} is not a whole number")
    return value
