"""Backends that make pictures of descriptions, by the names that recipes use."""

from __future__ import annotations

from typing import Any

from anyglot_synth.backends import Backend
from anyglot_synth.registry import Registry
from anyglot_tokenizers.errors import AnyglotError

BACKENDS: Registry[Backend] = Registry(
    "picture engine",
    AnyglotError,
    {
        "nanoworld": "anyglot_synth.pictures.nanoworld:NanoworldPictures",
        "diffusers": "anyglot_synth.pictures.diffusion:DiffusersPictures",
        "folder": "anyglot_synth.folder:PictureFolder",
    },
    key="engine",
)
"""Name in a recipe -> class, imported on first use."""


def build_pictures(config: Any) -> Backend:
    """A backend from a recipe, such as `{engine: folder, path: photos}`. Raises `AnyglotError` naming the choices."""
    return BACKENDS.make(config, "pictures")
