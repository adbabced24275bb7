from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyglot_lm.grammar import KNOWN_REQUESTS, GrammarError, Request, RequestError, SpanGrammar, State
from anyglot_lm.patterns import CodesError, pattern
from anyglot_lm.vocabulary import BlockSpec, Vocabulary


def small_vocabulary() -> Vocabulary:
    return Vocabulary.build(
        20,
        BlockSpec("image", "i", 8, 2, "raster", grid=(2, 2)),
        BlockSpec("speech", "s", 8, 3, "delay", "first", max_frames=5),
        BlockSpec("music", "m", 8, 2, "frame_major"),
    )


def walk(
    grammar: SpanGrammar, state: State, rng: np.random.Generator, end_bias: float = 0.0, sharp: float = 1.0
) -> list[int]:
    """A random walk along allowed ids.

    `end_bias` is the chance to take the last range: starts, eos; above 1, `sharp` prefers the first ids of a range.
    """
    ids: list[int] = []
    while not grammar.finished(state):
        ranges = grammar.allowed(state)
        assert ranges, "no legal id, but not finished"
        assert all(low < high for low, high in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "ranges touch or are not sorted"
        low, high = ranges[-1] if rng.random() < end_bias else ranges[rng.integers(len(ranges))]
        ids.append(low + int(rng.random() ** sharp * (high - low)))
        state = grammar.advance(state, ids[-1])
    assert grammar.allowed(state) == ()
    return ids


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    specs = []
    for name in draw(st.permutations(["image", "speech", "music"]))[: draw(st.integers(1, 3))]:
        size = draw(st.integers(1, 9))
        order = draw(st.sampled_from(["first", "frame_major", "layer_major", "delay", "raster"]))
        quantizers = 1 if order == "first" else draw(st.integers(1, 4))
        grid: tuple[int, ...] | None = None
        if order == "raster":
            grid = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        elif order == "layer_major" or draw(st.booleans()):
            grid = (draw(st.integers(1, 4)),)
        frames = draw(st.none() | st.integers(1, 6)) if grid is None else None
        specs.append(BlockSpec(name, name, size, quantizers, order, None, grid, frames))
    return Vocabulary.build(draw(st.integers(1, 12)), *specs)


@st.composite
def requests(draw: st.DrawFn, vocabulary: Vocabulary) -> Request:
    names = ["text", *vocabulary.modalities]
    limits = {}
    frames = {}
    most = {}
    for block in vocabulary.blocks:
        if block.length is None and draw(st.booleans()):
            order = pattern(block.pattern)
            known = order.num_frames(block.max_length, block.num_quantizers) if block.max_length else 6
            frames[block.modality] = draw(st.integers(1, known))
            most[block.modality] = draw(st.integers(frames[block.modality], known + 2))
            if draw(st.booleans()):
                shortest = order.num_flat(frames[block.modality], block.num_quantizers)
                limits[block.modality] = shortest + draw(st.integers(0, 7))
    common = {
        "max_length": limits | ({"text": draw(st.integers(3, 6))} if draw(st.booleans()) else {}),
        "min_text": draw(st.integers(1, 3)),
        "min_frames": frames,
        "max_frames": most,
        "max_ids": 10**6,
    }
    if draw(st.booleans()):
        order = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
        request = Request(order=tuple(order), **common)
    else:
        allowed = draw(st.none() | st.sets(st.sampled_from(names), min_size=1))
        forbidden = draw(st.sets(st.sampled_from(names), max_size=1))
        usable = (set(names) if allowed is None else allowed) - forbidden
        if not usable:
            usable, forbidden = set(allowed or names), set()
        required = draw(st.sets(st.sampled_from(sorted(usable))))
        request = Request(required=required, allowed=allowed, forbidden=forbidden, **common)
    grammar = SpanGrammar(vocabulary)
    budget = grammar.shortest(request) + draw(st.integers(0, 60))
    return Request(**{**request.__dict__, "max_ids": budget})


@settings(max_examples=300)
@given(st.data())
def test_random_walk_ends_in_budget_and_parses_back(data: st.DataObject) -> None:
    vocabulary = data.draw(vocabularies())
    request = data.draw(requests(vocabulary))
    grammar = SpanGrammar(vocabulary)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for end_bias, sharp in ((0.0, 1.0), (0.9, 1.0), (0.3, 8.0)):
        ids = walk(grammar, grammar.start(request), rng, end_bias, sharp)
        assert grammar.shortest(request) <= len(ids) <= grammar.longest(request) <= request.max_ids or not request.order
        assert len(ids) <= request.max_ids
        assert ids[-1] == vocabulary.controls["eos"]
        spans = grammar.parse(ids)
        names = [span.modality for span in spans]
        between = sum(pair == ("text", "text") for pair in itertools.pairwise(names))
        assert [i for i in ids[:-1] if i in vocabulary.controls.values()] == [
            vocabulary.controls["assistant"]
        ] * between
        if request.order is not None:
            assert tuple(names) == request.order
        else:
            assert set(request.required) <= set(names)
            assert not set(names) & set(request.forbidden)
            assert request.allowed is None or set(names) <= set(request.allowed)
        again: list[int] = []
        for span in spans:
            if span.modality == "text":
                assert request.min_text <= len(span.content) <= request.max_length.get("text", 10**6)
                again += span.content.tolist()
                continue
            block = vocabulary.block(span.modality)
            assert span.content.shape[0] == block.num_quantizers
            assert span.content.min() >= 0 and span.content.max() < block.codebook_size
            if block.grid is not None:
                assert span.content.shape[1:] == block.grid
            else:
                least, most = (
                    request.min_frames.get(span.modality, 1),
                    request.max_frames.get(span.modality, 10**6),
                )
                assert least <= span.content.shape[1] <= most
            again += vocabulary.span(span.modality, span.content).tolist()
        # The delay pattern's trailing filler is free where the length was open, all else comes back id by id.
        assert len(again) == len(ids) - 1 - between
        if not any(block.pattern == "delay" for block in vocabulary.blocks):
            assert again == [i for i in ids[:-1] if i != vocabulary.controls["assistant"]]


def test_what_a_template_writes_is_a_legal_answer() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    rng = np.random.default_rng(0)
    for frames in range(1, 6):
        speech = vocabulary.span("speech", rng.integers(0, 8, (3, frames)))
        image = vocabulary.span("image", rng.integers(0, 8, (2, 2, 2)))
        ids = [3, 4, *speech, 5, *image, *image, vocabulary.controls["eos"]]
        state = grammar.start(Request(max_ids=len(ids)))
        for token in ids:
            state = grammar.advance(state, int(token))
        assert grammar.finished(state)
        assert [s.modality for s in grammar.parse(ids)] == ["text", "speech", "text", "image", "image"]


def test_image_is_exactly_its_ids() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    block = vocabulary.block("image")
    state = grammar.start(Request(order=("image",), max_ids=11))
    seen = []
    while not grammar.finished(state):
        seen.append(grammar.allowed(state))
        state = grammar.advance(state, seen[-1][0][0])
    codes = [(block.codebook_slice(position % 2),) for position in range(8)]
    eos = vocabulary.controls["eos"]
    start, end = block.start_id, block.end_id
    assert seen == [((start, start + 1),), *codes, ((end, end + 1),), ((eos, eos + 1),)]


def test_legal_ids_lie_in_the_slice_of_the_loss() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    low, high, class_of = vocabulary.slice_table()
    rng = np.random.default_rng(1)
    for _ in range(100):
        state = grammar.start(Request(max_ids=80))
        while not grammar.finished(state):
            ranges = grammar.allowed(state)
            kind = class_of[ranges[0][0]]
            assert low[kind] <= ranges[0][0] and ranges[-1][1] <= high[kind]
            a, b = ranges[rng.integers(len(ranges))]
            state = grammar.advance(state, int(rng.integers(a, b)))


def test_delay_filler_is_forced() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    block = vocabulary.block("speech")
    state = grammar.start(Request(order=("speech",), max_ids=50, min_frames={"speech": 5}))
    legal = []
    while not grammar.finished(state):
        ranges = grammar.allowed(state)
        legal.append(ranges)
        state = grammar.advance(state, ranges[-1][1] - 1)
    width = np.array([ranges[-1][1] - ranges[0][0] for ranges in legal[1:22]]).reshape(7, 3)
    filler = pattern("delay").is_filler(21, 3).reshape(7, 3)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(width == 1, filler)
    assert legal[22] == ((block.end_id, block.end_id + 1),)


def test_a_marker_stands_between_two_texts_and_nowhere_else() -> None:
    vocabulary = small_vocabulary()
    grammar, marker = SpanGrammar(vocabulary), vocabulary.controls["assistant"]
    text, eos = (0, vocabulary.text_size), vocabulary.controls["eos"]
    state = grammar.start(Request(order=("text", "text"), max_ids=5, max_length={"text": 2}))
    legal = []
    for token in (3, marker, 4, 5, eos):
        legal.append(grammar.allowed(state))
        state = grammar.advance(state, token)
    assert legal == [(text,), (text, (marker, marker + 1)), (text,), (text, (eos, eos + 1)), ((eos, eos + 1),)]
    assert [span.content.tolist() for span in grammar.parse([3, marker, 4, 5, eos])] == [[3], [4, 5]]
    for bad in ([marker, 4], [3, marker], [3, marker, marker, 4]):
        with pytest.raises(GrammarError, match="assistant"):
            grammar.parse(bad)


def test_states_are_values() -> None:
    grammar = SpanGrammar(small_vocabulary())
    state = grammar.start(Request(max_ids=30))
    assert grammar.advance(state, 1) == grammar.advance(state, 2)
    assert grammar.advance(state, 1) != state


def test_an_answer_is_not_empty_unless_nothing_fits() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    eos = vocabulary.controls["eos"]
    assert all(not low <= eos < high for low, high in grammar.allowed(grammar.start(Request(max_ids=30))))
    assert grammar.allowed(grammar.start(Request(max_ids=1))) == ((eos, eos + 1),)


@pytest.mark.parametrize("name", ["pad", "bos", "user", "assistant"])
def test_controls_are_never_legal(name: str) -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    state = grammar.advance(grammar.start(Request(max_ids=30)), 3)
    with pytest.raises(GrammarError, match="not legal at position 1 of a text span; legal ids: 0..19"):
        grammar.advance(state, vocabulary.controls[name])
    with pytest.raises(GrammarError, match=name):
        grammar.parse([3, *vocabulary.span("image", np.zeros((2, 2, 2), dtype=np.int64)), vocabulary.controls[name], 4])


def test_after_eos_nothing_is_legal() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    state = grammar.advance(grammar.advance(grammar.start(Request(max_ids=30)), 3), vocabulary.controls["eos"])
    assert grammar.finished(state)
    with pytest.raises(GrammarError, match="finished"):
        grammar.advance(state, 3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(order=("video",)), "order names 'video'; this vocabulary has image, music, speech, text"),
        (Request(min_frames={"video": 2}), "min_frames names 'video'"),
        (Request(order=()), "order is empty"),
        (Request(order=("text", "text", "image"), max_ids=13), "text \\+ text \\+ image \\+ eos needs 14 ids"),
        (Request(order=("image",), required={"image"}), "either order"),
        (Request(required={"image"}, forbidden={"image"}), "image is required, but"),
        (Request(allowed={"image"}, forbidden={"image"}), "every modality is forbidden"),
        (Request(order=("image",), max_ids=10), "max_ids is 10, but image \\+ eos needs 11 ids"),
        (Request(order=("speech",), min_frames={"speech": 6}), "at most 21 flat codes, and 6 frames need 24"),
        (Request(order=("music",), min_frames={"music": 3}, max_frames={"music": 2}), "3 to 2 frames"),
        (Request(order=("text",), min_text=0), "min_text is 0"),
        (Request(order=("text",), min_text=5, max_length={"text": 4}), "max_length of text is 4"),
    ],
)
def test_impossible_requests(request_: Request, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SpanGrammar(small_vocabulary()).start(request_)


def test_cut_answers_do_not_parse() -> None:
    vocabulary = small_vocabulary()
    grammar = SpanGrammar(vocabulary)
    ids = vocabulary.span("image", np.zeros((2, 2, 2), dtype=np.int64)).tolist()
    assert len(grammar.parse(ids)) == 1
    for bad in (ids[:-1], ids[:4] + ids[5:], ids[1:]):
        with pytest.raises(CodesError):
            grammar.parse(bad)


def test_a_grammar_does_not_keep_every_request_it_met() -> None:
    grammar = SpanGrammar(small_vocabulary())
    kept = [Request(order=("image",), max_ids=20 + i) for i in range(2 * KNOWN_REQUESTS)]
    assert [grammar.start(request).left for request in kept] == [request.max_ids for request in kept]
    assert len(grammar._plans) <= KNOWN_REQUESTS


@given(
    st.builds(
        Request,
        order=st.none() | st.lists(st.sampled_from(["text", "image"]), max_size=3).map(tuple),
        required=st.sets(st.sampled_from(["text", "image"])),
        allowed=st.none() | st.frozensets(st.sampled_from(["text", "image"])),
        forbidden=st.sets(st.sampled_from(["text", "image"])),
        max_ids=st.integers(-1, 10**6),
        max_length=st.dictionaries(st.sampled_from(["text", "image"]), st.integers(0, 9)),
        min_text=st.integers(0, 3),
        min_frames=st.dictionaries(st.sampled_from(["image"]), st.integers(0, 9)),
    )
)
def test_requests_travel_as_json(request_: Request) -> None:
    assert Request.from_dict(json.loads(json.dumps(request_.to_dict()))) == request_
    assert Request().to_dict() == {} and Request.from_dict({}) == Request()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"orders": ["image"]}, "a request has no entry 'orders'; it has order, required"),
        ({"order": "image"}, "order of a request is 'image'; give a list of modalities"),
        ({"required": [1]}, "required of a request is"),
        ({"max_ids": True}, "max_ids of a request is True; give a whole number"),
        ({"max_ids": "5"}, "give a whole number"),
        ({"max_length": {"text": 1.5}}, "give an object of whole numbers by modality"),
        ({"max_length": [3]}, "give an object of whole numbers by modality"),
        (["image"], "a request is a JSON object"),
    ],
)
def test_broken_requests_are_refused(content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_dict(content)
