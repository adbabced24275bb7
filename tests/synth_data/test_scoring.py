"""One normaliser for what was said and what was heard; errors that jiwer counts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.scoring import Errors, cer, letter_errors, missed_end, normal, readings, wer, word_errors

pytest.importorskip("jiwer")


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("I have 36 cats.", "I have thirty-six cats"),
        ("in 1984", "in nineteen eighty four"),
        ("in 1984", "in one thousand nine hundred and eighty-four"),
        ("in 2024", "in twenty twenty four"),
        ("in 2024", "in two thousand and twenty four"),
        ("room 101", "room one zero one"),
        ("room 101", "room a hundred and one"),
        ("1,250,000 people", "one million two hundred and fifty thousand people"),
        ("$3.50", "three dollars and fifty cents"),
        ("$1", "one dollar"),
        ("£2.5 million", "two point five million pounds"),
        ("€1.01", "one euro and one cent"),
        ("50%", "fifty per cent"),
        ("the 21st", "the twenty-first"),
        ("the 1990s", "the nineteen nineties"),
        ("at 4:05", "at four oh five"),
        ("at 4:30", "at four thirty"),
        ("3.14", "three point one four"),
        ("salt & pepper", "salt and pepper"),
        ("007", "zero zero seven"),
    ],
)
def test_numbers_in_digits_and_in_words_are_the_same(digits: str, words: str) -> None:
    assert word_errors(digits, words).edits == word_errors(words, digits).edits == 0
    assert letter_errors(digits, words).edits == 0


@pytest.mark.parametrize(("a", "b"), [("36", "three thousand and six"), ("36", "thirty six hundred"), ("15", "fifty")])
def test_other_numbers_differ(a: str, b: str) -> None:
    assert word_errors(a, b).edits > 0


def test_marks_case_and_apostrophes_do_not_count_but_fillers_do() -> None:
    assert normal("Don’t — it's “well-known”, (really)!") == "dont its well known really"
    assert word_errors("Hm, uh, well: yes.", "well yes").edits == 2  # they are said


def test_rates_are_over_all_words_and_may_exceed_one() -> None:
    assert word_errors("one two three four", "one too three") == Errors(2, 4)
    assert wer(["a b c d", "e"], ["a b c d", "f"]) == pytest.approx(1 / 5)
    assert word_errors("yes", "oh no not that").rate == 4
    assert word_errors("", "").rate == 0 and word_errors("", "noise").edits == 1
    assert word_errors("hello", "") == Errors(1, 1)
    assert cer(["abcd"], ["abxd"]) == 0.25
    assert letter_errors("今日は良い天気", "今日は良い電気", "ja") == Errors(1, 7)


def test_a_text_without_digits_has_one_reading_and_one_with_digits_at_most_three() -> None:
    assert readings("plain words") == ["plain words"]
    assert len(readings("from 1984 to 1999 in 12 steps")) == 3
    assert readings("im Jahr 1984", "de") == ["im jahr 1984"]  # only English is read out


def test_missed_end() -> None:
    said = "tell me about the rules of chess"
    assert missed_end(said, said) == 0
    assert missed_end(said, "tell me about the rules") == 2
    assert missed_end(said, "tell me a bout the rules of cheese") == 1
    assert missed_end(said, "") == 7
    assert missed_end("in 1984", "in nineteen eighty four") == 0


@given(st.text(max_size=80))
def test_any_text_equals_itself_and_is_normal_after_once(text: str) -> None:
    once = normal(text)
    assert normal(once) == once
    assert word_errors(text, text).edits == 0
    assert missed_end(text, text) == 0


HOSTILE = ["1" * 20_000, "$1.1" * 5_000, "1," * 10_000, "1.1." * 5_000, "1:" * 10_000, "$" * 20_000]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    normal(text)
    assert time.perf_counter() - start < 1


def test_a_sum_of_any_length_is_read_out() -> None:
    assert normal(f"${'1' * 5000}").split() == ["one"] * 5000 + ["dollars"]
    assert normal("$1") == "one dollar" and normal("$0.50") == "fifty cents" and normal("$10") == "ten dollars"
