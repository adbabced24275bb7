"""Text instructions in Alpaca's format (JSONL of instruction, input, output), made here: templates and a small model.

Templates have answers that a program knows to be right; a language model writes the rest, which may be wrong: each
row's `meta.made_by` says "template" or "language-model". Short enough to be spoken. For trying the pipeline at scale
where no public file is at hand; it is no substitute for one.

    python -m anyglot_synth.text_instructions --out instructions.jsonl --num 5000 --written 300
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.anyinstruct_parse import check, clean, sentences
from anyglot_synth.anyinstruct_prompts import META_TOPICS
from anyglot_synth.dialogue import Json
from anyglot_synth.llm import CachedWriter, Request, Unusable, Writer, ask_all, build_writer
from anyglot_synth.seeds import rng_of, seed_of
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_write

VERSION = 1
"""Counts changes of what a seed gives."""
Row = tuple[str, str, str]
"""(instruction, input, output)."""

_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Karen",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
    "Victor",
    "Wendy",
    "Yusuf",
    "Zoe",
    "Amir",
    "Bella",
    "Carlos",
    "Dina",
    "Elias",
    "Fatima",
    "George",
    "Hana",
]
_THINGS = [
    "apples",
    "pears",
    "books",
    "pens",
    "cups",
    "plates",
    "candles",
    "shells",
    "stamps",
    "coins",
    "cards",
    "flowers",
    "eggs",
    "lemons",
    "buttons",
    "marbles",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_OPPOSITES = dict(
    pair.split("-")
    for pair in [
        "hot-cold",
        "big-small",
        "fast-slow",
        "old-young",
        "wet-dry",
        "full-empty",
        "early-late",
        "open-closed",
        "heavy-light",
        "hard-soft",
        "long-short",
        "high-low",
        "near-far",
        "loud-quiet",
        "clean-dirty",
        "rich-poor",
        "strong-weak",
        "thick-thin",
        "deep-shallow",
        "wide-narrow",
        "happy-sad",
        "brave-fearful",
        "sharp-blunt",
        "smooth-rough",
        "sweet-bitter",
        "cheap-expensive",
        "asleep-awake",
        "first-last",
        "inside-outside",
        "always-never",
    ]
)
_PAST = dict(
    pair.split("-")
    for pair in [
        "go-went",
        "see-saw",
        "eat-ate",
        "write-wrote",
        "take-took",
        "come-came",
        "give-gave",
        "find-found",
        "buy-bought",
        "run-ran",
        "sing-sang",
        "drink-drank",
        "swim-swam",
        "fly-flew",
        "know-knew",
        "begin-began",
        "break-broke",
        "choose-chose",
        "drive-drove",
        "fall-fell",
        "forget-forgot",
        "get-got",
        "grow-grew",
        "keep-kept",
        "leave-left",
        "make-made",
        "meet-met",
        "ride-rode",
        "sleep-slept",
        "speak-spoke",
        "teach-taught",
        "think-thought",
        "win-won",
    ]
)
_KINDS = {
    "fruit": ["apple", "pear", "banana", "cherry", "plum", "grape", "lemon", "mango", "peach", "orange"],
    "animal": ["cat", "dog", "horse", "cow", "sheep", "goat", "rabbit", "mouse", "lion", "tiger"],
    "vegetable": ["carrot", "onion", "potato", "cabbage", "spinach", "leek", "pumpkin", "radish", "turnip", "celery"],
    "tool": ["hammer", "saw", "drill", "wrench", "pliers", "screwdriver", "chisel", "file", "axe", "shovel"],
    "musical instrument": [
        "guitar",
        "piano",
        "violin",
        "flute",
        "drum",
        "trumpet",
        "harp",
        "cello",
        "clarinet",
        "accordion",
    ],
    "piece of clothing": ["shirt", "coat", "scarf", "hat", "sock", "glove", "skirt", "jacket", "sweater", "belt"],
    "piece of furniture": ["table", "chair", "sofa", "bed", "desk", "shelf", "wardrobe", "bench", "stool", "cupboard"],
}
_BY_SIZE = ["ant", "bee", "mouse", "rabbit", "cat", "goat", "horse", "rhinoceros", "elephant", "whale"]
_PACK = {
    "the beach": ("a towel", "sun cream", "a hat", "a bottle of water", "sandals", "a book"),
    "the mountains": ("sturdy boots", "a map", "a warm jacket", "a bottle of water", "a snack", "a first aid kit"),
    "a picnic": ("a blanket", "sandwiches", "fruit", "a bottle of juice", "napkins", "a ball"),
    "a rainy walk": ("an umbrella", "rubber boots", "a raincoat", "dry socks", "a warm drink"),
    "a winter trip": ("gloves", "a scarf", "a thick coat", "a woollen hat", "warm socks", "lip balm"),
    "school": ("pens", "a notebook", "lunch", "a bottle of water", "a ruler", "the homework"),
}
_REQUESTS = [
    "open the window",
    "close the door",
    "turn down the music",
    "wait a moment",
    "help me with this bag",
    "call me tomorrow",
    "pass the salt",
    "send me the photo",
    "speak more slowly",
    "show me the way",
    "keep this seat free",
    "bring some water",
    "turn on the light",
]
_UNITS = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("dozens", "pieces", 12),
)


def _pick(rng: np.random.Generator, choices: Any, num: int = 1) -> list[Any]:
    choices = list(choices)
    return [choices[int(i)] for i in rng.choice(len(choices), num, replace=False)]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sum(rng: np.random.Generator) -> Row:
    a, b = (int(n) for n in rng.integers(2, 50, 2))
    if rng.random() < 0.5:
        return _one(rng, f"What is {a} plus {b}?", f"Add {a} and {b}."), "", f"{a} plus {b} is {a + b}."
    a, b = max(a, b), min(a, b)
    return _one(rng, f"What is {a} minus {b}?", f"Take {b} away from {a}."), "", f"{a} minus {b} is {a - b}."


def _one(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


def _story(rng: np.random.Generator) -> Row:
    (name,), (thing,) = _pick(rng, _NAMES), _pick(rng, _THINGS)
    a, b = (int(n) for n in rng.integers(2, 20, 2))
    if rng.random() < 0.5:
        return (
            f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
            "",
            f"{name} has {a + b} {thing}.",
        )
    return (
        f"{name} has {a + b} {thing} and gives {b} away. How many {thing} are left?",
        "",
        f"{a} {thing} are left.",
    )


def _unit(rng: np.random.Generator) -> Row:
    (unit,) = _pick(rng, _UNITS)
    large, small, factor = unit
    count = int(rng.integers(2, 13))
    asked = _one(rng, f"How many {small} are {count} {large}?", f"Convert {count} {large} to {small}.")
    return asked, "", f"{count} {large} are {count * factor} {small}."


def _calendar(rng: np.random.Generator) -> Row:
    names, kind = (_DAYS, "day") if rng.random() < 0.5 else (_MONTHS, "month")
    at, step = int(rng.integers(len(names))), int(rng.integers(1, 4))
    after = names[(at + step) % len(names)]
    if step == 1:
        return (
            _one(rng, f"Which {kind} comes after {names[at]}?", f"Name the {kind} after {names[at]}."),
            "",
            f"{after}.",
        )
    return f"Which {kind} is {step} {kind}s after {names[at]}?", "", f"It is {after}."


def _clock(rng: np.random.Generator) -> Row:
    now, later = int(rng.integers(1, 13)), int(rng.integers(1, 12))
    (name,) = _pick(rng, _NAMES)
    asked = f"It is {now} o'clock. {name} comes in {later} hour{'s' * (later > 1)}. When does {name} come?"
    return asked, "", f"{name} comes at {(now + later - 1) % 12 + 1} o'clock."


def _opposite(rng: np.random.Generator) -> Row:
    ((word, other),) = _pick(rng, _OPPOSITES.items())
    if rng.random() < 0.5:
        word, other = other, word
    asked = _one(rng, f"What is the opposite of {word}?", f"Give me a word that means the contrary of {word}.")
    return asked, "", f"The opposite of {word} is {other}."


def _past(rng: np.random.Generator) -> Row:
    ((verb, past),) = _pick(rng, _PAST.items())
    asked = _one(rng, f"What is the past tense of {verb}?", "Put the verb into the past tense.")
    return asked, verb if "the verb" in asked else "", f"The past tense of {verb} is {past}."


def _kind(rng: np.random.Generator) -> Row:
    kind, other = _pick(rng, _KINDS, 2)
    (right,) = _pick(rng, _KINDS[kind])
    words = _pick(rng, [right, *_pick(rng, _KINDS[other], 2)], 3)
    if rng.random() < 0.5:
        return f"Which of these is {_a(kind)}?", ", ".join(words), f"{_a(right).capitalize()} is {_a(kind)}."
    return f"Which of these is not {_a(other)}?", ", ".join(words), f"{_a(right).capitalize()} is not {_a(other)}."


def _bigger(rng: np.random.Generator) -> Row:
    a, b = _pick(rng, _BY_SIZE, 2)
    large, small = sorted((a, b), key=_BY_SIZE.index, reverse=True)
    if rng.random() < 0.5:
        return f"Which is bigger, {_a(a)} or {_a(b)}?", "", f"{_a(large).capitalize()} is bigger than {_a(small)}."
    return f"Which is smaller, {_a(a)} or {_a(b)}?", "", f"{_a(small).capitalize()} is smaller than {_a(large)}."


def _count(rng: np.random.Generator) -> Row:
    (kind,) = _pick(rng, _KINDS)
    words = _pick(rng, _KINDS[kind], int(rng.integers(2, 7)))
    return "How many words are in this list?", ", ".join(words), f"There are {len(words)} words in the list."


def _sort(rng: np.random.Generator) -> Row:
    (kind,) = _pick(rng, _KINDS)
    words = _pick(rng, _KINDS[kind], 3)
    asked = _one(rng, "Sort these words by the alphabet.", "Put these words in alphabetical order.")
    return asked, ", ".join(words), ", ".join(sorted(words)) + "."


def _polite(rng: np.random.Generator) -> Row:
    (request,), (name,) = _pick(rng, _REQUESTS), _pick(rng, _NAMES)
    asked = _one(
        rng, "Make this request polite.", "Say this in a friendlier way.", "Rewrite this as a polite question."
    )
    return asked, f"{name}, {request}!", f"{name}, could you please {request}?"


def _who(rng: np.random.Generator) -> Row:
    (a, b), (place,) = (
        _pick(rng, _NAMES, 2),
        _pick(rng, ("the market", "the park", "the library", "the station", "the lake")),
    )
    (day,) = _pick(rng, _DAYS)
    told = f"On {day}, {a} went to {place} and met {b} there."
    which = int(rng.integers(3))
    asked = (f"Whom did {a} meet?", f"Where did {a} go?", f"On which day did {a} go there?")[which]
    return asked, told, (f"{a} met {b}.", f"{a} went to {place}.", f"{a} went there on {day}.")[which]


def _pack(rng: np.random.Generator) -> Row:
    (where,), (name,) = _pick(rng, _PACK), _pick(rng, _NAMES)
    first, second, third = _pick(rng, _PACK[where], 3)
    asked = _one(
        rng,
        f"{name} gets ready for {where}. What should {name} take along?",
        f"Name three things that {name} needs for {where}.",
    )
    return asked, "", f"{name} should take {first}, {second} and {third}."


def _greet(rng: np.random.Generator) -> Row:
    (name,) = _pick(rng, _NAMES)
    (when, wish) = _pick(rng, (("morning", "day"), ("afternoon", "afternoon"), ("evening", "evening")))[0]
    return f"Wish {name} a good {when}.", "", f"Good {when}, {name}! I hope you have a lovely {wish}."


TEMPLATES: dict[str, Callable[[np.random.Generator], Row]] = {
    "sum": _sum, "story": _story, "unit": _unit, "calendar": _calendar, "clock": _clock, "opposite": _opposite,
    "past": _past, "kind": _kind, "bigger": _bigger, "count": _count, "sort": _sort, "polite": _polite, "who": _who,
    "pack": _pack, "greet": _greet,
}  # fmt: skip
"""Makers of rows whose answers are right by construction."""

WRITTEN: dict[str, tuple[str, ...]] = {
    "tip": (
        "Give me one tip about {}.",
        "Do you have some advice about {}?",
        "What is a good idea when it comes to {}?",
    ),
    "like": ("Why do people like {}?", "What is nice about {}?", "Tell me what people enjoy about {}."),
    "two": ("Write two sentences about {}.", "Say something about {}.", "Tell me a little about {}."),
    "feel": ("How could somebody feel about {}?", "Which feelings go with {}?", "What mood does {} bring?"),
}
"""Questions for the language model by kind; one answer serves all phrasings of its kind."""


def _read_answer(text: str) -> str:
    text = sentences(clean(text.split("\n\n")[0]), 50)
    if not text.endswith((".", "!", "?")):
        raise Unusable("unfinished", text[-40:])
    if re.search(r"[:\"“”]|\b\d+\.", text):
        raise Unusable("form", text[:40])  # a list, or somebody's words
    return check(text, 5, 60)


def written(writer: Writer, num: int, seed: int = 0, tries: int = 2) -> Iterator[tuple[Row, Json]]:
    """Rows by a language model with their meta: up to `num` answers, each with all phrasings of its question."""
    asked = [(kind, topic) for kind in WRITTEN for topic in META_TOPICS]
    order = [asked[int(i)] for i in rng_of(seed, "written").permutation(len(asked))][:num]
    for start in range(0, len(order), writer.batch_size):
        batch = order[start : start + writer.batch_size]
        prompts = [
            f"{WRITTEN[kind][0].format(topic)} Answer in one or two short, plain sentences." for kind, topic in batch
        ]
        seeds = [seed_of(seed, "written", kind, topic) for kind, topic in batch]
        requests = [Request((("user", prompt),), s, 64) for prompt, s in zip(prompts, seeds, strict=True)]
        answers = ask_all(writer, requests, lambda _, text: _read_answer(text), tries)
        for (kind, topic), answer in zip(batch, answers, strict=True):
            if answer.value is not None:
                meta = {"made_by": "language-model", "kind": kind, "seed": answer.seed, "writer": writer.identity()}
                for phrase in WRITTEN[kind]:
                    yield (phrase.format(topic), "", answer.value), meta


def templated(seed: int = 0) -> Iterator[tuple[Row, Json]]:
    """Rows of templates with their meta, in turns, without end; they repeat when a template has no more."""
    index = 0
    while True:
        for kind, make in TEMPLATES.items():
            yield make(rng_of(seed, kind, index)), {"made_by": "template", "kind": kind}
        index += 1


def instructions(num: int, seed: int = 0, writer: Writer | None = None, num_written: int = 0) -> list[Json]:
    """Distinct rows in a random order: `{"instruction", "input", "output", "meta"}`.

    Args:
        num: of rows.
        seed: of everything.
        writer: language model.
        num_written: answers to ask of it; each gives up to three rows, which are taken first.

    Raises:
        AnyglotError: more rows than there are, or fewer than none.
    """
    if min(num, num_written) < 0:
        raise AnyglotError(f"num is {num} and num_written {num_written}; both must be 0 or more")
    rows: dict[tuple[str, str], Json] = {}
    sources = [*([written(writer, num_written, seed)] if writer and num_written else []), templated(seed)]
    for source in sources:
        repeated = 0
        for (instruction, given, output), meta in source:
            if len(rows) == num or repeated > 10_000:
                break
            row = {"instruction": instruction, "input": given, "output": output, "meta": meta}
            new = rows.setdefault((instruction, given), row) is row
            repeated = 0 if new else repeated + 1
    if len(rows) < num:
        raise AnyglotError(f"there are {len(rows)} different instructions, {num} were asked for; ask for fewer")
    kept = list(rows.values())
    return [kept[int(i)] for i in rng_of(seed, "order").permutation(num)]


def write(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSONL."""
    with atomic_write(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser("text_instructions", description="Text instructions in Alpaca's format.")
    parser.add_argument("--out", required=True, help="JSONL file; answers of the model are kept beside it")
    parser.add_argument("--num", type=int, default=5000, help="rows")
    parser.add_argument("--written", type=int, default=0, help="answers by the language model, about three rows each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="transformers", help="transformers or openai")
    parser.add_argument("--model", default="smollm2", help="folder or name")
    parser.add_argument("--url", help="of an OpenAI-compatible server, with /v1")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    try:
        if min(given.num, given.written) < 0:
            raise AnyglotError(f"--num is {given.num} and --written {given.written}; give 0 or more")
        if out.is_dir() or not out.parent.is_dir():
            raise AnyglotError(f"--out {out}: is a folder, or in one that is not there; give a file in a folder")
        writer = None
        if given.written:
            config = {"engine": given.engine, "model": given.model, **({"base_url": given.url} if given.url else {})}
            writer = CachedWriter(build_writer(config), out.with_name(f"{out.name}.answers"))
        rows = instructions(given.num, given.seed, writer, given.written)
    except AnyglotError as error:
        print(f"text_instructions: {error}", file=sys.stderr)
        return 2
    write(out, rows)
    by_model = sum(row["meta"]["made_by"] != "template" for row in rows)
    print(json.dumps({"rows": len(rows), "by_model": by_model, "by_template": len(rows) - by_model}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
