"""The nanoworld benchmark: every task of `tasks.py` on held-out scenes, graded by checkers that never see the model.

Each row holds `n`, `score` with its 95 % bootstrap interval `low` to `high`, `chance` (the ground truth of another
sample given as the answer), `ceiling` (the ground truth through the tokenizers, what no language model can beat),
`corrected` (the score where chance is 0), `missing` (share of answers that lack what was asked), `unreadable` (share in
which a checker saw no scene; both count as wrong) and the `scores` of the items. Sections beyond the tasks are
`benchmark.py`'s. This file trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.segments import Sample
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.tasks import CHAINS, CHAT, PAIRS, SHOTS, TASKS, TURNED, Item, prompt, right_words, split_task
from anyglot_synth.nanoworld.judge import SpeechJudge
from anyglot_synth.nanoworld.language import describe, parse, same_answer, words
from anyglot_synth.nanoworld.listen import listen
from anyglot_synth.nanoworld.scene import Scene, score
from anyglot_synth.nanoworld.see import see
from anyglot_tokenizers.metrics import interval

SAMPLING = {
    "text": Sampling(temperature=0.0),
    "image": Sampling(temperature=0.0),
    "speech": Sampling(temperature=0.0),
    "music": Sampling(temperature=0.0),
}
"""The benchmark's decoding settings."""


@dataclass
class Graded:
    """One sample of one task: what came out, what the checker read in it (in words, and as a scene), and the verdict in
    0..1. An answer is `missing` when it lacks a modality that was asked for, or has it without any content.
    """

    task: str
    item: Item
    outputs: list[Output]
    heard: list[str] = field(default_factory=list)
    scenes: list[Scene | None] = field(default_factory=list)
    score: float = 0.0
    missing: bool = False


class Recogniser(Protocol):
    """What hears speech: the world's own `SpeechJudge`, or `SphinxJudge` as a second opinion."""

    def transcribe(self, audios: Sequence[np.ndarray]) -> list[str]: ...


class Checkers:
    """Grades media without the model: pixels, melodies, speech and text are read back into scenes."""

    def __init__(self, judge: Recogniser | None = None) -> None:
        self.judge: Recogniser = judge or SpeechJudge.load()

    def read(self, modality: str, media: Sequence[str | Tensor | None]) -> list[tuple[str, Scene | None]]:
        """(what was read in words, the scene or None) for each medium; None stands for a missing one."""
        if modality == "speech":
            present = [i for i, m in enumerate(media) if m is not None and len(_mono(m)) > 0]
            said = dict(zip(present, self.judge.transcribe([_mono(media[i]) for i in present]), strict=True))
            return [(said.get(i, ""), parse(said[i]) if i in said else None) for i in range(len(media))]
        readers: dict[str, Callable[[Any], Scene | None]] = {
            "text": parse,
            "image": lambda x: see(x.permute(1, 2, 0).numpy()),
            "music": lambda x: listen(_mono(x), 16000),
        }
        scenes = [None if m is None else readers[modality](m) for m in media]
        if modality == "text":
            return [(str(m or ""), s) for m, s in zip(media, scenes, strict=True)]
        return [(_say(s), s) for s in scenes]


def _mono(audio: Any) -> np.ndarray:
    return np.asarray(audio, dtype=np.float32).reshape(-1)


def _say(scene: Scene | None) -> str:
    return "nothing recognisable" if scene is None else describe(scene, None, "spoken")


def truth(item: Item, task: str) -> Scene:
    """The scene that the answer to `task` should show."""
    is_edit = TURNED.get(task, task) == "text+image->image"
    return item.edited if is_edit and item.edited is not None else item.scene


def grade(items: Sequence[Item], task: str, outputs: Sequence[Sequence[Output]], checkers: Checkers) -> list[Graded]:
    """Grade the answers of one task. An answer's score is the mean over the modalities the task asks for; a chain is
    graded by its end.
    """
    graded = [Graded(task, item, list(out)) for item, out in zip(items, outputs, strict=True)]
    for g in graded:
        full = [o.modality for o in g.outputs if not _empty(o.content)]
        g.missing = any(full.count(m) < split_task(task)[1].count(m) for m in split_task(task)[1])
    targets = _graded_modalities(task)
    for modality in targets:
        media = [next((o.content for o in g.outputs if o.modality == modality), None) for g in graded]
        for g, (heard, scene) in zip(graded, checkers.read(modality, media), strict=True):
            g.heard.append(heard)
            g.scenes.append(scene)
            wanted = right_words(g.item, task)
            if wanted is not None:
                g.score += float(same_words(task, heard, wanted)) / len(targets)
            else:
                g.score += score(truth(g.item, task), scene) / len(targets)
    return graded


def _empty(content: str | Tensor | None) -> bool:
    return content is None or (not content.strip() if isinstance(content, str) else content.numel() == 0)


def _graded_modalities(task: str) -> tuple[str, ...]:
    targets = split_task(task)[1]
    return targets[-1:] if TURNED.get(task, task) in CHAINS else targets


def same_words(task: str, said: str, wanted: str) -> bool:
    """Whether an answer in words is right. The rules of `SHOTS` are about order, so there words must stand in place."""
    return words(said) == words(wanted) if task == SHOTS else same_answer(said, wanted)


def chance(items: Sequence[Item], task: str) -> float:
    """Mean score of giving each item the right answer of another one (every other one, exactly); 0 without another.

    For `SHOTS` that is another one of the same rule.
    """
    wanted = [right_words(item, task) or "" for item in items]
    if any(wanted):
        pairs = [
            float(same_words(task, wanted[i], wanted[j]))
            for i, a in enumerate(items)
            for j, b in enumerate(items)
            if i != j and (task != SHOTS or a.rule == b.rule)
        ]
    else:
        pairs = [score(truth(a, task), truth(b, task)) for a in items for b in items if a is not b]
    return float(np.mean(pairs)) if pairs else 0.0


def ceilings(model: UnifiedModel, items: Sequence[Item], tasks: Sequence[str], checkers: Checkers) -> dict[str, float]:
    """Score of the ground truth after encode and decode, per task (text is its own ceiling)."""

    def media_score(modality: str, codes: list[np.ndarray | None], truths: list[Scene]) -> list[float]:
        if modality == "text":
            return [1.0] * len(truths)
        media = model.decode_media(modality, [_used(model, modality, c) for c in codes if c is not None])
        return [score(t, s) for t, (_, s) in zip(truths, checkers.read(modality, media), strict=True)]

    scenes = [item.scene for item in items]
    stored = {"text": "image", "image": "image", "speech": "reply", "music": "music"}
    asked = {target for task in tasks for target in _graded_modalities(task)}  # a model may lack the others
    plain = {m: float(np.mean(media_score(m, [i.codes[stored[m]] for i in items], scenes))) for m in asked}
    result = {}
    for task in tasks:
        wanted = [right_words(item, task) for item in items]
        if "speech" in split_task(task)[1] and None not in wanted:
            said = [item.second_answer_speech if task == CHAT else item.answer_speech for item in items]
            heard = checkers.read("speech", model.decode_media("speech", [_used(model, "speech", s) for s in said]))
            result[task] = float(np.mean([same_answer(h, w or "") for (h, _), w in zip(heard, wanted, strict=True)]))
        elif task == "text+image->image":
            edited = media_score("image", [i.edited_image for i in items], [truth(i, task) for i in items])
            result[task] = float(np.mean(edited))
        else:
            result[task] = float(np.mean([plain[m] for m in _graded_modalities(task)]))
    return result


def _used(model: UnifiedModel, modality: str, codes: np.ndarray | None) -> np.ndarray:
    assert codes is not None
    return codes[: model.vocabulary.block(modality).num_quantizers]


def request(task: str) -> Request:
    """What the grammar must make the model answer for `task`."""
    targets = split_task(task)[1]
    return Request(order=targets, max_ids=128 if targets == ("text",) else 512)


def answer(
    model: UnifiedModel,
    items: Sequence[Item],
    task: str,
    *,
    sampling: dict[str, Sampling] | None = None,
    seed: int = 0,
    guidance: Mapping[str, float] | None = None,
) -> list[list[Output]]:
    """The model's outputs for one task, media decoded. Arguments are as for `UnifiedModel.respond`."""
    prompts: list[Sample] = [prompt(item, task) for item in items]
    requests = [request(task)] * len(items)
    sampling = sampling or {m: how for m, how in SAMPLING.items() if m in ("text", *model.vocabulary.modalities)}
    return model.respond(prompts, requests, sampling=sampling, seed=seed, guidance=guidance)


GROUPS = ("understanding", "generation", "cross-modal understanding", "cross-modal generation")
"""Kinds of ability: one medium into text, text into one medium, several inputs into text, everything else."""


def group_of(task: str) -> str:
    """Which of `GROUPS` a task of `TASKS` belongs to."""
    sources, targets = split_task(task)
    if targets == ("text",):
        return "understanding" if len(sources) == 1 else "cross-modal understanding"
    return "generation" if sources == ("text",) and len(targets) == 1 else "cross-modal generation"


def row_of(
    task: str, scores: Sequence[float], *, chance: float | None = None, ceiling: float | None = None, **more: Any
) -> dict[str, Any]:
    """A row of the report.

    Args:
        task: what was asked.
        scores: one for each item.
        chance: see the top of this file; None where it says nothing.
        ceiling: likewise.
        **more: further entries. `weights` are those of the items in the mean.
    """
    mean, low, high = interval(list(scores), more.get("weights"))
    row = {"task": task, "n": len(scores), "score": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
    if chance is not None:
        row["chance"] = round(chance, 4)
    if ceiling is not None:
        row["ceiling"] = round(ceiling, 4)
    if chance is not None:
        row["corrected"] = round((mean - chance) / (1 - chance), 4) if chance < 1 else 0.0
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in more.items()}
    return {**row, **rounded, "scores": [round(float(score), 4) for score in scores]}


@torch.inference_mode()
def evaluate(
    model: UnifiedModel,
    items: Sequence[Item],
    *,
    tasks: Sequence[str] = TASKS,
    checkers: Checkers | None = None,
    guidance: Mapping[str, float] | None = None,
    keep: Callable[[list[Graded]], None] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The benchmark's report: `{"rows": [...], "mean": ..., "groups": ..., "seconds": ...}`.

    `mean` is over the 12 pairs, `groups` has the mean of each kind of ability.

    Args:
        model: the unified model.
        items: held-out items with codes made by the model's own tokenizers.
        tasks: tasks to run.
        checkers: graders, default the shipped ones.
        guidance: scales of classifier-free guidance by modality.
        keep: called with the graded samples of each task (for galleries).
        progress: called with one line per finished task.
    """
    started = time.perf_counter()
    checkers = checkers or Checkers()
    limits = ceilings(model, items, tasks, checkers)
    rows: list[dict[str, Any]] = []
    lucks: dict[str, float] = {}
    for task in tasks:
        graded = grade(items, task, answer(model, items, task, guidance=guidance), checkers)
        if keep is not None:
            keep(graded)
        about = "the scene" if task in PAIRS else task  # all pairs have the same truth
        if about not in lucks:
            lucks[about] = chance(items, task)
        found: dict[str, Any] = {
            "chance": lucks[about],
            "ceiling": limits[task],
            **shares(graded),
            "group": group_of(task),
        }
        rows.append(row_of(task, [g.score for g in graded], **found))
        progress("{task:24s} score {score:.3f}  chance {chance:.3f}  ceiling {ceiling:.3f}".format(**rows[-1]))
    return {**means(rows), "rows": rows, "seconds": round(time.perf_counter() - started, 1)}


def shares(graded: Sequence[Graded]) -> dict[str, float]:
    """`missing`, and where the answers should hold scenes, `unreadable`: the share in which a checker saw none."""
    found = {"missing": float(np.mean([g.missing for g in graded]))}
    if right_words(graded[0].item, graded[0].task) is None:
        found["unreadable"] = float(np.mean([None in g.scenes for g in graded]))
    return found


def means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mean` over the 12 pairs (None without any) and `groups`, name of a group -> mean of its tasks."""
    pairs = [row["score"] for row in rows if row["task"] in PAIRS]
    groups = {name: [row["score"] for row in rows if row["group"] == name] for name in GROUPS}
    return {
        "mean": round(float(np.mean(pairs)), 4) if pairs else None,
        "groups": {name: round(float(np.mean(scores)), 4) for name, scores in groups.items() if scores},
    }
