"""Files that are either whole or not there: atomic files and folders, JSON, and sha256.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file under a temporary name in the same folder, then renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `ManifestError` naming the file if it is missing or broken."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ManifestError(f"{path}: is no JSON ({error}); write it again") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: holds no JSON object; write it again")
    return content


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, keep: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends, and vanishes when it fails.

    If `path` has come to exist meanwhile and `keep(path)` is true, it stays and the new folder vanishes.

    Raises:
        ManifestError: `path` exists and is not an empty folder, without `overwrite`; also if it came meanwhile.
    """
    path = Path(path)
    if keep is None or not keep(path):
        try:
            check_free(path, overwrite=overwrite)
        except ManifestError:
            if keep is None or not keep(path):  # it may have come since we looked
                raise
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:  # something is there
            if keep is not None and keep(path):
                shutil.rmtree(temporary)
            else:
                check_free(path, overwrite=overwrite)
                replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises `ManifestError` if `path` exists and is not an empty folder, unless `overwrite`."""
    if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ManifestError(
            f"{path}: exists already; choose another folder or overwrite it on purpose (overwrite=True)"
        )


def replace_folder(temporary: Path, path: Path) -> None:
    """Moves the folder `temporary` to `path`; what was there is moved aside first and then deleted."""
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        os.replace(path, old)
    os.replace(temporary, path)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(content: Any) -> str:
    """sha256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
