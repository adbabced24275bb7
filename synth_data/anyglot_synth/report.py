"""`write_report`: what a finished dataset holds, in numbers: `report.json`.

Counts of what was kept, filtered and failed; hours, pictures, voices, engines, licences; histograms. One pass over
the lists in memory of a fixed size (but a count per voice, source and reason), no media are opened, and the same lists
give the same report. Says nothing of whether files are whole; see `validate`.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyglot_synth.dataset import (
    ERRORS,
    REJECTS,
    SAMPLES,
    engine_of,
    licence_of,
    media_of,
    read_items,
    voice_of,
)
from anyglot_synth.dialogue import SPEECH, TEXT, Dialogue, Json, MediaFile
from anyglot_synth.stages import OK, STATUSES, Item
from anyglot_tokenizers.files import atomic_write

REPORT = "report.json"
FORMAT, VERSION = "anyglot.dataset-report", 1

COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
WORDS = (0, 1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200)
SECONDS = (0, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 45, 60, 120)
SIDES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
RATES = (0, 0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
DECIBELS = (-70, -50, -40, -35, -30, -27, -24, -21, -18, -15, -12, -9, -6, -3, 0)
ANY = (
    -100,
    -10,
    -3,
    -2,
    -1,
    0,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    0.9,
    1,
    2,
    3,
    5,
    10,
    15,
    20,
    30,
    50,
    100,
    200,
    500,
    1000,
)
EDGES: dict[str, Sequence[float]] = {
    "wer": RATES,
    "cer": RATES,
    "lufs": DECIBELS,
    "loudness": DECIBELS,
    "peak": DECIBELS,
}
"""Bins of facts by the last part of their name; see `_edges`."""
MAX_FACTS = 200
"""Different numeric facts that are counted; more are a mistake of a stage."""


class Histogram:
    """Counts of values between fixed edges, with their number, mean, least and most.

    Values below the first edge count in the first bin; the last bin has no upper end.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts = list(edges), [0] * len(edges)
        self.number, self.total, self.least, self.most = 0, 0.0, math.inf, -math.inf

    def add(self, value: float) -> None:
        """Counts a finite value."""
        self.counts[max(bisect.bisect_right(self.edges, value) - 1, 0)] += 1
        self.number, self.total = self.number + 1, self.total + value
        self.least, self.most = min(self.least, value), max(self.most, value)

    def to_dict(self) -> Json:
        """`from` are the lower ends of the bins."""
        if not self.number:
            return {"n": 0}
        ends = {"mean": self.total / self.number, "min": self.least, "max": self.most}
        return {
            "n": self.number,
            **{key: round(value, 6) for key, value in ends.items()},
            "from": self.edges,
            "counts": self.counts,
        }


def write_report(folder: str | os.PathLike[str]) -> Json:
    """Writes `report.json` of a dataset folder and returns it. Raises `DatasetError` for lists that cannot be read."""
    folder = Path(folder)
    report = make_report(folder)
    with atomic_write(folder / REPORT) as path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def make_report(folder: Path) -> Json:
    """The content of `report.json`."""
    tally = _Tally()
    for name in (SAMPLES, REJECTS, ERRORS):
        for item in read_items(folder, name):
            tally.add(item)
    return tally.to_dict()


class _Tally:
    def __init__(self) -> None:
        self.status: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str, str]] = Counter()
        self.retryable = 0
        self.named: dict[str, Counter[str]] = {key: Counter() for key in ("tasks", "languages", "licences")}
        self.sources: Counter[tuple[str, str]] = Counter()
        self.turns, self.words = Histogram(COUNTS), Histogram(WORDS)
        self.media: dict[str, _Media] = {}
        self.facts: dict[str, Histogram] = {}

    def add(self, item: Item) -> None:
        self.status[item.status] += 1
        for name, value in _numbers(item.facts):
            if name in self.facts or len(self.facts) < MAX_FACTS:
                self.facts.setdefault(name, Histogram(_edges(name))).add(value)
        if item.status != OK:
            self.ended[item.status, item.stage, item.reason] += 1
            self.retryable += item.retryable
            return
        dialogue = item.dialogue
        for key, own in (("tasks", dialogue.task), ("languages", dialogue.language), ("licences", dialogue.licence)):
            self.named[key][own] += 1
        self.sources[dialogue.source, dialogue.licence] += 1
        self.turns.add(len(dialogue.turns))
        self._add_parts(dialogue)

    def _add_parts(self, dialogue: Dialogue) -> None:
        for turn in dialogue.turns:
            for part in turn.parts:
                if part.modality in (SPEECH, TEXT):
                    self.words.add(len((part.spoken_text or part.text).split()))
        for medium in media_of(dialogue):
            licence = licence_of(medium.file, dialogue)
            self.named["licences"][licence] += 1
            self.media.setdefault(medium.part.modality, _Media()).add(medium.turn.role, medium.file, licence)

    def to_dict(self) -> Json:
        ended: Json = {}
        for (status, stage, reason), count in sorted(self.ended.items()):
            ended.setdefault(status, {}).setdefault(stage, {})[reason] = count
        return {
            "format": FORMAT,
            "version": VERSION,
            "counts": {status: self.status[status] for status in STATUSES},
            "ended": ended,
            "retryable": self.retryable,
            **{key: _sorted(counts) for key, counts in self.named.items()},
            "sources": [
                {"source": source, "licence": licence, "dialogues": n}
                for (source, licence), n in sorted(self.sources.items())
            ],
            "turns": self.turns.to_dict(),
            "words": self.words.to_dict(),
            "media": {modality: self.media[modality].to_dict() for modality in sorted(self.media)},
            "facts": {name: histogram.to_dict() for name, histogram in sorted(self.facts.items())},
        }


class _Media:
    """Of one modality; files that several parts share count each time."""

    def __init__(self) -> None:
        self.files, self.seconds = 0, Histogram(SECONDS)
        self.engines: Counter[tuple[str, str]] = Counter()
        self.roles: Counter[str] = Counter()
        self.sides = Histogram(SIDES)
        self.voices: dict[str, tuple[int, float]] = {}

    def add(self, role: str, file: MediaFile, licence: str) -> None:
        self.files += 1
        self.engines[engine_of(file), licence] += 1
        self.roles[role] += 1
        if file.seconds is not None:
            self.seconds.add(file.seconds)
        if file.size is not None:
            self.sides.add(max(file.size))
        if voice := voice_of(file):
            count, seconds = self.voices.get(voice, (0, 0.0))
            self.voices[voice] = count + 1, seconds + (file.seconds or 0.0)

    def to_dict(self) -> Json:
        found: Json = {
            "files": self.files,
            "roles": _sorted(self.roles),
            "engines": [
                {"engine": engine, "licence": licence, "files": n}
                for (engine, licence), n in sorted(self.engines.items())
            ],
        }
        if self.seconds.number:
            found |= {"hours": round(self.seconds.total / 3600, 6), "seconds": self.seconds.to_dict()}
        if self.sides.number:
            found["longer_side"] = self.sides.to_dict()
        if self.voices:
            found["voices"] = {
                voice: {"files": count, "hours": round(seconds / 3600, 6)}
                for voice, (count, seconds) in sorted(self.voices.items())
            }
        return found


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number among facts; lists are several values of one name, inner names follow a dot."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Mapping):
                yield from _numbers(one, f"{prefix}{key}.")
            elif isinstance(one, int | float) and abs(one) < 1e300:  # an integer may be too big to be a float
                yield f"{prefix}{key}", float(one)


def _edges(name: str) -> Sequence[float]:
    last = name.rpartition(".")[2]
    return EDGES.get(last, SECONDS if last.endswith("seconds") else ANY)
