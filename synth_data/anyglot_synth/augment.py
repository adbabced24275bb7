"""Augmentation: a user's voice as it comes through a room, a microphone and a telephone. The assistant's is left clean.

Each step happens with its own probability and a strength drawn from its range, in the order of nature: room, noise,
gain, clipping, codec. A dialogue has one room, one noise, one microphone; the noise itself differs from turn to turn.
Nothing moves in time: the direct sound keeps its place to the sample. The clean file stays, and `origin` names it.

The stage comes after filters that listen to what was said, since it makes that harder on purpose.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from anyglot_synth.cast import range_of
from anyglot_synth.dialogue import ROLES, SPEECH, USER, Dialogue, MediaFile, Part, Turn, address
from anyglot_synth.seeds import rng_of
from anyglot_synth.stages import Item, Stage
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import ManifestError

Float32 = NDArray[np.float32]
Complex128 = NDArray[np.complex128]

VERSION = 2
"""Counts changes of the sounds made here: part of their content address."""
NOISES = ("white", "pink", "babble")
CODECS = ("mulaw", "vorbis", "opus", "mp3")
_FORMATS = {"vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}
BAND_HZ = (300.0, 3400.0)
"""Of a telephone."""
BABBLERS = 4
PEAK = 0.99


@dataclass(frozen=True)
class _Step:
    """How often a step happens, and its ranges and kinds."""

    p: float
    ranges: Mapping[str, tuple[float, float]]
    kinds: tuple[str, ...] = ()


# Name of a step: (bounds and defaults of its ranges, kinds there are).
_STEPS: dict[str, tuple[dict[str, tuple[float, float, tuple[float, float]]], tuple[str, ...]]] = {
    "reverb": ({"rt60_s": (0.05, 2.0, (0.15, 0.5)), "direct_db": (-5.0, 40.0, (3.0, 15.0))}, ()),
    "noise": ({"snr_db": (-10.0, 80.0, (10.0, 30.0))}, NOISES),
    "gain": ({"db": (-40.0, 20.0, (-6.0, 6.0))}, ()),
    "clip": ({"of_peak": (0.05, 1.0, (0.4, 0.9))}, ()),
    "codec": ({"compression": (0.0, 0.99, (0.3, 0.9))}, CODECS),
}


class AugmentStage(Stage):
    """Spoils spoken parts, by default those of users.

    Each step is a mapping with `p` (probability), ranges `[lowest, highest]`, and `kinds` where it has some; None
    leaves it out.

    Args:
        reverb: a room: `rt60_s` (seconds to -60 dB), `direct_db` (direct sound above the echoes).
        noise: `snr_db` (of the speech above it), `kinds` of "white", "pink", "babble" (the dialogue's own sounds,
            backwards and several at once, so that it gives no words away).
        gain: `db`.
        clip: `of_peak`: what is louder than this part of the loudest sample is cut.
        codec: `kinds` of "mulaw" (a telephone: 300 to 3400 Hz, 8 kHz), "vorbis", "opus", "mp3"; `compression` from 0
            (best) to 0.99 (smallest).
        roles: whose parts.
        seed: another seed draws others.

    Raises:
        ManifestError: an impossible setting.
    """

    name: ClassVar[str] = "augment"

    def __init__(
        self,
        reverb: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        gain: Mapping[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
        codec: Mapping[str, Any] | None = None,
        roles: Sequence[str] = (USER,),
        seed: int = 0,
    ) -> None:
        given = {"reverb": reverb, "noise": noise, "gain": gain, "clip": clip, "codec": codec}
        self.steps = {name: _step(name, settings) for name, settings in given.items() if settings is not None}
        if isinstance(roles, str) or not set(roles) <= set(ROLES):
            raise ManifestError(f"roles of augment is {roles!r}; give a list of {', '.join(ROLES)}")
        self.roles, self.seed = tuple(roles), seed

    def config(self) -> dict[str, Any]:
        """All settings, and the version of the library of codecs."""
        steps = {
            name: {"p": step.p, "kinds": list(step.kinds), **{key: list(v) for key, v in step.ranges.items()}}
            for name, step in self.steps.items()
        }
        return {"version": VERSION, "codecs": _library(), "steps": steps, "roles": list(self.roles), "seed": self.seed}

    def run(self, item: Item, store: Store) -> Item:
        """The item with spoiled sounds where its dialogue drew a step. Raises `StoreError`."""
        drawn = self.draw(item.dialogue)
        if not drawn:
            return item
        parts = [part for turn in item.dialogue.turns for part in turn.parts if part.modality == SPEECH and part.media]

        def change(i: int, j: int, turn: Turn, part: Part) -> Part:
            if part.modality != SPEECH or part.media is None or turn.role not in self.roles:
                return part
            others = [other.media for other in parts if other is not part] or [part.media]
            name = [item.dialogue.id, i, j]
            return replace(part, media=self._spoil(part.media, drawn, name, [m for m in others if m], store))

        return replace(item, dialogue=item.dialogue.map_parts(change)).with_facts(augment=drawn)

    def draw(self, dialogue: Dialogue) -> dict[str, dict[str, Any]]:
        """What happens to a dialogue: steps with their drawn strengths, in order."""
        drawn: dict[str, dict[str, Any]] = {}
        for name, step in self.steps.items():
            rng = rng_of(self.seed, dialogue.id, "augment", name)  # of its own: one step never changes another
            if rng.random() < step.p:
                drawn[name] = {key: round(float(rng.uniform(*bounds)), 3) for key, bounds in step.ranges.items()}
                if step.kinds:
                    drawn[name]["kind"] = step.kinds[int(rng.integers(len(step.kinds)))]
        return drawn

    def _spoil(
        self, media: MediaFile, drawn: dict[str, Any], name: list[Any], others: Sequence[MediaFile], store: Store
    ) -> MediaFile:
        babble = drawn.get("noise", {}).get("kind") == "babble"
        heard = sorted({other.sha256 for other in others}) if babble else []
        codecs = _library() if "codec" in drawn else ""
        key = address(["augment", VERSION, codecs, media.sha256, drawn, self.seed, name, heard])
        origin = {**media.origin, "augment": drawn, "clean": media.file}
        if store.has(key, ".flac"):
            return store.put_sound(key, np.zeros(0, np.float32), media.sample_rate or 0, origin)
        sound, sample_rate = store.sound(media)
        clips = []
        if babble:
            clips = [store.sound(other) for other in sorted(others, key=lambda m: m.sha256)]
        sounds = [clip if rate == sample_rate else _resample(clip, rate, sample_rate) for clip, rate in clips]
        noise, room = rng_of(self.seed, *name, "noise"), rng_of(self.seed, name[0], "augment", "room")
        spoiled = augment(sound, sample_rate, drawn, noise, sounds, room=room)
        return store.put_sound(key, spoiled, sample_rate, origin)


def augment(
    sound: Float32,
    sample_rate: int,
    steps: Mapping[str, Mapping[str, Any]],
    rng: np.random.Generator,
    others: Sequence[Float32] = (),
    *,
    room: np.random.Generator | None = None,
) -> Float32:
    """Applies drawn steps, as `AugmentStage.draw` gives them.

    Args:
        sound: float32 `[samples]`.
        sample_rate: Hz.
        steps: name of a step to its strengths.
        rng: of noise, and of echoes where `room` is not given.
        others: sounds for babble, float32 `[samples]` each.
        room: of echoes: sounds of one room have equal ones, where their sample rates are equal.

    Returns:
        float32 `[samples]` of the same length, none beyond 0.99.
    """
    echoes, noise = rng.spawn(2)
    level = _level(sound)
    if "reverb" in steps:
        sound = reverb(sound, sample_rate, steps["reverb"]["rt60_s"], steps["reverb"]["direct_db"], room or echoes)
    if "noise" in steps:
        made = _noise(steps["noise"]["kind"], len(sound), noise, others)
        sound = sound + made * np.float32(level * 10 ** (-steps["noise"]["snr_db"] / 20) / max(_level(made), 1e-9))
    if "gain" in steps:
        sound = sound * np.float32(10 ** (steps["gain"]["db"] / 20))
    if "clip" in steps:
        limit = float(np.abs(sound).max(initial=0.0)) * steps["clip"]["of_peak"]
        sound = np.clip(sound, -limit, limit)
    sound = _within(sound)
    if "codec" in steps:
        sound = _within(through_codec(sound, sample_rate, steps["codec"]["kind"], steps["codec"]["compression"]))
    return sound.astype(np.float32, copy=False)


def reverb(sound: Float32, sample_rate: int, rt60_s: float, direct_db: float, rng: np.random.Generator) -> Float32:
    """The sound in a room: itself, and noise that decays by 60 dB in `rt60_s` as impulse response of the echoes.

    The first echo comes after 5 ms. What rings on beyond the sound's end is cut.
    """
    size = max(1, round(rt60_s * sample_rate))
    echoes = rng.standard_normal(size) * 10 ** (-3 * np.arange(size) / size)
    echoes[: min(size - 1, round(0.005 * sample_rate))] = 0
    echoes *= 10 ** (-direct_db / 20) / max(float(np.sqrt((echoes**2).sum())), 1e-9)
    padded = _fast_size(len(sound) + size)
    wet = np.fft.irfft(np.fft.rfft(sound, padded) * np.fft.rfft(echoes, padded), padded)[: len(sound)]
    return (sound + wet).astype(np.float32)


def _noise(kind: str, size: int, rng: np.random.Generator, others: Sequence[Float32]) -> Float32:
    if kind == "babble" and any(map(len, others)):
        babble = np.zeros(size, np.float32)
        for _ in range(BABBLERS):
            voice = others[int(rng.integers(len(others)))][::-1]
            if len(voice):
                babble += np.resize(np.roll(voice / max(_level(voice), 1e-9), int(rng.integers(len(voice)))), size)
        return babble
    white = rng.standard_normal(size)
    if kind == "white" or size < 2:
        return white.astype(np.float32)
    padded = _fast_size(size)
    spectrum = np.fft.rfft(white, padded)
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))  # power falls as 1 / frequency
    return np.fft.irfft(spectrum, padded)[:size].astype(np.float32)


def through_codec(sound: Float32, sample_rate: int, kind: str, compression: float) -> Float32:
    """The sound after coding and decoding, as long as before and at the same place.

    Args:
        sound: float32 `[samples]`.
        sample_rate: Hz.
        kind: "mulaw", "vorbis", "opus" or "mp3".
        compression: of the last three, 0 (best) to 0.99 (smallest).
    """
    if not len(sound):
        return sound
    if kind == "mulaw":
        narrow = _band(_resample(sound, sample_rate, 8_000), 8_000)
        # ITU-T G.711's curve, with 8 bits
        pressed = np.sign(narrow) * np.log1p(255 * np.abs(narrow).clip(0, 1)) / np.log(256)
        pressed = np.round(pressed * 127) / 127
        decoded = np.sign(pressed) * (256 ** np.abs(pressed) - 1) / 255
        return _fit(_resample(decoded.astype(np.float32), 8_000, sample_rate), len(sound))
    # Opus knows these rates only, the others most; 16 kHz is among all.
    rate = sample_rate if sample_rate in (8_000, 16_000, 24_000, 48_000) else 48_000
    wide = _resample(sound, sample_rate, rate)
    padded = np.pad(wide, (0, rate // 10))  # a codec may hold back its last frames
    container, subtype = _FORMATS[kind]
    file = io.BytesIO()
    sf.write(file, padded, rate, format=container, subtype=subtype, compression_level=compression)
    file.seek(0)
    decoded, decoded_rate = sf.read(file, dtype="float32")
    if decoded_rate != rate:
        decoded = _resample(decoded, decoded_rate, rate)
    return _fit(_resample(_align(decoded, wide, rate), rate, sample_rate), len(sound))


def _align(decoded: Float32, sound: Float32, rate: int) -> Float32:
    """Takes out a codec's delay, at most 0.1 s, by the best match with what went in."""
    most = rate // 10
    size = _fast_size(len(decoded) + len(sound))
    match = np.fft.irfft(np.fft.rfft(decoded, size) * np.conj(np.fft.rfft(sound, size)), size)
    lags = np.concatenate([match[: most + 1], match[-most:]])
    best = int(lags.argmax())
    lag = best if best <= most else best - len(lags)
    return _fit(decoded[lag:] if lag >= 0 else np.pad(decoded, (-lag, 0)), len(sound))


def _band(sound: Float32, sample_rate: int) -> Float32:
    """What a telephone lets through, without a shift in time; the edges are 100 Hz wide."""
    padded = _fast_size(len(sound) + sample_rate // 10)
    hz = np.fft.rfftfreq(padded, 1 / sample_rate)
    gain = ((hz - BAND_HZ[0] + 100) / 100).clip(0, 1) * ((BAND_HZ[1] + 100 - hz) / 100).clip(0, 1)
    return np.fft.irfft(np.fft.rfft(sound, padded) * gain, padded)[: len(sound)].astype(np.float32)


def _resample(sound: Float32, rate: int, to: int) -> Float32:
    if rate == to:
        return sound
    return soxr.resample(sound, rate, to, quality="HQ").astype(np.float32, copy=False)


def _fit(sound: Float32, size: int) -> Float32:
    return sound[:size] if len(sound) >= size else np.pad(sound, (0, size - len(sound)))


def _within(sound: Float32) -> Float32:
    peak = float(np.abs(sound).max(initial=0.0))
    return sound if peak <= PEAK else sound * np.float32(PEAK / peak)


def _level(sound: Float32) -> float:
    return float(np.sqrt(np.mean(np.square(sound, dtype=np.float64)))) if len(sound) else 0.0


def _fast_size(size: int) -> int:
    power = 1 << max(0, size - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= size else power


def _library() -> str:
    return f"libsndfile-{sf.__libsndfile_version__}"


def _step(name: str, given: Mapping[str, Any]) -> _Step:
    ranges, kinds = _STEPS[name]
    known = {"p", *ranges, *(["kinds"] if kinds else [])}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ManifestError(f"{name} of augment is {given!r}; give {', '.join(sorted(known))}")
    p = given.get("p", 1.0)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ManifestError(f"p of {name} is {p!r}; give a probability from 0 to 1")
    chosen = given.get("kinds", kinds)
    if isinstance(chosen, str) or not set(chosen) <= set(kinds) or (kinds and not chosen):
        raise ManifestError(f"kinds of {name} is {chosen!r}; give a list of {', '.join(kinds)}")
    for kind in chosen:
        if kind in _FORMATS and not sf.check_format(*_FORMATS[kind]):
            raise ManifestError(f"this libsndfile ({sf.__libsndfile_version__}) cannot write {kind}; leave it out")
    bounded = {
        key: range_of(given.get(key, default), f"{key} of {name}", low, high)
        for key, (low, high, default) in ranges.items()
    }
    return _Step(float(p), bounded, tuple(chosen))
