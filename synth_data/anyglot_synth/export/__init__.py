"""`export`: finished samples in the forms that others read: WebDataset, `datasets` of Hugging Face, parquet.

An export stands on its own: it holds copies of the media, whose bytes are compared with their records, and a dataset
card. It appears whole or not at all. The same dataset gives the same bytes. Rejected items are never exported.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyglot_synth.card import CARD, card
from anyglot_synth.dataset import DatasetError
from anyglot_synth.export import folders, tables, tars
from anyglot_synth.licences import check_licences
from anyglot_synth.report import make_report
from anyglot_tokenizers.files import atomic_write

EXPORTERS: dict[str, Callable[..., int]] = {
    "webdataset": tars.export_tars,
    "audiofolder": folders.export_audio,
    "imagefolder": folders.export_images,
    "parquet": tables.export_parquet,
}
"""Name of a form -> function(dataset folder, new folder, **options) that returns the number of rows."""


@dataclass(frozen=True)
class Exported:
    """What an export holds: `rows` are samples, or utterances and pictures in the folder forms."""

    out: Path
    to: str
    rows: int
    files: int
    bytes: int


def export(
    folder: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    allow_licences: Collection[str] = (),
    **options: Any,
) -> Exported:
    """Write the samples of a dataset folder to `out`.

    Args:
        folder: of the finished dataset.
        to: "webdataset", "audiofolder", "imagefolder" or "parquet".
        out: a new folder, or an empty one.
        allow_licences: licences that are taken though they are unknown or restrict use; "any" takes all.
        **options: of the form, see `EXPORTERS`.

    Raises:
        DatasetError: an unknown form or option, a licence that is not open, a file that is missing or differs from its
            record, nothing to export, or `out` holds something.
    """
    folder, out = Path(folder), Path(out)
    if to not in EXPORTERS:
        raise DatasetError(f"there is no form {to!r}; use one of {', '.join(EXPORTERS)}")
    known = [p.name for p in inspect.signature(EXPORTERS[to]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(known)):
        raise DatasetError(f"{to} has no option {unknown[0]!r}; use some of {', '.join(known) or 'none'}")
    with new_folder(out) as temporary:
        check_licences(folder, allow_licences)
        rows = EXPORTERS[to](folder, temporary, **options)
        if not rows:
            raise DatasetError(f"{folder}: its samples hold nothing for {to}; choose another form")
        with atomic_write(temporary / CARD) as path:
            path.write_text(card(folder, make_report(folder), form=to), encoding="utf-8")
        files = [path for path in temporary.rglob("*") if path.is_file()]
        done = Exported(out, to, rows, len(files), sum(path.stat().st_size for path in files))
    return done


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends, and vanishes when it fails.

    Raises:
        DatasetError: something is at `path` already, but for an empty folder; or a folder cannot be put there.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DatasetError(f"{path}: exists already; export to another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        try:
            if path.exists():  # somebody may be in it: it stays
                for part in temporary.iterdir():
                    os.rename(part, path / part.name)
                temporary.rmdir()
            else:
                os.rename(temporary, path)
        except OSError as error:
            raise DatasetError(f"{path}: cannot be replaced ({error.strerror}); export to another folder") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
