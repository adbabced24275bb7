"""Plans and shard folders for the reader: trees with counts and fingerprints, and the same as JSON.

Reads what plans and shards already know; builds nothing. Ids by modality are each source's shares (counted when the
plan was built, see `Source`) times the ids drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anyglot_lm.phases import PlannedPhase, Source
from anyglot_lm.shards import ShardReader

if TYPE_CHECKING:
    from anyglot_lm.plan import Plan

SHORT = 12
"""Characters of a fingerprint in a tree."""


def describe_plan(plan: Plan, *, fingerprints: bool = False) -> str:
    """A plan as a tree: shards, phases, sources. With `fingerprints` also those of shards and vocabulary."""
    lines = [
        f"plan {plan.fingerprint[:SHORT]}: {len(plan):,} packs of {plan.seq_len:,} ids, "
        f"{plan.utilisation:.2%} full, seed {plan.phases[0].parameters['seed']}"
    ]
    if fingerprints:
        lines.append(f"├─ vocabulary {plan.vocabulary.fingerprint[:SHORT]}: {plan.vocabulary.size:,} ids")
    for shard in plan.shards:
        mark = f" {shard.fingerprint[:SHORT]}" if fingerprints else ""
        lines.append(f"├─ shards{mark} {shard.path}: {len(shard):,} documents, {shard.meta['ids']:,} ids")
    if fingerprints:
        lines.append(f"├─ ids by modality: {_shares(ids_by_modality(plan.sources))}")
    if len(plan.phases) == 1:
        lines += _phase_lines(plan.phases[0], "")
        return "\n".join(lines)
    for number, phase in enumerate(plan.phases):
        last = number == len(plan.phases) - 1
        full = phase.used_ids / (phase.num_packs * plan.seq_len)
        lines.append(
            f"{'└─' if last else '├─'} phase {number}, plan so far {phase.fingerprint[:SHORT]}: "
            f"{phase.num_packs:,} packs, {full:.2%} full"
        )
        lines += _phase_lines(phase, "   " if last else "│  ")
    return "\n".join(lines)


def _phase_lines(phase: PlannedPhase, indent: str) -> list[str]:
    lines = []
    dropout = phase.parameters.get("condition_dropout", 0.0)
    if dropout:
        lines.append(f"{indent}├─ condition dropout {dropout:.1%}")
    budgets = phase.parameters.get("modality_budgets")
    if budgets:
        wanted = ", ".join(f"{name} {share:.1%}" for name, share in budgets.items())
        got = _shares(
            {name: n for name, n in ids_by_modality(phase.sources).items() if name in budgets}, phase.used_ids
        )
        lines.append(f"{indent}├─ ids by modality: {got} (wanted {wanted})")
    for i, source in enumerate(phase.sources):
        branch = "└─" if i == len(phase.sources) - 1 else "├─"
        notes = [", held there by max_repetition" if source.capped else ""]
        notes.append(f", {source.unconditional:,} without prompt" if source.unconditional else "")
        notes.append(f", {source.too_long:,} longer than a row left out" if source.too_long else "")
        lines.append(
            f"{indent}{branch} {source.name}: {source.drawn_ids / phase.used_ids:.1%} of ids (wanted "
            f"{source.weight:.1%}), {source.drawn_documents:,} documents, {source.repetition:.2f} epochs "
            f"of {source.documents:,}{''.join(notes)}"
        )
    return lines


def describe_shards(readers: Sequence[ShardReader]) -> str:
    """Shard folders as a tree: folders, tasks, counts by modality, fingerprints."""
    vocabulary = readers[0].vocabulary
    lines = [f"vocabulary {vocabulary.fingerprint[:SHORT]}: {vocabulary.size:,} ids"]
    for i, content in enumerate(map(shard_to_dict, readers)):
        last = i == len(readers) - 1
        lines.append(
            f"{'└─' if last else '├─'} shards {content['fingerprint'][:SHORT]} {content['path']}: "
            f"{content['documents']:,} documents, {content['ids']:,} ids, {content['targets']:,} of them targets"
        )
        for j, task in enumerate(content["tasks"]):
            branch = "└─" if j == len(content["tasks"]) - 1 else "├─"
            lines.append(
                f"{'   ' if last else '│  '}{branch} {task['name']}: {task['documents']:,} documents, "
                f"{task['ids']:,} ids ({_shares(task['modalities'])})"
            )
    return "\n".join(lines)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """What `plan show --json` prints."""
    return {
        "fingerprint": plan.fingerprint,
        "seq_len": plan.seq_len,
        "num_packs": len(plan),
        "ids": plan.used_ids,
        "utilisation": plan.utilisation,
        "vocabulary": plan.vocabulary.fingerprint,
        "ids_by_modality": ids_by_modality(plan.sources),
        "shards": [shard_to_dict(shard) for shard in plan.shards],
        "phases": [
            {
                "num_packs": phase.num_packs,
                "fingerprint": phase.fingerprint,
                "parameters": dict(phase.parameters),
                "ids": phase.used_ids,
                "utilisation": phase.used_ids / (phase.num_packs * plan.seq_len),
                "ids_by_modality": ids_by_modality(phase.sources),
                "sources": [
                    {**vars(s), "share": s.drawn_ids / phase.used_ids, "epochs": s.repetition} for s in phase.sources
                ],
            }
            for phase in plan.phases
        ],
    }


def shard_to_dict(reader: ShardReader) -> dict[str, Any]:
    """What `plan show --json` prints of a shard folder."""
    names = ("text", *reader.vocabulary.modalities)
    counts = reader.modality_ids().tolist()
    return {
        "path": str(reader.path),
        "fingerprint": reader.fingerprint,
        "vocabulary": reader.vocabulary.fingerprint,
        "template": dict(reader.meta["template"]),
        "documents": len(reader),
        "ids": reader.meta["ids"],
        "targets": reader.meta["targets"],
        "tasks": [
            {
                "name": t["name"],
                "documents": t["documents"],
                "ids": t["ids"],
                "modalities": dict(zip(names, row, strict=True)),
            }
            for t, row in zip(reader.meta["tasks"], counts, strict=True)
        ],
    }


def ids_by_modality(sources: Sequence[Source]) -> dict[str, int]:
    """Drawn ids per modality, from the shares of each source."""
    names = {name: None for source in sources for name in source.modalities}
    return {name: round(sum(s.drawn_ids * s.modalities.get(name, 0.0) for s in sources)) for name in names}


def _shares(counts: Mapping[str, int], total: int | None = None) -> str:
    whole = (sum(counts.values()) if total is None else total) or 1
    return ", ".join(f"{name} {count / whole:.1%}" for name, count in counts.items() if count)
