"""`evaluate_data`: reads items, lets the model answer them, and makes the report of the metrics that were chosen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyglot_lm.engine import Sampling, row_seeds
from anyglot_lm.grammar import Request
from anyglot_lm.unified import MAX_TEXT, Output, UnifiedModel
from anyglot_recipes.data_eval.evidence import Evidence, Judges
from anyglot_recipes.data_eval.items import TEXT, Item, Task, choose, encode, prompt_of, read_rows, read_task
from anyglot_recipes.data_eval.ranking import ranking
from anyglot_recipes.data_eval.scores import Result
from anyglot_recipes.data_eval.table import MEASURES, check_references, choose_metrics
from anyglot_tokenizers.errors import CodesError, ManifestError

FORMAT, VERSION = "anyglot.data_eval", "1"
CHUNK = 256
"""Items answered between two lines of progress."""
REASONS = 20
"""Most reasons of rows left out in the report."""


@dataclass(frozen=True)
class Settings:
    """What decides the result beside model, source and judges.

    Args:
        num: most items; None for all.
        candidates: of `ranking`, the right one among them.
        temperature: of the answers; 0 is greedy.
        seed: of the choice of items, the answers, and what stands for chance.
        batch_size: answers in flight at once; changes nothing in float32.
    """

    num: int | None = None
    candidates: int = 10
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32


@torch.inference_mode()
def evaluate_data(
    model: UnifiedModel,
    source: str | Path,
    task: str,
    *,
    metrics: Sequence[str] = (),
    judges: Judges | None = None,
    settings: Settings | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    where: str = "given",
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Evidence]:
    """How well a model does one task on a source's rows.

    Args:
        model: the unified model, with the tokenizers of the task's media.
        source: anything that `anyglot prepare` reads as rows.
        task: such as `"image->text"`, or `"text+image->speech"`.
        metrics: names of `MEASURES`; none takes the usual ones that fit the task, the judges and the rows.
        judges: what looks and listens.
        settings: items, candidates, temperature, seed.
        columns, images: as for `prepare`.
        where: names the model in errors and the report.
        progress: called with one line now and then.

    Returns:
        The report: `rows` (see `Result.row`), `items` (name, given, text of the output or `why` there is none,
        references and `scores`), `left_out` (`rows`, and `reasons` -> rows), `settings`, `judges`, `seconds`. And
        the evidence.

    Raises:
        ManifestError: a task, metric or source that does not go with the others; before anything is generated.
    """
    started = time.perf_counter()
    settings, judges = settings or Settings(), judges or Judges()
    if settings.candidates < 2:
        raise ManifestError(f"--candidates {settings.candidates}: ranking needs 2 at least")
    what = read_task(task, model, where)

    def rate(modality: str) -> int | None:
        return None if modality == TEXT else model.tokenizers[modality].spec.sample_rate

    names = choose_metrics(metrics, what, rate, judges)
    left_out: Counter[str] = Counter()
    items = choose(read_rows(Path(source), columns or {}, images), what, settings.num, settings.seed, left_out)
    items = encode(model, items, what, left_out)
    names = check_references(names, what, rate, items, strict=bool(metrics))
    if not names:
        raise ManifestError(f"{source}: no metric fits {what} without references or judges; add {', '.join(MEASURES)}")
    generating = names != ["ranking"]
    outputs, why = answer(model, items, what, settings, progress) if generating else ([None] * len(items), {})
    rng = np.random.default_rng([settings.seed, 1])
    evidence = Evidence(model, what, items, outputs, judges, rng)
    results: list[Result] = []
    for name in names:
        run = MEASURES[name].run
        rng = np.random.default_rng([settings.seed, 2])  # its own: a row does not depend on the other metrics
        results += ranking(evidence, settings.candidates, rng) if run is None else run(evidence)
        progress(f"{name}: done")
    if not results:
        raise ManifestError(
            f"{source}: all of {len(items)} items have a right answer in common, there is nothing to rank"
        )
    report = {
        "format": FORMAT,
        "version": VERSION,
        "model": where,
        "source": str(source),
        "task": str(what),
        "settings": vars(settings) | {"language": judges.language},
        "judges": _judges(judges),
        "rows": [result.row() for result in results],
        "items": [_item(i, evidence, results, why) for i in range(len(items))],
        "left_out": {"rows": left_out.total(), "reasons": dict(left_out.most_common(REASONS))},
        "seconds": round(time.perf_counter() - started, 1),
    }
    return report, evidence


def answer(
    model: UnifiedModel, items: Sequence[Item], task: Task, settings: Settings, progress: Callable[[str], None]
) -> tuple[list[Output | None], dict[int, str]]:
    """The model's output for each item, media as codes; None where there is none, and why."""
    outputs: list[Output | None] = [None] * len(items)
    why: dict[int, str] = {}
    sampling = dict.fromkeys((TEXT, *model.vocabulary.modalities), Sampling(temperature=settings.temperature))
    least = model.grammar.shortest(Request(order=(task.asked,)))
    seeds = row_seeds(settings.seed, len(items))
    for start in range(0, len(items), CHUNK):
        group, requests = [], []
        for i in range(start, min(start + CHUNK, len(items))):
            try:
                room = model.max_length - len(model.prompt(prompt_of(items[i], task)))
            except CodesError as error:
                why[i] = str(error)
                continue
            if room < least:
                why[i] = f"the prompt leaves {max(room, 0)} of {model.max_length} positions, an answer needs {least}"
                continue
            group.append(i)
            requests.append(Request(order=(task.asked,), max_ids=room, max_length={TEXT: min(MAX_TEXT, room)}))
        answers: list[list[Output]] = []
        if group:
            prompts = [prompt_of(items[i], task) for i in group]
            how: dict[str, Any] = {"seed": [seeds[i] for i in group], "batch_size": settings.batch_size}
            answers = model.respond(prompts, requests, sampling, decode=False, **how)
        for i, spans in zip(group, answers, strict=True):
            span = next((span for span in spans if span.modality == task.asked), None)
            if span is not None and (span.codes is not None or (span.text or "").strip()):
                outputs[i] = span if span.text is None else replace(span, text=span.text.strip())
            else:
                why[i] = "nothing was written"
        progress(f"{min(start + CHUNK, len(items))} of {len(items)} items answered")
    return outputs, why


def _item(i: int, evidence: Evidence, results: Sequence[Result], why: Mapping[int, str]) -> dict[str, Any]:
    """What the report says of one item."""
    item, task = evidence.items[i], evidence.task
    scores = {r.name: None if (score := r.scores[i]) is None else round(score[0], 4) for r in results}
    details = {name: values[i] for result in results for name, values in result.details.items()}
    return {
        "item": item.name,
        "given": {modality: str(item.contents[modality][0]) for modality in task.given},
        "answered": evidence.outputs[i] is not None,
        "output": evidence.texts[i],
        "references": [str(content) for content in item.contents.get(task.asked, ())],
        "scores": scores,
        **details,
        **({"why": why[i]} if i in why else {}),
    }


def _judges(judges: Judges) -> dict[str, Any]:
    """What the judges were."""
    found: dict[str, Any] = {name: space.name for name in ("clip", "clap") if (space := getattr(judges, name))}
    if judges.speaker is not None:
        found["speaker"] = judges.speaker_name
    return found | ({"recogniser": judges.recogniser.identity()} if judges.recogniser is not None else {})
