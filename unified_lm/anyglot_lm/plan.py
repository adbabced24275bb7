"""The plan of a run: which documents make up which row, for the whole run, decided once.

From (shards, mixture by token share, row length, number of packs, seed) follows one list of *packs*; a pack
is a list of whole documents that fit one row of `seq_len` ids. Documents are drawn source by source in
shuffled epochs, so that every prefix of the draw has the wanted share of tokens; then all that the run needs
is packed together, across sources, by best-fit decreasing (Johnson 1974), and the packs are shuffled.
Nothing is ever cut: documents longer than a row are left out and counted.

A plan is a chain of *phases*, each with a mixture of its own, drawn and packed by itself; epochs go on across
phases, so nothing is seen twice before all of its source was seen once. `extend_plan` adds a phase: the packs that are
there stay, and the fingerprint of the plan up to every phase is kept, so a checkpoint of the shorter plan goes on
with the longer one.

With condition dropout some documents are drawn without their prompt, for guidance (Ho and Salimans,
arXiv:2207.12598): `docs` then holds the complement `~d`, and `doc(~d)` is `bos user assistant <answer>`.

With `together` above 1, documents that stand together in their shard folder (a preferred answer and the other, say) are
drawn and packed as one unit: they lie in one pack, side by side and in their order.

A plan is a folder of two memory-mapped arrays and a JSON file. Its fingerprint covers the shards' content,
the parameters and the arrays, so equal fingerprints mean the same run, document by document. Reading rows is
`data`'s job, printing is `plan_view`'s.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.files import fingerprint_of, new_folder, read_json, write_json
from anyglot_lm.mixture import (
    cap_shares,
    check_budgets,
    check_repetition,
    find_sources,
    meet_budgets,
    modality_shares,
    repetition_limits,
    shares_of,
)
from anyglot_lm.packing import Draw, PlanError, count_packs, draw, numbers_of, pack
from anyglot_lm.patterns import Int64
from anyglot_lm.phases import Limit, Phase, PlannedPhase, Source
from anyglot_lm.plan_view import describe_plan
from anyglot_lm.segments import Sample, Template
from anyglot_lm.shards import PROMPT, ShardReader, open_shards
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError, FingerprintError, ManifestError

__all__ = ["Phase", "Plan", "PlanError", "PlannedPhase", "Source", "build_plan", "extend_plan"]
FORMAT = "anyglot-plan"
VERSION = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """One global order of packs. Make one with `build_plan`, or `Plan.load`.

    Attributes:
        shards: the folders the documents are in.
        seq_len: ids of a row.
        pack_offsets: int64 `[P + 1]`; pack p holds the documents `docs[pack_offsets[p] : pack_offsets[p + 1]]`.
        docs: int64 or int32 `[N]`; documents are counted through all shards in order, and `~d` is document `d`
            without its prompt.
        phases: what the packs were drawn from, in order.
        path: its folder, if it was saved.
    """

    shards: tuple[ShardReader, ...]
    seq_len: int
    pack_offsets: NDArray[Any]
    docs: NDArray[Any]
    phases: tuple[PlannedPhase, ...]
    path: Path | None = None
    starts: Int64 = field(init=False, repr=False)
    """Number of the first document of every shard folder, int64 `[shards + 1]`."""

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum([len(s) for s in self.shards])]).astype(np.int64)
        object.__setattr__(self, "starts", starts)

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.pack_offsets) - 1

    @property
    def fingerprint(self) -> str:
        """Identity of shards, parameters and order."""
        return self.phases[-1].fingerprint

    @property
    def prefixes(self) -> dict[str, int]:
        """Fingerprint and number of packs of the plan up to the end of every phase, itself last."""
        ends = np.cumsum([phase.num_packs for phase in self.phases]).tolist()
        return {phase.fingerprint: end for phase, end in zip(self.phases, ends, strict=True)}

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all shards."""
        return self.shards[0].vocabulary

    def pack(self, index: int) -> list[int]:
        """Documents of pack `index`, counted through all shards; `~d` for one without its prompt."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return [int(d) for d in self.docs[self.pack_offsets[index] : self.pack_offsets[index + 1]]]

    def doc(self, number: int) -> tuple[Int64, NDArray[np.bool_]]:
        """Document `number`, counted through all shards, as `(ids int64 [N], loss bool [N])`.

        `~number` gives it without its prompt: `bos user assistant`, then all from the first target on.
        """
        whole = int(numbers_of(np.asarray(number)))
        shard = int(np.searchsorted(self.starts, whole, side="right")) - 1
        reader, index = self.shards[shard], whole - int(self.starts[shard])
        ids, loss = reader.doc(index)
        if number >= 0:
            return ids, loss
        (cut,), _ = reader.unconditional(np.asarray([index]))
        return (
            np.concatenate([self.empty_prompt, ids[cut:]]),
            np.concatenate([np.zeros(PROMPT, dtype=np.bool_), loss[cut:]]),
        )

    @property
    def empty_prompt(self) -> Int64:
        """What stands in front of the answer of an unconditional document: int64 `[3]`."""
        return self.shards[0].template.prompt(Sample([]), self.vocabulary, None)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Counts per source over all phases; wanted shares are means over the phases' ids."""
        if len(self.phases) == 1:
            return self.phases[0].sources
        merged: dict[str, Source] = {}
        total = self.used_ids
        for phase in self.phases:
            for s in phase.sources:
                weight = s.weight * phase.used_ids / total
                old = merged.get(s.name)
                if old is None:
                    merged[s.name] = replace(s, weight=weight)
                    continue
                merged[s.name] = replace(
                    old,
                    modalities={
                        name: (part * old.drawn_ids + s.modalities.get(name, 0.0) * s.drawn_ids)
                        / max(1, old.drawn_ids + s.drawn_ids)
                        for name, part in old.modalities.items()
                    },
                    weight=old.weight + weight,
                    drawn_documents=old.drawn_documents + s.drawn_documents,
                    drawn_ids=old.drawn_ids + s.drawn_ids,
                    unconditional=old.unconditional + s.unconditional,
                    capped=old.capped or s.capped,
                )
        return tuple(merged.values())

    @property
    def used_ids(self) -> int:
        """Ids of all packs without padding."""
        return sum(phase.used_ids for phase in self.phases)

    @property
    def utilisation(self) -> float:
        """Share of the rows that is no padding."""
        return self.used_ids / (len(self) * self.seq_len)

    def describe(self) -> str:
        """The plan as a tree with counts, to print."""
        return describe_plan(self)

    def save(self, path: str | Path) -> Plan:
        """Writes the plan's folder, atomically, and returns the plan that is mapped from it.

        A folder that holds this very plan is left alone, so that several processes may save the same plan; but where
        its shards lie now is written down. A plan that is damaged is written anew. An extended plan is best saved to a
        folder of its own while other processes read the shorter one.
        """
        path = Path(path)

        def is_this(place: Path) -> bool:
            try:
                found = read_json(place / "plan.json").get("fingerprint")
                return found == self.fingerprint and bool(Plan.load(place, [s.path for s in self.shards]))
            except AnyglotError:
                return False

        if is_this(path):
            content, shards = read_json(path / "plan.json"), self._to_dict(path)["shards"]
            if content["shards"] != shards:
                write_json(path / "plan.json", {**content, "shards": shards})
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
            "shards": [
                {"path": os.path.relpath(s.path.resolve(), base), "fingerprint": s.fingerprint} for s in self.shards
            ],
            "phases": [asdict(phase) for phase in self.phases],
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
        if content.get("format") != FORMAT or content.get("version") not in (1, VERSION):
            raise ManifestError(
                f"{path / 'plan.json'}: format {content.get('format')!r} version {content.get('version')!r} "
                f"is not {FORMAT!r} version 1 or {VERSION}; build the plan again"
            )
        if content["version"] == 1:  # one phase, in the plan itself
            content["phases"] = [{k: content[k] for k in ("num_packs", "fingerprint", "parameters", "sources")}]
        places = list(shards) if shards is not None else [path.resolve() / s["path"] for s in content["shards"]]
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
        except (OSError, ValueError, EOFError) as error:
            raise ManifestError(f"{path}: {error}; build the plan again") from error
        phases = tuple(
            PlannedPhase(p["num_packs"], p["fingerprint"], p["parameters"], tuple(Source(**s) for s in p["sources"]))
            for p in content["phases"]
        )
        start, before = 0, None
        for phase in phases:
            stop = start + phase.num_packs
            offsets = pack_offsets[start : stop + 1]
            mine = docs[offsets[0] : offsets[-1]] if len(offsets) == phase.num_packs + 1 else docs
            if _fingerprint(before, phase.parameters, known, offsets, mine) != phase.fingerprint:
                raise FingerprintError(f"{path}: its arrays are not those of its fingerprint; build the plan again")
            start, before = stop, phase.fingerprint
        if start + 1 != len(pack_offsets) or before != content["fingerprint"]:
            raise FingerprintError(f"{path}: its arrays are not those of its phases; build the plan again")
        return cls(
            shards=tuple(readers),
            seq_len=content["seq_len"],
            pack_offsets=pack_offsets,
            docs=docs,
            phases=phases,
            path=path,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return Plan.load, (self.path, [s.path for s in self.shards])
        return Plan, (self.shards, self.seq_len, self.pack_offsets, self.docs, self.phases)


def build_plan(
    shards: Sequence[str | Path | ShardReader],
    weights: Mapping[str, float] | None = None,
    *,
    seq_len: int,
    num_packs: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    max_repetition: float | Mapping[str, float] | None = None,
    limit: Limit = "raise",
    condition_dropout: float = 0.0,
    modality_budgets: Mapping[str, float] | None = None,
    phases: Sequence[Phase] | None = None,
    together: int = 1,
    path: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    template: Template | None = None,
) -> Plan:
    """Builds the plan of a run.

    Args:
        shards: shard folders.
        weights, max_repetition, limit, condition_dropout, modality_budgets: of the only phase; see `Phase`.
        seq_len: ids of a row.
        num_packs: rows of the whole run: steps x accumulation x batch size x ranks.
        epochs: instead of `num_packs`: about that many times all ids of the sources.
        seed: seed of all shuffling.
        phases: a curriculum, instead of one phase. Give every phase its `num_packs`, or every phase its `share` of
            `num_packs` or `epochs`.
        together: documents `together * i` to `together * i + together - 1` of every shard folder, all of one task, are
            one unit; 2 for pairs. Excludes condition dropout.
        path: folder to save to. A plan that is there already and equal is kept.
        vocabulary, template: the model's, to be compared with the shards'.

    Raises:
        PlanError: a key without documents, documents without or with two keys, too much repetition, or budgets that
            cannot be met; shards that are not made of units.
        FingerprintError: shards of another vocabulary or template.
    """
    if seq_len < 2:
        raise PlanError(f"seq_len={seq_len}; a row needs at least 2 ids")
    if seed < 0:
        raise PlanError(f"seed={seed}; give 0 or more")
    if phases is None:
        phases = [Phase(weights, None, 1.0, condition_dropout, max_repetition, limit, modality_budgets)]
    elif weights or condition_dropout or max_repetition or limit != "raise" or modality_budgets or not phases:
        raise PlanError("with phases, weights, limits, dropout and budgets belong to every phase; give at least one")
    own = [phase.num_packs for phase in phases if phase.num_packs is not None]
    if own and (len(own) != len(phases) or num_packs is not None or epochs is not None):
        raise PlanError("give num_packs for every phase and nowhere else, or a share for every phase")
    if not own and (num_packs is None) == (epochs is None):
        raise PlanError("give either num_packs or epochs")
    corpus = _corpus(open_shards(shards, vocabulary, template), seq_len, seed, together)
    if not own:
        total = num_packs if num_packs is not None else corpus.packs_of_epochs(phases, epochs or 0.0)
        if total < len(phases):
            raise PlanError(f"num_packs={total}; a plan needs at least one pack, and one per phase")
        parts = np.asarray([phase.share or 0.0 for phase in phases])
        if (parts <= 0).any():
            raise PlanError("a phase without num_packs and without share; give every phase one of them")
        ends = np.round(np.cumsum(parts) / parts.sum() * total).astype(int)
        own = np.diff(ends, prepend=0).tolist()
    plan: Plan | None = None
    for phase, count in zip(phases, own, strict=True):
        plan = _extended(corpus, plan, replace(phase, num_packs=count, share=None))
    assert plan is not None
    return plan.save(path) if path is not None else plan


def extend_plan(
    plan: Plan,
    weights: Mapping[str, float] | None = None,
    *,
    num_packs: int,
    condition_dropout: float = 0.0,
    max_repetition: float | Mapping[str, float] | None = None,
    limit: Limit = "raise",
    modality_budgets: Mapping[str, float] | None = None,
    path: str | Path | None = None,
) -> Plan:
    """The plan with one more phase (see `Phase`) of `num_packs` packs at its end; what is there stays bit for bit.

    A run that is at some pack of the shorter plan goes on with the longer one: its checkpoints are accepted.
    Row length, seed and `together` are the plan's.

    Raises:
        PlanError: as `build_plan`.
    """
    known = plan.phases[0].parameters
    corpus = _corpus(plan.shards, plan.seq_len, int(known["seed"]), int(known.get("together", 1)))
    phase = Phase(weights, num_packs, None, condition_dropout, max_repetition, limit, modality_budgets)
    longer = _extended(corpus, plan, phase)
    return longer.save(path) if path is not None else longer


@dataclass(frozen=True, eq=False)
class _Corpus:
    """All units that a plan may draw from; a unit is `together` documents, `lengths` int64 `[U]` its ids."""

    readers: tuple[ShardReader, ...]
    lengths: Int64
    seq_len: int
    seed: int
    together: int

    def source_of_unit(self, of_task: Sequence[Int64]) -> Int64:
        """Source of every unit, int64 `[U]`."""
        return np.concatenate(
            [tasks[r.tasks[:: self.together]] for tasks, r in zip(of_task, self.readers, strict=True)]
        )

    def packs_of_epochs(self, phases: Sequence[Phase], epochs: float) -> int:
        """Packs that hold every unit of any phase `epochs` times."""
        if not 0 < epochs < math.inf:
            raise PlanError(f"epochs={epochs}; give a finite number above 0")
        drawn = np.zeros(len(self.lengths), dtype=np.bool_)
        for phase in phases:
            names, of_task = find_sources(self.readers, phase.weights)
            wanted = np.asarray([phase.weights[n] if phase.weights is not None else 1 for n in names]) > 0
            drawn |= wanted[self.source_of_unit(of_task)]
        counts = np.bincount(self.lengths[drawn & (self.lengths <= self.seq_len)])
        return max(1, round(max(1, count_packs(counts, self.seq_len)) * epochs))

    def modality_sums(self, whole: NDArray[Any], bare: NDArray[Any]) -> list[NDArray[np.float64]]:
        """`ShardReader.modality_sums` of every folder, of units that count `whole` and `bare` times, `[U]` each."""
        ends = np.cumsum([len(r) for r in self.readers])[:-1]
        parts = [np.split(np.repeat(times, self.together), ends) for times in (whole, bare)]
        return [r.modality_sums(w, b) for r, w, b in zip(self.readers, *parts, strict=True)]

    def unconditional(self, docs: Int64) -> Int64:
        """Lengths of documents `[N]` without their prompt; those that have none to drop keep theirs. No units."""
        lengths = self.lengths[docs]
        start = 0
        for reader in self.readers:
            mine = np.flatnonzero((docs >= start) & (docs < start + len(reader)))
            cuts, droppable = reader.unconditional(docs[mine] - start)
            lengths[mine] -= np.where(droppable, cuts - PROMPT, 0)
            start += len(reader)
        return lengths


def _corpus(shards: Sequence[ShardReader], seq_len: int, seed: int, together: int) -> _Corpus:
    """Raises PlanError where the documents of a folder are not units of `together` of one task."""
    if together < 1:
        raise PlanError(f"together={together}; it is a number of documents, 1 or more")
    lengths = [r.lengths.astype(np.int64) for r in shards]
    if together > 1:
        for reader in shards:
            if len(reader) % together:
                raise PlanError(
                    f"{reader.path}: {len(reader)} documents are no multiple of {together}, but they belong together "
                    f"in units of {together}; write whole units only"
                )
            tasks = np.asarray(reader.tasks).reshape(-1, together)
            mixed = np.flatnonzero((tasks != tasks[:, :1]).any(1))
            if len(mixed):
                first = int(mixed[0]) * together
                raise PlanError(
                    f"{reader.path}: documents {first} to {first + together - 1} belong together but are of several "
                    "tasks; write each unit under one task"
                )
        lengths = [values.reshape(-1, together).sum(1) for values in lengths]
    return _Corpus(tuple(shards), np.concatenate(lengths), seq_len, seed, together)


def _extended(corpus: _Corpus, plan: Plan | None, phase: Phase) -> Plan:
    """`plan` (None for an empty one) with a phase of `phase.num_packs` packs at its end."""
    lengths, seq_len, num_packs, together = corpus.lengths, corpus.seq_len, phase.num_packs, corpus.together
    assert num_packs is not None
    if together > 1 and phase.condition_dropout:
        raise PlanError(f"condition_dropout={phase.condition_dropout} with together={together}; give one of them")
    names, of_task = find_sources(corpus.readers, phase.weights)
    source_of_unit = corpus.source_of_unit(of_task)
    fits = lengths <= seq_len

    def per_source(values: NDArray[Any] | None, chosen: NDArray[Any]) -> Int64:
        sums = np.bincount(source_of_unit[chosen], None if values is None else values[chosen], minlength=len(names))
        return sums.astype(np.int64)

    ids, documents = per_source(lengths, fits), per_source(None, fits)
    before = np.zeros_like(lengths)
    if plan:
        before = np.bincount(numbers_of(plan.docs[::together]) // together, minlength=len(lengths))
    had = per_source(before * lengths, fits)
    share = shares_of(names, ids, phase.weights)
    kinds = ("text", *corpus.readers[0].vocabulary.modalities)
    dropout = phase.condition_dropout
    natural = not dropout and bool(fits.all())  # all documents may be drawn, and all of each: counted already
    modalities = modality_shares([r.modality_ids() for r in corpus.readers], of_task, len(names))
    if phase.modality_budgets is not None:
        if not natural:
            sums = corpus.modality_sums((1 - dropout) * fits, dropout * fits)
            modalities = modality_shares(sums, of_task, len(names))
        share = meet_budgets(share, modalities, kinds, phase.modality_budgets)
    limits = repetition_limits(names, phase.max_repetition)
    left = np.ones(len(names))  # what dropout leaves of the ids of a source, on average: limits are of whole documents
    if dropout:
        short = per_source(corpus.unconditional(np.arange(len(lengths))), fits)
        left = 1 - dropout * (1 - short / np.maximum(ids, 1))
    available = np.full(len(names), math.inf)
    capped = np.zeros(len(names), dtype=np.bool_)
    if phase.limit == "raise":
        check_repetition(names, ids, had, share * (num_packs * seq_len) / left, limits)
    else:
        available = np.maximum(limits * np.maximum(ids, 1) - had, 0)
        wanted, share = share, cap_shares(share, available * left, num_packs * seq_len)
        capped = share < wanted - 1e-12
        if phase.modality_budgets is not None and capped.any():
            check_budgets(share, modalities, kinds, phase.modality_budgets)
    number = len(plan.phases) if plan else 0
    drawn, sizes = draw(
        Draw(
            lengths=lengths,
            before=before,
            source_of_doc=np.where(fits, source_of_unit, -1),
            share=share,
            available=available,
            budget=num_packs * seq_len,
            seq_len=seq_len,
            seed=(corpus.seed, number),
            dropout=dropout,
            unconditional=corpus.unconditional,
        )
    )
    offsets, units = pack(drawn, sizes, seq_len, num_packs, (corpus.seed, number))
    dropped = units < 0
    units_of = numbers_of(units)
    used = lengths[units_of]
    used[dropped] = corpus.unconditional(units_of[dropped])
    drawn_ids = np.bincount(source_of_unit[units_of], used, minlength=len(names)).astype(np.int64)
    counts, bare = per_source(None, units_of), per_source(None, units_of[dropped])
    total = np.bincount(source_of_unit, minlength=len(names))
    if phase.modality_budgets is not None or not natural:  # what was drawn, not what was to be expected
        times = [np.bincount(units_of[chosen], minlength=len(lengths)) for chosen in (~dropped, dropped)]
        modalities = modality_shares(corpus.modality_sums(times[0], times[1]), of_task, len(names))
    sources = tuple(
        Source(
            name=name,
            documents=int(documents[i]) * together,
            ids=int(ids[i]),
            too_long=int(total[i] - documents[i]) * together,
            weight=float(share[i]),
            drawn_documents=int(counts[i]) * together,
            drawn_ids=int(drawn_ids[i]),
            unconditional=int(bare[i]),
            capped=bool(capped[i]),
            modalities=dict(zip(kinds, modalities[i].tolist(), strict=True)),
        )
        for i, name in enumerate(names)
    )
    for source in sources:
        if source.too_long and source.weight and not plan:
            _log.warning(
                "%s: %d of %d documents%s are longer than a row of %d ids and left out",
                source.name, source.too_long, source.too_long + source.documents,
                f" (in units of {together})" if together > 1 else "", seq_len,
            )  # fmt: skip
        if source.capped:
            _log.info("%s: its share is held at %.1f%% by max_repetition", source.name, 100 * source.weight)
    parameters = phase.parameters(seq_len, corpus.seed, together)
    if together > 1:
        offsets, units = offsets * together, (units[:, None] * together + np.arange(together)).ravel()
    docs = units.astype(np.int32 if len(lengths) * together <= 1 << 31 else np.int64)
    if plan:
        offsets = np.concatenate([plan.pack_offsets, plan.pack_offsets[-1] + offsets[1:]])
    planned = PlannedPhase(
        num_packs=num_packs,
        fingerprint=_fingerprint(
            plan.fingerprint if plan else None,
            parameters,
            [r.fingerprint for r in corpus.readers],
            offsets[-num_packs - 1 :],
            docs,
        ),
        parameters=parameters,
        sources=sources,
    )
    return Plan(
        shards=corpus.readers,
        seq_len=seq_len,
        pack_offsets=offsets,
        docs=np.concatenate([plan.docs, docs]) if plan else docs,
        phases=(*(plan.phases if plan else ()), planned),
    )


def _fingerprint(
    before: str | None,
    parameters: Mapping[str, Any],
    shards: Sequence[str],
    pack_offsets: NDArray[Any],
    docs: NDArray[Any],
) -> str:
    """Identity of a plan that ends with a phase of these arrays; `before` is that of the plan without it."""
    arrays = {"pack_offsets": _sha256_npy(pack_offsets), "docs": _sha256_npy(docs)}
    content: dict[str, Any] = {"parameters": dict(parameters), "shards": list(shards), "arrays": arrays}
    return fingerprint_of(content if before is None else {"before": before, **content})


def _sha256_npy(values: NDArray[Any]) -> str:
    """sha256 of the file that `np.save` makes of `values`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    digest = hashlib.sha256(header.getbuffer())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
