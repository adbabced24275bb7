"""`Store`: files of a dataset by content address, whole or not there, whoever is killed.

`objects/ab/ab...cdef.flac` is named by what was asked for, so a file that is there is never made again. Of two
processes that make the same one the first wins, so engines need not give the same bytes twice: every record states the
hash of what is there. This file makes no media and keeps no list.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.dialogue import MediaFile
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_create

OBJECTS = "objects"


class StoreError(AnyglotError):
    """The dataset's folder cannot be written (full, read-only), or a file of it is damaged."""


class Store:
    """The objects of one dataset folder. Any number of processes may use one folder.

    Args:
        folder: of the dataset; made when needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def file(self, key: str, suffix: str) -> str:
        """Relative path of an object."""
        return f"{OBJECTS}/{key[:2]}/{key}{suffix}"

    def path(self, media: MediaFile | str) -> Path:
        """Where a file of the dataset is."""
        return self.folder / (media if isinstance(media, str) else media.file)

    def has(self, key: str, suffix: str) -> bool:
        """Whether an object is there, and not empty (as a machine that lost power may leave it)."""
        path = self.path(self.file(key, suffix))
        return path.is_file() and path.stat().st_size > 0

    def put(self, key: str, suffix: str, write: Callable[[Path], None]) -> tuple[str, str]:
        """(relative path, sha256) of an object; `write(path)` makes it if it is not there.

        What another process made meanwhile stays, and the hash is that of what is there.

        Raises:
            StoreError: the disk refuses.
        """
        file = self.file(key, suffix)
        path = self.path(file)
        try:
            if not self.has(key, suffix):
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_empty(path)
                with atomic_create(path) as temporary:
                    write(temporary)
            return file, sha256_of(path)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be written ({error.strerror or error}); free some space and run again"
            ) from error

    def put_sound(
        self, key: str, audio: NDArray[np.float32], sample_rate: int, origin: Mapping[str, Any] | None = None
    ) -> MediaFile:
        """Writes float32 `[samples]` (clipped to [-1, 1]) as 16-bit FLAC. Raises `StoreError`."""
        import soundfile

        def write(path: Path) -> None:
            samples = np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)
            encoded = BytesIO()  # libsndfile's own writing tells a full disk from nothing else
            soundfile.write(encoded, samples, sample_rate, format="FLAC", subtype="PCM_16")
            path.write_bytes(encoded.getvalue())

        file, digest = self.put(key, ".flac", write)
        try:
            info = soundfile.info(self.path(file))
        except soundfile.LibsndfileError as error:
            raise StoreError(f"{self.path(file)}: is damaged ({error}); delete it and run again") from error
        return MediaFile(file, digest, origin or {}, info.samplerate, info.frames)

    def put_picture(self, key: str, pixels: NDArray[np.uint8], origin: Mapping[str, Any] | None = None) -> MediaFile:
        """Writes uint8 `[H, W, 3]` as PNG. Of one that is there only the header is read. Raises `StoreError`."""
        from PIL import Image

        file, digest = self.put(key, ".png", lambda path: Image.fromarray(pixels).save(path, format="PNG"))
        try:
            with Image.open(self.path(file)) as made:
                return MediaFile(file, digest, origin or {}, size=made.size)
        except (OSError, SyntaxError, ValueError) as error:
            raise StoreError(f"{self.path(file)}: is damaged ({error}); delete it and run again") from error

    def sound(self, media: MediaFile) -> tuple[NDArray[np.float32], int]:
        """(float32 `[samples]`, sample rate) of a sound of the dataset; of several channels their mean.

        Raises:
            StoreError: it is missing or damaged.
        """
        import soundfile

        path = self.path(media)
        try:
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise StoreError(f"{path}: missing or damaged ({error}); delete it and run again") from error
        return audio.mean(axis=1), rate

    def picture(self, media: MediaFile) -> NDArray[np.uint8]:
        """Pixels uint8 `[H, W, 3]` of a picture of the dataset. Raises `MediaError` (see `read_image`)."""
        from anyglot_tokenizers.media import read_image

        pixels = read_image(self.path(media)).permute(1, 2, 0).numpy()
        return np.round(pixels * 255).astype(np.uint8)


def _remove_empty(path: Path) -> None:
    """Removes an empty file, and never a whole one that another process has put in its place meanwhile."""
    if not path.exists():
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks: then only the moment between looking and removing is open
            fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists() and not path.stat().st_size:
            path.unlink()
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
