"""Shares: caps by water-filling, budgets by iterative scaling, the adaptive mixture's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.mixture import cap_shares, lagging_weights, meet_budgets
from anyglot_lm.packing import PlanError

shares = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6)


@given(shares, st.data())
def test_caps(raw: list[float], data: st.DataObject) -> None:
    share = np.array(raw) / sum(raw)
    most = np.array(data.draw(st.lists(st.floats(0.05, 2.0), min_size=len(raw), max_size=len(raw))))
    if most.sum() < 1:
        with pytest.raises(PlanError, match="all sources together give"):
            cap_shares(share, most * 1000, 1000)
        return
    got = cap_shares(share, most * 1000, 1000)
    assert got.sum() == pytest.approx(1) and (got <= most + 1e-9).all()
    free = got < most - 1e-9
    if free.any():
        ratios = got[free] / share[free]
        assert np.allclose(ratios, ratios[0]) and ratios[0] >= 1 - 1e-9
        assert (got[~free] / share[~free] <= ratios[0] + 1e-9).all(), "only those that were too much were capped"


@given(shares, st.data())
def test_budgets_are_met_by_the_nearest_mixture(raw: list[float], data: st.DataObject) -> None:
    start, rng = np.array(raw) / sum(raw), np.random.default_rng(data.draw(st.integers(0, 1000)))
    table = rng.dirichlet([0.5, 0.5, 0.5], len(raw))
    other = rng.dirichlet(np.full(len(raw), 5.0))
    budgets = dict(zip(("text", "image"), (other @ table)[:2].tolist(), strict=True))
    got = meet_budgets(start, table, ("text", "image", "speech"), budgets)
    assert got.sum() == pytest.approx(1) and (got @ table)[:2] == pytest.approx(list(budgets.values()), abs=0.005)
    distance = [float(np.sum(p * np.log(np.maximum(p, 1e-300) / start))) for p in (got, other)]
    assert distance[0] <= distance[1] + 0.02, "no other mixture with these budgets is nearer"


def test_budgets_leave_a_mixture_that_meets_them() -> None:
    start, table = np.array([0.25, 0.75]), np.array([[1.0, 0.0], [0.2, 0.8]])
    assert meet_budgets(start, table, ("text", "image"), {"image": 0.6}) == pytest.approx(start)
    for budgets, problem in (
        ({"image": 0.9}, r"in reach: image 0.0% to 80.0% \(nearest to all: 80.0%\)"),
        ({"image": 1.2}, "at most 1 together"),
        ({"image": math.nan}, "0 or more"),
    ):
        with pytest.raises(PlanError, match=problem):
            meet_budgets(start, table, ("text", "image"), budgets)


def test_lagging_modalities_gain(caplog: pytest.LogCaptureFixture) -> None:
    weights = {"a->image": 1.0, "b->image": 0.0, "a->text": 2.0, "a->music": 1.0}
    targets = {"a->image": "image", "b->image": "image", "a->text": "text", "a->music": "music"}
    losses, uniforms = {"image": 6.0, "text": 2.0}, {"image": 8.0, "text": 8.0}
    with caplog.at_level("INFO"):
        got = lagging_weights(weights, losses, uniforms, targets)
    assert "image 0.750 of uniform (x 1.50)" in caplog.text and "text 0.250 of uniform (x 0.50)" in caplog.text
    assert got == pytest.approx({"a->image": 1.5 / 3.5, "b->image": 0.0, "a->text": 1 / 3.5, "a->music": 1 / 3.5})
    same = lagging_weights(weights, losses, uniforms, targets, 0.0)
    assert same == pytest.approx({task: w / 4 for task, w in weights.items()})
    bounded = lagging_weights(weights, losses, uniforms, targets, 100.0, bound=1.2)
    assert bounded["a->image"] / bounded["a->text"] == pytest.approx(1.2**2 / 2)
    unknown = lagging_weights(weights, {"image": math.nan}, uniforms, targets)
    assert unknown == pytest.approx(same), "no loss yet: nothing changes"
    for bad in ({"strength": -1.0}, {"bound": 0.5}):
        with pytest.raises(PlanError, match="use at least 0"):
            lagging_weights(weights, losses, uniforms, targets, **bad)
    with pytest.raises(PlanError, match="no target modality or no uniform baseline for a->text"):
        lagging_weights(weights, losses, uniforms, {k: v for k, v in targets.items() if k != "a->text"})
    with pytest.raises(PlanError, match="baseline for text"):
        lagging_weights(weights, losses, {"image": 8.0}, targets)
