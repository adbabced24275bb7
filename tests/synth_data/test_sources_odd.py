"""What is odd in the data, or breaks off, costs one row; what a user can mend ends the run with one line."""

from __future__ import annotations

import base64
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from anyglot_synth.dialogue import Dialogue
from anyglot_synth.sources import SOURCES, BadRow, SourceError
from anyglot_synth.store import Store, StoreError

ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4wcUFAAJ6AN1nJ0J9AAAAAElFTkSuQmCC")


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, kind: str, **options: Any) -> list[Dialogue | BadRow]:
    return list(SOURCES.build(kind, **options).read(Store(tmp_path / "out")))


def test_an_odd_row_costs_one_row(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    turns = [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}
    shown = {"file": "a.png", "sha256": "0" * 64, "size": [float("inf"), 1]}
    picture = {"role": "user", "parts": [{"modality": "image", "text": "x", "media": shown}]}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("examples", {"image": "a.png", "text": "x", "frames": 300}, {}, "'frames' is a int, not a list of pairs"),
        ("examples", {"image": "a.png", "text": "x", "words": 12}, {}, "'words' is a int, not a list of pairs"),
        ("dialogues", {"turns": turns, "meta": {"written": "2021-03-04"}}, {"form": "speech"}, "meta.written is '2021"),
        ("dialogues", {"turns": turns, "meta": {"written": True}}, {"form": "speech"}, "meta.written is True"),
        ("dialogues", {"turns": [picture]}, {}, "not a media file of a dataset (OverflowError"),
        ("sharegpt", {"messages": [{"role": "user", "content": [url]}]}, {}, "turn 1 has a picture that is no base64"),
    ]
    good = {"examples": {"image": "a.png", "text": "x"}, "dialogues": {"turns": turns}, "sharegpt": {"messages": turns}}
    for kind, row, options, problem in cases:
        data = write(tmp_path / "a.jsonl", [row, good[kind]])
        bad, whole = read(tmp_path, kind, data=data, **options)
        assert isinstance(bad, BadRow) and bad.row == 1 and bad.error.startswith(problem), bad
        assert isinstance(whole, Dialogue), whole


def test_a_defect_costs_one_row_and_a_full_disk_the_run(tmp_path, monkeypatch, caplog) -> None:
    from anyglot_synth.sources.alpaca import Alpaca

    data = write(tmp_path / "a.jsonl", [ALPACA])
    for error, seen in (
        (KeyError("nobody\nforesaw"), None),
        (StoreError("full"), "full"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
    ):

        def build(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(Alpaca, "build", build)
        if seen:
            with pytest.raises(StoreError, match=seen):
                read(tmp_path, "alpaca", data=data)
        else:
            assert read(tmp_path, "alpaca", data=data) == [BadRow("a.jsonl", 1, "KeyError: 'nobody\\nforesaw'")]
            assert "a defect in source 'alpaca', a.jsonl, row 1" in caplog.text and "Traceback" in caplog.text


def test_datasets_that_break_off(tmp_path, monkeypatch) -> None:
    class Table:
        info = None

        def __init__(self, error: Exception) -> None:
            self.error = error

        def __iter__(self) -> Any:
            yield ALPACA
            raise self.error

    def of(data: str, error: Exception) -> list[Dialogue | BadRow]:
        monkeypatch.setattr("anyglot_synth.sources.hf.HfDatasets._load", lambda _: (Table(error), []))
        return read(tmp_path, "datasets", data=data, rows="alpaca")

    data = write(tmp_path / "a.jsonl", [ALPACA])
    good, bad = of(data, ValueError("cut off\nhere"))
    assert isinstance(good, Dialogue)
    assert bad == BadRow("a.jsonl/train", 2, "datasets cannot read on after row 1 (ValueError: cut off)")
    with pytest.raises(SourceError, match="split 'train': .* after row 1 .OSError: unplugged.; run again"):
        of(data, OSError("unplugged"))
    with pytest.raises(SourceError, match="somebody/something, split 'train': .* no network.; run again"):
        of("somebody/something", ValueError("no network"))
