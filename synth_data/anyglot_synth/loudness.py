"""Loudness of speech after ITU-R BS.1770-4 and EBU R 128, and bringing it to a target.

Only one channel, and without the true-peak meter: the peak limit is one of samples. This file handles no files.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TARGET_LUFS = -23.0
"""Of EBU R 128."""
PEAK = 0.89
"""-1 dB below full scale: what normalising never exceeds."""
HOP_S, BLOCK_HOPS = 0.1, 4  # blocks of 0.4 s that overlap by three quarters
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, -10.0
_OFFSET = -0.691


# Coefficients of BS.1770-4, tables 1 and 2, at 48 kHz: a shelf for the head, and a high-pass.
_DESIGN_HZ = 48_000
_FILTERS = (
    ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
    ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
)


@lru_cache(maxsize=16)
def _k_weighting(size: int, sample_rate: int) -> NDArray[np.float64]:
    """Power response of the two filters at the bins of `rfft(size)`, with both halves of the spectrum counted.

    At any sample rate it is that of 48 kHz.
    """
    hz = np.fft.rfftfreq(size, 1 / sample_rate).clip(max=_DESIGN_HZ / 2)
    z = np.exp(-2j * np.pi * hz / _DESIGN_HZ)
    response = np.full(len(z), 2.0)
    response[0] = 1.0
    if size % 2 == 0:
        response[-1] = 1.0
    for above, below in _FILTERS:
        response *= np.abs(np.polyval(above[::-1], z) / np.polyval(below[::-1], z)) ** 2
    return response


def _powers(segments: Float32, sample_rate: int) -> NDArray[np.float64]:
    """Weighted mean power of each row of `[rows, samples]`."""
    size = segments.shape[1]
    spectrum = np.fft.rfft(segments)
    powers: NDArray[np.float64] = (spectrum.real**2 + spectrum.imag**2) @ _k_weighting(size, sample_rate) / size**2
    return powers


def loudness(sound: Float32, sample_rate: int) -> float:
    """Gated loudness of one channel in LUFS; -inf for silence. Shorter than 0.4 s it counts as one block.

    The weighting is done on the spectra of 0.1 s each, which agrees with the filters to some hundredths of a unit.
    """
    if not len(sound):
        return -math.inf
    hop = round(HOP_S * sample_rate)
    if len(sound) < BLOCK_HOPS * hop:
        powers = _powers(sound[None], sample_rate)
    else:
        hops = _powers(sound[: len(sound) // hop * hop].reshape(-1, hop), sample_rate)
        powers = np.convolve(hops, np.full(BLOCK_HOPS, 1 / BLOCK_HOPS), "valid")
    kept = powers[powers > 10 ** ((ABSOLUTE_GATE_LUFS - _OFFSET) / 10)]
    if not len(kept):
        return -math.inf
    gate = kept.mean() * 10 ** (RELATIVE_GATE_LU / 10)
    return _OFFSET + 10 * math.log10(float(kept[kept > gate].mean()))


def normalise(sound: Float32, sample_rate: int, target_lufs: float = TARGET_LUFS) -> Float32:
    """The sound at that loudness, or softer where its peak would pass `PEAK`; silence stays as it is."""
    now = loudness(sound, sample_rate)
    if now == -math.inf:
        return sound
    gain = min(10 ** ((target_lufs - now) / 20), PEAK / float(np.abs(sound).max()))
    return sound * np.float32(gain)
