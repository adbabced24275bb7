"""`SpeakStage`: gives every spoken part of a dialogue its sound.

The words are spoken by a voice of the cast, whatever their length, brought to one sample rate and one loudness, and
kept under an address made of all that shaped them. A sound that is there already is not made again. The stage does not
make text speakable (`speakable.py`), does not judge what it made (filters) and does not spoil it (`augment.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anyglot_synth import longtext
from anyglot_synth.backends import Backend
from anyglot_synth.cast import Cast, Speaker, speakers_of
from anyglot_synth.dialogue import SPEECH, Dialogue, MediaFile, Part, Turn, address
from anyglot_synth.loudness import TARGET_LUFS, normalise
from anyglot_synth.seeds import seed_of
from anyglot_synth.stages import Filtered, Item, Stage
from anyglot_synth.store import Store
from anyglot_synth.voices import BACKENDS
from anyglot_tokenizers.errors import ManifestError

VERSION = 1
"""Counts changes of what is done to an engine's sound here."""


class SpeakStage(Stage):
    """Speaks the parts of modality "speech" that have no file yet.

    Args:
        engines: one speech engine or several: backends, their names, or plain settings such as
            `{"engine": "flite", "voices": ["slt", "rms"]}`.
        cast: who speaks: a `Cast`, or its settings; their `seed` is that of the stage unless given.
        sample_rate: of all sounds, Hz.
        loudness_lufs: of all sounds (ITU-R BS.1770, peaks at most -1 dB).
        max_characters: of one utterance; a longer one ends its item as "too_long".
        max_seconds: of one utterance, likewise.
        seed: of the cast and of engines that draw.

    Raises:
        ManifestError, SpeechError: a setting that is impossible.
    """

    name: ClassVar[str] = "speak"

    def __init__(
        self,
        engines: Backend | Mapping[str, Any] | str | Sequence[Backend | Mapping[str, Any] | str],
        cast: Cast | Mapping[str, Any] | None = None,
        sample_rate: int = 16_000,
        loudness_lufs: float = TARGET_LUFS,
        max_characters: int = 2_000,
        max_seconds: float = 120.0,
        seed: int = 0,
    ) -> None:
        given = [engines] if isinstance(engines, Backend | Mapping | str) else list(engines)
        self.engines = [one if isinstance(one, Backend) else BACKENDS.make(one, "speak") for one in given]
        try:
            self.cast = cast if isinstance(cast, Cast) else Cast(**{"seed": seed, **(cast or {})})
        except TypeError as error:
            raise ManifestError(f"the cast cannot be set up from {cast!r}: {error}") from None
        if (
            not 4_000 <= sample_rate <= 192_000
            or max_characters < 1
            or max_seconds <= 0
            or not -70 <= loudness_lufs <= 0
        ):
            raise ManifestError(
                f"speak: sample_rate {sample_rate}, loudness_lufs {loudness_lufs}, max_characters {max_characters}, "
                f"max_seconds {max_seconds}: one of these is impossible"
            )
        self.sample_rate, self.loudness_lufs, self.seed = sample_rate, loudness_lufs, seed
        self.max_characters, self.max_seconds = max_characters, max_seconds
        self._speakers: list[Speaker] | None = None
        self._identities: list[dict[str, Any]] = []

    def config(self) -> dict[str, Any]:
        """Engines with their versions and licences, and all settings."""
        return {
            "engines": [
                [e.identity(), longtext.limit(e), [dict(style) for style in e.styles()], e.licence]
                for e in self.engines
            ],
            "cast": self.cast.config(),
            "sound": self._sound(),
            "max_characters": self.max_characters,
            "max_seconds": self.max_seconds,
            "seed": self.seed,
        }

    def setup(self) -> None:
        """Loads the engines and checks that the cast names voices of theirs. Raises `BackendError`, `ManifestError`."""
        for engine in self.engines:
            engine.setup()
        self._speakers = speakers_of(self.engines)
        self._identities = [engine.identity() for engine in self.engines]
        self.cast.check(self._speakers)

    def run(self, item: Item, store: Store) -> Item:
        """The item with a file in every spoken part, and `speech_seconds` of those made among its facts.

        Raises:
            Filtered: "too_long", "no_words", or "language" where nobody speaks it.
            BackendError: an engine failed.
        """
        if self._speakers is None:
            self.setup()
        seconds: list[float] = []

        def change(i: int, j: int, turn: Turn, part: Part) -> Part:
            if part.modality != SPEECH or part.media is not None:
                return part
            spoken = self._speak(item.dialogue, turn.role, part, (i, j), store)
            assert spoken.media is not None
            seconds.append(round(spoken.media.seconds or 0.0, 3))
            return spoken

        dialogue = item.dialogue.map_parts(change)
        return replace(item, dialogue=dialogue).with_facts(speech_seconds=seconds) if seconds else item

    def _speak(self, dialogue: Dialogue, role: str, part: Part, place: tuple[int, int], store: Store) -> Part:
        text = (part.spoken_text if part.spoken_text is not None else part.text).strip()
        if len(text) > self.max_characters:
            raise Filtered("too_long", f"{len(text)} characters to speak, {self.max_characters} are the limit")
        if not any(map(str.isalnum, text)):
            raise Filtered("no_words", f"nothing to say in {text[:40]!r}")
        assert self._speakers is not None
        speaker, style = self.cast.draw(self._speakers, dialogue, role)
        engine = self.engines[speaker.engine]
        seed = seed_of(self.seed, dialogue.id, *place) if engine.seeded else 0
        key = address([engine.key(text, style, seed), longtext.limit(engine), self._sound()])
        origin = {
            "backend": self._identities[speaker.engine],
            "style": style,
            "seed": seed,
            "licence": engine.licence,
            "speaker": {k: getattr(speaker, k) for k in ("language", "gender", "accent") if getattr(speaker, k)},
        }
        # What is there is only read: `put_sound` then writes nothing.
        there = store.has(key, ".flac")
        sound = np.zeros(0, np.float32) if there else self._make(engine, text, style, seed)
        media: MediaFile = store.put_sound(key, sound, self.sample_rate, origin)
        if (media.seconds or 0.0) > self.max_seconds:
            raise self._too_long(media.seconds or 0.0)
        return replace(part, spoken_text=text, media=media)

    def _make(self, engine: Backend, text: str, style: Mapping[str, Any], seed: int) -> NDArray[np.float32]:
        import soxr

        made = longtext.speak(engine, text, style, seed)
        sound, rate = made.array, made.sample_rate
        if rate != self.sample_rate:
            sound = soxr.resample(sound, rate, self.sample_rate, quality="HQ").astype(np.float32, copy=False)
        if len(sound) > self.max_seconds * self.sample_rate:
            raise self._too_long(len(sound) / self.sample_rate)
        return normalise(sound, self.sample_rate, self.loudness_lufs)

    def _too_long(self, seconds: float) -> Filtered:
        return Filtered("too_long", f"{seconds:.1f} s of speech, {self.max_seconds:g} s are the limit")

    def _sound(self) -> dict[str, Any]:
        """What is done to an engine's sound: part of its address."""
        return {
            "version": [VERSION, longtext.VERSION],
            "sample_rate": self.sample_rate,
            "loudness_lufs": self.loudness_lufs,
        }
