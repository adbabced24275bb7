"""Rows of text and media out of what people have: `read_manifest` finds out what a source is and who reads it.

CSV and JSONL manifests and folders named by label are read here, the rest in `importers`. No media are decoded, and
tokenizers are not known (see `prepare`). Everything wrong with one row comes out as a `RowError` in place of the row;
what makes a whole source useless raises `ManifestError`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from anyglot_recipes.importers.coco import caption_files, read_coco
from anyglot_recipes.importers.rows import (
    AUDIO_SUFFIXES,
    IGNORE,
    IMAGE_SUFFIXES,
    BadRow,
    Media,
    Row,
    RowError,
    each_file,
    is_unicode,
    modality_columns,
)
from anyglot_recipes.importers.speech import is_librispeech, is_ljspeech, read_librispeech, read_ljspeech
from anyglot_recipes.importers.tables import SUFFIXES, dataset_files, read_table
from anyglot_recipes.importers.tars import expand_braces, read_tar
from anyglot_tokenizers.errors import ManifestError

__all__ = ["Row", "RowError", "read_manifest"]

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


def read_manifest(
    source: Path, columns: Mapping[str, str] | None = None, *, images: Path | None = None
) -> Iterator[Row | RowError]:
    """Yield the rows of a source, whatever it is.

    Args:
        source: a file, `.csv`, `.tsv`, `.jsonl`, `.tar` (WebDataset), `.parquet`, `.arrow` or `.json` (COCO
            captions); several tars by `data-{000..003}.tar`; or a folder. A folder is what `save_to_disk` wrote,
            LJSpeech, or is read by its manifest (the first of `MANIFEST_NAMES`, or the only CSV, TSV or JSONL
            file in it), else its tars, its parquet and arrow files, its COCO captions, or LibriSpeech; without any
            of these its images and audio files are the rows, the name of the folder that directly holds a file
            being its text.
        columns: column -> modality (`text`, `image`, `speech`, `music`, ..., or `ignore`), on top of
            `DEFAULT_COLUMNS`. A folder tree has the columns `text`, `image` and `audio`, speech corpora `text` and
            `speech`, COCO `text` and `image`; those of a tar are described at `read_tar`.
        images: the folder of the pictures of COCO captions, where it is not beside them.

    Raises:
        ManifestError: there is no such source, it holds no rows, or its header lacks a column in `columns`.
    """
    columns = dict(columns or {})
    _check_columns(columns)
    source = Path(source)
    if not source.exists():
        if source.suffix.lower() == ".tar" and "{" in str(source):
            yield from each_file(expand_braces(source), lambda path: read_tar(path, columns))
            return
        raise ManifestError(f"{source}: no such file or folder; give a CSV or JSONL manifest or a folder of media")
    if images is not None and not images.is_dir():
        raise ManifestError(f"{images}: is no folder; name the folder of the pictures")
    if not source.is_dir():
        yield from _read_file(source, columns, images)
    elif (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
        yield from _read_tables(source, columns)
    elif is_ljspeech(source):
        yield from read_ljspeech(source, columns)
    elif manifest := _find_manifest(source):
        yield from _read_file(manifest, columns, images)
    elif tars := sorted(path for path in source.glob("*.tar") if path.is_file()):
        yield from each_file(tars, lambda path: read_tar(path, columns))
    elif dataset_files(source):
        yield from _read_tables(source, columns)
    elif captions := caption_files(source):
        yield from each_file(captions, lambda path: read_coco(path, columns, images))
    elif is_librispeech(source):
        yield from read_librispeech(source, columns)
    else:
        yield from _read_tree(source, columns)


def _read_tables(folder: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    tables = dataset_files(folder)
    if not tables:
        raise ManifestError(f"{folder}: its lists name no tables; save the dataset again")
    yield from each_file(tables, lambda path: read_table(path, columns))


def _read_file(source: Path, columns: Mapping[str, str], images: Path | None) -> Iterator[Row | RowError]:
    suffix = source.suffix.lower()
    if suffix == ".tar":
        yield from read_tar(source, columns)
    elif suffix in SUFFIXES:
        yield from read_table(source, columns)
    elif suffix == ".json":
        yield from read_coco(source, columns, images)
    elif suffix in {".csv", ".tsv", ".jsonl"}:
        yield from _read_manifest(source, suffix, columns)
    else:
        raise ManifestError(
            f"{source}: a manifest is a .csv, .tsv or .jsonl file (or .tar, .parquet, .arrow, COCO .json), not "
            f"{suffix or 'a file without suffix'}"
        )


def _read_manifest(source: Path, suffix: str, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
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
            chosen = modality_columns(header, columns)
        except BadRow as error:
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
                    raise BadRow(f"is a JSON {type(values).__name__}, not an object with columns")
                chosen = modality_columns(values, columns)
            except (ValueError, RecursionError) as error:
                yield RowError(str(path), number, str(path), f"is not JSON: {error}")
            except BadRow as error:
                yield RowError(str(path), number, str(path), str(error))
            else:
                yield _make_row(path, number, {m: values[column] for m, column in chosen.items()})


def _make_row(path: Path, number: int, values: Mapping[str, object]) -> Row | RowError:
    """A row out of modality -> cell; blank cells and null are modalities that this row does not have."""
    text: str | None = None
    media: dict[str, Media] = {}
    for modality, value in values.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            return RowError(str(path), number, str(path), f"{modality} is {value!r:.60}, not a string")
        if modality == "text":
            text = value.strip()
        elif "\0" in value or "://" in value or not is_unicode(value, "surrogateescape"):
            return RowError(str(path), number, value, f"{modality} is not a file name; download files first")
        else:
            try:
                media[modality] = _locate(path.parent, value.strip())
            except OSError as error:  # too long
                what = f"{modality} {value!r:.60} is no file name ({error.strerror}); mend the row"
                return RowError(str(path), number, str(path), what)
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
            file = Path(folder) / name
            label = os.fsencode(file.parent.name).decode("utf-8", "replace")
            yield Row(str(root), number, label if labelled else None, {modality_of[kind]: file})
    for error in unreadable:
        yield RowError(str(root), 0, str(error.filename), f"folder cannot be read: {error.strerror}")
    if number == 0:
        raise ManifestError(
            f"{root}: holds no manifest (such as {MANIFEST_NAMES[0]}), no images and no audio files; "
            f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, audio in {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
