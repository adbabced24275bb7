"""Voices: text to speech with the small engines that run on every machine, one cached file per clip.

Two engines are known, `flite` and `espeak-ng`: `anyglot_synth.voices.programs` runs them; flite is taken where it is
installed. A clip is a function of (engine, version, voice, parameters, text) and of nothing else. That is what makes
the cache content-addressed: the name of a file is the sha256 of exactly these.

A clip is float32 [samples] at 16 kHz, equally loud for all voices, with 20 ms of silence on either side.

This file does not know what is said: sentences come from `language.py`, and it never normalises text (numbers,
markup).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import Scene
from anyglot_synth.voices.programs import (
    SpeechError,
    engine_version,
    espeak_command,
    flite_command,
    has_espeak,
    has_flite,
    speak_into_file,
)
from anyglot_tokenizers.errors import MediaError
from anyglot_tokenizers.files import atomic_write

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]

SAMPLE_RATE = 16_000
CLIP_VERSION = 1  # counts changes of `finish`: part of the content address
PAUSE_S = 0.06  # silence between two clauses
MARGIN_S = 0.02  # silence kept before and after a clip
RMS = 0.08  # loudness of every clip (full scale = 1)
PEAK = 0.95  # no sample is louder than this
SILENCE_DB = -45.0  # a 5 ms frame this far below the loudest one is silence
MAX_CHARACTERS = 1_000
MIN_SAMPLES, MAX_SECONDS = 1_600, 60.0  # of audio that a judge is given


@dataclass(frozen=True)
class Voice:
    """A voice of an engine. `params` are passed to the engine and are part of a clip's content address."""

    name: str
    engine: str  # "flite" or "espeak-ng"
    params: tuple[tuple[str, str], ...]


def _espeak(*names: str) -> tuple[Voice, ...]:
    return tuple(Voice(name, "espeak-ng", (("pitch", "50"), ("rate", "165"))) for name in names)


FLITE_VOICES = tuple(Voice(name, "flite", (("duration_stretch", "0.85"),)) for name in ("kal16", "awb", "rms", "slt"))
ESPEAK_VOICES = _espeak("en-us", "en-us+f2", "en-us+m3", "en-us+f5")
MORE_ESPEAK_VOICES = _espeak("en-us+m1", "en-us+m5", "en-us+m7", "en-us+f1", "en-us+f3", "en-us+f4")
"""Not of the world: the judge never learnt them. For trainings that want many speakers."""


def installed_voices() -> tuple[Voice, ...]:
    """Every voice of the world that can speak on this machine, of both engines; empty when there is no engine."""
    return (*(FLITE_VOICES if has_flite() else ()), *(ESPEAK_VOICES if has_espeak() else ()))


VOICES: tuple[Voice, ...] = ESPEAK_VOICES if has_espeak() and not has_flite() else FLITE_VOICES
"""The voices of the world on this machine: those of flite when it is installed, else those of espeak-ng. Without any
engine these are the names of flite's, and the first attempt to speak raises `SpeechError`.
"""


def find_voice(voice: Voice | str) -> Voice:
    """The voice of that name (a `Voice` is returned as it is). Raises SpeechError, naming the ones there are."""
    if isinstance(voice, Voice):
        return voice
    voices = (*FLITE_VOICES, *ESPEAK_VOICES, *MORE_ESPEAK_VOICES)
    for known in voices:
        if known.name == voice:
            return known
    names = ", ".join(known.name for known in voices)
    raise SpeechError(f"there is no voice {voice!r}; choose one of: {names}")


def _command(voice: Voice, text_path: Path, wav_path: Path) -> list[str]:
    params = dict(voice.params)
    if voice.engine == "flite":
        return flite_command(voice.name, params["duration_stretch"], text_path, wav_path)
    if voice.engine == "espeak-ng":
        return espeak_command(voice.name, params["rate"], params["pitch"], text_path, wav_path)
    raise SpeechError(f"voice {voice.name!r} names an unknown engine {voice.engine!r}; use flite or espeak-ng")


def finish(audio: Float32, sample_rate: int, silence_db: float = SILENCE_DB) -> Int16:
    """What an engine made -> a clip: 16 kHz, silence trimmed to 20 ms a side, equally loud, 16 bits; empty if silent.

    A recording has noise where engines have none: raise `silence_db` for it.
    """
    if sample_rate != SAMPLE_RATE:
        audio = soxr.resample(audio, sample_rate, SAMPLE_RATE, quality="VHQ").astype(np.float32)
    audio = audio - audio.mean()
    hop = SAMPLE_RATE // 200
    frames = audio[: len(audio) // hop * hop].reshape(-1, hop)
    level = np.sqrt((frames.astype(np.float64) ** 2).mean(axis=1)) if len(frames) else np.zeros(0)
    if not len(level) or level.max() < 1e-4:
        return np.zeros(0, np.int16)
    heard = np.flatnonzero(level > level.max() * 10 ** (silence_db / 20))
    margin = int(MARGIN_S * SAMPLE_RATE)
    start, stop = int(heard[0]) * hop, (int(heard[-1]) + 1) * hop
    audio = np.pad(audio, margin)[start : stop + 2 * margin]
    ramp = np.linspace(0, 1, margin // 2, dtype=np.float32)
    audio[: len(ramp)] *= ramp
    audio[-len(ramp) :] *= ramp[::-1]
    gain = min(RMS / float(np.sqrt((audio.astype(np.float64) ** 2).mean())), PEAK / float(np.abs(audio).max()))
    return np.round(audio * gain * 32767).astype(np.int16)


def _synthesise(text: str, voice: Voice) -> Int16:
    """Speak `text` with a fresh process of the engine -> int16 [samples] at 16 kHz. Raises SpeechError."""
    doing = f"speaking {text[:60]!r} with voice {voice.name}"
    audio, sample_rate = speak_into_file(partial(_command, voice), text, doing)
    clip = finish(audio, sample_rate)
    if not len(clip):
        raise SpeechError(f"{voice.engine} made only silence {doing}; give it words it can pronounce")
    return clip


def clip_key(text: str, voice: Voice | str) -> str:
    """Content address of a clip: sha256 (hex) over engine, version, voice, parameters and text."""
    voice = find_voice(voice)
    content = {
        "clip": CLIP_VERSION,
        "engine": voice.engine,
        "params": dict(voice.params),
        "text": text,
        "version": engine_version(voice.engine),
        "voice": voice.name,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_text(text: str) -> str:
    text = " ".join(text.split())
    if "\0" in text or not any(map(str.isalnum, text)):
        raise SpeechError(f"cannot speak {text!r}: give at least one word")
    if len(text) > MAX_CHARACTERS:
        raise SpeechError(
            f"cannot speak a text of {len(text)} characters ({text[:40]!r}...) at once: the limit is "
            f"{MAX_CHARACTERS}; speak it clause by clause"
        )
    return text


def default_cache_dir() -> Path:
    """Where clips are kept unless told otherwise: `$ANYGLOT_CACHE/speech`, else `speech` in the user's cache folder."""
    base = os.environ.get("ANYGLOT_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "anyglot")
    return Path(base or cache) / "speech"


def write_sound(path: Path, samples: Float32 | Int16, form: str) -> None:
    """Writes 16-bit WAV or FLAC; by way of memory, as libsndfile's own writing tells a full disk from nothing else."""
    encoded = BytesIO()
    sf.write(encoded, samples, SAMPLE_RATE, format=form, subtype="PCM_16")
    path.write_bytes(encoded.getvalue())


class SpeechCache:
    """Clips on disk (one FLAC file each, written atomically) and, once used, in memory.

    Args:
        cache_dir: folder of the clips, made when needed; None keeps clips in memory only.
        workers: how many engine processes run at a time in `prefetch`.

    Safe to share between threads; any number of processes may use one folder, and may be killed, at any time.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, workers: int = 2) -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.workers = max(1, workers)
        self._clips: dict[tuple[str, Voice], Int16] = {}
        self._made = 0
        self._lock = threading.Lock()

    def path(self, text: str, voice: Voice | str) -> Path | None:
        """Where the clip is, or would be, on disk; None when clips are kept in memory only."""
        if self.cache_dir is None:
            return None
        key = clip_key(_check_text(text), voice)
        return self.cache_dir / key[:2] / f"{key}.flac"

    def clip(self, text: str, voice: Voice | str) -> Float32:
        """The clip of `text`: float32 [samples] at 16 kHz, spoken now if it never was. Raises SpeechError."""
        return self._samples(_check_text(text), find_voice(voice)).astype(np.float32) / np.float32(32768)

    def _samples(self, text: str, voice: Voice) -> Int16:
        samples = self._clips.get((text, voice))
        if samples is not None:
            return samples
        path = self.path(text, voice)
        if path is not None and path.is_file():
            try:
                samples, _ = sf.read(path, dtype="int16")
            except sf.LibsndfileError:
                samples = None  # damaged on disk: spoken again below, and replaced
        if samples is None:
            samples = _synthesise(text, voice)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as temporary:
                    write_sound(temporary, samples, "FLAC")
            with self._lock:
                self._made += 1
        self._clips[text, voice] = samples
        return samples

    def prefetch(
        self,
        texts: Iterable[str],
        voices: Iterable[Voice | str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Have every text spoken by every voice (default: VOICES). Returns how many clips had to be made.

        `progress(done, total)` is called about every hundred clips. Raises SpeechError at the first failure.
        """
        chosen = [find_voice(voice) for voice in (VOICES if voices is None else voices)]
        return self._make(((text, voice) for text in texts for voice in chosen), progress)

    def prefetch_said(self, said: Iterable[tuple[str, Voice | str]]) -> int:
        """As `prefetch`, for texts of any number of clauses, each with the one voice that is to `say` it."""
        return self._make((clause, find_voice(voice)) for text, voice in said for clause in clauses(text))

    def _make(self, clips: Iterable[tuple[str, Voice]], progress: Callable[[int, int], None] | None = None) -> int:
        jobs = list(dict.fromkeys((_check_text(text), voice) for text, voice in clips))
        jobs = [job for job in jobs if job not in self._clips]
        before = self._made
        with ThreadPoolExecutor(self.workers) as pool:
            for done, _ in enumerate(pool.map(lambda job: len(self._samples(*job)), jobs), start=1):
                if progress and (done % 100 == 0 or done == len(jobs)):
                    progress(done, len(jobs))
        return self._made - before

    def say(self, text: str, voice: Voice | str, rng: np.random.Generator | None = None) -> Float32:
        """Speak a text of any number of clauses (see `clauses`), joined by 60 ms of silence: float32 [samples].

        With `rng` the whole is up to 2 dB louder or softer.
        """
        return join([self.clip(clause, voice) for clause in clauses(text)], rng)


def clauses(text: str) -> list[str]:
    """Split a text after each full stop, semicolon, question or exclamation mark. Commas stay inside a clause."""
    found = [clause.strip(" .;") for clause in re.split(r"(?<=[.;!?])\s+", text.strip())]
    return [clause for clause in found if clause]


def join(clips: Sequence[Float32], rng: np.random.Generator | None = None) -> Float32:
    """Concatenate clips with 60 ms of silence between them; with `rng`, -2 to 2 dB of level change for the whole."""
    if not clips:
        raise SpeechError("there is nothing to say: the text has no words")
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    pieces = [piece for clip in clips for piece in (pause, clip)][1:]
    audio = np.concatenate(pieces)
    if rng is not None:
        gain = min(10 ** (rng.uniform(-2.0, 2.0) / 20), PEAK / max(float(np.abs(audio).max()), 1e-9))
        audio = audio * np.float32(gain)
    return audio


def check_audio(audio: Any, number: int) -> Float32:
    """Speech for a judge: float32 [samples] at 16 kHz, padded to 0.1 s. Raises MediaError, naming it by its number."""
    samples = np.asarray(audio, dtype=np.float32)
    where = f"audio number {number}"
    if samples.ndim != 1:
        raise MediaError(where, f"its shape is {samples.shape}", "give mono audio as an array [samples] at 16 kHz")
    if not np.isfinite(samples).all():
        raise MediaError(where, "it holds NaN or infinite samples", "check what made it")
    if len(samples) > MAX_SECONDS * SAMPLE_RATE:
        raise MediaError(where, f"it lasts {len(samples) / SAMPLE_RATE:.0f} s", f"cut it to {MAX_SECONDS:.0f} s")
    return np.pad(samples, (0, max(0, MIN_SAMPLES - len(samples))))


def speak(
    text: str,
    voice: Voice | str,
    rng: np.random.Generator | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Float32:
    """Speak one text as one clip -> float32 [samples] at 16 kHz.

    Args:
        text: plain words and punctuation, at most 1000 characters.
        voice: a `Voice` or the name of one, e.g. "slt".
        rng: when given, the clip is up to 2 dB louder or softer.
        cache_dir: folder of clips already spoken; None speaks afresh.

    Raises:
        SpeechError: no such voice, no engine on this machine (it says what to install), or nothing to say.
    """
    return join([SpeechCache(cache_dir).clip(text, voice)], rng)


def prefetch(
    texts: Iterable[str],
    voices: Iterable[Voice | str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fill the cache folder with every text in every voice; see `SpeechCache.prefetch`."""
    return SpeechCache(cache_dir, workers).prefetch(texts, voices, progress)


def speak_scene(
    scene: Scene,
    voice: Voice | str,
    rng: np.random.Generator | None = None,
    cache: SpeechCache | str | os.PathLike[str] | None = None,
) -> tuple[Float32, str]:
    """Describe a scene aloud, a clause per thing -> (float32 [samples] at 16 kHz, the words that are said)."""
    text = describe(scene, rng, style="spoken")
    speaker = cache if isinstance(cache, SpeechCache) else SpeechCache(cache)
    return speaker.say(text, voice, rng), text
