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
BLOCK_S, HOP_S = 0.4, 0.1
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, -10.0
_OFFSET = -0.691


@lru_cache(maxsize=8)
def _k_weighting(size: int, sample_rate: int) -> NDArray[np.float64]:
    """Power response of the two filters (a shelf and a high-pass, BS.1770-4 section 2) at the bins of `rfft(size)`.

    Designed for any sample rate from their analogue parameters, as in https://github.com/csteinmetz1/pyloudnorm.
    """
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response = np.ones(len(z))
    gain_db, q, frequency = 3.999843853973347, 0.7071752369554196, 1681.974450955533
    k = math.tan(math.pi * frequency / sample_rate)
    high, band = 10 ** (gain_db / 20), 10 ** (gain_db / 20 * 0.4996667741545416)
    shelf = [high + band * k / q + k * k, 2 * (k * k - high), high - band * k / q + k * k]
    lower = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    response *= np.abs(np.polyval(shelf[::-1], z) / np.polyval(lower[::-1], z)) ** 2
    q, frequency = 0.5003270373238773, 38.13547087602444
    k = math.tan(math.pi * frequency / sample_rate)
    lower = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    return response * np.abs(np.polyval([1.0, -2.0, 1.0], z) / np.polyval(lower[::-1], z)) ** 2


def loudness(sound: Float32, sample_rate: int) -> float:
    """Gated loudness of one channel in LUFS; -inf for silence. Shorter than 0.4 s it counts as one block.

    The weighting is done on the whole spectrum at once, which agrees with the filters to some hundredths of a unit.
    """
    if not len(sound):
        return -math.inf
    size = _fast_size(len(sound) + sample_rate // 10)
    spectrum = np.fft.rfft(sound, size)
    weighted = np.fft.irfft(spectrum * np.sqrt(_k_weighting(size, sample_rate)), size)[: len(sound)]
    total = np.concatenate([[0.0], np.cumsum(weighted**2)])
    block, hop = round(BLOCK_S * sample_rate), round(HOP_S * sample_rate)
    if len(sound) <= block:
        powers = np.array([total[-1] / len(sound)])
    else:
        starts = np.arange(0, len(sound) - block + 1, hop)
        powers = (total[starts + block] - total[starts]) / block
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


def _fast_size(size: int) -> int:
    """The next size with small factors, of few kinds, so that responses are shared: 2^n or 1.5 * 2^n."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= size else power
