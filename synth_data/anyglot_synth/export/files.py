"""Copies of media with their bytes compared to the record, and what every form says of a part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from anyglot_synth.dataset import DatasetError, Medium, licence_of, place, voice_of
from anyglot_synth.dialogue import MediaFile
from anyglot_synth.stages import Item
from anyglot_tokenizers.files import atomic_write


def content_of(folder: Path, media: MediaFile) -> bytes:
    """The bytes of a file of the dataset. Raises `DatasetError` if they are not those of the record."""
    path = place(folder, media)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); run the recipe again to make it") from None
    if hashlib.sha256(content).hexdigest() != media.sha256:
        raise DatasetError(f"{path}: differs from its record; delete it and run the recipe again")
    return content


def copy(folder: Path, media: MediaFile, out: Path, top: str) -> str:
    """Copies a file to `out/top`, named by its content; returns its path relative to `out`. Equal files are one."""
    file = f"{top}/{media.sha256[:2]}/{media.sha256[:32]}{Path(media.file).suffix}"
    path = out / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content_of(folder, media)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    return file


def row_of(item: Item, medium: Medium) -> dict[str, Any]:
    """What is known of one medium as flat columns. Strings are never null, so that all rows are of one type."""
    source, own = item.dialogue.licence, licence_of(medium.file, item.dialogue)
    return {
        "text": medium.part.text,
        "spoken_text": medium.part.spoken_text or "",
        "speaker": voice_of(medium.file),
        "role": medium.turn.role,
        "dialogue": item.dialogue.id,
        "index": item.index,
        "turn": medium.turn_number,
        "part": medium.part_number,
        "task": item.dialogue.task,
        "language": item.dialogue.language,
        "source": item.dialogue.source,
        "licence": source if source == own else f"{source} AND {own}",
    }
