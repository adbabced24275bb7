"""What cameras, microphones and instruments do to what users show: for training, so that no answer depends on it.

What is done, and how much, is drawn anew for each; pictures may come off with nothing (one in sixteen). The benchmark's
section `robustness` spoils inputs, too: of its ways only blur is of a kind that is not here, so it alone tells what was
not trained. What a model answers is never spoiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.augment import augment
from anyglot_synth.nanoworld.draw import BACKGROUND, draw
from anyglot_synth.nanoworld.scene import Scene
from anyglot_synth.nanoworld.voices import SAMPLE_RATE

Float32 = NDArray[np.float32]

SHADE = (-16.0, 36.0)
"""Grey levels of 255 by which the background changes."""
QUARTERS = 2
"""Quarters of a pixel by which a scene is moved, either way: `draw` knows no less."""
TINT = 0.2
"""Of each color channel's strength, either way."""
GRAIN = 18.0
"""The most, as standard deviation, in grey levels."""
SNR_DB = (5.0, 35.0)
GAIN_DB = (-18.0, 3.0)
CENTS = 40.0
"""Hundredths of a semitone, either way."""


def picture(scene: Scene, rng: np.random.Generator, places: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """The scene drawn anew, uint8 `[64, 64, 3]`: on another ground, moved, tinted, grainy; each half of the time.

    `places` is what `draw` takes, where the things are to be where they are in another picture.
    """
    shade, moved, tinted, grainy = rng.random(4) < 0.5
    how: dict[str, Any] = {}
    if shade:
        how["background"] = tuple(np.clip(np.array(BACKGROUND) + round(rng.uniform(*SHADE)), 0, 255).tolist())
    if moved:
        how["offset"] = tuple((rng.integers(-QUARTERS, QUARTERS + 1, 2) / 4).tolist())
    image = draw(scene, rng if places is None else places, **how).astype(np.float64)
    if tinted:
        image = image * rng.uniform(1 - TINT, 1 + TINT, 3)
    if grainy:
        image = image + rng.normal(0, rng.uniform(0, GRAIN), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def sound(audio: Float32, rng: np.random.Generator) -> Float32:
    """Float32 `[samples]` with white noise, at another level, or both."""
    steps: dict[str, dict[str, Any]] = {}
    which = rng.integers(3)
    if which != 0:
        steps["noise"] = {"kind": "white", "snr_db": float(rng.uniform(*SNR_DB))}
    if which != 1:
        steps["gain"] = {"db": float(rng.uniform(*GAIN_DB))}
    return augment(audio, SAMPLE_RATE, steps, rng)


def melody(audio: Float32, rng: np.random.Generator) -> Float32:
    """As `sound`, out of tune, or both."""
    which = rng.integers(3)
    if which != 0:
        audio = detuned(audio, float(rng.uniform(-CENTS, CENTS)))
    return audio if which == 1 else sound(audio, rng)


def detuned(audio: Float32, cents: float) -> Float32:
    """Played faster by so much that every pitch rises by `cents` hundredths of a semitone: float32 `[samples]`."""
    positions = np.arange(0, len(audio) - 1, 2 ** (cents / 1200))
    return np.interp(positions, np.arange(len(audio)), audio).astype(np.float32)


def detuned_part(audio: Float32, begin: int, count: int, cents: float) -> Float32:
    """`count` samples from `begin` on, float32, at another pitch about their middle.

    What sounds stays where it was but for `count / 2 * |2 ** (cents / 1200) - 1|` samples, at both ends.
    """
    middle = (count - 1) / 2
    positions = begin + middle + (np.arange(count) - middle) * 2 ** (cents / 1200)
    return np.interp(positions, np.arange(len(audio)), audio, left=0.0, right=0.0).astype(np.float32)
