"""The grader of the field trial on a model that learnt nothing: every row is there, and agrees with what is shown."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.grammar import Request
from anyglot_lm.model import new_llama
from anyglot_lm.segments import Sample, Template
from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes import field_eval
from anyglot_recipes.chain import BlockConfig, LMConfig, build_vocabulary
from anyglot_recipes.field import FieldData, FieldDataConfig, read_field_data
from anyglot_recipes.field_eval import ANSWERING, DRAWING, NAMER, NAMING, PLAYING, SPEAKING, Shown, evaluate_field
from anyglot_recipes.field_page import sheet
from anyglot_tokenizers.look import LookVQ

CONFIG = FieldDataConfig()


@pytest.fixture(scope="module")
def data(shared_data: Path) -> FieldData:
    """A tenth of what there is."""
    whole = read_field_data(FieldDataConfig(root=str(shared_data / "real")))
    emoji = [p for p in whole.test_pictures if p.kind == "emoji"][:20]
    whole.clips = whole.clips[::10] + [c for c in whole.clips if c.speaker == CONFIG.reply_speaker][::20]
    whole.test_clips = whole.test_clips[::10]
    whole.pictures = whole.pictures[::10]
    whole.test_pictures = emoji + [p for p in whole.test_pictures if p.kind == "sign"][::10]
    whole.chorales, whole.test_chorales = whole.chorales[::61], whole.test_chorales[::31]
    return whole


def reads_in_one_place(model: UnifiedModel) -> UnifiedModel:
    """A second model, which reads an emoji as one code and makes the same of all: its rows are zero."""
    seen = LookVQ(num_quantizers=1).eval()
    vocabulary = build_vocabulary(
        model.text, {"seen": seen}, LMConfig(blocks={"seen": BlockConfig()}), {"seen": (1, 1)}
    )
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=512)
    torch.nn.init.zeros_(llama.get_input_embeddings().weight)
    return UnifiedModel(llama, vocabulary, Template(), model.text, {"seen": seen})


def by_content(media: Iterable[Any]) -> list[int | None]:
    """A judge that reads a digit or nothing in any medium: the same in the same one."""
    found = [int.from_bytes(hashlib.sha256(np.asarray(m).tobytes()).digest()[:4], "little") % 11 for m in media]
    return [None if digit > 9 else digit for digit in found]


def test_rows_are_what_the_judges_read_in_what_is_shown(
    field_model: UnifiedModel, data: FieldData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for judge in ("train_photo_classifier", "train_digit_listener", "train_key_listener"):
        monkeypatch.setattr(field_eval, judge, lambda *_: by_content)
    monkeypatch.setattr(field_eval, "sphinx_digits", lambda: lambda sound: by_content([sound])[0])
    monkeypatch.setattr(field_eval, "lowest_tone", lambda sound: by_content([sound])[0])
    monkeypatch.setattr(field_eval, "CANDIDATES", 2)
    monkeypatch.setattr(
        field_eval, "PRIOR", 1.0
    )  # so that a caption that is as likely with an emoji as without is a tie
    guided: Counter[str] = Counter()
    model = field_model
    respond = model.respond

    def watched(samples: Sequence[Sample], request: Request, *args: Any, **how: Any) -> list[list[Output]]:
        assert request.order is not None
        if how.get("guidance"):
            guided[request.order[-1]] += len(samples)
        return respond(samples, request, *args, **how)

    monkeypatch.setattr(model, "respond", watched)
    namer = reads_in_one_place(model)
    read: list[tuple[int, ...]] = []
    name = namer.respond

    def named(samples: Sequence[Sample], *args: Any, **how: Any) -> list[list[Output]]:
        read.extend(np.shape(sample.segments[0].content) for sample in samples)
        return name(samples, *args, **how)

    monkeypatch.setattr(namer, "respond", named)
    lines: list[str] = []
    with torch.inference_mode():
        report, shown = evaluate_field(model, data, CONFIG, namer, seed=0, say=lines.append)
    rows = report["rows"]
    names = [row["task"] for row in rows]
    assert len(lines) == len(rows) and all(0 <= row["score"] <= 1 for row in rows)
    assert guided == {"image": 3 * 25, "speech": 3 * 100, "music": 3 * 110}  # an answer, and two to choose from
    by_task = {task: [s for s in shown if s.task == task] for task in (DRAWING, SPEAKING, PLAYING, ANSWERING)}
    assert sum(map(len, by_task.values())) == len(shown)
    for task in (SPEAKING, PLAYING):
        assert Counter(s.digit for s in by_task[task]) == dict.fromkeys(range(10), 10)
    assert [s.digit for s in by_task[DRAWING]] == [c.digit for c in data.test_clips[::2]]
    assert [s.digit for s in by_task[ANSWERING]] == [c.digit for c in data.test_clips[::5]]
    for s in shown:
        assert list(s.read.values()) == by_content([s.outputs[-1].media]) * len(s.read)
        assert [o.modality for o in s.outputs][:-1] == (["text"] if s.task in (DRAWING, ANSWERING) else [])
    for task, judge in ((SPEAKING, "pocketsphinx"), (PLAYING, "lowest tone"), (ANSWERING, "judge of keys")):
        assert names[names.index(f"{task}, {judge}") + 1] == "- best of 2"
        assert rows[names.index(f"{task}, {judge}") + 1]["score"] == pytest.approx(share(by_task[task]), abs=1e-4)
    assert rows[names.index(f"{DRAWING}, best of 2")]["score"] == pytest.approx(share(by_task[DRAWING]), abs=1e-4)
    assert rows[names.index("chorale->word")]["n"] == len({c.name for c in data.test_chorales})
    emoji = {row["task"]: row for row in rows if row["task"].startswith("emoji")}
    assert list(emoji) == [NAMING, "emoji->caption (exact)", NAMING + NAMER, "emoji->caption (exact)" + NAMER]
    assert emoji[NAMING]["n"] == 20 and read == [(1, 1, 1)] * 20
    assert emoji[NAMING + NAMER]["score"] == 0  # all captions are as likely with an emoji as with another
    assert sheet(shown).shape == (3, 640, 256)


def share(shown: list[Shown]) -> float:
    return float(np.mean([next(iter(s.read.values())) == s.digit for s in shown]))
