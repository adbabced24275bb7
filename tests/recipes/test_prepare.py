"""Ingestion: bad rows of every kind are named and passed over; the rest is encoded once, come what may."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from anyglot_recipes.manifest import Row, RowError
from anyglot_recipes.prepare import prepare, prepared_specs, read_manifest, read_prepared
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import ManifestError, MediaError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, load

RATE = 8000


class Brightness(Tokenizer):
    """Two codes per 8x8 patch: mean brightness in 256 steps, and its complement."""

    def __init__(self, scale: float = 255.0) -> None:
        super().__init__({"scale": scale})
        self.scale = scale
        self.calls = 0

    def _spec_entries(self) -> dict[str, Any]:
        axes, strides = ("height", "width"), (8, 8)
        return {
            "modality": "image",
            "codebook_sizes": (256, 256),
            "axes": axes,
            "strides": strides,
            "channels": 3,
        }

    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        self.calls += 1
        assert media.dtype == torch.float32 and lengths is None and not self.training
        codes = torch.nn.functional.avg_pool2d(media.mean(1, keepdim=True), 8).mul(self.scale).round().long()
        return Codes(torch.cat([codes, 255 - codes], dim=1), None, self.spec)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        raise AssertionError("prepare never decodes")

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        raise AssertionError("prepare never trains")


class Loudness(Brightness):
    """One code per 80 samples: mean level. Refuses audio that is louder than 0.95 everywhere."""

    def __init__(self, modality: str = "speech") -> None:
        super().__init__()
        self.config = {"modality": modality}

    def _spec_entries(self) -> dict[str, Any]:
        sizes, rate = (70000,), RATE
        modality = self.config["modality"]
        return {
            "modality": modality,
            "codebook_sizes": sizes,
            "axes": ("time",),
            "strides": (80,),
            "sample_rate": rate,
        }

    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        self.calls += 1
        assert lengths is not None and media.shape[1] == 1
        for item, length in zip(media, lengths.tolist(), strict=True):
            if bool((item[:, :length].abs() > 0.95).all()):
                raise MediaError("audio batch", "too loud", "turn it down")
        padded = torch.nn.functional.pad(media.abs(), (0, -media.shape[-1] % 80))
        codes = torch.nn.functional.avg_pool1d(padded, 80).mul(65000).round().long()
        return Codes(codes, -(-lengths // 80), self.spec)


@pytest.fixture
def tokenizers() -> dict[str, Tokenizer]:
    return {"image": Brightness(), "speech": Loudness(), "music": Loudness("music")}


def write_grey(path: Path, level: int, size: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path)
    return path


def write_tone(path: Path, seconds: float = 0.1, level: float = 0.25) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * RATE), level, dtype=np.float32), RATE)
    return path


def write_huge_png(path: Path, side: int = 30_000) -> Path:
    """A valid black 1-bit image of side x side pixels in some 100 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + side // 8) * side), level=1)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def errors_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# Manifests


def test_csv_with_default_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.csv", "image,caption,author", 'a.png,"a cat, asleep",me', "b.png,  ,me")
    rows = list(read_manifest(path))
    assert rows == [
        Row(str(path), 1, "a cat, asleep", {"image": tmp_path / "a.png"}),
        Row(str(path), 2, None, {"image": tmp_path / "b.png"}),
    ]


def test_jsonl_of_several_modalities(tmp_path: Path) -> None:
    row = {"text": "hi", "speech": "a.wav", "music": "b.wav", "image": None, "scene": {"things": []}}
    path = write_lines(tmp_path / "records.jsonl", json.dumps(row), "", json.dumps({"text": "ho"}))
    media = {"speech": tmp_path / "a.wav", "music": tmp_path / "b.wav"}
    assert list(read_manifest(tmp_path)) == [Row(str(path), 1, "hi", media), Row(str(path), 3, "ho", {})]


def test_columns_are_named_and_ignored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.tsv", "file\ttext\tcaption\tmusic", "a.png\tone\ttwo\tx.wav")
    (row,) = read_manifest(path, {"file": "image", "caption": "text", "music": "ignore"})
    assert row == Row(str(path), 1, "two", {"image": tmp_path / "a.png"})


def test_files_are_found_in_the_usual_folders(tmp_path: Path) -> None:
    inside = write_grey(tmp_path / "images" / "a.png", 0)
    write_lines(tmp_path / "captions.csv", "file,caption", "a.png,x")
    (row,) = read_manifest(tmp_path, {"file": "image"})
    assert isinstance(row, Row) and row.media["image"] == inside


def test_folder_names_are_labels(tmp_path: Path) -> None:
    for name in (
        "train/cat/2.PNG",
        "train/cat/1.jpg",
        "train/dog/1.wav",
        "train/dog/notes.txt",
        ".hidden/x.png",
        "top.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = [row for row in read_manifest(tmp_path, {"audio": "speech"}) if isinstance(row, Row)]
    found = [(row.number, row.text, *row.media.items()) for row in rows]
    assert found == [
        (1, None, ("image", tmp_path / "top.png")),
        (2, "cat", ("image", tmp_path / "train/cat/1.jpg")),
        (3, "cat", ("image", tmp_path / "train/cat/2.PNG")),
        (4, "dog", ("speech", tmp_path / "train/dog/1.wav")),
    ]


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        (["image,caption", "a.png,x"], {"picture": "image"}, "no column 'picture'.*image, caption"),
        (["file,title", "a.png,x"], {}, "none of the columns file, title.*--column"),
        (["image,image", "a.png,b.png"], {}, "names a column twice"),
        (["image,caption"], {}, "holds no rows"),
        ([], {}, "is empty"),
        (["image,caption", "a.png,x"], {"image": "text", "caption": "text"}, "both given as 'text'"),
        (["image,caption", "a.png,x"], {"image": ""}, "NAME=MODALITY"),
    ],
)
def test_useless_manifests(tmp_path: Path, lines: list[str], columns: dict[str, str], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        list(read_manifest(write_lines(tmp_path / "m.csv", *lines), columns))


def test_useless_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "two" / "a.csv", "text", "x")
    write_lines(tmp_path / "two" / "b.jsonl", "{}")
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    (tmp_path / "sheet.xlsx").touch()
    for name, message in {
        "gone": "no such file",
        "empty": "no manifest",
        "two": "several manifests",
        "latin.csv": "UTF-8",
        "sheet.xlsx": "a .csv, .tsv or .jsonl file",
    }.items():
        with pytest.raises(ManifestError, match=message):
            list(read_manifest(tmp_path / name))


def test_bad_rows_of_manifests_stand_in_line(tmp_path: Path) -> None:
    table = write_lines(tmp_path / "m.csv", "image,caption", "a.png,x,y", "b.png,good", ",", "http://x/c.png,x")
    lines = write_lines(tmp_path / "m.jsonl", "{", "[1]", '{"image": 3}', '{"other": "x"}', '{"text": "good"}')
    bad = [row for row in read_manifest(table) if isinstance(row, RowError)]
    assert [row.row for row in bad] == [1, 3, 4]
    for row, words in zip(bad, ("has 3 cells", "every cell is blank", "not a file name; download"), strict=True):
        assert words in row.error
    kinds = [type(row) for row in read_manifest(lines)]
    assert kinds == [RowError, RowError, RowError, RowError, Row]


@given(st.lists(st.dictionaries(st.sampled_from(["text", "image", "speech"]), st.text(max_size=20)), min_size=1))
def test_any_strings_survive_jsonl(tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = list(read_manifest(path))
    assert len(rows) == len(entries)
    for entry, row in zip(entries, rows, strict=True):
        if isinstance(row, Row):
            assert (row.text or "") == entry.get("text", "").strip()


# Prepare


def test_codes_come_back_as_the_tokenizers_gave_them(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    rows = ["text,image,speech"]
    for i in range(7):
        write_grey(tmp_path / f"in/{i}.png", 10 * i, 40)
        write_tone(tmp_path / f"in/{i}.wav", 0.05 * (i + 1), 0.1 * i)
        rows.append(f"row {i},{i}.png,{i}.wav")
    source = write_lines(tmp_path / "in" / "m.csv", *rows, "only text,,")
    seen: list[tuple[int, int]] = []
    report = prepare(
        [source], tokenizers, tmp_path / "out", image_size=32, batch_size=3, rows_per_shard=5,
        progress=lambda done, bad: seen.append((done, bad)),
    )  # fmt: skip
    assert (report.num_good, report.num_bad, report.num_shards, report.num_reused_shards) == (8, 0, 2, 0)
    assert seen == [(5, 0), (8, 0)]
    prepared = list(read_prepared(tmp_path / "out"))
    assert [row.text for row in prepared] == [f"row {i}" for i in range(7)] + ["only text"]
    assert len({row.id for row in prepared}) == 8 and not prepared[-1].codes
    for i, row in enumerate(prepared[:7]):
        assert row.codes["image"].dtype == torch.int64 and row.codes["image"].shape == (2, 4, 4)
        assert row.codes["image"].unique().tolist() == sorted({10 * i, 255 - 10 * i})
        assert row.codes["speech"].shape == (1, 5 * (i + 1))
        assert (row.codes["speech"] - 6500 * i).abs().max() <= 3, "codes above uint16 are kept, padding is cut off"
    assert prepared_specs(tmp_path / "out") == {name: tokenizer.spec for name, tokenizer in tokenizers.items()}


def make_bad_rows(folder: Path) -> Path:
    """One good row among one of every bad kind; the manifest."""
    write_grey(folder / "good.png", 100)
    whole = write_grey(folder / "whole.png", 50, 64).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    sound = write_tone(folder / "good.wav").read_bytes()
    (folder / "cut.wav").write_bytes(sound[:20])
    (folder / "empty.png").touch()
    (folder / "empty.wav").touch()
    samples = np.zeros(800, dtype=np.float32)
    samples[100] = np.nan
    soundfile.write(folder / "nan.wav", samples, RATE, subtype="FLOAT")
    (folder / "text.png").write_text("I am no image, whatever my name is.")
    write_huge_png(folder / "huge.png")
    write_tone(folder / "long.wav", 3.0)
    write_tone(folder / "loud.wav", 0.1, 0.99)
    (folder / "folder.png").mkdir()
    return write_lines(
        folder / "manifest.csv",
        "text,image,speech",
        "good,good.png,good.wav",
        *(
            f"bad,{name},good.wav"
            for name in ("cut.png", "empty.png", "text.png", "huge.png", "gone.png", "folder.png")
        ),
        *(f"bad,good.png,{name}" for name in ("cut.wav", "empty.wav", "nan.wav", "gone.wav", "long.wav", "loud.wav")),
        "bad,good.png,good.wav,surplus",
        "good again,good.png,",
    )


def test_every_bad_file_is_named_and_passed_over(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source = make_bad_rows(tmp_path / "in")
    report = prepare([source], tokenizers, tmp_path / "out", max_seconds=2.0)
    assert (report.num_good, report.num_bad) == (2, 13)
    assert [row.text for row in read_prepared(tmp_path / "out")] == ["good", "good again"]
    errors = errors_of(tmp_path / "out")
    assert [error["row"] for error in errors] == list(range(2, 15))
    named = [Path(error["file"]).name for error in errors]
    assert named == [
        "cut.png", "empty.png", "text.png", "huge.png", "gone.png", "folder.png",
        "cut.wav", "empty.wav", "nan.wav", "gone.wav", "long.wav", "loud.wav",
        "manifest.csv",
    ]  # fmt: skip
    for error in errors:
        assert set(error) == {"source", "row", "file", "error"} and error["source"] == str(source)
        assert error["error"] and "\n" not in error["error"]


def test_strict_raises_after_all_rows_were_tried(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source = make_bad_rows(tmp_path / "in")
    with pytest.raises(ManifestError, match=r"13 of 15 rows are bad; the first: .*row 2.*cut\.png.*errors\.jsonl"):
        prepare([source], tokenizers, tmp_path / "out", max_seconds=2.0, strict=True)
    assert len(errors_of(tmp_path / "out")) == 13
    assert len(list(read_prepared(tmp_path / "out"))) == 2


def test_nothing_good_raises(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source = write_lines(tmp_path / "in" / "m.csv", "image", "gone.png")
    with pytest.raises(ManifestError, match=r"none of 1 rows is good.*gone\.png"):
        prepare([source], tokenizers, tmp_path / "out")
    with pytest.raises(ManifestError, match="no column 'picture'"):
        prepare([source], tokenizers, tmp_path / "out", columns={"picture": "image"})
    assert errors_of(tmp_path / "out")[0]["row"] == 0
    with pytest.raises(ManifestError, match="no sources"):
        prepare([], tokenizers, tmp_path / "out")


def test_a_useless_source_does_not_stop_the_others(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    write_grey(tmp_path / "in" / "grey" / "1.png", 9)
    report = prepare([tmp_path / "gone", tmp_path / "in"], tokenizers, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (1, 1)
    (row,) = read_prepared(tmp_path / "out")
    assert row.text == "grey"


def test_a_modality_without_tokenizer_is_explained(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    write_tone(tmp_path / "in" / "one" / "1.wav")
    with pytest.raises(ManifestError, match="no tokenizer for 'audio'.*--column audio="):
        prepare([tmp_path / "in"], tokenizers, tmp_path / "out")
    assert prepare([tmp_path / "in"], tokenizers, tmp_path / "out", columns={"audio": "music"}).num_good == 1


def make_shards(folder: Path, count: int = 6) -> Path:
    rows = [f"{i},{write_grey(folder / f'{i}.png', i).name}" for i in range(count)]
    return write_lines(folder / "m.csv", "text,image", *rows)


def test_a_second_run_does_nothing_and_changes_nothing(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source, out = make_shards(tmp_path / "in"), tmp_path / "out"
    prepare([source], tokenizers, out, rows_per_shard=2)
    before, calls = contents(out), tokenizers["image"].calls
    assert prepare([source], tokenizers, out, rows_per_shard=2).num_reused_shards == 3
    assert contents(out) == before and tokenizers["image"].calls == calls


def test_batch_size_never_changes_the_result(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source = make_bad_rows(tmp_path / "in")
    prepare([source], tokenizers, tmp_path / "a", batch_size=1, max_seconds=2.0)
    prepare([source], tokenizers, tmp_path / "b", batch_size=32, max_seconds=2.0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    class Interrupt(Exception):
        pass

    def stop(done: int, bad: int) -> None:
        if done == 4:
            raise Interrupt

    source = make_shards(tmp_path / "in")
    prepare([source], tokenizers, tmp_path / "whole", rows_per_shard=2)
    with pytest.raises(Interrupt):
        prepare([source], tokenizers, tmp_path / "out", rows_per_shard=2, progress=stop)
    with pytest.raises(ManifestError, match="run prepare"):
        list(read_prepared(tmp_path / "out"))
    report = prepare([source], tokenizers, tmp_path / "out", rows_per_shard=2)
    assert report.num_reused_shards == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole"), "nothing is lost, doubled or left behind"


def test_changed_files_and_tokenizers_are_encoded_again(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source, out = make_shards(tmp_path / "in"), tmp_path / "out"
    prepare([source], tokenizers, out, rows_per_shard=2)
    write_grey(tmp_path / "in" / "3.png", 200, 48)
    report = prepare([source], tokenizers, out, rows_per_shard=2)
    assert report.num_reused_shards == 2
    assert int(list(read_prepared(out))[3].codes["image"].max()) == 200
    report = prepare([source], {"image": Brightness(100.0)}, out, rows_per_shard=2)
    assert report.num_reused_shards == 0 and len(list((out / "codes").iterdir())) == 3


def test_a_missing_file_that_appears_is_taken_in(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source, out = make_shards(tmp_path / "in", 3), tmp_path / "out"
    (tmp_path / "in" / "1.png").rename(tmp_path / "1.png")
    assert prepare([source], tokenizers, out).num_bad == 1
    (tmp_path / "1.png").rename(tmp_path / "in" / "1.png")
    assert prepare([source], tokenizers, out).num_bad == 0
    assert errors_of(out) == [] and len(list(read_prepared(out))) == 3


def test_a_damaged_shard_is_reported_and_renewed(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source, out = make_shards(tmp_path / "in"), tmp_path / "out"
    prepare([source], tokenizers, out)
    before = contents(out)
    (shard,) = (out / "codes").iterdir()
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ManifestError, match="run prepare again"):
        list(read_prepared(out))
    assert prepare([source], tokenizers, out).num_reused_shards == 0
    assert contents(out) == before


def test_foreign_folders_are_left_alone(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    source = make_shards(tmp_path / "in")
    with pytest.raises(ManifestError, match="also the folder of a source"):
        prepare([source], tokenizers, tmp_path / "in")
    other = write_lines(tmp_path / "other" / "records.jsonl", "{}")
    with pytest.raises(ManifestError, match="did not write"):
        prepare([source], tokenizers, tmp_path / "other")
    assert other.read_text() == "{}\n"
    with pytest.raises(ManifestError, match="run prepare"):
        list(read_prepared(tmp_path / "other"))


def test_stopped_before_the_index_it_goes_on(
    tmp_path: Path, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_shards(tmp_path / "in", 3), tmp_path / "out"

    def full(path: Path) -> Any:
        if path.name == "prepared.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return atomic_write(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("anyglot_recipes.prepare.atomic_write", full)
        prepare([source], tokenizers, out)
    assert (out / "records.jsonl").is_file() and not (out / "prepared.json").exists()
    report = prepare([source], tokenizers, out)
    assert report.num_good == 3 and report.num_reused_shards == report.num_shards


def test_a_name_that_is_too_long_costs_its_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.csv", "image,caption", "a.png,x", f"{'x' * 300}.png,y", "b.png,z")
    first, bad, last = read_manifest(path)
    assert isinstance(first, Row) and isinstance(last, Row) and (bad.row, bad.file) == (2, str(path))
    assert "image 'xxx" in bad.error and "File name too long); mend the row" in bad.error and len(bad.error) < 150


def test_names_that_are_not_utf8(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    folder = tmp_path / "in" / "h\udce9"
    try:
        write_grey(folder / "1.png", 7)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    assert prepare([tmp_path / "in"], tokenizers, tmp_path / "out").num_good == 1
    assert len(list(read_prepared(tmp_path / "out"))) == 1


def test_real_folders(shared_data: Path, tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    emoji = shared_data / "real" / "emoji"
    rows = list(read_manifest(emoji, {"file": "image"}))
    assert len(rows) > 1000
    good = [row for row in rows if isinstance(row, Row) and row.text and row.media["image"].is_file()]
    assert len(good) == len(rows)
    few = write_lines(tmp_path / "few.csv", "image,caption", *(f"{row.media['image']},x" for row in good[:5]))
    report = prepare([few], tokenizers, tmp_path / "out", image_size=64)
    assert (report.num_good, report.num_bad) == (5, 0)
    digits = list(read_manifest(shared_data / "real" / "sign_digits"))
    assert {row.text for row in digits if isinstance(row, Row)} == {str(digit) for digit in range(10)}


# The command


def run_command(*arguments: str) -> int:
    """`anyglot prepare`, with its options as the command line declares them."""
    from anyglot_recipes.cli import main

    return main(["prepare", *arguments])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model folder without a language model: all that prepare reads."""
    from anyglot_lm.blocks import BlockSpec
    from anyglot_lm.segments import Template
    from anyglot_lm.text import TextTokenizer
    from anyglot_lm.vocabulary import Vocabulary

    folder = tmp_path / "model"
    Brightness().save_pretrained(folder / "tokenizers" / "image")
    spec = load(folder / "tokenizers" / "image").spec
    block = BlockSpec.from_code_spec(spec, pattern="frame_major", grid=(4, 4))
    text = TextTokenizer.train(["a picture", "another one"], folder / "text.model", vocab_size=300)
    Vocabulary.build(text.size, block, text_fingerprint=text.fingerprint).save(folder / "vocabulary.json")
    Template().save(folder / "template.json")
    return folder


def test_command(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_shards(tmp_path / "in", 3), tmp_path / "out"
    options = ["--model", str(model_folder), "--out", str(out), "--json"]
    assert run_command(str(source), *options) == 0
    assert json.loads(capsys.readouterr().out)["good"] == 3
    assert all(row.codes["image"].shape == (2, 4, 4) for row in read_prepared(out)), "images fit the vocabulary"
    assert run_command(str(source), *options, "--column", "picture=image") == 2
    assert run_command(str(source), *options, "--column", "picture") == 2
    assert "NAME=MODALITY" in capsys.readouterr().err


def test_half_a_character_costs_its_row(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grey(tmp_path / "in" / "a.png", 9)
    texts = ["a picture", "half a \ud800", "another one"]
    rows = [{"image": "a.png", "text": text} for text in texts] + [{"image": "\ud800.png", "text": "a picture"}]
    write_lines(tmp_path / "in" / "m.jsonl", *map(json.dumps, rows))
    assert (
        run_command(str(tmp_path / "in"), "--model", str(model_folder), "--out", str(tmp_path / "out"), "--json") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["bad"], report["samples"]) == (2, 2, 4)
    first, second = errors_of(tmp_path / "out")
    assert (first["row"], first["error"]) == (2, "its text holds half a character (a lone surrogate); mend the row")
    assert second["row"] == 4 and "image is not a file name" in second["error"]


def test_command_refuses_a_foreign_tokenizer(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Brightness(99.0).save_pretrained(model_folder / "tokenizers" / "image")
    source = make_shards(tmp_path / "in", 3)
    assert run_command(str(source), "--model", str(model_folder), "--out", str(tmp_path / "out")) == 2
    assert "not the one the vocabulary was made for" in capsys.readouterr().err
