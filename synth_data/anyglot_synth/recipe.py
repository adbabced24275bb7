"""`Recipe`: a YAML file to a source and stages.

    name: spoken-instructions
    seed: 0
    num: 5000
    source: {source: alpaca, data: instructions.jsonl, form: chain}
    stages:
      - {filter: language}
      - stage: speakable
      - {stage: speak, engines: [{engine: flite}]}
      - {filter: asr, max_error: 0.3, cpus: 2}

Every source, stage, filter and engine has a name, and takes plain values; a name or a key that is not known ends with
one line that says which there are. `cpus` and `gpus` of a stage are what a copy of it takes on a cluster. Runs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyglot_synth.dialogue import Json
from anyglot_synth.filters import FILTERS
from anyglot_synth.registry import Registry
from anyglot_synth.sources import SOURCES, Source
from anyglot_synth.stages import Stage
from anyglot_tokenizers.errors import ManifestError

KEYS = {
    "name": "of the dataset, for its card",
    "seed": "of whatever is drawn, where a source or a stage has none of its own",
    "num": "rows of the source that are taken (default all)",
    "source": "{source: NAME, ...}: where dialogues come from",
    "stages": "in order, each {stage: NAME, ...} or {filter: NAME, ...}, with cpus and gpus of a copy on a cluster",
}
STAGES: Registry[Stage] = Registry(
    "stage",
    ManifestError,
    {
        "speakable": "anyglot_synth.speakable:SpeakableStage",
        "speak": "anyglot_synth.speak:SpeakStage",
        "augment": "anyglot_synth.augment:AugmentStage",
        "illustrate": "anyglot_synth.illustrate:IllustrateStage",
    },
)
"""Name in a recipe -> class, imported on first use."""


@dataclass(frozen=True)
class Recipe:
    """What a YAML file asks for, built."""

    name: str
    seed: int
    num: int | None
    source: Source
    stages: Sequence[Stage]
    settings: Json


def read_settings(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Json:
    """The settings of a YAML file, with changes such as `{"source.data": "x.jsonl", "stages.1.seed": 3}`.

    Raises:
        ManifestError: not a readable YAML mapping, or a change of what is not there.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); give a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: is not YAML ({error})") from None
    if not isinstance(found, dict):
        raise ManifestError(f"{path}: holds no settings; see `anyglot synth --help`")
    for key, value in (changes or {}).items():
        _change(found, key, value)
    return found


def build(settings: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Source and stages of settings. Loads no engine.

    Raises:
        ManifestError, SourceError, AnyglotError: a name, key or value that is not known; names those there are.
    """
    if unknown := sorted(set(settings) - set(KEYS)):
        raise ManifestError(f"{where}: there is no key {unknown[0]!r}; use {', '.join(KEYS)}")
    seed, num, stages = settings.get("seed", 0), settings.get("num"), settings.get("stages", [])
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ManifestError(f"{where}: seed is {seed!r}; give a whole number")
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 1):
        raise ManifestError(f"{where}: num is {num!r}; give a number of rows")
    if not isinstance(stages, list):
        raise ManifestError(f"{where}: stages is no list")
    return Recipe(
        str(settings.get("name", "")),
        seed,
        num,
        SOURCES.make(settings.get("source"), where, seed=seed),
        [_stage(given, seed, f"{where}, stage {number}") for number, given in enumerate(stages, start=1)],
        dict(settings),
    )


def _stage(given: Any, seed: int, where: str) -> Stage:
    registry = FILTERS if isinstance(given, Mapping) and "filter" in given else STAGES
    sizes = {key: given[key] for key in ("cpus", "gpus") if isinstance(given, Mapping) and key in given}
    if sizes:
        given = {key: value for key, value in given.items() if key not in sizes}
    stage = registry.make(given, where, seed=seed)
    for key, value in sizes.items():
        least = 0.01 if key == "cpus" else 0.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
            raise ManifestError(f"{where}: {key} is {value!r}; give a number of at least {least:g}")
        if key == "gpus" and value > 1 and value % 1:
            raise ManifestError(f"{where}: gpus is {value!r}; give a part of one (0.5) or a whole number")
        setattr(stage, key, float(value))
    return stage


def _change(settings: Any, key: str, value: Any) -> None:
    """Sets `a.b.0.c`."""
    place, names = settings, key.split(".")
    for number, name in enumerate(names):
        last = number == len(names) - 1
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise ManifestError(
                    f"--{key}: there is no {'.'.join(names[: number + 1])}; it has {len(place)} entries"
                )
            if last:
                place[int(name)] = value
            place = place[int(name)]
        elif isinstance(place, dict):
            if last:
                place[name] = value
            elif name not in place:
                raise ManifestError(
                    f"--{key}: there is no {'.'.join(names[: number + 1])}; there are {', '.join(place)}"
                )
            place = place[name]
        else:
            raise ManifestError(f"--{key}: {'.'.join(names[:number])} is {place!r}, which holds nothing")
