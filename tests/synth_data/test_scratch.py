"""Temporary folders in memory: what processes that were killed left there goes, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from anyglot_synth import scratch
from anyglot_synth.workers import Workers

KILLED = """
import os, signal, sys
from pathlib import Path
from anyglot_synth import scratch
scratch._MEMORY = Path(sys.argv[1])
with scratch.scratch() as folder:
    Path(folder, "text.txt").write_text("private")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_workers_left_goes_with_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MEMORY", tmp_path)
    others = [tmp_path / "anyglot-speech-1-99999999-abc", tmp_path / f"{scratch._PREFIX}x-abc"]
    for other in others:
        other.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert (left / "text.txt").is_file() and left.parent == tmp_path, done.stderr
    with scratch.scratch() as mine:
        Workers([], tmp_path).__exit__()
        assert not left.exists() and Path(mine).is_dir() and all(other.is_dir() for other in others)
    assert sorted(tmp_path.iterdir()) == sorted(others)
