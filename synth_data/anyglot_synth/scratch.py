"""`scratch`: temporary folders, in memory where that can be, and `sweep`: those of processes that were killed go.

A folder is named after its process, and after the set of process numbers that it is of, as containers may share memory.
Knows nothing of what lies in them.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_MEMORY = Path("/dev/shm")  # where there is one: a file in memory costs no disk
_NUMBERS = Path("/proc/self/ns/pid")
_PREFIX = f"anyglot-speech-{_NUMBERS.stat().st_ino if _NUMBERS.exists() else 0}-"


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A new folder for a `with` block. Raises `OSError`."""
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=_place())


def sweep() -> None:
    """Removes this user's folders of processes that are no more: they were killed before their blocks ended."""
    for folder in _place().glob(f"{_PREFIX}*"):
        found = re.fullmatch(r"(\d+)-\w+", folder.name.removeprefix(_PREFIX))
        with suppress(OSError):  # another process sweeps, too
            if found and folder.stat().st_uid == os.getuid() and not _runs(int(found[1])):
                shutil.rmtree(folder)


def _place() -> Path:
    return _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
