"""`IllustrateStage`: parts that are pictures or music get their files from a backend.

Which medium a part is comes from the dialogue, what makes it from the configuration. Speech is another stage's
business, and whether a picture shows what it should is a filter's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import IMAGE, MUSIC, Json, MediaFile, Part, Turn, canonical
from anyglot_synth.music import build_music
from anyglot_synth.pictures import build_pictures
from anyglot_synth.seeds import seed_of
from anyglot_synth.stages import Item, Stage
from anyglot_synth.store import Store


class IllustrateStage(Stage):
    """See the module.

    A medium lies in the store under the address of its request, a melody's MIDI file beside it (`.mid`), and what a
    backend noted of how it was made in a `.json` of the same name, written before the medium.

    Args:
        pictures: a backend, or its recipe (`{engine: nanoworld}`); None where no part is a picture.
        music: the same for music.
        seed: of all that is random.
    """

    name = "illustrate"

    def __init__(
        self,
        pictures: Backend | Mapping[str, Any] | str | None = None,
        music: Backend | Mapping[str, Any] | str | None = None,
        seed: int = 0,
    ) -> None:
        self.backends: dict[str, Backend] = {}
        if pictures is not None:
            self.backends[IMAGE] = pictures if isinstance(pictures, Backend) else build_pictures(pictures)
        if music is not None:
            self.backends[MUSIC] = music if isinstance(music, Backend) else build_music(music)
        self.seed = seed

    def config(self) -> Json:
        """Seed and the backends' identities and licences."""
        made = {modality: [backend.identity(), backend.licence] for modality, backend in self.backends.items()}
        return {"seed": self.seed, **made}

    def setup(self) -> None:
        """Loads the backends."""
        for backend in self.backends.values():
            backend.setup()

    def run(self, item: Item, store: Store) -> Item:
        """The item with files for all its pictures and music. Raises `Filtered` or `BackendError` of a backend."""

        def change(i: int, j: int, turn: Turn, part: Part) -> Part:
            if part.modality not in (IMAGE, MUSIC) or part.media is not None:
                return part
            seed = seed_of(self.seed, item.dialogue.id, "illustrate", i, j)
            return replace(part, media=self._media(part, seed, store))

        return replace(item, dialogue=item.dialogue.map_parts(change))

    def _media(self, part: Part, seed: int, store: Store) -> MediaFile:
        backend = self.backends.get(part.modality)
        if backend is None:
            name = "pictures" if part.modality == IMAGE else part.modality
            raise BackendError(f"there is {part.modality} to make and no engine for it; give illustrate its {name}")
        key = backend.key(part.text, {}, seed)
        suffix = ".png" if part.modality == IMAGE else ".flac"
        made = None if store.has(key, suffix) else backend.make(part.text, {}, seed)
        origin = {"licence": backend.licence, **_beside(store, key, made), "backend": backend.identity()}
        origin |= {"text": part.text, **({"seed": seed} if backend.seeded else {})}
        # A file that is there is not written again: then the array does not count.
        array: NDArray[Any] = np.zeros(0) if made is None else made.array
        if part.modality == IMAGE:
            return store.put_picture(key, array, origin)
        return store.put_sound(key, array, (made and made.sample_rate) or 0, origin)


def _beside(store: Store, key: str, made: Made | None) -> Json:
    """Keeps a backend's notes and MIDI file beside the medium (of None they are there); what of it an origin says."""
    if made is not None:
        beside = {".json": canonical(dict(made.notes)).encode() if made.notes else None, ".mid": made.midi}
        for suffix, content in beside.items():
            if content is not None:
                store.put(key, suffix, partial(_write, content))
    noted = store.path(store.file(key, ".json"))
    found: Json = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    return found | ({"midi": store.file(key, ".mid")} if store.has(key, ".mid") else {})


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
