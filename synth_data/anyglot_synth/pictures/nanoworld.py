"""Pictures of nanoworld: a description is read by `nanoworld.language.parse` and drawn, with a little jitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import IMAGE, Json
from anyglot_synth.nanoworld.draw import SIZE, draw
from anyglot_synth.nanoworld.language import parse
from anyglot_synth.nanoworld.scene import Scene

VERSION = 1
"""Counts changes of what is drawn."""


class NanoworldPictures(Backend):
    """Draws scenes; places vary by a pixel with the seed.

    Args:
        size: side of a picture in pixels, 32 or more.
    """

    modality = IMAGE
    name = "nanoworld"
    licence = "CC0-1.0"

    def __init__(self, size: int = SIZE) -> None:
        if size < SIZE // 2:
            raise BackendError(f"nanoworld pictures: size {size} is too small; use {SIZE // 2} or more")
        self.size = size

    def identity(self) -> Json:
        """Name, version, size."""
        return {"engine": self.name, "version": VERSION, "size": self.size}

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """A picture of `style["scene"]`, if there is one, else of the description."""
        return Made(draw(scene_of(text, style), np.random.default_rng(seed), self.size))


def scene_of(text: str, style: Mapping[str, Any]) -> Scene:
    """The scene of a request. Raises `BackendError` where there is none."""
    try:
        scene = Scene.from_dict(style["scene"]) if "scene" in style else parse(text)
    except ValueError as error:
        raise BackendError(f"nanoworld: {error}") from None
    if scene is None:
        raise BackendError(f"nanoworld: {text[:80]!r} describes no scene; write as `nanoworld.describe` does")
    return scene
