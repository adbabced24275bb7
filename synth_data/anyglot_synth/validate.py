"""`validate`: whether a finished dataset folder is whole: every line, every id, every file.

Each line must be a dialogue whose id is its content address, in source order, no item twice. Each file that a line
names is hashed once and its header read. Files that nobody names are listed (a run that was killed, or items that
failed later, leave such): they do no harm and are no fault. Reads all media once; writes and repairs nothing.

In memory are a digest a file and the problems, of which only the first `MAX_PROBLEMS` are kept.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyglot_synth.dataset import (
    ERRORS,
    REJECTS,
    SAMPLES,
    STATUS_OF,
    DatasetError,
    is_inside,
    media_of,
    read_item,
    read_job,
)
from anyglot_synth.dialogue import MediaFile
from anyglot_synth.report import REPORT
from anyglot_synth.stages import Item
from anyglot_synth.store import OBJECTS, sha256_of

MAX_PROBLEMS = 1000
_ORIENTATION = 0x0112  # of EXIF; from 5 on width and height change places


@dataclass(frozen=True)
class Problem:
    """One fault.

    Args:
        kind: "job", "line", "id", "order", "twice", "name", "missing", "hash", "header" or "report".
        where: the file, and the line where it has lines.
        detail: one line.
    """

    kind: str
    where: str
    detail: str


@dataclass
class Report:
    """What `validate` found.

    Attributes:
        counts: items by status.
        files, bytes: different media files that are named, and their size on disk.
        problems: the first of them; `num_problems` are all, by kind.
        extra: files below `objects/` that nobody names, the first of them; `num_extra` are all.
        without_file: parts of samples that are to be heard or seen and have no file.
    """

    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    num_problems: Counter[str] = field(default_factory=Counter)
    extra: list[str] = field(default_factory=list)
    num_extra: int = 0
    without_file: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether there is no problem."""
        return not self.num_problems

    @property
    def exit_code(self) -> int:
        """0 for a whole dataset, 2 for one with problems."""
        return 0 if self.is_whole else 2

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "folder": str(self.folder),
            "whole": self.is_whole,
            "counts": dict(sorted(self.counts.items())),
            "files": self.files,
            "bytes": self.bytes,
            "without_file": self.without_file,
            "num_problems": dict(sorted(self.num_problems.items())),
            "problems": [vars(problem) for problem in self.problems],
            "num_extra": self.num_extra,
            "extra": self.extra,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        counted = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items())) or "no items"
        yield f"{self.folder}: {counted}; {self.files} files of {self.bytes / 1e6:.1f} MB"
        if self.without_file:
            yield f"{self.without_file} parts have no file (nothing in the recipe makes them)"
        if self.num_extra:
            yield f"{self.num_extra} files that nobody names, such as {self.extra[0]}"
        for problem in self.problems:
            yield f"{problem.kind}: {problem.where}: {problem.detail}"
        hidden = self.num_problems.total() - len(self.problems)
        yield f"and {hidden} more problems" if hidden else "whole" if self.is_whole else "not whole"

    def add(self, kind: str, where: str, detail: str) -> None:
        """Notes a problem."""
        self.num_problems[kind] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(kind, where, detail))


def validate(folder: str | os.PathLike[str]) -> Report:
    """Checks a dataset folder; see the module.

    Raises:
        DatasetError: there is no `samples.jsonl` in it.
    """
    folder = Path(folder)
    if not (folder / SAMPLES).is_file():
        raise DatasetError(f"{folder / SAMPLES}: no such file; give the folder of a finished dataset")
    report = Report(folder)
    try:
        read_job(folder)
    except DatasetError as error:
        report.add("job", str(folder), str(error))
    found = _Found()
    for name in (SAMPLES, REJECTS, ERRORS):
        _check_list(report, name, found)
    _check_objects(report, found)
    _check_report(report)
    return report


@dataclass
class _Found:
    """What the lists have named so far: sha256 by file (None: not there), indices, and files that origins mention."""

    digests: dict[str, str | None] = field(default_factory=dict)
    indices: set[int] = field(default_factory=set)
    mentioned: set[str] = field(default_factory=set)


def _check_list(report: Report, name: str, found: _Found) -> None:
    path, last = report.folder / name, -1
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{name}, line {number}"
            try:
                item = read_item(line, STATUS_OF[name], where)
            except DatasetError as error:
                report.add("line", where, str(error).removeprefix(f"{where}: "))
                continue
            report.counts[item.status] += 1
            if item.index <= last:
                report.add("order", where, f"index {item.index} comes after {last}")
            if item.index in found.indices:
                report.add("twice", where, f"index {item.index} is there already")
            found.indices.add(item.index)
            last = max(last, item.index)
            _check_id(report, where, line, item)
            for medium in media_of(item.dialogue):
                _check_file(report, where, medium.file, found.digests)
                _check_origin(report, where, medium.file, found)
            if name == SAMPLES:
                parts = (part for turn in item.dialogue.turns for part in turn.parts)
                report.without_file += sum(part.modality != "text" and part.media is None for part in parts)


def _check_id(report: Report, where: str, line: bytes, item: Item) -> None:
    written = json.loads(line).get("id")
    if item.dialogue.turns and written != item.dialogue.id:
        report.add("id", where, f"its id is {written!r:.80}, its content's {item.dialogue.id!r}")


def _check_file(report: Report, where: str, media: MediaFile, digests: dict[str, str | None]) -> None:
    """Compares a file with one record of it; what is wrong with the file itself is said once."""
    if not is_inside(media.file):
        report.add("name", where, f"{media.file!r:.200} leads out of the folder")
        return
    path = report.folder / media.file
    if media.file not in digests:
        digests[media.file] = sha256_of(path) if path.is_file() else None
        if digests[media.file] is None:
            report.add("missing", where, f"{media.file} is not there")
        else:
            report.files, report.bytes = report.files + 1, report.bytes + path.stat().st_size
            if problem := _header_problem(path, media):
                report.add("header", where, f"{media.file} {problem}")
    if digests[media.file] not in (None, media.sha256):
        report.add("hash", where, f"{media.file} has sha256 {digests[media.file]}, its record {media.sha256:.80}")


def _check_origin(report: Report, where: str, media: MediaFile, found: _Found) -> None:
    """Whether the files that an origin names (the sound before a stage, a score) are there; each is said once.

    Media that was given, or taken from another dataset, keeps the origin that it had, whose files stayed there.
    """
    taken = media.origin.get("given") or str(media.origin.get("name")).startswith(f"{OBJECTS}/")
    for file in media.origin.values():
        if not isinstance(file, str) or not file.startswith(f"{OBJECTS}/") or file in found.mentioned:
            continue
        found.mentioned.add(file)
        if not is_inside(file):
            report.add("name", where, f"{file!r:.200} leads out of the folder")
        elif not taken and not (report.folder / file).is_file():
            report.add("missing", where, f"{file}, which the origin of {media.file} names, is not there")


def _header_problem(path: Path, media: MediaFile) -> str:
    """What the file itself says against its record; "" for nothing."""
    if media.num_samples is not None:
        import soundfile

        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError as error:
            return f"is no sound file ({error})"
        found, noted = (info.samplerate, info.frames), (media.sample_rate, media.num_samples)
        if found != noted:
            return f"has sample rate and number of samples {found}, its record {noted}"
    elif media.size is not None:
        from PIL import Image

        try:
            with Image.open(path) as image:
                size = image.size
                if size != media.size and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8):
                    size = size[::-1]  # a record has the size as the picture is seen
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"is no picture ({error})"
        if size != media.size:
            return f"is of {size} pixels, its record of {media.size}"
    return ""


def _check_objects(report: Report, found: _Found) -> None:
    """Lists files that nobody names. A score or notes belong to the medium of the same name."""
    named = found.digests.keys() | found.mentioned
    stems = {os.path.splitext(file)[0] for file in named}
    for top, folders, names in os.walk(report.folder / OBJECTS):
        folders.sort()
        for name in sorted(names):
            path = Path(top) / name
            file = path.relative_to(report.folder).as_posix()
            if file in named or (path.suffix in (".mid", ".json") and os.path.splitext(file)[0] in stems):
                continue
            report.num_extra += 1
            if len(report.extra) < MAX_PROBLEMS:
                report.extra.append(file)


def _check_report(report: Report) -> None:
    path = report.folder / REPORT
    if not path.is_file():
        return
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))["counts"]
        counts = {status: count for status, count in counts.items() if count}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.add("report", REPORT, f"is no report ({error!r})")
        return
    if counts != dict(report.counts):
        report.add("report", REPORT, f"counts {counts}, the lists {dict(report.counts)}; write it again")
