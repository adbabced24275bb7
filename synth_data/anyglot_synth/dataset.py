"""Reading finished dataset folders: what became of every item, line by line.

    job.json        what was asked for: recipe, seed, fingerprint
    samples.jsonl   finished dialogues; rejects.jsonl and errors.jsonl: those that were filtered and those that failed
    objects/        their media, named by content

Nothing is held in memory but one line. Writes nothing; whether files are whole is for `validate` to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from anyglot_synth.dialogue import Dialogue, DialogueError, Json, MediaFile, Part, Turn
from anyglot_synth.stages import FAILED, FILTERED, OK, Item
from anyglot_tokenizers.errors import AnyglotError

JOB = "job.json"
SAMPLES, REJECTS, ERRORS = "samples.jsonl", "rejects.jsonl", "errors.jsonl"
STATUS_OF = {SAMPLES: OK, REJECTS: FILTERED, ERRORS: FAILED}


class DatasetError(AnyglotError):
    """A folder that is no finished dataset, or a line or a file of it that cannot be used."""


class Medium(NamedTuple):
    """A part of a dialogue that has a file; turns and parts count from 0."""

    turn_number: int
    part_number: int
    turn: Turn
    part: Part
    file: MediaFile


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a finished dataset of dialogues."""
    return (folder / JOB).is_file() and (folder / SAMPLES).is_file()


def read_job(folder: Path) -> Json:
    """`job.json`. Raises `DatasetError`."""
    path = folder / JOB
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a finished dataset"
        ) from None
    except ValueError as error:
        raise DatasetError(f"{path}: is not JSON ({error}); run the recipe again") from None
    if not isinstance(found, dict):
        raise DatasetError(f"{path}: holds no JSON object; run the recipe again")
    return found


def title_of(job: Mapping[str, Any]) -> str:
    """The name that a recipe gives itself, or one for all."""
    recipe = job.get("recipe")
    name = recipe.get("name") if isinstance(recipe, Mapping) else None
    return name if isinstance(name, str) and name.strip() else "Synthetic dialogues"


def read_items(folder: Path, name: str = SAMPLES) -> Iterator[Item]:
    """The items of one of the three lists, in its order. A list that is not there is empty, but for the samples.

    Of a filtered or failed item the dialogue is as far as it came, perhaps without any turns.

    Raises:
        DatasetError: no samples, or a line that is no item; the message begins with the file and the line.
    """
    path = folder / name
    if not path.is_file():
        if name == SAMPLES:
            raise DatasetError(f"{path}: no such file; give the folder of a finished dataset")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield read_item(line, STATUS_OF[name], f"{path}, line {number}")


def read_item(line: bytes, status: str, where: str) -> Item:
    """One line as an item. Raises `DatasetError`, whose message begins with `where`."""
    if not line.endswith(b"\n"):
        raise DatasetError(f"{where}: is cut off; run the recipe again")
    try:
        found = json.loads(line, parse_constant=_refuse)
        if b"\\ud" in line.lower():
            json.dumps(found, ensure_ascii=False).encode()  # half a character (a lone surrogate) is no text
        index = found["index"]
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"its index is {index!r}")
        if status == OK or found.get("turns"):
            dialogue = Dialogue.from_dict(found, where)
        else:
            dialogue = Dialogue((), str(found.get("source", "")), str(found.get("licence", "unknown")))
        ending = {key: str(found.get(key, "")) for key in ("stage", "reason", "detail")} if status != OK else {}
        facts = dict(found.get("facts") or {})
        return Item(index, dialogue, status, retryable=bool(found.get("retryable")), facts=facts, **ending)
    except DialogueError as error:
        raise DatasetError(str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{where}: is no item of a dataset ({error!r}); run the recipe again") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def media_of(dialogue: Dialogue) -> Iterator[Medium]:
    """The parts of a dialogue that have a file, in order."""
    for i, turn in enumerate(dialogue.turns):
        for j, part in enumerate(turn.parts):
            if part.media is not None:
                yield Medium(i, j, turn, part, part.media)


def is_inside(file: str) -> bool:
    """Whether a file's name is a plain relative path with `/` that stays in the folder."""
    parts = PurePosixPath(file).parts
    return bool(parts) and not file.startswith("/") and ".." not in parts and not any(c in file for c in "\\:\0")


def place(folder: Path, media: MediaFile) -> Path:
    """Where a file of the dataset is. Raises `DatasetError` for a name that leads out of the folder."""
    if not is_inside(media.file):
        raise DatasetError(f"{folder}: the file {media.file!r:.200} leads out of the folder; it is not read")
    return folder / media.file


def score_of(path: Path) -> Path | None:
    """The MIDI file beside a piece of music, if there is one."""
    score = path.with_suffix(".mid")
    return score if score != path and score.is_file() else None


def engine_of(media: MediaFile) -> str:
    """What made a file, such as "flite 2.2"; of files that came with the data "given"."""
    backend = media.origin.get("backend") or media.origin.get("identity") or {}
    known = backend if isinstance(backend, Mapping) else {"engine": backend}
    name = known.get("engine") or known.get("name") or "given"
    version = str(known.get("version") or media.origin.get("version") or "")
    return f"{name} {version.removeprefix(f'{name}-')}".strip()


def voice_of(media: MediaFile) -> str:
    """The name of the voice of a spoken file, such as "flite/slt"; "" where it is not known."""
    style: Any = media.origin.get("style")
    for known in (style if isinstance(style, Mapping) else {}, media.origin):
        for key in ("voice", "speaker"):
            if isinstance(known.get(key), str | int):
                return f"{engine_of(media).split()[0]}/{known[key]}"
    return ""


def licence_of(media: MediaFile, dialogue: Dialogue) -> str:
    """SPDX name of a file's licence: of one that came with the data the data's; where none is noted, "unknown"."""
    given = dialogue.licence if engine_of(media) == "given" else "unknown"
    return str(media.origin.get("licence") or given)
