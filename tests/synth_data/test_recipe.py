"""Recipes: sizes of stages, and wrong values, which end with one line of file, stage, value and way out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from anyglot_synth.recipe import build
from anyglot_synth.registry import Registry
from anyglot_tokenizers.errors import AnyglotError, ManifestError

SPEAK = {"stage": "speak", "engines": [{"engine": "espeak-ng"}]}


def recipe(*stages: Any, **source: Any) -> Any:
    return build({"source": {"source": "nanoworld-grammar", **source}, "stages": list(stages)}, "talk.yaml")


def test_sizes_of_stages() -> None:
    stages = recipe(
        {"stage": "speakable"}, {**SPEAK, "cpus": 2, "gpus": 0.5}, {"filter": "silence", "cpus": 0.5}
    ).stages
    assert [(stage.cpus, stage.gpus) for stage in stages] == [(1.0, 0.0), (2.0, 0.5), (0.5, 0.0)]
    assert stages[1].config() == recipe(SPEAK).stages[0].config(), "they change no result"


WRONG = [("cpus", value) for value in (0, -1, "two", True, math.nan, None)]
WRONG += [("gpus", value) for value in (-1, 1.5, math.inf, [1])]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_sizes_that_cannot_be(key: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        recipe({"stage": "speakable"}, {"filter": "silence", key: value})
    assert str(caught.value).startswith(f"talk.yaml, stage 2: {key} is {value!r}; give a ")


@pytest.mark.parametrize(
    ("stages", "source", "message"),
    [
        ([], {"speech": "often"}, "talk.yaml: source 'nanoworld-grammar': speech is 'often'; give a number"),
        ([], {"max_rounds": 2.5}, "talk.yaml: source 'nanoworld-grammar': max_rounds is 2.5; give a whole number"),
        ([], {"max_rounds": True}, "max_rounds is True; give a whole number"),
        ([], {"split": False}, "talk.yaml: split False, phrasings False; use 'train' or 'test'"),
        (
            [{**SPEAK, "sample_rate": "16k"}],
            {},
            "talk.yaml, stage 1: stage 'speak': sample_rate is '16k'; give a whole",
        ),
        ([{**SPEAK, "cast": ["slt"]}], {}, "talk.yaml, stage 1: the cast cannot be set up from ['slt']: "),
        ([{"stage": "speak", "engines": 3}], {}, "engines is 3; give "),
        ([{"filter": "duration", "max_seconds": "1e2"}], {}, "max_seconds is '1e2'; give a number"),
        ([{"filter": "language", "languages": "en"}], {}, "languages is 'en'; give a list"),
        (
            [{"filter": "duration", "max_seconds": math.inf}],
            {},
            "filter 'duration': max_seconds holds inf; give a number",
        ),
        ([{"filter": "duration", "min_pace": -math.inf}], {}, "talk.yaml, stage 1: "),
        ([{"stage": "augment", "gain": {"db": [0, math.nan]}}], {}, "talk.yaml, stage 1: "),
        ([{**SPEAK, "engines": [{"engine": "espeak-ng", "x": {"y": [math.nan]}}]}], {}, "talk.yaml, stage 1: "),
        ([{"stage": "speak", "engines": [{"engine": "flite", "colour": 1}]}], {}, "talk.yaml, stage 1: speak: speech"),
        ([["speak"]], {}, "talk.yaml, stage 1: ['speak'] names no stage"),
        ([{"stage": "augment", "gain": 3}], {}, "talk.yaml, stage 1: gain of augment is 3; give db, p"),
    ],
)
def test_values_that_cannot_be(stages: list[Any], source: dict[str, Any], message: str) -> None:
    with pytest.raises(AnyglotError) as caught:
        recipe(*stages, **source)
    assert message in str(caught.value)


class Thing:
    """Has an option that is called as a parameter of the registry, and checks nothing itself."""

    def __init__(
        self, name: str, share: float = 0.5, by: Mapping[str, float] | None = None, of: Sequence[int] = ()
    ) -> None:
        self.name = name
        self.part = 1 / share
        self.half = [1, 2, 3][len(of)]


def test_registry_of_anything() -> None:
    things: Registry[Thing] = Registry("thing", ManifestError, {"thing": f"{__name__}:Thing"})
    assert things.make({"thing": "thing", "name": "mine"}).name == things.build("thing", name="mine").name == "mine"
    with pytest.raises(ManifestError, match=r"there: thing 'thing' cannot be set up with name: 'a', share: 0 \(Ze"):
        things.make({"thing": "thing", "name": "a", "share": 0}, "there")
    with pytest.raises(ManifestError, match="cannot be set up with.*IndexError.*change one"):
        things.build("thing", name="a", of=[1, 2, 3, 4])
    for wrong, words in (
        ({"of": ["a"]}, "a list of a whole number"),
        ({"by": [1]}, "a mapping"),
        ({"by": {"a": "b"}}, "a map"),
    ):
        with pytest.raises(ManifestError, match=f"is .*; give {words}"):
            things.build("thing", name="a", **wrong)
