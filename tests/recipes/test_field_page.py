"""The pages of the field trial: figures as they were measured, and the first answers of each digit, wrong ones too."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anyglot_lm.unified import Output
from anyglot_recipes.field import FieldDataConfig
from anyglot_recipes.field_eval import DRAWING, NAMER, NAMING, SPEAKING, Shown
from anyglot_recipes.field_page import markdown, players, sheet
from anyglot_tokenizers import read_audio


def drawing(digit: int, level: float, read: int | None = None) -> Shown:
    picture = Output("image", media=torch.full((3, 4, 4), level))
    return Shown(DRAWING, "ann says it", digit, [Output("text", text="four"), picture], {"judge of photos": read})


def test_the_page_says_score_interval_limit_and_mistakes() -> None:
    row = {
        "task": "speech->word",
        "n": 10,
        "score": 0.9,
        "interval": [0.7, 1.0],
        "chance": 0.1,
        "limit": None,
        "how": "x",
    }
    report = {"rows": [row, {**row, "limit": 0.95}], "misheard": [["four", "two", 3]]}
    page = markdown(report, FieldDataConfig(), "field_signs.png", "field/index.html", 7)
    assert "| speech->word | 10 | 0.90 (0.70 to 1.00) | 0.10 |  | x |" in page and "| 0.95 | x |" in page
    assert "four as two (3)" in page and "(field_signs.png)" in page and "`jackson`" in page and "`lucas`" in page
    assert "(field/index.html)" in page and "7 clips" in page and "timbres clarinet and strings" in page
    assert "4.0 for image" in page
    assert "Drawn by" not in markdown(report, FieldDataConfig())
    assert "SmolLM2" not in page
    named = {"rows": [row, {**row, "task": NAMING + NAMER}], "misheard": []}
    assert "SmolLM2-135M-Instruct says" in markdown(named, FieldDataConfig())


def test_drawings_stand_in_rows_by_digit() -> None:
    shown = [drawing(d, 0.01 * (10 * d + i)) for i in range(3) for d in reversed(range(10)) if (d, i) != (7, 1)]
    joined = sheet(shown, columns=2)
    assert joined.shape == (3, 40, 8)
    for digit in range(10):
        second = 0.72 if digit == 7 else 0.1 * digit + 0.01  # of the seven there are the first and the third
        assert joined[0, 4 * digit, 0] == pytest.approx(0.1 * digit)
        assert joined[0, 4 * digit + 3, 7] == pytest.approx(second)
    assert sheet([drawing(d, 0.0) for d in range(10)], columns=2)[0, 0].tolist() == [0.0] * 4 + [1.0] * 4


def test_answers_play_and_wrong_ones_are_shown(tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(spec=SimpleNamespace(sample_rate=16000))
    model: Any = SimpleNamespace(tokenizers={"speech": tokenizer})
    tone = torch.sin(torch.arange(8000) * 0.2)[None] * 0.5
    said = Output("speech", media=tone)
    shown = [drawing(4, 0.5, read=4), drawing(4, 0.5, read=None), drawing(4, 0.5, read=4)]
    shown += [Shown(SPEAKING, "say <two>", 2, [said], {"pocketsphinx": 2, "judge of digits": 3})]
    players(tmp_path / "page" / "index.html", model, shown)
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("class='sample'") == 3  # two drawings of three, one answer that is spoken
    assert "say &lt;two&gt;" in page and "pocketsphinx: two" in page and "judge of digits: three" in page
    assert "judge of photos: nothing" in page
    assert re.findall(r"class='(good|part|bad)'", page) == ["good", "bad", "part"]
    files = set(re.findall(r"src='([^']+)'", page))
    assert files == {str(p.relative_to(tmp_path / "page")) for p in (tmp_path / "page" / "media").iterdir()}
    (sound,) = (f for f in files if f.endswith(".mp3"))
    assert read_audio(tmp_path / "page" / sound, sample_rate=16000).abs().max() > 0.4
