"""`curves.png`: the whole training run in one picture, from the metrics.csv files of its log.

A resumed run has several of them (version_0, version_1, ...): from the first step of a later file on, it is the later
one that counts. Panels without data are left out. It computes nothing and knows no trainer; needs matplotlib.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write

Series = dict[str, list[tuple[int, float]]]


class Panel(NamedTuple):
    """One plot: metrics drawn as lines, and those drawn as dotted lines of the same colour by the same name."""

    title: str
    lines: tuple[str, ...]
    dotted: str = ""
    log: bool = False
    low: float | None = None


PANELS = (
    Panel("loss (dotted: uniform baseline)", ("loss", "loss/"), "uniform/"),
    Panel("accuracy", ("accuracy/",), low=0.0),
    Panel("codes in use, as perplexity (dotted: of the data)", ("perplexity/",), "target_perplexity/", log=True),
    Panel("validation", ("val/",)),
    Panel("preference (dotted: held out)", ("preference/",), "val/preference/"),
    Panel("ids per second", ("ids_per_s", "useful_ids_per_s"), low=0.0),
    Panel("share: MFU, padding", ("mfu", "padding"), low=0.0),
    Panel("norms", ("grad_norm", "output_norm"), log=True),
    Panel("learning rate", ("lr",), low=0.0),
    Panel("mixture", ("mixture/",), low=0.0),
)
"""A name that ends in "/" stands for all metrics that begin with it."""


def read_series(metrics_csv: str | Path | Sequence[str | Path]) -> Series:
    """Metrics by name as (step, value) in the order of steps, of one log or of those of a resumed run, oldest first.

    A last line without its end, which a kill may leave, and rows without a step are left out.

    Raises:
        ManifestError: a file is missing or has no column `step`, or a value is no number.
    """
    files = [metrics_csv] if isinstance(metrics_csv, (str, Path)) else list(metrics_csv)
    merged: dict[str, dict[int, float]] = {}
    for file in files:
        found = _read(Path(file))
        first = min((step for values in found.values() for step in values), default=math.inf)
        for values in merged.values():
            for step in [step for step in values if step >= first]:
                del values[step]
        for name, new in found.items():
            merged.setdefault(name, {}).update(new)
    return {name: sorted(values.items()) for name, values in merged.items() if values}


def _read(file: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    try:
        content = file.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1]))
        if "step" not in (reader.fieldnames or ()):
            raise ManifestError(f"{file}: has no column `step`; give the metrics.csv of a training run")
        for row in reader:
            for name, text in row.items():
                if name not in ("step", "epoch", None) and text and row["step"]:
                    found.setdefault(name, {})[int(float(row["step"]))] = float(text)
    except OSError as error:
        raise ManifestError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, csv.Error) as error:
        raise ManifestError(f"{file}: line {reader.line_num}: {error}; give the log as it was written") from error
    return found


def draw_curves(metrics_csv: str | Path | Sequence[str | Path], png: str | Path) -> None:
    """Draw the log of a run, or those of a resumed run (oldest first), as one PNG; the file is whole or not there.

    Raises:
        ManifestError: see `read_series`; or there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_series(metrics_csv)
    panels = [(panel, names) for panel in PANELS if (names := _names(panel, series))]
    if not panels:
        raise ManifestError(f"{metrics_csv}: holds no metric that is drawn; log loss, accuracy/... or lr")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (panel, names) in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, names, series)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    target = Path(png)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png")


def _names(panel: Panel, series: Series) -> list[str]:
    """The metrics of a panel that exist, and are no dotted lines of another panel."""
    wanted = [*panel.lines, panel.dotted] if panel.dotted else [*panel.lines]
    found = [n for want in wanted for n in series if n == want or (want.endswith("/") and n.startswith(want))]
    others = tuple(p.dotted for p in PANELS if p.dotted and p is not panel)
    return [n for n in found if not n.startswith(others)]


def _draw(axes: Any, panel: Panel, names: list[str], series: Series) -> None:
    labels = dict.fromkeys(_label(panel, name) for name in names if name != "loss")  # which is black
    many = len(labels) > 10  # the palette has ten colours
    colours = {label: f"C{i}" if not many else _rainbow(i / len(labels)) for i, label in enumerate(labels)}
    shown = set()
    for name in names:
        label = _label(panel, name)
        dotted = bool(panel.dotted) and name.startswith(panel.dotted)
        points = [(step, value) for step, value in series[name] if math.isfinite(value)]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if dotted and len(steps) == 1:
            axes.axhline(values[0], color=colours[label], linestyle=":", linewidth=1)
            continue
        axes.plot(
            steps,
            values,
            color=colours.get(label, "black"),
            linestyle=":" if dotted else "-",
            linewidth=1 if dotted else 1.5,
            marker="." if len(points) < 3 and not dotted else None,
            label=None if label in shown else label,
        )
        shown.add(label)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if panel.log:
        axes.set_yscale("log")
    elif panel.low is not None:
        axes.set_ylim(bottom=panel.low)
    axes.legend(fontsize=7, ncols=1 + len(labels) // 8)


def _label(panel: Panel, name: str) -> str:
    """A metric's name without the prefix that all lines of its kind have."""
    if panel.dotted and name.startswith(panel.dotted):
        return name.removeprefix(panel.dotted)
    return name.partition("/")[2] or name


def _rainbow(share: float) -> tuple[float, float, float]:
    from colorsys import hsv_to_rgb

    return hsv_to_rgb(share, 0.85, 0.8)
