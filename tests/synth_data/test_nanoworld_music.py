"""Melodies: the rule, MIDI files, and that what is played is heard."""

from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import signal

from anyglot_synth.nanoworld import melody
from anyglot_synth.nanoworld.listen import analyse, listen
from anyglot_synth.nanoworld.melody import Note, notes, read_midi, render, scene_of, write_midi
from anyglot_synth.nanoworld.scene import (
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
    score,
)
from anyglot_tokenizers.errors import MediaError

seeds = st.integers(0, 2**32 - 1)
ONE = Scene((Thing("square", "purple", "large", "middle", "center"),))


@given(seeds)
def test_notes(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed), "test" if seed % 2 else "train")
    played = notes(scene)
    assert len(played) == 12 and played[0].start_s == 0
    for before, after in pairwise(played):
        assert after.start_s == pytest.approx(before.start_s + before.duration_s)
    assert 2.4 <= played[-1].start_s + played[-1].duration_s <= 3.6 + 1e-9
    assert scene_of(played) == scene


def test_single_things_all_sound_different() -> None:
    scenes = [Scene((Thing(*values),)) for values in product(SHAPES, COLORS, SIZES, ROWS, COLUMNS)]
    assert len({tuple(notes(scene)) for scene in scenes}) == len(scenes) == 432


def test_scales_and_contours() -> None:
    assert all(len(set(a) & set(b)) <= 1 for a, b in combinations(melody.SCALES.values(), 2))
    for length, contours in melody.CONTOURS.items():
        assert all(len(steps) == length and set(steps) == {0, 1, 2, 3} for steps in contours.values())
        for a, b in combinations(contours.values(), 2):
            assert sum(x != y for x, y in zip(a, b, strict=True)) >= length / 2


def test_other_notes_play_no_scene() -> None:
    played = notes(ONE)
    assert scene_of(played[:-1]) is None
    first = played[0]
    assert scene_of([Note(0.0, first.duration_s, first.midi_pitch + 1, first.instrument), *played[1:]]) is None
    two = Scene((Thing("circle", "red", "large", "top", "left"), Thing("cross", "blue", "large", "top", "right")))
    swapped = [*notes(two)[6:], *notes(two)[:6]]
    times = [note.start_s for note in notes(two)]
    out_of_order = [
        Note(start, note.duration_s, note.midi_pitch, note.instrument)
        for start, note in zip(times, swapped, strict=True)
    ]
    assert scene_of(out_of_order) is None


@settings(max_examples=30)
@given(seeds)
def test_midi_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    path = tmp_path_factory.getbasetemp() / "melody.mid"
    write_midi(path, notes(scene))
    assert read_midi(path) == notes(scene)


def test_midi_follows_tempo_and_running_status(tmp_path: Path) -> None:
    body = b"\x00\xff\x51\x03\x0f\x42\x40"  # one second a quarter note
    body += b"\x00\xc0\x49\x00\x90\x3c\x40\x60\x3c\x00\x00\x3e\x40\x60\x3e\x00\x00\xff\x2f\x00"
    path = tmp_path / "running.mid"
    path.write_bytes(b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk" + len(body).to_bytes(4, "big") + body)
    assert read_midi(path) == [Note(0.0, 1.0, 60, "flute"), Note(1.0, 1.0, 62, "flute")]


def test_bad_midi_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.mid"
    path.write_bytes(b"RIFF....")
    with pytest.raises(MediaError, match=r"bad\.mid: not a MIDI file"):
        read_midi(path)
    write_midi(path, notes(ONE))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(MediaError, match="damaged"):
        read_midi(path)
    path.write_bytes(whole.replace(b"\xc1\x47", b"\xc1\x00"))
    with pytest.raises(MediaError, match="MIDI program 0"):
        read_midi(path)
    with pytest.raises(ValueError, match="cannot write"):
        write_midi(path, [Note(0, 1, 60, "kazoo")])
    assert [file.name for file in tmp_path.iterdir()] == ["bad.mid"]


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_defect(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.mid"
    path.write_bytes(b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk" + len(data).to_bytes(4, "big") + data)
    try:
        read_midi(path)
    except MediaError as error:
        assert "random.mid" in str(error)


def test_audio_is_what_it_promises() -> None:
    audio = render(ONE, np.random.default_rng(1))
    assert audio.dtype == np.float32 and audio.shape == (57600,)
    assert 0.1 < np.abs(audio).max() < 0.95
    np.testing.assert_array_equal(audio, render(ONE, np.random.default_rng(1)))
    np.testing.assert_array_equal(render(ONE), render(notes(ONE)))
    rng = np.random.default_rng(0)
    assert all(len(render(sample_scene(rng))) % 1600 == 0 for _ in range(20))


def test_bad_music_is_refused() -> None:
    with pytest.raises(ValueError, match="no notes"):
        render([])
    with pytest.raises(ValueError, match="instrument is 'kazoo'"):
        render([Note(0, 1, 60, "kazoo")])
    with pytest.raises(ValueError, match="sample rate is 0"):
        render(ONE, sample_rate=0)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_listen_inverts_render(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, "test" if seed % 2 else "train")
    assert listen(render(scene, rng)) == scene


def _noise(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    return audio + rng.normal(0, np.sqrt((audio**2).mean()) * 10 ** (-15 / 20), len(audio))


def _low_pass(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    return np.asarray(signal.sosfilt(signal.butter(6, 4000, fs=16000, output="sos"), audio))


def _phase(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    _, _, spectrum = signal.stft(audio, nperseg=512)
    turned = spectrum * np.exp(1j * rng.normal(0, 0.7, spectrum.shape))
    return np.asarray(signal.istft(turned, nperseg=512)[1][: len(audio)])


def _ripple(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    spectrum = np.fft.rfft(audio)
    gain = np.interp(np.linspace(0, 1, len(spectrum)), np.linspace(0, 1, 40), rng.uniform(-6, 6, 40))
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(audio))


def _late_and_padded(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    return np.concatenate([np.zeros(400), audio, np.zeros(3200)])


@pytest.mark.parametrize("distort", [_noise, _low_pass, _phase, _ripple, _late_and_padded])
def test_distortion_is_borne(distort) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(40)]
    assert np.mean([score(scene, listen(distort(render(scene, rng), rng))) for scene in scenes]) >= 0.95


def test_other_sample_rates() -> None:
    assert listen(render(ONE, sample_rate=24000), 24000) == ONE
    assert listen(render(ONE, sample_rate=44100), 44100) == ONE


def test_a_cut_melody_is_still_read() -> None:
    assert listen(render(ONE)[:-4800]) == ONE


def test_nothing_is_heard_in_silence_and_noise() -> None:
    rng = np.random.default_rng(0)
    assert listen(np.zeros(48000, np.float32)) is None
    assert listen(np.zeros(0, np.float32)) is None
    assert listen(np.full(48000, np.nan, np.float32)) is None
    for length in (38400, 48000, 57600):
        assert listen(rng.normal(0, 0.2, length)) is None
        assert listen(0.01 * np.cumsum(rng.normal(0, 0.2, length))) is None
    random_pitches = [
        Note(i * 0.2, 0.2, int(rng.integers(48, 84)), str(rng.choice(list(melody.TIMBRES)))) for i in range(12)
    ]
    assert listen(render(random_pitches)) is None


def test_analysis_names_the_notes() -> None:
    hearing = analyse(render(ONE))
    assert hearing is not None and hearing.scene == ONE and hearing.confidence > 0.98
    assert [heard.note for heard in hearing.notes] == notes(ONE)
    assert min(heard.match for heard in hearing.notes) > 0.95


def test_bad_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="one channel"):
        listen(np.zeros((1, 48000), np.float32))
