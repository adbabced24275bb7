"""Names of model weights for content addresses: of a folder the sha256 of its files, of the hub name and revision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from anyglot_synth.store import sha256_of

_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


def weights_identity(
    model: str | os.PathLike[str], revision: str | None = None, files: Sequence[str] | None = None
) -> str:
    """What a model's weights are.

    Args:
        model: a folder, or a name of the hub, whose newest version is not looked up: give a revision (a commit).
        revision: of a name of the hub.
        files: names in the folder that count; None takes all that such models are read from.

    Raises:
        FileNotFoundError: one of `files` is not there.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'newest'}"
    if files is None:
        found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in _READ]
        files = [path.relative_to(folder).as_posix() for path in found]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {sha256_of(folder / name)}\n".encode())
    return digest.hexdigest()
