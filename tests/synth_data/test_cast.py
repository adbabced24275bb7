"""The cast: the same voices for a whole dialogue, balanced over all, and only in languages they speak."""

from __future__ import annotations

from collections import Counter

import pytest

from anyglot_synth.cast import Cast, Speaker, speaking
from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.stages import Filtered
from anyglot_tokenizers.errors import ManifestError

SPEAKERS = [
    Speaker(0, "flite", "slt", "en-US", "female", "American"),
    Speaker(0, "flite", "rms", "en-US", "male", "American"),
    Speaker(0, "flite", "awb", "en-GB", "male", "Scottish"),
    Speaker(0, "flite", "kal16", "en-US", "male", "American"),
    Speaker(1, "espeak-ng", "de", "de", "male", "de"),
    Speaker(1, "espeak-ng", "de+f2", "de", "female", "de"),
    Speaker(2, "hf", "anna", None, "female", None, has_rate=False),
]


def dialogue(number: int = 0, language: str = "en") -> Dialogue:
    parts = (Part("speech", f"sentence {number}"),)
    return Dialogue((Turn("user", parts), Turn("assistant", parts)), "test", language=language)


def test_one_assistant_and_many_users() -> None:
    cast = Cast(seed=3)
    drawn = [cast.draw(SPEAKERS, dialogue(n), "user") for n in range(2000)]
    assert {cast.draw(SPEAKERS, dialogue(n), "assistant")[0] for n in range(50)} == {SPEAKERS[0]}
    assert cast.draw(SPEAKERS, dialogue(), "system") == (SPEAKERS[0], {"voice": "slt", "rate": 1.0, "pitch": 0.0})
    genders = Counter(speaker.gender for speaker, _ in drawn)
    assert set(genders) == {"male", "female"} and abs(genders["male"] - 1000) < 5 * 2000**0.5 / 2
    voices = Counter(speaker.voice for speaker, _ in drawn)
    assert set(voices) == {"rms", "awb", "kal16", "anna"}  # not the assistant's
    assert all(abs(voices[name] - 333) < 90 for name in ("rms", "awb", "kal16"))
    rates = [style["rate"] for _, style in drawn if "rate" in style]
    pitches = [style["pitch"] for _, style in drawn if "pitch" in style]
    assert min(rates) < 0.92 and max(rates) > 1.08 and 0.9 <= min(rates) <= max(rates) <= 1.1
    assert -1 <= min(pitches) < -0.9 and 0.9 < max(pitches) <= 1
    assert all(style == {"voice": "anna"} for speaker, style in drawn if speaker.voice == "anna")


def test_a_draw_depends_on_seed_dialogue_and_role_only() -> None:
    first = [Cast(seed=1).draw(SPEAKERS, dialogue(n), "user") for n in range(30)]
    assert first[::-1] == [Cast(seed=1).draw(SPEAKERS, dialogue(n), "user") for n in reversed(range(30))]
    assert first != [Cast(seed=2).draw(SPEAKERS, dialogue(n), "user") for n in range(30)]


def test_languages() -> None:
    cast = Cast(balance=[])
    german = {cast.draw(SPEAKERS, dialogue(n, "de-AT"), "user")[0].voice for n in range(60)}
    assert german == {"de+f2", "anna"}
    assert cast.draw(SPEAKERS, dialogue(0, "de"), "assistant")[0].voice == "de"
    assert {s.voice for s in speaking(SPEAKERS, "en-GB")} == {"awb"} | {"anna"}
    assert {s.voice for s in speaking(SPEAKERS[:6], "en_gb")} == {"awb"}
    with pytest.raises(Filtered, match="no voice of the user speaks 'fr'"):
        cast.draw(SPEAKERS[:6], dialogue(0, "fr"), "user")
    with pytest.raises(Filtered, match="no voice of the assistant speaks 'de'"):
        Cast(assistant="slt").draw(SPEAKERS, dialogue(0, "de"), "assistant")


def test_settings() -> None:
    cast = Cast(assistant="flite/awb", users=["slt", "flite/rms"], rate=[1, 1], pitch=[0, 0], assistant_rate=1.2)
    assert cast.draw(SPEAKERS, dialogue(), "assistant") == (SPEAKERS[2], {"voice": "awb", "rate": 1.2, "pitch": 0.0})
    styles = [cast.draw(SPEAKERS, dialogue(n), "user")[1] for n in range(40)]
    assert {style["voice"] for style in styles} == {"slt", "rms"} and {style["rate"] for style in styles} == {1.0}
    assert Cast(users=["slt"]).draw(SPEAKERS[:1], dialogue(), "user")[0].voice == "slt"
    assert Cast().draw(SPEAKERS[:1], dialogue(), "user")[0].voice == "slt"  # one voice has to do for both
    cast.check(SPEAKERS)
    with pytest.raises(ManifestError, match="unknown voice 'bob'; there are: flite/slt"):
        Cast(users=["bob"]).check(SPEAKERS)
    with pytest.raises(ManifestError, match="cast is empty"):
        Cast().check([])
    for settings, problem in [
        ({"rate": [1.1, 0.9]}, "rate is"),
        ({"rate": 1}, "give .lowest, highest."),
        ({"pitch": [-20, 0]}, "within -12 and 12"),
        ({"users": "slt"}, "give a list"),
        ({"balance": ["age"]}, "gender, accent, language, engine"),
        ({"assistant_rate": float("nan")}, "assistant_rate"),
    ]:
        with pytest.raises(ManifestError, match=problem):
            Cast(**settings)
