"""Ranking by the model's own likelihood, both ways: the right answer among answers, the right input among inputs.

The first asks which of some answers is likeliest after an item's input; an answer that is likely after anything wins it
easily. The second asks after which of some inputs the item's answer is likeliest, and there no such answer helps.
Nothing is generated, so a model that cannot decode well yet already has a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.segments import Sample
from anyglot_recipes.data_eval.evidence import Evidence
from anyglot_recipes.data_eval.items import Item, key_of, prompt_of
from anyglot_recipes.data_eval.scores import Result, Score


def ranking(evidence: Evidence, candidates: int, rng: np.random.Generator) -> list[Result]:
    """Rows `ranking` and `ranking_given`, or none if there is nothing to rank; chance is 1 / number of candidates.

    Args:
        evidence: items with right answers, of which the first counts.
        candidates: most of an item, its own among them.
        rng: draws the others, from items without a right answer in common, and no two with the same.
    """
    task, items, asked = evidence.task, evidence.items, evidence.task.asked
    answers = {i: key_of(item.contents[asked][0]) for i, item in enumerate(items) if item.has(asked)}
    others = {i: _others(i, answers, items, candidates - 1, rng) for i in answers}
    pairs = sorted({pair for i in answers for j in others[i] for pair in ((i, i), (i, j), (j, i))})
    samples = [Sample([*prompt_of(items[i], task).segments, items[j].segment(asked, "assistant")]) for i, j in pairs]
    logp = dict(zip(pairs, log_likelihoods(evidence.model, samples), strict=True))
    results = []
    for name, what, given in (("ranking", "answers", False), ("ranking_given", "inputs", True)):
        scores: list[Score | None] = [None] * len(items)
        ranks: list[int | None] = [None] * len(items)
        chances, missing = [], 0
        for i in answers:
            right = logp.get((i, i))
            rivals = [v for j in others[i] if (v := logp[(j, i) if given else (i, j)]) is not None]
            if rivals:
                scores[i] = (0.0 if right is None else first_place(right, rivals), 1.0)
                ranks[i] = 1 + sum(right is None or v > right for v in rivals)
                chances.append(1 / (1 + len(rivals)))
                missing += right is None
        if chances:
            mean_rank = np.mean([rank for rank in ranks if rank is not None])
            note = f"the likeliest of up to {candidates} {what} is the right one (mean rank {mean_rank:.2f})"
            chance = float(np.mean(chances))
            results.append(Result(name, "higher", scores, missing, chance, None, note, {f"{name}_rank": ranks}))
    return results


def _others(
    i: int, answers: Mapping[int, str], items: Sequence[Item], most: int, rng: np.random.Generator
) -> list[int]:
    chosen: dict[str, int] = {}
    for j in map(int, rng.permutation(list(answers))):
        if len(chosen) == most:
            break
        if not items[i].keys & items[j].keys:
            chosen.setdefault(answers[j], j)
    return list(chosen.values())


def first_place(right: float, others: Sequence[float]) -> float:
    """1 if the right candidate is the likeliest, 0 if not; shared with those that are just as likely."""
    if any(other > right for other in others):
        return 0.0
    return 1 / (1 + sum(other == right for other in others))
