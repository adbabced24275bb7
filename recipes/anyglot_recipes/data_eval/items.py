"""Rows of a source as items of an evaluation: what is given, and all right answers to it.

Rows that give the same thing (five captions of one picture) are one item with several references. Which items are
taken is drawn by a seed in one pass over the source, so it depends on the rows and on nothing else. Media are read and
encoded here, by the model's own tokenizers; no answer is made.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from anyglot_lm.segments import Role, Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.importers.anygpt import is_anygpt
from anyglot_recipes.importers.dialogues import is_dialogues
from anyglot_recipes.importers.rows import Media, Row, RowError
from anyglot_recipes.manifest import read_manifest
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.media import MediaBytes

TEXT = "text"
READ = 32
"""Media held in memory at once while they are encoded."""

Content = str | Media
"""A text, or a file of media."""


@dataclass(frozen=True)
class Task:
    """What is given and what is asked for, such as `image->text` or `text+image->speech`."""

    given: tuple[str, ...]
    asked: str

    def __str__(self) -> str:
        return f"{'+'.join(self.given)}->{self.asked}"


@dataclass
class Item:
    """One question with its right answers.

    Attributes:
        name: source and row that it is from.
        contents: modality -> what the item's rows hold of it, without repetitions; of what is given, exactly one.
        codes: modality -> codes int64 `[K, *grid]` of the first content, of media that are given or asked for.
        keys: the right answers, told apart by their contents.
    """

    name: str
    contents: dict[str, list[Content]]
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()

    def texts(self) -> list[str]:
        """The item's texts."""
        return [content for content in self.contents.get(TEXT, ()) if isinstance(content, str)]

    def segment(self, modality: str, role: Role) -> Segment:
        """The first content of a modality, as a part of a sample."""
        return Segment(modality, self.texts()[0] if modality == TEXT else self.codes[modality], role)

    def has(self, modality: str) -> bool:
        """Whether there is a text, or a medium that could be read."""
        return bool(self.texts()) if modality == TEXT else modality in self.codes


def read_task(text: str, model: UnifiedModel, where: str) -> Task:
    """`"image->text"` as a task of this model. Raises ManifestError for anything else."""
    given, arrow, asked = text.replace(" ", "").partition("->")
    task = Task(tuple(given.split("+")), asked)
    if not arrow or not all(task.given) or not asked or "->" in asked:
        raise ManifestError(f"--task {text}: write what is given and what is asked for, such as image->text")
    if "+" in asked or "," in asked:
        raise ManifestError(f"--task {text}: asks for several things; real data are measured one at a time")
    known = (TEXT, *model.vocabulary.modalities)
    for modality in (*task.given, asked):
        if modality not in known:
            raise ManifestError(f"--task {text}: the model {where} has no {modality!r}, only {', '.join(known)}")
        if modality != TEXT and modality not in model.tokenizers:
            raise ManifestError(f"--task {text}: the model {where} was made without a tokenizer for {modality!r}")
    if len({*task.given, asked}) <= len(task.given):
        raise ManifestError(f"--task {text}: names a modality twice; a row holds one of each")
    return task


def read_rows(source: Path, columns: Mapping[str, str], images: Path | None) -> Iterator[Row | RowError]:
    """The rows of anything that `anyglot prepare` reads as rows. Raises ManifestError for what holds none."""
    for kind, holds in ((is_dialogues, "dialogues of anyglot synth"), (is_anygpt, "token strings without media")):
        if source.exists() and kind(source):
            raise ManifestError(f"{source}: holds {holds}, not rows; give a manifest or a folder of media")
    return read_manifest(source, columns, images=images)


def choose(
    rows: Iterable[Row | RowError], task: Task, num: int | None, seed: int, left_out: Counter[str]
) -> list[Item]:
    """`num` items drawn at random (all without a number), in the order of the source.

    Every item draws a number from the seed and its place; those with the smallest are kept. So one pass is enough, only
    what is kept is held, and no kept item lacks a reference that comes later.

    Args:
        rows: of the source.
        task: rows that lack what it gives are left out.
        num: most items.
        seed: of the choice.
        left_out: counts the rows that make no item, by reason.

    Raises:
        ManifestError: no row has what the task gives.
    """
    drawn: dict[str, int] = {}
    kept: dict[str, tuple[int, Item]] = {}
    heap: list[tuple[int, str]] = []
    held: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, RowError):
            left_out[f"bad row: {row.error}"] += 1
            continue
        parts: dict[str, Content] = {**row.media, **({TEXT: row.text} if row.text else {})}
        held.update(parts.keys())
        lacking = [modality for modality in task.given if modality not in parts]
        if lacking:
            left_out[f"no {lacking[0]} in the row"] += 1
            continue
        key = "\n".join(f"{modality} {key_of(parts[modality])}" for modality in task.given)
        if key not in drawn:
            place = len(drawn)
            drawn[key] = int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:8], "big")
            kept[key] = (place, Item(f"{Path(row.source).name}:{row.number}", {}))
            heapq.heappush(heap, (-drawn[key], key))
            if num is not None and len(kept) > num:
                del kept[heapq.heappop(heap)[1]]
        if key in kept:
            contents = kept[key][1].contents
            for modality, content in parts.items():
                if content not in contents.setdefault(modality, []):
                    contents[modality].append(content)
    if not kept:
        there = f"rows hold {', '.join(sorted(held))}" if held else "there are no good rows"
        why = f" ({'; '.join(f'{reason}: {n}' for reason, n in left_out.most_common(3))})" if left_out else ""
        raise ManifestError(
            f"nothing to do for {task}: no row has {' and '.join(task.given)}, {there}{why}; say what a column holds, "
            f"such as --column audio={task.given[0]}"
        )
    return [item for _, item in sorted(kept.values(), key=lambda pair: pair[0])]


def encode(model: UnifiedModel, items: Sequence[Item], task: Task, left_out: Counter[str]) -> list[Item]:
    """The items whose given media can be read, with codes and keys. An answer that cannot be read is no reference.

    Raises:
        ManifestError: no item is left.
    """
    for modality in (*task.given, task.asked):
        if modality == TEXT:
            continue
        waiting: list[tuple[Item, Tensor]] = []
        for number, item in enumerate(items, start=1):
            contents = item.contents.get(modality, [])
            while contents:
                try:
                    waiting.append((item, model.read_media(modality, contents[0])))
                    break
                except AnyglotError as error:
                    left_out[f"bad {modality}: {error}"] += 1
                    del contents[0]
            if len(waiting) == READ or number == len(items):
                codes = codes_of(model, modality, [medium for _, medium in waiting])
                for (item, _), found in zip(waiting, codes, strict=True):
                    if isinstance(found, AnyglotError):
                        left_out[f"bad {modality}: {found}"] += 1
                    else:
                        item.codes[modality] = found
                waiting = []
    good = [item for item in items if all(item.has(modality) for modality in task.given)]
    if not good:
        first = next(iter(left_out), "no reason is known")
        raise ManifestError(f"none of {len(items)} items of {task} can be read; {first}")
    for item in good:
        item.keys = frozenset(key_of(content) for content in item.contents.get(task.asked, ()))
    return good


def codes_of(model: UnifiedModel, modality: str, media: Sequence[Tensor]) -> list[np.ndarray | AnyglotError]:
    """Codes int64 `[K, *grid]` of each medium, or the error that the tokenizer has with this very one."""
    try:
        return [codes.numpy() for codes in model.encode_media(modality, media)] if media else []
    except AnyglotError as error:
        if len(media) == 1:
            return [error]
        return [codes for medium in media for codes in codes_of(model, modality, [medium])]


def key_of(content: Content) -> str:
    """What tells a content apart: the text, the path, or the bytes of a medium in memory."""
    if isinstance(content, MediaBytes):
        return f"{content.name} {hashlib.sha256(content.content).hexdigest()}"
    return str(content)


def prompt_of(item: Item, task: Task) -> Sample:
    """What the model is asked."""
    return Sample([item.segment(modality, "user") for modality in task.given])


def others(num: int, rng: np.random.Generator, most: int) -> list[list[int]]:
    """For each of `num` items, up to `most` others at random: whose answers are as good as one's that saw nothing."""
    return [[int(j) for j in rng.permutation(num)[: most + 1] if j != i][:most] for i in range(num)]
