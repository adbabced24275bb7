"""Rows of text and media files out of what people have: CSV or JSONL manifests and folders named by label.

Reads manifests only; it never opens a media file and knows nothing of tokenizers (see `prepare`). Everything
wrong with one row comes out as a `RowError` in place of the row; what makes a whole source useless raises
`ManifestError`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from anyglot_tokenizers.errors import ManifestError

DEFAULT_COLUMNS = {
    "text": "text",
    "caption": "text",
    "image": "image",
    "speech": "speech",
    "music": "music",
    "audio": "audio",
}
"""Column name -> modality where the user says nothing; of two for one modality the first here counts."""

IGNORE = "ignore"
"""The modality of a column that is to be left out."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})
MANIFEST_NAMES = (
    "manifest.csv",
    "manifest.jsonl",
    "metadata.csv",
    "metadata.jsonl",
    "captions.csv",
    "records.jsonl",
)
MEDIA_FOLDERS = ("images", "audio", "media")
"""Folders beside a manifest in which its files are looked for after the manifest's own folder."""


@dataclass(frozen=True)
class Row:
    """One row: its text, if any, and one file per modality.

    `number` counts from 1: data rows of a CSV, lines of a JSONL file, files of a folder tree in sorted order.
    """

    source: str
    number: int
    text: str | None
    media: Mapping[str, Path]


@dataclass(frozen=True)
class RowError:
    """One row that cannot be used; `file` is the media file at fault or the manifest, row 0 the source."""

    source: str
    row: int
    file: str
    error: str

    def to_dict(self) -> dict[str, str | int]:
        """The line that `errors.jsonl` holds."""
        return {"source": self.source, "row": self.row, "file": self.file, "error": self.error}


class _BadRow(Exception):
    """Raised while one row is read; becomes a `RowError`."""


def read_manifest(source: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row | RowError]:
    """Yield the rows of a manifest file, of a folder holding one, or of a folder tree with labels for names.

    Args:
        source: a `.csv`, `.tsv` or `.jsonl` file; or a folder. A folder is read by its manifest (the first
            of `MANIFEST_NAMES`, or the only CSV, TSV or JSONL file in it); without one its images and audio
            files are the rows, the name of the folder that directly holds a file being its text.
        columns: column -> modality (`text`, `image`, `speech`, `music`, ..., or `ignore`), on top of
            `DEFAULT_COLUMNS`. A folder tree has the columns `text`, `image` and `audio`.

    Raises:
        ManifestError: there is no such source, it holds no rows, or its header lacks a column in `columns`.
    """
    columns = dict(columns or {})
    _check_columns(columns)
    source = Path(source)
    if not source.exists():
        raise ManifestError(f"{source}: no such file or folder; give a CSV or JSONL manifest or a folder of media")
    if source.is_dir():
        manifest = _find_manifest(source)
        if manifest is None:
            yield from _read_tree(source, columns)
            return
        source = manifest
    suffix = source.suffix.lower()
    if suffix not in {".csv", ".tsv", ".jsonl"}:
        raise ManifestError(
            f"{source}: a manifest is a .csv, .tsv or .jsonl file, not {suffix or 'a file without suffix'}"
        )
    num_rows = 0
    try:
        for row in _read_jsonl(source, columns) if suffix == ".jsonl" else _read_csv(source, columns):
            num_rows += 1
            yield row
    except UnicodeDecodeError as error:
        raise ManifestError(f"{source}: is not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise ManifestError(f"{source}: is not readable as CSV after row {num_rows} ({error})") from error
    except OSError as error:
        raise ManifestError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error
    if num_rows == 0:
        raise ManifestError(f"{source}: holds no rows; put one sample on each line")


def _check_columns(columns: Mapping[str, str]) -> None:
    taken: dict[str, str] = {}
    for column, modality in columns.items():
        if not column or not modality:
            raise ManifestError(f"--column {column}={modality}: write NAME=MODALITY, such as --column file=image")
        if modality == IGNORE:
            continue
        if modality in taken:
            raise ManifestError(
                f"columns {taken[modality]!r} and {column!r} are both given as {modality!r}; "
                f"a row holds one of each, so give one of them as --column {column}={IGNORE}"
            )
        taken[modality] = column


def _find_manifest(folder: Path) -> Path | None:
    for name in MANIFEST_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".csv", ".tsv", ".jsonl"} and p.is_file())
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ManifestError(f"{folder}: holds several manifests ({names}); name the one to read, such as {found[0]}")
    return found[0] if found else None


def _modality_columns(present: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Modality -> column for a row with the columns `present`; `_BadRow` if one the user named is missing."""
    present = list(present)
    missing = [column for column in columns if column not in present]
    if missing:
        raise _BadRow(f"there is no column {missing[0]!r}; the columns are {', '.join(map(str, present)) or 'none'}")
    chosen = {modality: column for column, modality in columns.items() if modality != IGNORE}
    for column, modality in DEFAULT_COLUMNS.items():
        if column in present and column not in columns:
            chosen.setdefault(modality, column)
    if not chosen:
        raise _BadRow(
            f"none of the columns {', '.join(map(str, present)) or '(none)'} is known; "
            "say what they hold, such as --column file=image --column title=text"
        )
    return chosen


def _read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter=delimiter)
        header = [name.strip() for name in next(lines, [])]
        if not header:
            raise ManifestError(f"{path}: is empty; its first line names the columns, such as image,caption")
        if len(set(header)) != len(header):
            raise ManifestError(f"{path}: names a column twice ({', '.join(header)}); rename one of them")
        try:
            chosen = _modality_columns(header, columns)
        except _BadRow as error:
            raise ManifestError(f"{path}: {error}") from error
        for number, cells in enumerate((cells for cells in lines if cells), start=1):
            if len(cells) != len(header):
                message = f"has {len(cells)} cells, the header {len(header)}; quote cells that hold a comma"
                yield RowError(str(path), number, str(path), message)
                continue
            values = dict(zip(header, cells, strict=True))
            yield _make_row(path, number, {m: values[column] for m, column in chosen.items()})


def _read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise _BadRow(f"is a JSON {type(values).__name__}, not an object with columns")
                chosen = _modality_columns(values, columns)
            except (ValueError, RecursionError) as error:
                yield RowError(str(path), number, str(path), f"is not JSON: {error}")
            except _BadRow as error:
                yield RowError(str(path), number, str(path), str(error))
            else:
                yield _make_row(path, number, {m: values[column] for m, column in chosen.items()})


def _make_row(path: Path, number: int, values: Mapping[str, object]) -> Row | RowError:
    """A row out of modality -> cell; blank cells and null are modalities that this row does not have."""
    text, media = None, {}
    for modality, value in values.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            return RowError(str(path), number, str(path), f"{modality} is {value!r:.60}, not a string")
        if modality == "text":
            text = value.strip()
        elif "\0" in value or "://" in value:
            return RowError(str(path), number, value, f"{modality} is not a file name; download files first")
        else:
            media[modality] = _locate(path.parent, value.strip())
    if text is None and not media:
        return RowError(str(path), number, str(path), "every cell is blank: neither text nor a file")
    return Row(str(path), number, text, media)


def _locate(folder: Path, name: str) -> Path:
    for candidate in (folder / name, *(folder / sub / name for sub in MEDIA_FOLDERS)):
        if candidate.exists():
            return candidate
    return folder / name


def _read_tree(root: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    modality_of = {"text": "text", "image": "image", "audio": "audio", **columns}
    number = 0
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            kind = "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None
            if kind is None or name.startswith(".") or modality_of[kind] == IGNORE:
                continue
            number += 1
            labelled = Path(folder) != root and modality_of["text"] != IGNORE
            media = {modality_of[kind]: Path(folder) / name}
            yield Row(str(root), number, Path(folder).name if labelled else None, media)
    for error in unreadable:
        yield RowError(str(root), 0, str(error.filename), f"folder cannot be read: {error.strerror}")
    if number == 0:
        raise ManifestError(
            f"{root}: holds no manifest (such as {MANIFEST_NAMES[0]}), no images and no audio files; "
            f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, audio in {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
