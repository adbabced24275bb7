"""Metrics by name: what each needs and which tasks it fits. Wrong choices are refused here, before a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from anyglot_recipes.data_eval import scores
from anyglot_recipes.data_eval.evidence import Evidence, Judges
from anyglot_recipes.data_eval.items import TEXT, Item, Task
from anyglot_recipes.data_eval.scores import CLAP, CLIP, Rate, Result, medium_of
from anyglot_tokenizers.errors import ManifestError


@dataclass(frozen=True)
class Measure:
    """A metric.

    Args:
        fits: whether it can score a task.
        scored: what it can score, for whoever chose another task.
        run: its rows; None for `ranking`, which takes more than evidence.
        judge: the option with the judge that it needs for a task, or nothing.
        compares: the modality that items must hold.
        usual: whether it is taken where no metrics are named.
        least: fewest items that hold it.
    """

    fits: Callable[[Task, Rate], bool]
    scored: str
    run: Callable[[Evidence], list[Result]] | None
    judge: Callable[[Task, Rate], str] = lambda task, rate: ""
    compares: Callable[[Task, Rate], str] = lambda task, rate: task.asked
    usual: Callable[[Task], bool] = lambda task: True
    least: int = 1


def _writes(task: Task, rate: Rate) -> bool:
    return task.asked == TEXT


def _sounds(task: Task, rate: Rate) -> bool:
    return rate(task.asked) is not None


def _looks(task: Task, rate: Rate) -> bool:
    return medium_of(task, rate, CLIP) is not None


def _listens(task: Task, rate: Rate) -> bool:
    return medium_of(task, rate, CLAP) is not None


def _partner(*spaces: str) -> Callable[[Task, Rate], str]:
    """What an answer is compared with in the first of the spaces that fits."""

    def partner(task: Task, rate: Rate) -> str:
        media = (medium_of(task, rate, space) for space in spaces)
        return TEXT if task.asked != TEXT else next(medium for medium in media if medium)

    return partner


def _errors(letters: bool) -> Measure:
    return Measure(
        fits=lambda task, rate: _writes(task, rate) or _sounds(task, rate),
        scored="text and speech",
        run=lambda evidence: scores.error_rates(evidence, letters=letters),
        judge=lambda task, rate: "recogniser" if _sounds(task, rate) else "",
        compares=lambda task, rate: TEXT,
        usual=lambda task: "speech" in (*task.given, task.asked),
    )


MEASURES: dict[str, Measure] = {
    "exact": Measure(_writes, "text", scores.exact),
    "cider": Measure(_writes, "text", scores.cider, least=2),
    "wer": _errors(letters=False),
    "cer": _errors(letters=True),
    "clip": Measure(
        _looks,
        "pictures, and text about them",
        scores.clip,
        lambda task, rate: "clip",
        _partner(CLIP),
    ),
    "clip_image": Measure(
        lambda task, rate: task.asked != TEXT and _looks(task, rate),
        "pictures",
        scores.clip_image,
        lambda task, rate: "clip",
    ),
    "clap": Measure(
        _listens,
        "sounds, and text about them",
        scores.clap,
        lambda task, rate: "clap",
        _partner(CLAP),
    ),
    "retrieval": Measure(
        lambda task, rate: _looks(task, rate) or _listens(task, rate),
        "text and media that belong together",
        scores.retrieval,
        lambda task, rate: "clip" if _looks(task, rate) else "clap",
        _partner(CLIP, CLAP),
        least=2,
    ),
    "speaker": Measure(
        _sounds,
        "speech",
        scores.speaker,
        lambda task, rate: "xvector",
    ),
    "ranking": Measure(lambda task, rate: True, "anything", None, least=2),
}
JUDGES = {"clip": "clip", "clap": "clap", "xvector": "speaker", "recogniser": "recogniser"}
"""Option -> attribute of `Judges`."""


def choose_metrics(named: Sequence[str], task: Task, rate: Rate, judges: Judges) -> list[str]:
    """The metrics to compute: those named, or without any all that are usual for the task and have their judges.

    Raises:
        ManifestError: an unknown metric, one that does not fit the task, or one whose judge or package is not here.
    """
    if not named:
        return [
            name
            for name, measure in MEASURES.items()
            if measure.fits(task, rate) and measure.usual(task) and _has_judge(measure, task, rate, judges)
            if name not in ("wer", "cer") or find_spec("jiwer")
        ]
    for name in named:
        if name not in MEASURES:
            raise ManifestError(f"--metrics {name}: there is no such metric; there are {', '.join(MEASURES)}")
        measure = MEASURES[name]
        if not measure.fits(task, rate):
            fitting = ", ".join(other for other, entry in MEASURES.items() if entry.fits(task, rate))
            raise ManifestError(f"--metrics {name}: scores {measure.scored}, which {task} does not give; use {fitting}")
        if not _has_judge(measure, task, rate, judges):
            option = measure.judge(task, rate)
            raise ManifestError(f"--metrics {name}: needs a judge for {task}; name it with --{option}")
        if name in ("wer", "cer") and not find_spec("jiwer"):
            raise ManifestError(f"--metrics {name}: jiwer is not installed; run: pip install 'anyglot[synth]'")
    return list(dict.fromkeys(named))


def check_references(names: Sequence[str], task: Task, rate: Rate, items: Sequence[Item], strict: bool) -> list[str]:
    """The metrics for which items hold what they compare with.

    Args:
        strict: raise where they do not.

    Raises:
        ManifestError: they do not, and `strict`.
    """
    kept = []
    for name in names:
        measure = MEASURES[name]
        modality = measure.compares(task, rate)
        there = [item for item in items if item.has(modality)]
        if len(there) >= measure.least:
            kept.append(name)
        elif strict and there:
            raise ManifestError(
                f"--metrics {name}: needs {measure.least} items with {modality} at least, has {len(there)}; raise --num"
            )
        elif strict:
            raise ManifestError(
                f"--metrics {name}: none of {len(items)} items has {modality} to compare with; say what a column "
                f"holds, such as --column {'title' if modality == TEXT else 'file'}={modality}, or leave {name} out"
            )
    return kept


def _has_judge(measure: Measure, task: Task, rate: Rate, judges: Judges) -> bool:
    option = measure.judge(task, rate)
    return not option or getattr(judges, JUDGES[option]) is not None
