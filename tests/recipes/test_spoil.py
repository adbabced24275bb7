"""What spoils inputs for training: bounds, levels, and that the same draws give the same media."""

from __future__ import annotations

import numpy as np
import pytest

from anyglot_recipes import spoil
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.scene import Scene, Thing

SCENE = Scene((Thing("circle", "red", "large", "top", "left"),))


def _tone(hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(16000) / 16000)).astype(np.float32)


def test_pictures_stay_pictures_of_the_same_scene() -> None:
    plain = draw(SCENE).astype(float)
    made = [spoil.picture(SCENE, np.random.default_rng(seed)) for seed in range(40)]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in made)
    again = spoil.picture(SCENE, np.random.default_rng(3))
    assert np.array_equal(again, made[3]) and len({image.tobytes() for image in made}) > 30
    near = [np.corrcoef(plain.ravel(), image.ravel())[0, 1] for image in made]
    assert min(near) > 0.5, "a red circle at the top left"


def test_sounds_have_noise_or_another_level() -> None:
    tone, clipped, quiet, noisy = _tone(), 0, 0, 0
    for seed in range(60):
        made = spoil.sound(tone, np.random.default_rng(seed))
        assert made.dtype == np.float32 and made.shape == tone.shape and not np.array_equal(made, tone)
        clipped = max(clipped, float(np.abs(made).max()))
        level = float(made @ tone / (tone @ tone))
        rest = made - np.float32(level) * tone
        quiet += level < 0.7
        noisy += float(np.sqrt(np.mean(rest**2))) > 1e-3
        assert 10 ** (-18.5 / 20) < level < 10 ** (3.5 / 20)
    assert clipped <= 0.99 and 15 < quiet < 55 and 25 < noisy < 55


@pytest.mark.parametrize("cents", [-40.0, 0.0, 30.0])
def test_a_tone_is_moved_by_so_many_cents(cents: float) -> None:
    made = spoil.detuned(_tone(), cents)
    spectrum = np.abs(np.fft.rfft(made * np.hanning(len(made)), 1 << 18))
    found = np.argmax(spectrum) * 16000 / (1 << 18)
    assert 1200 * np.log2(found / 440) == pytest.approx(cents, abs=1)
    assert len({len(spoil.melody(_tone(), np.random.default_rng(seed))) for seed in range(20)}) > 5
