"""Media that come with data -> objects of the store: checked, named by the sha256 of their bytes.

PNG, JPEG and WebP are kept byte for byte, and so is FLAC of one channel and 16 bits; other pictures become PNG, other
sounds such FLAC (several channels: their mean). Nothing is resized or resampled. Their origin says `given`.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.dialogue import MediaFile, address
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import MediaError
from anyglot_tokenizers.media import MediaBytes, read_image

MAX_BYTES = 512 << 20
"""Of one file."""
MAX_SAMPLES = 1 << 27
"""Of one sound, over all channels: 46 minutes at 48 kHz. Silence packs so well that bytes say little."""
_KEPT = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


def take_picture(store: Store, given: Any, folder: Path, origin: Mapping[str, Any] | None = None) -> MediaFile:
    """A picture of the data as an object of the store.

    Args:
        store: where it goes.
        given: a path relative to `folder`, `MediaBytes`, or what `datasets` gives: {"bytes": ..., "path": ...}.
        folder: that it must be in.
        origin: where it is from; its name is added.

    Raises:
        MediaError: it is missing, outside of the folder, damaged, or no picture.
    """
    from PIL import Image

    data = media_bytes(given, folder)
    height, width = read_image(data).shape[1:]
    with Image.open(io.BytesIO(data.content)) as picture:
        suffix = _KEPT.get(picture.format or "")
    key = address(["picture", _digest(data.content)])
    origin = _given(data.name, origin)
    if suffix is None:
        pixels = np.round(read_image(data).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        return store.put_picture(key, pixels, origin)
    file, digest = store.put(key, suffix, lambda path: _write(path, data.content))
    return MediaFile(file, digest, origin, size=(int(width), int(height)))


def take_sound(store: Store, given: Any, folder: Path, origin: Mapping[str, Any] | None = None) -> MediaFile:
    """A sound of the data as FLAC in the store; arguments and errors as of `take_picture`."""
    import soundfile

    data = media_bytes(given, folder)
    key = address(["sound", _digest(data.content)])
    try:
        info = soundfile.info(io.BytesIO(data.content))
        if info.frames * info.channels > MAX_SAMPLES:
            samples = f"{info.channels} x {info.frames} samples"
            raise MediaError(data.name, f"it has {samples}, {MAX_SAMPLES} are the limit", "cut it into shorter ones")
        audio, rate = soundfile.read(io.BytesIO(data.content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise MediaError(data.name, f"no sound that can be read ({error})", "give WAV, FLAC, OGG or MP3") from None
    if not len(audio) or not np.isfinite(audio).all():
        raise MediaError(data.name, "it has no samples, or some that are no numbers", "leave it out")
    origin = _given(data.name, origin)
    if (info.format, info.subtype, info.channels) == ("FLAC", "PCM_16", 1):
        file, digest = store.put(key, ".flac", lambda path: _write(path, data.content))
        return MediaFile(file, digest, origin, info.samplerate, info.frames)
    return store.put_sound(key, audio.mean(axis=1), rate, origin)


def media_bytes(given: Any, folder: Path) -> MediaBytes:
    """The bytes of a file of the data, and its name. Raises `MediaError`."""
    if isinstance(given, Mapping):
        content, path = given.get("bytes"), given.get("path")
        if isinstance(content, bytes):
            return MediaBytes(str(path or "a medium in a table"), content)
        given = path
    if isinstance(given, MediaBytes):
        return given
    if not isinstance(given, str) or not given:
        raise MediaError(f"{given!r:.80}", "it names no file", "give a path relative to the data's folder")
    top = Path(os.path.abspath(folder))  # "../x" is outside of "." only where both are whole
    path = Path(os.path.abspath(top / given))
    if not path.is_relative_to(top):
        raise MediaError(given, f"it is outside of {top.name!r}", "give a path inside of the folder of media")
    return file_bytes(path, given)


def file_bytes(path: Path, name: str) -> MediaBytes:
    """The bytes of a file, under a name. Raises `MediaError` where it is none, cannot be read or is too big."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise MediaError(name, "it is a folder or a device, not a file", "check the path")
        if found.st_size > MAX_BYTES:
            raise MediaError(name, f"it has {found.st_size} bytes", f"{MAX_BYTES} are the limit")
        return MediaBytes(name, path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        why = getattr(error, "strerror", None) or error
        raise MediaError(name, f"it cannot be read ({why})", "check the path") from None


def _given(name: str, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where a file is from: a made one of a dataset that is read again stays a made one."""
    known = {"name": name, **(origin or {})}
    return known if "backend" in known else {**known, "given": True}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
