"""Scenes: validity, splits, scores."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.nanoworld.scene import (
    ATTRIBUTES,
    COLORS,
    COLUMNS,
    HELD_OUT,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    attributes,
    sample_scene,
    score,
)

seeds = st.integers(0, 2**32 - 1)


def a_thing(**changes: str) -> Thing:
    values = {"shape": "circle", "color": "red", "size": "large", "row": "top", "column": "left"}
    return Thing(**{**values, **changes})


def test_every_pair_of_values_occurs_among_the_triples_of_training() -> None:
    training = set(product(SHAPES, COLORS, SIZES)) - HELD_OUT
    assert len(HELD_OUT) == 6 and len(training) == 42
    for first, second in combinations(range(3), 2):
        values = (SHAPES, COLORS, SIZES)
        pairs = {(triple[first], triple[second]) for triple in training}
        assert pairs == set(product(values[first], values[second]))


@given(seeds)
def test_splits(seed: int) -> None:
    assert not sample_scene(np.random.default_rng(seed), "train").has_held_out
    assert sample_scene(np.random.default_rng(seed), "test").has_held_out


def test_sampling_is_deterministic_and_covers_the_world() -> None:
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(1500)]
    assert scenes == [sample_scene(np.random.default_rng(seed)) for seed in range(1500)]
    things = [thing for scene in scenes for thing in scene.things]
    assert len({thing.triple for thing in things}) == 42
    assert {thing.place for thing in things} == set(product(ROWS, COLUMNS))
    shares = np.bincount([len(scene) for scene in scenes], minlength=4)[1:] / len(scenes)
    np.testing.assert_allclose(shares, (0.6, 0.25, 0.15), atol=0.05)


@given(seeds)
def test_dict_round_trip(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    assert Scene.from_dict(scene.to_dict()) == scene


def test_things_are_kept_in_reading_order() -> None:
    last, first = a_thing(row="bottom"), a_thing(row="top", column="right")
    assert Scene((last, first)).things == (first, last)
    assert Scene((last, first)) == Scene((first, last))


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"color is 'pink'; use one of red"):
        a_thing(color="pink")
    with pytest.raises(ValueError, match="two things at one place"):
        Scene((a_thing(), a_thing(color="blue")))
    with pytest.raises(ValueError, match="0 things"):
        Scene(())
    with pytest.raises(ValueError, match="not a scene"):
        Scene.from_dict({"things": [{"shape": "circle"}]})
    with pytest.raises(ValueError, match="split is 'dev'"):
        sample_scene(np.random.default_rng(0), "dev")  # type: ignore[arg-type]


def test_score() -> None:
    one = Scene((a_thing(),))
    two = Scene((a_thing(), a_thing(row="bottom", shape="cross", color="white", size="small")))
    assert score(one, one) == 1.0
    assert score(one, None) == 0.0
    assert score(one, Scene((a_thing(color="blue"),))) == 0.75
    assert score(one, Scene((a_thing(row="bottom", column="right"),))) == 0.75
    assert score(one, two) == score(two, one) == 0.5


@given(seeds, seeds)
def test_score_is_symmetric_and_bounded(a: int, b: int) -> None:
    first, second = (sample_scene(np.random.default_rng(seed)) for seed in (a, b))
    assert 0 <= score(first, second) == score(second, first) <= 1
    assert (score(first, second) == 1) == (first == second)


def test_attributes_by_hand() -> None:
    one, two = a_thing(), a_thing(shape="square", color="blue", column="right")
    assert attributes(Scene((one,)), Scene((one,))) == dict.fromkeys((*ATTRIBUTES, "count"), 1.0)
    # Matched to the circle, the guess has its color wrong; the square is missing from it.
    guess = Scene((a_thing(color="green"),))
    found = attributes(Scene((one, two)), guess)
    assert found == {"shape": 0.5, "color": 0, "size": 0.5, "place": 0.5, "count": 0}
    assert attributes(Scene((one,)), None) == dict.fromkeys(found, 0.0)


@given(seeds, seeds)
def test_attributes_are_the_parts_of_the_score(a: int, b: int) -> None:
    first, second = (sample_scene(np.random.default_rng(seed)) for seed in (a, b))
    parts = attributes(first, second)
    assert np.mean([parts[name] for name in ATTRIBUTES]) == pytest.approx(score(first, second))
    assert parts["count"] == (len(first) == len(second))
