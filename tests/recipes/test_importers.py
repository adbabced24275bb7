"""Sources of other makers: what their own libraries write is read, and what is broken costs its own rows only."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from anyglot_recipes import prepare as prepare_module
from anyglot_recipes.importers import tars
from anyglot_recipes.importers.rows import Row, RowError
from anyglot_recipes.importers.tars import expand_braces
from anyglot_recipes.manifest import read_manifest
from anyglot_recipes.prepare import prepare, read_prepared
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import ManifestError, MediaError
from anyglot_tokenizers.media import MediaBytes, read_audio, read_image
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer

RATE = 8000


class Mean(Tokenizer):
    """One code per 8x8 patch, or per 80 samples: the mean level in 256 steps. Counts what it was given."""

    def __init__(self, modality: str = "image") -> None:
        super().__init__({"modality": modality})
        self.modality = modality
        self.items = 0

    def _spec_entries(self) -> dict[str, Any]:
        if self.modality == "image":
            axes, rest = ("height", "width"), {"strides": (8, 8), "channels": 3}
        else:
            axes, rest = ("time",), {"strides": (80,), "sample_rate": RATE}
        return {"modality": self.modality, "codebook_sizes": (256,), "axes": axes, **rest}

    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        self.items += len(media)
        if lengths is None:
            codes = torch.nn.functional.avg_pool2d(media.mean(1, keepdim=True), 8)
            return Codes(codes.mul(255).round().long(), None, self.spec)
        padded = torch.nn.functional.pad(media.abs(), (0, -media.shape[-1] % 80))
        codes = torch.nn.functional.avg_pool1d(padded, 80).mul(255).round().long()
        return Codes(codes, -(-lengths // 80), self.spec)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        raise AssertionError("prepare never decodes")

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        raise AssertionError("prepare never trains")


def png(level: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seconds: float = 0.05, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(round(seconds * RATE), 0.25, np.float32), RATE, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def split(source: Path, columns: dict[str, str] | None = None, **more: Any) -> tuple[list[Row], list[RowError]]:
    rows = list(read_manifest(source, columns, **more))
    return [r for r in rows if isinstance(r, Row)], [r for r in rows if isinstance(r, RowError)]


def held(row: Row, modality: str) -> bytes:
    medium = row.media[modality]
    assert isinstance(medium, MediaBytes)
    return medium.content


# Media in memory


def test_bytes_are_read_as_files_are(tmp_path: Path) -> None:
    image, clip = put(tmp_path / "a.png", png(100)), put(tmp_path / "a.flac", sound(kind="FLAC"))
    assert torch.equal(read_image(MediaBytes("x", image.read_bytes())), read_image(image))
    wanted = read_audio(clip, sample_rate=4000)
    assert torch.equal(read_audio(MediaBytes("x", clip.read_bytes()), sample_rate=4000), wanted)
    for kind in ("OGG", "MP3"):
        assert read_audio(MediaBytes("x", sound(0.5, kind)), sample_rate=RATE).shape[-1] >= 0.4 * RATE


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "t.tar::a: is empty"), (png(1)[:60], "t.tar::a: trunc"), (b"no picture", "t.tar::a: not a picture")],
)
def test_bad_images_in_memory(content: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_image(MediaBytes("t.tar::a", content))


def test_limits_hold_for_bytes() -> None:
    with pytest.raises(MediaError, match="t::a: 16x16 is more than 255 pixels"):
        read_image(MediaBytes("t::a", png(1)), max_pixels=255)
    with pytest.raises(MediaError, match="t::a: 0.1 s is longer"):
        read_audio(MediaBytes("t::a", sound(0.1)), sample_rate=RATE, max_seconds=0.05)
    with pytest.raises(MediaError, match="t::a: truncated"):
        read_audio(MediaBytes("t::a", sound()[:-100]), sample_rate=RATE)


# WebDataset


def test_what_webdataset_writes_is_read_as_it_reads_it(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"data-{shard:03d}.tar")) as writer:
            for i in range(3):
                sample = {"__key__": f"part/{shard}{i:04d}", "png": png(10 * i), "json": {"caption": f"it is {i}"}}
                writer.write({**sample, "wav": sound(), "cls": i} if i else {**sample, "txt": f" say {i}\n"})
    rows, errors = split(tmp_path, {"audio": "speech"})
    assert errors == []
    theirs = list(wds.WebDataset(str(tmp_path / "data-{000..001}.tar"), shardshuffle=False))
    assert len(rows) == len(theirs) == 6
    for row, sample in zip(rows, theirs, strict=True):
        assert held(row, "image") == sample["png"]
        assert ("speech" in row.media) == ("wav" in sample)
        assert row.text == (
            sample["txt"].decode().strip() if "txt" in sample else json.loads(sample["json"])["caption"]
        )
    assert [row.number for row in rows] == [1, 2, 3] * 2
    assert str(rows[0].media["image"]) == f"{tmp_path / 'data-000.tar'}::part/00000.png"
    by_pattern, errors = split(tmp_path / "data-{000..001}.tar", {"cls": "text", "wav": "ignore"})
    assert errors == []
    assert [row.text for row in by_pattern] == ["say 0", "1", "2"] * 2, "what the user names comes first"
    assert all(set(row.media) == {"image"} for row in by_pattern)


def test_extensions_of_several_parts_name_columns(tmp_path: Path) -> None:
    members = [("a.speech.wav", sound(0.1)), ("a.music.wav", sound(0.2)), ("a.text", b"hi"), ("a.npy", b"..")]
    (row,), errors = split(tar_of(tmp_path / "t.tar", members))
    assert errors == [] and row.text == "hi" and set(row.media) == {"speech", "music"}


def test_braces(tmp_path: Path) -> None:
    assert expand_braces(Path("d-{008..010}.tar")) == [Path(f"d-{n}.tar") for n in ("008", "009", "010")]
    assert expand_braces(Path("{a,b}-{0..1}.tar")) == [Path(f"{p}.tar") for p in ("a-0", "a-1", "b-0", "b-1")]
    for bad in ("{0..99999999999}.tar", "{3..1}.tar", "{x}.tar", "{0..999}{0..999}{0..999}.tar"):
        with pytest.raises(ManifestError, match="is no list of 1 to 1000000 shards"):
            expand_braces(Path(bad))
    tar_of(tmp_path / "d-1.tar", [("a.txt", b"x")])
    rows, (error,) = split(tmp_path / "d-{0..1}.tar")
    assert len(rows) == 1 and error.row == 0 and error.file.endswith("d-0.tar") and "No such file" in error.error


def test_bad_samples_of_a_tar_stand_in_line(tmp_path: Path) -> None:
    members = [
        ("1.txt", b"good"),
        ("2.txt", b"\xff\xfe"),
        ("3.json", b"[1]"),
        ("4.json", b'{"caption": 3}'),
        ("5.json", b'{"caption": '),
        ("6.txt", b"one"), ("6.txt", b"two"),
        ("7.npy", b"1234"),
        ("8.json", b"[" * 100_000),
        ("9.txt", b"  "),
        ("10.txt", b"good too"),
    ]  # fmt: skip
    rows, errors = split(tar_of(tmp_path / "t.tar", members))
    assert [(row.number, row.text) for row in rows] == [(1, "good"), (10, "good too")]
    expected = {
        2: "not UTF-8 text", 3: "JSON list", 4: "caption is 3", 5: "not UTF-8 JSON", 6: "stands twice under one key",
        7: "none of the columns", 8: "JSON", 9: "neither text nor media",
    }  # fmt: skip
    assert {error.row for error in errors} == set(expected)
    for error in errors:
        assert expected[error.row] in error.error, error
    assert errors[0].file == f"{tmp_path / 't.tar'}::2.txt"


def test_a_column_that_no_sample_has_is_named(tmp_path: Path) -> None:
    rows, (error,) = split(tar_of(tmp_path / "t.tar", [("1.txt", b"x")]), {"picture": "image"})
    assert len(rows) == 1 and error.row == 0 and "no column 'picture'" in error.error


def test_hostile_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that lead out are only names, links are not followed, and sizes are checked before anything is read."""
    secret = put(tmp_path / "secret.txt", "secret")
    path = tmp_path / "in" / "t.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../out.txt", "/abs/out.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        for kind, name in ((tarfile.SYMTYPE, "sym.txt"), (tarfile.LNKTYPE, "hard.txt"), (tarfile.FIFOTYPE, "pipe.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("big.txt")
        info.size = 2000
        tar.addfile(info, io.BytesIO(bytes(2000)))
        info = tarfile.TarInfo("last.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"last"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(tars, "MAX_TEXT", 1000)
    rows, errors = split(path)
    assert [row.text for row in rows] == ["text", "text", "last"]
    assert ["link" in error.error for error in errors] == [True, True, True, False]
    assert "states 2000 bytes, more than 1000" in errors[-1].error
    assert sorted(tmp_path.rglob("*")) == before


def header(name: str, size_field: bytes, kind: bytes = b"0") -> bytes:
    """A tar header whose size field says what it likes, with a right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size_field
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "field",
    [
        b"77777777777\0",  # 8 GiB
        b"\x80" + (2**62).to_bytes(11, "big"),
        b"\xff" + (2**88 - 1024).to_bytes(11, "big"),  # negative
        b"not a number",
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_giant_and_negative_sizes(tmp_path: Path, field: bytes, kind: bytes) -> None:
    whole = tar_of(tmp_path / "t.tar", [("0.txt", b"good"), ("1.txt", b"x")]).read_bytes()[:2048]
    path = put(tmp_path / "t.tar", whole + header("2.txt", field, kind) + whole + bytes(1024))
    rows, errors = split(path)
    assert rows[0].text == "good"
    assert errors, "what was lost is named"
    assert all("t.tar" in error.file for error in errors)


def test_truncated_and_damaged_tars(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(i, 64)) for i in range(5)]
    whole = tar_of(tmp_path / "t.tar", members).read_bytes()
    third = whole.index(b"3.png")
    end = whole.rindex(b"IEND") // 512 * 512 + 512
    for cut, sample in ((third, 3), (third + 100, 3), (third + 512, 3), (third + 530, 3), (end, 5)):
        rows, (error,) = split(put(tmp_path / "cut.tar", whole[:cut]))
        assert len(rows) == sample - 1 and error.row == sample, cut
        assert f"truncated or damaged from sample {sample} on" in error.error and "get it again" in error.error
    broken = bytearray(whole)
    broken[third : third + 512] = b"\x01" * 512  # tarfile takes this for the end
    rows, (error,) = split(put(tmp_path / "broken.tar", bytes(broken)))
    assert len(rows) == 2 and error.row == 3 and "no end mark" in error.error
    for content in (b"", b"I am no tar.", b"\0" * 10240):
        with pytest.raises(ManifestError, match="readable tar|holds no samples"):
            list(read_manifest(put(tmp_path / "no.tar", content)))


def test_tars_are_prepared_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [m for i in range(6) for m in ((f"{i}.png", png(20 * i)), (f"{i}.txt", b"it is %d" % i))]
    members.insert(6, ("2b.png", b"no picture"))
    source, out = tar_of(tmp_path / "in" / "t.tar", members), tmp_path / "out"
    monkeypatch.setattr(prepare_module, "HELD_BYTES", 2 * len(png(0)))
    report = prepare([source], {"image": Mean()}, out)
    assert (report.num_good, report.num_bad) == (6, 1) and report.num_shards >= 3, "memory is bounded by bytes held"
    rows = list(read_prepared(out))
    assert [row.text for row in rows] == [f"it is {i}" for i in range(6)]
    assert [int(row.codes["image"].max()) for row in rows] == [20 * i for i in range(6)]
    assert f"{source}::2b.png: not a picture" in (out / "errors.jsonl").read_text()
    again = prepare([source], {"image": Mean()}, out)
    assert again.num_reused_shards == again.num_shards == report.num_shards
    members[0] = ("0.png", png(99))
    tar_of(source, members)
    assert prepare([source], {"image": Mean()}, out).num_reused_shards == report.num_shards - 1
    assert int(next(iter(read_prepared(out))).codes["image"].max()) == 99


# Hugging Face datasets


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    entries = {
        "caption": [f"it is {i}" for i in range(70)],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(70)],
        "score": list(range(70)),
    }
    made = datasets.Dataset.from_dict(entries).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "dict")
    made.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", batch_size=20)
    made.to_parquet(tmp_path / "one.parquet")
    counts = {"saved": 70, "dict": 73, "hub": 70, "one.parquet": 70}
    for name, count in counts.items():
        rows, errors = split(tmp_path / name)
        assert errors == [] and len(rows) == count, name
        for i, row in enumerate(rows[:70]):
            assert row.text == f"it is {i}"
            theirs = np.asarray(made[i]["image"].convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
            assert np.array_equal(read_image(row.media["image"]).numpy(), theirs)
    (arrow, _) = sorted((tmp_path / "saved").glob("*.arrow"))
    assert len(split(arrow)[0]) == 35
    report = prepare([tmp_path / "hub"], {"image": Mean()}, tmp_path / "out", rows_per_shard=32)
    assert (report.num_good, report.num_bad, report.num_shards) == (70, 0, 3)


def test_audio_structs_bytes_and_names(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    clip = sound()
    put(tmp_path / "wavs" / "b.wav", clip)
    structs = [
        {"bytes": clip, "path": None}, {"bytes": None, "path": "wavs/b.wav"}, {"bytes": None, "path": "../b.wav"},
        {"bytes": None, "path": "/etc/hostname"}, None, {"bytes": None, "path": "http://x/b.wav"},
    ]  # fmt: skip
    table = pa.table({"audio": structs, "text": ["a", "b", "c", "d", None, "f"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    feather.write_feather(table, tmp_path / "t.arrow")
    for name in ("t.parquet", "t.arrow"):
        rows, errors = split(tmp_path / name, {"audio": "speech"})
        assert [(row.number, row.text) for row in rows] == [(1, "a"), (2, "b")]
        assert held(rows[0], "speech") == clip and rows[1].media["speech"] == tmp_path / "wavs" / "b.wav"
        assert [(e.row, e.source) for e in errors] == [(n, str(tmp_path / name)) for n in (3, 4, 5, 6)]
        for error, words in zip(errors, ("leads out", "leads out", "every cell", "download"), strict=True):
            assert words in error.error
    plain = pa.table({"image": [png(1), None], "caption": pa.array(["a", "b"], pa.large_string())})
    parquet.write_table(plain, tmp_path / "p.parquet")
    rows, errors = split(tmp_path / "p.parquet")
    assert errors == [] and held(rows[0], "image") == png(1) and rows[1].media == {}


def test_tables_of_no_use(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, **columns: Any) -> Path:
        parquet.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    for path, message in (
        (write("a.parquet", text=[1, 2]), "column 'text' has the type int64, text needs strings"),
        (write("b.parquet", image=[[1, 2]]), "column 'image' has the type list.*--column image=ignore"),
        (write("c.parquet", image=[{"bytes": 3, "path": "x"}]), "column 'image' has the type struct"),
        (write("d.parquet", other=["x"]), "none of the columns other"),
        (write("e.parquet", text=pa.array([], pa.string())), "holds no rows"),
        (put(tmp_path / "f.parquet", b"PAR1" + bytes(100) + b"PAR1"), "no readable table"),
        (put(tmp_path / "g.parquet", b""), "no readable table"),
        (put(tmp_path / "h.arrow", b"ARROW1" + bytes(100)), "no readable table"),
        (put(tmp_path / "i.arrow", b"\xff" * 100), "no readable table"),
    ):
        with pytest.raises(ManifestError, match=message):
            list(read_manifest(path))
    with pytest.raises(ManifestError, match="no column 'picture'"):
        list(read_manifest(write("j.parquet", text=["x"]), {"picture": "image"}))


def test_a_table_is_never_held_whole(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    random = np.random.default_rng(0)
    schema = pa.schema([("image", pa.binary())])
    with parquet.ParquetWriter(tmp_path / "t.parquet", schema, compression="none") as writer:
        for _ in range(24):  # row groups of 1 MB
            writer.write_table(pa.table({"image": [random.bytes(20_000) for _ in range(50)]}, schema=schema))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_manifest(tmp_path / "t.parquet")]
    assert len(held) == 1200 and max(held) < 8e6, "24 MB in all"


def test_damage_inside_a_table_costs_what_follows_only(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"text": [f"text number {i} " + "ab" * i for i in range(300)]})
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(table, path, row_group_size=100, compression="snappy", use_dictionary=False)
    third = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    broken = bytearray(path.read_bytes())
    start = third.data_page_offset
    broken[start : start + 60] = b"\xee" * 60
    path.write_bytes(broken)
    parquet.write_table(table.slice(0, 5), path.with_name("b.parquet"))
    rows, (error,) = split(path.parent)
    numbers = [row.number for row in rows]
    assert numbers[-5:] == [1, 2, 3, 4, 5], "the next file is read"
    assert numbers[:-5] == list(range(1, error.row)) and 100 < error.row <= 201
    assert "truncated or damaged after" in error.error


def test_save_to_disk_lists_that_lead_out(tmp_path: Path) -> None:
    put(tmp_path / "d" / "dataset_info.json", "{}")
    for names, message in (([{"filename": "../x.arrow"}], "leads out"), ([3], "not a file name"), ({}, "names no")):
        put(tmp_path / "d" / "state.json", json.dumps({"_data_files": names}))
        with pytest.raises(ManifestError, match=message):
            list(read_manifest(tmp_path / "d"))
    put(tmp_path / "d" / "state.json", json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    rows, (error,) = split(tmp_path / "d")
    assert rows == [] and "gone.arrow" in error.file and error.row == 0


# LibriSpeech, LJSpeech


def make_librispeech(root: Path) -> Path:
    for speaker, chapter in (("19", "198"), ("19", "227"), ("103", "1240")):
        lines = []
        for i in range(2):
            name = f"{speaker}-{chapter}-{i:04d}"
            put(root / "train-clean-100" / speaker / chapter / f"{name}.flac", sound(kind="FLAC"))
            lines.append(f"{name} HE SAID {i}")
        put(root / "train-clean-100" / speaker / chapter / f"{speaker}-{chapter}.trans.txt", "\n".join(lines) + "\n")
    put(root / "SPEAKERS.TXT", "; some notes")
    return root


def test_librispeech(tmp_path: Path) -> None:
    root = make_librispeech(tmp_path / "LibriSpeech")
    rows, errors = split(root)
    assert errors == [] and [row.number for row in rows] == list(range(1, 7))
    names = [Path(str(row.media["speech"])).name for row in rows]
    assert names[:3] == ["103-1240-0000.flac", "103-1240-0001.flac", "19-198-0000.flac"]
    assert rows[0].text == "HE SAID 0"
    report = prepare([root], {"speech": Mean("speech")}, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (6, 0)
    assert all(row.codes["speech"].shape == (1, 5) for row in read_prepared(tmp_path / "out"))
    as_audio, _ = split(root, {"speech": "audio", "text": "ignore"})
    assert all(row.text is None and set(row.media) == {"audio"} for row in as_audio)
    with pytest.raises(ManifestError, match="no column 'wav'; the columns are text, speech"):
        list(read_manifest(root, {"wav": "speech"}))


def test_librispeech_with_faults(tmp_path: Path) -> None:
    root = make_librispeech(tmp_path / "LibriSpeech") / "train-clean-100"
    put(root / "19/198/19-198.trans.txt", b"19-198-0000 GOOD\n19-198-0000 AGAIN\n../x Y\n19-198-0007\n\xff\xfe\n")
    (root / "103/1240/103-1240.trans.txt").unlink()
    (root / "19/227/19-227-0001.flac").unlink()
    rows, errors = split(root)
    assert [row.text for row in rows] == ["GOOD", "HE SAID 0", "HE SAID 1"]
    kinds = ["no transcript"] * 2 + ["is not an id"] * 3 + ["UTF-8", "no transcript"]
    assert len(errors) == len(kinds)
    for error, words in zip(errors, kinds, strict=True):
        assert words in error.error
    report = prepare([root], {"speech": Mean("speech")}, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (2, 8)
    assert "19-227-0001.flac: no such file" in (tmp_path / "out" / "errors.jsonl").read_text()


def test_ljspeech(tmp_path: Path) -> None:
    lines = ['LJ001-0001|Printing, in the "only" sense|Printing, in the "only" sense', "LJ001-0002|no 2|no two",
             "LJ001-0003|raw only|", "LJ001-0001|again|again", "../x|a|b", "LJ001-0004", "LJ001-5|a|b|c"]  # fmt: skip
    put(tmp_path / "lj" / "metadata.csv", "\n".join(lines))
    for i in (1, 2):
        put(tmp_path / "lj" / "wavs" / f"LJ001-000{i}.wav", sound())
    rows, errors = split(tmp_path / "lj")
    assert [row.text for row in rows] == ['Printing, in the "only" sense', "no two", "raw only"]
    assert rows[1].media == {"speech": tmp_path / "lj" / "wavs" / "LJ001-0002.wav"}
    assert [error.row for error in errors] == [4, 5, 6, 7]
    assert prepare([tmp_path / "lj"], {"speech": Mean("speech")}, tmp_path / "out").num_good == 2


# COCO


def coco(path: Path, images: Any, annotations: Any) -> Path:
    return put(path, json.dumps({"info": {}, "images": images, "annotations": annotations}))


def test_coco_captions(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    for i in range(3):
        put(root / "val2017" / f"{i:012d}.png", png(50 * i))
    images = [{"id": 100 + i, "file_name": f"{i:012d}.png", "height": 16, "width": 16} for i in (2, 0, 1)]
    notes = [{"id": i, "image_id": 100 + i % 3, "caption": f" caption {i}\n"} for i in range(9)]
    path = coco(root / "annotations" / "captions_val2017.json", images, notes)
    for source in (path, root, root / "annotations"):
        rows, errors = split(source)
        assert errors == []
        assert [row.text for row in rows] == [f"caption {i}" for i in (2, 5, 8, 0, 3, 6, 1, 4, 7)]
        assert rows[0].number == 3 and rows[0].media == {"image": root / "val2017" / "000000000002.png"}
    tokenizer = Mean()
    report = prepare([root], {"image": tokenizer}, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (9, 0)
    assert tokenizer.items == 3, "a picture is encoded once for all of its captions"
    levels = {row.text: int(row.codes["image"].max()) for row in read_prepared(tmp_path / "out")}
    assert levels == {f"caption {i}": 50 * (i % 3) for i in range(9)}
    (root / "val2017").rename(tmp_path / "pictures")
    rows, _ = split(path, images=tmp_path / "pictures")
    assert rows[0].media["image"] == tmp_path / "pictures" / "000000000002.png"
    with pytest.raises(ManifestError, match="is no folder"):
        list(read_manifest(path, images=tmp_path / "gone"))


def test_one_bad_picture_of_coco_costs_all_its_captions(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", b"no picture")
    put(tmp_path / "images" / "b.png", png(9))
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab")]
    notes = [{"image_id": i % 2, "caption": f"{i}"} for i in range(4)]
    path = coco(tmp_path / "captions_x.json", images, notes)
    report = prepare([path], {"image": Mean()}, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (2, 2)


def test_coco_with_faults(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "../../etc/passwd"},
        {"id": 3, "file_name": "/etc/passwd"}, {"file_name": "c.png"}, 7, {"id": [], "file_name": "c.png"}, {"id": 4},
    ]  # fmt: skip
    notes = [
        {"image_id": 1, "caption": "good"}, {"image_id": 2, "caption": "x"}, {"image_id": 3, "caption": "x"},
        {"image_id": 9, "caption": "x"}, {"image_id": 1}, {"image_id": 1, "caption": 3}, None,
        {"image_id": 4, "caption": "x"},
    ]  # fmt: skip
    rows, errors = split(coco(tmp_path / "captions_x.json", images, notes))
    assert [(row.number, row.text, row.media["image"].name) for row in rows] == [(1, "good", "a.png")]
    assert sorted(error.row for error in errors) == [0, 0, 0, 0, 2, 3, 4, 5, 6, 7, 8]
    words = {2: "leads out", 3: "leads out", 4: "not among images", 5: "lacks 'caption'", 8: "lacks 'file_name'"}
    for error in errors:
        assert words.get(error.row, "") in error.error
    for content, message in (
        ("{", "is not JSON"), ("[1]", "is no COCO"), ('{"images": [], "annotations": [1]}', "is no COCO"),
        ('{"images": {"a": 1}, "annotations": [1]}', "is no COCO"), ("[" * 200_000, "is not JSON"),
    ):  # fmt: skip
        with pytest.raises(ManifestError, match=message):
            list(read_manifest(put(tmp_path / "x.json", content)))


# Anything at all


def test_mutated_containers_never_raise_anything_else(tmp_path: Path) -> None:
    """Bytes changed, zeroed or cut off at random: rows, bad rows or a ManifestError, nothing else."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = pa.table({"text": [f"it is {i}" for i in range(60)], "image": [{"bytes": png(9), "path": None}] * 60})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed", chunksize=20)
    tar_of(tmp_path / "a.tar", [(f"{i}.{end}", png(i)) for i in range(5) for end in ("png", "txt", "json")])
    coco(tmp_path / "a.json", [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "caption": "x"}] * 3)
    random = np.random.default_rng(0)
    outcomes = {"rows": 0, "refused": 0}
    for path in sorted(tmp_path.glob("a.*")):
        whole = path.read_bytes()
        for _ in range(60):
            content = bytearray(whole[: random.integers(1, len(whole)) if random.random() < 0.2 else None])
            for at in random.integers(0, len(content), random.integers(1, 6)):
                content[at : at + 4] = random.choice([b"\0", b"\xff", b"\x7f", random.bytes(1)]) * 4
            try:
                outcomes["rows"] += len(split(put(path.with_name("b" + path.suffix), bytes(content)))[0]) > 0
            except ManifestError as error:
                outcomes["refused"] += "b" + path.suffix in str(error)
    assert outcomes["rows"] > 20 and outcomes["refused"] > 50
