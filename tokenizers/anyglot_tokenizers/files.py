"""`atomic_write` and `atomic_create`: a file is either not there (or the old one) or complete, whoever is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What the system says when it is the disk that refuses, whatever is written."""
STALE = 3600.0  # seconds without a write after which a temporary file is nobody's
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp(?:\.[^.]+)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` (same suffix); rename it to `path` on success, delete it on error.

    Safe against a kill at any moment, not against loss of power (no fsync). Where the disk refuses, or there is no such
    folder, the `OSError` names the file.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_create(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_write`, but a `path` that has come meanwhile stays as it is: of several processes the first one wins.

    Where the file system has no hard links, a lock on the folder keeps the processes of one machine apart.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        yield temporary
        try:
            os.link(temporary, target)
        except FileExistsError:
            return
        except OSError:  # exFAT, some mounted clouds; what else is wrong is said again by the renaming
            _rename_first(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_first(temporary: Path, target: Path) -> None:
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks either: then only the moment between looking and renaming is open
            fcntl.flock(folder, fcntl.LOCK_EX)
        if not target.exists():
            os.rename(temporary, target)
    finally:
        os.close(folder)


def is_temporary(path: Path) -> bool:
    """Whether a file has such a name as is given here: it was left by a process that was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path, pattern: str) -> None:
    """Delete the temporary files, named as here and by `pattern`, that nobody has written to for an hour: those of
    processes that were killed, not those of one that runs at the same time.
    """
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if is_temporary(path) and time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _temporary(target: Path) -> Path:
    if not target.parent.is_dir():  # else the error would name the temporary file
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}", str(target))
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
