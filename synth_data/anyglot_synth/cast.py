"""`Cast`: who speaks: one voice for the assistant of all dialogues, many for users, each the same for a whole dialogue.

Voices are drawn by the seed, the dialogue's id and the role, never by order or time. They are taken only for languages
they speak, as far as that is known. This file makes no sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyglot_synth.dialogue import ASSISTANT, USER, Dialogue
from anyglot_synth.seeds import rng_of
from anyglot_synth.stages import Filtered
from anyglot_tokenizers.errors import ManifestError

Range = tuple[float, float]


@dataclass(frozen=True)
class Speaker:
    """A voice of an engine, with what is known of it."""

    engine: int
    """Its place in the list of engines."""
    engine_name: str
    voice: str
    language: str | None = None
    gender: str | None = None
    accent: str | None = None
    has_rate: bool = True

    def answers_to(self, name: str) -> bool:
        """Whether a user who writes this name means it: "slt" or "flite/slt"."""
        return name in (self.voice, f"{self.engine_name}/{self.voice}")


def speakers_of(engines: Sequence[Any]) -> list[Speaker]:
    """All voices of these backends, in order. Raises `BackendError` where one has none of those it was given."""
    return [
        Speaker(
            number,
            engine.name,
            str(style["voice"]),
            style.get("language"),
            style.get("gender"),
            style.get("accent"),
            getattr(engine, "has_rate", True),
        )
        for number, engine in enumerate(engines)
        for style in engine.styles()
    ]


class Cast:
    """Draws a speaker and a style for each role of a dialogue.

    Args:
        assistant: name of the assistant's voice ("slt", or "flite/slt"); None takes the first that speaks the language.
        users: names of the users' voices; None takes all but the assistant's, if there are others.
        rate: lowest and highest relative pace of users.
        pitch: lowest and highest relative pitch of users, semitones.
        assistant_rate: relative pace of the assistant.
        assistant_pitch: relative pitch of the assistant, semitones.
        balance: what is drawn first, each value as often as the others, before a voice is drawn among those that have
            it: of "gender", "accent", "language", "engine".
        seed: another seed draws others.

    Raises:
        ManifestError: an impossible setting.
    """

    def __init__(
        self,
        assistant: str | None = None,
        users: Sequence[str] | None = None,
        rate: Sequence[float] = (0.9, 1.1),
        pitch: Sequence[float] = (-1.0, 1.0),
        assistant_rate: float = 1.0,
        assistant_pitch: float = 0.0,
        balance: Sequence[str] = ("gender",),
        seed: int = 0,
    ) -> None:
        if users is not None and (isinstance(users, str) or not users):
            raise ManifestError(f"users of the cast is {users!r}; give a list of names of voices")
        known = ("gender", "accent", "language", "engine")
        if isinstance(balance, str) or not set(balance) <= set(known):
            raise ManifestError(f"balance of the cast is {balance!r}; give a list of {', '.join(known)}")
        self.assistant, self.users = assistant, None if users is None else tuple(users)
        self.rate, self.pitch = range_of(rate, "rate", 0.5, 2.0), range_of(pitch, "pitch", -12.0, 12.0)
        self.assistant_style = {
            "rate": range_of([assistant_rate] * 2, "assistant_rate", 0.5, 2.0)[0],
            "pitch": range_of([assistant_pitch] * 2, "assistant_pitch", -12.0, 12.0)[0],
        }
        self.balance, self.seed = tuple(balance), seed

    def config(self) -> dict[str, Any]:
        """JSON of the settings."""
        return {
            "assistant": self.assistant,
            "users": None if self.users is None else list(self.users),
            "rate": list(self.rate),
            "pitch": list(self.pitch),
            "assistant_style": self.assistant_style,
            "balance": list(self.balance),
            "seed": self.seed,
        }

    def check(self, speakers: Sequence[Speaker]) -> None:
        """Raises `ManifestError` where a name is of no speaker."""
        if not speakers:
            raise ManifestError("the cast is empty: name a speech engine with voices")
        for name in (*(self.users or ()), *([] if self.assistant is None else [self.assistant])):
            if not any(speaker.answers_to(name) for speaker in speakers):
                names = ", ".join(f"{speaker.engine_name}/{speaker.voice}" for speaker in speakers[:40])
                raise ManifestError(f"the cast names an unknown voice {name!r}; there are: {names}")

    def draw(self, speakers: Sequence[Speaker], dialogue: Dialogue, role: str) -> tuple[Speaker, dict[str, Any]]:
        """(speaker, style) of a role, the same for all its turns. Whoever is no user gets the assistant's voice.

        Raises:
            Filtered: nobody speaks the dialogue's language.
        """
        assistant = self._assistant(speakers, dialogue.language)
        if role != USER:
            if assistant is None:
                raise _nobody(speakers, dialogue.language, ASSISTANT)
            return assistant, self._style(assistant, self.assistant_style["rate"], self.assistant_style["pitch"])
        able = [one for one in speakers if self.users is None or any(map(one.answers_to, self.users))]
        able = speaking(able, dialogue.language)
        if self.users is None and len(able) > 1:
            able = [speaker for speaker in able if speaker != assistant]
        if not able:
            raise _nobody(speakers, dialogue.language, USER)
        rng = rng_of(self.seed, dialogue.id, role)
        for trait in self.balance:
            values = [speaker.engine_name if trait == "engine" else getattr(speaker, trait) for speaker in able]
            choices = sorted(set(values), key=str)
            chosen = choices[int(rng.integers(len(choices)))]
            able = [speaker for speaker, value in zip(able, values, strict=True) if value == chosen]
        speaker = able[int(rng.integers(len(able)))]
        rate, pitch = (float(rng.uniform(*bounds)) for bounds in (self.rate, self.pitch))
        return speaker, self._style(speaker, round(rate, 2), round(pitch, 1))

    def _assistant(self, speakers: Sequence[Speaker], language: str) -> Speaker | None:
        named = [one for one in speakers if self.assistant is None or one.answers_to(self.assistant)]
        return next(iter(speaking(named, language)), None)

    @staticmethod
    def _style(speaker: Speaker, rate: float, pitch: float) -> dict[str, Any]:
        # Without a pace of its own an engine's pitch would change the pace.
        return {"voice": speaker.voice, **({"rate": rate, "pitch": pitch} if speaker.has_rate else {})}


def speaking(speakers: Sequence[Speaker], language: str) -> list[Speaker]:
    """Those who speak a language; of "en-GB" those of that region, if there are any.

    A speaker whose language is not known counts as able.
    """

    def fits(speaker: Speaker, size: int) -> bool:
        return speaker.language is None or _tags(speaker.language)[:size] == wanted[:size]

    wanted = _tags(language)
    able = [one for one in speakers if fits(one, 1)]
    near = [one for one in able if fits(one, len(wanted))]
    return near if any(one.language is not None for one in near) else able


def _tags(language: str) -> list[str]:
    return language.lower().replace("_", "-").split("-")


def range_of(value: Any, name: str, low: float, high: float) -> Range:
    """A lowest and a highest value within bounds, from YAML. Raises `ManifestError`."""
    try:
        first, last = (float(v) for v in value)
        good = low <= first <= last <= high
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ManifestError(f"{name} is {value!r}; give [lowest, highest] within {low:g} and {high:g}")
    return first, last


def _nobody(speakers: Sequence[Speaker], language: str, role: str) -> Filtered:
    spoken = sorted({speaker.language or "unknown" for speaker in speakers})
    return Filtered("language", f"no voice of the {role} speaks {language!r}; voices there are: {', '.join(spoken)}")
