"""Randomness by name: one stream per seed and purpose, the same in every process, order and number of workers."""

from __future__ import annotations

import hashlib

import numpy as np

from anyglot_synth.dialogue import canonical


def seed_of(*names: int | str) -> int:
    """A 63-bit seed from any names, such as `seed_of(seed, dialogue.id, "voice")`."""
    return int.from_bytes(hashlib.sha256(canonical(list(names)).encode()).digest()[:8], "big") >> 1


def rng_of(*names: int | str) -> np.random.Generator:
    """A generator of its own for these names."""
    return np.random.default_rng(seed_of(*names))
