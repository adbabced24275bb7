"""Augmentation: each step does what its figures say, moves nothing in time, and repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyglot_synth.augment import CODECS, AugmentStage, augment, reverb, through_codec
from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.stages import Item
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import ManifestError

RATE = 16_000


def speechlike(seconds: float = 1.5, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Noise in syllables between 300 and 3000 Hz: its place in time is sharp."""
    rng = np.random.default_rng(seed)
    size = round(seconds * rate)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    hz = np.fft.rfftfreq(size, 1 / rate)
    sound = np.fft.irfft(spectrum * ((hz > 300) & (hz < 3000)), size)
    sound *= np.clip(np.sin(2 * np.pi * 3 * np.arange(size) / rate), 0, 1)
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


def lag(sound: np.ndarray, changed: np.ndarray) -> int:
    most = 400
    matches = [np.dot(sound[most:-most], changed[most + k : len(changed) - most + k]) for k in range(-most, most + 1)]
    return int(np.argmax(matches)) - most


def level_db(sound: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(sound.astype(np.float64) ** 2)))


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_codecs_keep_time_and_repeat_themselves(kind: str, rate: int) -> None:
    sound = speechlike(rate=rate)
    for compression in (0.0, 0.9) if kind != "mulaw" else (0.5,):
        coded = through_codec(sound, rate, kind, compression)
        assert coded.dtype == np.float32 and len(coded) == len(sound) and lag(sound, coded) == 0
        assert level_db(coded) == pytest.approx(level_db(sound), abs=2)
        error = level_db(coded - sound) - level_db(sound)
        assert -60 < error < -1.5  # it changes the sound, and leaves most of it
        assert np.array_equal(coded, through_codec(sound, rate, kind, compression))
    assert len(through_codec(sound[:0], rate, kind, 0.5)) == 0
    assert len(through_codec(sound[:50], rate, kind, 0.5)) == 50


def test_a_telephone_has_its_band() -> None:
    rng = np.random.default_rng(0)
    white = (0.1 * rng.standard_normal(RATE)).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(through_codec(white, RATE, "mulaw", 0)))
    inside, low, high = spectrum[400:3300].mean(), spectrum[:150].mean(), spectrum[3800:].mean()
    assert low < 0.1 * inside and high < 0.1 * inside


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
def test_noise_has_its_level_and_colour(kind: str) -> None:
    sound = speechlike()
    others = [speechlike(0.7, 1), speechlike(0.4, 2)]
    steps = {"noise": {"kind": kind, "snr_db": 12.0}}
    noisy = augment(sound, RATE, steps, np.random.default_rng(0), others)
    noise = noisy - sound
    assert level_db(sound) - level_db(noise) == pytest.approx(12, abs=0.1)
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    octaves = spectrum[300:600].sum() / spectrum[2400:4800].sum()
    expected = {"white": (0.05, 0.3), "pink": (0.5, 2.0), "babble": (0.05, 2.0)}[kind]
    assert expected[0] < octaves < expected[1]
    assert np.array_equal(noisy, augment(sound, RATE, steps, np.random.default_rng(0), others))
    assert not np.array_equal(noisy, augment(sound, RATE, steps, np.random.default_rng(1), others))


def test_babble_is_made_of_the_other_sounds_backwards() -> None:
    click = np.zeros(RATE, np.float32)
    click[100:103] = [0.1, 0.2, 0.9]
    quiet = np.full(RATE, 1e-3, np.float32)
    babble = augment(quiet, RATE, {"noise": {"kind": "babble", "snr_db": 0.0}}, np.random.default_rng(0), [click])
    place = int(babble.argmax())
    after = babble[place : place + 3] - quiet[0]
    assert after[0] > after[1] > after[2] > 0


def test_a_room_rings_as_long_and_as_loud_as_asked() -> None:
    impulse = np.zeros(RATE, np.float32)
    impulse[1000] = 0.5
    wet = reverb(impulse, RATE, 0.4, 6.0, np.random.default_rng(0))
    assert wet[1000] == pytest.approx(0.5, abs=1e-3) and np.abs(wet[:1000]).max() < 1e-5
    assert np.abs(wet[1001:1079]).max() < 1e-5  # 5 ms until the first echo
    tail = wet[1001:].astype(np.float64)
    assert 10 * np.log10(0.25 / (tail**2).sum()) == pytest.approx(6, abs=0.2)
    early, late = (10 * np.log10((tail[start : start + 1600] ** 2).mean()) for start in (200, 200 + 3200))
    assert early - late == pytest.approx(60 * 0.2 / 0.4, abs=2)
    speech = speechlike()
    assert lag(speech, reverb(speech, RATE, 0.5, 3.0, np.random.default_rng(1))) == 0


def test_gain_and_clipping() -> None:
    sound = speechlike()
    rng = np.random.default_rng(0)
    assert np.allclose(augment(sound, RATE, {"gain": {"db": -6.0206}}, rng), sound / 2, atol=1e-4)
    clipped = augment(sound, RATE, {"clip": {"of_peak": 0.5}}, rng)
    assert np.abs(clipped).max() == pytest.approx(np.abs(sound).max() / 2, rel=1e-5)
    assert (np.abs(clipped) == np.abs(clipped).max()).sum() > 10
    assert np.abs(augment(sound, RATE, {"gain": {"db": 20.0}}, rng)).max() <= 0.99
    everything = {
        "reverb": {"rt60_s": 0.3, "direct_db": 5.0}, "noise": {"kind": "pink", "snr_db": 10.0}, "gain": {"db": 6.0},
        "clip": {"of_peak": 0.5}, "codec": {"kind": "vorbis", "compression": 0.5},
    }  # fmt: skip
    for length in (0, 1, 7, len(sound)):
        spoiled = augment(sound[:length], RATE, everything, np.random.default_rng(0))
        assert len(spoiled) == length and np.isfinite(spoiled).all() and np.abs(spoiled).max(initial=0) <= 0.99


def test_draws_are_of_the_dialogue_and_independent_of_other_steps() -> None:
    talks = [Dialogue((Turn("user", (Part("speech", f"number {n}"),)),), "test") for n in range(400)]
    both = AugmentStage(noise={"p": 0.5, "snr_db": [10, 20]}, gain={"p": 0.25}, seed=1)
    alone = AugmentStage(gain={"p": 0.25}, seed=1)
    drawn = [both.draw(talk) for talk in talks]
    assert [d.get("gain") for d in drawn] == [alone.draw(talk).get("gain") for talk in talks]
    noises = [d["noise"] for d in drawn if "noise" in d]
    assert abs(len(noises) - 200) < 50 and abs(sum("gain" in d for d in drawn) - 100) < 45
    assert {noise["kind"] for noise in noises} == {"white", "pink", "babble"}
    assert all(10 <= noise["snr_db"] <= 20 for noise in noises)
    assert drawn != [AugmentStage(noise={"p": 0.5}, seed=2).draw(talk) for talk in talks]


def test_a_dialogue_has_one_room_and_noise_of_each_part(tmp_path: Path) -> None:
    store = Store(tmp_path)
    impulse = np.zeros(RATE, np.float32)
    impulse[0] = 0.5
    sounds = [store.put_sound(name * 32, sound, RATE) for name, sound in (("a", impulse), ("b", impulse / 2))]
    turns = [Turn(role, (Part("speech", role, media=sounds[i]),)) for i, role in ((0, "user"), (1, "user"))]

    def spoiled(task: str, **steps: Any) -> list[np.ndarray]:
        item = AugmentStage(**steps).run(Item(0, Dialogue(tuple(turns), "test", task=task)), store)
        return [store.sound(part.media)[0] for turn in item.dialogue.turns for part in turn.parts if part.media]

    room = {"reverb": {"direct_db": [3, 3], "rt60_s": [0.2, 0.2]}}
    first, second = spoiled("one", **room)
    assert np.corrcoef(first[100:], second[100:])[0, 1] > 0.99
    assert abs(np.corrcoef(first[100:], spoiled("other", **room)[0][100:])[0, 1]) < 0.5
    first, second = spoiled("one", noise={"kinds": ["white"], "snr_db": [0, 0]})
    assert abs(np.corrcoef(first[100:], second[100:])[0, 1]) < 0.5


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"noise": {"loud": 1}}, "give kinds, p, snr_db"),
        ({"noise": {"p": 2}}, "from 0 to 1"),
        ({"noise": {"kinds": ["brown"]}}, "give a list of white, pink, babble"),
        ({"noise": {"kinds": []}}, "give a list of white"),
        ({"codec": {"compression": [0, 2]}}, "within 0 and 0.99"),
        ({"gain": {"kinds": ["x"]}}, "give db, p"),
        ({"reverb": 3}, "reverb of augment is 3"),
        ({"roles": "user"}, "give a list of"),
    ],
)
def test_settings(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ManifestError, match=problem):
        AugmentStage(**settings)
