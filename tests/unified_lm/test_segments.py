"""Templates: layout, labels from segments, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.grammar import Request, SpanGrammar
from anyglot_lm.segments import CHAT, Sample, Segment, Template, with_examples
from anyglot_lm.text import TextTokenizer
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import CodesError, ManifestError

TEXT = TextTokenizer.train(["a red circle", "a blue square at the top"], vocab_size=290)
VOCABULARY = Vocabulary.build(
    TEXT.size,
    BlockSpec("image", "i", 16, pattern="raster", grid=(2, 2)),
    BlockSpec("speech", "s", 8, 2, input_pattern="first"),
    text_fingerprint=TEXT.fingerprint,
)
APART = Template(version=2)
IMAGE = np.array([[[0, 1], [2, 3]]])
SPEECH = np.array([[1, 2, 3], [4, 5, 6]])


def test_layout_and_labels() -> None:
    v = VOCABULARY
    ids, loss = CHAT.render(Sample([Segment("speech", SPEECH, "user"), Segment("image", IMAGE, "assistant")]), v, TEXT)
    speech, image, c = v.block("speech"), v.block("image"), v.controls
    expected = [c["bos"], c["user"]]
    expected += [speech.start_id, *(speech.first_id + SPEECH[0]), speech.end_id]  # input: first codebook only
    expected += [c["assistant"], image.start_id, *(image.first_id + IMAGE.ravel()), image.end_id, c["eos"]]
    assert ids.tolist() == expected and ids.dtype == np.int64
    targets = expected[8:]  # start, codes, end, eos
    assert ids[loss].tolist() == targets


def test_speech_out_has_all_codebooks() -> None:
    ids, _ = CHAT.render(Sample([Segment("speech", SPEECH, "assistant")]), VOCABULARY, None)
    block = VOCABULARY.block("speech")
    assert (ids[3:9] - block.first_id).tolist() == [1, 8 + 4, 2, 8 + 5, 3, 8 + 6]
    assert ids[-2:].tolist() == [block.end_id, VOCABULARY.controls["eos"]]


@pytest.mark.parametrize("fixed", [False, True])
def test_filler_that_the_grammar_forces_is_no_target(fixed: bool) -> None:
    """All other ids of the answer are, and no id with a choice is left out."""
    v = Vocabulary.build(20, BlockSpec("speech", "s", 8, 3, "delay", "first", grid=(4,) if fixed else None))
    codes = np.arange(12).reshape(3, 4) % 8
    ids, loss = CHAT.render(Sample([Segment("speech", codes, "assistant")]), v, None)
    grammar, forced = SpanGrammar(v), []
    state = grammar.start(Request(max_ids=60, order=("speech",)))
    for token in ids[2:-1].tolist():  # start, codes, end
        ((low, high),) = grammar.allowed(state)
        forced.append(v.block("speech").first_id <= token and high - low == 1)
        state = grammar.advance(state, token)
    assert (~loss[2:-1]).tolist() == forced and sum(forced) == (6 if fixed else 3)
    assert loss[-1] and not loss[:2].any()
    assert CHAT.parse(ids, v, None, loss) == Sample([Segment("speech", codes, "assistant")])


def test_turns_and_flags() -> None:
    c = VOCABULARY.controls
    sample = Sample(
        [
            Segment("text", "a", "user"),
            Segment("text", "b", "assistant"),
            Segment("text", "c", "user", loss=True),
            Segment("text", "d", "assistant", loss=False),
        ]
    )
    ids, loss = CHAT.render(sample, VOCABULARY, TEXT)
    a, b, cc, d = (TEXT.encode(x)[0] for x in "abcd")
    assert ids.tolist() == [
        c["bos"], c["user"], a, c["assistant"], b, c["user"], cc, c["assistant"], d, c["eos"]
    ]  # fmt: skip
    # After "b" the assistant has to stop, after "c" (a target) the user has: both markers are targets.
    assert loss.tolist() == [False] * 4 + [True] * 4 + [False, False]


def test_prompt_is_the_part_before_the_answer() -> None:
    sample = Sample([Segment("text", "red", "user"), Segment("image", IMAGE, "assistant")])
    ids, loss = CHAT.render(sample, VOCABULARY, TEXT)
    prompt = CHAT.prompt(sample, VOCABULARY, TEXT)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert loss.argmax() == len(prompt)
    assert CHAT.prompt(Sample([sample.segments[0]]), VOCABULARY, TEXT).tolist() == prompt.tolist()
    c = VOCABULARY.controls
    nothing = CHAT.prompt(Sample([]), VOCABULARY, TEXT)
    assert nothing.tolist() == [c["bos"], c["user"], c["assistant"]]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    segments = []
    for _ in range(draw(st.integers(1, 6))):
        role = draw(st.sampled_from(["user", "assistant"]))
        kind = draw(st.sampled_from(["text", "image", "speech"]))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        if kind == "text":
            segments.append(Segment("text", draw(st.text(max_size=12)), role))
        elif kind == "image":
            segments.append(Segment("image", rng.integers(0, 16, (1, 2, 2)), role))
        else:
            shape = (2 if role == "assistant" else 1, int(rng.integers(1, 6)))
            segments.append(Segment("speech", rng.integers(0, 8, shape), role))
    return Sample(segments)


def _joined(sample: Sample) -> list[Segment]:
    out: list[Segment] = []
    for segment in sample.segments:
        if segment.content == "" if isinstance(segment.content, str) else False:
            continue
        if out and segment.modality == out[-1].modality == "text" and segment.role == out[-1].role:
            out[-1] = Segment("text", f"{out[-1].content}{segment.content}", segment.role)
        else:
            out.append(segment)
    return out


@given(samples())
def test_parse_inverts_render(sample: Sample) -> None:
    ids, loss = CHAT.render(sample, VOCABULARY, TEXT)
    assert ids.shape == loss.shape and ids.max() < VOCABULARY.size
    parsed = CHAT.parse(ids, VOCABULARY, TEXT, loss)
    assert list(parsed.segments) == _joined(sample)
    ids, loss = APART.render(sample, VOCABULARY, TEXT)
    said = [segment for segment in sample.segments if not isinstance(segment.content, str) or segment.content]
    assert list(APART.parse(ids, VOCABULARY, TEXT, loss).segments) == said


def test_a_chain_is_transcript_answer_and_speech_all_of_it_learnt() -> None:
    c, speech = VOCABULARY.controls, VOCABULARY.block("speech")
    asked = [Segment("image", IMAGE, "user"), Segment("speech", SPEECH, "user")]
    answer = [
        Segment("text", "a", "assistant"),
        Segment("text", "b", "assistant"),
        Segment("speech", SPEECH, "assistant"),
    ]
    ids, loss = APART.render(Sample([*asked, *answer]), VOCABULARY, TEXT)
    a, b = (TEXT.encode(x) for x in "ab")
    spoken = VOCABULARY.span("speech", SPEECH).tolist()
    assert ids[loss].tolist() == [*a, c["assistant"], *b, *spoken, c["eos"]]
    prompt = APART.prompt(Sample(asked), VOCABULARY, TEXT).tolist()
    assert ids[~loss].tolist() == prompt and ids[: len(prompt)].tolist() == prompt
    assert speech.start_id in prompt, "the question"
    direct, direct_loss = APART.render(Sample([*asked, answer[-1]]), VOCABULARY, TEXT)
    assert direct.tolist() == [*prompt, *spoken, c["eos"]] and direct_loss.sum() == len(spoken) + 1
    assert CHAT.render(Sample([*asked, answer[-1]]), VOCABULARY, TEXT)[0].tolist() == direct.tolist()
    with pytest.raises(CodesError, match="'assistant' at position"):
        CHAT.parse(ids, VOCABULARY, TEXT)


def test_examples_are_turns_of_a_conversation() -> None:
    c = VOCABULARY.controls
    shown = [Sample([Segment("image", IMAGE, "user"), Segment("text", text, "assistant")]) for text in "ab"]
    query = Sample([Segment("image", IMAGE, "user")])
    sample = with_examples(shown, query)
    a, b = (TEXT.encode(x) for x in "ab")
    picture = [c["user"], *VOCABULARY.span("image", IMAGE).tolist(), c["assistant"]]
    prompt = APART.prompt(sample, VOCABULARY, TEXT).tolist()
    assert prompt == [c["bos"], *picture, *a, *picture, *b, *picture]
    assert CHAT.prompt(sample, VOCABULARY, TEXT).tolist() == prompt
    ids, loss = CHAT.render(with_examples(shown[:1], shown[1]), VOCABULARY, TEXT)
    assert ids[loss].tolist() == [*a, c["user"], *b, c["eos"]]
    with pytest.raises(ManifestError, match="example 2 must begin with what the user gives"):
        with_examples([shown[0], query], query)


@given(st.text(max_size=40))
def test_user_text_makes_text_ids_only(text: str) -> None:
    ids = CHAT.segment_ids(Segment("text", text, "user"), VOCABULARY, TEXT)
    assert (ids < VOCABULARY.text_size).all()


def test_errors() -> None:
    c = VOCABULARY.controls
    with pytest.raises(ManifestError, match="role 'system'"):
        Segment("text", "x", "system")  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="holds a str"):
        Segment("image", "x", "user")
    with pytest.raises(ManifestError, match="without segments"):
        CHAT.render(Sample([]), VOCABULARY, TEXT)
    with pytest.raises(ManifestError, match="no modality 'music'"):
        CHAT.render(Sample([Segment("music", SPEECH, "user")]), VOCABULARY, TEXT)
    with pytest.raises(ManifestError, match="needs the text tokenizer"):
        CHAT.render(Sample([Segment("text", "x", "user")]), VOCABULARY, None)
    with pytest.raises(ManifestError, match="text id"):
        small = Vocabulary.build(10)
        CHAT.render(Sample([Segment("text", "x", "user")]), small, TEXT)
    for ids in ([], [c["bos"]], [c["user"], c["eos"]], [c["bos"], 5, c["eos"]]):
        with pytest.raises(CodesError):
            CHAT.parse(ids, VOCABULARY, TEXT)
    with pytest.raises(CodesError, match="'user' at position 2 is not allowed"):
        CHAT.parse([c["bos"], c["user"], c["user"], c["eos"]], VOCABULARY, TEXT)


def test_template_file(tmp_path: Path) -> None:
    CHAT.save(tmp_path / "template.json")
    assert Template.load(tmp_path / "template.json") == CHAT
    APART.save(tmp_path / "template.json")
    assert Template.load(tmp_path / "template.json") == APART != CHAT
    with pytest.raises(ManifestError, match="unknown template 'anyglot-chat' version 3"):
        Template("anyglot-chat", 3)
