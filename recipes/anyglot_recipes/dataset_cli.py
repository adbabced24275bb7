"""`anyglot dataset`: check, count, describe, show and export a finished dataset of dialogues. `anyglot synth view DIR`
and its like are the same.

Parses arguments and prints; the work is in `anyglot_synth.validate`, `report`, `card`, `view` and `export`.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

ACTIONS = ("validate", "report", "card", "view", "export")


def add_parser(commands: Any) -> None:
    """Add the command and its actions to the main parser."""
    parser = commands.add_parser("dataset", help="check, count, describe, show and export a dataset of dialogues")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = actions.add_parser(name, help=help)
        one.add_argument("folder", help="a dataset folder, such as anyglot synth writes")
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.set_defaults(run=run)
        return one

    action("validate", _validate, "every line, id and file against its record; exits with 2 if something is wrong")
    action("report", _report, "write report.json: counts, hours, histograms")
    action("card", _card, "write README.md, the dataset card")
    view = action("view", _view, "write view/index.html, pages to look and listen through")
    view.add_argument("--num", type=int, metavar="N", help="items at most (default: all)")
    view.add_argument("--per_page", type=int, default=50, metavar="N")
    export = action("export", _export, "write the samples as others read them")
    export.add_argument("--to", required=True, metavar="FORM", help="webdataset, audiofolder, imagefolder or parquet")
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--allow_licences",
        nargs="+",
        default=[],
        metavar="NAME",
        help="that are not open, or 'any' for whatever they are",
    )
    export.add_argument("--modality", choices=["speech", "music"], help="of audiofolder (default speech)")
    export.add_argument("--max_samples", type=int, metavar="N", help="of a tar (default 1000)")


def _print(arguments: argparse.Namespace, found: dict[str, Any], *lines: str) -> None:
    print(json.dumps(found) if arguments.json else "\n".join(lines))


def _validate(arguments: argparse.Namespace) -> int:
    from anyglot_synth.validate import validate

    report = validate(arguments.folder)
    _print(arguments, report.to_dict(), *report.lines())
    return report.exit_code


def _report(arguments: argparse.Namespace) -> int:
    from anyglot_synth.report import REPORT, write_report

    report = write_report(arguments.folder)
    counts = ", ".join(f"{count} {status}" for status, count in report["counts"].items())
    _print(arguments, report, f"{arguments.folder}/{REPORT}: {counts}")
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from anyglot_synth.card import write_card

    path = str(write_card(arguments.folder))
    _print(arguments, {"card": path}, path)
    return 0


def _view(arguments: argparse.Namespace) -> int:
    from anyglot_synth.view import write_view

    path = str(write_view(arguments.folder, arguments.num, arguments.per_page))
    _print(arguments, {"page": path}, f"open {path}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from anyglot_synth.export import export

    given = {key: getattr(arguments, key) for key in ("modality", "max_samples") if getattr(arguments, key) is not None}
    done = export(arguments.folder, arguments.to, arguments.out, allow_licences=arguments.allow_licences, **given)
    found = {"out": str(done.out), "to": done.to, "rows": done.rows, "files": done.files, "bytes": done.bytes}
    print(f"{done.out}: {done.rows} rows in {done.files} files", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found))
    return 0
