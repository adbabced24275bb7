"""`anyglot eval nanoworld`: the sections of the benchmark, each a list of rows; docs/benchmark.md explains every row.

`directions` is `evaluate.py`'s, the rest asks what a mean over directions hides. All of it is about the same held-out
scenes, unless a row says otherwise, and graded by the same checkers. This file makes no media that the items lack
(`benchmark_media.py` does) and prints nothing (`benchmark_report.py` does).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from anyglot_lm.candidates import best_of
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.benchmark_media import robustness, speech
from anyglot_recipes.evaluate import (
    SAMPLING,
    Checkers,
    Graded,
    answer,
    ceilings,
    chance,
    evaluate,
    grade,
    means,
    request,
    row_of,
    shares,
    truth,
)
from anyglot_recipes.nano import test_items
from anyglot_recipes.shots import HELD_OUT, RULES
from anyglot_recipes.tasks import (
    CHAINED,
    CHAT,
    PAIRS,
    QUIZ,
    SHOTS,
    SPOKEN,
    TASKS,
    THROUGH,
    TURNED,
    WRITTEN,
    Item,
    prompt,
    split_task,
)
from anyglot_synth.nanoworld.language import presence, same_answer, words
from anyglot_synth.nanoworld.scene import attributes as attributes_of
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.metrics import interval

Row = dict[str, Any]
CHANGE = ("change", "change_low", "change_high")
"""Entries of a row that is compared with another one, named in `against`."""
TRAINED = "combinations of training"
Keep = Callable[[str, list[Graded]], None]


@dataclass
class Bench:
    """What all sections share.

    Args:
        model: who answers.
        items: held-out items.
        seed: of the items, and of what sections draw.
        checkers: who grades.
        keep: called with a title and the graded samples of a row (for galleries).
        progress: called with one line per finished row.
        guidance: scales of classifier-free guidance by modality, of every answer.
        candidates: answers of which section `checked` takes the best.
        found: task -> the answers about the held-out items.
        chosen: the same of section `checked`, from which on others tell of them, too.
    """

    model: UnifiedModel
    items: list[Item]
    seed: int
    checkers: Checkers
    keep: Keep = lambda title, graded: None
    progress: Callable[[str], None] = lambda line: None
    guidance: Mapping[str, float] | None = None
    candidates: int = 8
    found: dict[str, list[Graded]] = field(default_factory=dict)
    chosen: dict[str, list[Graded]] = field(default_factory=dict)

    @cached_property
    def seen(self) -> list[Item]:
        """As many items of fresh scenes whose combinations training has."""
        return test_items(self.model, len(self.items), self.seed, "train")

    def graded(self, task: str) -> list[Graded]:
        """The answers about the held-out items, given once."""
        if task not in self.found:
            self.found[task] = self.ask(self.items, task)
        return self.found[task]

    def ask(self, items: Sequence[Item], task: str) -> list[Graded]:
        """The graded answers about some items."""
        return grade(items, task, answer(self.model, items, task, guidance=self.guidance), self.checkers)

    @property
    def best(self) -> str:
        """How the answers of `chosen` came about, in words."""
        return f"best of {self.candidates}"

    def row(
        self,
        section: str,
        condition: str,
        graded: list[Graded],
        base: Sequence[Graded] = (),
        show: bool = True,
        **more: Any,
    ) -> Row:
        """A row with `shares`, and with `change` and its interval where there are answers to compare item by item."""
        if show:
            self.keep(f"{section}: {condition}", graded)
        scores = [g.score for g in graded]
        if base:
            more.update(change_of([a - b.score for a, b in zip(scores, base, strict=True)]))
        row = row_of(graded[0].task, scores, section=section, condition=condition, **shares(graded), **more)
        self.progress(f"{section}: {row['task']}, {condition}: {row['score']:.3f}")
        return row


def change_of(differences: Sequence[float]) -> dict[str, float]:
    """The mean of paired differences with its 95 % bootstrap interval, as entries of a row."""
    return dict(zip(CHANGE, interval(list(differences)), strict=True))


def gap_of(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, float]:
    """As `change_of`, of the means of scores about different items: both are drawn anew for the interval."""
    rng = np.random.default_rng(seed)
    a, b = (rng.choice(scores, size=(2000, len(scores))).mean(axis=1) for scores in (first, second))
    low, high = np.quantile(a - b, (0.025, 0.975))
    return dict(zip(CHANGE, (float(np.mean(first) - np.mean(second)), float(low), float(high)), strict=True))


def directions(bench: Bench) -> list[Row]:
    """Every task of `TASKS`."""

    def keep(graded: list[Graded]) -> None:
        bench.found[graded[0].task] = graded
        bench.keep(graded[0].task, graded)

    how: dict[str, Any] = {"checkers": bench.checkers, "guidance": bench.guidance}
    how |= {"keep": keep, "progress": bench.progress}
    rows = evaluate(bench.model, bench.items, tasks=TASKS, **how)["rows"]
    return [{"section": "directions", "condition": "", **row} for row in rows]


def composition(bench: Bench) -> list[Row]:
    """The 12 pairs on fresh scenes of combinations that training has, and how much better they are (`change`)."""
    items, condition = bench.seen, TRAINED
    limits = ceilings(bench.model, items, PAIRS, bench.checkers)
    more: Row = {"chance": chance(items, PAIRS[0]), "against": "held-out combinations"}
    rows, seen, unseen = [], [], []
    for task in PAIRS:
        graded, held_out = bench.ask(items, task), bench.graded(task)
        seen.append([g.score for g in graded])
        unseen.append([g.score for g in held_out])
        lost: Row = gap_of(seen[-1], unseen[-1])
        rows.append(bench.row("composition", condition, graded, show=False, ceiling=limits[task], **more, **lost))
    # An item's mean over the pairs: the interval then knows that all pairs are about the same scenes.
    means_of = [np.mean(np.array(scores), axis=0).tolist() for scores in (seen, unseen)]
    lost = gap_of(*means_of)
    rows.append(row_of("the 12 pairs", means_of[0], section="composition", condition=condition, **more, **lost))
    return rows


def presence_items(items: Sequence[Item], hard: bool, seed: int) -> list[Item]:
    """The items with a question each whether something is there, every other answer yes."""
    rng = np.random.default_rng([seed, 88, hard])
    asked = [presence(item.scene, rng, present=i % 2 == 0, hard=hard) for i, item in enumerate(items)]
    return [replace(item, written_question=q, written_answer=a) for item, (q, a) in zip(items, asked, strict=True)]


def hallucination(bench: Bench) -> list[Row]:
    """Questions of presence, asked at once and after the model has described the picture, and as a control the same
    ones about the picture of another scene.
    """
    rows = []
    for where, of, told in (
        ("", bench.items, bench.graded("image->text")),
        (f", {TRAINED}", bench.seen, bench.ask(bench.seen, "image->text")),
    ):
        right = float(np.mean([g.score for g in told]))
        for hard in (False, True):
            items = presence_items(of, hard, bench.seed)
            for shift, control in enumerate(("", ", another picture")):
                given = []
                for i, item in enumerate(items):
                    shown = told[(i + shift) % len(told)]
                    asked = [(item.written_question, item.written_answer)]
                    given.append(replace(item, codes=shown.item.codes, seen={}, text=shown.heard[0], quiz=asked))
                name = ("hard" if hard else "random") + " negatives" + where + control
                more: Row = {"chance": 0.5, "ceiling": None if control else 1.0}
                direct, after = bench.ask(given, WRITTEN), bench.ask(given, QUIZ)
                rows.append(bench.row("hallucination", name, direct, yes=_yes(direct), **more))
                more.update(base=direct, against="asked at once", yes=_yes(after), described=right)
                rows.append(bench.row("hallucination", name + ", after a description", after, **more))
    return rows


def _yes(graded: Sequence[Graded]) -> float:
    return float(np.mean([same_answer(g.heard[0], "yes") for g in graded]))


def attributes(bench: Bench) -> list[Row]:
    """What of a scene is right, for each task that answers with one scene."""
    rows = []
    lucks: dict[str, dict[str, float]] = {}
    answers = [(task, "", bench.graded(task)) for task in (*PAIRS, "text+image->image")]
    answers += [(task, f", {bench.best}", graded) for task, graded in bench.chosen.items()]
    for task, how, graded in answers:
        about = "the scene" if task in PAIRS else task
        if about not in lucks:
            truths = [truth(item, task) for item in bench.items]
            pairs = [attributes_of(a, b) for i, a in enumerate(truths) for j, b in enumerate(truths) if i != j]
            lucks[about] = {name: float(np.mean([p[name] for p in pairs])) for name in pairs[0]} if pairs else {}
        parts = [attributes_of(truth(g.item, task), g.scenes[0]) for g in graded]
        for name in parts[0]:
            more: Row = {"section": "attributes", "condition": name, "chance": lucks[about].get(name, 0.0)}
            rows.append(row_of(task + how, [part[name] for part in parts], **more))
        bench.progress(
            f"attributes: {task}{how}: " + ", ".join(f"{r['condition']} {r['score']:.3f}" for r in rows[-5:])
        )
    return rows


def through(bench: Bench) -> list[Row]:
    """The pairs without text answered by way of a written description."""
    answers = {pair: bench.graded(task) for pair, task in THROUGH.items()}
    return _instead(bench, "through", "by way of text", "answered directly", answers)


def checked(bench: Bench) -> list[Row]:
    """The pairs that end in a medium, each answered `candidates` times, of which the model takes the one it reads best
    (`candidates.best_of`).
    """
    how: dict[str, Any] = {"num": bench.candidates, "sampling": SAMPLING, "guidance": bench.guidance}
    for task in PAIRS:
        if split_task(task)[1] != ("text",):
            prompts = [prompt(item, task) for item in bench.items]
            outputs = best_of(bench.model, prompts, request(task), **how)
            bench.chosen[task] = grade(bench.items, task, outputs, bench.checkers)
            bench.progress(f"checked: {task} is answered")
    return _instead(bench, "checked", bench.best, "answered once", bench.chosen)


def _instead(
    bench: Bench, section: str, condition: str, against: str, answers: Mapping[str, list[Graded]]
) -> list[Row]:
    """Other answers to some pairs, each beside the plain ones, and the mean of the 12 pairs with these in place."""
    limits = ceilings(bench.model, bench.items, PAIRS, bench.checkers)
    more: Row = {"chance": chance(bench.items, PAIRS[0]), "against": against}
    plain = {task: bench.graded(task) for task in PAIRS}
    rows = []
    for pair, graded in answers.items():
        bench.keep(f"{section}: {graded[0].task}, {condition}", graded)
        rows.append(bench.row(section, condition, graded, plain[pair], show=False, ceiling=limits[pair], **more))
    before, after = (
        [np.mean(scores) for scores in zip(*_scores(by_pair), strict=True)] for by_pair in (plain, {**plain, **answers})
    )
    more.update(change_of([a - b for a, b in zip(after, before, strict=True)]))
    return [*rows, row_of("the 12 pairs", after, section=section, condition=condition, **more)]


def _scores(by_pair: Mapping[str, Sequence[Graded]]) -> list[list[float]]:
    return [[g.score for g in graded] for graded in by_pair.values()]


def chains(bench: Bench) -> list[Row]:
    """Spoken questions answered by way of text, beside the direct answers, and what is right on the way."""
    if not bench.model.template.tells_texts_apart:
        return [_chains_need_2(bench, "chains", CHAINED)]
    graded, direct = bench.graded(CHAINED), bench.graded(SPOKEN)
    limits = ceilings(bench.model, bench.items, [SPOKEN], bench.checkers)
    more: Row = {"chance": chance(bench.items, SPOKEN), "ceiling": limits[SPOKEN]}
    rows = [
        bench.row("chains", "answered directly", direct, show=False, **more),
        bench.row("chains", "by way of text", graded, direct, against="answered directly", **more),
    ]
    texts = [[o.text or "" for o in g.outputs if o.modality == "text"] + ["", ""] for g in graded]
    steps = {
        "the question in writing is what was asked": [
            words(text[0]) == words(g.item.question) for text, g in zip(texts, graded, strict=True)
        ],
        "the answer in writing is right": [
            same_answer(text[1], g.item.answer) for text, g in zip(texts, graded, strict=True)
        ],
        "the spoken answer is the written one": [
            same_answer(text[1], g.heard[0]) for text, g in zip(texts, graded, strict=True)
        ],
    }
    rows += [row_of(CHAINED, marks, section="chains", condition=name) for name, marks in steps.items()]
    return rows


def chat(bench: Bench) -> list[Row]:
    """The second answer of a dialogue about a picture, and the same question asked alone."""
    alone = [
        replace(
            item,
            question=item.second_question,
            answer=item.second_answer,
            question_speech=item.second_question_speech,
            answer_speech=item.second_answer_speech,
        )
        for item in bench.items
    ]
    graded, single = bench.graded(CHAT), bench.ask(alone, SPOKEN)
    more: Row = {
        "chance": chance(bench.items, CHAT),
        "ceiling": ceilings(bench.model, bench.items, [CHAT], bench.checkers)[CHAT],
    }
    return [
        bench.row("chat", "asked alone", single, **more),
        bench.row("chat", "after another question", graded, single, against="asked alone", **more),
    ]


def shots(bench: Bench) -> list[Row]:
    """Held-out pictures after two examples of a rule, of training and not, and without examples."""
    rows: list[Row] = []
    graded: list[Graded] = []
    for condition, rules, given in (
        ("no examples, rules of training", RULES, 0),
        ("2 examples, rules of training", RULES, 2),
        ("no examples, rules never seen", HELD_OUT, 0),
        ("2 examples, rules never seen", HELD_OUT, 2),
    ):
        items = [
            replace(item, shown=item.shown[2 - given :], rule=rules[i % len(rules)])
            for i, item in enumerate(bench.items)
        ]
        before, graded = graded, bench.ask(items, SHOTS)
        more: Row = {"chance": chance(items, SHOTS), "ceiling": 1.0}
        if given:
            more.update(base=before, against="no examples")
        rows.append(bench.row("shots", condition, graded, **more))
    return rows


def order(bench: Bench) -> list[Row]:
    """What gives two media, given the other way round, beside the usual order."""
    rows = []
    for task, usual in TURNED.items():
        if usual == CHAINED and not bench.model.template.tells_texts_apart:
            rows.append(_chains_need_2(bench, "order", task))
            continue
        limit = ceilings(bench.model, bench.items, [SPOKEN if usual == CHAINED else usual], bench.checkers)
        more: Row = {"chance": chance(bench.items, usual), "ceiling": next(iter(limit.values())), "against": usual}
        rows.append(bench.row("order", "the other way round", bench.graded(task), bench.graded(usual), **more))
    return rows


def _chains_need_2(bench: Bench, section: str, task: str) -> Row:
    return _skipped(section, task, f"its template is version {bench.model.template.version}; chains need 2")


def _skipped(section: str, task: str, why: str, condition: str = "") -> Row:
    return {"section": section, "task": task, "condition": condition, "skipped": why}


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "directions": directions,
    "checked": checked,
    "composition": composition,
    "hallucination": hallucination,
    "attributes": attributes,
    "speech": speech,
    "robustness": robustness,
    "through": through,
    "chains": chains,
    "chat": chat,
    "shots": shots,
    "order": order,
}


def read_sections(names: str) -> list[str]:
    """Names joined by commas, or "all", in the order of `SECTIONS`. Raises `ManifestError`."""
    given = set(SECTIONS) if names == "all" else {name.strip() for name in names.split(",")}
    if given - set(SECTIONS):
        raise ManifestError(
            f"no section {', '.join(sorted(given - set(SECTIONS)))}; choose of {', '.join(SECTIONS)}, or all"
        )
    return [name for name in SECTIONS if name in given]


@torch.inference_mode()
def run(
    model: UnifiedModel,
    *,
    num: int,
    seed: int = 0,
    sections: Sequence[str] = ("directions",),
    checkers: Checkers | None = None,
    guidance: Mapping[str, float] | None = None,
    candidates: int = 8,
    keep: Keep = lambda title, graded: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report: `rows`, each with its `section` and `condition`; `mean` and `groups` of the directions; `scenes`, a
    digest of the scenes asked about, by which reports are known to be of the same ones; `num`, `seed`, `seconds`.

    Args:
        model: who answers.
        num: held-out scenes.
        seed: of the scenes, and of what sections draw.
        sections: names of `SECTIONS`.
        checkers: who grades, default the shipped ones.
        guidance: see `Bench`.
        candidates: see `Bench`.
        keep: see `Bench`.
        progress: see `Bench`.

    Raises:
        ManifestError: the model lacks a modality.
    """
    started = time.perf_counter()
    bench = Bench(
        model, test_items(model, num, seed), seed, checkers or Checkers(), keep, progress, guidance, candidates
    )
    rows = [row for name in sections for row in SECTIONS[name](bench)]
    scenes = json.dumps([item.scene.to_dict() for item in bench.items], sort_keys=True)
    return {
        "benchmark": "nanoworld",
        "num": num,
        "seed": seed,
        "guidance": dict(guidance or {}),
        "scenes": hashlib.sha256(scenes.encode()).hexdigest()[:16],
        **means([row for row in rows if row["section"] == "directions"]),
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
    }
