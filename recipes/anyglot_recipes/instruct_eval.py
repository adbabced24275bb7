"""Does a model do what it is told? Held-out dialogues of nanoworld, answered freely, read by checkers.

    anyglot synth nanoworld-chat --source.split test --num 2000 --out test
    anyglot prepare test --model DIR --out test_codes
    python -m anyglot_recipes.instruct_eval test_codes --model DIR

The split "test" has scenes and phrasings that training never has. The model sees a dialogue up to an answer, with the
true answers before it, and may write whatever the grammar allows. An answer is worth its content
(`nanoworld.scene.score`, or 1 for the right words), and nothing where what was asked for is missing or a picture or
melody came that nobody asked for. Words beside a picture or melody ("here it is") are fine, and so are words written
before they are spoken. Plain pairs without instructions are `evaluate.py`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyglot_lm.grammar import Request
from anyglot_lm.segments import Sample
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.evaluate import SAMPLING, Checkers
from anyglot_recipes.importers.dialogues import prepared_dialogues, to_sample
from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH, TEXT
from anyglot_synth.nanoworld.language import same_answer
from anyglot_synth.nanoworld.scene import Scene, score
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write

WORDS = "words"
"""Written or spoken: the instruction leaves it open."""

DIRECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "describe a picture": ((WORDS,), ("see",)),
    "describe a melody": ((WORDS,), ("hear",)),
    "draw what is said": ((IMAGE,), ("draw", "draw-it")),
    "play what is said": ((MUSIC,), ("play", "play-it")),
    "play a picture": ((MUSIC,), ("play-seen",)),
    "draw a melody": ((IMAGE,), ("draw-heard",)),
    "say it aloud": ((SPEECH,), ("say", "say-it")),
    "write it down": ((TEXT,), ("write-it",)),
    "draw and say": ((IMAGE, SPEECH), ("draw-and-say",)),
    "answer a question": ((WORDS,), ("question", "count", "pronoun")),
    "compare two pictures": ((WORDS,), ("compare",)),
    "edit": ((), ("edit",)),
    "say what was before": ((WORDS,), ("before",)),
}
"""What the instruction asks for, and the acts of `GrammarWriter` that belong to it. An edit is answered in kind."""

MAX_IDS = 256


@dataclass(frozen=True)
class Case:
    """One answer to give: a dialogue that ends with the true one, and what a right one must hold."""

    direction: str
    sample: Sample
    wanted: tuple[str, ...]
    truth: tuple[Scene | str, ...]
    """Of each wanted part: the scene that it gives, or the words of an answer."""


def read_cases(prepared: str | Path, num: int) -> list[Case]:
    """The first `num` cases of each direction, from dialogues of `nanoworld-grammar`.

    Args:
        prepared: folder of `anyglot prepare` for such dialogues.
        num: most cases of a direction.

    Raises:
        ManifestError: other dialogues.
    """
    direction_of = {act: name for name, (_, acts) in DIRECTIONS.items() for act in acts}
    found: dict[str, list[Case]] = {name: [] for name in DIRECTIONS}
    for row, dialogue in prepared_dialogues(Path(prepared)):
        if dialogue.meta.get("writer") != "grammar":
            raise ManifestError(
                f"{row.source}: line {row.row} is no dialogue of nanoworld-grammar; its truth is not known"
            )
        codes = {name: value.numpy() for name, value in row.codes.items()}
        for number, act in enumerate(dialogue.meta["acts"]):
            turn = 2 * number + 1  # an act is what the user says and what the assistant does
            truths = [t for t in dialogue.meta["truth"] if t["turn"] == turn]
            direction = direction_of.get(act)
            if direction is None or not truths or len(found[direction]) >= num:
                continue
            answer = dialogue.turns[turn]
            wanted = DIRECTIONS[direction][0] or tuple(answer.parts[t["part"]].modality for t in truths)
            sample = to_sample(replace(dialogue, turns=dialogue.turns[: turn + 1]), codes)
            truth = tuple(Scene.from_dict(t["scene"]) if t["kind"] == "scene" else str(t["answer"]) for t in truths)
            found[direction].append(Case(direction, sample, wanted, truth))
    return [case for cases in found.values() for case in cases]


def right_form(wanted: Sequence[str], modalities: Sequence[str]) -> bool:
    """Whether an answer of these modalities is of the kind that was asked for."""
    have = set(modalities)
    spare = set() if tuple(wanted) == (TEXT,) else {TEXT, SPEECH}
    return all(have & {TEXT, SPEECH} if w == WORDS else w in have for w in wanted) and not have - set(wanted) - spare


def grade(
    cases: Sequence[Case], answers: Sequence[Sequence[Output]], checkers: Checkers
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 `[N]` in 0..1, and bool `[N]` whether the answer was of the right form."""
    good = np.array([right_form(c.wanted, [o.modality for o in a]) for c, a in zip(cases, answers, strict=True)], bool)
    scores = np.zeros(len(cases))
    places: dict[str, list[tuple[int, int, Any]]] = {}
    for i in map(int, np.flatnonzero(good)):
        for j, wanted in enumerate(cases[i].wanted):
            kinds = (TEXT, SPEECH) if wanted == WORDS else (wanted,)
            output = next(o for o in answers[i] if o.modality in kinds)
            places.setdefault(output.modality, []).append((i, j, output.content))
    for modality, found in places.items():
        for (i, j, _), (heard, scene) in zip(found, checkers.read(modality, [c for *_, c in found]), strict=True):
            truth = cases[i].truth[j]
            value = float(same_answer(heard, truth)) if isinstance(truth, str) else score(truth, scene)
            scores[i] += value / len(cases[i].wanted)
    return scores, good


def chance(cases: Sequence[Case]) -> float:
    """Mean score of giving each case of one direction the right answer of another one, in the right form."""

    def worth(truth: Scene | str, given: Scene | str) -> float:
        if isinstance(truth, str) or isinstance(given, str):
            return float(truth == given)
        return score(truth, given)

    pairs = [worth(a.truth[0], b.truth[0]) for a in cases for b in cases if a is not b]
    return float(np.mean(pairs)) if pairs else 0.0


def interval(scores: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    drawn = np.random.default_rng(seed).choice(scores, size=(1000, len(scores))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def true_answers(model: UnifiedModel, cases: Sequence[Case]) -> list[list[Output]]:
    """What the assistant of the data answers, through the model's tokenizers: the ceiling."""
    answers: list[list[Output]] = []
    for case in cases:
        last: list[Output] = []
        for segment in reversed(case.sample.segments):
            if segment.role != "assistant":
                break
            text = segment.content if isinstance(segment.content, str) else None
            codes = None
            if not isinstance(segment.content, str):
                kept = model.vocabulary.block(segment.modality).num_quantizers
                codes = torch.from_numpy(segment.content[:kept])
            last.insert(0, Output(segment.modality, text=text, codes=codes))
        answers.append(last)
    for modality in (IMAGE, SPEECH, MUSIC):
        where = [(a, i) for a in answers for i, o in enumerate(a) if o.modality == modality]
        media = model.decode_media(modality, [codes for a, i in where if (codes := a[i].codes) is not None])
        for (a, i), item in zip(where, media, strict=True):
            a[i] = replace(a[i], media=item)
    return answers


@torch.inference_mode()
def evaluate_instructions(
    model: UnifiedModel, cases: Sequence[Case], *, checkers: Checkers | None = None, ceiling: bool = False
) -> list[dict[str, Any]]:
    """A row for each direction: `n`, `score` with its interval `low` to `high`, `form` (share of answers of the right
    kind), `chance`. With `ceiling` the data's own answers are graded instead of the model's.
    """
    if ceiling:
        answers = true_answers(model, cases)
    else:
        sampling = {m: SAMPLING[m] for m in (TEXT, *model.vocabulary.modalities)}
        answers = model.respond([case.sample for case in cases], Request(max_ids=MAX_IDS), sampling)
    scores, good = grade(cases, answers, checkers or Checkers())
    return list(_rows(cases, scores, good))


def _rows(cases: Sequence[Case], scores: np.ndarray, good: np.ndarray) -> Iterator[dict[str, Any]]:
    for direction in DIRECTIONS:
        mine = [i for i, case in enumerate(cases) if case.direction == direction]
        if not mine:
            continue
        low, high = interval(scores[mine])
        row = {"score": scores[mine].mean(), "low": low, "high": high, "form": good[mine].mean()}
        row["chance"] = chance([cases[i] for i in mine])
        yield {"direction": direction, "n": len(mine), **{key: round(float(value), 4) for key, value in row.items()}}


def main() -> None:
    """Command line of `evaluate_instructions`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", help="folder of anyglot prepare, of dialogues of nanoworld-chat")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--num", type=int, default=200, help="most answers of a direction (default 200)")
    parser.add_argument("--ceiling", action="store_true", help="grade the data's own answers")
    parser.add_argument("--out", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args()
    model = UnifiedModel.from_pretrained(arguments.model)
    rows = evaluate_instructions(model, read_cases(arguments.prepared, arguments.num), ceiling=arguments.ceiling)
    print(f"{'direction':22s}     n  score  95 % interval  form   chance")
    for row in rows:
        numbers = "{score:.3f}  {low:.3f} to {high:.3f}  {form:.3f}  {chance:.3f}".format(**row)
        print(f"{row['direction']:22s} {row['n']:5d}  {numbers}")
    if arguments.out:
        with atomic_write(Path(arguments.out)) as path:
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
