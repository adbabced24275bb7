"""Documents beyond pairs: plain text for replay, interleaved ones of several rows, and few-shot examples of a file.

`text_documents` cuts long texts into samples that a row can hold, at paragraphs, then lines, sentences and words,
and loses nothing; `interleaved` strings the text and media of several rows into one sample in which everything is
learnt. `write_text_shards` is `anyglot replay`. Mixtures and packing are the plan's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from anyglot_lm.hf_text import load_text
from anyglot_lm.segments import Sample, Segment, Template, TextCodec
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import ManifestError

BREAKS = (r"(?<=\n\n)", r"(?<=\n)", r"(?<=[.!?] )", r"(?<= )")
"""Where texts are cut: after empty lines, lines, sentences, words; the first that gives pieces small enough."""

FRAME = 3
"""Ids of a plain text beside its own: bos, assistant, eos."""


def text_documents(text: str, codec: TextCodec, max_ids: int) -> Iterator[Sample]:
    """Samples of plain text, each at most `max_ids` ids; joined they are `text`, blank stretches aside."""
    room = max_ids - FRAME
    held = ""
    for piece in _pieces(text, codec, room, 0):
        if held and len(codec.encode(held + piece)) > room:  # ids of a whole are not the sum of its parts'
            if held.strip():
                yield _plain(held)
            held = ""
        held += piece
    if held.strip():
        yield _plain(held)


def _plain(text: str) -> Sample:
    return Sample([Segment("text", text, "assistant")])


def _pieces(text: str, codec: TextCodec, room: int, level: int) -> Iterator[str]:
    half = len(text) // 2  # of a word that is longer than a row
    for piece in re.split(BREAKS[level], text) if level < len(BREAKS) else (text[:half], text[half:]):
        if len(piece) < 2 or len(codec.encode(piece)) <= room:
            yield piece
        else:
            yield from _pieces(piece, codec, room, level + 1)


def interleaved(rows: Sequence[Sequence[tuple[str, str | np.ndarray]]]) -> Sample:
    """One sample of the parts of several rows, (modality, text or codes) in order; all of it is learnt."""
    return Sample([Segment(modality, content, "assistant") for row in rows for modality, content in row])


def read_examples(file: Path) -> list[tuple[dict[str, str | Path], dict[str, str | Path]]]:
    """Few-shot examples for `UnifiedModel.generate`: lines `{"in": {"image": "a.png"}, "out": {"text": "red"}}`.

    Paths of media are taken from the folder of the file.

    Raises:
        ManifestError: a line that is no such example, or a file that is no UTF-8 text.
    """
    examples = []
    for number, line in enumerate(_utf8(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            sides = json.loads(line)
            given, answer = (
                {m: c if m == "text" else file.parent / c for m, c in sides[side].items()} for side in ("in", "out")
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{file}, line {number}: no example ({error!r}); write "
                '{"in": {"image": "a.png"}, "out": {"text": "red"}}'
            ) from error
        examples.append((given, answer))
    return examples


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file}: byte {error.start} is no UTF-8; convert it, for example with iconv") from error


def write_text_shards(
    files: Iterable[Path], model_dir: Path, out: Path, *, max_ids: int = 512, overwrite: bool = False
) -> int:
    """Write UTF-8 text files as one shard folder for the model in `model_dir`. Returns the number of documents.

    Raises:
        ManifestError: a file that is no UTF-8 text, or rows too short for a character.
    """
    if max_ids < 16:
        raise ManifestError(f"max_ids={max_ids}; a character may take several ids, give at least 16")
    vocabulary, codec = Vocabulary.load(model_dir / "vocabulary.json"), load_text(model_dir)
    with ShardWriter(
        out, vocabulary, Template.load(model_dir / "template.json"), text=codec, overwrite=overwrite
    ) as writer:
        for file in files:
            for sample in text_documents(_utf8(file), codec, max_ids):
                writer.add_sample(sample, task="text")
        return len(writer)
