"""Rows of files, one at a time: JSON arrays, JSON lines, parquet and arrow; plain or gzipped, UTF-8 or with a BOM.

Memory holds one row of a JSON file, and one batch of a parquet or arrow file. A row that is broken becomes a `BadRow`
and reading goes on where the next one begins; in an array that is after its closing bracket, so a row whose brackets do
not match takes the rest of its file with it. This file does not know what a row means.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from anyglot_synth.dataset import SAMPLES, is_dataset
from anyglot_synth.sources.base import BadRow, SourceError

MAX_ROW = 64 << 20
"""Characters of one row of JSON: a longer one is skipped."""
_JSON = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
_TABLES = (".parquet", ".arrow")
_CHUNK = 1 << 20
_BATCH = 64
_OWN_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def expand(data: Sequence[str]) -> list[Path]:
    """The files that paths, folders and patterns name; those of one folder or pattern sorted by name.

    Raises:
        SourceError: there are none.
    """
    found: list[Path] = []
    for given in data:
        path = Path(given)
        if path.is_file():
            found.append(path)
            continue
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_of_data(p, path))
        else:
            inside = sorted(Path(name) for name in glob.glob(given, recursive=True) if Path(name).is_file())
        if not inside:
            raise SourceError(f"{given}: there is no file to read; use {', '.join((*_JSON[:3], *_TABLES))} or .gz")
        found += inside
    return found


def _is_of_data(path: Path, folder: Path) -> bool:
    """Whether a file of a folder holds rows: not hidden, and nothing that `datasets` keeps for itself.

    Of a dataset made here only the samples: what was rejected must not come back.
    """
    hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
    own = path.name in _OWN_FILES or path.name.startswith("cache-")
    if not path.name.lower().endswith((*_JSON, *_TABLES)) or hidden or own:
        return False
    return path.name == SAMPLES or not is_dataset(path.parent)


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row or `BadRow`) of a file. Raises `SourceError` where it cannot be opened."""
    if path.suffix.lower() in _TABLES:
        yield from _table_rows(path)
        return
    number = 0
    try:
        with _opened(path) as file:
            first = _first_line(file)
            if first[:1] == "[":
                found = _values(_chunks(file), 1)
            elif first[:1] == "{" and first[-1] in "{[,":  # objects on several lines each, or all on one
                found = _values(_chunks(file), 0)
            else:
                found = _lines(file)
            for number, row in enumerate(found, start=1):
                yield number, _parsed(row, path.name, number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield number + 1, BadRow(path.name, number + 1, f"the file breaks off here ({error}); fetch it again")
    except UnicodeError as error:
        yield number + 1, BadRow(path.name, number + 1, f"the rest of the file is not text ({error})")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _opened(path: Path) -> IO[str]:
    """The file as text; bytes that are no UTF-8 come as lone surrogates, so that only their row is lost."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if packed else open(path, "rb") as raw:
        head = raw.read(4)
    utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    if packed:
        return gzip.open(path, "rt", encoding=encoding, errors=errors)
    return open(path, encoding=encoding, errors=errors)


def _first_line(file: IO[str]) -> str:
    """Both ends of the first line with something in it; then the file is at its start.

    Only the first character where the line is the last one, or an object longer than a row may be.
    """
    while line := file.readline(1000):
        if line.strip():
            break
    first = last = line.strip()
    size = len(line)
    while first[:1] == "{" and size <= MAX_ROW and line and not line.endswith("\n"):
        line = file.readline(_CHUNK)
        last, size = line.strip() or last, size + len(line)
    file.seek(0)
    return first[:1] + last[-1:] if line.endswith("\n") else first[:1]


def _parsed(row: str | None, name: str, number: int) -> Any:
    if row is None:
        return BadRow(name, number, f"it has more than {MAX_ROW} characters")
    if found := re.search("[\udc80-\udcff]", row):
        return BadRow(name, number, f"not UTF-8 at character {found.start()} (byte 0x{ord(found[0]) - 0xDC00:02x})")
    try:
        return json.loads(row)
    except json.JSONDecodeError as error:
        return BadRow(name, number, f"not JSON: {error}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands
        return BadRow(name, number, f"not JSON that can be read: {error}")


def _lines(file: IO[str]) -> Iterator[str | None]:
    """Lines with something in them; None for one that is too long."""
    while line := file.readline(MAX_ROW + 1):
        if len(line) > MAX_ROW:
            while line and not line.endswith("\n"):
                line = file.readline(MAX_ROW)
            yield None
        elif line.strip():
            yield line


def _chunks(file: IO[str]) -> Iterator[str]:
    while chunk := file.read(_CHUNK):
        yield chunk


_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'["\\]')


def _values(chunks: Iterable[str], base: int) -> Iterator[str | None]:
    """The texts of values: those of one array (base 1), or of objects one after another (base 0).

    Only brackets, commas and strings are looked at; None for a value that is too long.
    """
    depth, in_string, escaped = 0, False, False
    pieces: list[str] = []
    size = 0

    def take(text: str) -> None:
        nonlocal size
        size += len(text)
        if size <= MAX_ROW:
            pieces.append(text)
        else:
            pieces.clear()

    def value() -> Iterator[str | None]:
        nonlocal size
        text, too_long = "".join(pieces), size > MAX_ROW
        pieces.clear()
        size = 0
        if too_long:
            yield None
        elif text.strip():
            yield text

    for chunk in chunks:
        start = at = 0
        if escaped:
            escaped, at = False, 1
        while found := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
            mark, at = found[0], found.end()
            if mark == '"':
                in_string = not in_string
            elif mark == "\\":
                escaped = at == len(chunk)
                at += 1
            elif mark in "[{":
                if depth < base:
                    start = at
                depth += 1
            elif mark in "]}":
                depth -= 1
                if depth < base or (base == 0 and depth == 0):
                    take(chunk[start : at if base == 0 else at - 1])
                    yield from value()
                    start = at
                    if depth < base and base:
                        return
                    depth = max(depth, 0)
            elif depth == base:
                take(chunk[start : at - 1])
                yield from value()
                start = at
        take(chunk[start:])
    yield from value()


def _table_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SourceError(f"{path}: needs the package pyarrow; pip install 'anyglot[data]'") from None
    number = 0
    try:
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        else:
            for batch in _arrow_batches(path):
                for start in range(0, len(batch), _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield number, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        problem = f"the file is damaged from here on ({str(error).splitlines()[0]})"
        yield number + 1, BadRow(path.name, number + 1, problem)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error}); check the path") from error


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an arrow file, of either form (`datasets` writes streams)."""
    import pyarrow as pa
    import pyarrow.ipc

    with pa.memory_map(str(path)) as mapped:
        magic = mapped.read(6)
        mapped.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
        else:
            yield from pa.ipc.open_stream(mapped)
