"""`PictureFolder` and `MusicFolder`: a medium that fits a description is looked up among captioned files.

Captions come from `captions.jsonl` or `captions.csv` (columns `file`, `caption`, and `licence` if there is one), or
from `NAME.txt` beside each file. The nearest caption is found by its words (BM25); where it holds too few of what was
asked, the item is filtered as "no_match". No embeddings, no download.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import IMAGE, MUSIC, Json
from anyglot_synth.stages import Filtered
from anyglot_synth.store import sha256_of

VERSION = 1
"""Counts changes of what is found."""
_COMMON = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "with",
        "and",
        "or",
        "is",
        "are",
        "was",
        "be",
        "it",
        "its",
        "this",
        "that",
        "some",
        "from",
        "by",
        "as",
        "into",
        "there",
        "very",
    ]
)


def caption_words(text: str) -> list[str]:
    """What is compared: lower-case words without common ones and without a plural's ending."""
    found = (word for word in re.findall(r"\w+", text.casefold()) if word not in _COMMON)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found]


class CaptionIndex:
    """Captions by their words, ranked by BM25 (Robertson & Zaragoza 2009, k1 = 1.2, b = 0.75).

    Args:
        captions: at least one.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        bags = [Counter(caption_words(caption)) for caption in captions]
        mean = max(1.0, sum(bag.total() for bag in bags) / max(1, len(bags)))
        self._postings: dict[str, list[tuple[int, float]]] = {}
        for number, bag in enumerate(bags):
            for word, count in bag.items():
                weight = count * 2.2 / (count + 1.2 * (0.25 + 0.75 * bag.total() / mean))
                self._postings.setdefault(word, []).append((number, weight))
        self._num = len(bags)

    def _rarity(self, word: str) -> float:
        held = max(1, len(self._postings.get(word, ())))  # a word of no caption is as rare as one of a single caption
        return math.log(1 + (self._num - held + 0.5) / (held + 0.5))

    def nearest(self, text: str, num: int = 1) -> list[tuple[int, float, float]]:
        """The best captions: `(number, score, cover)`, best first, the earlier of equals first.

        `cover` is how much of what was asked the caption holds: 0 none of its words, 1 all; rare words count more.
        """
        scores: dict[int, float] = {}
        covers: dict[int, float] = {}
        asked = sorted(set(caption_words(text)))
        total = sum(map(self._rarity, asked))
        for word in asked:
            rarity = self._rarity(word)
            for number, weight in self._postings.get(word, ()):
                scores[number] = scores.get(number, 0.0) + rarity * weight
                covers[number] = covers.get(number, 0.0) + rarity / total
        best = sorted(scores, key=lambda number: (-scores[number], number))[:num]
        return [(number, scores[number], min(1.0, covers[number])) for number in best]


@dataclass(frozen=True)
class Captioned:
    """A file with its caption and licence."""

    path: Path
    caption: str
    licence: str = "unknown"


def read_captions(folder: Path, suffixes: Iterable[str]) -> list[Captioned]:
    """Captioned files of a folder, by name. Raises `BackendError` where there are none or a list is damaged."""
    if not folder.is_dir():
        raise BackendError(f"{folder}: there is no such folder; give one with captioned files")
    found: list[Captioned] = []
    lists = [path for path in (folder / "captions.jsonl", folder / "captions.csv") if path.is_file()]
    for listed in lists[:1]:
        try:
            with open(listed, encoding="utf-8", newline="") as file:
                rows: Iterable[Any] = (
                    csv.DictReader(file)
                    if listed.suffix == ".csv"
                    else (json.loads(line) for line in file if line.strip())
                )
                for row in rows:
                    path = folder / str(row["file"])
                    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                        raise BackendError(f"{listed}: {row['file']!r} is no file of the folder; correct the list")
                    found.append(Captioned(path, str(row["caption"]), str(row.get("licence") or "unknown")))
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise BackendError(
                f"{listed}: not a list of captions ({error!r}); columns are file, caption, licence"
            ) from error
    if not lists:
        for path in sorted(folder.rglob("*")):
            sidecar = path.with_suffix(".txt")
            if path.suffix.lower() in suffixes and sidecar.is_file():
                try:
                    found.append(Captioned(path, sidecar.read_text(encoding="utf-8").strip()))
                except (OSError, ValueError) as error:
                    raise BackendError(f"{sidecar}: not a caption ({error}); save it as text in UTF-8") from error
    if not found:
        raise BackendError(f"{folder}: no captioned files; write captions.jsonl, or NAME.txt beside each file")
    return found


class CaptionedFiles:
    """The files of a folder, looked up by description. Light until first used.

    Args:
        path: folder.
        suffixes: of files with a caption beside them.
        min_cover: least cover of the best caption, 0 to 1, see `CaptionIndex.nearest`.
        choose: files that the seed chooses among, of those that cover enough.
        licence: of files whose list does not say.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        suffixes: Sequence[str],
        min_cover: float = 0.5,
        choose: int = 1,
        licence: str = "unknown",
    ) -> None:
        if not 0 <= min_cover <= 1 or choose < 1:
            raise BackendError(f"min_cover {min_cover}, choose {choose}; use a cover of 0 to 1 and 1 or more files")
        self.folder, self.suffixes = Path(path), tuple(suffixes)
        self.min_cover, self.choose, self.licence = min_cover, choose, licence
        self._files: list[Captioned] = []
        self._index: CaptionIndex | None = None
        self._digest = ""

    def load(self) -> CaptionIndex:
        """Reads the captions, once."""
        if self._index is None:
            self._files = read_captions(self.folder, self.suffixes)
            self._index = CaptionIndex([file.caption for file in self._files])
        return self._index

    def identity(self) -> Json:
        """Of the folder's contents: every caption and every file's bytes, read once."""
        if not self._digest:
            self.load()
            digest = hashlib.sha256()
            for file in self._files:
                name = file.path.relative_to(self.folder).as_posix()
                row = [name, file.caption, file.licence, sha256_of(file.path)]
                digest.update(json.dumps(row).encode())
            self._digest = digest.hexdigest()
        return {"version": VERSION, "files": self._digest, "min_cover": self.min_cover, "choose": self.choose}

    def find(self, text: str, seed: int) -> tuple[Captioned, Json]:
        """A file and how it was found. Raises `Filtered` where no caption is near."""
        near = self.load().nearest(text, self.choose)
        near = [found for found in near if found[2] >= self.min_cover]
        if not near:
            raise Filtered("no_match", f"no caption is near {text[:80]!r}")
        number, score, cover = near[int(np.random.default_rng(seed).integers(len(near)))]
        file = self._files[number]
        licence = self.licence if file.licence == "unknown" else file.licence
        notes = {"file": file.path.relative_to(self.folder).as_posix(), "caption": file.caption, "licence": licence}
        return file, {**notes, "score": round(score, 4), "cover": round(cover, 4)}


class _Folder(Backend):
    """What both folders share; see `CaptionedFiles` for the arguments."""

    name = "folder"
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(
        self, path: str | os.PathLike[str], min_cover: float = 0.5, choose: int = 1, licence: str = "unknown"
    ) -> None:
        self.files = CaptionedFiles(path, self.suffixes, min_cover, choose, licence)
        self.licence, self.seeded = licence, choose > 1

    def identity(self) -> Json:
        """Engine and the folder's contents."""
        return {"engine": self.name, **self.files.identity()}

    def setup(self) -> None:
        """Reads the captions."""
        self.files.load()


class PictureFolder(_Folder):
    """Pictures of a folder, as they are."""

    modality = IMAGE
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """The picture whose caption is nearest. Raises `Filtered` ("no_match"), `MediaError` for a damaged one."""
        from anyglot_tokenizers.media import read_image

        file, notes = self.files.find(text, seed)
        pixels = read_image(file.path).permute(1, 2, 0).numpy()
        return Made(np.round(pixels * 255).astype(np.uint8), notes=notes)


class MusicFolder(_Folder):
    """Sounds of a folder, at their own sample rate; of several channels the mean."""

    modality = MUSIC
    suffixes = (".wav", ".flac", ".ogg", ".mp3")

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """The sound whose caption is nearest. Raises `Filtered` ("no_match"), `BackendError` for a damaged one."""
        import soundfile

        file, notes = self.files.find(text, seed)
        try:
            audio, rate = soundfile.read(file.path, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise BackendError(f"{file.path}: not a sound ({error}); replace or remove it") from error
        return Made(audio.mean(axis=1), rate, notes)
