"""Chorales of the field trial: what is moved into a key is in that key, and no piece is on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyglot_recipes.field import FieldData, FieldDataConfig, read_field_data
from anyglot_recipes.field_graders import lowest_tone, train_key_listener
from anyglot_recipes.field_music import SECONDS, in_ten_keys, play, read_chorales
from anyglot_synth.nanoworld.melody import Note, read_midi, write_midi
from anyglot_tokenizers.errors import ManifestError, MediaError


@pytest.fixture(scope="module")
def data(shared_data: Path) -> FieldData:
    return read_field_data(FieldDataConfig(root=str(shared_data / "real")))


def test_a_piece_ends_on_the_tone_of_the_digit() -> None:
    before = [Note(float(i), 1.0, 60 + i, "strings") for i in range(6)]
    last = [Note(6.0, 2.0, pitch, "strings") for pitch in (43, 62, 67, 71)]  # G major
    keys = in_ten_keys("a", [*before, *last])
    assert [k.digit for k in keys] == list(range(10))
    for key in keys:
        assert min(n.midi_pitch for n in key.notes) % 12 == key.digit
        assert -6 <= key.notes[-1].midi_pitch - 71 <= 5
        assert [n.start_s for n in key.notes] == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]  # two of the six, and the chord
        steps = np.diff([n.midi_pitch for n in key.notes])
        assert list(steps) == [1, 43 - 65, 19, 5, 4]


def test_notes_that_sound_when_it_begins_are_cut() -> None:
    (key, *_) = in_ten_keys("a", [Note(0.0, 5.0, 48, "strings"), Note(5.0, 1.0, 48, "strings")])
    assert [(n.start_s, n.duration_s) for n in key.notes] == [(0.0, 3.0), (3.0, 1.0)]


def test_no_piece_is_on_both_sides(data: FieldData) -> None:
    train, test = ({c.name for c in side} for side in (data.chorales, data.test_chorales))
    assert not train & test and not {c.notes for c in data.chorales} & {c.notes for c in data.test_chorales}
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.15
    assert len(data.test_chorales) == 10 * len(test) and {c.digit for c in data.test_chorales} == set(range(10))


def test_what_is_played_is_in_the_key(data: FieldData) -> None:
    rng = np.random.default_rng(0)
    for i, chorale in enumerate(data.test_chorales[3::37]):
        sound = play(chorale, rng if i % 2 else None)
        assert sound.dtype == np.float32 and sound.shape == (int(SECONDS * 16_000),)
        assert float(np.sqrt(np.mean(sound**2))) > 0.01 and float(np.abs(sound).max()) < 0.96
        assert lowest_tone(sound) == chorale.digit
    assert np.array_equal(play(chorale), play(chorale)) and not np.array_equal(play(chorale, rng), play(chorale, rng))


def test_silence_and_tones_of_no_digit_are_no_key() -> None:
    assert lowest_tone(np.zeros(64_000, np.float32)) is None
    for pitch, digit in ((57, 9), (58, None), (59, None), (60, 0)):
        tone = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * np.arange(64_000) / 16_000).astype(np.float32)
        assert lowest_tone(0.3 * tone) == digit


def test_the_judge_of_keys_knows_pieces_it_never_heard(data: FieldData) -> None:
    listen = train_key_listener(data.chorales[:600], seed=0, steps=200)
    asked = data.test_chorales[::7]
    right = [found == c.digit for found, c in zip(listen([play(c) for c in asked]), asked, strict=True)]
    assert len(right) > 40 and np.mean(right) > 0.9


def test_folders_that_hold_no_music_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no MIDI files"):
        read_chorales(tmp_path)
    write_midi(tmp_path / "a.mid", [])
    with pytest.raises(ManifestError, match=r"a\.mid: a MIDI file without notes"):
        read_chorales(tmp_path)


def test_any_program_is_read_if_an_instrument_is_named(tmp_path: Path) -> None:
    write_midi(tmp_path / "a.mid", [Note(0.0, 1.0, 60, "flute")])
    piano = (tmp_path / "a.mid").read_bytes().replace(bytes([0xC0, 73]), bytes([0xC0, 0]))
    (tmp_path / "a.mid").write_bytes(piano)
    with pytest.raises(MediaError, match="a note of MIDI program 0"):
        read_midi(tmp_path / "a.mid")
    assert read_midi(tmp_path / "a.mid", otherwise="bell") == [Note(0.0, 1.0, 60, "bell")]
