"""The store: two that make the same object leave one, and both records are true."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.store import Store, StoreError


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_makers_wins(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that never gives the same bytes twice, in two processes at once."""

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    store, records = Store(tmp_path), []

    def second(path: Path) -> None:
        records.append(store.put("ab" * 16, ".bin", lambda other: other.write_bytes(b"first") and None))
        path.write_bytes(b"second")

    records.append(store.put("ab" * 16, ".bin", second))
    assert records == [(f"objects/ab/{'ab' * 16}.bin", sha256(b"first").hexdigest())] * 2
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"first"], "and nothing beside it"


def test_a_whole_file_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process made it after this one had looked; or replaced an empty one while this one waited to."""
    store, key = Store(tmp_path), "ab" * 16
    path = store.path(store.file(key, ".bin"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"first")
    first = (f"objects/ab/{key}.bin", sha256(b"first").hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr(Store, "has", lambda *_: False)
        assert store.put(key, ".bin", lambda other: other.write_bytes(b"second") and None) == first

    path.write_bytes(b"")
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(store.put, key, ".bin", lambda other: other.write_bytes(b"second") and None)
        time.sleep(0.2)
        path.write_bytes(b"first")
        os.close(folder)
        assert later.result() == first
    assert path.read_bytes() == b"first"


def test_objects_that_are_empty_are_made_again_and_damaged_ones_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sound, pixels = np.full(100, 0.5, np.float32), np.zeros((4, 5, 3), np.uint8)
    key = "ab" * 16
    for suffix, put in (
        (".flac", lambda: store.put_sound(key, sound, 16_000)),
        (".png", lambda: store.put_picture(key, pixels)),
    ):
        path = store.path(store.file(key, suffix))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert not store.has(key, suffix)
        assert put() == put() and store.has(key, suffix), "made, and then kept"
        path.write_bytes(b"half")
        with pytest.raises(StoreError, match=f"{key}{suffix}: is damaged .*; delete it and run again"):
            put()
