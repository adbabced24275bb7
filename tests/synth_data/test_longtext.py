"""Long texts: where they are cut, and that what is joined sounds as if said at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.longtext import PAUSES_S, join, sentences, speak, split, trim
from anyglot_synth.voices import backend, programs

RATE = 16_000


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith paid $3.50, i.e. a lot. | Really? | Yes! | It works.",
        "The U.S. is big. | He lives in the U.S. | The end.",
        "We like fruit, e.g. apples, etc. | That is all.",
        "At 5 p.m. | He left.",
        "At 5 p.m. Tuesday he left.",
        "J. R. R. Tolkien wrote it. | Mr. Frodo read it, vs. Sam.",
        "Wait... what? | Hm... | Yes.",
        "Pi is 3.14159. | Next, see fig. 3 and No. 5.",
        "Am 3. Oktober war es. | Das ist z.B. gut. | Ende.",
        'He said "Stop." | Then he left. | "Why?" she asked.',
        "1. First thing. | 2. Second thing.",
        "¿Cómo estás? | ¡Bien! | La Sra. López vino.",
        "It happened in 2024. | Then it rained.",
        "मैं ठीक हूँ। | तुम कैसे हो?",
        "هل أنت بخير؟ | نعم.",
        "Visit example.com today. | Version 2.0 is out!",
        "One (really.) | Two [yes!] | Three",
    ],
)
def test_sentences(text: str) -> None:
    expected = text.split(" | ")
    assert sentences(" ".join(expected)) == expected


def test_sentences_without_spaces() -> None:
    assert sentences("你好。今天天气很好！“是吗？”是的。") == ["你好。", "今天天气很好！", "“是吗？”", "是的。"]


def test_split_takes_sentences_then_clauses_then_words() -> None:
    text = "One two. Three four, five six seven; eight.\n\nNine."
    assert [(p.text, p.end) for p in split(text, 100)] == [
        ("One two. Three four, five six seven; eight.", "paragraph"),
        ("Nine.", "paragraph"),
    ]
    assert [(p.text, p.end) for p in split(text, 18)] == [
        ("One two.", "sentence"),
        ("Three four,", "clause"),
        ("five six seven;", "clause"),
        ("eight.", "paragraph"),
        ("Nine.", "paragraph"),
    ]
    assert [p.end for p in split(text, 9)] == ["sentence", "word", "clause", "word", "clause", "paragraph", "paragraph"]
    assert split(" \n -- \n\n ... ", 9) == []
    with pytest.raises(BackendError, match="a word of 12 characters"):
        split("an extraordinary thing"[:15], 11)
    assert [p.text for p in split("你好今天天气很好", 3)] == ["你好今", "天天气", "很好"]


@given(st.text("ab.,!? \n。，9-\"'", max_size=300), st.integers(30, 80))
def test_split_loses_and_adds_nothing(text: str, size: int) -> None:
    if any(len(word) > size for word in text.split()):
        return
    pieces = split(text, size)
    assert all(0 < len(piece.text) <= size and piece.end in PAUSES_S for piece in pieces)
    kept = "".join("".join(piece.text.split()) for piece in pieces)
    assert [c for c in kept if c.isalnum()] == [c for c in text if c.isalnum()]
    whole = text.split()
    assert all(word in whole or "。" in text or "，" in text for piece in pieces for word in piece.text.split())


def tone(seconds: float, level: float, hz: float = 200.0) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def test_join_is_equally_loud_and_has_no_clicks() -> None:
    silence = np.zeros(4000, np.float32)
    loud = np.concatenate([silence, tone(0.5, 0.4), silence]) + np.float32(0.05)
    soft = np.concatenate([tone(0.5, 0.2), silence])
    joined = join([loud, soft], ["sentence", "paragraph"], RATE)
    assert joined[0] == 0 and abs(joined[-1]) < 0.01 and joined.dtype == np.float32
    assert len(joined) == pytest.approx((0.5 + 0.5 + PAUSES_S["sentence"]) * RATE, abs=0.07 * RATE)
    heard = np.flatnonzero(np.abs(joined) > 0.01)
    gap = int(heard[np.diff(heard, append=heard[-1]) > 1000][0])
    first, second = joined[heard[0] : gap], joined[gap + round(0.3 * RATE) : heard[-1]]
    second = second[np.flatnonzero(np.abs(second) > 0.01)[0] :]
    levels = [float(np.sqrt((part[800:-800] ** 2).mean())) for part in (first, second)]
    assert levels[0] == pytest.approx(levels[1], rel=0.02)
    # A tone of 200 Hz at that level climbs by this much a sample: a click would be more.
    assert np.abs(np.diff(joined)).max() < 1.2 * 2 * np.pi * 200 / RATE * np.abs(joined).max()


def test_trim_keeps_the_sound_and_survives_silence() -> None:
    sound = np.concatenate([np.zeros(5000, np.float32), tone(0.3, 0.3), np.zeros(5000, np.float32)])
    kept = trim(sound, RATE)
    assert abs(len(kept) - 0.34 * RATE) < 0.02 * RATE
    assert len(trim(np.zeros(9000, np.float32), RATE)) == len(trim(np.zeros(0, np.float32), RATE)) == 0
    assert len(trim(tone(0.001, 0.5), RATE)) == 16
    assert len(join([], [], RATE)) == 0


class _Counting(Backend):
    """A tone per call, which tells what it was asked."""

    modality, name, max_characters = "speech", "tones", 20

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def identity(self) -> dict[str, Any]:
        return {"engine": "tones"}

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        self.asked.append((text, seed))
        return Made(tone(0.2, 0.3), RATE)


def test_each_piece_has_a_seed_of_its_own() -> None:
    engine = _Counting()
    made = speak(engine, "One two three. Four five six. Seven.", {}, 5)
    assert [text for text, _ in engine.asked] == ["One two three.", "Four five six.", "Seven."]
    assert engine.asked[0][1] == 5 and len({seed for _, seed in engine.asked}) == 3
    assert made.notes == {"pieces": 3}
    with pytest.raises(BackendError, match="at least one word"):
        speak(engine, " ... ", {}, 5)


@pytest.mark.skipif(not programs.has_flite(), reason="flite is not here")
def test_a_long_text_says_all_its_sentences() -> None:
    class Short(type(backend("flite"))):
        max_characters = 60

    text = "The ship left the harbour early. It carried tea, salt, and wool; nobody saw it again. Why? We do not know."
    style = {"voice": "rms"}
    whole, pieces = (speak(engine, text, style, 0) for engine in (backend("flite"), Short()))
    assert pieces.notes["pieces"] == 3 and "pieces" not in whole.notes
    assert whole.sample_rate == pieces.sample_rate
    assert len(pieces.array) == pytest.approx(len(whole.array), rel=0.1)
