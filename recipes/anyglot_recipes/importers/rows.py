"""What every reader of sources gives: rows and bad rows, and the choice of columns that is the same for all.

Opens nothing but the folder in which a named file is looked for. Everything wrong with one row is a `RowError`;
what makes a whole source useless is a `ManifestError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.media import MediaBytes

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

MAX_BYTES = 256 * 2**20
"""The most bytes of one media file inside a tar or a table."""

HALF = "its text holds half a character (a lone surrogate); mend the row"

Media = Path | MediaBytes


@dataclass(frozen=True)
class Row:
    """One row: its text, if any, and one file per modality, on disk or in memory.

    A row with several files of a modality names them before a dot, `0-1.speech`; see `modality_of`.
    `number` counts from 1: data rows of a CSV, lines of a JSONL file, samples of a tar, rows of a table, files of a
    folder tree in sorted order.
    """

    source: str
    number: int
    text: str | None
    media: Mapping[str, Media]


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


class BadRow(Exception):
    """Raised while one row is read; becomes a `RowError`."""


def modality_of(name: str) -> str:
    """The modality of a medium of a row: its name, or what follows the last dot of it."""
    return name.rpartition(".")[2]


def modality_columns(present: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Modality -> column for a row with the columns `present`; `BadRow` if one the user named is missing."""
    present = list(present)
    missing = [column for column in columns if column not in present]
    if missing:
        raise BadRow(f"there is no column {missing[0]!r}; the columns are {', '.join(map(str, present)) or 'none'}")
    chosen = {modality: column for column, modality in columns.items() if modality != IGNORE}
    for column, modality in DEFAULT_COLUMNS.items():
        if column in present and column not in columns:
            chosen.setdefault(modality, column)
    if not chosen:
        raise BadRow(
            f"none of the columns {', '.join(map(str, present)) or '(none)'} is known; "
            "say what they hold, such as --column file=image --column title=text"
        )
    return chosen


def renamed(values: Mapping[str, str | Media | None], columns: Mapping[str, str]) -> dict[str, str | Media | None]:
    """Column -> value of a source whose columns have fixed names, as modality -> value."""
    named = {columns.get(column, column): value for column, value in values.items()}
    named.pop(IGNORE, None)
    return named


def fixed_columns(source: Path, names: Iterable[str], columns: Mapping[str, str]) -> None:
    """Raises `ManifestError` if the user names a column that a source with the columns `names` cannot have."""
    names = list(names)
    for column in columns:
        if column not in names:
            raise ManifestError(f"{source}: there is no column {column!r}; the columns are {', '.join(names)}")


def inside(folder: Path, name: str) -> Path:
    """The file `name` below `folder`; `BadRow` if the name leads out of it."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or "://" in name or not is_unicode(name, "surrogateescape"):
        raise BadRow(f"{name!r:.200} is not a file name; download files first")
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise BadRow(f"{name!r:.200} leads out of {folder}; only files below it are read")
    return folder / name


def is_unicode(text: str, errors: str = "strict") -> bool:
    """Whether a text can be written; half a character (a lone surrogate), which JSON may hold, cannot.

    Names of files may hold such as stand for odd bytes: `errors` is "surrogateescape" for them.
    """
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


def each_file(files: Iterable[Path], read: Callable[[Path], Iterator[Row | RowError]]) -> Iterator[Row | RowError]:
    """The rows of several files; one that is useless becomes one `RowError`, and the next follows."""
    for path in files:
        try:
            yield from read(path)
        except ManifestError as error:
            yield RowError(str(path), 0, str(path), str(error))
