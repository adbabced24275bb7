"""The field data: nobody and nothing held out is in training, and augmentation keeps what the tokenizers expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_recipes.field import (
    IMAGE_SIZE,
    SAMPLE_RATE,
    WORDS,
    FieldData,
    FieldDataConfig,
    Picture,
    read_field_data,
    vary_picture,
    vary_speech,
)
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.media import write_audio


@pytest.fixture(scope="module")
def data(shared_data: Path) -> FieldData:
    return read_field_data(FieldDataConfig(root=str(shared_data / "real")))


def test_the_held_out_speaker_is_only_in_test(data: FieldData) -> None:
    assert {c.speaker for c in data.test_clips} == {"jackson"}
    assert "jackson" not in {c.speaker for c in data.clips} and len({c.speaker for c in data.clips}) >= 3
    for clips in (data.clips, data.test_clips):
        assert {c.digit for c in clips} == set(range(10))


def test_no_picture_is_in_both_splits(data: FieldData) -> None:
    train, test = ({(p.kind, p.name) for p in pictures} for pictures in (data.pictures, data.test_pictures))
    assert not train & test
    pixels = [{p.pixels.tobytes() for p in pictures} for pictures in (data.pictures, data.test_pictures)]
    assert not pixels[0] & pixels[1]
    for kind in ("sign", "emoji"):
        held = sum(k == kind for k, _ in test)
        assert 0.05 < held / (held + sum(k == kind for k, _ in train)) < 0.15
    for pictures in (data.pictures, data.test_pictures):
        assert {p.word for p in pictures if p.kind == "sign"} == set(WORDS)


def test_media_are_what_the_tokenizers_take(data: FieldData) -> None:
    for picture in (*data.pictures[:5], *data.test_pictures[-5:]):
        assert picture.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and picture.pixels.dtype == np.uint8
        assert picture.word == picture.word.lower() != ""
    for audio in (*(c.audio for c in data.test_clips[:20]), *data.unlabelled[:3]):
        assert audio.dtype == np.float32 and audio.ndim == 1 and np.abs(audio).max() <= 0.951
    assert data.unlabelled


def test_vary_speech_keeps_kind_and_range(data: FieldData) -> None:
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    for clip in data.clips[:20]:
        varied = vary_speech(clip.audio, rng)
        assert varied.dtype == np.float32 and varied.ndim == 1 and np.isfinite(varied).all()
        assert np.abs(varied).max() <= 1
        assert 0.75 * len(clip.audio) < len(varied) < 1.3 * len(clip.audio) + 0.2 * SAMPLE_RATE
        assert np.array_equal(varied, vary_speech(clip.audio, again))


@pytest.mark.parametrize("kind", ["sign", "emoji"])
def test_vary_picture_keeps_kind_and_range(kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    before = pixels.copy()
    varied = [vary_picture(Picture(kind, "one", pixels, "a.png"), rng) for _ in range(10)]
    assert np.array_equal(pixels, before)
    assert all(v.shape == pixels.shape and v.dtype == np.uint8 for v in varied)
    assert len({v.tobytes() for v in varied}) > 5
    if kind == "emoji":  # moved, never recolored or mirrored
        colors = {tuple(c) for c in pixels.reshape(-1, 3)}
        assert all({tuple(c) for c in v.reshape(-1, 3)} <= colors for v in varied)


def test_an_unknown_speaker_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "spoken_digits").mkdir()
    for name in ("3_theo_0", "4_lucas_1"):
        write_audio(tmp_path / "spoken_digits" / f"{name}.wav", torch.full((1, 800), 0.1), SAMPLE_RATE)
    with pytest.raises(ManifestError, match="no clips of held_out_speaker 'nobody'; speakers found: lucas, theo"):
        read_field_data(FieldDataConfig(root=str(tmp_path), held_out_speaker="nobody"))


def test_missing_data_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="speakers found: none .*--data.root"):
        read_field_data(FieldDataConfig(root=str(tmp_path / "missing")))
