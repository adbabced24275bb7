"""Loudness against the figures of EBU Tech 3341 and, where it is here, another meter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyglot_synth.loudness import PEAK, loudness, normalise


def sine(level_db: float, seconds: float, rate: int, hz: float = 1000.0) -> np.ndarray:
    return (10 ** (level_db / 20) * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
def test_a_tone_of_1_khz_and_its_gates(rate: int) -> None:
    # One channel of a tone at -20 dB (peak) is 3 dB less than two of them, which Tech 3341 has at -20 LUFS.
    tone = sine(-20, 20, rate)
    assert loudness(tone, rate) == pytest.approx(-23.0, abs=0.1)
    softer = sine(-33, 10, rate)  # below the relative gate: does not count
    assert loudness(np.concatenate([softer, tone, softer]), rate) == pytest.approx(-23.0, abs=0.2)
    assert loudness(np.concatenate([np.zeros(5 * rate, np.float32), tone]), rate) == pytest.approx(-23.0, abs=0.2)


def test_against_another_meter() -> None:
    pyloudnorm = pytest.importorskip("pyloudnorm")
    rng = np.random.default_rng(0)
    for rate in (16_000, 24_000):
        envelope = np.repeat(rng.uniform(0, 0.3, 40), rate // 8)
        sound = (envelope * rng.standard_normal(len(envelope))).astype(np.float32)
        expected = pyloudnorm.Meter(rate).integrated_loudness(sound.astype(np.float64))
        assert loudness(sound, rate) == pytest.approx(expected, abs=0.1)


def test_normalise() -> None:
    sound = np.random.default_rng(0).standard_normal(30_000).astype(np.float32) * 0.01
    louder = normalise(sound, 16_000, -23)
    assert louder.dtype == np.float32 and loudness(louder, 16_000) == pytest.approx(-23, abs=0.01)
    spiky = sound.copy()
    spiky[1000] = 1.0
    assert np.abs(normalise(spiky, 16_000, -10)).max() == pytest.approx(PEAK, abs=1e-3)
    for short in (sine(-20, 0.1, 16_000), sine(-20, 0.0005, 16_000)):
        assert np.isfinite(normalise(short, 16_000)).all()
    silence = np.zeros(9000, np.float32)
    assert loudness(silence, 16_000) == -math.inf == loudness(silence[:0], 16_000)
    assert np.array_equal(normalise(silence, 16_000), silence)
