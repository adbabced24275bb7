"""Near-duplicates: what is found, what is not, and memory that does not grow."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.dedup import Deduplicator, Match, shingles, signature
from anyglot_synth.text_instructions import instructions
from anyglot_tokenizers.errors import AnyglotError


def jaccard(a: str, b: str) -> float:
    first, second = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(first & second) / len(first | second)


@given(st.text(max_size=60))
def test_equal_texts_are_duplicates_whatever_their_case_and_marks(text: str) -> None:
    dedup = Deduplicator(1.0)
    assert dedup.add(text) is None
    assert dedup.add(f"  {text} ... ") == Match(0, 1.0)


def test_signatures_estimate_the_similarity_of_texts() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    errors = []
    for _ in range(200):
        words = rng.choice(letters, (60, 6))
        changed = np.where((rng.random(60) < rng.random() * 0.4)[:, None], rng.choice(letters, (60, 6)), words)
        a, b = (" ".join("".join(word) for word in text) for text in (words, changed))
        errors.append((signature(a) == signature(b)).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01, "no bias"
    assert np.std(errors) < 0.05, "128 draws: 0.044 at worst"


def test_recall_and_precision_on_changed_texts() -> None:
    """Of a thousand texts, each followed by a changed copy: which copies are found, and which should have been."""
    rng = np.random.default_rng(1)
    rows = [f"{row['instruction']} {row['input']} {row['output']}" for row in instructions(3000, seed=5)]
    base = [" ".join(rows[3 * i : 3 * i + 3]) for i in range(1000)]
    dedup = Deduplicator(0.7)
    found, should = 0, 0
    false = 0
    for text in base:
        words = text.split()
        if dedup.add(text) is not None:
            continue
        for place in rng.choice(len(words), int(rng.integers(0, 5)), replace=False):
            words[place] = rows[int(rng.integers(len(rows)))].split()[0]
        copy = " ".join(words)
        match, similarity = dedup.add(copy), jaccard(text, copy)
        if similarity >= 0.8:
            should += 1
            found += match is not None
        elif match is not None and similarity < 0.55:
            false += 1
    assert should > 300
    assert found / should > 0.98
    assert false == 0


def test_memory_is_bounded_and_old_texts_are_forgotten() -> None:
    dedup = Deduplicator(0.9, capacity=100)
    size = dedup._signatures.nbytes + dedup._tables.nbytes
    texts = [f"text number {i} is about {np.random.default_rng(i).integers(1 << 60)}" for i in range(1000)]
    assert sum(dedup.add(text) is None for text in texts) == 1000
    assert dedup._signatures.nbytes + dedup._tables.nbytes == size
    recent = [dedup.add(text) for text in texts[-50:]]
    assert [match.number for match in recent if match] == list(range(950, 1000)), "numbers are places in the stream"
    assert dedup.add(texts[0]) is None


def test_order_and_nothing_else_decides() -> None:
    texts = ["a walk in the park today", "a walk in the park today!", "slow music", "A WALK in the park today"]
    first, second = Deduplicator(), Deduplicator()
    twice = [[dedup.add(text) for text in texts] for dedup in (first, second)]
    assert twice[0] == twice[1]
    assert [match and match.number for match in twice[0]] == [None, 0, None, 0]


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.5}, {"n": 0}, {"capacity": 0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(AnyglotError, match="use a threshold"):
        Deduplicator(**bad)  # type: ignore[arg-type]


def test_a_long_text_takes_no_more_memory_than_a_short_one() -> None:
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 50_000)))
    tracemalloc.start()
    found = signature(text)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000  # all at once: 100 MB and more
    parts = [signature(text[i : i + 5004]) for i in range(0, 50_000, 5000)]  # grams of 5 letters overlap by 4
    assert (found == np.min(parts, axis=0)).all()
