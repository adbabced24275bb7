"""Judges of the field trial: the judge of photos is the mean of its networks, and learns what it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from anyglot_recipes import field_graders
from anyglot_recipes.field import WORDS, Clip, Picture
from anyglot_recipes.field_graders import NETWORKS, TEST_TAKES, _classify, train_digit_listener, train_photo_classifier
from anyglot_recipes.field_meaning import to_tensor


class Says(nn.Module):
    """Probabilities that are given, for every input."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        self.logit_C = torch.tensor(shares).log()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logit_C.expand(len(x), -1) + 7  # a constant means nothing to a probability


def test_several_networks_are_asked_for_their_mean() -> None:
    surer, other = Says(0.5, 0.4, 0.1), Says(0.05, 0.45, 0.5)
    x = torch.zeros(130, 1)  # more than one part
    assert _classify([surer], x) == [0] * 130
    assert _classify([other], x) == [2] * 130
    assert _classify([surer, other], x) == [1] * 130  # 0.425 of the mean, first of neither


def test_the_judge_of_photos_reads_pictures_like_those_that_it_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    bar_D = rng.integers(0, 256, (10, 4, 4, 3))  # a pattern for each digit

    def pictures(num: int) -> list[Picture]:
        noisy = [bar_D[i % 10].repeat(16, 0).repeat(16, 1) + rng.normal(0, 20, (64, 64, 3)) for i in range(num)]
        return [Picture("sign", WORDS[i % 10], x.clip(0, 255).astype(np.uint8), "") for i, x in enumerate(noisy)]

    fitted: list[nn.Module] = []
    fit = field_graders._fit
    monkeypatch.setattr(field_graders, "_fit", lambda *how: fitted.append(fit(*how)) or fitted[-1])
    before = torch.random.get_rng_state()
    judge = train_photo_classifier(pictures(60), 0, steps=40)
    assert torch.equal(torch.random.get_rng_state(), before)
    read = judge(to_tensor(pictures(30)))
    assert sum(digit == i % 10 for i, digit in enumerate(read)) >= 27
    assert len({float(next(n.parameters()).detach().sum()) for n in fitted}) == NETWORKS  # none is another


def test_the_judge_of_digits_hears_clips_like_those_that_it_learnt() -> None:
    rng = np.random.default_rng(0)

    def clip(digit: int, take: int) -> Clip:
        tone = np.sin(2 * np.pi * (300 + 250 * digit) * np.arange(8000) / 16_000)
        return Clip(digit, "anyone", (0.3 * tone + rng.normal(0, 0.01, 8000)).astype(np.float32), take)

    clips = [clip(i % 10, i // 10) for i in range(80)]
    judge = train_digit_listener([*clips, clip(0, TEST_TAKES - 1)], 0, steps=40)
    heard = judge([clip(i % 10, 0).audio for i in range(20)])
    assert sum(digit == i % 10 for i, digit in enumerate(heard)) >= 18
