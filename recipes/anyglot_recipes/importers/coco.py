"""COCO captions: a JSON with `images` and `annotations`, and a folder of pictures, as rows of `text` and `image`.

A row is a caption; the captions of a picture follow each other, so that whoever encodes it can do so once. The JSON is
held in memory whole (captions_train2017.json: 90 MB). No picture is opened here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anyglot_recipes.importers.rows import BadRow, Row, RowError, fixed_columns, inside, renamed
from anyglot_tokenizers.errors import ManifestError


def caption_files(folder: Path) -> list[Path]:
    """`captions_*.json` of the folder, or of `annotations` in it."""
    return sorted(folder.glob("captions_*.json")) or sorted((folder / "annotations").glob("captions_*.json"))


def image_folder(path: Path) -> Path:
    """Where the pictures of a captions file lie: `val2017` or `images` (or `images/val2017`) beside it or one up."""
    split = path.stem.removeprefix("captions_")
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    for candidate in (root / split, root / "images" / split, root / "images"):
        if candidate.is_dir():
            return candidate
    return root


def read_coco(path: Path, columns: Mapping[str, str], images: Path | None = None) -> Iterator[Row | RowError]:
    """A row per caption, numbered by its place in `annotations`; pictures in the order of `images`.

    Args:
        path: the captions file.
        columns: `text` and `image` may be renamed or ignored.
        images: the folder of the pictures, if it is not where `image_folder` looks.

    Raises:
        ManifestError: the file is missing, no JSON, or lacks `images` or `annotations`.
    """
    fixed_columns(path, ("text", "image"), columns)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not JSON ({error}); get it again") from error
    pictures, annotations = (content.get(k) if isinstance(content, dict) else None for k in ("images", "annotations"))
    if not (isinstance(pictures, list) and isinstance(annotations, list) and pictures and annotations):
        raise ManifestError(f'{path}: is no COCO captions file; it needs the lists "images" and "annotations"')
    folder = images if images is not None else image_folder(path)
    files: dict[Any, Path | str] = {}
    for entry in pictures:
        try:
            key = _id_of(entry, "id")
            if key in files:
                raise BadRow(f"{key!r} is there twice; the first counts")
        except BadRow as error:
            yield RowError(str(path), 0, str(path), f"entry of images: {error}")
            continue
        try:
            files[key] = inside(folder, _field(entry, "file_name"))
        except BadRow as error:
            files[key] = str(error)
    captions: defaultdict[Any, list[tuple[int, str]]] = defaultdict(list)
    for number, entry in enumerate(annotations, start=1):
        try:
            image_id, caption = _id_of(entry, "image_id"), _field(entry, "caption")
            if image_id not in files:
                raise BadRow(f"image {image_id!r} is not among images")
            captions[image_id].append((number, caption.strip()))
        except BadRow as error:
            yield RowError(str(path), number, str(path), f"annotation: {error}")
    del content, pictures, annotations
    for image_id, file in files.items():
        for number, caption in captions.get(image_id, []):
            if isinstance(file, str):
                yield RowError(str(path), number, str(path), f"image {image_id!r}: {file}")
                continue
            values = renamed({"text": caption, "image": file}, columns)
            text = values.pop("text", None)
            media = {modality: name for modality, name in values.items() if isinstance(name, Path)}
            yield Row(str(path), number, text if isinstance(text, str) else None, media)


def _field(entry: object, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{entry!r:.80} lacks {key!r}")
    return value


def _id_of(entry: object, key: str) -> int | str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int | str):
        raise BadRow(f"{entry!r:.80} lacks {key!r}")
    return value
