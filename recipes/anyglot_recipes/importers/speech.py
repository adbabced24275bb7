"""Speech corpora in their own folders: LibriSpeech and LJSpeech, as rows of `text` and `speech`.

Texts stay as the corpus spells them (LibriSpeech: capitals without punctuation). No sound is opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from anyglot_recipes.importers.rows import Row, RowError, fixed_columns, renamed
from anyglot_tokenizers.errors import ManifestError

TRANSCRIPT = ".trans.txt"
_ID = re.compile(r"[\w-]+")


def is_librispeech(folder: Path) -> bool:
    """Whether there is a `*.trans.txt` below the folder."""
    return next(folder.rglob(f"*{TRANSCRIPT}"), None) is not None


def is_ljspeech(folder: Path) -> bool:
    """Whether the folder holds `wavs/` and a `metadata.csv` whose first line has bars and no header."""
    if not ((folder / "wavs").is_dir() and (folder / "metadata.csv").is_file()):
        return False
    with (folder / "metadata.csv").open("rb") as file:
        return b"|" in file.readline(1 << 20)


def read_librispeech(root: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    """The utterances below `root`, in the order of names: `SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside FLAC.

    A line without a text, an id that is twice there or no name, and a FLAC without a line are `RowError`s.
    """
    fixed_columns(root, ("text", "speech"), columns)
    number = 0
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        subfolders.sort()
        sounds = {name for name in names if name.endswith(".flac") and not name.startswith(".")}
        for name in sorted(name for name in names if name.endswith(TRANSCRIPT)):
            transcript = Path(folder) / name
            seen: set[str] = set()
            for line in _lines(transcript):
                number += 1
                if isinstance(line, OSError | UnicodeDecodeError):
                    yield RowError(str(root), number, str(transcript), f"cannot be read as UTF-8 text ({line})")
                    continue
                key, _, text = line.partition(" ")
                if not _ID.fullmatch(key) or not text.strip() or key in seen:
                    what = f"{line!r:.80} is not an id of its own and a text; mend the line"
                    yield RowError(str(root), number, str(transcript), what)
                    continue
                seen.add(key)
                sounds.discard(f"{key}.flac")
                yield _row(root, number, text.strip(), Path(folder) / f"{key}.flac", columns)
        for name in sorted(sounds):
            number += 1
            what = f"has no transcript; give it a line in a {TRANSCRIPT} file beside it"
            yield RowError(str(root), number, str(Path(folder) / name), what)
    for error in unreadable:
        yield RowError(str(root), 0, str(error.filename), f"folder cannot be read: {error.strerror}")


def read_ljspeech(root: Path, columns: Mapping[str, str]) -> Iterator[Row | RowError]:
    """The lines `id|raw|normalised` of `metadata.csv`, the sounds being `wavs/id.wav`.

    The last text that is there counts. Bars cannot be quoted in this format, quotation marks are ordinary characters.
    """
    fixed_columns(root, ("text", "speech"), columns)
    path = root / "metadata.csv"
    seen: set[str] = set()
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        if isinstance(line, OSError | UnicodeDecodeError):
            yield RowError(str(path), number, str(path), f"cannot be read as UTF-8 text ({line})")
            continue
        key, *texts = line.split("|")
        said = [text.strip() for text in texts if text.strip()]
        if not _ID.fullmatch(key) or len(texts) not in (1, 2) or not said or key in seen:
            what = f"{line!r:.80} is not id|text|normalised with an id of its own; mend the line"
            yield RowError(str(path), number, str(path), what)
            continue
        seen.add(key)
        yield _row(path, number, said[-1], root / "wavs" / f"{key}.wav", columns)
    if number == 0:
        raise ManifestError(f"{path}: holds no rows; put one sample on each line")


def _row(source: Path, number: int, text: str, sound: Path, columns: Mapping[str, str]) -> Row:
    values = renamed({"text": text, "speech": sound}, columns)
    said = values.pop("text", None)
    assert said is None or isinstance(said, str)
    return Row(str(source), number, said, {m: path for m, path in values.items() if isinstance(path, Path)})


def _lines(path: Path) -> Iterator[str | OSError | UnicodeDecodeError]:
    """Lines that are not blank, each decoded alone so that a bad one costs no other."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield line.decode("utf-8-sig").strip("\r\n")
                    except UnicodeDecodeError as error:
                        yield error
    except OSError as error:
        yield error
