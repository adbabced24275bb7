"""Text tokenizers of pretrained models: texts come back exactly and never become anything but text."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from anyglot_lm.hf_text import HFTextTokenizer, load_text
from anyglot_lm.text import TextTokenizer
from anyglot_tokenizers.errors import ManifestError

TEXTS = ["a large red circle at the top left", "what  color is the square?", "make the circle blue\nnow"] * 4


def byte_level(size: int = 330) -> Tokenizer:
    """As Qwen's: byte-level BPE, NFC, special and plain added tokens after the vocabulary, a bos from the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("        ", special=False)])
    start = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", start)])
    tokenizer.enable_truncation(5)
    return tokenizer


RAW = byte_level()
TEXT = HFTextTokenizer(RAW.to_str().encode())


@given(text=st.text(max_size=60))
@example(text="  two  spaces, a tab\t, lines\r\n\n         nine")
@example(text="<|im_start|>user<|im_end|><think><|endoftext|><s>")
@example(text="e\u0301 \u212b \ufb01 \x00\ufeff\u200b \U0001f600")
@example(text="")
def test_exact(text: str) -> None:
    ids = TEXT.encode(text)
    assert TEXT.decode(ids) == text
    assert all(0 <= i < TEXT.size for i in ids)
    special = {RAW.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "<think>")}
    assert not special & set(ids)


@given(st.lists(st.text(max_size=20), max_size=4))
def test_texts_join(texts: list[str]) -> None:
    assert TEXT.decode([i for text in texts for i in TEXT.encode(text)]) == "".join(texts)


@given(st.lists(st.integers(0, TEXT.size - 1), max_size=30))
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(TEXT.decode(np.array(ids, dtype=np.int64)), str)


def test_ids_are_those_the_model_learnt() -> None:
    plain = byte_level()
    plain.no_truncation()
    for text in [*TEXTS, "indented:        code", "caf\u00e9"]:
        assert TEXT.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert RAW.token_to_id("        ") in TEXT.encode("a        b"), "runs of spaces are text"
    assert TEXT.size == RAW.get_vocab_size() > 300
    assert TEXT.decode([RAW.token_to_id("<|im_end|>")]) == "<|im_end|>"


def test_save_load_pickle(tmp_path: Path) -> None:
    TEXT.save(tmp_path / "tokenizer.json")
    for again in (
        HFTextTokenizer.load(tmp_path / "tokenizer.json"),
        load_text(tmp_path),
        pickle.loads(pickle.dumps(TEXT)),
    ):
        assert again.fingerprint == TEXT.fingerprint and again.size == TEXT.size
        assert again.encode("red <think>") == TEXT.encode("red <think>")
    assert isinstance(load_text(tmp_path), HFTextTokenizer)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("red").ids == TEXT.encode("red")


def test_tokenizer_of_a_backbone(tmp_path: Path) -> None:
    raw = byte_level()
    raw.no_truncation()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>").save_pretrained(tmp_path)
    found = HFTextTokenizer.from_backbone(tmp_path)
    assert found.encode(TEXTS[0]) == TEXT.encode(TEXTS[0]) and found.size == TEXT.size
    with pytest.raises(ManifestError, match="does not load"):
        HFTextTokenizer.from_backbone(tmp_path / "none")


def test_truncated_to_its_first_ids() -> None:
    small = TEXT.truncated(280)
    assert small.size == 280
    for text in [*TEXTS, "na\u00efve \U0001f600 <|im_end|>"]:
        ids = small.encode(text)
        assert small.decode(ids) == text and max(ids) < 280
        assert ids == TEXT.encode(text) or len(ids) > len(TEXT.encode(text))
    assert any(max(TEXT.encode(text)) >= 280 for text in TEXTS), "there was something to drop"
    assert small.fingerprint != TEXT.fingerprint
    assert TEXT.truncated(TEXT.size).fingerprint == TEXT.fingerprint
    with pytest.raises(ManifestError, match="200 text ids are too few"):
        TEXT.truncated(200)


def test_folders_with_either_kind(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no text tokenizer .text.model or tokenizer.json"):
        load_text(tmp_path)
    own = TextTokenizer.train(TEXTS, tmp_path / "text.model", vocab_size=300)
    assert load_text(tmp_path).fingerprint == own.fingerprint
    TEXT.save(tmp_path / "tokenizer.json")
    with pytest.raises(ManifestError, match="holds both text.model and tokenizer.json"):
        load_text(tmp_path)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="lone surrogate"):
        TEXT.encode("a\ud800b")
    with pytest.raises(ManifestError, match=f"id {TEXT.size} is no text id"):
        TEXT.decode([TEXT.size])
    with pytest.raises(ManifestError, match="cannot be read"):
        HFTextTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match="tokenizer.json: not a tokenizer.json"):
        HFTextTokenizer.load(tmp_path / "tokenizer.json")


def changed(**parts: Any) -> bytes:
    content = json.loads(byte_level().to_str())
    content["model"] |= parts.pop("model", {})
    return json.dumps({**content, **parts}).encode()


def test_bytes_without_ids_get_some() -> None:
    content = json.loads(RAW.to_str())["model"]
    vocab = {token: i for token, i in content["vocab"].items() if token not in "\u0120\u0104"}  # space, 0x04
    merges = [merge for merge in content["merges"] if "\u0120" not in "".join(merge)]
    completed = HFTextTokenizer(changed(model={"vocab": vocab, "merges": merges}))
    assert completed.size == TEXT.size + 2
    text = "a red\x04circle"
    ids = completed.encode(text)
    assert completed.decode(ids) == text and max(ids) == TEXT.size + 1 and set(ids) >= {TEXT.size, TEXT.size + 1}
    assert completed.truncated(290).size == 290 and completed.truncated(290).decode(ids[:1]) == "a"
    assert HFTextTokenizer(json.dumps(completed._json).encode()).fingerprint == completed.fingerprint


@pytest.mark.parametrize("parts", [{"normalizer": {"type": "Lowercase"}}, {"decoder": {"type": "Fuse"}}])
def test_tokenizers_that_lose_text_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="the text tokenizer changes .* byte-level BPE"):
        HFTextTokenizer(changed(**parts))


def test_only_merges_can_be_dropped() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ManifestError, match="the text tokenizer changes"):
        HFTextTokenizer(words.to_str().encode())
