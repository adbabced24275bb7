"""Phases of a plan: what a stretch of it is drawn from, and what came out. Plain records; `plan` does the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from anyglot_lm.packing import PlanError

Limit = Literal["raise", "cap"]
ALGORITHM = "best-fit-decreasing/2"


@dataclass(frozen=True)
class Phase:
    """What a stretch of a plan is drawn from.

    Args:
        weights: share of *ids* per source, normalised by their sum. A key is the name of a task or a shard folder
            (its path as given, or its last part); every document must belong to exactly one key, and 0 leaves a
            source out. By default every task has its natural share.
        num_packs: rows of the phase: steps x accumulation x batch size x ranks.
        share: instead of `num_packs`: its part of all packs of `build_plan`, relative to the other phases'.
        condition_dropout: probability that a document is drawn without its prompt.
        max_repetition: the most often a source may be gone through, earlier phases included; a number for all or
            one per source. None for no limit.
        limit: what happens there: "raise" an error, or "cap" the source and give the rest to the others.
        modality_budgets: share of all ids per modality ("text" with the controls, or a block). The shares nearest to
            `weights` that meet them are taken; an error if "cap" leaves too little of a modality.
    """

    weights: Mapping[str, float] | None = None
    num_packs: int | None = None
    share: float | None = None
    condition_dropout: float = 0.0
    max_repetition: float | Mapping[str, float] | None = None
    limit: Limit = "raise"
    modality_budgets: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise PlanError(f"condition_dropout={self.condition_dropout}; it is a probability")
        if self.limit not in ("raise", "cap"):
            raise PlanError(f"limit={self.limit!r}; use 'raise' or 'cap'")
        if self.num_packs is not None and (not isinstance(self.num_packs, int) or self.num_packs < 1):
            raise PlanError(f"num_packs={self.num_packs}; a plan needs at least one pack, and whole ones")
        if self.share is not None and not (self.share > 0 and self.num_packs is None):
            raise PlanError(f"a phase of share={self.share}, num_packs={self.num_packs}; give one of them, above 0")
        for name in ("weights", "max_repetition", "modality_budgets"):  # as JSON keeps them
            value = getattr(self, name)
            if name != "max_repetition" and not isinstance(value, Mapping | None):
                raise PlanError(f"{name}={value!r}; give a number for every name")
            if isinstance(value, Mapping):
                object.__setattr__(self, name, {str(key): float(number) for key, number in value.items()})
        limits = self.max_repetition.values() if isinstance(self.max_repetition, Mapping) else [self.max_repetition]
        if math.inf in limits:
            raise PlanError(f"max_repetition={self.max_repetition}; leave out what has no limit")

    def parameters(self, seq_len: int, seed: int, together: int) -> dict[str, Any]:
        """What a plan records of it, and the plan's fingerprint covers."""
        content = {"algorithm": ALGORITHM, "seq_len": seq_len, "seed": seed, **asdict(self)}
        del content["share"]
        return content | ({"together": together} if together > 1 else {})


@dataclass(frozen=True)
class Source:
    """What a plan takes from one source (a task, or a shard folder): counts for `Plan.describe`.

    Attributes:
        name: its name.
        documents, ids: what it has, without documents longer than a row.
        too_long: documents longer than a row.
        weight: wanted share of ids, after limits and budgets.
        drawn_documents, drawn_ids: what the plan takes, repetitions included.
        unconditional: how many of these documents lost their prompt.
        capped: whether its limit of repetition lowered its share.
        modalities: share of every modality in the ids drawn from it; in all its ids, prompts included, where a phase
            has no budgets and nothing is too long or loses its prompt.
    """

    name: str
    documents: int
    ids: int
    too_long: int
    weight: float
    drawn_documents: int
    drawn_ids: int
    unconditional: int = 0
    capped: bool = False
    modalities: Mapping[str, float] = field(default_factory=dict)

    @property
    def repetition(self) -> float:
        """How often the plan goes through the source."""
        return self.drawn_documents / self.documents if self.documents else 0.0


@dataclass(frozen=True)
class PlannedPhase:
    """A phase as it came out.

    Attributes:
        num_packs: its packs.
        fingerprint: identity of the plan from its start to the end of this phase.
        parameters: what the phase was built from.
        sources: counts per source.
    """

    num_packs: int
    fingerprint: str
    parameters: Mapping[str, Any]
    sources: tuple[Source, ...]

    @property
    def used_ids(self) -> int:
        """Ids of its packs without padding."""
        return sum(source.drawn_ids for source in self.sources)
