"""The pages of the field trial: the table with drawings (Markdown), and the model's answers with players (HTML).

What is shown is the first answers of each digit, right or wrong. Nothing is measured here (`field_eval.py` does).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.benchmark_report import anchor
from anyglot_recipes.field import WORDS, FieldDataConfig
from anyglot_recipes.field_eval import CANDIDATES, DRAWING, GUIDED, NAMER, Shown
from anyglot_recipes.field_music import INSTRUMENTS
from anyglot_recipes.gallery import medium, page, sample
from anyglot_tokenizers.files import atomic_write

COLUMNS = 4
"""Drawings a digit on the sheet."""
PLAYED = 2
"""Answers a digit and task on the page with players."""


def sheet(shown: Sequence[Shown], columns: int = COLUMNS) -> Tensor:
    """The first drawings of each digit side by side in one picture, `[3, 10 * H, columns * W]`."""
    drawn = [[a.outputs[-1].media for a in _first(shown, DRAWING, digit, columns)] for digit in range(len(WORDS))]
    pictures = [[picture for picture in row if picture is not None] for row in drawn]
    blank = torch.ones_like(next(picture for row in pictures for picture in row))  # where fewer were drawn
    return torch.cat([torch.cat([*row, *[blank] * (columns - len(row))], 2) for row in pictures], 1)


def markdown(
    report: dict[str, Any],
    config: FieldDataConfig,
    picture: str = "",
    page: str = "",
    readers: int = 0,
    practised: int = 0,
) -> str:
    """The page of a report.

    `picture` is the file with drawings and `page` the one with players, as paths from here; `readers` is the number of
    clips whose phones were learnt, `practised` that of its own answers that the model learnt from, by word and medium.
    """
    speaker = config.held_out_speaker
    lines = [
        "# Field trial: human speech, photos, emoji and chorales",
        "",
        "Made by `anyglot train field --data.root ../shared/data/real --table docs/field.md`, unedited; what is in",
        "that folder, whose it is and under which licence: [recipes](../recipes/README.md#recipes).",
        f"The speaker `{speaker}` and a tenth of the photos, emoji and chorales (by a hash of each) were never met in",
        "training, neither by the tokenizers nor by the language model nor by the judges. The same hands may occur on",
        "both sides. Speech and pictures are read as codes of tokenizers that learnt the digit words and captions of",
        "the training split (with synthetic voices, where installed, as further speakers), and are answered in codes",
        "that can be decoded, speech in the",
        f"voice of `{config.reply_speaker}`, the training speaker whom pocketsphinx understands best. In brackets:",
        "95 % of 2,000 resamples of the answers; one training, so its own luck is not in them. How long what hears,",
        "what sees and the speech codec are trained was settled after tables of the same clips and photos.",
        "",
        f"*Best of {CANDIDATES}*: the model draws {CANDIDATES} answers, reads them as it reads anything, and takes the",
        "one where the word that it was asked for is likeliest. No judge is asked, but judges learnt from the same",
        "training clips, photos and chorales. *Limit* is what the judge makes of real media that went through the",
        "tokenizer; an answer can be plainer than those, and a score above it.",
        "",
        "*Chorales*: a digit stands for a key, that many semitones above C. The last 4 seconds of each chorale were",
        f"moved into the ten keys and played with nanoworld's timbres {' and '.join(INSTRUMENTS)}; the lowest note of",
        "the last chord is taken for the tonic. The piece is free, the key is graded. Held-out pieces",
        "that end as one of the training does are not graded. The lowest tone, by a judge that learnt nothing, is",
        "mostly lost in the codec: see its limit.",
        "",
        "*Guided*: ids are chosen by what the word that is asked for adds to an answer to nothing (classifier-free",
        f"guidance, scales {', '.join(f'{scale} for {name}' for name, scale in GUIDED.items())}; settled on other",
        "answers to the ten words, by the same judges; the held-out speaker, photos and chorales had no part in it).",
    ]
    if practised:
        lines += [
            "",
            f"*Practice*: the model has also learnt from {practised} of its own answers to each word in each medium,",
            f"each the best of {CANDIDATES} by its own reading. No judge was asked there either.",
        ]
    if readers:
        lines += [
            "",
            f"*Phones*: what reads speech has also learnt {readers} clips of other people, which have no transcripts,",
            "with the phones that pocketsphinx found in them. So in the best of word->speech by pocketsphinx the judge",
            "is not independent of what chose the answer.",
        ]
    if any(row["task"].endswith(NAMER) for row in report["rows"]):
        lines += [
            "",
            "*SmolLM2*: a second language model, which only names emoji. Where a caption has a word that no training",
            "caption has, a language model from nothing never met it. SmolLM2-135M-Instruct says how near captions are",
            "to each other; a tokenizer learnt from edges and colors which training captions are near an emoji; and",
            "SmolLM2 learnt with LoRA to write the caption of what is like these. Parts of the training emoji, left",
            "out, served to settle how. SmolLM2 may have read held-out captions before, without their pictures.",
        ]
    lines += [
        "",
        "| task | n | score | chance | limit | how |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        low, high = row["interval"]
        score = f"{row['score']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['task']} | {row['n']} | {score} | {row['chance']:.2f} | {limit} | {row['how']} |")
    wrong = ", ".join(f"{said} as {written} ({count})" for said, written, count in report["misheard"])
    lines += ["", f"Most frequent mistakes of hearing: {wrong or 'none'}."]
    if picture:
        lines += [
            "",
            f"Drawn by the model after hearing `{speaker}` say zero (first row) to nine (last row), the best of",
            f"{CANDIDATES} by its own reading, for the first clips of each, not chosen otherwise:",
            "",
            f"![drawn signs]({picture})",
        ]
    if page:
        lines += [
            "",
            f"[Answers with players]({page}), a page to be opened in a browser: speech, drawings and chorales, the",
            "first of each digit, with what the judges read in them.",
        ]
    return "\n".join([*lines, ""])


def _first(shown: Sequence[Shown], task: str, digit: int, num: int) -> list[Shown]:
    return [answer for answer in shown if answer.task == task and answer.digit == digit][:num]


def players(path: Path, model: UnifiedModel, shown: Sequence[Shown]) -> None:
    """Write `path`, a page of the first answers of each task and digit, and its media beside it.

    Files of an earlier page stay if they have other names.
    """
    folder = path.parent
    (folder / "media").mkdir(parents=True, exist_ok=True)
    sections = []
    for task in dict.fromkeys(answer.task for answer in shown):
        parts = [f"<h2 id='{anchor(task)}'>{html.escape(task)}</h2>"]
        for digit in range(len(WORDS)):
            for i, answer in enumerate(_first(shown, task, digit, PLAYED)):
                name = f"{anchor(task)}-{digit}-{i}"
                made = "".join(
                    medium(folder, f"{name}-{n}", output.modality, output.content, model, sound=".mp3")
                    for n, output in enumerate(answer.outputs)
                )
                right = [found == digit for found in answer.read.values()]
                verdict = "".join(
                    f"<p>{html.escape(judge)}: {'nothing' if found is None else WORDS[found]}</p>"
                    for judge, found in answer.read.items()
                )
                parts.append(sample(f"<p>{html.escape(answer.given)}</p>", made, sum(right) / len(right), verdict))
        sections.append("".join(parts))
    intro = (
        f"The first {PLAYED} answers of each digit, not chosen otherwise: the best of {CANDIDATES} by the model's own "
        "reading. What was given is named, not played: it belongs to others. Made by a model that learnt from the Free "
        "Spoken Digit Dataset (CC BY-SA 4.0; the voice is that of one of its speakers), the Sign Language Digits "
        "Dataset (Apache-2.0) and JS Fake Chorales (CC BY 4.0)."
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page("Field trial: what the model answers", intro, "", sections), encoding="utf-8")
