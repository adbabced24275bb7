"""`Filter`: what filters share. A filter is a dataclass: its fields are its settings, plain YAML values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anyglot_synth.dialogue import SPEECH, Dialogue, DialogueError, MediaFile, Part
from anyglot_synth.stages import Stage
from anyglot_tokenizers.errors import AnyglotError


@dataclass
class Filter(Stage):
    """Measures an item; raises `Filtered` with what it measured, or gives the item back with the same facts."""

    version: ClassVar[int] = 1
    """Counts changes of what is measured: part of the fingerprint."""

    def config(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"filter": self.name, "version": self.version, **settings}

    def require(self, good: bool, problem: str) -> None:
        """Raises `AnyglotError` for a setting that cannot be."""
        if not good:
            raise AnyglotError(f"filter {self.name}: {problem}")


def made_parts(dialogue: Dialogue, modalities: Sequence[str] = (SPEECH,)) -> Iterator[tuple[str, Part, MediaFile]]:
    """("turn 2 (user)", part, its file) of every part of these modalities.

    Raises:
        DialogueError: a part has no file yet: the filter stands before the stage that makes it.
    """
    for number, turn in enumerate(dialogue.turns, start=1):
        for part in turn.parts:
            if part.modality in modalities:
                where = f"turn {number} ({turn.role})"
                if part.media is None:
                    raise DialogueError(f"{where}: its {part.modality} has no file yet; put the filter after its maker")
                yield where, part, part.media


def said_of(part: Part) -> str:
    """The words that a voice was given."""
    return part.text if part.spoken_text is None else part.spoken_text
