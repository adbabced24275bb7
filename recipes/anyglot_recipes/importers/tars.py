"""WebDataset tars: samples are neighbouring members with one key, `000017.jpg` beside `000017.txt`.

Members are read one after the other into memory, with a limit on their size; nothing is ever written to disk and no
name inside a tar is ever opened, so hostile names are only names. Links are not followed. Compressed tars are not read.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from anyglot_recipes.importers.rows import (
    AUDIO_SUFFIXES,
    DEFAULT_COLUMNS,
    IGNORE,
    IMAGE_SUFFIXES,
    MAX_BYTES,
    BadRow,
    Row,
    RowError,
    modality_columns,
)
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.media import MediaBytes

MAX_TEXT = 16 * 2**20
MAX_SHARDS = 1_000_000
_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: Path) -> list[Path]:
    """`data-{000..003}.tar` or `{train,val}.tar` as paths, in order.

    Raises ManifestError for more than a million, or braces that hold neither a range nor a list.
    """
    pieces = _BRACES.split(str(pattern))
    choices: list[list[str]] = []
    total = 1
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            choices.append([piece])
            continue
        if bounds := re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", piece):
            first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
            total *= max(last - first + 1, 0)
            if 0 < total <= MAX_SHARDS:
                choices.append([f"{number:0{width}d}" for number in range(first, last + 1)])
        elif "," in piece:
            choices.append(piece.split(","))
            total *= len(choices[-1])
        else:
            total = 0
        if not 0 < total <= MAX_SHARDS:
            raise ManifestError(
                f"{pattern}: {{{piece}}} is no list of 1 to {MAX_SHARDS} shards; write {{000..003}} or {{a,b}}"
            )
    return [Path("".join(chosen)) for chosen in itertools.product(*choices)]


def read_tar(path: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    """The samples of one tar, in its order.

    A member's columns are its extension (`jpg`, `speech.wav`), the parts of it, and its kind (`image`, `audio`,
    `text` of a .txt); a `.json` gives its keys. The first of them that the user or `DEFAULT_COLUMNS` names counts.

    Raises:
        ManifestError: the file is not there, is no tar, or holds no samples.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    number = 0
    unused = set(columns)
    with file:
        members = _members(path, file)
        try:
            for _, group in itertools.groupby(members, key=lambda member: member[0]):
                number += 1
                yield _sample(path, number, group, columns, unused)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
            if number == 0:
                raise ManifestError(f"{path}: is not a readable tar ({error}); get it again") from error
            # the sample at hand may lack members, so it is not used
            what = f"truncated or damaged from sample {number} on ({error}); get it again"
            yield RowError(str(path), number, str(path), what)
    if number == 0:
        raise ManifestError(f"{path}: holds no samples; put in files such as 000.jpg beside 000.txt")
    for column in sorted(unused):
        yield RowError(str(path), 0, str(path), f"there is no column {column!r} in any sample")


class _Bounded:
    """A file that refuses giant reads: tarfile reads as much at once as a header states."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= MAX_BYTES + _BLOCK:
            raise tarfile.ReadError(f"a header states {count} bytes")
        return self._read(count)


_Member = tuple[str, str, str, bytes | str]
"""Key, extension, name, and the content or what is wrong with it."""


def _members(path: Path, file: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=_Bounded(file), mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
        before = -1
        while (member := tar.next()) is not None:
            if tar.offset <= before:
                raise tarfile.ReadError("a header states a negative size")
            before = tar.offset
            tar.members.clear()  # they would pile up
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if member.isdir() or not stem or not extension:
                continue
            name = f"{path}::{member.name}"
            key = f"{folder}/{stem}"
            if not member.isreg():
                yield key, extension.lower(), name, "is a link or a device, not a file; put the file itself in"
                continue
            limit = MAX_BYTES if _kind(extension) in ("image", "audio") else MAX_TEXT
            if member.size > limit:
                yield key, extension.lower(), name, f"states {member.size} bytes, more than {limit}; leave it out"
                continue
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            yield key, extension.lower(), name, content.read()
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("there is no end mark")


def _kind(extension: str) -> str:
    suffix = "." + extension.lower().rpartition(".")[2]
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else suffix[1:]


def _sample(
    path: Path, number: int, group: Iterator[_Member], columns: Mapping[str, str], unused: set[str]
) -> Row | RowError:
    values: dict[str, str | MediaBytes] = {}
    seen: set[str] = set()
    problem: RowError | None = None
    for _, extension, name, content in group:  # to the end, whatever is wrong: the next group starts there
        if problem is not None:
            continue
        try:
            if extension in seen:
                raise BadRow(f"stands twice under one key ({extension}); keys must be unique")
            seen.add(extension)
            for column, value in _columns_of(extension, name, content, columns, unused):
                values.setdefault(column, value)
        except BadRow as error:
            problem = RowError(str(path), number, name, str(error))
    if problem is not None:
        return problem
    try:
        # a tar need not hold every column in every sample
        chosen = modality_columns(values, {name: modality for name, modality in columns.items() if name in values})
    except BadRow as error:
        return RowError(str(path), number, str(path), str(error))
    text = values.get(chosen.get("text", ""))
    if text is not None and not isinstance(text, str):
        return RowError(str(path), number, str(text), f"{chosen['text']} holds no text")
    media: dict[str, MediaBytes] = {}
    for modality, column in chosen.items():
        value = values[column]
        if modality != "text" and isinstance(value, str):
            return RowError(str(path), number, str(path), f"{column} is text, not {modality}")
        if isinstance(value, MediaBytes):
            media[modality] = value
    text = text.strip() if text else None
    if not text and not media:
        return RowError(str(path), number, str(path), "holds neither text nor media")
    return Row(str(path), number, text or None, media)


def _columns_of(
    extension: str, name: str, content: bytes | str, columns: Mapping[str, str], unused: set[str]
) -> Iterator[tuple[str, str | MediaBytes]]:
    """(column, value) of a member, by the names that count; none if it is of no use here."""
    kind = _kind(extension)
    names = [extension, *extension.split("."), "text" if kind == "txt" else kind]
    column = next((n for n in names if n in columns), None) or next((n for n in names if n in DEFAULT_COLUMNS), None)
    is_json = kind == "json"
    unused.discard(column or "")
    if (column is None and not is_json) or (column is not None and columns.get(column) == IGNORE):
        return
    if isinstance(content, str):
        raise BadRow(content)
    if kind in ("image", "audio"):
        assert column is not None
        yield column, MediaBytes(name, content)
        return
    try:
        text = content.decode("utf-8-sig")
        if not is_json:
            assert column is not None
            yield column, text
            return
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is not UTF-8 {'JSON' if is_json else 'text'} ({error})") from error
    if not isinstance(entries, dict):
        raise BadRow(f"is a JSON {type(entries).__name__}, not an object with text or caption")
    unused.difference_update(entries)
    for key, value in entries.items():
        if columns.get(key) == IGNORE or key not in {**DEFAULT_COLUMNS, **columns}:
            continue
        if isinstance(value, str) and columns.get(key, DEFAULT_COLUMNS.get(key)) == "text":
            yield key, value
        elif value is not None and columns.get(key, DEFAULT_COLUMNS.get(key)) == "text":
            raise BadRow(f"{key} is {value!r:.60}, not a string")
