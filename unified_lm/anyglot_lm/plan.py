"""The plan of a run: which documents make up which row, for the whole run, decided once.

From (shards, mixture by token share, row length, number of packs, seed) follows one list of *packs*; a pack
is a list of whole documents that fit one row of `seq_len` ids. Documents are drawn source by source in
shuffled epochs, so that every prefix of the draw has the wanted share of tokens; then all that the run needs
is packed together, across sources, by best-fit decreasing (Johnson 1974), and the packs are shuffled.
Nothing is ever cut: documents longer than a row are left out and counted.

A plan is a folder of two memory-mapped arrays and a JSON file. Its fingerprint covers the shards' content,
the parameters and the arrays, so equal fingerprints mean the same run, document by document. Reading rows is
`data`'s job.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.files import fingerprint_of, new_folder, read_json, sha256_file, write_json
from anyglot_lm.packing import count_packs, draw, pack
from anyglot_lm.patterns import Int64
from anyglot_lm.segments import Template
from anyglot_lm.shards import ShardReader, open_shards
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError, FingerprintError, ManifestError

FORMAT = "anyglot-plan"
VERSION = 1
ALGORITHM = "best-fit-decreasing/1"
_log = logging.getLogger(__name__)


class PlanError(AnyglotError):
    """A mixture that cannot be had, or a broken plan."""


@dataclass(frozen=True)
class Source:
    """What a plan takes from one source (a task, or a shard folder): counts for `Plan.describe`."""

    name: str
    documents: int
    ids: int
    too_long: int
    weight: float
    drawn_documents: int
    drawn_ids: int

    @property
    def repetition(self) -> float:
        """How often the plan goes through the source."""
        return self.drawn_ids / self.ids if self.ids else 0.0


@dataclass(frozen=True, eq=False)
class Plan:
    """One global order of packs. Make one with `build_plan`, or `Plan.load`.

    Attributes:
        shards: the folders the documents are in.
        seq_len: ids of a row.
        pack_offsets: int64 `[P + 1]`; pack p holds the documents `docs[pack_offsets[p] : pack_offsets[p + 1]]`.
        docs: int64 or int32 `[N]`; documents are counted through all shards in order.
        fingerprint: identity of shards, parameters and order.
        parameters: what it was built from.
        sources: counts per source.
        path: its folder, if it was saved.
    """

    shards: tuple[ShardReader, ...]
    seq_len: int
    pack_offsets: NDArray[Any]
    docs: NDArray[Any]
    fingerprint: str
    parameters: Mapping[str, Any]
    sources: tuple[Source, ...]
    path: Path | None = None
    _starts: Int64 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum([len(s) for s in self.shards])]).astype(np.int64)
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.pack_offsets) - 1

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all shards."""
        return self.shards[0].vocabulary

    def pack(self, index: int) -> list[int]:
        """Documents of pack `index`, counted through all shards."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return [int(d) for d in self.docs[self.pack_offsets[index] : self.pack_offsets[index + 1]]]

    def doc(self, number: int) -> tuple[Int64, NDArray[np.bool_]]:
        """Document `number`, counted through all shards, as `(ids int64 [N], loss bool [N])`."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[shard].doc(number - int(self._starts[shard]))

    @property
    def used_ids(self) -> int:
        """Ids of all packs without padding."""
        return sum(source.drawn_ids for source in self.sources)

    @property
    def utilisation(self) -> float:
        """Share of the rows that is no padding."""
        return self.used_ids / (len(self) * self.seq_len)

    def describe(self) -> str:
        """The plan as a tree with counts, to print."""
        p = self.parameters
        lines = [
            f"plan {self.fingerprint[:12]}: {len(self):,} packs of {self.seq_len:,} ids, "
            f"{self.utilisation:.2%} full, seed {p['seed']}"
        ]
        for shard in self.shards:
            lines.append(f"├─ shards {shard.path}: {len(shard):,} documents, {shard.meta['ids']:,} ids")
        total = self.used_ids
        for i, source in enumerate(self.sources):
            branch = "└─" if i == len(self.sources) - 1 else "├─"
            left_out = f", {source.too_long:,} longer than a row left out" if source.too_long else ""
            lines.append(
                f"{branch} {source.name}: {source.drawn_ids / total:.1%} of ids (wanted "
                f"{source.weight:.1%}), {source.drawn_documents:,} documents, {source.repetition:.2f} epochs "
                f"of {source.documents:,}{left_out}"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Plan:
        """Writes the plan's folder, atomically, and returns the plan that is mapped from it.

        A folder that holds this very plan is left alone, so that several processes may save the same plan.
        """
        path = Path(path)

        def is_this(place: Path) -> bool:
            file = place / "plan.json"
            return file.exists() and read_json(file).get("fingerprint") == self.fingerprint

        if is_this(path):
            return Plan.load(path)
        with new_folder(path, overwrite=(path / "plan.json").exists(), keep=is_this) as folder:
            np.save(folder / "pack_offsets.npy", self.pack_offsets)
            np.save(folder / "docs.npy", self.docs)
            write_json(folder / "plan.json", self._to_dict(path))
        return Plan.load(path)

    def _to_dict(self, path: Path) -> dict[str, Any]:
        base = path.resolve()
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "seq_len": self.seq_len,
            "num_packs": len(self),
            "parameters": dict(self.parameters),
            "shards": [
                {"path": os.path.relpath(s.path.resolve(), base), "fingerprint": s.fingerprint} for s in self.shards
            ],
            "sources": [vars(s) for s in self.sources],
        }

    @classmethod
    def load(cls, path: str | Path, shards: Sequence[str | Path] | None = None) -> Plan:
        """Opens a plan's folder. `shards` says where its shard folders lie now, if they were moved.

        Raises:
            FingerprintError: the shards or the arrays are not those the plan was built from.
            ManifestError: it is no plan, or a shard folder is missing.
        """
        path = Path(path)
        content = read_json(path / "plan.json")
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ManifestError(
                f"{path / 'plan.json'}: format {content.get('format')!r} version {content.get('version')!r} "
                f"is not {FORMAT!r} version {VERSION}; build the plan again"
            )
        places = list(shards) if shards is not None else [path / s["path"] for s in content["shards"]]
        readers = open_shards([Path(os.path.normpath(p)) for p in places])
        known = [s["fingerprint"] for s in content["shards"]]
        if [r.fingerprint for r in readers] != known:
            changed = [str(r.path) for r, k in zip(readers, known, strict=False) if r.fingerprint != k]
            raise FingerprintError(
                f"{path}: built from other shards than {', '.join(changed) or 'those given'}; build the plan "
                "again (a run that used it cannot be resumed exactly)"
            )
        try:
            pack_offsets = np.load(path / "pack_offsets.npy", mmap_mode="r")
            docs = np.load(path / "docs.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: {error}; build the plan again") from error
        arrays = {name: sha256_file(path / f"{name}.npy") for name in ("pack_offsets", "docs")}
        if _fingerprint(content["parameters"], known, arrays) != content["fingerprint"]:
            raise FingerprintError(f"{path}: its arrays are not those of its fingerprint; build the plan again")
        return cls(
            shards=tuple(readers),
            seq_len=content["seq_len"],
            pack_offsets=pack_offsets,
            docs=docs,
            fingerprint=content["fingerprint"],
            parameters=content["parameters"],
            sources=tuple(Source(**s) for s in content["sources"]),
            path=path,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return Plan.load, (self.path, [s.path for s in self.shards])
        values = (self.shards, self.seq_len, self.pack_offsets, self.docs, self.fingerprint)
        return Plan, (*values, dict(self.parameters), self.sources)


def build_plan(
    shards: Sequence[str | Path | ShardReader],
    weights: Mapping[str, float] | None = None,
    *,
    seq_len: int,
    num_packs: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    max_repetition: float | None = None,
    path: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    template: Template | None = None,
) -> Plan:
    """Builds the plan of a run.

    Args:
        shards: shard folders.
        weights: share of *ids* per source, normalised by their sum. A key is the name of a task or a shard folder
            (its path as given, or its last part); every document must belong to exactly one key, and 0 leaves a
            source out. By default every task has its natural share.
        seq_len: ids of a row.
        num_packs: rows of the whole run: steps x accumulation x batch size x ranks.
        epochs: instead of `num_packs`: about that many times all ids of the sources.
        seed: seed of all shuffling.
        max_repetition: the most often a source may be gone through; None for no limit.
        path: folder to save to. A plan that is there already and equal is kept.
        vocabulary, template: the model's, to be compared with the shards'.

    Raises:
        PlanError: a key without documents, documents without or with two keys, or too much repetition.
        FingerprintError: shards of another vocabulary or template.
    """
    if seq_len < 2:
        raise PlanError(f"seq_len={seq_len}; a row needs at least 2 ids")
    if (num_packs is None) == (epochs is None):
        raise PlanError("give either num_packs or epochs")
    readers = open_shards(shards, vocabulary, template)
    lengths = np.concatenate([r.lengths for r in readers]).astype(np.int64)
    names, source_of_doc = _sources(readers, weights)
    fits = lengths <= seq_len
    ids = np.bincount(source_of_doc[fits], lengths[fits], minlength=len(names)).astype(np.int64)
    share = _shares(names, ids, weights)
    if num_packs is None:
        assert epochs is not None
        if not epochs > 0:
            raise PlanError(f"epochs={epochs}; give a number above 0")
        num_packs = max(1, count_packs(np.bincount(lengths[fits & (share[source_of_doc] > 0)]), seq_len))
        num_packs = max(1, round(num_packs * epochs))
    if num_packs < 1:
        raise PlanError(f"num_packs={num_packs}; a plan needs at least one pack")
    _check_repetition(names, ids, share, num_packs * seq_len, max_repetition)

    drawn = draw(lengths, fits, source_of_doc, share, num_packs * seq_len, seq_len, seed)
    packs, docs = pack(drawn, lengths, seq_len, num_packs, seed)
    docs = docs.astype(np.int32 if len(lengths) <= 1 << 31 else np.int64)
    counts = np.bincount(source_of_doc[docs], minlength=len(names))
    used = np.bincount(source_of_doc[docs], lengths[docs], minlength=len(names))
    total = np.bincount(source_of_doc, minlength=len(names))
    fitting = np.bincount(source_of_doc[fits], minlength=len(names))
    sources = tuple(
        Source(
            name=name,
            documents=int(fitting[i]),
            ids=int(ids[i]),
            too_long=int(total[i] - fitting[i]),
            weight=float(share[i]),
            drawn_documents=int(counts[i]),
            drawn_ids=int(used[i]),
        )
        for i, name in enumerate(names)
    )
    for source in sources:
        if source.too_long and source.weight:
            _log.warning(
                "%s: %d of %d documents are longer than a row of %d ids and left out",
                source.name, source.too_long, source.too_long + source.documents, seq_len,
            )  # fmt: skip
    parameters = {
        "algorithm": ALGORITHM,
        "seq_len": seq_len,
        "num_packs": num_packs,
        "weights": {name: float(weights[name]) for name in names} if weights is not None else None,
        "seed": seed,
    }
    arrays = {"pack_offsets": _sha256_npy(packs), "docs": _sha256_npy(docs)}
    plan = Plan(
        shards=tuple(readers),
        seq_len=seq_len,
        pack_offsets=packs,
        docs=docs,
        fingerprint=_fingerprint(parameters, [r.fingerprint for r in readers], arrays),
        parameters=parameters,
        sources=sources,
    )
    return plan.save(path) if path is not None else plan


def _fingerprint(parameters: Mapping[str, Any], shards: Sequence[str], arrays: Mapping[str, str]) -> str:
    return fingerprint_of({"parameters": dict(parameters), "shards": list(shards), "arrays": dict(arrays)})


def _sha256_npy(values: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _sources(readers: Sequence[ShardReader], weights: Mapping[str, float] | None) -> tuple[list[str], Int64]:
    """Names of the sources, and the source of every document: int64 `[D]`."""
    tasks = [task for reader in readers for task in reader.task_names]
    if weights is None:
        names = sorted(set(tasks))
        index = {name: i for i, name in enumerate(names)}
        parts = [np.asarray([index[t] for t in r.task_names], dtype=np.int64)[r.tasks] for r in readers]
        return names, np.concatenate(parts)
    names = list(weights)
    folders = {name: [r for r in readers if name in (str(r.path), r.path.name)] for name in names}
    for name in names:
        if name not in tasks and not folders[name]:
            raise PlanError(
                f"weight for {name!r}, but no task or shard folder has that name; there are the tasks "
                f"{', '.join(sorted(set(tasks)))} and the folders {', '.join(r.path.name for r in readers)}"
            )
    parts = []
    for reader in readers:
        of_task = np.full(len(reader.task_names), -1, dtype=np.int64)
        for t, task in enumerate(reader.task_names):
            keys = [n for n in names if n == task or reader in folders[n]]
            if len(keys) != 1:
                problem = "no weight" if not keys else f"the weights of {' and '.join(map(repr, keys))}"
                raise PlanError(f"task {task!r} of {reader.path} has {problem}; give it exactly one (0 leaves it out)")
            of_task[t] = names.index(keys[0])
        parts.append(of_task[reader.tasks])
    return names, np.concatenate(parts)


def _shares(names: Sequence[str], ids: Int64, weights: Mapping[str, float] | None) -> NDArray[np.float64]:
    """Wanted share of ids per source: float64 `[S]`, sums to 1."""
    raw = ids.astype(np.float64) if weights is None else np.asarray([weights[n] for n in names], dtype=np.float64)
    if not np.isfinite(raw).all() or (raw < 0).any() or raw.sum() <= 0:
        if weights is None:
            raise PlanError("no document fits a row; use a larger seq_len")
        raise PlanError(f"weights {dict(weights)}: all must be 0 or more and one above 0")
    for name, weight, size in zip(names, raw, ids, strict=True):
        if weight > 0 and not size:
            raise PlanError(f"source {name!r} has weight {weight:g} but no document that fits; use a larger seq_len")
    return raw / raw.sum()


def _check_repetition(
    names: Sequence[str], ids: Int64, share: NDArray[np.float64], budget: int, limit: float | None
) -> None:
    if limit is None:
        return
    for name, size, part in zip(names, ids, share, strict=True):
        if part and part * budget > limit * size:
            raise PlanError(
                f"source {name!r} would be gone through {part * budget / size:.1f} times, max_repetition is "
                f"{limit:g}; lower its weight or num_packs, add data, or raise the limit"
            )
