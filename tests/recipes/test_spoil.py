"""What spoils inputs for training: bounds, levels, and that the same draws give the same media."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anyglot_recipes import spoil
from anyglot_synth.nanoworld.draw import BACKGROUND, draw
from anyglot_synth.nanoworld.scene import Scene, Thing

SCENE = Scene((Thing("circle", "red", "large", "top", "left"),))


def _tone(hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(16000) / 16000)).astype(np.float32)


def test_pictures_are_of_the_same_scene_in_other_light_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    drawn: list[np.ndarray] = []

    def watched(*args: Any, **how: Any) -> np.ndarray:
        asked.append(how)
        drawn.append(draw(*args, **how))
        return drawn[-1]

    monkeypatch.setattr(spoil, "draw", watched)
    made = [spoil.picture(SCENE, np.random.default_rng(seed)) for seed in range(60)]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in made)
    offsets = [how["offset"] for how in asked if "offset" in how]
    grounds = [how["background"] for how in asked if "background" in how]
    assert 15 < len(offsets) < 45 and {abs(x) for pair in offsets for x in pair} == {0.0, 0.25, 0.5}
    low, high = (BACKGROUND[0] + shade for shade in spoil.SHADE)
    assert 15 < len(grounds) < 45 and all(low <= ground[0] <= high for ground in grounds)
    grain = np.array([image[-16:, -16:].astype(float).std((0, 1)).max() for image in made])
    assert 15 < np.sum(grain > 1) < 45 and grain.max() < 1.2 * spoil.GRAIN
    light = np.stack([a.mean((0, 1)) / b.mean((0, 1)) for a, b in zip(made, drawn, strict=True)])
    assert 15 < np.sum(np.ptp(light, axis=1) > 0.05) < 45 and np.abs(light - 1).max() < spoil.TINT + 0.15
    assert np.array_equal(spoil.picture(SCENE, np.random.default_rng(3)), made[3])


def _rest(made: np.ndarray, tone: np.ndarray) -> tuple[float, float]:
    """(level of the tone in a sound, what is not the tone)."""
    level = float(made @ tone / (tone @ tone))
    return level, float(np.sqrt(np.mean((made - np.float32(level) * tone) ** 2)))


def test_sounds_have_noise_or_another_level() -> None:
    tone, found = _tone(), []
    for seed in range(60):
        made = spoil.sound(tone, np.random.default_rng(seed))
        assert made.dtype == np.float32 and made.shape == tone.shape and not np.array_equal(made, tone)
        found.append(_rest(made, tone))
    levels, rests = zip(*found, strict=True)
    assert 10 ** (-18.5 / 20) < min(levels) < 0.3 and 1.1 < max(levels) < 10 ** (3.5 / 20)
    assert 25 < sum(rest > 1e-3 for rest in rests) < 55
    loud = [spoil.sound(3 * tone, np.random.default_rng(seed)) for seed in range(60)]
    assert 0.98 < max(float(np.abs(made).max()) for made in loud) < 0.991


def test_melodies_are_out_of_tune_or_noisy_or_both() -> None:
    tone = _tone()
    made = [spoil.melody(tone, np.random.default_rng(seed)) for seed in range(60)]
    moved = [len(sound) != len(tone) for sound in made]
    bound = 2 ** (spoil.CENTS / 1200)
    assert 25 < sum(moved) < 55 and all(1 / bound < len(sound) / len(tone) < bound * 1.001 for sound in made)
    noisy = 0
    for sound, away in zip(made, moved, strict=True):
        level, rest = _rest(sound[: len(tone)], tone) if not away else (1.0, 0.0)
        assert away or rest > 1e-4 or abs(level - 1) > 1e-3
        noisy += rest > 1e-3
    assert noisy > 5


@pytest.mark.parametrize("cents", [-40.0, 0.0, 30.0])
def test_a_tone_is_moved_by_so_many_cents(cents: float) -> None:
    made = spoil.detuned(_tone(), cents)
    spectrum = np.abs(np.fft.rfft(made * np.hanning(len(made)), 1 << 18))
    found = np.argmax(spectrum) * 16000 / (1 << 18)
    assert 1200 * np.log2(found / 440) == pytest.approx(cents, abs=1)


def test_a_detuned_part_stays_where_it_was() -> None:
    audio = np.zeros(16000, np.float32)
    audio[4000:8000] = np.sin(2 * np.pi * 500 * np.arange(4000) / 16000)
    for cents in (-40.0, 0.0, 40.0):
        part = spoil.detuned_part(audio, 2000, 8000, cents)
        assert part.dtype == np.float32 and part.shape == (8000,)
        heard = np.flatnonzero(np.abs(part) > 0.05)
        assert abs(heard[0] - 2000) < 60 and abs(heard[-1] - 6000) < 60
        crossings = np.sum(np.diff(np.sign(part[2200:5800])) != 0)
        assert abs(crossings - 225 * 2 ** (cents / 1200)) < 2
    assert np.allclose(spoil.detuned_part(audio, 2000, 8000, 0.0), audio[2000:10000], atol=1e-5)
