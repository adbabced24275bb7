"""`anyglot eval nanoworld`: arguments, a table on stdout, and files; the work is in `benchmark.py`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SHOWN, FAILURES = 2, 3
"""Samples of a row on the page: the first ones, and the worst of the others that are not wholly right."""


def add_parser(benchmarks: Any, default_model: str) -> None:
    """Add the command to the parsers of `anyglot eval`."""
    parser = benchmarks.add_parser("nanoworld", help="every direction of nanoworld, graded by programs")
    parser.add_argument("--model", default=default_model, metavar="DIR", help="default: the shipped model")
    parser.add_argument("--num", type=_positive, default=200, help="held-out samples per direction (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sections",
        default="directions",
        metavar="NAMES",
        help="joined by commas: directions (default), checked, composition, hallucination, attributes, speech, "
        "robustness, through, chains, chat, shots, order; or all",
    )
    parser.add_argument(
        "--guidance",
        type=_scales,
        metavar="SCALES",
        help="classifier-free guidance by modality, such as speech=2,image=1.5 (of models with condition dropout)",
    )
    parser.add_argument(
        "--candidates", type=_positive, default=8, help="answers of which section `checked` takes the best (default 8)"
    )
    parser.add_argument(
        "--judge", choices=["own", "sphinx"], default="own", help="who hears speech (sphinx: pocketsphinx, slower)"
    )
    parser.add_argument("--out", metavar="DIR", help="also write report.json, report.md and index.html with samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="REPORT",
        help="run nothing: compare report files, or all reports below a folder",
    )
    parser.set_defaults(run=_eval)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


_positive.__name__ = "number"  # argparse says "invalid number value"


def _scales(value: str) -> dict[str, float]:
    pairs = [pair.partition("=") for pair in value.split(",")]
    scales = {modality.strip(): float(scale) for modality, _, scale in pairs}
    if not all(map(math.isfinite, scales.values())):
        raise ValueError
    return scales


_scales.__name__ = "scales"


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _eval(arguments: argparse.Namespace) -> int:
    return _compare(arguments) if arguments.compare else _run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from anyglot_recipes.benchmark_report import as_text, compare, comparison_table, read_reports
    from anyglot_tokenizers.errors import ManifestError

    if arguments.out:
        raise ManifestError("--compare writes no --out; its table goes to stdout (--json: as one object)")
    found = compare(read_reports([Path(path) for path in arguments.compare]))
    print(json.dumps(found) if arguments.json else as_text([comparison_table(found)]).rstrip())
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.benchmark import read_sections, run
    from anyglot_recipes.benchmark_report import as_text, summary, tables
    from anyglot_recipes.evaluate import Checkers, Graded
    from anyglot_synth.nanoworld.sphinx import SphinxJudge

    logging.disable_progress_bar()  # stderr is for logs and the one line of an error
    sections = read_sections(arguments.sections)
    if arguments.out:
        # before the work, so that a place that cannot be written to shows now
        (Path(arguments.out) / "media").mkdir(parents=True, exist_ok=True)
    model = UnifiedModel.from_pretrained(arguments.model)
    checkers = Checkers(SphinxJudge() if arguments.judge == "sphinx" else None)
    samples: dict[str, list[Graded]] = {}

    def keep(title: str, graded: list[Graded]) -> None:
        failed = sorted((g for g in graded[SHOWN:] if g.score < 1), key=lambda g: g.score)
        samples[title] = [*graded[:SHOWN], *failed[:FAILURES]]

    how: dict[str, Any] = {"num": arguments.num, "seed": arguments.seed, "sections": sections}
    how |= {"guidance": arguments.guidance, "candidates": arguments.candidates}
    report = run(model, **how, checkers=checkers, keep=keep, progress=_log)
    report = {"model": arguments.model, "judge": arguments.judge, **report}
    if arguments.out:
        _write(Path(arguments.out), report, model, samples)
    if arguments.json:
        print(json.dumps(report))
    else:
        print(as_text(tables(report["rows"])) + summary(report))
    return 0


def _write(folder: Path, report: dict[str, Any], model: Any, samples: dict[str, Any]) -> None:
    from anyglot_recipes.benchmark_report import as_html, as_markdown, summary, tables
    from anyglot_recipes.gallery import page, section
    from anyglot_tokenizers.files import atomic_write

    shown = tables(report["rows"])
    title = f"Nanoworld benchmark: {Path(report['model']).resolve().name}"
    line = f"{report['num']} held-out scenes, seed {report['seed']}, speech heard by judge {report['judge']}."
    with atomic_write(folder / "report.json") as path:  # first: nothing below can lose it
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    parts = [
        section(model, folder, name, f"the first {SHOWN}, then the worst of the others", graded)
        for name, graded in samples.items()
    ]
    intro = "<br>".join([line, *summary(report).splitlines()])
    files = {
        "report.md": f"# {title}\n\n{line}\n\n{as_markdown(shown)}{summary(report)}\n",
        "index.html": page(title, intro, as_html(shown, samples), parts),
    }
    for name, content in files.items():
        with atomic_write(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    _log(f"open {folder / 'index.html'}")
