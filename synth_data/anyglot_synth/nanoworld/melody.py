"""Play a nanoworld scene as a melody: its notes, a MIDI file, and a waveform.

Rule: every thing is a phrase; shape is the instrument, size the tempo, row the register, column the contour,
and color one of six four-note scales. A melody always has 12 notes, split evenly between the one, two or
three things.

The scales use every pitch class exactly twice, and two scales share at most one:

======  =====================  ===================
color   notes of the octave    known as
======  =====================  ===================
red     C  E  G  B             C major seventh
green   D  F  A  B             D minor sixth
blue    D  E♭ G  B♭            E♭ major seventh
yellow  C♯ E  F♯ A             F♯ minor seventh
purple  C  E♭ F♯ A♭            A♭ dominant seventh
white   C♯ F  A♭ B♭            B♭ minor seventh
======  =====================  ===================

Waveforms come from additive synthesis with four timbres that differ in spectrum and envelope. This file does
not analyse audio; ``listen.py`` does, and takes its templates from the waveforms made here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, MAX_THINGS, ROWS, SHAPES, SIZES, Scene, Thing
from anyglot_tokenizers.errors import MediaError
from anyglot_tokenizers.files import atomic_write

SAMPLE_RATE = 16000
NUM_NOTES = 12

INSTRUMENTS: dict[str, str] = {
    "circle": "flute",
    "square": "clarinet",
    "triangle": "strings",
    "cross": "bell",
}
"""Instrument of each shape."""

NOTE_SECONDS: dict[str, float] = {"small": 0.2, "large": 0.3}
"""Length of a note of each size."""

SCALES: dict[str, tuple[int, int, int, int]] = {
    "red": (0, 4, 7, 11),
    "green": (2, 5, 9, 11),
    "blue": (2, 3, 7, 10),
    "yellow": (1, 4, 6, 9),
    "purple": (0, 3, 6, 8),
    "white": (1, 5, 8, 10),
}
"""Semitones above the register's root of each color, ascending."""

ROOTS: dict[str, int] = {"top": 72, "middle": 60, "bottom": 48}
"""MIDI pitch of the root of each row's register."""

_FOUR: dict[str, tuple[int, ...]] = {"left": (3, 2, 1, 0), "center": (0, 2, 3, 1), "right": (0, 1, 2, 3)}
_SIX: dict[str, tuple[int, ...]] = {
    "left": (3, 2, 1, 2, 1, 0),
    "center": (0, 2, 3, 3, 2, 1),
    "right": (0, 1, 2, 1, 2, 3),
}
CONTOURS: dict[int, dict[str, tuple[int, ...]]] = {
    12: {column: steps * 3 for column, steps in _FOUR.items()},
    6: _SIX,
    4: _FOUR,
}
"""Steps of the scale (0 lowest, 3 highest) by phrase length and column: falling, arch, rising."""


@dataclass(frozen=True)
class Note:
    """One note: start and length in seconds, MIDI pitch (60 is middle C), and instrument."""

    start_s: float
    duration_s: float
    midi_pitch: int
    instrument: str


def phrase(thing: Thing, length: int) -> list[int]:
    """MIDI pitches of the phrase of ``length`` (4, 6 or 12) notes that plays a thing."""
    scale = SCALES[thing.color]
    return [ROOTS[thing.row] + scale[step] for step in CONTOURS[length][thing.column]]


def notes(scene: Scene) -> list[Note]:
    """The 12 notes of a scene, one after the other."""
    length = NUM_NOTES // len(scene)
    made = []
    tenths = 0  # times are multiples of 0.1 s, counted in integers to stay exact
    for thing in scene.things:
        duration = round(NOTE_SECONDS[thing.size] * 10)
        for pitch in phrase(thing, length):
            made.append(Note(tenths / 10, duration / 10, pitch, INSTRUMENTS[thing.shape]))
            tenths += duration
    return made


@lru_cache(maxsize=1)
def _phrases() -> dict[tuple[str, float, tuple[int, ...]], Thing]:
    found = {}
    for values in product(SHAPES, COLORS, SIZES, ROWS, COLUMNS):
        thing = Thing(*values)
        for length in CONTOURS:
            key = INSTRUMENTS[thing.shape], NOTE_SECONDS[thing.size], tuple(phrase(thing, length))
            found[key] = thing
    return found


def scene_of(played: Sequence[Note]) -> Scene | None:
    """The scene that these notes play (exact inverse of :func:`notes`), or ``None`` when they play none.

    Starts and lengths may be off by up to 20 ms.
    """
    if len(played) != NUM_NOTES:
        return None
    ordered = sorted(played, key=lambda note: note.start_s)
    for count in range(1, MAX_THINGS + 1):
        length = NUM_NOTES // count
        things = []
        for start in range(0, NUM_NOTES, length):
            part = ordered[start : start + length]
            duration = min(NOTE_SECONDS.values(), key=lambda seconds: abs(seconds - part[0].duration_s))
            key = part[0].instrument, duration, tuple(note.midi_pitch for note in part)
            thing = _phrases().get(key)
            if thing is not None:
                things.append(thing)
        if len(things) != count or len({thing.position for thing in things}) != count:
            continue
        scene = Scene(tuple(things))
        if all(
            a.instrument == b.instrument
            and a.midi_pitch == b.midi_pitch
            and abs(a.start_s - ordered[0].start_s - b.start_s) < 0.02
            and abs(a.duration_s - b.duration_s) < 0.02
            for a, b in zip(ordered, notes(scene), strict=True)
        ):
            return scene
    return None


@dataclass(frozen=True)
class Timbre:
    """A sound made of sine partials: (frequency ratio, amplitude) pairs and a common envelope.

    ``attack_s`` and ``release_s`` are the lengths of the raised-cosine ramps, ``decay_s`` the time constant
    of exponential decay (``inf`` for a sustained sound), ``level`` the root mean square of a 0.2 s note.
    """

    partials: tuple[tuple[float, float], ...]
    attack_s: float
    release_s: float
    decay_s: float = float("inf")
    level: float = 0.12


TIMBRES: dict[str, Timbre] = {
    "flute": Timbre(((1, 1.0), (2, 0.10), (3, 0.02)), attack_s=0.04, release_s=0.03),
    "clarinet": Timbre(((1, 1.0), (3, 0.75), (5, 0.5), (7, 0.3), (9, 0.2), (11, 0.12)), attack_s=0.012, release_s=0.02),
    "strings": Timbre(tuple((k, k**-0.8) for k in range(1, 17)), attack_s=0.09, release_s=0.04),
    "bell": Timbre(
        ((1, 1.0), (2.76, 0.7), (5.4, 0.35), (8.93, 0.15)),
        attack_s=0.003,
        release_s=0.02,
        decay_s=0.07,
        level=0.1,
    ),
}


@lru_cache(maxsize=2048)
def waveform(
    instrument: str, midi_pitch: int, duration_s: float, sample_rate: int = SAMPLE_RATE
) -> NDArray[np.float32]:
    """One note at full velocity, float32 [samples], read-only. Starts and ends at zero."""
    timbre = TIMBRES[instrument]
    time = np.arange(round(duration_s * sample_rate)) / sample_rate
    frequency = 440.0 * 2.0 ** ((midi_pitch - 69) / 12)
    wave = np.zeros(len(time))
    for index, (ratio, amplitude) in enumerate(timbre.partials):
        if ratio * frequency < 0.47 * sample_rate:
            wave += amplitude * np.sin(2 * np.pi * ratio * frequency * time + 2.4 * index * index)
    # The level is set on 0.2 s, so that long notes are not softer at their start than short ones.
    wave *= np.exp(-time / timbre.decay_s)
    for ramp, distance in ((timbre.attack_s, time), (timbre.release_s, duration_s - time)):
        wave *= 0.5 - 0.5 * np.cos(np.pi * np.clip(distance / ramp, 0, 1))
    power = float(np.mean(wave[: round(0.2 * sample_rate)] ** 2))
    made: NDArray[np.float32] = (wave * (timbre.level / np.sqrt(max(power, 1e-12)))).astype(np.float32)
    made.setflags(write=False)
    return made


def render(
    music: Scene | Sequence[Note], rng: np.random.Generator | None = None, sample_rate: int = SAMPLE_RATE
) -> NDArray[np.float32]:
    """Synthesise a scene or notes.

    Args:
        music: a scene, or notes (they may overlap).
        rng: varies the overall level by up to 1.5 dB and each note by up to 1 dB; ``None`` plays all notes
        alike. sample_rate: samples per second, a multiple of 10.

    Returns:
        float32 [samples], within -1..1, a whole number of tenths of a second long (1600 samples at 16 kHz).

    Raises:
        ValueError: no notes, an unknown instrument, or a sample rate that is not a positive multiple of 10.
    """
    if sample_rate <= 0 or sample_rate % 10:
        raise ValueError(f"sample rate is {sample_rate}; use a positive multiple of 10, such as {SAMPLE_RATE}")
    played = notes(music) if isinstance(music, Scene) else list(music)
    if not played:
        raise ValueError("there are no notes to play; pass at least one")
    tenths = ceil(max(note.start_s + note.duration_s for note in played) * 10 - 1e-3)
    audio = np.zeros(tenths * sample_rate // 10, np.float32)
    overall = 1.0 if rng is None else 10 ** (rng.uniform(-1.5, 1.5) / 20)
    gains = np.full(len(played), overall) if rng is None else overall * 10 ** (rng.uniform(-1, 1, len(played)) / 20)
    for note, gain in zip(played, gains, strict=True):
        if note.instrument not in TIMBRES:
            raise ValueError(f"instrument is {note.instrument!r}; use one of {', '.join(TIMBRES)}")
        wave = waveform(note.instrument, note.midi_pitch, note.duration_s, sample_rate)
        start = round(note.start_s * sample_rate)
        audio[start : start + len(wave)] += np.float32(gain) * wave[: len(audio) - start]
    return np.clip(audio, -1.0, 1.0)


_TICKS = 480
"""Ticks per quarter note of the MIDI files written here."""

_TEMPO_US = 500_000
"""Microseconds per quarter note, both of the files written here and the default of the format."""

_PROGRAMS: dict[str, tuple[int, range]] = {
    "flute": (73, range(72, 80)),
    "clarinet": (71, range(64, 72)),
    "strings": (48, range(40, 56)),
    "bell": (14, range(8, 16)),
}
"""General MIDI program written for each instrument, and those read as it (numbers from 0)."""


def _variable_length(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def write_midi(path: str | os.PathLike[str], played: Sequence[Note], velocity: int = 96) -> None:
    """Write notes as a standard MIDI file (format 0, one channel per instrument), atomically.

    Raises:
        ValueError: an unknown instrument, or a pitch outside 0..127.
    """
    channels = {name: channel for channel, name in enumerate(_PROGRAMS)}
    events: list[tuple[int, int, bytes]] = []  # (tick, 0 for note off and 1 for note on, message)
    for note in played:
        if note.instrument not in channels or not 0 <= note.midi_pitch <= 127:
            raise ValueError(f"cannot write {note} as MIDI; use instruments {', '.join(channels)}, pitch 0..127")
        channel = channels[note.instrument]
        start, end = (round(t * 1e6 / _TEMPO_US * _TICKS) for t in (note.start_s, note.start_s + note.duration_s))
        events.append((start, 1, bytes([0x90 | channel, note.midi_pitch, velocity])))
        events.append((end, 0, bytes([0x80 | channel, note.midi_pitch, 0])))
    body = b"\0\xff\x51\x03" + _TEMPO_US.to_bytes(3, "big")
    body += b"".join(bytes([0, 0xC0 | channels[name], program]) for name, (program, _) in _PROGRAMS.items())
    now = 0
    for tick, _, message in sorted(events):
        body += _variable_length(tick - now) + message
        now = tick
    body += b"\0\xff\x2f\0"
    data = b"MThd" + struct.pack(">IHHH", 6, 0, 1, _TICKS) + b"MTrk" + struct.pack(">I", len(body)) + body
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _read_variable(data: bytes, start: int) -> tuple[int, int]:
    value = 0
    for at in range(start, start + 4):
        value = value << 7 | data[at] & 0x7F
        if data[at] < 0x80:
            return value, at + 1
    raise IndexError("a number of the file runs on for more than four bytes")


def _track_events(track: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (tick, status, data) of a track; meta events have status 0xFF and data headed by their type."""
    at = tick = running = 0
    while at < len(track):
        delta, at = _read_variable(track, at)
        tick += delta
        status = running
        if track[at] >= 0x80:
            status, at = track[at], at + 1
        if status == 0xFF:
            length, start = _read_variable(track, at + 1)
            yield tick, status, track[at : at + 1] + track[start : start + length]
            at = start + length
        elif status in (0xF0, 0xF7):
            length, start = _read_variable(track, at)
            at = start + length
        elif 0x80 <= status < 0xF0:
            running = status
            size = 1 if status & 0xE0 == 0xC0 else 2
            if at + size > len(track):
                raise IndexError("the last message is cut off")
            yield tick, status, track[at : at + size]
            at += size
        else:
            raise IndexError("a message without a valid status byte")


def read_midi(path: str | os.PathLike[str], otherwise: str | None = None) -> list[Note]:
    """Read the notes of a standard MIDI file (format 0 or 1), ordered by start.

    Program changes choose the instrument (General MIDI flutes and pipes, reeds, strings and ensembles,
    chromatic bells); tempo changes are followed; other events are ignored.

    Args:
        path: the file.
        otherwise: the instrument of all notes whose program is none of these.

    Raises:
        MediaError: not a MIDI file, a damaged one, or notes of other instruments.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    hint = "pass a standard MIDI file (.mid) such as write_midi makes"
    if data[:4] != b"MThd" or len(data) < 14:
        raise MediaError(path, "not a MIDI file", hint)
    header, _, _, division = struct.unpack(">IHHH", data[4:14])
    if division & 0x8000 or not division:
        raise MediaError(path, f"time division {division} is not in ticks per quarter note", hint)
    events: list[tuple[int, int, int, bytes]] = []
    at = 8 + header
    try:
        while at + 8 <= len(data):
            (length,) = struct.unpack(">I", data[at + 4 : at + 8])
            if at + 8 + length > len(data):
                raise IndexError("a track is cut off")
            if data[at : at + 4] == b"MTrk":
                for tick, status, message in _track_events(data[at + 8 : at + 8 + length]):
                    is_note_on = status & 0xF0 == 0x90 and message[1] > 0
                    events.append((tick, int(is_note_on), status, message))
            at += 8 + length
    except IndexError as error:
        raise MediaError(path, f"damaged MIDI file ({error})", hint) from error
    return _collect_notes(path, sorted(events, key=lambda event: event[:2]), division, otherwise)


def _collect_notes(
    path: str | os.PathLike[str], events: list[tuple[int, int, int, bytes]], division: int, otherwise: str | None
) -> list[Note]:
    """Pair note-ons with note-offs; ``events`` are (tick, is note-on, status, data), in order."""
    names = {program: name for name, (_, programs) in _PROGRAMS.items() for program in programs}
    programs: dict[int, int] = {}
    sounding: dict[tuple[int, int], tuple[float, str]] = {}
    found: list[Note] = []
    seconds, last_tick, tempo = 0.0, 0, _TEMPO_US
    for tick, is_on, status, message in events:
        seconds += (tick - last_tick) * tempo / 1e6 / division
        last_tick = tick
        channel, kind = status & 0x0F, status & 0xF0
        if status == 0xFF and message[0] == 0x51:
            tempo = int.from_bytes(message[1:], "big")
        elif kind == 0xC0:
            programs[channel] = message[0]
        elif is_on:
            program = programs.get(channel, 0)
            name = names.get(program, otherwise)
            if name is None:
                known = ", ".join(f"{name} {program}" for name, (program, _) in _PROGRAMS.items())
                raise MediaError(path, f"a note of MIDI program {program}", f"use the programs (from 0) {known}")
            sounding[channel, message[0]] = seconds, name
        elif kind in (0x80, 0x90) and (channel, message[0]) in sounding:
            start, name = sounding.pop((channel, message[0]))
            found.append(Note(round(start, 6), round(seconds - start, 6), message[0], name))
    return sorted(found, key=lambda note: (note.start_s, note.midi_pitch))
