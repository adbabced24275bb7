"""LLaVA's rows: `{"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}`.

Pictures are checked and copied into the dataset, so that it is whole by itself. Rows without a picture are plain
conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import IMAGE, TEXT, USER, Dialogue, DialogueError, Part, Turn
from anyglot_synth.sources.base import RowSource, folder_name
from anyglot_synth.sources.media import take_picture
from anyglot_synth.sources.sharegpt import answered, turns_of, with_system
from anyglot_synth.store import Store

TOKEN = "<image>"


@dataclass(kw_only=True)
class Llava(RowSource):
    """Conversations about pictures. The n-th `<image>` is the row's n-th picture.

    Where no turn names its picture, pictures come first in the first turn of the user. Another number of tokens than
    pictures makes the row bad.

    Args:
        images: folder that pictures are relative to; the folder of the data otherwise.

    All others: see `RowSource`.
    """

    name: ClassVar[str] = "llava"
    images: str = ""

    def options(self) -> dict[str, Any]:
        """See `RowSource`."""
        return {"images": folder_name(self.images)}

    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """See `RowSource`."""
        given = row.get("image", row.get("images"))
        pictures = [] if given in (None, "") else list(given) if isinstance(given, list | tuple) else [given]
        place = Path(self.images) if self.images else folder
        said = [(role, text) for role, text in turns_of(row)]
        for number, (_, text) in enumerate(said, start=1):
            if not isinstance(text, str) or not text.strip():
                raise DialogueError(f"turn {number} is empty")
        tokens = sum(text.count(TOKEN) for _, text in said)
        if pictures and not tokens:
            first = next((i for i, (role, _) in enumerate(said) if role == USER), None)
            if first is None:
                raise DialogueError("no turn of a user could show its picture")
            said[first] = (USER, TOKEN * len(pictures) + said[first][1])
            tokens = len(pictures)
        if tokens != len(pictures):
            raise DialogueError(f"it has {tokens} {TOKEN} but {len(pictures)} pictures")
        waiting = iter(pictures)
        turns = []
        for role, text in said:
            parts: list[Part] = []
            for number, piece in enumerate(text.split(TOKEN)):
                if number:
                    parts.append(Part(IMAGE, "", media=take_picture(store, next(waiting), place)))
                if piece.strip():
                    parts.append(Part(TEXT, piece.strip()))
            turns.append(Turn(role, tuple(parts)))
        task = "vqa" if pictures else "chat"
        yield Dialogue(with_system(row, answered(turns)), self.data_name, task=task, language=self.language)
