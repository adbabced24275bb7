"""Exports: read back by the programs of others, in processes that cannot import anyglot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anyglot_synth.dataset import DatasetError, Medium, media_of, read_items
from anyglot_synth.export import EXPORTERS, export

ALONE = """
import importlib.abc, io, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("anyglot"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
folder = sys.argv[1]
"""


def read_alone(code: str, folder: Path, tmp_path: Path) -> Any:
    """What a program without anyglot prints as JSON on its last line."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ALONE + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def media(folder: Path, modality: str) -> list[Medium]:
    found = [medium for item in read_items(folder) for medium in media_of(item.dialogue)]
    return [medium for medium in found if medium.part.modality == modality]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_webdataset(dialogues: Path, tmp_path: Path) -> None:
    done = export(dialogues, "webdataset", tmp_path / "out", max_samples=2)
    assert (done.rows, done.files) == (3, 3) and (tmp_path / "out" / "README.md").is_file()
    code = """
import glob, hashlib, soundfile, webdataset
samples = []
for sample in webdataset.WebDataset(sorted(glob.glob(folder + "/data-*.tar")), shardshuffle=False):
    content = json.loads(sample["json"])
    content["members"] = sorted(key for key in sample if not key.startswith("__"))
    for turn in content["turns"]:
        for part in turn["parts"]:
            if "media" in part:
                data = sample[part["media"]["file"]]
                part["read"] = hashlib.sha256(data).hexdigest()
                if part["modality"] != "image":
                    audio, rate = soundfile.read(io.BytesIO(data))
                    part["heard"] = [rate, len(audio)]
    samples.append(content)
print(json.dumps(samples))
"""
    samples = read_alone(code, tmp_path / "out", tmp_path)
    assert [sample["index"] for sample in samples] == [0, 2, 4]
    parts = [part for sample in samples for turn in sample["turns"] for part in turn["parts"] if "media" in part]
    assert len(parts) == 7 and all(part["read"] == part["media"]["sha256"] for part in parts)
    sounds = [part for part in parts if "heard" in part]
    assert all(p["heard"] == [p["media"]["sample_rate"], p["media"]["num_samples"]] for p in sounds)
    assert samples[2]["members"] == ["1-0.music.flac", "1-0.music.mid", "1-1.image.png", "1-2.speech.flac", "json"]
    for item, sample in zip(read_items(dialogues), samples, strict=True):
        assert sample["id"] == item.dialogue.id and sample["facts"] == dict(item.facts)


AUDIOFOLDER = """
import importlib.util, types
import datasets, soundfile
if importlib.util.find_spec("torchcodec") is None:
    # datasets wants it for every sound, though it reads no sample of a file; its wheels need CUDA, so it may be missing
    for name in ("torchcodec", "torchcodec.encoders"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchcodec.encoders"].AudioEncoder = None
rows = datasets.load_dataset("audiofolder", data_dir=folder, split="train")
rows = rows.cast_column("audio", datasets.Audio(decode=False))
found = []
for row in rows:
    audio = row.pop("audio")
    sound, rate = soundfile.read(io.BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"])
    found.append(row | {"heard": [rate, len(sound)]})
print(json.dumps(found))
"""


@pytest.mark.parametrize("modality", ["speech", "music"])
def test_audiofolder(modality: str, dialogues: Path, tmp_path: Path) -> None:
    done = export(dialogues, "audiofolder", tmp_path / "out", modality=modality)
    rows = read_alone(AUDIOFOLDER, tmp_path / "out", tmp_path)
    expected = media(dialogues, modality)
    assert done.rows == len(rows) == len(expected)
    for row, medium in zip(rows, expected, strict=True):
        assert row["heard"] == [medium.file.sample_rate, medium.file.num_samples] == [16000, row["heard"][1]]
        assert (row["text"], row["role"], row["turn"]) == (medium.part.text, medium.turn.role, medium.turn_number)
        assert row["spoken_text"] == (medium.part.spoken_text or "")
        assert row["seconds"] == pytest.approx(medium.file.seconds, abs=1e-4)
        assert row["licence"] == "CC-BY-4.0 AND CC0-1.0"
    if modality == "speech":
        assert [row["spoken_text"] for row in rows] == ["what is at number two", "a red circle", "thanks", "here"]
        assert rows[0]["speaker"] == rows[2]["speaker"] != rows[1]["speaker"]
        assert rows[0]["dialogue"] == rows[2]["dialogue"] != rows[3]["dialogue"]


def test_audiofolder_without_torchcodec(dialogues: Path, tmp_path: Path) -> None:
    """As the card says: the rows as they are, and soundfile."""
    export(dialogues, "audiofolder", tmp_path / "out")
    code = """
import pathlib, datasets, soundfile
rows = datasets.load_dataset("json", data_files=folder + "/metadata.jsonl", split="train")
print(json.dumps([len(soundfile.read(pathlib.Path(folder) / row["file_name"])[0]) for row in rows]))
"""
    lengths = [medium.file.num_samples for medium in media(dialogues, "speech")]
    assert read_alone(code, tmp_path / "out", tmp_path) == lengths


def test_imagefolder(dialogues: Path, tmp_path: Path) -> None:
    export(dialogues, "imagefolder", tmp_path / "out")
    code = """
import datasets
rows = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
print(json.dumps([row | {"image": row["image"].convert("RGB").tobytes().hex()} for row in rows]))
"""
    rows = read_alone(code, tmp_path / "out", tmp_path)
    from anyglot_synth.store import Store

    for row, medium in zip(rows, media(dialogues, "image"), strict=True):
        pixels = Store(dialogues).picture(medium.file)
        assert bytes.fromhex(row["image"]) == pixels.tobytes() and pixels.std() > 0
        assert row["text"] == medium.part.text and (row["width"], row["height"]) == medium.file.size


def test_parquet(dialogues: Path, tmp_path: Path) -> None:
    export(dialogues, "parquet", tmp_path / "out")
    code = """
import hashlib, pathlib, pyarrow.parquet
rows = pyarrow.parquet.read_table(folder + "/dialogues.parquet").to_pylist()
for row in rows:
    for turn in row["turns"]:
        for part in turn["parts"]:
            if part["media"]:
                part["read"] = hashlib.sha256((pathlib.Path(folder) / part["media"]["file"]).read_bytes()).hexdigest()
print(json.dumps(rows))
"""
    rows = read_alone(code, tmp_path / "out", tmp_path)
    for row, item in zip(rows, read_items(dialogues), strict=True):
        assert (row["index"], row["id"], row["source"]) == (item.index, item.dialogue.id, item.dialogue.source)
        assert json.loads(row["facts"]) == dict(item.facts) and json.loads(row["meta"]) == dict(item.dialogue.meta)
        for turn, read in zip(item.dialogue.turns, row["turns"], strict=True):
            assert [part["text"] for part in read["parts"]] == [part.text for part in turn.parts]
            for part in (part for part in read["parts"] if part["media"]):
                assert part["read"] == part["media"]["sha256"]


def test_the_same_dataset_gives_the_same_bytes(dialogues: Path, tmp_path: Path) -> None:
    for to in EXPORTERS:
        export(dialogues, to, tmp_path / f"{to}-1")
        copied = shutil.copytree(dialogues, tmp_path / "copied", copy_function=shutil.copyfile, dirs_exist_ok=True)
        export(copied, to, tmp_path / f"{to}-2")
        first = contents(tmp_path / f"{to}-1")
        assert first == contents(tmp_path / f"{to}-2") and "README.md" in first


@pytest.mark.parametrize("to", EXPORTERS)
def test_a_file_that_is_not_its_record_s_stops_the_export(to: str, dialogues: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    for path in (mine / "objects").rglob("*.*"):
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DatasetError, match="differs from its record"):
        export(mine, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "nothing is left behind"


def test_into_the_folder_where_one_is(dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(dialogues, "webdataset", ".")
    assert (tmp_path / "here" / "README.md").is_file() and Path("README.md").is_file()  # whoever is there sees it
    (tmp_path / "link").symlink_to(tmp_path / "here" / "none")  # no folder can be renamed to it
    with pytest.raises(DatasetError, match=r"link: cannot be replaced \(Not a directory\); export to another folder"):
        export(dialogues, "webdataset", tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"], "and nothing beside it"


def test_what_cannot_be_exported_says_so(dialogues: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="exists already"):
        export(dialogues, "webdataset", tmp_path / "full")
    with pytest.raises(DatasetError, match="there is no form 'zip'; use one of webdataset, audiofolder"):
        export(dialogues, "zip", tmp_path / "out")
    with pytest.raises(DatasetError, match="imagefolder has no option 'modality'"):
        export(dialogues, "imagefolder", tmp_path / "out", modality="music")
    export(dialogues, "imagefolder", tmp_path / "empty")
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    lines = (mine / "samples.jsonl").read_text().splitlines(keepends=True)
    (mine / "samples.jsonl").write_text(lines[0])
    with pytest.raises(DatasetError, match="hold nothing for imagefolder"):
        export(mine, "imagefolder", tmp_path / "out")
    (mine / "samples.jsonl").write_text(lines[0].replace("CC0-1.0", "CC-BY-NC-4.0"))
    with pytest.raises(DatasetError, match="CC-BY-NC-4.0"):
        export(mine, "webdataset", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(mine, "webdataset", tmp_path / "out", allow_licences=["CC-BY-NC-4.0"]).rows == 1
    assert "CC-BY-NC-4.0" in (tmp_path / "out" / "README.md").read_text()
