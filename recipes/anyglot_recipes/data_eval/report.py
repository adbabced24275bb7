"""An evaluation on data as Markdown, and as a folder: `report.json`, `report.md`, and all media that were written.

Numbers come from `run.py`; this file only shows them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anyglot_recipes.data_eval.evidence import Evidence
from anyglot_recipes.data_eval.items import TEXT
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.media import write_audio, write_image

SHOWN = 8
"""Examples in the Markdown."""


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# {report['task']} on {Path(report['source']).name}",
        "",
        f"Model {report['model']}, {len(report['items'])} items, seed {report['settings']['seed']}.",
        "",
        "| metric | n | value | 95 % interval | chance | ceiling | better | what |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        between = "" if row["low"] is None else f"{_number(row['low'])} to {_number(row['high'])}"
        n = f"{row['n']}" + (f" ({row['missing']} missing)" if row["missing"] else "")
        cells = [row["metric"], n, _number(row["value"]), between, _number(row["chance"]), _number(row["ceiling"])]
        lines.append(f"| {' | '.join([*cells, row['better'], row['note']])} |")
    if report["left_out"]["rows"]:
        lines += ["", f"{report['left_out']['rows']} rows or media were left out:", ""]
        lines += [f"- {number} x {_plain(reason)}" for reason, number in report["left_out"]["reasons"].items()]
    lines += ["", "## Examples", ""]
    for item in report["items"][:SHOWN]:
        lines.append(f"- **{_plain(item['item'])}**: {_content(item['given'], item.get('files', {}))}")
        file = item.get("files", {}).get("output")
        none = "not kept, name a folder with --out" if item["answered"] else f"none: {item.get('why', 'not asked for')}"
        lines.append(f"  - output: {_file(file) if file else _plain(item['output'] or none)}")
        if item.get("heard") is not None:
            lines.append(f"  - heard: {_plain(item['heard'])}")
        if item["references"]:
            lines.append(f"  - right: {'; '.join(map(_plain, item['references'][:5]))}")
        scores = [f"{name} {_number(value)}" for name, value in item["scores"].items() if value is not None]
        lines.append(f"  - {', '.join(scores) or 'no score'}")
    return "\n".join([*lines, ""])


def write_folder(report: dict[str, Any], evidence: Evidence, out: str | Path) -> None:
    """Write `report.json`, `report.md`, and every medium that the model wrote as `media/NUMBER-MODALITY`.

    Items of the report get `files`: what was written, and for the first ones what was given (as the model's tokenizer
    keeps it), below `out`.
    """
    folder = Path(out)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    if evidence.task.asked != TEXT:
        _write(report, evidence, folder, evidence.task.asked, "output", range(len(evidence.items)))
    for modality in evidence.task.given:
        if modality != TEXT:
            _write(report, evidence, folder, modality, "given", range(min(SHOWN, len(evidence.items))))
    for name, content in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", markdown(report))):
        with atomic_write(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def _write(
    report: dict[str, Any], evidence: Evidence, folder: Path, modality: str, role: str, which: Sequence[int]
) -> None:
    rate = evidence.rate(modality)
    numbers = iter([i for i in which if role == "given" or evidence.outputs[i] is not None])

    def write(media: list[Tensor]) -> list[None]:
        for medium in media:
            i = next(numbers)
            name = f"media/{i:05d}-{role}-{modality}.{'png' if rate is None else 'wav'}"
            write_image(folder / name, medium) if rate is None else write_audio(folder / name, medium, rate)
            key = role if role == "output" else modality
            report["items"][i].setdefault("files", {})[key] = name
        return [None] * len(media)

    evidence.each(modality, "output" if role == "output" else "rebuilt", write, which=which)


def _content(given: dict[str, str], files: dict[str, str]) -> str:
    return ", ".join(
        f"{modality} {_file(files[modality]) if modality in files else _plain(value)}"
        for modality, value in given.items()
    )


def _file(name: str) -> str:
    """A picture, or a link to a sound, that `write_folder` wrote."""
    return f"![{name}]({name})" if name.endswith(".png") else f"[{Path(name).name}]({name})"


def _plain(text: str) -> str:
    """A text of anybody's inside Markdown, in one line."""
    text = " ".join(text.split())[:300]
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~" else c for c in text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
