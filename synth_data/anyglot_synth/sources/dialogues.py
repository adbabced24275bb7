"""Our own JSON lines: dialogues as `samples.jsonl` holds them, or as turns of text with media in brackets.

    {"turns": [{"role": "user", "parts": [{"modality": "speech", "text": "hello"}]}, ...]}
    {"turns": [{"role": "user", "text": "Hear: [music: slow piano]"}, {"role": "assistant", "text": "[image: rain]"}]}

A row may name its own task, language, licence, source and meta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import IMAGE, Dialogue, DialogueError, Part, Turn
from anyglot_synth.sources.base import RowSource
from anyglot_synth.sources.media import take_picture, take_sound
from anyglot_synth.sources.placeholders import parts_of
from anyglot_synth.sources.sharegpt import turns_of
from anyglot_synth.store import Store


class Dialogues(RowSource):
    """Rows of either form; files of media are relative to the folder of the JSON lines.

    Args: see `RowSource`.
    """

    name: ClassVar[str] = "dialogues"

    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """See `RowSource`."""
        known = {key: row[key] for key in ("source", "licence", "task", "language", "meta") if row.get(key)}
        known = {"source": self.data_name, "language": self.language, **known}
        turns = row.get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "parts" in turns[0]:
            found = Dialogue.from_dict({**known, "turns": turns})

            def taken(i: int, j: int, turn: Turn, part: Part) -> Part:
                if part.media is None:
                    return part
                take = take_picture if part.modality == IMAGE else take_sound
                return replace(part, media=take(store, part.media.file, folder, part.media.origin))

            yield found.map_parts(taken)
            return
        said = []
        for role, text in turns_of(row):
            if not isinstance(text, str):
                raise DialogueError(f"a turn has a content of kind {type(text).__name__}; text is needed")
            said.append({"role": role, "parts": [part.to_dict() for part in parts_of(text)]})
        yield Dialogue.from_dict({**known, "turns": said})
