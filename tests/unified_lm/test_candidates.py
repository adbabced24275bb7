"""The best of several answers is the one that the model itself finds likeliest and reads best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.candidates import best_of, descriptions
from anyglot_lm.engine import GenerationError, Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.parts import Output
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel

NANO = Path(__file__).parents[2] / "recipes" / "anyglot_recipes" / "weights" / "nano"
GREEDY = {m: Sampling(temperature=0.0) for m in ("text", "image", "speech", "music")}
DRAW = Request(order=("image",))
SAID = (
    "a small red circle at the top left",
    "a large blue cross at the middle center and a small green triangle at the bottom left",
)


@pytest.fixture(scope="module")
def nano() -> UnifiedModel:
    return UnifiedModel.from_pretrained(NANO)


def asked() -> list[Sample]:
    return [Sample([Segment("text", text, "user")]) for text in SAID]


def value(model: UnifiedModel, sample: Sample, answer: list[Output], text: str) -> float:
    """log P(answer | prompt) + log P(text | medium of the answer)."""
    codes = answer[-1].codes
    assert codes is not None
    before = [Segment("text", o.text, "assistant") for o in answer[:-1] if o.text is not None]
    medium = (answer[-1].modality, codes.numpy())
    given = Sample([*sample.segments, *before, Segment(*medium, "assistant")])
    read = Sample([Segment(*medium, "user"), Segment("text", text, "assistant")])
    found = log_likelihoods(model, [given, read], mean=False)
    assert None not in found
    return float(np.sum(found))  # type: ignore[arg-type]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[Output]]:
    """Every answer that models give from now on."""
    drawn: list[list[Output]] = []
    real = UnifiedModel.respond

    def respond(self: UnifiedModel, samples: Any, request: Any, *args: Any, **how: Any) -> list[list[Output]]:
        found = real(self, samples, request, *args, **how)
        drawn.extend(found)
        return found

    monkeypatch.setattr(UnifiedModel, "respond", respond)
    return drawn


def test_the_best_of_one_is_the_answer(nano: UnifiedModel) -> None:
    plain = nano.respond(asked(), DRAW, GREEDY)
    for one, answer in zip(best_of(nano, asked(), DRAW, num=1, sampling=GREEDY), plain, strict=True):
        assert torch.equal(one[0].media, answer[0].media)  # type: ignore[arg-type]


def test_none_of_the_drawn_is_better(nano: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = watched(monkeypatch)
    best = best_of(nano, asked(), DRAW, num=5, temperature=1.2, sampling=GREEDY, seed=3)
    assert len(drawn) == 2 + 2 * 4
    by_sample = [[drawn[i], *drawn[2 + 4 * i : 6 + 4 * i]] for i in range(2)]
    different = 0
    for sample, text, chosen, answers in zip(asked(), SAID, best, by_sample, strict=True):
        values = [value(nano, sample, answer, text) for answer in answers]
        assert value(nano, sample, chosen, text) == pytest.approx(max(values), abs=1e-2)
        assert chosen[0].media is not None
        different += len({answer[0].codes.numpy().tobytes() for answer in answers}) > 1  # type: ignore[union-attr]
    assert different == 2, "all answers are the same: there was nothing to choose"


def test_a_text_on_the_way_is_the_description(nano: UnifiedModel) -> None:
    picture = nano.respond(asked()[:1], DRAW, GREEDY)[0][0]
    shown = Sample([Segment("image", picture.codes.numpy(), "user")])  # type: ignore[union-attr]
    (text,) = descriptions(nano, [shown])
    assert "red" in text and "circle" in text and descriptions(nano, asked()) == list(SAID)
    (answer,) = best_of(nano, [shown], Request(order=("text", "music")), num=3, sampling=GREEDY)
    assert [output.modality for output in answer] == ["text", "music"] and answer[1].media is not None


def test_media_are_read_as_the_reader_reads_them(nano: UnifiedModel) -> None:
    given = []

    def read(pictures: Sequence[torch.Tensor]) -> list[Segment]:
        given.extend(pictures)  # the third answer to each prompt as it is, all else as nothing that could be meant
        kept = [p if i % 4 == 2 else torch.zeros_like(p) for i, p in enumerate(pictures)]
        return [Segment("image", nano.tokenizers["image"].encode(p[None]).codes[0].numpy(), "user") for p in kept]

    wish = [Sample([Segment("text", f"draw {text}", "user")]) for text in SAID]
    how: dict[str, Any] = {"num": 4, "temperature": 1.5, "sampling": GREEDY}
    best = best_of(nano, wish, DRAW, told=SAID, readers={"image": read}, **how)
    assert len(given) == 8 and given[0].shape == (3, 64, 64)
    for i, (answer,) in enumerate(best):
        assert answer.media is not None and torch.equal(answer.media, given[4 * i + 2])
        assert not torch.equal(answer.media, given[4 * i]), "all answers are the same: there was nothing to choose"


def test_without_a_prior_the_reading_chooses_and_texts_are_not_drawn(
    nano: UnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = nano.respond(asked()[1:], DRAW, GREEDY)[0][0]
    shown = Sample([Segment("image", picture.codes.numpy(), "user")])  # type: ignore[union-attr]
    drawn = watched(monkeypatch)
    (best,) = best_of(
        nano, [shown], Request(order=("text", "music")), num=4, temperature=1.2, sampling=GREEDY, prior=0.0
    )
    assert len(drawn) == 4 and len({answer[0].text for answer in drawn}) == 1
    read = [
        Sample([Segment("music", a[1].codes.numpy(), "user"), Segment("text", a[0].text or "", "assistant")])  # type: ignore[union-attr]
        for a in drawn
    ]
    values = log_likelihoods(nano, read, mean=False)
    assert len(set(values)) > 1 and None not in values
    wanted = drawn[int(np.argmax(values))]  # type: ignore[arg-type]
    assert torch.equal(best[1].codes, wanted[1].codes)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [None, (), ("text",), ("image", "speech"), ("image", "text")])
def test_other_requests_are_refused(nano: UnifiedModel, order: tuple[str, ...] | None) -> None:
    with pytest.raises(GenerationError, match="answers of a medium, or of text and a medium"):
        best_of(nano, asked(), Request(order=order))


def test_answers_that_cannot_be_read_are_refused(nano: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_lm.candidates.log_likelihoods", lambda model, samples, mean: [None] * len(samples))
    with pytest.raises(GenerationError, match="no answer can be read back"):
        best_of(nano, asked(), DRAW, num=2)


def test_other_prompts_are_refused(nano: UnifiedModel) -> None:
    two = Sample([*asked()[0].segments, *asked()[1].segments])
    with pytest.raises(GenerationError, match="one segment of the user"):
        best_of(nano, [two], DRAW)
    with pytest.raises(GenerationError, match="best of 0"):
        best_of(nano, asked(), DRAW, num=0)
