"""Parquet: a dialogue a row, turns and parts as nested columns, media as files beside the table.

Facts and meta data, whose shape differs from recipe to recipe, are JSON in a string. Needs `pyarrow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyglot_synth.dataset import media_of, read_items
from anyglot_synth.dialogue import canonical
from anyglot_synth.export.files import copy
from anyglot_synth.stages import Item
from anyglot_tokenizers.files import atomic_write

TABLE = "dialogues.parquet"
MEDIA = "media"
ROWS = 1000
"""Rows of a row group: what is held in memory."""


def export_parquet(folder: Path, out: Path) -> int:
    """Writes `out/dialogues.parquet` and `out/media`. Returns the number of dialogues."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, whole = pa.string(), pa.int64()
    media = pa.struct(
        {
            "file": text,
            "sha256": text,
            "origin": text,
            "sample_rate": whole,
            "num_samples": whole,
            "size": pa.list_(whole),
        }
    )
    part = pa.struct({"modality": text, "text": text, "spoken_text": text, "media": media})
    turn = pa.struct({"role": text, "parts": pa.list_(part)})
    names = ("id", "task", "language", "source", "licence", "meta", "facts")
    schema = pa.schema({"index": whole, **dict.fromkeys(names, text), "turns": pa.list_(turn)})
    held: list[dict[str, Any]] = []
    rows = 0
    with atomic_write(out / TABLE) as path, pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if held:
                writer.write_table(pa.Table.from_pylist(held, schema))
                held.clear()

        for item in read_items(folder):
            held.append(_row(folder, item, out))
            rows += 1
            if len(held) == ROWS:
                flush()
        flush()
    return rows


def _row(folder: Path, item: Item, out: Path) -> dict[str, Any]:
    found = item.dialogue.to_dict()
    for medium in media_of(item.dialogue):
        media = found["turns"][medium.turn_number]["parts"][medium.part_number]["media"]
        media |= {"file": copy(folder, medium.file, out, MEDIA), "origin": canonical(media.get("origin", {}))}
    return found | {"index": item.index, "meta": canonical(found.get("meta", {})), "facts": canonical(dict(item.facts))}
