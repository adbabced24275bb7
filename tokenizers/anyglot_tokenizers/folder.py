"""Folders of media for training: found, decoded once, split by content, and read from a memory-mapped cache.

The cache is `media-*.bin` (pixels as uint8 `[H, W, 3]`, sounds as int16 `[C, samples]`, one after another) and
`index.jsonl`, and is made again when a file or a setting changes. A file that cannot be used is left out with its
reason in `errors.jsonl`. The split looks at decoded content, so that two files with the same picture or sound are never
on both sides. Nothing here knows a model or draws at random.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.errors import ManifestError, MediaError
from anyglot_tokenizers.files import atomic_write, sweep
from anyglot_tokenizers.media import read_audio, read_image

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
AUDIO_FILES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")
ERRORS = "errors.jsonl"
INDEX = "index.jsonl"
BLOCK = 64  # files decoded before any of them is written
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Split:
    """Which files are never trained on.

    Args:
        held_out: file patterns, such as `*/jackson/*` or `*_jackson_*`; a file whose path below the folder fits one
            is held out. Without patterns a share of all files is.
        share: of the files (or groups) held out where there is no pattern.
        group: regular expression searched in the path below the folder; files with the same first group (or match) are
            held out together, such as `^(\\d+)-` for speakers, `^(.*)/` for folders. Without it each content is alone.
    """

    held_out: tuple[str, ...] = ()
    share: float = 0.1
    group: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ManifestError(f"split share {self.share} must lie between 0 and 1")
        try:
            re.compile(self.group)
        except re.error as error:
            raise ManifestError(f"split group {self.group!r} is no regular expression ({error})") from error

    def holds_out(self, name: str, content: str) -> bool:
        """Whether the file `name` (path below its folder) with sha256 `content` is held out."""
        if self.held_out:
            return any(fnmatch.fnmatch(name, pattern) for pattern in self.held_out)
        return self._place(name, content) < self.share

    def held_out_of(self, items: Sequence[Item]) -> list[Item]:
        """The items held out; of few items or groups, where chance would leave none, the one that is nearest to it."""
        held = [item for item in items if self.holds_out(item.name, item.sha256)]
        if held or self.held_out or not items:
            return held
        places = [self._place(item.name, item.sha256) for item in items]
        return [item for item, place in zip(items, places, strict=True) if place == min(places)]

    def _place(self, name: str, content: str) -> float:
        """A number in [0, 1) that depends on the group alone, or on the content of a file without one."""
        match = re.search(self.group, name) if self.group else None
        key = content if match is None else f"group {match[1] if match.re.groups else match[0]}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") / 2**32


@dataclass(frozen=True)
class Item:
    """One decoded file in the cache: its path below its folder, where its samples are, and their sha256."""

    name: str
    offset: int
    shape: tuple[int, ...]
    sha256: str


class FolderMedia:
    """A `MediaSet` in a memory-mapped file: some items of a cache."""

    def __init__(self, path: Path, items: Sequence[Item], is_image: bool) -> None:
        self.items = list(items)
        self.is_image = is_image
        self.channels = 3 if is_image else items[0].shape[0]
        self.fingerprint = hashlib.sha256("".join(item.sha256 for item in items).encode()).hexdigest()
        self._dtype = np.dtype(np.uint8 if is_image else np.int16)
        self._path = path
        self._bytes = np.memmap(path, mode="c")  # copy-on-write: torch wants writable memory, nobody writes

    def __reduce__(self) -> Any:
        """Another process maps the file again, instead of being sent its content."""
        return FolderMedia, (self._path, self.items, self.is_image)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Tensor:
        item = self.items[index]
        end = item.offset + math.prod(item.shape) * self._dtype.itemsize
        return torch.from_numpy(self._bytes[item.offset : end].view(self._dtype).reshape(item.shape))


def image_folder(
    folders: Sequence[PathLike],
    cache: PathLike,
    split: Split,
    *,
    side: int,
    workers: int = 2,
) -> tuple[FolderMedia, FolderMedia]:
    """(training, held-out) pictures below `folders`; larger ones are scaled down to `side` pixels on the shorter side.

    The middle of a picture more than twice as long as wide is taken. See `Split` for what is held out. Raises
    ManifestError if a folder is missing or one of the two parts would be empty.
    """

    def decode(path: Path) -> np.ndarray:
        pixels_HWC = (read_image(path) * 255).round().byte().permute(1, 2, 0).numpy()
        return _fitted(pixels_HWC, side)

    settings = {"kind": "image", "side": side}
    return _cached(folders, Path(cache), split, IMAGE_FILES, settings, decode, workers)


def audio_folder(
    folders: Sequence[PathLike],
    cache: PathLike,
    split: Split,
    *,
    sample_rate: int,
    channels: int = 1,
    max_seconds: float = 600.0,
    workers: int = 2,
) -> tuple[FolderMedia, FolderMedia]:
    """(training, held-out) sounds below `folders`, at `sample_rate` and with `channels`, as `read_audio` gives them.

    Raises ManifestError if a folder is missing or one of the two parts would be empty.
    """

    def decode(path: Path) -> np.ndarray:
        audio_CS = read_audio(path, sample_rate=sample_rate, channels=channels, max_seconds=max_seconds).numpy()
        return (audio_CS * 32768).round().clip(-32768, 32767).astype(np.int16)

    settings = {"kind": "audio", "sample_rate": sample_rate, "channels": channels, "max_seconds": max_seconds}
    return _cached(folders, Path(cache), split, AUDIO_FILES, settings, decode, workers)


def _fitted(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    height, width = pixels_HWC.shape[:2]
    short = min(height, width)
    if max(height, width) > 2 * short:
        top, left = max(height - 2 * short, 0) // 2, max(width - 2 * short, 0) // 2
        pixels_HWC = pixels_HWC[top : top + 2 * short, left : left + 2 * short]
        height, width = pixels_HWC.shape[:2]
    if short > side:
        size = (max(side, round(width * side / short)), max(side, round(height * side / short)))
        pixels_HWC = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels_HWC)).resize(size, Image.Resampling.BICUBIC)
        )
    return np.ascontiguousarray(pixels_HWC)


def _cached(
    folders: Sequence[PathLike],
    cache: Path,
    split: Split,
    suffixes: Sequence[str],
    settings: dict[str, object],
    decode: Callable[[Path], np.ndarray],
    workers: int,
) -> tuple[FolderMedia, FolderMedia]:
    files = _files(folders, suffixes)
    stamps = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
    key = hashlib.sha256(json.dumps([settings, stamps]).encode()).hexdigest()
    data = cache / f"media-{key[:16]}.bin"
    items = _read_index(cache, key)
    if items is None or not data.is_file():
        items = _decode_all(files, cache, data, key, decode, workers)
    held = split.held_out_of(items)
    contents = {item.sha256 for item in held}
    train = [item for item in items if item.sha256 not in contents]
    if not train or not held:
        raise ManifestError(
            f"{', '.join(map(str, folders))}: of {len(files)} files {len(files) - len(items)} could not be used (see "
            f"{cache / ERRORS}), {len(train)} are left to train on, {len(held)} held out; both need one: change --split"
        )
    is_image = settings["kind"] == "image"
    return FolderMedia(data, train, is_image), FolderMedia(data, held, is_image)


def _files(folders: Sequence[PathLike], suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    found = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise ManifestError(f"{folder}: no such folder; give a folder of media with --data")
        found += files_below(Path(folder), suffixes)
    if not found:
        raise ManifestError(f"{', '.join(map(str, folders))}: holds no {', '.join(suffixes)} files; check --data")
    return sorted(found)


def files_below(root: Path, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(path below `root`, path) of all files with one of the suffixes, sorted; hidden ones are passed over."""
    found = []
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if path.suffix.lower() in suffixes and path.is_file() and not any(p.startswith(".") for p in name.parts):
            found.append((name.as_posix(), path))
    return sorted(found)


def _decode_all(
    files: Sequence[tuple[str, Path]],
    cache: Path,
    data: Path,
    key: str,
    decode: Callable[[Path], np.ndarray],
    workers: int,
) -> list[Item]:
    def attempt(file: tuple[str, Path]) -> np.ndarray | str:
        try:
            return decode(file[1])
        except (MediaError, OSError, ValueError, MemoryError) as error:
            return str(error)

    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache, ".media-*")
    items, errors, offset = [], [], 0
    with atomic_write(data) as temporary, temporary.open("wb") as sink, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), BLOCK):  # block by block, so that not all is in memory at once
            block = files[start : start + BLOCK]
            for (name, path), content in zip(block, pool.map(attempt, block), strict=True):
                if isinstance(content, str):
                    errors.append({"file": str(path), "reason": content})
                    continue
                digest = hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()
                items.append(Item(name, offset, content.shape, digest))
                offset += sink.write(content.tobytes())
        sink.write(b"\0" * 2)  # a file of no bytes cannot be mapped
    for old in cache.glob("media-*.bin"):
        if old != data:
            old.unlink()  # of other settings or files
    for name, lines in ((ERRORS, errors), (INDEX, [{"key": key}, *map(asdict, items)])):
        with atomic_write(cache / name) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return items


def _read_index(cache: Path, key: str) -> list[Item] | None:
    """The items of a cache made with this key, else None."""
    try:
        head, *lines = (cache / INDEX).read_text(encoding="utf-8").splitlines()
        if json.loads(head)["key"] != key:
            return None
        return [Item(**{**entry, "shape": tuple(entry["shape"])}) for entry in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
