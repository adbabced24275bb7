"""Adding a modality moves ids: the map is by meaning, and shards follow it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.remap import remap_shards
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.shards import ShardReader, ShardWriter
from anyglot_lm.text import TextTokenizer
from anyglot_lm.vocabulary import BlockSpec, Vocabulary, id_map
from anyglot_tokenizers.errors import FingerprintError, ManifestError

TEXT = TextTokenizer.train(["a red circle"], vocab_size=280)
IMAGE = BlockSpec("image", "i" * 64, 16, pattern="raster", grid=(2, 2))
SPEECH = BlockSpec("speech", "s" * 64, 8, 2, input_pattern="first", max_frames=20)
MUSIC = BlockSpec("music", "m" * 64, 32)
OLD = Vocabulary.build(TEXT.size, IMAGE, SPEECH, text_fingerprint=TEXT.fingerprint)
NEW = OLD.extended(MUSIC)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            [
                Segment("speech", rng.integers(0, 8, (2, 1 + i % 7)), "user"),
                Segment("text", "a red circle" * (i % 3), "user"),
                Segment("image", rng.integers(0, 16, (1, 2, 2)), "assistant"),
                Segment("speech", rng.integers(0, 8, (2, 3)), "assistant"),
            ]
        )
        for i in range(12)
    ]


def test_extended_keeps_the_blocks_and_their_settings() -> None:
    built = Vocabulary.build(TEXT.size, IMAGE, SPEECH, MUSIC, text_fingerprint=TEXT.fingerprint)
    assert NEW.fingerprint == built.fingerprint and NEW.modalities == ("image", "speech", "music")
    assert OLD.extended().fingerprint == OLD.fingerprint
    with pytest.raises(ManifestError, match="named twice"):
        OLD.extended(IMAGE)


@pytest.mark.parametrize("order", [(IMAGE, SPEECH, MUSIC), (MUSIC, SPEECH, IMAGE)])
def test_ids_keep_their_meaning(order: tuple[BlockSpec, ...]) -> None:
    new = Vocabulary.build(TEXT.size, *order, text_fingerprint=TEXT.fingerprint)
    places = id_map(OLD, new)
    assert places.shape == (OLD.size,) and places.dtype == np.int64
    used = places[places >= 0]
    assert (
        len(used) == len(np.unique(used)) == OLD.blocks[-1].stop_id and (places[OLD.blocks[-1].stop_id :] == -1).all()
    )
    for sample in samples():
        old_ids, old_loss = CHAT.render(sample, OLD, TEXT)
        new_ids, new_loss = CHAT.render(sample, new, TEXT)
        assert np.array_equal(places[old_ids], new_ids) and np.array_equal(old_loss, new_loss)
        assert not np.array_equal(old_ids, new_ids)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (Vocabulary.build(TEXT.size, IMAGE, MUSIC, text_fingerprint=TEXT.fingerprint), "no block 'speech'"),
        (Vocabulary.build(TEXT.size + 1, IMAGE, SPEECH, text_fingerprint=TEXT.fingerprint), "text ids"),
        (Vocabulary.build(TEXT.size, IMAGE, SPEECH, text_fingerprint="x"), "text tokenizer"),
        (
            Vocabulary.build(TEXT.size, IMAGE, BlockSpec("speech", "t" * 64, 8, 2), text_fingerprint=TEXT.fingerprint),
            "block 'speech' is not the same",
        ),
    ],
)
def test_a_vocabulary_that_lost_something_is_refused(new: Vocabulary, message: str) -> None:
    with pytest.raises(FingerprintError, match=message):
        id_map(OLD, new)


def test_shards_follow(tmp_path: Path) -> None:
    for name, vocabulary in (("old", OLD), ("direct", NEW)):
        with ShardWriter(tmp_path / name, vocabulary, text=TEXT) as writer:
            for i, sample in enumerate(samples()):
                writer.add_sample(sample, f"task{i % 2}")
    assert remap_shards(tmp_path / "old", tmp_path / "new", NEW) == 12
    moved, direct = ShardReader(tmp_path / "new", NEW, verify=True), ShardReader(tmp_path / "direct")
    assert moved.fingerprint == direct.fingerprint, "as if written for the new vocabulary"
    with pytest.raises(ManifestError, match="exists already"):
        remap_shards(tmp_path / "old", tmp_path / "new", NEW)
    with pytest.raises(FingerprintError, match="no block 'speech'"):
        remap_shards(
            tmp_path / "old",
            tmp_path / "less",
            Vocabulary.build(TEXT.size, text_fingerprint=TEXT.fingerprint).extended(IMAGE),
        )
    assert not (tmp_path / "less").exists()
