"""`AsrFilter`: does every spoken part say its words? A recogniser writes down what it hears, and that is compared.

Three things are measured for each part, the cheap one first:

- its length: seconds of speech against what the text needs. Half a text, or a voice that babbles on, is found without
  listening. With a calibration in `sigmas` of that voice, else letters per second within wide bounds. `speech_pace` is
  from the first sound to the last; `pace` of the filter `duration` is of the whole file.
- `wer` (or `cer`): errors between the part's `spoken_text` and the transcript, through the one normaliser of
  `scoring.py`, against a limit that is absolute, or relative to what the recogniser mishears of that voice anyway.
- `missed_end`: words at the end of the text of which nothing was heard. Voices that stop early lose the end, and three
  lost words of twenty are few word errors.

`docs/log.md` has what this finds and what it costs. It does not judge how speech sounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anyglot_synth.calibration import Calibration, VoiceCalibration, rate_of, speech_seconds
from anyglot_synth.dataset import voice_of
from anyglot_synth.filters.base import Filter, made_parts, said_of
from anyglot_synth.filters.sound import pace
from anyglot_synth.recognise import Float32, Recogniser, make_recogniser
from anyglot_synth.scoring import letter_errors, missed_end, word_errors
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store


@dataclass(frozen=True)
class Limits:
    """Of one voice.

    Args:
        errors: most word (letter) errors over words (letters).
        pace: sigmas from the expected length, on either side; None without a calibration.
        letters: (least, most) letters per second where there is none.
        end: most words missed at the end.
    """

    errors: float
    pace: float | None
    letters: tuple[float, float]
    end: int


@dataclass(frozen=True)
class Verdict:
    """Of one spoken part: why it is not wanted (None: it is), the figures, and what was heard (None: not listened)."""

    reason: str | None
    detail: str
    facts: Mapping[str, float]
    heard: str | None = None


@dataclass
class AsrFilter(Filter):
    """Ends items with a spoken part that does not say its words.

    Args:
        recogniser: `{engine: sphinx}` or another of `RECOGNISERS`, with its arguments.
        max_error: most errors over words: absolute without a calibration; with one, allowed beyond the recogniser's own
            rate on the voice.
        calibration: a file that `python -m anyglot_synth.calibration` wrote with the same recogniser. Voices that it
            does not have are judged as without one, and have the fact `uncalibrated`.
        metric: "wer", or "cer" for languages that do not put spaces between words.
        max_sigmas: with a calibration, how far the length may be from the expected one.
        min_pace, max_pace: without one, letters per second.
        min_letters: shorter texts have no pace.
        max_missed_end: words; not with `cer`.

    Raises:
        AnyglotError: unknown engines and settings; a calibration by another recogniser.
    """

    name: ClassVar[str] = "asr"
    version: ClassVar[int] = 2
    recogniser: Any = "sphinx"
    max_error: float = 0.3
    calibration: str | None = None
    metric: str = "wer"
    max_sigmas: float = 3.0
    min_pace: float = 5.0
    max_pace: float = 30.0
    min_letters: int = 12
    max_missed_end: int = 1
    _recogniser: Recogniser = field(init=False, repr=False)
    _calibration: Calibration | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.require(self.metric in ("wer", "cer"), f"metric is {self.metric!r}; use wer or cer")
        self.require(self.max_error >= 0, f"max_error is {self.max_error}; use 0 or more")
        self.require(0 <= self.min_pace < self.max_pace, "min_pace must be below max_pace")
        self.require(self.max_sigmas > 0, f"max_sigmas is {self.max_sigmas}; use a number above 0")
        self._recogniser = make_recogniser(self.recogniser)
        if self.calibration is not None:
            self._calibration = Calibration.load(self.calibration)
            measured, asked = self._calibration.recogniser, self._recogniser.identity()
            self.require(measured == asked, f"{self.calibration} was measured by {measured}, not by {asked}")

    def config(self) -> dict[str, Any]:
        calibration = None if self._calibration is None else self._calibration.to_dict()
        found = {"recogniser": self._recogniser.identity(), "calibration": calibration}
        return super().config() | found

    def setup(self) -> None:
        self._recogniser.setup()

    def limits(self, voice: VoiceCalibration | None) -> Limits:
        """Of a voice that was measured, or of any (None)."""
        own = 0.0 if voice is None else (voice.errors if self.metric == "wer" else voice.letters).rate
        sigmas = self.max_sigmas if voice else None
        return Limits(self.max_error + own, sigmas, (self.min_pace, self.max_pace), self.max_missed_end)

    def judge(
        self,
        words: str,
        audio: Float32,
        sample_rate: int,
        voice: VoiceCalibration | None,
        language: str = "en",
        rate: float = 1.0,
    ) -> Verdict:
        """One spoken part, said at a relative `rate`. A part whose length is wrong is not listened to."""
        limits, seconds = self.limits(voice), speech_seconds(audio, sample_rate)
        letters = pace(words, seconds, language)
        facts = {"speech_pace": round(letters, 2)}
        if letters * max(seconds, 1e-3) >= self.min_letters:
            if voice and limits.pace is not None:
                facts["sigmas"] = round(voice.pace.deviation(words, seconds * rate, language), 2)
                if abs(facts["sigmas"]) > limits.pace:
                    short = "short" if facts["sigmas"] < 0 else "long"
                    return Verdict("pace", f"{seconds:.2f} s is too {short} ({facts['sigmas']:.1f} sigmas)", facts)
            elif not limits.letters[0] <= letters <= limits.letters[1]:
                return Verdict("pace", f"{letters:.1f} letters per second", facts)
        heard = self._recogniser.transcribe([audio], sample_rate)[0]
        count = word_errors if self.metric == "wer" else letter_errors
        facts[self.metric] = round(count(words, heard, language).rate, 4)
        if facts[self.metric] > limits.errors:
            return Verdict(self.metric, f"{self.metric} {facts[self.metric]:.2f}: heard {heard!r}", facts, heard)
        if self.metric == "wer":
            facts["missed_end"] = missed_end(words, heard, language)
            if facts["missed_end"] > limits.end:
                return Verdict("missed_end", f"{facts['missed_end']} words: heard {heard!r}", facts, heard)
        return Verdict(None, "", facts, heard)

    def run(self, item: Item, store: Store) -> Item:
        facts: dict[str, list[float]] = {}
        for where, part, media in made_parts(item.dialogue):
            if not said_of(part).strip():
                continue  # a recording that came without words, such as the prompt of a voice to clone
            voice = None
            if self._calibration is not None:
                voice = self._calibration.voices.get(voice_of(media))
                if voice is None:
                    facts.setdefault("uncalibrated", []).append(1)
            verdict = self.judge(said_of(part), *store.sound(media), voice, item.dialogue.language, rate_of(media))
            for name, value in verdict.facts.items():
                facts.setdefault(name, []).append(value)
            if verdict.reason:
                raise Filtered(verdict.reason, f"{where}: {verdict.detail}", **facts)
        return item.with_facts(**facts)
