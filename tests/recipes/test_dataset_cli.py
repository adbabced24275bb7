"""`anyglot dataset`: every action on a finished dataset, and one line where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from anyglot_recipes.cli import main


@pytest.fixture
def mine(dialogues: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dialogues, tmp_path / "mine"))


def test_every_action_writes_what_it_says(mine: Path, tmp_path: Path, capsys: Any) -> None:
    def run(*arguments: str, command: str = "dataset") -> Any:
        assert main([command, arguments[0], str(mine), *arguments[1:], "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("report") == json.loads((mine / "report.json").read_text())
    assert run("card") == {"card": str(mine / "README.md")} and (mine / "README.md").is_file()
    assert run("view", "--num", "2") == {"page": str(mine / "view" / "index.html")}
    assert (mine / "view" / "index.html").read_text().count("<article") == 2
    assert run("view", "--num", "2", command="synth") == {"page": str(mine / "view" / "index.html")}
    done = run("export", "--to", "audiofolder", "--out", str(tmp_path / "out"), "--modality", "music")
    assert done["rows"] == 1 and len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 1
    assert run("validate")["whole"] is True


@pytest.mark.parametrize("command", ["webdataset", "audiofolder", "imagefolder", "parquet", "nanoworld", "prepare"])
def test_a_disk_that_is_full_is_one_line(
    command: str, mine: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system itself refuses: no file may be larger than this."""
    out = tmp_path / "out"
    words, most = ["dataset", "export", str(mine), "--to", command], 400
    if command == "nanoworld":
        monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path / "cache"))
        words, most = ["synth", "nanoworld", "--num", "1", "--workers", "1"], 5_000
        assert main([*words, "--out", str(tmp_path / "first")]) == 0  # its clips are in the cache now
    elif command == "prepare":
        (tmp_path / "rows.csv").write_text("text\n" + "words\n" * 100)
        words = ["prepare", str(tmp_path / "rows.csv")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        assert main([*words, "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyglot")][-1]
    assert str(tmp_path) in line and f": {os.strerror(errno.EFBIG)}; free some space and run again" in line


def test_what_is_wrong_is_said(mine: Path, tmp_path: Path, capsys: Any) -> None:
    next((mine / "objects").rglob("*.png")).unlink()
    assert main(["dataset", "validate", str(mine)]) == 2
    assert "missing: samples.jsonl, line" in capsys.readouterr().out
    export = ["dataset", "export", str(mine), "--to", "imagefolder", "--out", str(tmp_path / "out")]
    for arguments, words in (
        (export, "cannot be read"),
        ([*export[:4], "zip", *export[5:]], "there is no form 'zip'"),
        (["dataset", "report", str(tmp_path)], "give the folder of a finished dataset"),
        ([*export, "--max_samples", "3"], "imagefolder has no option 'max_samples'"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("anyglot: ") and words in line
    assert not (tmp_path / "out").exists()
