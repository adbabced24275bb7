"""Streams of events and conversations, with a whole small model: what comes piece by piece is what comes at once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.chat import Chat
from anyglot_lm.decoder import PlainDecoder
from anyglot_lm.engine import Engine, GenerationError, Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.model import new_llama
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.stream import AnswerReader, Event
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

ASKED = Sample([Segment("text", "a red circle", "user")])
ORDER = Request(
    order=("text", "speech", "image", "music"), max_ids=200, max_length={"text": 20}, min_frames={"speech": 30}
)


def test_events_add_up_to_the_answer(tiny_model: UnifiedModel) -> None:
    whole = tiny_model.respond([ASKED], ORDER, seed=3)[0]
    events = list(tiny_model.stream(ASKED, ORDER, seed=3, chunk_seconds=0.4, previews=True))
    assert [e.modality for e in events if e.kind == "start"] == ["text", "speech", "image", "music"]
    assert events[-1].kind == "done"
    ends = {e.modality: e.output for e in events if e.kind == "end"}
    assert "".join(e.text for e in events if e.kind == "text") == whole[0].text
    for output in whole:
        found = ends[output.modality]
        assert found is not None and found.text == output.text
        if output.codes is not None:
            assert found.codes is not None and torch.equal(found.codes, output.codes)
            torch.testing.assert_close(found.media, output.media, rtol=0, atol=1e-5)
    for modality in ("speech", "music"):
        pieces = [e.media for e in events if e.kind == "audio" and e.modality == modality]
        output = ends[modality]
        assert output is not None and torch.equal(torch.cat(pieces, 1), output.media)  # type: ignore[arg-type]
    rate = tiny_model.tokenizers["speech"].spec.sample_rate
    spoken = [e.media.shape[1] / rate for e in events if e.kind == "audio" and e.modality == "speech"]  # type: ignore[union-attr, operator]
    assert len(spoken) >= 3 and min(spoken[:-1]) >= 0.39
    previews = [e.media for e in events if e.kind == "preview"]
    assert [p.shape for p in previews] == [(3, 16 * n, 64) for n in (1, 2, 3)]  # type: ignore[union-attr]


def test_sound_comes_before_half_of_a_long_answer(tiny_model: UnifiedModel) -> None:
    request = Request(order=("speech",), max_ids=60, min_frames={"speech": 40})
    reader, engine = AnswerReader(tiny_model), Engine(tiny_model.model, tiny_model.vocabulary, streams=1)
    row = engine.submit(tiny_model.prompt(ASKED), request)
    first = None
    read = 0
    while engine.busy:
        engine.step(most=4)
        events = reader.read(row.ids[read:])
        read = len(row.ids)
        if first is None and any(e.kind == "audio" for e in events):
            first = read
    assert first is not None and first <= len(row.ids) / 2


@pytest.mark.parametrize("pattern", ["frame_major", "delay", "first"])
def test_every_pattern_streams(tiny_model: UnifiedModel, pattern: str) -> None:
    speech = tiny_model.tokenizers["speech"]
    count = 1 if pattern == "first" else 2
    block = BlockSpec.from_code_spec(speech.spec, num_quantizers=count, pattern=pattern, max_frames=40)
    vocabulary = Vocabulary.build(tiny_model.text.size, block, text_fingerprint=tiny_model.text.fingerprint)
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2)
    model = UnifiedModel(llama, vocabulary, Template(), tiny_model.text, {"speech": speech})
    request = Request(order=("speech",), max_ids=100, min_frames={"speech": 33})
    whole = model.respond([ASKED], request, seed=1)[0][0]
    events = list(model.stream(ASKED, request, seed=1, chunk_seconds=0.3))
    sound = torch.cat([e.media for e in events if e.kind == "audio"], 1)  # type: ignore[misc]
    assert len([e for e in events if e.kind == "audio"]) > 2
    torch.testing.assert_close(sound, whole.media, rtol=0, atol=1e-5)


def test_characters_of_several_ids_come_whole(tiny_model: UnifiedModel) -> None:
    reader = AnswerReader(tiny_model)
    ids = tiny_model.text.encode("naïve 漢字 🙂")
    events = [event for token in ids for event in reader.read([token])]
    events += reader.read([tiny_model.vocabulary.controls["eos"]])
    texts = [e.text for e in events if e.kind == "text"]
    assert "".join(texts) == tiny_model.text.decode(ids) and not any("\ufffd" in text for text in texts)


def counting(model: UnifiedModel) -> tuple[Engine, list[int]]:
    """An engine, and how many ids each prefill ran."""
    engine, counts = Engine(model.model, model.vocabulary, streams=2), []
    decoder: Any = engine.decoder
    assert isinstance(decoder, PlainDecoder)
    real = decoder.prefill

    def prefill(cache: Any, first: int, rows: list[list[int]]) -> torch.Tensor:
        counts.extend(map(len, rows))
        return real(cache, first, rows)

    decoder.prefill = prefill
    return engine, counts


def say(chat: Chat, text: str, **options: Any) -> list[Event]:
    request = Request(order=("text", "speech"), max_ids=40, max_length={"text": 8})
    return list(chat.say([Segment("text", text, "user")], request, **options))


def test_a_conversation_computes_only_what_is_new(tiny_model: UnifiedModel) -> None:
    engine, counts = counting(tiny_model)
    chat = Chat(tiny_model, engine)
    greedy = dict.fromkeys(("text", "speech"), Sampling(0.0))
    say(chat, "a red circle", sampling=greedy)
    first = counts.pop()
    say(chat, "make the square blue", sampling=greedy)
    assert [s.modality for s in chat.segments] == ["text", "text", "speech"] * 2
    prompt = len(tiny_model.prompt(Sample(chat.segments[:4])))
    assert counts == [counts[0]] and 0 < counts[0] < prompt - first
    # the same turns without any memory
    plain = Chat(tiny_model, segments=chat.segments[:3])
    say(plain, "make the square blue", sampling=greedy)
    assert plain.segments == chat.segments


def test_a_long_conversation_forgets_its_oldest_turns(tiny_model: UnifiedModel) -> None:
    engine = Engine(tiny_model.model, tiny_model.vocabulary, streams=1, capacity=150)
    chat = Chat(tiny_model, engine)
    for _ in range(5):
        say(chat, "a large red circle at the top left")
    assert len(chat.segments) == 15 and chat.left_out > 0 and chat.left_out % 3 == 0
    with pytest.raises(GenerationError, match="this turn has .* ids .* say less"):
        say(chat, "a large red circle at the top left" * 20)
    assert len(chat.segments) == 15, "a turn that failed was not said"
    say(chat, "two")


def test_a_listener_may_leave(tiny_model: UnifiedModel) -> None:
    chat = Chat(tiny_model)
    events = chat.say(
        [Segment("text", "two", "user")], Request(order=("speech",), max_ids=40, min_frames={"speech": 30})
    )
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert not chat.engine.busy and chat.segments == [] and not chat.engine.cache.lengths
    say(chat, "two")


def test_an_end_that_was_seen_is_the_end(tiny_model: UnifiedModel) -> None:
    chat = Chat(tiny_model)
    request = Request(order=("text", "speech"), max_ids=40, max_length={"text": 8})
    for event in chat.say([Segment("text", "two", "user")], request):
        if event.kind == "done":
            break
    assert [s.modality for s in chat.segments] == ["text", "text", "speech"]


def test_two_conversations_share_an_engine(tiny_model: UnifiedModel) -> None:
    engine = Engine(tiny_model.model, tiny_model.vocabulary, streams=2)
    asked = ("a red circle", "make the square blue")
    request = Request(order=("text", "speech"), max_ids=60, max_length={"text": 8}, min_frames={"speech": 10})
    alone = [tiny_model.respond([Sample([Segment("text", text, "user")])], request, seed=3)[0] for text in asked]
    chats = [Chat(tiny_model, engine) for _ in asked]
    said = [[Segment("text", text, "user")] for text in asked]
    turns = [chat.say(segments, request, seed=3) for chat, segments in zip(chats, said, strict=True)]
    for _ in itertools.zip_longest(*turns):
        pass
    for chat, whole in zip(chats, alone, strict=True):
        assert chat.segments[1].content == whole[0].text
        assert whole[1].codes is not None and np.array_equal(chat.segments[2].content, whole[1].codes.numpy())


def test_an_answer_that_an_error_ended_is_none(tiny_model: UnifiedModel) -> None:
    engine = Engine(tiny_model.model, tiny_model.vocabulary, streams=2)
    chat = Chat(tiny_model, engine)
    turn = chat.say([Segment("text", "two", "user")], Request(order=("speech",), max_ids=60, min_frames={"speech": 30}))
    next(turn)
    for row in list(engine.rows):  # as after an error of the engine, which another conversation met
        engine.cancel(row)
    with pytest.raises(GenerationError, match="before it was whole"):
        list(turn)
    assert chat.segments == []
