"""The shipped model: whatever it samples decodes, its manifest fits its tokenizers, and the demo tells the truth.

`ANYGLOT_SEQUENCES=10000 pytest tests/integration/test_shipped_model.py` runs the long version of the first test.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.demo import demo
from anyglot_recipes.shipped import NANO
from anyglot_recipes.tasks import PAIRS, TASKS

MODALITIES = ("text", "image", "speech", "music")
WORDS = [
    "large",
    "small",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "cross",
    "top",
    "left",
    "center",
    "draw",
    "say",
    "play",
    "what",
]


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return UnifiedModel.from_pretrained(NANO)


def random_request(rng: np.random.Generator, model: UnifiedModel) -> Request:
    """An exact order of one to three modalities, or a free answer with required and forbidden ones; a tight budget."""
    if rng.random() < 0.6:
        order = tuple(str(m) for m in rng.permutation(MODALITIES)[: rng.integers(1, 4)])
        request = Request(order=order)
    else:
        required = {str(m) for m in rng.permutation(MODALITIES)[: rng.integers(0, 3)]}
        forbidden = {m for m in MODALITIES if m not in required and rng.random() < 0.4}
        if len(forbidden) == len(MODALITIES):
            forbidden.pop()
        request = Request(required=required, forbidden=forbidden)
    return replace(request, max_ids=model.grammar.shortest(request) + int(rng.integers(0, 150)))


@pytest.mark.slow
def test_every_sampled_sequence_decodes(model: UnifiedModel) -> None:
    count = int(os.environ.get("ANYGLOT_SEQUENCES", "256"))
    rng = np.random.default_rng(0)
    hot = dict.fromkeys(MODALITIES, Sampling(temperature=2.0))
    done = 0
    while done < count:
        batch = min(512, count - done)
        requests = [random_request(rng, model) for _ in range(batch)]
        prompts = [Sample([Segment("text", " ".join(rng.choice(WORDS, 4)), "user")]) for _ in range(batch)]
        for request, outputs in zip(
            requests, model.respond(prompts, requests, sampling=hot, seed=done, batch_size=batch), strict=True
        ):
            named = [output.modality for output in outputs]
            if request.order is not None:
                assert tuple(named) == request.order
            assert set(request.required) <= set(named)
            assert not set(request.forbidden) & set(named)
            for output in outputs:
                if output.modality == "text":
                    assert isinstance(output.text, str)
                else:
                    media = output.media
                    assert isinstance(media, torch.Tensor)
                    assert media.numel() > 0 and bool(torch.isfinite(media).all())
        done += batch


@pytest.mark.slow
def test_demo_reports_what_the_page_shows(tmp_path: Path) -> None:
    report = demo(NANO, tmp_path, num=8, shown=1)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    rows = {row["task"]: row for row in report["rows"]}
    assert set(rows) == set(TASKS)
    assert report["mean"] == pytest.approx(np.mean([rows[task]["score"] for task in PAIRS]), abs=1e-3)
    page = (tmp_path / "index.html").read_text()
    assert page.index("Speak: see") < page.index("Draw: hear") < page.index("<table")
    assert page.count("id='speech-to-image-and-speech'") == page.count("id='image-to-music'") == 1
    for task in PAIRS:
        assert task.replace(">", "&gt;") in page
    sources = [part.split("'")[0] for part in page.split("src='")[1:]]
    assert sources
    for source in sources:
        assert (tmp_path / source).stat().st_size > 0
