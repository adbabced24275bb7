"""`Source`: something that gives dialogues; `RowSource`: one that reads rows of files; `BadRow`: a row that is none.

A source of rows says what one row means (`dialogue`); reading, order, licences, the form (what of it is spoken) and
bad rows are the same for all of them, and here.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import Dialogue, DialogueError, Part, Turn, escaped
from anyglot_synth.forms import Forms
from anyglot_synth.store import Store, StoreError
from anyglot_tokenizers.errors import AnyglotError, MediaError
from anyglot_tokenizers.files import DISK_ERRORS

log = logging.getLogger("anyglot.synth")


class SourceError(AnyglotError):
    """A source that cannot be used at all: no such file, an unknown option."""


@dataclass(frozen=True)
class BadRow:
    """A row that is no dialogue: it goes to the errors of a run and never ends it.

    Args:
        source: the file, or the name of the data.
        row: its number there, from 1; 0 is the file as a whole.
        error: one line.

    What in them is no Unicode (lone surrogates of the row, or of a file's name) is written as escapes.
    """

    source: str
    row: int
    error: str

    def __post_init__(self) -> None:
        for name in ("source", "error"):
            object.__setattr__(self, name, escaped(getattr(self, name)))


class Source(ABC):
    """Gives dialogues in a stable order. Light: what is heavy is opened by `read`."""

    name: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON of all that changes what it gives: part of a job's fingerprint."""

    @abstractmethod
    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """All dialogues, streaming. Media that come with the data are put into the store on the way.

        Raises:
            SourceError: there is nothing to read. StoreError: the disk refuses.
        """


@dataclass(kw_only=True)
class RowSource(Source):
    """Reads rows: JSON arrays, JSON lines, parquet and arrow, plain or gzipped (see `rows.py`).

    The fields of it and of its subclasses are the options of a recipe, plain YAML values.

    Args:
        data: a file, a folder (all files of it that can be read, sorted), a pattern with `*`, or a list of these.
        form: what of the text is spoken: "text" (nothing), "user-speech", "speech", "chain", or weights by name; see
            `forms.py`.
        seed: of the form, where weights draw it.
        data_name: of the data, kept in every dialogue as its `source`; that of the dataset card (see `card_of`)
            otherwise, else that of the first file (of a pattern its first) or folder.
        licence: SPDX name of the data and of files that come with it; that of the card otherwise, else "unknown".
        language: BCP-47 tag of its text.
        columns: ours -> theirs, for data that name a field differently: {instruction: prompt}.
    """

    data: str | Sequence[str]
    form: str | Mapping[str, float] = "text"
    seed: int = 0
    data_name: str = ""
    licence: str = ""
    language: str = "en"
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.data = [self.data] if isinstance(self.data, str) else list(self.data or ())
        if not self.data or not all(isinstance(path, str) and path for path in self.data):
            raise SourceError(f"source {self.name!r}: data names no file; give a path")
        self.forms = Forms(self.form, self.seed)
        first = _first(self.data[0])
        card = card_of(first if first.is_dir() else first.parent)
        self.data_name = escaped(self.data_name or card["name"] or first.name.split(".")[0] or first.name)

    def config(self) -> dict[str, Any]:
        """What it was told, and which files these are now: name, size, a hash of their two ends, licence."""
        files, licences = self.files(), self.licences()
        return {
            **self.settings(),
            "files": [[escaped(path.name), *file_mark(path), licences[path.parent]] for path in files],
        }

    def settings(self) -> dict[str, Any]:
        """What it was told, without its files."""
        return {
            "kind": self.name,
            "form": self.forms.config(),
            "data_name": self.data_name,
            "licence": self.licence,
            "language": self.language,
            "columns": dict(self.columns or {}),
            **self.options(),
        }

    def options(self) -> dict[str, Any]:
        """JSON of the options of a class of its own."""
        return {}

    def files(self) -> list[Path]:
        """The files, in order. Raises `SourceError`."""
        from anyglot_synth.sources.rows import expand

        return expand(self.data)

    def licences(self) -> dict[Path, str]:
        """Of the data by folder of its files: as given, or as the card there or of the data as a whole says."""
        tops = [Path(path) for path in self.data if Path(path).is_dir()]

        def of(folder: Path) -> str:
            places = [folder, *(top for top in tops if folder.is_relative_to(top))]
            return next((found for place in places if (found := card_of(place)["licence"])), "unknown")

        return {folder: self.licence or of(folder) for folder in {path.parent for path in self.files()}}

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """See `Source`."""
        from anyglot_synth.sources.rows import rows_of

        self.begin()
        licences = self.licences()
        for path in self.files():
            for number, row in rows_of(path):
                if isinstance(row, BadRow):
                    yield row
                else:
                    yield from self.dialogues(row, store, path.name, number, path.parent, licences[path.parent])

    def begin(self) -> None:
        """Called before the first row of every reading: for sources that remember rows."""
        return None

    def dialogues(
        self, row: Any, store: Store, file: str, number: int, folder: Path, licence: str
    ) -> Iterator[Dialogue | BadRow]:
        """What one row gives, checked, in its form. Raises `StoreError`, `SourceError`; all else is a bad row."""
        try:
            if not isinstance(row, Mapping):
                raise DialogueError(f"the row is a JSON {type(row).__name__}, not an object")
            columns = (self.columns or {}).items()
            renamed = {**row, **{ours: row[theirs] for ours, theirs in columns if theirs in row}}
            for found in self.build(renamed, store, folder):
                dialogue = replace(
                    found,
                    licence=found.licence if found.licence != "unknown" else licence,
                    language=found.language or self.language,
                )
                dialogue.check()
                licensed = _licensed(dialogue)
                formed = self.forms(licensed)
                if formed is not licensed:
                    formed.check()  # a chain may have joined parts to one that is too long
                yield formed
        except (DialogueError, MediaError, RecursionError) as error:  # the last: JSON of a thousand brackets
            yield BadRow(file, number, str(error).removeprefix("dialogue: "))
        except (StoreError, SourceError):
            raise
        except Exception as error:  # one row must not end a run of a million; the log has it all
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                where = error.filename or store.folder
                raise StoreError(f"{where}: {error.strerror}; free some space and run again") from error
            log.exception("a defect in source %r, %s, row %d", self.name, escaped(file), number)
            yield BadRow(file, number, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    @abstractmethod
    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """The dialogues of a row (mostly one), as text and media. Raises `DialogueError` or `MediaError`.

        Args:
            row: the fields, by our names where `columns` renames them.
            store: where media that come with the data go.
            folder: of the file, for relative paths.
        """


def _first(data: str) -> Path:
    """The file or folder that a path names, with a name whatever the path is; of a pattern the first file."""
    from anyglot_synth.sources.rows import expand

    path = Path(data)
    if glob.has_magic(data) and not path.exists():
        path = expand([data])[0]
    return Path(os.path.abspath(path))


def _licensed(dialogue: Dialogue) -> Dialogue:
    """The dialogue with its licence on those of its files that say none."""

    def change(i: int, j: int, turn: Turn, part: Part) -> Part:
        if part.media is None or part.media.origin.get("licence"):
            return part
        return replace(part, media=replace(part.media, origin={**part.media.origin, "licence": dialogue.licence}))

    return dialogue.map_parts(change)


def file_mark(path: Path) -> tuple[int, str]:
    """(bytes, 16 hex digits): enough to notice another file without reading all of a big one; no proof of equality."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ends = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        ends += file.read()
    return size, hashlib.sha256(ends).hexdigest()[:16]


def card_of(folder: Path) -> dict[str, str]:
    """`licence` and `name` that a dataset card says: `README.md` with YAML between `---`.

    It is in the folder, or above it where the folder is called `data`, as on the Hub. A `README.md` above any other
    folder may be of something else. A card that cannot be read says nothing, and so do values that are no text.
    """
    import yaml

    folder = Path(os.path.abspath(folder))
    for place in (folder, folder.parent) if folder.name == "data" else (folder,):
        card = place / "README.md"
        if not card.is_file():
            continue
        try:
            with open(card, encoding="utf-8-sig", errors="replace") as file:
                found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", file.read(1 << 16), re.S)
            values = yaml.safe_load(found[1]) if found else None
        except Exception:  # noqa: BLE001 (PyYAML raises errors of all kinds for values such as the day 2024-13-45)
            values = None
        if isinstance(values, dict):
            licence = _texts(values.get("license", values.get("licence")))
            return {"licence": " AND ".join(licence), "name": "".join(_texts(values.get("pretty_name"))[:1])}
    return {"licence": "", "name": ""}


def _texts(value: Any) -> list[str]:
    """A text or a list of texts of a card; no other value, which may be endless when it is written out."""
    found = value if isinstance(value, list) else [value]
    return [escaped(one) for one in found] if all(isinstance(one, str) for one in found) else []


def folder_name(path: str) -> str:
    """The name of a folder that is an option, as a `config` holds it; "" where none is given."""
    return escaped(Path(os.path.abspath(path)).name) if path else ""


def text_of(row: Mapping[str, Any], *names: str, needed: bool = True) -> str:
    """The first of these fields that is there and not empty, stripped. Raises `DialogueError` where one is needed."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DialogueError(f"{name!r} is a {type(value).__name__}, not text")
        if value.strip():
            return value.strip()
    if needed:
        there = [name for name in names if name in row]
        if there:
            raise DialogueError(f"{there[0]!r} is empty")
        raise DialogueError(f"it has no {names[0]!r}; it has: {', '.join(map(str, row))[:200]}")
    return ""
