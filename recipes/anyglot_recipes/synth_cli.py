"""`anyglot synth`: a recipe and a folder to a dataset of dialogues with voices, pictures and music.

    anyglot synth RECIPE --out DIR [--num N] [--key value ...]
    anyglot synth nanoworld --out DIR           records of the small world, without a recipe

Finds the recipe, applies changes from the command line, shows progress; the work is in `anyglot_synth.run`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyglot_tokenizers.errors import ManifestError

RECIPES = Path(__file__).parent / "synth"
RECORDS = "nanoworld"
TRIED = 20
"""Items that a dry run makes, at least."""


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "synth",
        help="make data: dialogues with voices, pictures and music from a recipe, or records of nanoworld",
        description="Goes on where an earlier run in the same folder was. --KEY VALUE changes a setting of the recipe: "
        "--source.data x.jsonl, --stages.1.max_error 0.2 (stages count from 0).",
        epilog=f"recipes: {RECORDS} (records), {', '.join(names())}, or a path of a YAML file",
    )
    add = parser.add_argument
    add("recipe", help="name or path of a recipe")
    add("--out", metavar="DIR", help="folder of the dataset")
    add("--num", type=int, metavar="N", help="rows of the source (records of nanoworld: default 100)")
    add("--seed", type=int, metavar="N", help="default: that of the recipe, or 0")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: cores; 1 for a GPU)",
    )
    add("--split", choices=["train", "test"], help="of nanoworld's records (default train)")
    add("--on", choices=["processes", "ray"], default="processes", help="this machine, or a Ray cluster")
    add("--timeout", type=float, metavar="S", help="seconds an item may take (default 300)")
    add("--start-timeout", type=float, metavar="S", help="seconds that loading models may take (default 600)")
    add("--attempts", type=int, metavar="N", help="tries of what hangs or crashes (default 3)")
    add("--retry", action="store_true", help="of a finished run, do again what failed so")
    add("--dry-run", action="store_true", help=f"make {TRIED} items or more, say what all would cost, keep none")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_synth)


def names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises `ManifestError`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name not in names():
        raise ManifestError(f"there is no recipe {name!r}; use {RECORDS}, {', '.join(names())}, or a YAML file")
    return RECIPES / f"{name}.yaml"


def _synth(arguments: argparse.Namespace) -> int:
    for name in ("num", "workers", "attempts"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ManifestError(f"--{name} is {value}; give 1 or more")
    for name in ("timeout", "start_timeout"):
        if (seconds := getattr(arguments, name)) is not None and not (math.isfinite(seconds) and seconds > 0):
            raise ManifestError(f"--{name.replace('_', '-')} is {seconds}; give seconds, more than 0")
    if arguments.out is None and not arguments.dry_run:
        raise ManifestError("where to? give --out DIR")
    if arguments.recipe == RECORDS:
        return _records(arguments)
    from anyglot_synth.recipe import build, read_settings
    from anyglot_synth.run import dry_run, run

    if arguments.split is not None:
        raise ManifestError(f"--split is of the records of {RECORDS}; a recipe has its own settings")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path = recipe_path(arguments.recipe)
    changes = _changes(arguments.rest)
    changes |= {key: getattr(arguments, key) for key in ("num", "seed") if getattr(arguments, key) is not None}
    recipe = build(read_settings(path, changes), str(path))
    options: dict[str, Any] = {
        "name": recipe.name,
        "num": recipe.num,
        "workers": arguments.workers,
        "on": arguments.on,
    }
    given = {key: getattr(arguments, key) for key in ("timeout", "start_timeout", "attempts")}
    options |= {key: value for key, value in given.items() if value is not None}
    if arguments.dry_run:
        estimate = dry_run(recipe.source, recipe.stages, tries=TRIED, **options).to_dict()
        print(
            json.dumps(estimate) if arguments.json else "\n".join(f"{key}: {value}" for key, value in estimate.items())
        )
        return 0
    shown = Progress()
    done = run(
        recipe.source,
        recipe.stages,
        arguments.out,
        **options,
        retry=arguments.retry,
        progress=shown,
    )
    shown.end()
    if arguments.json:
        print(json.dumps(done.to_dict()))
    print(
        f"{arguments.out}: {done.ok} samples, {done.filtered} rejected, {done.failed} failed "
        f"({done.earlier} of them were there before)",
        file=sys.stderr,
    )
    return 0


def _records(arguments: argparse.Namespace) -> int:
    """Records of nanoworld: one scene each as text, picture, speech and music."""
    from anyglot_synth.nanoworld.records import make

    others = (arguments.timeout, arguments.start_timeout, arguments.attempts) != (None, None, None)
    if arguments.rest or arguments.dry_run or arguments.retry or arguments.on != "processes" or others:
        allowed = "--out, --num, --split, --seed, --workers and --json"
        raise ManifestError(f"records of {RECORDS} have no recipe; give {allowed} only")
    num = 100 if arguments.num is None else arguments.num
    made = make(arguments.out, arguments.split or "train", num, arguments.seed or 0, workers=arguments.workers)
    if arguments.json:
        print(json.dumps({"out": arguments.out, "records": num, "earlier": num - made}))
    print(f"{num} records in {arguments.out}/records.jsonl", file=sys.stderr)
    return 0


def _changes(words: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` pairs; values are YAML."""
    import yaml

    changes: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or not (equals or rest):
            raise ManifestError(f"{word!r} is no change of a setting; write --key value")
        value = value if equals else rest.pop(0)
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ManifestError(f"--{name}: {value!r} is not YAML ({error})") from None
    return changes


class Progress:
    """One line on a terminal, or a line now and then elsewhere: counts, rate, time left."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.began = time.monotonic()
        self.next = 0.0
        self.made = 0

    def __call__(self, counts: Mapping[str, int], _: int, wanted: int | None) -> None:
        self.made += 1
        now = time.monotonic()
        done = sum(counts.values())
        if now < self.next and done != wanted:
            return
        self.next = now + (0.2 if self.live else 30.0)
        rate = self.made / max(now - self.began, 1e-9)
        words = f"{done}{'' if wanted is None else f'/{wanted}'} items, {rate:.1f}/s"
        words += f", {counts.get('filtered', 0)} rejected, {counts.get('failed', 0)} failed"
        if wanted is not None and rate > 0:
            left = int((wanted - done) / rate)
            words += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        print(f"\r{words:<100}" if self.live else words, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the line."""
        if self.live:
            print(file=sys.stderr)
