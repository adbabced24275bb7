"""Filters of files: `media` (all there and whole) and `picture` (a picture at all, of a sensible size).

What a picture shows is not judged: whether it fits its words takes a model of both, and whether it is fit to be seen
takes a classifier made for that; neither is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH
from anyglot_synth.filters.base import Filter, made_parts
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store, sha256_of


@dataclass
class MediaFilter(Filter):
    """Every part of speech, image or music has a file, which is there with the bytes it was made with.

    Args:
        modalities: which parts.
    """

    name: ClassVar[str] = "media"
    modalities: Sequence[str] = (SPEECH, IMAGE, MUSIC)

    def __post_init__(self) -> None:
        self.require(set(self.modalities) <= {SPEECH, IMAGE, MUSIC}, f"modalities {self.modalities}: no such ones")

    def run(self, item: Item, store: Store) -> Item:
        for number, turn in enumerate(item.dialogue.turns, start=1):
            for part in turn.parts:
                if part.modality not in self.modalities:
                    continue
                where = f"turn {number} ({turn.role})"
                if part.media is None:
                    raise Filtered("no_media", f"{where}: its {part.modality} has no file")
                path = store.path(part.media)
                if not path.is_file():
                    raise Filtered("no_media", f"{where}: {part.media.file} is not there")
                if sha256_of(path) != part.media.sha256:
                    raise Filtered("damaged", f"{where}: {part.media.file} is not the file that was made")
        return item


@dataclass
class PictureFilter(Filter):
    """Pictures that are too small, too narrow, or of one colour.

    Args:
        min_side: pixels of the shorter side.
        max_aspect: longer side over shorter side.
        min_spread: standard deviation of its brightness, full scale 1; a drawing of few lines has 0.02 and more.
    """

    name: ClassVar[str] = "picture"
    min_side: int = 64
    max_aspect: float = 3.0
    min_spread: float = 0.01

    def __post_init__(self) -> None:
        self.require(self.min_side >= 1 and self.max_aspect >= 1, "min_side and max_aspect are at least 1")

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {"side": [], "aspect": [], "spread": []}
        ends: list[Filtered] = []
        for where, _, media in made_parts(item.dialogue, (IMAGE,)):
            pixels = store.picture(media)
            height, width = pixels.shape[:2]
            side, aspect = min(height, width), max(height, width) / min(height, width)
            spread = float(np.std(pixels.astype(np.float32).reshape(-1, 3), axis=0).max() / 255)
            for name, value in (("side", side), ("aspect", round(aspect, 3)), ("spread", round(spread, 4))):
                facts[name].append(value)
            if side < self.min_side:
                ends.append(Filtered("small", f"{where}: {width} x {height} pixels"))
            elif aspect > self.max_aspect:
                ends.append(Filtered("aspect", f"{where}: {width} x {height} pixels"))
            elif spread < self.min_spread:
                ends.append(Filtered("one_colour", f"{where}: its colours spread over {100 * spread:.1f} %"))
        if ends:
            raise Filtered(ends[0].reason, ends[0].detail, **facts)
        return item.with_facts(**facts)
