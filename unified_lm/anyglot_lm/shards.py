"""Token shards on disk: documents as raw ids with their loss runs, written once and memory-mapped ever after.

    DIR/ids.bin            ids of all documents, little-endian uint16 (up to 65,536 ids) or uint32
    DIR/offsets.npy        int64 [D + 1]     document d is ids[offsets[d] : offsets[d + 1]]
    DIR/tasks.npy          uint16 [D]        index into the task names of meta.json
    DIR/loss_runs.npy      uint32 [R, 2]     stretches [start, stop) of a document that are prediction targets
    DIR/loss_offsets.npy   int64 [D + 1]     document d has the runs [loss_offsets[d], loss_offsets[d + 1])
    DIR/vocabulary.json    the manifest of the ids
    DIR/meta.json          template, tokenizers, counts (by task and modality), sha256 of every file

A folder appears whole or not at all. At write time 1 % of the documents (the first always) are read back
from the file and decoded to codes, which must be those that went in. This file decides no order and no
mixture: that is `plan`.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.files import check_free, fingerprint_of, read_json, replace_folder, sha256_file, write_json
from anyglot_lm.patterns import Int64
from anyglot_lm.segments import CHAT, Sample, Template, TextCodec, direction_of
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError, FingerprintError, ManifestError

FORMAT = "anyglot-shards"
VERSION = 1
CHECKED_SHARE = 0.01
SCANNED = 1 << 24
"""Ids that `ShardReader.modality_ids` reads at once."""
PROMPT = 3
"""Ids of the prompt of an unconditional document: bos, user, assistant."""
_ARRAYS = ("ids.bin", "offsets.npy", "tasks.npy", "loss_runs.npy", "loss_offsets.npy")


class ShardError(AnyglotError):
    """A shard folder that is broken, or documents that cannot be written."""


class ShardWriter:
    """Writes one shard folder; a context manager. The folder exists once `close` has returned.

        with ShardWriter("shards/train", vocabulary, text=tokenizer) as writer:
            writer.add_sample(Sample([...]), task="text->image")

    Args:
        path: the folder to make.
        vocabulary: the ids' manifest.
        template: how `add_sample` renders, and the check at the end parses.
        text: the text tokenizer; needed for samples with text.
        overwrite: replace a folder that exists.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        template: Template = CHAT,
        *,
        text: TextCodec | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.vocabulary = vocabulary
        self.template = template
        self.text = text
        self.overwrite = overwrite
        check_free(self.path, overwrite=overwrite)
        self.dtype = np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self._folder.chmod(0o755)
        self._file = open(self._folder / "ids.bin", "wb")  # noqa: SIM115
        self._offsets = array("q", [0])
        self._tasks = array("H")
        self._runs = array("I")
        self._run_offsets = array("q", [0])
        self._task_index: dict[str, int] = {}
        self._task_ids: list[int] = []
        self._modality_of_id = modality_of_id(vocabulary)
        self._task_modalities: list[Int64] = []
        self._targets = 0
        self._checks: dict[int, str | None] = {}
        self._rng = np.random.default_rng(0)
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __len__(self) -> int:
        return len(self._tasks)

    def add_sample(self, sample: Sample, task: str) -> int:
        """Renders a sample and adds it. Returns its number of ids."""
        ids, loss = self.template.render(sample, self.vocabulary, self.text)
        return self._add(ids, loss, task, sample)

    def add(self, ids: Any, loss: Any, task: str, sample: Sample | None = None) -> int:
        """Adds a document: ids int `[N]`, loss bool `[N]` as `Template.render` gives them. Returns `N`.

        With `sample`, what it was rendered from, the check at the end compares text and codes with it.

        Raises:
            ShardError: shapes that differ, fewer than two ids, no target, or an id outside the vocabulary.
        """
        return self._add(np.asarray(ids), np.asarray(loss), task, sample)

    def _add(self, ids: NDArray[Any], loss: NDArray[Any], task: str, sample: Sample | None) -> int:
        if not self._open:
            raise ShardError(f"{self.path}: this writer is closed; open another folder")
        number = len(self._tasks)
        where = f"{self.path}: document {number} of task {task!r}"
        shaped = ids.ndim == 1 and len(ids) >= 2 and loss.shape == ids.shape
        if not shaped or not np.issubdtype(ids.dtype, np.integer) or loss.dtype != np.bool_:
            raise ShardError(
                f"{where}: needs ids int [N] and loss bool [N] with N >= 2, got {ids.dtype} {ids.shape} and "
                f"{loss.dtype} {loss.shape}; take both from Template.render"
            )
        if not loss[1:].any():
            raise ShardError(f"{where}: nothing in it is a prediction target; give at least one segment loss=True")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary.size:
            raise ShardError(
                f"{where}: ids {int(ids.min())} to {int(ids.max())} leave the vocabulary of {self.vocabulary.size}"
            )
        if task not in self._task_index:
            if len(self._task_index) >= 1 << 16 or not task:
                raise ShardError(f"{where}: a task needs a name, and a folder holds at most 65,536 of them")
            self._task_index[task] = len(self._task_index)
            self._task_ids.append(0)
            self._task_modalities.append(np.zeros(len(self.vocabulary.blocks) + 1, dtype=np.int64))
        flags = np.zeros(len(loss) + 2, dtype=np.bool_)
        flags[1:-1] = loss
        edges = np.flatnonzero(flags[1:] != flags[:-1])
        self._runs.extend(edges.tolist())
        self._run_offsets.append(len(self._runs) // 2)
        self._file.write(ids.astype(self.dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._tasks.append(self._task_index[task])
        self._task_ids[self._task_index[task]] += len(ids)
        counts = np.bincount(self._modality_of_id[ids], minlength=len(self.vocabulary.blocks) + 1)
        self._task_modalities[self._task_index[task]] += counts
        self._targets += int(loss.sum())
        if self._rng.random() < CHECKED_SHARE or number == 0:
            self._checks[number] = _digest_sample(sample, self.vocabulary) if sample is not None else None
        return len(ids)

    def abort(self) -> None:
        """Drops everything written so far."""
        if self._open:
            self._open = False
            self._file.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Checks 1 % of the documents against the files and moves the folder to its place.

        Raises:
            ShardError: no documents, or a document that does not decode to what went in. Nothing is left
            behind then.
            ManifestError: the folder came to be there meanwhile, without `overwrite`.
        """
        if not self._open:
            return
        try:
            if not len(self):
                raise ShardError(f"{self.path}: no documents to write; check what the source yields")
            self._file.close()
            np.save(self._folder / "offsets.npy", np.asarray(self._offsets, dtype="<i8"))
            np.save(self._folder / "tasks.npy", np.asarray(self._tasks, dtype="<u2"))
            np.save(self._folder / "loss_runs.npy", np.asarray(self._runs, dtype="<u4").reshape(-1, 2))
            np.save(self._folder / "loss_offsets.npy", np.asarray(self._run_offsets, dtype="<i8"))
            self.vocabulary.save(self._folder / "vocabulary.json")
            write_json(self._folder / "meta.json", self._meta())
            self._check()
            check_free(self.path, overwrite=self.overwrite)
            replace_folder(self._folder, self.path)
            self._open = False
        finally:
            self.abort()

    def _meta(self) -> dict[str, Any]:
        counts = np.bincount(np.asarray(self._tasks), minlength=len(self._task_index))
        names = ("text", *self.vocabulary.modalities)
        tasks = [
            {
                "name": name,
                "documents": int(counts[i]),
                "ids": self._task_ids[i],
                "modalities": dict(zip(names, self._task_modalities[i].tolist(), strict=True)),
            }
            for name, i in self._task_index.items()
        ]
        files = {
            name: {"bytes": (self._folder / name).stat().st_size, "sha256": sha256_file(self._folder / name)}
            for name in _ARRAYS
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "vocabulary": self.vocabulary.fingerprint,
            "template": self.template.to_dict(),
            "tokenizers": {b.modality: b.fingerprint for b in self.vocabulary.blocks},
            "text_tokenizer": self.vocabulary.text_fingerprint,
            "dtype": self.dtype.str,
            "documents": len(self),
            "ids": self._offsets[-1],
            "targets": self._targets,
            "checked": len(self._checks),
            "tasks": tasks,
            "files": files,
        }

    def _check(self) -> None:
        reader = ShardReader(self._folder)
        for number, expected in self._checks.items():
            ids, loss = reader.doc(number)
            try:
                parsed = self.template.parse(ids, self.vocabulary, self.text, loss)
            except AnyglotError as error:
                raise ShardError(
                    f"{self.path}: document {number} does not decode ({error}); write ids of Template.render only"
                ) from error
            if expected is not None and _digest_sample(parsed, self.vocabulary) != expected:
                raise ShardError(
                    f"{self.path}: document {number} decodes to other content than was written; please report this"
                )


def modality_of_id(vocabulary: Vocabulary) -> NDArray[np.uint16]:
    """What every id belongs to, uint16 `[size]`: 0 for text and controls, else 1 + the index of its block.

    A block's start and end id are its own.
    """
    table = np.zeros(vocabulary.size, dtype=np.uint16)
    for index, block in enumerate(vocabulary.blocks):
        table[block.start_id] = table[block.end_id] = index + 1
        table[block.first_id : block.stop_id] = index + 1
    return table


def _digest_sample(sample: Sample, vocabulary: Vocabulary) -> str:
    """sha256 of what survives writing: roles, texts (neighbours joined), codes that the patterns keep."""
    parts: list[list[Any]] = []
    for segment in sample.segments:
        if isinstance(segment.content, str):
            if parts and parts[-1][:2] == [segment.role, "text"]:
                parts[-1][2] += segment.content
            elif segment.content:
                parts.append([segment.role, "text", segment.content])
            continue
        block = vocabulary.block(segment.modality)
        kept = block.pattern_of(direction_of(segment.role)).num_codebooks(block.num_quantizers)
        codes = np.asarray(segment.content)[:kept]
        parts.append([segment.role, segment.modality, codes.tolist()])
    return fingerprint_of(parts)


class ShardReader:
    """Reads a shard folder; arrays stay on disk. Cheap to pickle: only the path travels.

    Args:
        path: the folder.
        vocabulary: the model's vocabulary, to be compared with the folder's.
        template: the model's template, to be compared with the folder's.
        verify: also compare the sha256 of every file (reads all of it).

    Raises:
        FingerprintError: the folder was made for another vocabulary, tokenizer or template.
        ManifestError, ShardError: it is no shard folder, or a file of it is missing or damaged.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary | None = None,
        template: Template | None = None,
        *,
        verify: bool = False,
    ) -> None:
        self.path = Path(path)
        self.meta = read_json(self.path / "meta.json")
        if self.meta.get("format") != FORMAT or self.meta.get("version") != VERSION:
            raise ManifestError(
                f"{self.path / 'meta.json'}: format {self.meta.get('format')!r} version "
                f"{self.meta.get('version')!r} is not {FORMAT!r} version {VERSION}; write the shards again"
            )
        self.vocabulary = Vocabulary.load(self.path / "vocabulary.json")
        if self.vocabulary.fingerprint != self.meta["vocabulary"]:
            raise FingerprintError(
                f"{self.path}: vocabulary.json is not the one meta.json names; restore it or write the shards again"
            )
        self.template = Template.from_dict(self.meta["template"])
        if vocabulary is not None:
            self.vocabulary.check_same(vocabulary, f"the shards {self.path}", "the model")
        if template is not None and template != self.template:
            raise FingerprintError(
                f"{self.path}: written with template {self.template.name} version {self.template.version}, "
                f"the model has {template.name} version {template.version}; write the shards again"
            )
        for name, entry in self.meta["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.exists() else -1
            if size != entry["bytes"]:
                state = "is missing" if size < 0 else f"has {size} bytes instead of {entry['bytes']}"
                raise ShardError(f"{file}: {state}; copy the folder again or write the shards again")
            if verify and sha256_file(file) != entry["sha256"]:
                raise ShardError(f"{file}: its sha256 is not the one recorded; copy the folder again")
        self.task_names: list[str] = [task["name"] for task in self.meta["tasks"]]
        # Plain views of the mapped files: slicing a np.memmap itself costs several times as much.
        self.ids: NDArray[Any] = np.asarray(np.memmap(self.path / "ids.bin", dtype=self.meta["dtype"], mode="r"))
        self.offsets, self._tasks, self.runs, self.run_offsets = (
            np.asarray(np.load(self.path / name, mmap_mode="r")) for name in _ARRAYS[1:]
        )

    def __len__(self) -> int:
        return int(self.meta["documents"])

    @property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, template and files: equal for equal content, wherever it lies."""
        files = {name: entry["sha256"] for name, entry in self.meta["files"].items()}
        names = [task["name"] for task in self.meta["tasks"]]
        return fingerprint_of([self.meta["vocabulary"], self.meta["template"], names, files])

    @property
    def lengths(self) -> Int64:
        """Ids per document: int64 `[D]`."""
        return np.diff(self.offsets)

    @property
    def tasks(self) -> NDArray[np.uint16]:
        """Index into `task_names` per document: uint16 `[D]`."""
        return self._tasks

    def runs_of(self, docs: Int64) -> tuple[Int64, Int64]:
        """All stretches of prediction targets of documents `[N]`: the position of its document in `docs`, int64 `[R]`,
        and `[start, stop)` inside that document, int64 `[R, 2]`.
        """
        first = self.run_offsets[docs]
        counts = self.run_offsets[docs + 1] - first
        of_doc = np.repeat(np.arange(len(docs)), counts)
        index = np.arange(len(of_doc)) + (first - np.cumsum(counts) + counts)[of_doc]
        return of_doc, self.runs[index].astype(np.int64)

    def unconditional(self, docs: Int64) -> tuple[Int64, NDArray[np.bool_]]:
        """Whether documents `[N]` have a prompt that can be left out, bool `[N]`, and where it ends, int64 `[N]`.

        The answer starts with the first prediction target. It must follow an assistant marker, so that
        `bos user assistant <answer>` (`Template.prompt` of an empty sample, then the answer) is a document of the
        template, and be shorter than before.
        """
        cuts = self.runs[self.run_offsets[docs], 0].astype(np.int64)
        droppable = cuts > PROMPT
        before = self.ids[self.offsets[docs[droppable]] + cuts[droppable] - 1]
        droppable[droppable] = before == self.vocabulary.controls["assistant"]
        return cuts, droppable

    def modality_ids(self) -> Int64:
        """Ids per task and modality: int64 `[tasks, 1 + blocks]`, text (with the controls) first.

        Taken from meta.json; folders written before it held these counts are read through once.
        """
        names = ("text", *self.vocabulary.modalities)
        if all("modalities" in task for task in self.meta["tasks"]):
            return np.asarray([[task["modalities"][n] for n in names] for task in self.meta["tasks"]], dtype=np.int64)
        return self.modality_sums(np.ones(len(self)), np.zeros(len(self))).astype(np.int64)

    def modality_sums(self, whole: NDArray[Any], bare: NDArray[Any]) -> NDArray[np.float64]:
        """Ids per task and modality as `modality_ids`, of documents that count `whole` times and, without their prompt
        (see `unconditional`), `bare` times, `[D]` each: float64 `[tasks, 1 + blocks]`. Reads the ids that count.
        """
        width, cuts = len(self.vocabulary.blocks) + 1, np.zeros(len(self), dtype=np.int64)
        if bare.any():
            found, droppable = self.unconditional(np.arange(len(self)))
            cuts = np.where(droppable, found, 0)
        parts = np.stack([cuts, self.lengths - cuts], axis=1)  # prompt and answer
        times = np.stack([whole, whole + bare], axis=1)
        table, sums = modality_of_id(self.vocabulary), np.zeros(len(self.task_names) * width)
        starts = np.arange(0, int(self.offsets[-1]), SCANNED)
        for low, high in pairwise([*np.searchsorted(self.offsets, starts), len(self)]):
            if times[low:high].any():
                bins = np.repeat(self._tasks[low:high].astype(np.int64) * width, self.lengths[low:high])
                bins += table[self.ids[self.offsets[low] : self.offsets[high]]]
                weights = np.repeat(times[low:high].ravel(), parts[low:high].ravel())
                sums += np.bincount(bins, weights, len(sums))
        sums_TM = sums.reshape(-1, width)
        np.add.at(sums_TM[:, 0], self._tasks, PROMPT * bare * (cuts > 0))
        return sums_TM

    def doc(self, index: int) -> tuple[Int64, NDArray[np.bool_]]:
        """Document `index` as `(ids int64 [N], loss bool [N])`."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.path}")
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        loss = np.zeros(stop - start, dtype=np.bool_)
        for low, high in self.runs[self.run_offsets[index] : self.run_offsets[index + 1]].tolist():
            loss[low:high] = True
        return self.ids[start:stop].astype(np.int64), loss

    def sample(self, index: int, text: TextCodec | None = None) -> Sample:
        """Document `index` parsed back to segments."""
        ids, loss = self.doc(index)
        return self.template.parse(ids, self.vocabulary, text, loss)

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path]]:
        return ShardReader, (self.path,)

    def __repr__(self) -> str:
        return f"ShardReader({str(self.path)!r}, documents={len(self)}, ids={self.meta['ids']})"


def open_shards(
    shards: Sequence[str | Path | ShardReader],
    vocabulary: Vocabulary | None = None,
    template: Template | None = None,
) -> list[ShardReader]:
    """Opens shard folders and checks that all were made for one vocabulary and template."""
    if not shards:
        raise ManifestError("no shard folders given; name at least one")
    readers: list[ShardReader] = []
    for entry in shards:
        path = entry.path if isinstance(entry, ShardReader) else entry
        readers.append(ShardReader(path, vocabulary, template))
        first = readers[0]
        first.vocabulary.check_same(readers[-1].vocabulary, f"the shards {first.path}", f"the shards {path}")
        if first.template != readers[-1].template:
            raise FingerprintError(
                f"the shards {first.path} and {path} have different templates; write one of them again"
            )
    return readers
