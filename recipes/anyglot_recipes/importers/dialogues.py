"""Dialogues of `anyglot synth` as training data: all media to codes once, then one document a dialogue.

A source is a dataset folder or a JSONL file of such dialogues beside its media (docs/formats.md). The first step is
`prepare` with `read_dialogues`: a dialogue is a row with several files. The second, `write_dialogues`, puts texts and
codes together, in the order and roles of the dialogue. What a system turn says, the user says.

Chain of modality: a model speaks better when it may write its words first (SpeechGPT, AnyGPT). With `chain="answer"`
the text of a spoken answer stands before it, unless it is written already in this turn or in the one it answers; with
"full" the answer also begins with what the user said, unless a text of it is just that. Two texts in a row stay two
where the model's template tells them apart (version 2); else they are one, with a new line between.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.segments import Role, Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_recipes.importers.rows import Media, Row, RowError
from anyglot_recipes.pairs import parts_of_model
from anyglot_recipes.prepare import PreparedRow, read_prepared
from anyglot_synth.dataset import SAMPLES, DatasetError, is_dataset, place
from anyglot_synth.dialogue import ASSISTANT, SPEECH, TEXT, USER, Dialogue, DialogueError, Turn
from anyglot_synth.job import JOB, JOURNAL
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import atomic_write

CHAINS = ("none", "answer", "full")
LEFT_OUT = "left_out.jsonl"


def is_dialogues(source: Path) -> bool:
    """Whether a source is a dataset folder of dialogues, or a `.jsonl` file whose first line is one.

    Raises:
        ManifestError: a dataset folder that is not finished.
    """
    if source.is_dir():
        if not is_dataset(source) and (source / JOB).is_file() and (source / JOURNAL).is_file():
            raise ManifestError(
                f"{source}: a dataset that is not finished ({JOURNAL}, no {SAMPLES}); run its `anyglot synth` again "
                "to its end"
            )
        return is_dataset(source)
    if source.suffix.lower() != ".jsonl" or not source.is_file():
        return False
    with source.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("turns"), list)


def read_dialogues(source: Path) -> Iterator[Row | RowError]:
    """The dialogues of a source as rows: their files, named `TURN-PART.MODALITY` from 0, and no text.

    A dialogue that cannot be read, or with a part whose medium was never made, is a `RowError`.

    Raises:
        ManifestError: the file is missing or empty.
    """
    path = source / SAMPLES if source.is_dir() else source
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield Row(str(path), number, None, _files(path.parent, _read(path, number, line)))
                except (DatasetError, DialogueError) as error:
                    yield RowError(str(path), number, str(path), str(error))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if number == 0:
        raise ManifestError(f"{path}: holds no dialogues; look into the rejects beside it for why")


def _read(path: Path, number: int, line: bytes) -> Dialogue:
    where = f"{path}, line {number}"
    try:
        return Dialogue.from_dict(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise DialogueError(f"{where}: is not JSON ({error})") from None


def _files(folder: Path, dialogue: Dialogue) -> dict[str, Media]:
    files: dict[str, Media] = {}
    for i, turn in enumerate(dialogue.turns):
        for j, part in enumerate(turn.parts):
            if part.modality == TEXT:
                continue
            if part.media is None:
                raise DatasetError(f"turn {i + 1} has a part ({part.modality}) without a file; run the recipe again")
            files[f"{i}-{j}.{part.modality}"] = place(folder, part.media)
    return files


def to_sample(
    dialogue: Dialogue, codes: Mapping[str, NDArray[np.int64]], chain: str = "none", *, apart: bool = False
) -> Sample:
    """A dialogue as segments.

    Args:
        dialogue: with a file in every part but texts.
        codes: int64 `[K, *grid]` by `TURN-PART.MODALITY`.
        chain: "none", "answer" or "full", see the module.
        apart: leave two texts in a row two (`Template.tells_texts_apart`).
    """
    segments: list[Segment] = []

    def add(modality: str, content: str | NDArray[np.int64], role: Role) -> None:
        last = segments[-1] if segments and not apart else None
        if isinstance(content, str) and last is not None and isinstance(last.content, str) and last.role == role:
            segments[-1] = Segment(TEXT, f"{last.content}\n{content}", role)  # else their words would run together
        else:
            segments.append(Segment(modality, content, role))

    before: Turn | None = None
    for i, turn in enumerate(dialogue.turns):
        role: Role = "assistant" if turn.role == ASSISTANT else "user"
        heard = _texts(before, SPEECH) if before is not None and before.role == USER and role == "assistant" else []
        own = _texts(turn, TEXT)
        written = own + (_texts(before, TEXT) if before is not None else [])
        if chain == "full" and " ".join(heard) not in own:  # which is how the form `chain` writes them
            for text in heard:
                if text not in own:
                    add(TEXT, text, role)
        for j, part in enumerate(turn.parts):
            if part.modality == TEXT:
                add(TEXT, part.text, role)
                continue
            if chain != "none" and role == "assistant" and part.modality == SPEECH and not _holds(written, part.text):
                add(TEXT, part.text, role)
            add(part.modality, codes[f"{i}-{j}.{part.modality}"], role)
        before = turn
    return Sample(segments)


def _texts(turn: Turn, modality: str) -> list[str]:
    return [part.text for part in turn.parts if part.modality == modality and part.text]


def _holds(written: list[str], said: str) -> bool:
    """Whether words stand in one of several texts."""
    return not said or any(re.search(rf"(?<!\w){re.escape(said)}(?!\w)", text) for text in written)


def write_dialogues(prepared: str | Path, model_dir: str | Path, chain: str = "none") -> tuple[int, int]:
    """Write `prepared/shards` for the model in `model_dir`; a document's task is its dialogue's.

    Args:
        prepared: folder of `prepare` with `read_dialogues`.
        model_dir: whose vocabulary, template and text tokenizer.
        chain: see `to_sample`.

    Returns:
        How many documents were written, and how many left out: those that the vocabulary cannot hold (a medium that is
        too long) or in which the assistant says nothing. `left_out.jsonl` says which and why.

    Raises:
        ManifestError: an unknown chain, or sources that have changed since.
    """
    if chain not in CHAINS:
        raise ManifestError(f"chain is {chain!r}; use one of {', '.join(CHAINS)}")
    prepared = Path(prepared)
    vocabulary, template, text = parts_of_model(prepared, Path(model_dir))
    written, left_out = 0, 0
    with (
        ShardWriter(prepared / "shards", vocabulary, template, text=text, overwrite=True) as writer,
        atomic_write(prepared / LEFT_OUT) as path,
        path.open("w", encoding="utf-8") as reasons,
    ):
        for row, dialogue in prepared_dialogues(prepared):
            codes = {name: found.numpy() for name, found in row.codes.items()}
            sample = to_sample(dialogue, codes, chain, apart=template.tells_texts_apart)
            try:
                ids, loss = template.render(sample, vocabulary, text)
                if not loss[1:].any():
                    raise ManifestError("the assistant says nothing; there is nothing to learn")
            except AnyglotError as error:
                left_out += 1
                reasons.write(json.dumps(RowError(row.source, row.row, row.source, str(error)).to_dict()) + "\n")
                continue
            writer.add(ids, loss, dialogue.task, sample)
            written += 1
        if not written:
            writer.abort()
    if not written:  # nothing of an earlier call may stay
        shutil.rmtree(prepared / "shards", ignore_errors=True)
    return written, left_out


def prepared_dialogues(prepared: Path) -> Iterator[tuple[PreparedRow, Dialogue]]:
    """Rows with their dialogues, read again from the sources; both are in the same order."""
    for source, rows in groupby(read_prepared(prepared), key=lambda row: row.source):
        with open(source, "rb") as file:
            number = 0
            for row in rows:
                if row.row <= number:  # the same source was given twice
                    number = file.seek(0)
                while number < row.row:
                    line, number = file.readline(), number + 1
                try:
                    dialogue = _read(Path(source), number, line)
                    if set(_files(Path(source).parent, dialogue)) != set(row.codes):
                        raise DatasetError("its media are others")
                except (DatasetError, DialogueError) as error:
                    raise ManifestError(f"{source}: has changed since it was prepared ({error}); run again") from error
                yield row, dialogue
