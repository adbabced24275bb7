"""Backends that make pictures of descriptions, by the names that recipes use."""

from __future__ import annotations

from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.engines import build

BACKENDS = {
    "nanoworld": "anyglot_synth.pictures.nanoworld:NanoworldPictures",
    "diffusers": "anyglot_synth.pictures.diffusion:DiffusersPictures",
    "folder": "anyglot_synth.folder:PictureFolder",
}


def build_pictures(config: Any) -> Backend:
    """A backend from a recipe, such as `{engine: folder, path: photos}`. Raises `AnyglotError` naming the choices."""
    backend: Backend = build(BACKENDS, config, "pictures")
    return backend
