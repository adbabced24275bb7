"""Hugging Face datasets without the `datasets` library: parquet and arrow files, folders of them, `save_to_disk`.

Text columns are strings; media columns are what the Image and Audio features store, `{bytes, path}`, or plain bytes, or
file names below the folder. Tables are read a few rows at a time. Nothing is downloaded and nothing is run: a dataset
script or a URL in a cell is never followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyglot_recipes.importers.rows import (
    MAX_BYTES,
    BadRow,
    Media,
    Row,
    RowError,
    inside,
    modality_columns,
)
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.media import MediaBytes

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 32


def dataset_files(folder: Path) -> list[Path]:
    """The tables of a folder, in order: those its `save_to_disk` lists, else all parquet and arrow files below it.

    Raises ManifestError for a `save_to_disk` folder whose lists are broken. An empty list: it is no such folder.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_list(folder / "dataset_dict.json", "splits")
        return [path for split in splits for path in dataset_files(inside_or_raise(folder, split))]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        entries = _read_list(folder / "state.json", "_data_files")
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        return [inside_or_raise(folder, name) for name in names]
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def inside_or_raise(folder: Path, name: object) -> Path:
    """`inside`, with a ManifestError for a name that is none or leads out."""
    try:
        if not isinstance(name, str):
            raise BadRow(f"{name!r:.60} is not a file name")
        return inside(folder, name)
    except BadRow as error:
        raise ManifestError(f"{folder}: {error}; save the dataset again") from error


def _read_list(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        if not isinstance(found, list):
            raise TypeError(f"{key} is no list")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: names no {key} ({error!r}); save the dataset again") from error


def read_table(path: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    """The rows of one parquet or arrow file (stream or file format).

    Raises:
        ManifestError: the file is missing or damaged from its start, lacks a column in `columns`, or a column that
            counts has a type that holds neither text nor media.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path, columns):
            chosen = modality_columns(batch.schema.names, columns)
            lists = {modality: batch.column(column).to_pylist() for modality, column in chosen.items()}
            for at in range(batch.num_rows):
                number += 1
                yield _row(path, number, {modality: values[at] for modality, values in lists.items()}, chosen)
    except BadRow as error:
        raise ManifestError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if number == 0:
            raise ManifestError(f"{path}: is no readable table ({error}); get it again") from error
        what = f"truncated or damaged after {number} rows ({error}); get it again"
        yield RowError(str(path), number + 1, str(path), what)
        return
    if number == 0:
        raise ManifestError(f"{path}: holds no rows; put one sample in each")


def _batches(path: Path, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Pieces of at most `ROWS_AT_ONCE` rows with the columns that count, their types checked."""
    import pyarrow as pa

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            names = _check_types(path, file.schema_arrow, columns)
            for group in range(file.num_row_groups):  # one iterator over all of them keeps what it has read
                yield from file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=names)
        return
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        names = _check_types(path, reader.schema, columns)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE).select(names)


def _check_types(path: Path, schema: pa.Schema, columns: Mapping[str, str]) -> list[str]:
    import pyarrow as pa

    def is_string(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)

    def is_binary(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    chosen = modality_columns(schema.names, columns)
    for modality, column in chosen.items():
        if schema.names.count(column) > 1:
            raise BadRow(f"names the column {column!r} twice; rename one of them")
        kind = schema.field(column).type
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if _is_struct(kind) else {}
        stored = "bytes" in fields and is_binary(fields["bytes"]) and is_string(fields.get("path", pa.null()))
        if not (is_string(kind) or (modality != "text" and (is_binary(kind) or stored))):
            wanted = "strings" if modality == "text" else "bytes, file names or {bytes, path}"
            raise BadRow(
                f"column {column!r} has the type {kind!s:.80}, {modality} needs {wanted}; convert it, or leave it out "
                f"with --column {column}=ignore"
            )
    return sorted(set(chosen.values()))


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _row(path: Path, number: int, values: Mapping[str, Any], chosen: Mapping[str, str]) -> Row | RowError:
    text = (values.get("text") or "").strip() or None
    media: dict[str, Media] = {}
    for modality, value in values.items():
        if modality == "text" or value is None:
            continue
        try:
            found = _medium(path, number, chosen[modality], value)
        except BadRow as error:
            return RowError(str(path), number, str(path), f"{chosen[modality]}: {error}")
        if found is not None:
            media[modality] = found
    if text is None and not media:
        return RowError(str(path), number, str(path), "every cell is blank: neither text nor a file")
    return Row(str(path), number, text, media)


def _medium(path: Path, number: int, column: str, value: Any) -> Media | None:
    content, name = value, None
    if isinstance(value, str):
        content, name = None, value
    elif isinstance(value, dict):
        content, name = value["bytes"], value.get("path")
    if content is not None:
        if len(content) > MAX_BYTES:
            raise BadRow(f"{len(content)} bytes are more than {MAX_BYTES}; leave it out")
        return MediaBytes(f"{path}::{number}.{column}", content)
    return inside(path.parent, name) if name and name.strip() else None
