"""Mixtures: which share of the ids every source gets, with limits on repetition and budgets per modality.

Pure functions from counts and wishes to shares; nothing is drawn here (`packing`) and nothing is read but the counts of
shard folders. `lagging_weights` is the adaptive mixture's rule, to be called between two phases of a plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.packing import PlanError
from anyglot_lm.patterns import Int64
from anyglot_lm.shards import ShardReader

Float64 = NDArray[np.float64]
BUDGET_TOLERANCE = 0.005
"""How far from a modality's budget its share of ids may be."""
_ITERATIONS = 20_000
_log = logging.getLogger(__name__)


def find_sources(
    readers: Sequence[ShardReader], weights: Mapping[str, float] | None
) -> tuple[list[str], list[NDArray[np.int64]]]:
    """Names of the sources, and per shard folder the source of each of its tasks: int64 `[tasks]`.

    Without weights every task is a source; else every key is one, the name of a task or of a shard folder.

    Raises:
        PlanError: a key that names nothing, or a task with no key or with several.
    """
    tasks = [task for reader in readers for task in reader.task_names]
    if weights is None:
        names = sorted(set(tasks))
        return names, [np.asarray([names.index(t) for t in r.task_names], dtype=np.int64) for r in readers]
    names = list(weights)
    exact = {name: [r for r in readers if name == str(r.path)] for name in names}
    folders = {name: exact[name] or [r for r in readers if name == r.path.name] for name in names}
    for name in names:
        if name not in tasks and not folders[name]:
            raise PlanError(
                f"weight for {name!r}, but no task or shard folder has that name; there are the tasks "
                f"{', '.join(sorted(set(tasks)))} and the folders {', '.join(r.path.name for r in readers)}"
            )
    of_task = []
    for reader in readers:
        mine = np.full(len(reader.task_names), -1, dtype=np.int64)
        for t, task in enumerate(reader.task_names):
            keys = [n for n in names if n == task or reader in folders[n]]
            if len(keys) != 1:
                problem = "no weight" if not keys else f"the weights of {' and '.join(map(repr, keys))}"
                raise PlanError(f"task {task!r} of {reader.path} has {problem}; give it exactly one (0 leaves it out)")
            mine[t] = names.index(keys[0])
        of_task.append(mine)
    return names, of_task


def shares_of(names: Sequence[str], ids: Int64, weights: Mapping[str, float] | None) -> Float64:
    """Wanted share of ids per source: float64 `[S]`, sums to 1. `ids` int64 `[S]` are what each source has."""
    raw = ids.astype(np.float64) if weights is None else np.asarray([weights[n] for n in names], dtype=np.float64)
    if not np.isfinite(raw).all() or (raw < 0).any() or raw.sum() <= 0:
        if weights is None:
            raise PlanError("no document fits a row; use a larger seq_len")
        raise PlanError(f"weights {dict(weights)}: all must be 0 or more and one above 0")
    for name, weight, size in zip(names, raw, ids, strict=True):
        if weight > 0 and not size:
            raise PlanError(f"source {name!r} has weight {weight:g} but no document that fits; use a larger seq_len")
    return raw / raw.sum()


def repetition_limits(names: Sequence[str], limit: float | Mapping[str, float] | None) -> Float64:
    """The most often every source may be gone through: float64 `[S]`, inf for no limit."""
    if isinstance(limit, Mapping):
        unknown = sorted(set(limit) - set(names))
        if unknown:
            raise PlanError(f"max_repetition for {', '.join(unknown)}; the sources are {', '.join(names)}")
        limits = np.asarray([limit.get(name, math.inf) for name in names], dtype=np.float64)
    else:
        limits = np.full(len(names), math.inf if limit is None else limit, dtype=np.float64)
    if not (limits > 0).all():
        raise PlanError(f"max_repetition={limit}; give numbers above 0")
    return limits


def check_repetition(names: Sequence[str], ids: Int64, before: Int64, wanted: Float64, limits: Float64) -> None:
    """Raises `PlanError` if a source of `ids [S]`, of which `before [S]` were drawn, cannot give `wanted [S]` more.

    All are ids of whole documents.
    """
    for name, size, had, want, limit in zip(names, ids, before, wanted, limits, strict=True):
        if want and had + want > limit * size:
            raise PlanError(
                f"source {name!r} would be gone through {(had + want) / size:.1f} times, max_repetition is {limit:g}; "
                "lower its weight or num_packs, add data, raise the limit, or give the rest to the others "
                "(limit='cap')"
            )


def cap_shares(share: Float64, available: Float64, budget: int) -> Float64:
    """Shares `[S]` with none above `available / budget`; what is taken away goes to the others by their shares.

    Args:
        share: wanted, sums to 1.
        available: ids that every source may still give, inf for no limit.
        budget: ids of the phase.

    Raises:
        PlanError: all sources together may not give the budget.
    """
    most = np.where(share > 0, available / budget, 0.0)
    if most.sum() < 1:
        raise PlanError(
            f"with max_repetition all sources together give {most.sum():.1%} of the {budget:,} ids of the packs; lower "
            "num_packs, add data, or raise the limit"
        )
    capped = np.zeros(len(share), dtype=np.bool_)
    result = share.copy()
    while (over := ~capped & (result > most)).any():
        capped |= over
        result[capped] = most[capped]
        free = ~capped & (share > 0)
        if not free.any():
            return result / result.sum()
        result[free] = share[free] * (1 - result[capped].sum()) / share[free].sum()
    return result


def modality_shares(ids: Sequence[NDArray[Any]], of_task: Sequence[Int64], num_sources: int) -> Float64:
    """Share of every modality in the ids of every source: float64 `[S, 1 + blocks]`, text (with controls) first.

    `ids` are those of every shard folder, `[tasks, 1 + blocks]`: `ShardReader.modality_ids` or `modality_sums`.
    """
    counts = np.zeros((num_sources, ids[0].shape[1]))
    for values, sources in zip(ids, of_task, strict=True):
        np.add.at(counts, sources, values)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def meet_budgets(
    share: Float64, modality_shares_SM: Float64, modalities: Sequence[str], budgets: Mapping[str, float]
) -> Float64:
    """The shares `[S]` nearest to the given ones (Kullback-Leibler) whose ids meet the budgets of the modalities.

    Generalised iterative scaling (Darroch and Ratcliff 1972): every source is multiplied by the geometric mean of
    wanted / present over its ids' modalities. Modalities without a budget share what is left freely. A source of share
    0 stays at 0.

    Args:
        share: wanted share of ids per source, sums to 1.
        modality_shares_SM: of `modality_shares`; rows sum to 1.
        modalities: names of its columns.
        budgets: share of all ids per modality.

    Raises:
        PlanError: an unknown modality, shares that are none, or budgets that no mixture of these sources meets.
    """
    unknown = sorted(set(budgets) - set(modalities))
    if unknown:
        raise PlanError(f"modality_budgets for {', '.join(unknown)}; the modalities are {', '.join(modalities)}")
    wanted = np.asarray(list(budgets.values()), dtype=np.float64)
    if not np.isfinite(wanted).all() or (wanted < 0).any() or wanted.sum() > 1 + 1e-9:
        raise PlanError(f"modality_budgets {dict(budgets)}: shares of all ids, 0 or more and at most 1 together")
    columns = modality_shares_SM[:, [modalities.index(name) for name in budgets]]
    rest = np.clip(1 - columns.sum(axis=1, keepdims=True), 0, 1)
    table, goal = np.hstack([columns, rest]), np.append(wanted, max(0.0, 1 - wanted.sum()))
    result = share.copy()
    for _ in range(_ITERATIONS):
        present = result @ table
        if np.abs(present - goal).max() < 1e-7:
            break
        factor = np.divide(goal, present, out=np.zeros_like(goal), where=present > 0)
        result *= np.prod(factor**table, axis=1, where=table > 0)
        if not result.sum() > 0:
            break
        result /= result.sum()
    got = result @ table
    if not np.abs(got - goal).max() <= BUDGET_TOLERANCE:
        alive = table[share > 0]
        reach = ", ".join(
            f"{name} {alive[:, i].min():.1%} to {alive[:, i].max():.1%} (nearest to all: {got[i]:.1%})"
            for i, name in enumerate(budgets)
        )
        raise PlanError(
            f"modality_budgets {dict(budgets)} cannot be met by these sources; in reach: {reach}. Change the budgets "
            "or add sources that are richer in what is missing"
        )
    return result


def check_budgets(
    share: Float64, modality_shares_SM: Float64, modalities: Sequence[str], budgets: Mapping[str, float]
) -> None:
    """Raises `PlanError` if shares `[S]` that `cap_shares` has changed leave the budgets of `meet_budgets`."""
    got = dict(zip(modalities, share @ modality_shares_SM, strict=True))
    missed = [
        f"{name} {got[name]:.1%}, not {wanted:.1%}"
        for name, wanted in budgets.items()
        if abs(got[name] - wanted) > BUDGET_TOLERANCE
    ]
    if missed:
        raise PlanError(
            f"max_repetition leaves too little for the modality_budgets: {', '.join(missed)}; raise max_repetition, "
            "lower num_packs, add data, or change the budgets"
        )


def lagging_weights(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    uniforms: Mapping[str, float],
    modalities_of_task: Mapping[str, str],
    strength: float = 1.0,
    *,
    bound: float = 2.0,
) -> dict[str, float]:
    """Weights for the next phase that give more to the tasks whose target modality lags.

    The lag of a modality is its loss over its uniform baseline (1: nothing learned yet), divided by the mean of that
    over the modalities. A task's weight is multiplied by `lag ** strength`, which is kept in `[1 / bound, bound]`; then
    all are divided by their sum. A task whose modality has no loss keeps its weight before that division.

    Args:
        weights: share of ids per task, as in the phase before.
        losses: mean loss per modality, nats per id.
        uniforms: loss of a uniform guess per modality, nats per id.
        modalities_of_task: the modality that a task's targets are in.
        strength: 0 changes nothing, 1 in proportion to the lag.
        bound: the most that a weight is multiplied or divided by in one round, before the division by their sum.

    Raises:
        PlanError: a task without modality, a modality without baseline, or numbers that make no sense.
    """
    if strength < 0 or bound < 1 or not sum(weights.values()) > 0:
        raise PlanError(f"{strength=}, {bound=}, {weights=}; use at least 0, at least 1, and a positive weight")
    missing = sorted(set(weights) - set(modalities_of_task)) or sorted(set(losses) - set(uniforms))
    if missing:
        raise PlanError(f"no target modality or no uniform baseline for {', '.join(missing)}")
    known = {m: loss / uniforms[m] for m, loss in losses.items() if math.isfinite(loss) and uniforms[m] > 0}
    mean = sum(known.values()) / len(known) if known else 1.0
    factor = {m: min(bound, max(1 / bound, (v / mean) ** strength)) if mean > 0 else 1.0 for m, v in known.items()}
    raw = {task: weight * factor.get(modalities_of_task[task], 1.0) for task, weight in weights.items()}
    total, before = sum(raw.values()), sum(weights.values())
    result = {task: weight / total for task, weight in raw.items()}
    _log.info(
        "adaptive mixture: %s; shares %s",
        ", ".join(f"{m} {v:.3f} of uniform (x {factor[m]:.2f})" for m, v in known.items()),
        ", ".join(f"{task} {weights[task] / before:.1%} -> {result[task]:.1%}" for task in weights),
    )
    return result
