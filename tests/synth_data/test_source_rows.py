"""Rows of JSON, parquet and arrow files: all of them, in order, whatever is broken between them, a few at a time."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from anyglot_synth.sources import BadRow
from anyglot_synth.sources import rows as rows_module
from anyglot_synth.sources.rows import expand, rows_of


def write(path: Path, rows: Any, array: bool = False) -> str:
    text = json.dumps(rows, ensure_ascii=False) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def parsed(path: Path) -> list[Any]:
    return [row.error if isinstance(row, BadRow) else row for _, row in rows_of(path)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_values_of_arrays_are_found_whatever_the_chunks_are(tmp_path, monkeypatch, chunk) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    rows = [{"a": '],[{"\\ \n'}, {"b": [1, [2, {"c": "}"}]]}, "x,y", 3, None, {}, {"é": "\\\\"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=3), " \n" + json.dumps(rows, ensure_ascii=False) + "\n"):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        assert parsed(tmp_path / "rows.json") == rows


def test_pretty_printed_objects_one_after_another(tmp_path) -> None:
    rows = [{"a": {"b": 1}}, {"a": "}"}]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert parsed(tmp_path / "rows.json") == rows
    (tmp_path / "rows.json").write_text('{"a": 1,\n "b": [2]}\n\n{"a": 3,\n "b": []}')
    assert parsed(tmp_path / "rows.json") == [{"a": 1, "b": [2]}, {"a": 3, "b": []}]


def test_of_a_dataset_made_here_only_the_samples_are_read(tmp_path) -> None:
    (tmp_path / "made").mkdir()
    for name in ("job.json", "report.json", "samples.jsonl", "rejects.jsonl", "errors.jsonl"):
        (tmp_path / "made" / name).write_text("{}\n")
    (tmp_path / "rejects.jsonl").write_text("{}\n")
    assert expand([str(tmp_path / "made")]) == [tmp_path / "made" / "samples.jsonl"]
    assert expand([str(tmp_path)]) == [tmp_path / "made" / "samples.jsonl", tmp_path / "rejects.jsonl"]


def test_a_long_first_line_is_one_row(tmp_path, monkeypatch) -> None:
    rows = [{"a": "x" * size} for size in (2000, 3, 2000, 5)]
    texts = [json.dumps(row) for row in rows]
    texts[1] = '{"a": "cut'
    for chunk in (7, 1 << 20):
        monkeypatch.setattr(rows_module, "_CHUNK", chunk)
        for end in ("", "\n", " \r\n"):
            (tmp_path / "rows.jsonl").write_text((end or "\n").join(texts) + end)
            first, bad, *rest = parsed(tmp_path / "rows.jsonl")
            assert [first, *rest] == [rows[0], *rows[2:]] and "not JSON" in bad
    (tmp_path / "rows.jsonl").write_text(texts[0].replace("}", ',\n"b": 1}') + "\n" + texts[2])
    assert parsed(tmp_path / "rows.jsonl") == [rows[0] | {"b": 1}, rows[2]]
    (tmp_path / "rows.jsonl").write_text(texts[0] + texts[2])
    assert parsed(tmp_path / "rows.jsonl") == [rows[0], rows[2]]


def test_a_broken_value_costs_one_row(tmp_path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": oops}, {"a": 3}]')
    first, second, third = parsed(tmp_path / "a.json")
    assert (first, third) == ({"a": 1}, {"a": 3}) and "not JSON" in second
    (tmp_path / "b.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n\n{"a": \n{"a": 4}\n' + b"[" * 100_000 + b"\n")
    found = parsed(tmp_path / "b.jsonl")
    assert found[0] == {"a": 1} and found[3] == {"a": 4} and len(found) == 5
    assert "not UTF-8 at character 7 (byte 0xff)" in found[1] and "not JSON" in found[2] and "not JSON" in found[4]


def test_a_file_cut_off_keeps_what_is_whole(tmp_path) -> None:
    text = json.dumps([{"a": i} for i in range(100)])
    (tmp_path / "a.json").write_text(text[: len(text) // 2])
    found = parsed(tmp_path / "a.json")
    assert found[:40] == [{"a": i} for i in range(40)] and "not JSON" in found[-1]
    packed = gzip.compress("".join(json.dumps({"a": i}) + "\n" for i in range(20_000)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    found = parsed(tmp_path / "b.jsonl.gz")
    assert found[0] == {"a": 0} and "the file breaks off here" in found[-1] and len(found) > 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_encodings(tmp_path, encoding, packed, array) -> None:
    rows = [{"a": "é"}, {"a": "你"}]
    text = (
        json.dumps(rows, ensure_ascii=False) if array else "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    )
    data = text.encode(encoding)
    (tmp_path / "rows.json").write_bytes(gzip.compress(data) if packed else data)
    assert parsed(tmp_path / "rows.json") == rows


def test_a_row_that_is_too_long_is_skipped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW", 1000)
    monkeypatch.setattr(rows_module, "_CHUNK", 64)
    rows = [{"a": 1}, {"a": "x" * 5000}, {"a": 3}]
    for name, array in (("a.json", True), ("a.jsonl", False)):
        write(tmp_path / name, rows, array)
        first, second, third = parsed(tmp_path / name)
        assert (first, third) == ({"a": 1}, {"a": 3}) and second == "it has more than 1000 characters"


def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    row = {"instruction": "x" * 1000, "output": "y" * 1000}
    peaks = []
    for count in (4_000, 20_000):
        path = tmp_path / f"{count}.json"
        with open(path, "w") as file:
            file.write("[" + ",".join([json.dumps(row)] * count) + "]")
        tracemalloc.start()
        assert sum(1 for _ in rows_of(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 12e6 and peaks[1] < 1.2 * peaks[0]


def test_parquet_and_arrow(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"instruction": [f"q{i}" for i in range(200)], "output": ["a"] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, opened in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with opened(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert [row["instruction"] for row in parsed(tmp_path / name)] == [f"q{i}" for i in range(200)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    ((number, bad),) = rows_of(tmp_path / "bad.parquet")
    assert number == 1 and isinstance(bad, BadRow) and bad.row == 1 and "damaged" in bad.error
