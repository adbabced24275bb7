"""Text comes back exactly, whatever it is, and never as anything but text."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyglot_lm.text import TextTokenizer
from anyglot_tokenizers.errors import ManifestError

TEXTS = ["a large red circle at the top left", "what  color is the square?", "make the circle blue\nnow"] * 4
KINDS = ("unigram", "bpe")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TextTokenizer]:
    return {kind: TextTokenizer.train(TEXTS, vocab_size=300, model_type=kind) for kind in KINDS}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60))
@example(text="  two  spaces, a tab\t, lines\r\n\n ")
@example(text="<s></s><unk><pad><|user|><0x41><|endoftext|>")
@example(text="\u2581\u2581 a\u2581b \u2581")
@example(text="\x00\ufeff\u200b\u0301e\u0301 \U0001f600")
@example(text="")
def test_exact(tokenizers: dict[str, TextTokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.size and i != tokenizer.unknown_id for i in ids)


@given(st.lists(st.text(max_size=20), max_size=4))
def test_texts_join(tokenizers: dict[str, TextTokenizer], texts: list[str]) -> None:
    tokenizer = tokenizers["unigram"]
    assert tokenizer.decode([i for text in texts for i in tokenizer.encode(text)]) == "".join(texts)


@given(st.lists(st.integers(0, 257), max_size=30))
def test_any_ids_decode(tokenizers: dict[str, TextTokenizer], ids: list[int]) -> None:
    assert isinstance(tokenizers["unigram"].decode(np.array(ids, dtype=np.int64)), str)


def test_words_are_pieces(tokenizers: dict[str, TextTokenizer]) -> None:
    ids = tokenizers["unigram"].encode("the circle")
    assert len(ids) < len("the circle")


def test_save_load_pickle(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["unigram"]
    tokenizer.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert loaded.fingerprint == tokenizer.fingerprint == again.fingerprint
    assert loaded.encode("red <s>") == tokenizer.encode("red <s>") == again.encode("red <s>")


def test_training_is_repeatable(tokenizers: dict[str, TextTokenizer]) -> None:
    assert TextTokenizer.train(TEXTS, vocab_size=300).fingerprint == tokenizers["unigram"].fingerprint


def test_errors(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["unigram"]
    with pytest.raises(ManifestError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(ManifestError, match=f"id {tokenizer.size} is no text id"):
        tokenizer.decode([tokenizer.size])
    with pytest.raises(ManifestError, match="use at least 258"):
        TextTokenizer.train(TEXTS, vocab_size=100)
    with pytest.raises(ManifestError, match="no text"):
        TextTokenizer.train(["", " \n"])
    with pytest.raises(ManifestError, match="cannot be read"):
        TextTokenizer.load(tmp_path / "text.model")
    (tmp_path / "text.model").write_bytes(b"no model")
    with pytest.raises(ManifestError, match="text.model: not a sentencepiece model"):
        TextTokenizer.load(tmp_path / "text.model")
