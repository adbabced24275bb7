"""Filters of sounds: too short or long, silent, clipped, too soft or loud. Without a recogniser, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.dialogue import MUSIC, SPEECH
from anyglot_synth.filters.base import Filter, made_parts, said_of
from anyglot_synth.loudness import ABSOLUTE_GATE_LUFS, loudness
from anyglot_synth.scoring import normal
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store

Float32 = NDArray[np.float32]
FRAME_S = 0.01
FLOOR = ABSOLUTE_GATE_LUFS
"""LUFS that silence counts as."""


def pace(text: str, seconds: float, language: str = "en") -> float:
    """Letters said per second, spaces not counted, digits read out."""
    return len(normal(text, language).replace(" ", "")) / max(seconds, 1e-3)


@dataclass
class DurationFilter(Filter):
    """Seconds of every sound, and letters per second of speech: half of a text, or babble after it, shows here first.

    Args:
        min_seconds, max_seconds: of one sound.
        min_pace, max_pace: letters per second of speech. English voices say 9 to 18; slow and fast ones 6 to 25.
        min_letters: below so many the pace says nothing.
        modalities: whose sounds.
    """

    name: ClassVar[str] = "duration"
    min_seconds: float = 0.2
    max_seconds: float = 60.0
    min_pace: float = 5.0
    max_pace: float = 30.0
    min_letters: int = 12
    modalities: Sequence[str] = (SPEECH,)

    def __post_init__(self) -> None:
        self.require(0 <= self.min_seconds < self.max_seconds, "min_seconds must be below max_seconds")
        self.require(0 <= self.min_pace < self.max_pace, "min_pace must be below max_pace")
        self.require(set(self.modalities) <= {SPEECH, MUSIC}, f"modalities {self.modalities}: use speech, music")

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {"seconds": [], "pace": []}
        ends: list[Filtered] = []
        for where, part, media in made_parts(item.dialogue, self.modalities):
            seconds = media.seconds
            if seconds is None:
                audio, rate = store.sound(media)
                seconds = len(audio) / rate
            facts["seconds"].append(round(seconds, 3))
            if not self.min_seconds <= seconds <= self.max_seconds:
                ends.append(Filtered("duration", f"{where}: {seconds:.2f} s"))
            if part.modality != SPEECH:
                continue
            found = pace(said_of(part), seconds, item.dialogue.language)
            if found * seconds >= self.min_letters:
                facts["pace"].append(round(found, 2))
                if not self.min_pace <= found <= self.max_pace:
                    ends.append(Filtered("pace", f"{where}: {found:.1f} letters per second"))
        return _end(item, facts, ends)


@dataclass(frozen=True)
class Silence:
    """Of one sound: share of silent frames (1 if nothing is heard); seconds before, after, and the longest within."""

    share: float
    lead: float
    tail: float
    gap: float


def silence_of(audio: Float32, sample_rate: int, below: float = 40.0, floor: float = -60.0) -> Silence:
    """Measures a sound `[samples]` in frames of 10 ms.

    Args:
        below: dB under the level of the loud frames (95 of 100 are softer) from where a frame is silent.
        floor: dB of full scale under which a frame is silent in any case.
    """
    hop = max(1, int(FRAME_S * sample_rate))
    num = len(audio) // hop
    power = (audio[: num * hop].astype(np.float64).reshape(num, hop) ** 2).mean(axis=1)
    level = 10 * np.log10(np.maximum(power, 1e-12))
    heard = level > max(floor, float(np.quantile(level, 0.95)) - below) if num else np.zeros(0, bool)
    places = np.flatnonzero(heard)
    if not len(places):
        return Silence(1.0, len(audio) / sample_rate, 0.0, 0.0)
    gap = int(np.diff(places).max(initial=1)) - 1
    tail = len(audio) / sample_rate - (int(places[-1]) + 1) * hop / sample_rate
    return Silence(float(1 - heard.mean()), int(places[0]) * hop / sample_rate, tail, gap * hop / sample_rate)


@dataclass
class SilenceFilter(Filter):
    """Silence: all of it, long before, after or within what is said.

    Args:
        max_share: silent frames of all.
        max_lead, max_tail, max_gap: seconds before the first, after the last, and between two frames that are heard.
        below, floor: what silence is, see `silence_of`.
        modalities: whose sounds.
    """

    name: ClassVar[str] = "silence"
    max_share: float = 0.6
    max_lead: float = 1.5
    max_tail: float = 1.5
    max_gap: float = 1.5
    below: float = 40.0
    floor: float = -60.0
    modalities: Sequence[str] = (SPEECH,)

    def __post_init__(self) -> None:
        self.require(0 < self.max_share <= 1, f"max_share is {self.max_share}; use a share above 0, up to 1")
        self.require(set(self.modalities) <= {SPEECH, MUSIC}, f"modalities {self.modalities}: use speech, music")

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {"silence": [], "gap": []}
        ends: list[Filtered] = []
        for where, _, media in made_parts(item.dialogue, self.modalities):
            found = silence_of(*store.sound(media), self.below, self.floor)
            facts["silence"].append(round(found.share, 3))
            facts["gap"].append(round(found.gap, 3))
            if found.share > self.max_share:
                ends.append(Filtered("silence", f"{where}: {100 * found.share:.0f} % is silent"))
            for what in ("lead", "tail", "gap"):
                if (seconds := getattr(found, what)) > getattr(self, f"max_{what}"):
                    ends.append(Filtered("silence", f"{where}: {what} of {seconds:.2f} s"))
        return _end(item, facts, ends)


def flat_share(audio: Float32, run: int = 4) -> float:
    """Share of samples in flat tops: `run` or more equal samples in a row within 1 % of the sound's own peak.

    So clipping is found too where the sound was made softer afterwards; what a smooth limiter did is not.
    """
    peak = float(np.abs(audio).max()) if len(audio) else 0.0
    if peak < 1e-3:
        return 0.0
    edges = np.flatnonzero(np.concatenate([[True], audio[1:] != audio[:-1], [True]]))
    lengths, values = np.diff(edges), audio[edges[:-1]]
    return float(lengths[(lengths >= run) & (np.abs(values) >= 0.99 * peak)].sum() / len(audio))


@dataclass
class ClippingFilter(Filter):
    """Clipped sounds.

    Args:
        max_share: samples in flat tops, see `flat_share`.
        modalities: whose sounds.
    """

    name: ClassVar[str] = "clipping"
    max_share: float = 0.002
    modalities: Sequence[str] = (SPEECH, MUSIC)

    def __post_init__(self) -> None:
        self.require(0 <= self.max_share < 1, f"max_share is {self.max_share}; use a share of 0 or more, below 1")
        self.require(set(self.modalities) <= {SPEECH, MUSIC}, f"modalities {self.modalities}: use speech, music")

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {"clipping": []}
        ends: list[Filtered] = []
        for where, _, media in made_parts(item.dialogue, self.modalities):
            share = flat_share(store.sound(media)[0])
            facts["clipping"].append(round(share, 5))
            if share > self.max_share:
                ends.append(Filtered("clipping", f"{where}: {100 * share:.2f} % of its samples are clipped"))
        return _end(item, facts, ends)


@dataclass
class LoudnessFilter(Filter):
    """Integrated loudness of every sound (EBU R 128, see `anyglot_synth.loudness`); silence counts as -70.

    Args:
        min_lufs, max_lufs: bounds. Broadcast has -23, most voices make -30 to -14.
        modalities: whose sounds.
    """

    name: ClassVar[str] = "loudness"
    min_lufs: float = -40.0
    max_lufs: float = -8.0
    modalities: Sequence[str] = (SPEECH, MUSIC)

    def __post_init__(self) -> None:
        self.require(FLOOR <= self.min_lufs < self.max_lufs, f"min_lufs must be below max_lufs, and from {FLOOR}")
        self.require(set(self.modalities) <= {SPEECH, MUSIC}, f"modalities {self.modalities}: use speech, music")

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {"lufs": []}
        ends: list[Filtered] = []
        for where, _, media in made_parts(item.dialogue, self.modalities):
            lufs = max(FLOOR, loudness(*store.sound(media)))
            facts["lufs"].append(round(lufs, 1))
            if not self.min_lufs <= lufs <= self.max_lufs:
                ends.append(Filtered("loudness", f"{where}: {lufs:.1f} LUFS"))
        return _end(item, facts, ends)


def _end(item: Item, facts: dict[str, Any], ends: list[Filtered]) -> Item:
    """The item with facts of all its parts, or the first reason to end it with the same facts."""
    if ends:
        raise Filtered(ends[0].reason, ends[0].detail, **facts)
    return item.with_facts(**facts)
