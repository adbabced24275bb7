"""AudioFolder and ImageFolder of Hugging Face `datasets`: media files and `metadata.jsonl`, a row a medium.

    datasets.load_dataset("audiofolder", data_dir=OUT)

A row tells its dialogue and place in it, so dialogues can be put together again. Files are named by content; a clip
that is said twice is one file with two rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyglot_synth.dataset import DatasetError, Medium, media_of, read_items
from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH
from anyglot_synth.export.files import copy, row_of
from anyglot_tokenizers.files import atomic_write

METADATA = "metadata.jsonl"


def export_audio(folder: Path, out: Path, *, modality: str = SPEECH) -> int:
    """Every sound of a modality ("speech" or "music") with what is said, by whom and where. Returns how many."""
    if modality not in (SPEECH, MUSIC):
        raise DatasetError(f"audiofolder holds {SPEECH!r} or {MUSIC!r}, not {modality!r}; choose one of them")
    return _export(folder, out, modality)


def export_images(folder: Path, out: Path) -> int:
    """Every picture with its description. Returns how many."""
    return _export(folder, out, IMAGE)


def _export(folder: Path, out: Path, modality: str) -> int:
    rows = 0
    with atomic_write(out / METADATA) as path, path.open("w", encoding="utf-8") as lines:
        for item in read_items(folder):
            for medium in media_of(item.dialogue):
                if medium.part.modality == modality:
                    row = {"file_name": copy(folder, medium.file, out, modality)} | row_of(item, medium)
                    lines.write(json.dumps(row | _size(medium), ensure_ascii=False) + "\n")
                    rows += 1
    return rows


def _size(medium: Medium) -> dict[str, Any]:
    if medium.part.modality == IMAGE:
        width, height = medium.file.size or (0, 0)
        return {"width": width, "height": height}
    return {"seconds": round(medium.file.seconds or 0.0, 4), "sample_rate": medium.file.sample_rate or 0}
