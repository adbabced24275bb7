"""Reports of the nanoworld benchmark for readers: tables as text, Markdown and HTML, and comparisons of reports.

Rows come from `benchmark.py` or `evaluate.py`. Nothing here asks a model anything.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_recipes.evaluate import GROUPS
from anyglot_recipes.tasks import PAIRS
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.metrics import interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows of cells as they are shown."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def _number(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.3f}" if row.get(name) is not None else ""


def _change(row: Row) -> str:
    if "change" not in row:
        return ""
    mark = " *" if row["change_low"] > 0 or row["change_high"] < 0 else ""
    return f"{row['change']:+.3f} ({row['change_low']:+.3f} to {row['change_high']:+.3f}){mark}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "task": lambda row: row["task"],
    "condition": lambda row: row.get("condition", "") + (f" skipped: {row['skipped']}" if "skipped" in row else ""),
    "n": lambda row: str(row.get("n", "")),
    "score": _number("score"),
    "95 % interval": lambda row: f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else "",
    "chance": _number("chance"),
    "ceiling": _number("ceiling"),
    "corrected": _number("corrected"),
    "accuracy": _number("accuracy"),
    "yes": _number("yes"),
    "described": _number("described"),
    "missing": _number("missing"),
    "unreadable": _number("unreadable"),
    "change (* is significant)": _change,
    "against": lambda row: row.get("against", ""),
}


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each group of the directions and for each other section."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: GROUPS.index(row["group"]) if "group" in row else len(GROUPS)):
        section = row.get("section", "directions")
        title = row["group"] if section == "directions" else section
        title += f" ({row['measure']}, less is better)" if "measure" in row else ""
        found.setdefault(title, []).append(row)
    return [_pivot(title, part) if title == "attributes" else _table(title, part) for title, part in found.items()]


def _table(title: str, rows: list[Row]) -> Table:
    cells = {name: [show(row) for row in rows] for name, show in COLUMNS.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    return Table(title, list(shown), [list(row) for row in zip(*shown.values(), strict=True)])


def _pivot(title: str, rows: list[Row]) -> Table:
    """A line for each task, a column for each condition: score and, in brackets, chance."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row["task"], {})[row["condition"]] = f"{row['score']:.3f} ({row['chance']:.3f})"
    title += ": share right (chance)"
    return Table(title, ["task", *conditions], [[t, *(line[c] for c in conditions)] for t, line in lines.items()])


def as_text(shown: Sequence[Table]) -> str:
    """For a terminal."""
    parts = []
    for table in shown:
        lines = [table.columns, *table.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append(f"{table.title}\n")
        parts += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
        ]
        parts.append("\n")
    return "".join(parts)


def as_markdown(shown: Sequence[Table]) -> str:
    """For a file."""
    parts = []
    for table in shown:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts.append(f"## {table.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n")
    return "".join(parts)


def anchor(title: str) -> str:
    """The id of a part of a page, fit for names of files."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace("->", "-to-").replace("+", "-and-")).strip("-")


def as_html(shown: Sequence[Table], titles: Collection[str] = ()) -> str:
    """For a page. Cells lead to its part of that title, or of the table's title and theirs (and the task's)."""

    def cell(table: Table, line: Sequence[str], content: str) -> str:
        text = html.escape(content)
        known = (content, f"{table.title}: {content}", f"{table.title}: {line[0]}, {content}")
        title = next((title for title in known if title in titles), None)
        return f"<td>{text}</td>" if title is None else f"<td><a href='#{anchor(title)}'>{text}</a></td>"

    parts = []
    for table in shown:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
        body = "".join("<tr>" + "".join(cell(table, line, c) for c in line) + "</tr>" for line in table.rows)
        parts.append(f"<h3>{html.escape(table.title)}</h3><table><tr>{head}</tr>{body}</table>")
    return "".join(parts)


def score_line(row: Row) -> str:
    """One row in words."""
    line = f"score {row['score']:.2f} ({row['low']:.2f} to {row['high']:.2f}) on {row['n']} scenes"
    return line + (f", chance {row['chance']:.2f}" if "chance" in row else "")


def summary(report: dict[str, Any]) -> str:
    """The means of a report, a line each; empty without directions."""
    lines = [f"mean over the 12 pairs: {report['mean']}"] if report["mean"] is not None else []
    return "\n".join([*lines, *(f"mean of {name}: {mean}" for name, mean in report["groups"].items())])


# --- comparing ---


def read_reports(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name -> report, of files, or of every report below one folder, in the order of their paths.

    Raises:
        ManifestError: a file is no report, fewer than two reports, or reports about different scenes.
    """
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    files = sorted(folder.rglob("*.json")) if folder else list(paths)
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            if folder:
                continue
            raise ManifestError(f"{file}: is no JSON ({error}); give what anyglot eval wrote") from error
        if isinstance(content, dict) and content.get("benchmark") == "nanoworld":
            name = file.parent.name if file.stem == "report" else file.stem
            found[name if name not in found else str(file)] = content
        elif not folder:
            raise ManifestError(f"{file}: is no report of anyglot eval nanoworld; make one with --out or --json")
    if len(found) < 2:
        raise ManifestError(f"{', '.join(map(str, paths))}: {len(found)} reports; comparing needs two at least")
    first, *others = found
    for name in others:
        for entry in ("num", "seed", "scenes", "judge"):
            if found[name].get(entry) != found[first].get(entry):
                values = f"{found[first].get(entry)} in {first} and {found[name].get(entry)} in {name}"
                raise ManifestError(
                    f"{entry} is {values}; only reports of the same scenes and judge can be compared: run anyglot eval "
                    "with the same --num, --seed and --judge"
                )
    return found


def compare(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every row side by side, and how all reports but the first differ from the first.

    Scores are compared item by item: the interval is that of the mean of paired differences, and a difference is
    significant where its 95 % interval leaves out 0. Of twenty rows of equal models one is so by luck.

    Returns:
        "reports", names; "rows" with "section", "task", "condition", "scores" (None where a report has no such row)
        and "differences" with "change", "change_low", "change_high", "significant", "better".

    Raises:
        ManifestError: a row has other items in one of the reports.
    """
    tables_of = [{_key(row): row for row in _with_mean(report["rows"])} for report in reports.values()]
    rows = []
    for key in dict.fromkeys(key for table in tables_of for key in table):
        found = [table.get(key) for table in tables_of]
        base, differences = found[0], []
        for name, row in zip(list(reports)[1:], found[1:], strict=True):
            differences.append(None if base is None or row is None else _difference(base, row, name))
        entry = dict(zip(("section", "task", "condition"), key, strict=True))
        rows.append({**entry, "scores": [row and row["score"] for row in found], "differences": differences})
    return {"reports": list(reports), "rows": rows}


def _key(row: Row) -> tuple[str, str, str]:
    return row.get("section", "directions"), row["task"], row.get("condition", "")


def _with_mean(rows: Sequence[Row]) -> list[Row]:
    """The rows that have scores, and before them the mean over the 12 pairs, item by item."""
    scored = [row for row in rows if "scores" in row]
    pairs = [row["scores"] for row in scored if _key(row)[0] == "directions" and row["task"] in PAIRS]
    if len(pairs) < len(PAIRS):
        return scored
    means = np.mean(pairs, axis=0)
    mean = {"section": "directions", "task": "the 12 pairs", "score": round(float(means.mean()), 4)}
    return [{**mean, "scores": means.tolist()}, *scored]


def _difference(base: Row, row: Row, name: str) -> dict[str, Any]:
    if len(base["scores"]) != len(row["scores"]) or base.get("weights") != row.get("weights"):
        raise ManifestError(f"{name}: {' '.join(_key(row))} has other items than the first report; make both anew")
    pairs = zip(row["scores"], base["scores"], strict=True)
    change, low, high = interval([a - b for a, b in pairs], base.get("weights"))
    return {
        "change": round(change, 4),
        "change_low": round(low, 4),
        "change_high": round(high, 4),
        "significant": low > 0 or high < 0,
        "better": (change < 0) if "measure" in row else (change > 0),
    }


def comparison_table(found: dict[str, Any]) -> Table:
    """A comparison, significant differences marked."""
    first, *others = found["reports"]
    columns = ["section", "task", "condition", first]
    for name in others:
        columns += [name, f"{name} - {first}"]
    lines = []
    for row in found["rows"]:
        shown = ["-" if score is None else f"{score:.3f}" for score in row["scores"]]
        line = [row["section"], row["task"], row["condition"], shown[0]]
        for score, difference in zip(shown[1:], row["differences"], strict=True):
            mark = ""
            if difference and difference["significant"]:
                mark = " better" if difference["better"] else " worse"
            line += [score, _change(difference or {}) + mark]
        lines.append(line)
    return Table("* marks a difference whose 95 % interval leaves out 0", columns, lines)
