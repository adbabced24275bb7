"""Prepared rows to training shards: every ordered pair of what a row holds, and documents that string rows or pairs
together.

Knows nothing about media or models' weights: it reads codes that `prepare` wrote, and the vocabulary, template and text
tokenizer of a model folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path

import numpy as np

from anyglot_lm.hf_text import load_text
from anyglot_lm.segments import Sample, Segment, Template, TextCodec, with_examples
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes.documents import interleaved
from anyglot_recipes.prepare import PreparedRow, prepared_specs, read_prepared
from anyglot_tokenizers.errors import CodesError, FingerprintError


def pairs(row: PreparedRow) -> Iterator[tuple[str, Sample]]:
    """(task, sample) for every ordered pair of the row's text and media; the second is what is learnt."""
    parts = _parts(row)
    for given, asked in permutations(parts, 2):
        yield (
            f"{given}->{asked}",
            Sample([Segment(given, parts[given], "user"), Segment(asked, parts[asked], "assistant")]),
        )


def _parts(row: PreparedRow) -> dict[str, str | np.ndarray]:
    parts: dict[str, str | np.ndarray] = {name: codes.numpy() for name, codes in row.codes.items()}
    return {**parts, "text": row.text} if row.text else parts


def samples(rows: Iterable[PreparedRow], interleave: int, shots: int = 0) -> Iterator[tuple[str, Sample]]:
    """(task, sample) of every pair, and of documents of several rows that follow.

    Args:
        rows: that `prepare` wrote.
        interleave: rows of a sample "interleaved", or 0.
        shots: pairs of one direction before the last one of a sample "few-shot:GIVEN->ASKED", or 0. Every answer in it
            is learnt: one without an example, the next with one, and so on.
    """
    held: list[list[tuple[str, str | np.ndarray]]] = []
    turns: dict[str, list[Sample]] = {}
    for row in rows:
        for task, sample in pairs(row):
            yield task, sample
            if shots:
                turns.setdefault(task, []).append(sample)
                if len(turns[task]) > shots:
                    *examples, query = turns.pop(task)
                    yield f"few-shot:{task}", with_examples(examples, query)
        if interleave:
            held.append(list(_parts(row).items()))
        if held and len(held) == interleave:
            yield "interleaved", interleaved(held)
            held = []
    if len(held) > 1:
        yield "interleaved", interleaved(held)


def write_pairs(prepared: str | Path, model_dir: str | Path, interleave: int = 0, shots: int = 0) -> tuple[int, int]:
    """Write `prepared/shards` for the model in `model_dir`.

    Args:
        prepared: folder of `anyglot prepare`.
        model_dir: whose vocabulary, template and text tokenizer.
        interleave: rows of a document of several rows, in which everything is learnt; 0 for none.
        shots: examples of a few-shot document, see `samples`; 0 for none.

    Returns:
        How many samples were written, and how many left out because the vocabulary cannot hold them (a medium that is
        too long).
    """
    prepared = Path(prepared)
    vocabulary, template, text = parts_of_model(prepared, Path(model_dir))
    written, left_out = 0, 0
    with ShardWriter(prepared / "shards", vocabulary, template, text=text, overwrite=True) as writer:
        for task, sample in samples(read_prepared(prepared), interleave, shots):
            try:
                ids, loss = template.render(sample, vocabulary, text)
            except CodesError:
                left_out += 1
                continue
            writer.add(ids, loss, task, sample)
            written += 1
        if not written:
            writer.abort()
    if not written:  # nothing of an earlier call may stay
        shutil.rmtree(prepared / "shards", ignore_errors=True)
    return written, left_out


def parts_of_model(prepared: Path, model_dir: Path) -> tuple[Vocabulary, Template, TextCodec]:
    """The vocabulary, template and text tokenizer of a model. Raises `FingerprintError` if the codes are of another."""
    vocabulary = Vocabulary.load(model_dir / "vocabulary.json")
    for modality, spec in prepared_specs(prepared).items():
        if spec.fingerprint != vocabulary.block(modality).fingerprint:
            raise FingerprintError(
                f"{prepared}: its {modality} codes are of another tokenizer than those of {model_dir}; run "
                "anyglot prepare with this model"
            )
    return vocabulary, Template.load(model_dir / "template.json"), load_text(model_dir)
