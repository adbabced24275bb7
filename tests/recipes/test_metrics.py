"""The metrics of `anyglot eval data` against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.data_eval.ranking import first_place
from anyglot_recipes.metrics.captions import CiderD, same_words, words
from anyglot_recipes.metrics.joint import clip_score, retrieval
from anyglot_recipes.metrics.speech import error_rate, open_recogniser, transcribe, voice
from anyglot_tokenizers.errors import AnyglotError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, doesn't 'bark' (loudly).", "a man 's dog does n't bark loudly"),
        ("T-shirt – 3.5 metres; O’Neill’s", "t-shirt 3.5 metres o'neill 's"),
        ("ﬁne_print\n!", "fine print"),
        ("...", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()


def test_same_words() -> None:
    assert same_words("Two dogs!", ["a cat", "two dogs"])
    assert not same_words("two dogs", ["two dogs run"])


ALONE = CiderD([["a b c d"], ["e f g h"]])
"""Every n-gram is in one of two documents and weighs log 2, which cancels out."""


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("a b c d", 10.0),
        ("A, b: C d!", 10.0),
        ("e f g h", 0.0),
        ("", 0.0),
        # unigrams 2 / (sqrt 2 x 2), bigrams 1 / (1 x sqrt 3), two words too few
        ("a b", 10 / 4 * (1 / math.sqrt(2) + 1 / math.sqrt(3)) * math.exp(-4 / 72)),
        # the second `a` counts in the norm only; one word too many
        (
            "a a b c d",
            10 / 4 * (4 / (2 * math.sqrt(7)) + 3 / (2 * math.sqrt(3)) + 2 / math.sqrt(6) + 1 / math.sqrt(2))
            * math.exp(-1 / 72),
        ),
    ],
)  # fmt: skip
def test_cider_of_one_reference(candidate: str, expected: float) -> None:
    assert ALONE.score(candidate, 0) == pytest.approx(expected, abs=1e-12)


def test_cider_weighs_by_documents_and_averages_references() -> None:
    common = CiderD([["a b"], ["a c"]])
    assert common.score("a", 0) == 0.0, "a word of every document says nothing"
    assert common.score("b", 0) == pytest.approx(10 / 4 * math.exp(-1 / 72))
    several = CiderD([["a b c d", "a b c d", "x y z w"], ["e f g h"]])
    assert several.score("a b c d", 0) == pytest.approx(20 / 3)
    assert several.score("a b c d", 0, without=0) == pytest.approx(5.0), "it never stands against itself"
    assert several.score("x y z w", 0, without=2) == 0.0
    # `a` is in 2 of 3 documents (weight log 1.5), `q` in none, as if in one (log 3); unigrams are all there is
    rare = CiderD([["a"], ["a"], ["b"]])
    once, unseen = math.log(1.5), math.log(3)
    assert rare.score("a q", 0) == pytest.approx(10 / 4 * once / math.hypot(once, unseen) * math.exp(-1 / 72))


@pytest.mark.parametrize(
    ("heard", "references", "words_wrong", "letters_wrong"),
    [
        ("the cat sat", ["The cat, sat!"], (0.0, 3.0), (0.0, 11.0)),
        ("the bat sat down", ["the cat sat"], (2 / 3, 3.0), (6 / 11, 11.0)),
        ("", ["the cat sat"], (1.0, 3.0), (1.0, 11.0)),
        ("a a a", ["b"], (3.0, 1.0), (5.0, 1.0)),
        ("dogs run", ["two dogs run", "dogs runs"], (1 / 3, 3.0), (1 / 9, 9.0)),
        ("twenty one", ["21"], (0.0, 2.0), (0.0, 10.0)),
    ],
)
def test_error_rates(
    heard: str, references: list[str], words_wrong: tuple[float, float], letters_wrong: tuple[float, float]
) -> None:
    assert error_rate(heard, references) == pytest.approx(words_wrong)
    assert error_rate(heard, references, letters=True) == pytest.approx(letters_wrong)


def test_digits_are_read_out_in_english_only() -> None:
    assert error_rate("twenty one", ["21"], language="de") == (2.0, 1.0)


def test_clip_score() -> None:
    x = torch.tensor([1.0, 0.0])
    assert clip_score(x, torch.tensor([0.6, 0.8])) == pytest.approx(1.5)
    assert clip_score(x, torch.tensor([-0.6, 0.8])) == 0.0


def test_retrieval() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert retrieval(torch.tensor([0.9, 0.1]), keys, np.array([True, False, False])) == 1.0
    assert retrieval(torch.tensor([0.9, 0.1]), keys, np.array([False, True, True])) == 0.0
    assert retrieval(torch.tensor([0.1, 0.9]), keys, np.array([False, True, False])) == 0.5, "two are equally near"


def test_first_place() -> None:
    assert first_place(-1.0, [-2.0, -3.0]) == 1.0
    assert first_place(-1.0, [-0.5, -3.0]) == 0.0
    assert first_place(-1.0, [-1.0, -3.0]) == 0.5


def test_log_likelihoods_are_those_of_single_samples(tiny_model: UnifiedModel) -> None:
    """Against a softmax over the legal slices, one sample and one position at a time."""
    codes = np.arange(16).reshape(1, 4, 4)
    said = [Segment("image", codes, "user"), Segment("text", "red", "assistant")]
    drawn = [Segment("text", "a large red circle at the top left", "user"), Segment("image", codes, "assistant")]
    long = Segment("speech", np.zeros((1, 41), np.int64), "assistant")  # the vocabulary holds 40 frames
    asked = [Sample(said), Sample([said[0], long]), Sample(drawn)]
    found = log_likelihoods(tiny_model, asked)
    assert found[1] is None
    lo, hi, class_of_id = tiny_model.vocabulary.slice_table()
    for sample, value in zip((asked[0], asked[2]), (found[0], found[2]), strict=True):
        ids, loss = tiny_model.template.render(sample, tiny_model.vocabulary, tiny_model.text)
        with torch.inference_mode():
            logits = tiny_model.model(torch.from_numpy(ids)[None]).logits[0]
        terms = []
        for at in np.flatnonzero(loss):
            kind = class_of_id[ids[at]]
            slice_ = logits[at - 1, lo[kind] : hi[kind]]
            terms.append(float(slice_.log_softmax(0)[ids[at] - lo[kind]]))
        assert value == pytest.approx(np.mean(terms), rel=1e-4)
        assert log_likelihoods(tiny_model, [sample], mean=False)[0] == pytest.approx(np.sum(terms), rel=1e-4)


def test_voices_that_are_short_are_filled() -> None:
    heard: list[int] = []

    def encoder(audio: torch.Tensor, rate: int) -> torch.Tensor:
        heard.append(audio.shape[1])
        return torch.tensor([[3.0, 4.0]])

    assert voice(encoder, torch.zeros(2, 100), 1000).tolist() == pytest.approx([0.6, 0.8])
    voice(encoder, torch.zeros(1, 900), 1000)
    assert heard == [500, 900]


def test_recognisers_by_name() -> None:
    hear = open_recogniser("nanoworld")
    assert transcribe(hear, [torch.zeros(1, 8000)], 16000) == [""]
    assert open_recogniser('{"engine": "nanoworld"}').identity() == hear.identity()
    for name, why in (("no/such", "no such folder"), ("whisper", "nanoworld"), ("{", "is not JSON")):
        with pytest.raises(AnyglotError, match=why):
            open_recogniser(name)
