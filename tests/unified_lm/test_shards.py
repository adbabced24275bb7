"""Shards: what goes in comes out, damage and mismatches are named, half-written folders never appear."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.shards import ShardError, ShardReader, ShardWriter, open_shards
from anyglot_lm.text import TextTokenizer
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import FingerprintError, ManifestError

TEXT = TextTokenizer.train(["a red circle"], vocab_size=280)
IMAGE = BlockSpec("image", "i" * 64, 16, pattern="raster", grid=(2, 2))
SPEECH = BlockSpec("speech", "s" * 64, 8, 2, input_pattern="first")
VOCABULARY = Vocabulary.build(TEXT.size, IMAGE, SPEECH, text_fingerprint=TEXT.fingerprint)


def sample(seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        [
            Segment("speech", rng.integers(0, 8, (2, 1 + seed % 7)), "user"),
            Segment("text", "a red circle " * (seed % 3), "user"),
            Segment("image", rng.integers(0, 16, (1, 2, 2)), "assistant"),
        ]
    )


def write(path: Path, count: int = 20, vocabulary: Vocabulary = VOCABULARY) -> ShardReader:
    with ShardWriter(path, vocabulary, text=TEXT) as writer:
        for i in range(count):
            writer.add_sample(sample(i), f"task{i % 2}")
    return ShardReader(path)


def test_roundtrip(tmp_path: Path) -> None:
    reader = write(tmp_path / "a")
    assert len(reader) == 20 and reader.task_names == ["task0", "task1"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    for i in range(20):
        ids, loss = CHAT.render(sample(i), VOCABULARY, TEXT)
        got_ids, got_loss = reader.doc(i)
        assert np.array_equal(ids, got_ids) and np.array_equal(loss, got_loss)
        assert got_ids.dtype == np.int64 and reader.lengths[i] == len(ids)
    assert reader.tasks.tolist() == [0, 1] * 10
    image = reader.sample(3, TEXT).segments[-1]
    assert np.array_equal(image.content, sample(3).segments[-1].content)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["dtype"] == "<u2" and meta["ids"] == int(reader.lengths.sum()) and meta["checked"] >= 1
    assert meta["tokenizers"] == {"image": "i" * 64, "speech": "s" * 64}
    assert sum(t["ids"] for t in meta["tasks"]) == meta["ids"]
    assert Vocabulary.load(tmp_path / "a" / "vocabulary.json") == VOCABULARY
    with pytest.raises(IndexError):
        reader.doc(20)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), min_size=1, max_size=6))
def test_any_loss_mask(tmp_path_factory: pytest.TempPathFactory, masks: list[list[bool]]) -> None:
    path = tmp_path_factory.mktemp("shards") / "a"
    c = VOCABULARY.controls
    documents = []
    for mask in masks:
        ids = np.array([c["bos"], c["user"], *([7] * len(mask)), c["eos"]])
        documents.append((ids, np.array([False, False, *mask, False])))
    with ShardWriter(path, VOCABULARY, text=TEXT) as writer:
        for ids, loss in documents:
            writer.add(ids, loss, "t")
    reader = ShardReader(path)
    for i, (ids, loss) in enumerate(documents):
        assert np.array_equal(reader.doc(i)[0], ids) and np.array_equal(reader.doc(i)[1], loss)


def test_ids_are_counted_by_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = write(tmp_path / "a")
    expected = np.zeros((2, 3), dtype=np.int64)
    for i in range(20):
        for run in VOCABULARY.split(reader.doc(i)[0]):
            column = ["image", "speech"].index(run.name) + 1 if run.kind == "media" else 0
            expected[i % 2, column] += run.stop - run.start
    assert np.array_equal(reader.modality_ids(), expected)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["tasks"][1]["modalities"] == dict(zip(("text", "image", "speech"), expected[1].tolist(), strict=True))
    for task in meta["tasks"]:
        del task["modalities"]
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setattr("anyglot_lm.shards.SCANNED", 50)
    old = ShardReader(tmp_path / "a")
    assert np.array_equal(old.modality_ids(), expected) and old.fingerprint == reader.fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    wide = Vocabulary.build(TEXT.size, IMAGE, SPEECH, BlockSpec("music", "m", 1 << 16))
    reader = write(tmp_path / "a", 3, wide)
    assert reader.meta["dtype"] == "<u4"
    assert np.array_equal(reader.doc(2)[0], CHAT.render(sample(2), wide, TEXT)[0])


def test_mismatches_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a")
    other = Vocabulary.build(
        TEXT.size,
        BlockSpec(**{**vars(IMAGE), "fingerprint": "z" * 64}),
        SPEECH,
        text_fingerprint=TEXT.fingerprint,
    )
    ShardReader(tmp_path / "a", VOCABULARY, CHAT)
    with pytest.raises(FingerprintError, match=r"shards .*a and the model differ: block 'image' is of tokenizer ii"):
        ShardReader(tmp_path / "a", other)
    write(tmp_path / "b", 3, other)
    with pytest.raises(FingerprintError, match="block 'image'"):
        open_shards([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ManifestError, match="at least one"):
        open_shards([])


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a")
    ids = tmp_path / "a" / "ids.bin"
    content = bytearray(ids.read_bytes())
    content[5] ^= 1
    ids.write_bytes(content)
    ShardReader(tmp_path / "a")
    with pytest.raises(ShardError, match=r"ids.bin: its sha256"):
        ShardReader(tmp_path / "a", verify=True)
    ids.write_bytes(content[:-2])
    with pytest.raises(ShardError, match=r"ids.bin: has .* bytes instead of"):
        ShardReader(tmp_path / "a")
    ids.unlink()
    with pytest.raises(ShardError, match="is missing"):
        ShardReader(tmp_path / "a")
    with pytest.raises(ManifestError, match="cannot be read"):
        ShardReader(tmp_path / "nowhere")


def test_nothing_is_left_of_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path / "a", VOCABULARY, text=TEXT) as writer:
            writer.add_sample(sample(0), "t")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError, match="no documents"):
        with ShardWriter(tmp_path / "a", VOCABULARY):
            pass
    assert list(tmp_path.iterdir()) == []


def test_garbled_documents_are_found_at_write_time(tmp_path: Path) -> None:
    block = VOCABULARY.block("image")
    ids = [
        VOCABULARY.controls["bos"],
        VOCABULARY.controls["assistant"],
        block.start_id,
        block.first_id,
        block.end_id,
    ]
    writer = ShardWriter(tmp_path / "a", VOCABULARY)
    writer.add([*ids, VOCABULARY.controls["eos"]], np.ones(6, bool), "t")
    with pytest.raises(ShardError, match=r"document 0 does not decode \(image: a span holds 4 ids, got 1"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_overwrite_is_on_purpose(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 3)
    with pytest.raises(ManifestError, match="exists already"):
        write(tmp_path / "a", 4)
    with ShardWriter(tmp_path / "a", VOCABULARY, text=TEXT, overwrite=True) as writer:
        writer.add_sample(sample(5), "t")
    again = ShardReader(tmp_path / "a")
    assert len(again) == 1 and again.fingerprint != first.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    assert write(tmp_path / "a").fingerprint == write(tmp_path / "b").fingerprint
    assert write(tmp_path / "c", 19).fingerprint != write(tmp_path / "d").fingerprint


def test_pickle_carries_the_path_only(tmp_path: Path) -> None:
    reader = write(tmp_path / "a")
    data = pickle.dumps(reader)
    assert len(data) < 500
    assert np.array_equal(pickle.loads(data).doc(3)[0], reader.doc(3)[0])


@pytest.mark.parametrize(
    ("ids", "loss", "problem"),
    [
        ([1], [True], "N >= 2"),
        ([1, 2], [True], "N >= 2"),
        ([1, 2], [0, 1], "loss bool"),
        ([1.0, 2.0], [False, True], "ids int"),
        ([1, 2], [True, False], "prediction target"),
        ([1, 99999], [False, True], "leave the vocabulary"),
    ],
)
def test_bad_documents(tmp_path: Path, ids: list[float], loss: list[int], problem: str) -> None:
    with pytest.raises(ShardError, match=problem):
        with ShardWriter(tmp_path / "a", VOCABULARY) as writer:
            writer.add(ids, loss, "t")
