"""AnyGPT's JSONL: published rows come in and go out byte for byte; broken rows are named; shards hold it all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.shards import ShardReader
from anyglot_lm.text import TextTokenizer
from anyglot_lm.token_strings import ANYGPT, vocabulary_of
from anyglot_recipes.cli import main
from anyglot_recipes.importers.anygpt import Imported, read_anygpt, write_anygpt, write_token_shards
from anyglot_recipes.importers.rows import RowError
from anyglot_tokenizers.errors import CodesError, ManifestError

SPEECH = "<sosp><\U0001f5e3\ufe0f1><\U0001f5e3\ufe0f1023><eosp>"
MUSIC = ANYGPT.write("music", np.array([[0, 5], [1, 6], [2, 7], [2047, 8]]))
IMAGE = ANYGPT.write("image", np.arange(32)[None])


@pytest.fixture(scope="module")
def samples(shared_data: Path) -> list[Path]:
    """The files that AnyGPT published."""
    files = sorted((shared_data / "anygpt_samples").glob("*.jsonl"))
    if not files:
        pytest.skip(f"no AnyGPT samples in {shared_data}")
    return files


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(["a picture of a cat", "please say it again"], vocab_size=300)


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def media_of(sample: Sample) -> list[Segment]:
    return [segment for segment in sample.segments if segment.modality != "text"]


def test_every_published_row_comes_in_and_goes_out_byte_for_byte(samples: list[Path], tmp_path: Path) -> None:
    assert len(samples) == 9
    counts: dict[str, int] = {}
    for path in samples:
        rows = list(read_anygpt(path))
        assert not [row for row in rows if isinstance(row, RowError)]
        for row in rows:
            for segment in media_of(row.sample):
                counts[segment.modality] = counts.get(segment.modality, 0) + 1
                form = ANYGPT.form(segment.modality)
                codes = segment.content
                assert codes.shape[0] == form.num_quantizers
                assert codes.min() >= 0 and codes.max() < form.codebook_size
                assert segment.modality != "image" or codes.shape == (1, 32)
                assert segment.modality != "music" or codes.shape == (4, 250)
        assert write_anygpt(rows, tmp_path / path.name) == len(path.read_bytes().splitlines())
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert counts == {"image": 40, "music": 10, "speech": 32}


def test_published_rows_become_shards_and_come_back(samples: list[Path], tmp_path: Path, text: TextTokenizer) -> None:
    report = write_token_shards(samples, tmp_path / "out", text, strict=True)
    assert (report.num_good, report.num_bad, report.num_samples) == (81, 0, 161), "80 pairs both ways, 1 conversation"
    vocabulary = vocabulary_of("anygpt", text.size, text_fingerprint=text.fingerprint)
    shards = ShardReader(tmp_path / "out" / "shards", vocabulary, Template(), verify=True)
    assert set(shards.task_names) == {
        *(f"{m}->text" for m in ("image", "speech", "music")),
        *(f"text->{m}" for m in ("image", "speech", "music")),
        "conversation",
    }
    expected = [sample for path in samples for row in read_anygpt(path) for _, sample in row.tasks()]
    for index, sample in enumerate(expected):
        ids, loss = shards.doc(index)
        assert Template().parse(ids, vocabulary, text, loss).segments == sample.segments
    write_anygpt(expected[1:3], tmp_path / "ours.jsonl")
    assert [row.sample.segments for row in read_anygpt(tmp_path / "ours.jsonl")] == [s.segments for s in expected[1:3]]


def test_the_published_conversation(samples: list[Path]) -> None:
    (row,) = read_anygpt(next(path for path in samples if path.name.startswith("instruction")))
    kinds = [(segment.modality, segment.role) for segment in row.sample.segments]
    assert kinds == [("speech", "user"), ("text", "user"), *[(m, "assistant") for m in ("text", "speech", "text")]]
    assert row.sample.segments[2].content == "<-Ins-> hello, how are you\n <-Res-> I am fine, thank you "
    assert [segment.content.tolist() for segment in media_of(row.sample)] == [[[1, 1, 1]], [[2, 2, 2]]]


def spell(values: Any, data: st.DataObject) -> str:
    """JSON as somebody might write it."""
    ascii_only = data.draw(st.booleans())
    item, key = data.draw(st.sampled_from([(", ", ": "), (",", ":"), (" ,  ", " :\t")]))
    line = json.dumps(values, ensure_ascii=ascii_only, separators=(item, key))
    if ascii_only and data.draw(st.booleans()):
        line = line.replace("\\ud83d", "\\uD83D").replace("\\ufe0f", "\\uFE0F")
    if data.draw(st.booleans()):
        line = line.replace("<", "\\u003c").replace(">", "\\u003E")
    return data.draw(st.sampled_from(["", " ", "\t"])) + line + data.draw(st.sampled_from(["", "  "]))


@given(st.data())
def test_any_spelling_of_json_survives(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("m") / "rows.jsonl"
    texts = st.text(max_size=12)
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        key, span = data.draw(st.sampled_from([("image", IMAGE), ("speech", SPEECH), ("music", MUSIC)]))
        parts = [("text", "x" + data.draw(texts)), (key, span), ("note", [data.draw(texts), 1.50, None])]
        turn = {"role": "assistant", "message": f"say {span} and {SPEECH}", "mood": data.draw(texts)}
        talk = {"id": 7, "conversation": [[turn], [turn]]}
        values = data.draw(st.sampled_from([dict(data.draw(st.permutations(parts))), talk]))
        rows.append(spell(values, data) + data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"])))
    content = data.draw(st.sampled_from(["", "\ufeff", "\n"])) + "".join(rows)
    if content.startswith("\n"):
        rows[0] = "\n" + rows[0]
    put(path, content[: len(content) if data.draw(st.booleans()) else -1])
    found = list(read_anygpt(path))
    assert all(isinstance(row, Imported) for row in found) and len(found) == len(rows)
    write_anygpt(found, path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_other_codes_are_written_in_the_rows_own_spelling(tmp_path: Path) -> None:
    line = json.dumps({"speech": SPEECH, "text": "é"}) + "\r\n"
    (row,) = read_anygpt(put(tmp_path / "a.jsonl", line))
    assert isinstance(row, Imported)
    speech, said = row.sample.segments
    other = replace(row, sample=Sample([replace(speech, content=np.array([[7]])), said]))
    assert other.line == '{"speech": "<sosp><\\ud83d\\udde3\\ufe0f7><eosp>", "text": "\\u00e9"}\r\n'
    broken = replace(row, sample=Sample([replace(speech, content=np.array([[1024]])), said]))
    with pytest.raises(CodesError, match="outside"):
        _ = broken.line


BROKEN = [
    ("{", "is not JSON"),
    ("[1]", "is a JSON list"),
    ("[" * 100_000, "is not JSON"),
    ({"other": "x"}, "has the keys 'other'"),
    ({}, "needs 'conversation'"),
    ({"text": "x", "speech": SPEECH[:-6]}, "has no <eosp>"),
    ({"text": "x", "speech": SPEECH.replace("1023", "1024")}, r"code 1024 is outside \[0, 1024\)"),
    ({"text": "x", "music": MUSIC.replace("<\U0001f3b60>", "")}, "holds 7 codes, not frames of 4"),
    ({"text": "x", "music": MUSIC.replace("\U0001f3b60>", "\U0001f3b62048>")}, r"code 2048 is outside \[0, 2048\)"),
    ({"text": "x", "image": IMAGE.replace("<\U0001f4400>", "")}, "has the grid"),
    ({"text": "x", "image": SPEECH}, "'image' is .* not one span <soim>"),
    ({"text": "x", "image": IMAGE + " "}, "not one span"),
    ({"text": "x", "image": "a.png"}, "not one span"),
    ({"text": "x", "image": None}, "None is not a string"),
    ({"text": "half a \ud800", "image": IMAGE}, "holds half a character"),
    ({"text": "see <\U0001f4401>", "image": IMAGE}, "outside of any span"),
    ({"text": "x", "image": IMAGE, "note": SPEECH}, "2 spans in its line but 1 in"),
    ({"conversation": "x"}, "not a list of turns"),
    ({"conversation": [["x"]]}, "the turn 'x' is no"),
    ({"conversation": [{"role": "system", "message": "x"}]}, "the turn .*system"),
    ({"conversation": [], "text": "x"}, "both 'conversation' and 'text'"),
    ('{"text": "x", "text": "y"}', "has the key 'text' twice"),
    ('{"speech": "<sosp><\U0001f5e3\ufe0f1><\\ud83d\\udde3\\ufe0f1><eosp>"}', "spelled in two ways"),
    (b"\xff\xfe", "is not UTF-8"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_broken_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    good = json.dumps({"text": "x", "speech": SPEECH}).encode()
    bad = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = put(tmp_path / "a.jsonl", b"\n".join([good, b"", bad, good]))
    first, error, last = read_anygpt(path)
    assert isinstance(first, Imported) and isinstance(last, Imported) and last.row == 4
    assert isinstance(error, RowError)
    assert (error.source, error.row, error.file) == (str(path), 3, str(path))
    with pytest.raises(ManifestError, match=message):
        raise ManifestError(error.error)


def test_files_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        list(read_anygpt(tmp_path / "gone.jsonl"))
    with pytest.raises(ManifestError, match="holds no rows"):
        list(read_anygpt(put(tmp_path / "a.jsonl", "\n \n")))


def test_shards_of_rows_good_and_bad(tmp_path: Path, text: TextTokenizer) -> None:
    rows = [
        {"text": "a cat", "image": IMAGE},
        {"text": "", "image": IMAGE},  # nothing to learn from
        {"text": "a cat", "image": IMAGE[:-6]},
        {"conversation": [[{"role": "user", "message": f"{IMAGE} what?"}, {"role": "assistant", "message": SPEECH}]]},
    ]
    source = put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    report = write_token_shards([tmp_path / "gone.jsonl", source], tmp_path / "out", text)
    assert report.to_dict() == {"out": str(tmp_path / "out"), "good": 2, "bad": 3, "samples": 3}
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [0, 2, 3]
    assert "nothing to learn" in errors[1]["error"] and "<eoim>" in errors[2]["error"]
    before = ShardReader(tmp_path / "out" / "shards").fingerprint
    write_token_shards([source], tmp_path / "out", text)
    assert ShardReader(tmp_path / "out" / "shards").fingerprint == before
    with pytest.raises(ManifestError, match="2 of 4 rows are bad; the first: .*row 2"):
        write_token_shards([source], tmp_path / "strict", text, strict=True)
    assert not (tmp_path / "strict" / "shards").exists() and (tmp_path / "strict" / "errors.jsonl").exists()
    with pytest.raises(ManifestError, match="no sources"):
        write_token_shards([], tmp_path / "none", text)
    with pytest.raises(ManifestError, match="image block has 1 x 32768 codes, anygpt 1 x 8192"):
        other = vocabulary_of("emu3", text.size, grid=(4, 8))
        write_token_shards([source], tmp_path / "other", text, vocabulary=other)


def test_command(tmp_path: Path, text: TextTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """`anyglot prepare` knows token strings when it sees them; a folder with a text tokenizer is enough of a model."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    text.save(model / "text.model")
    line = json.dumps({"text": "a cat", "image": IMAGE})
    plain = put(tmp_path / "a.jsonl", f"\n{line}\n{line[:-9]}\n")
    escaped = put(tmp_path / "b.jsonl", line.replace("<", "\\u003c").replace(">", "\\u003e"))
    arguments = ["prepare", str(plain), str(escaped), "--model", str(model), "--out", str(out), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "good": 2, "bad": 1, "samples": 4}
    assert ShardReader(out / "shards").vocabulary == vocabulary_of(
        "anygpt", text.size, text_fingerprint=text.fingerprint
    )
    assert main([*arguments, "--strict"]) == 2
    assert "1 of 3 rows are bad" in capsys.readouterr().err
    other = put(tmp_path / "c.jsonl", json.dumps({"text": "a", "image": "a.png"}))
    assert main(["prepare", str(other), *arguments[1:]]) == 2
    assert "prepare them apart" in capsys.readouterr().err
    vocabulary_of("seed", text.size, text_fingerprint=text.fingerprint).save(model / "vocabulary.json")
    assert main(arguments) == 0, "a model without speech and music takes the pictures"
