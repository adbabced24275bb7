"""The picture of a run: what is in the log is drawn, resumed runs are merged, files are whole or not there."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyglot_lm.curves import PANELS, _names, draw_curves, read_series
from anyglot_tokenizers.errors import ManifestError

pytest.importorskip("matplotlib")


def write_log(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As Lightning's CSVLogger does: one column per metric, empty where a row lacks it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def whole_log(steps: range) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in steps:
        row: dict[str, Any] = {"epoch": 0, "step": step, "loss": 5 * math.exp(-step / 50), "lr": 1e-3, "grad_norm": 1.0}
        for i, name in enumerate(["text", "image", "speech/0", "speech/1"]):
            row |= {f"loss/{name}": 6 * math.exp(-step / (40 + 20 * i)), f"uniform/{name}": 6.0 + i}
            row |= {f"accuracy/{name}": step / 200, f"perplexity/{name}": 10.0 + step}
            row |= {f"target_perplexity/{name}": 150.0}
        row |= {"ids_per_s": 1e4, "useful_ids_per_s": 9e3, "mfu": 0.4, "padding": 0.1, "output_norm": 20.0}
        row |= {"mixture/asr": 0.5, "mixture/tts": 0.5}
        rows.append(row)
        if step % 50 == 0:
            rows.append({"step": step, "val/text": 5 - step / 100})
    return rows


def test_every_metric_of_the_log_has_its_panel(tmp_path: Path) -> None:
    series = read_series(write_log(tmp_path / "metrics.csv", whole_log(range(0, 200, 10))))
    drawn = {name for panel in PANELS for name in _names(panel, series)}
    assert drawn == set(series) and {"loss", "uniform/text", "val/text", "mfu", "mixture/asr"} <= drawn


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_picture_of_a_run(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.csv", whole_log(range(0, 200, 10)))
    draw_curves(log, tmp_path / "run" / "curves.png")
    whole = picture(tmp_path / "run" / "curves.png")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curves.png"]
    # Nine panels in three rows: each third of the picture, both ways, has coloured lines in it.
    colour = (whole.max(-1) - whole.min(-1)) > 60
    for part in np.array_split(colour, 3, axis=0):
        assert all(third.sum() > 100 for third in np.array_split(part, 3, axis=1))


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 3.0 - step} for step in range(3)]
    draw_curves(write_log(tmp_path / "one.csv", rows), tmp_path / "one.png")
    draw_curves(write_log(tmp_path / "all.csv", whole_log(range(0, 200, 10))), tmp_path / "all.png")
    one, all_panels = picture(tmp_path / "one.png"), picture(tmp_path / "all.png")
    assert one.shape[1] * 2.5 < all_panels.shape[1] and one.shape[0] * 2.5 < all_panels.shape[0]


def test_resumed_run_is_merged_by_step(tmp_path: Path) -> None:
    first = write_log(tmp_path / "0.csv", [{"step": s, "loss": 1.0, "lr": 0.5} for s in (10, 20, 30, 40)])
    second = write_log(tmp_path / "1.csv", [{"step": s, "loss": 2.0} for s in (30, 50)])
    series = read_series([first, second])
    # 40 was logged after the checkpoint that the second run went on from, so it did not happen.
    assert series["loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (50, 2.0)]
    assert series["lr"] == [(10, 0.5), (20, 0.5)]
    assert read_series(first)["loss"] == [(s, 1.0) for s in (10, 20, 30, 40)]


def test_values_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}]
    draw_curves(write_log(tmp_path / "metrics.csv", rows), tmp_path / "curves.png")
    assert picture(tmp_path / "curves.png").min() < 50


def test_failed_drawing_leaves_the_old_picture(tmp_path: Path) -> None:
    target = tmp_path / "curves.png"
    target.write_bytes(b"old")
    with pytest.raises(ManifestError, match="no metric that is drawn"):
        draw_curves(write_log(tmp_path / "metrics.csv", [{"step": 0, "other": 1.0}]), target)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "said"),
    [("loss\n1\n", "no column `step`"), ("", "no column `step`"), ("step,loss\n1,abc\n", "line 2.*'abc'")],
)
def test_broken_logs(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ManifestError, match=said):
        read_series(tmp_path / "metrics.csv")


@pytest.mark.parametrize("left", ["20,", "20,2.", "20,2.0,1", "\0" * 200_000, "20,2\0"])
def test_a_last_line_that_was_cut_is_left_out(left: str, tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_bytes(b"loss,step,lr\r\n1.0,10,0.5\r\n" + left.encode())
    assert read_series(log) == {"loss": [(10, 1.0)], "lr": [(10, 0.5)]}


def test_rows_without_a_step_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("loss,step\n1.0,10\n2.0\n3.0,\n4.0,20\n")
    assert read_series(log) == {"loss": [(10, 1.0), (20, 4.0)]}


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="none.csv: cannot be read"):
        read_series(tmp_path / "none.csv")
