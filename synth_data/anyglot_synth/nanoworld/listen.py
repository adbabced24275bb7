"""Hear a nanoworld scene in a melody: a signal-level analyser that grades audio, whoever made it.

Every one of the 14 rhythms that 12 notes can have (one to three phrases, each fast or slow) is a hypothesis.
For every place a note could be, its short-time magnitude spectra are compared with those of the synthesiser's
notes (all instruments and pitches); a phrase's best reading over instrument, scale, register and contour is
the one with the largest sum, and the rhythm whose phrases explain most of the time wins. Only magnitudes are
used, below 3.6 kHz, so phase, polarity, loudness and missing treble do not matter. It knows nothing about the
model that made the audio.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import gcd

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

from anyglot_synth.nanoworld.melody import (
    CONTOURS,
    INSTRUMENTS,
    NOTE_SECONDS,
    NUM_NOTES,
    ROOTS,
    SAMPLE_RATE,
    SCALES,
    Note,
    notes,
    waveform,
)
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, MAX_THINGS, ROWS, SHAPES, SIZES, Scene, Thing

MIN_CONFIDENCE = 0.62
"""Least mean similarity (0..1) between the spectra heard and those of the notes recognised."""

_WINDOW = 1024  # samples; 64 ms
_HOP = 320  # samples; 20 ms
_FRAMES_PER_TENTH = SAMPLE_RATE // 10 // _HOP
_BINS = slice(4, 232)  # 62 Hz to 3.6 kHz
_EXPONENT = 0.5  # compresses magnitudes, so that weak partials count
_MARGIN = 2  # frames at a note's start and end whose windows reach into its neighbours
_OFFSETS = (0, -1, 1, -2, 2)  # shifts tried, in frames
_SURE = 0.8  # similarity from which on no shifts are tried
_LOWEST = min(ROOTS.values())
_NUM_PITCHES = 36
_MIN_SECONDS, _MAX_SECONDS = 1.0, 30.0
_SILENCE_DB = -30.0

_READINGS = list(product(COLORS, ROWS, COLUMNS))


@dataclass(frozen=True)
class HeardNote:
    """One recognised note and the similarity (0..1) of its spectra to the ideal ones."""

    note: Note
    match: float


@dataclass(frozen=True)
class Hearing:
    """The best reading of a melody, however poor.

    ``confidence`` is the mean similarity over the time of the melody (0..1), ``offset_s`` the start of its
    first note.
    """

    scene: Scene
    confidence: float
    offset_s: float
    notes: tuple[HeardNote, ...]


def _spectra(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compressed magnitude spectra [frames, bins]; frame i is centred on i * 20 ms."""
    padded = np.pad(audio, _WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    window = signal.get_window("hann", _WINDOW).astype(np.float32)
    magnitudes = np.abs(fft.rfft(frames * window, axis=1)[:, _BINS])
    floor = np.median(magnitudes)  # partials are sparse, so the median is the noise
    compressed: NDArray[np.float32] = np.maximum(magnitudes - floor, 0) ** _EXPONENT
    return compressed


def _frame_range(tenths: int) -> range:
    """Frames, counted from a note's start, whose windows lie inside a note of so many tenths of a second."""
    return range(_MARGIN, tenths * _FRAMES_PER_TENTH - _MARGIN + 1)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(norms, 1e-9)
    return unit


def _tenths(size: str) -> int:
    return round(NOTE_SECONDS[size] * 10)


@lru_cache(maxsize=4)
def _templates(size: str) -> NDArray[np.float32]:
    """Unit vectors of every note [instruments * pitches, frames * bins]."""
    rows = []
    for shape in SHAPES:
        for pitch in range(_LOWEST, _LOWEST + _NUM_PITCHES):
            spectra = _spectra(waveform(INSTRUMENTS[shape], pitch, NOTE_SECONDS[size]))
            rows.append(spectra[_frame_range(_tenths(size))].ravel())
    return _unit(np.stack(rows))


@lru_cache(maxsize=4)
def _pitches(length: int) -> NDArray[np.intp]:
    """Pitch (counted from the lowest) of each note of each reading of a phrase [readings, length]."""
    table = [
        [ROOTS[row] - _LOWEST + SCALES[color][step] for step in CONTOURS[length][column]]
        for color, row, column in _READINGS
    ]
    return np.array(table)


def _similarities(spectra: NDArray[np.float32], size: str, offset: int) -> NDArray[np.float32]:
    """Cosine similarity [starts, instruments, pitches] of every possible note; starts are 0.1 s apart."""
    inside = np.array(_frame_range(_tenths(size)))
    starts = np.arange(0, len(spectra) - 1, _FRAMES_PER_TENTH)
    index = starts[:, None] + inside + offset
    valid = (index >= 0) & (index < len(spectra))
    cut = spectra[np.clip(index, 0, len(spectra) - 1)] * valid[:, :, None]
    flat = cut.reshape(len(starts), -1)
    return (_unit(flat) @ _templates(size).T).reshape(len(starts), len(SHAPES), _NUM_PITCHES)


def _place_maxima(
    similarities: NDArray[np.float32], size: str, start: int, length: int
) -> tuple[NDArray[np.float32], list[Thing]]:
    """Best summed similarity [9 places] of one phrase from ``start`` tenths on, and the thing that has it."""
    slots = start + _tenths(size) * np.arange(length)
    if slots[-1] >= len(similarities):
        slots = np.minimum(slots, len(similarities) - 1)
    heard = similarities[slots]  # [length, instruments, pitches]
    sums = heard[np.arange(length)[:, None], :, _pitches(length).T].sum(0)  # [readings, instruments]
    by_place = sums.reshape(len(COLORS), -1, len(SHAPES)).transpose(1, 0, 2).reshape(len(ROWS) * len(COLUMNS), -1)
    things = []
    for place, best in enumerate(by_place.argmax(1).tolist()):
        color, shape = divmod(best, len(SHAPES))
        row, column = divmod(place, len(COLUMNS))
        things.append(Thing(SHAPES[shape], COLORS[color], size, ROWS[row], COLUMNS[column]))
    return by_place.max(1) * _tenths(size), things


@lru_cache(maxsize=MAX_THINGS)
def _increasing_places(count: int) -> NDArray[np.intp]:
    """All ways [ways, count] to put phrases at places in reading order."""
    return np.array(list(combinations(range(len(ROWS) * len(COLUMNS)), count)))


def _best_reading(tables: list[tuple[NDArray[np.float32], list[Thing]]]) -> tuple[float, tuple[Thing, ...]]:
    """Things at increasing places, one per phrase, with the largest sum."""
    places = _increasing_places(len(tables))
    sums = sum(table[places[:, index]] for index, (table, _) in enumerate(tables))
    best = int(np.argmax(sums))
    things = tuple(choices[place] for (_, choices), place in zip(tables, places[best], strict=True))
    return float(np.max(sums)), things


def _active_tenths(audio: NDArray[np.float32]) -> float:
    """Tenths of a second up to the end of the last audible 20 ms."""
    count = len(audio) // _HOP
    power = (audio[: count * _HOP].reshape(count, _HOP) ** 2).mean(1)
    audible = np.flatnonzero(power > np.quantile(power, 0.9) * 10 ** (_SILENCE_DB / 10))
    return float(audible[-1] + 1) / _FRAMES_PER_TENTH if len(audible) else 0.0


def _prepare(audio: NDArray[np.floating], sample_rate: int) -> NDArray[np.float32] | None:
    if audio.ndim != 1 or sample_rate <= 0:
        raise ValueError(
            f"audio has shape {audio.shape} at {sample_rate} samples a second; pass one channel, [samples]"
        )
    if not _MIN_SECONDS <= len(audio) / sample_rate <= _MAX_SECONDS:
        return None
    clean = np.nan_to_num(audio).astype(np.float32)
    if sample_rate != SAMPLE_RATE:
        common = gcd(sample_rate, SAMPLE_RATE)
        clean = signal.resample_poly(clean, SAMPLE_RATE // common, sample_rate // common).astype(np.float32)
    peak = float(np.abs(clean).max())
    return clean / peak if peak > 1e-4 else None


def analyse(audio: NDArray[np.floating], sample_rate: int = SAMPLE_RATE) -> Hearing | None:
    """The best reading of a melody; ``None`` only for silence, and for less than 1 s or more than 30 s.

    Args:
        audio: float [samples], one channel.
        sample_rate: samples per second.

    Raises:
        ValueError: the array is not one channel of audio.
    """
    clean = _prepare(audio, sample_rate)
    if clean is None:
        return None
    active = _active_tenths(clean)
    spectra = _spectra(clean)
    best: tuple[float, tuple[Thing, ...], int] | None = None
    for offset in _OFFSETS:
        similarities = {size: _similarities(spectra, size, offset) for size in SIZES}
        tables: dict[tuple[str, int, int], tuple[NDArray[np.float32], list[Thing]]] = {}
        for count in range(1, MAX_THINGS + 1):
            length = NUM_NOTES // count
            for rhythm in product(SIZES, repeat=count):
                end, parts = 0, []
                for size in rhythm:
                    key = size, end, length
                    if key not in tables:
                        tables[key] = _place_maxima(similarities[size], size, end, length)
                    parts.append(tables[key])
                    end += length * _tenths(size)
                total, things = _best_reading(parts)
                confidence = total / max(end, active)
                if best is None or confidence > best[0]:
                    best = confidence, things, offset
        if best is not None and best[0] >= _SURE:
            break
    assert best is not None
    return _hearing(spectra, *best)


def _hearing(spectra: NDArray[np.float32], confidence: float, things: tuple[Thing, ...], offset: int) -> Hearing:
    scene = Scene(things)
    heard = []
    sizes = [thing.size for thing in scene.things for _ in range(NUM_NOTES // len(scene))]
    instruments = [INSTRUMENTS[shape] for shape in SHAPES]
    similarities = {size: _similarities(spectra, size, offset) for size in set(sizes)}
    for note, size in zip(notes(scene), sizes, strict=True):
        start = min(round(note.start_s * 10), len(similarities[size]) - 1)
        match = similarities[size][start, instruments.index(note.instrument), note.midi_pitch - _LOWEST]
        heard.append(HeardNote(note, float(match)))
    return Hearing(scene, confidence, offset * _HOP / SAMPLE_RATE, tuple(heard))


def listen(audio: NDArray[np.floating], sample_rate: int = SAMPLE_RATE) -> Scene | None:
    """The scene that a melody plays, or ``None`` when it is none of this world (silence, noise, speech...).

    Args:
        audio: float [samples], one channel.
        sample_rate: samples per second.

    Raises:
        ValueError: the array is not one channel of audio.
    """
    hearing = analyse(audio, sample_rate)
    return hearing.scene if hearing is not None and hearing.confidence >= MIN_CONFIDENCE else None
