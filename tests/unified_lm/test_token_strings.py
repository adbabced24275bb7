"""Token strings of other projects: exact both ways, strict about what is broken, and laid out as our ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.token_strings import ANYGPT, EMU3, SEED, TOKEN_STRINGS, checkpoint_ids, vocabulary_of
from anyglot_tokenizers.errors import CodesError, ManifestError

SPEECH = "<\U0001f5e3\ufe0f"
MUSIC = "<\U0001f3b6"
IMAGE = "<\U0001f440"


def draw_codes(form, data):
    grid = form.grid or ((data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)))[: 2 if form.row_end else 1])
    seed = data.draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, form.codebook_size, (form.num_quantizers, *grid))


@given(st.data())
def test_what_is_written_is_read(data):
    strings = data.draw(st.sampled_from(sorted(TOKEN_STRINGS)).map(TOKEN_STRINGS.get))
    expected = []
    for _ in range(data.draw(st.integers(0, 4))):
        if data.draw(st.booleans()):
            text = data.draw(st.text(min_size=1, max_size=10))
            if expected and isinstance(expected[-1], str):
                expected[-1] += text
            else:
                expected.append(text)
        else:
            form = data.draw(st.sampled_from(strings.forms))
            expected.append((form.modality, draw_codes(form, data)))
    text = "".join(p if isinstance(p, str) else strings.write(*p) for p in expected)
    found = list(strings.read(text))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            assert a[0] == b[0] and a[1].dtype == np.int64 and np.array_equal(a[1], b[1])


def test_the_strings_of_the_projects():
    assert ANYGPT.write("speech", np.array([[1, 1023]])) == f"<sosp>{SPEECH}1>{SPEECH}1023><eosp>"
    music = np.array([[166, 1], [1931, 2], [2019, 3], [1770, 4]])
    numbers = [166, 3979, 6115, 7914, 1, 2050, 4099, 6148]
    assert ANYGPT.write("music", music) == "<somu>" + "".join(f"{MUSIC}{n}>" for n in numbers) + "<eomu>"
    seed = SEED.write("image", np.arange(32)[None])
    assert seed.startswith("<img><img_00000><img_00001>") and seed.endswith("<img_00031></img>")
    code = "<|visual token 00000{}|>".format
    emu = EMU3.write("image", np.array([[[1, 2, 3], [4, 5, 6]]]))
    rows = [code(1) + code(2) + code(3), code(4) + code(5) + code(6)]
    assert emu == (
        f"<|image start|>2*3<|image token|>{rows[0]}<|extra_200|>{rows[1]}<|extra_200|><|extra_201|><|image end|>"
    )
    short = f"<|image start|>2*3<|image token|>{rows[0]}<|extra_200|>{rows[1]}<|image end|>"
    ((_, codes),) = EMU3.read(short)
    assert codes.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_the_speech_prefix_without_its_second_code_point():
    ((modality, codes),) = ANYGPT.read(f"<sosp><\U0001f5e37>{SPEECH}8><eosp>")
    assert modality == "speech" and codes.tolist() == [[7, 8]]


@pytest.mark.parametrize(
    ("strings", "text", "message"),
    [
        (ANYGPT, f"<sosp>{SPEECH}1>", "has no <eosp>"),
        (ANYGPT, f"hello {SPEECH}1>", "outside of any span"),
        (ANYGPT, "hello <eosp>", "outside of any span"),
        (ANYGPT, f"<sosp>{SPEECH}1024><eosp>", r"code 1024 is outside \[0, 1024\)"),
        (ANYGPT, f"<sosp>{SPEECH}01><eosp>", "holds .*01"),
        (ANYGPT, f"<sosp>{SPEECH}1> {SPEECH}1><eosp>", "not codes such as"),
        (ANYGPT, f"<sosp>{IMAGE}1><eosp>", "not codes such as"),
        (ANYGPT, f"<sosp>{SPEECH}1><sosp>{SPEECH}1><eosp>", "not codes such as"),
        (ANYGPT, f"<sosp>{SPEECH}-1><eosp>", "not codes such as"),
        (ANYGPT, f"<sosp>{SPEECH}{'9' * 10}><eosp>", "not codes such as"),
        (ANYGPT, "<sosp><eosp>", "holds 0 codes"),
        (ANYGPT, "<somu>" + f"{MUSIC}1>" * 3 + "<eomu>", "holds 3 codes, not frames of 4"),
        (ANYGPT, "<somu>" + f"{MUSIC}1>" * 4 + "<eomu>", r"code 1 is outside \[2048, 4096\)"),
        (ANYGPT, "<soim>" + f"{IMAGE}1>" * 31 + "<eoim>", "grid"),
        (SEED, "<img>" + "<img_1>" * 32 + "</img>", "not codes such as <img_00000>"),
        (EMU3, "<|image start|>2x3<|image token|><|image end|>", "HEIGHT"),
        (EMU3, "<|image start|>1*2<|image token|><|visual token 000001|><|image end|>", "1 rows of .1. codes"),
    ],
)
def test_broken_strings(strings, text, message):
    with pytest.raises(CodesError, match=message):
        list(strings.read(text))


def test_codes_that_cannot_be_written():
    with pytest.raises(CodesError, match="outside"):
        ANYGPT.write("speech", np.array([[1024]]))
    with pytest.raises(CodesError, match="needs 4 quantizers, got 2"):
        ANYGPT.write("music", np.zeros((2, 5), int))
    with pytest.raises(CodesError, match="grid"):
        ANYGPT.write("image", np.zeros((1, 31), int))
    with pytest.raises(CodesError, match="integer"):
        ANYGPT.write("speech", np.zeros((1, 3)))
    with pytest.raises(ManifestError, match="no modality 'video'"):
        ANYGPT.write("video", np.zeros((1, 3), int))


def test_vocabulary_of_anygpt():
    vocabulary = vocabulary_of("anygpt", 32000, fingerprints={"speech": "abc"})
    sizes = [(b.modality, b.num_quantizers, b.codebook_size, b.pattern, b.length) for b in vocabulary.blocks]
    assert sizes == [
        ("image", 1, 8192, "frame_major", 32),
        ("speech", 1, 1024, "frame_major", None),
        ("music", 4, 2048, "frame_major", None),
    ]
    assert [b.fingerprint for b in vocabulary.blocks] == ["anygpt/image", "abc", "anygpt/music"]
    music = np.random.default_rng(0).integers(0, 2048, (4, 250))
    written = [int(number) for number in ANYGPT.form("music").token_pattern.findall(ANYGPT.write("music", music))]
    ids = vocabulary.span("music", music)[1:-1]
    assert (ids - vocabulary.block("music").first_id).tolist() == written, "their order and offsets are ours"
    sample = Sample([Segment("music", music, "user"), Segment("speech", np.array([[1, 2]]), "assistant")])
    ids, loss = Template().render(sample, vocabulary, None)
    assert Template().parse(ids, vocabulary, None, loss).segments == sample.segments
    with pytest.raises(ManifestError, match="grid="):
        vocabulary_of("emu3", 100)
    assert vocabulary_of("emu3", 100, grid=(90, 90)).block("image").length == 8100
    with pytest.raises(ManifestError, match="unknown token strings"):
        vocabulary_of("other", 100)


def test_ids_of_a_checkpoint():
    """Tokens are added in the order of AnyGPT's training script: chat marks, then codes, start, end of each."""
    added = ["[Human]", "[MMGPT]", "<eoh>", "<eos>"]
    for form in ANYGPT.forms:
        added += [form.token(n) for n in range(form.num_quantizers * form.codebook_size)] + [form.start, form.end]
    tokens = {"<s>": 1, **{token: 32000 + i for i, token in enumerate(added)}}
    assert len(tokens) - 1 + 32000 == 49418, "rows of the published checkpoint"
    vocabulary = vocabulary_of("anygpt", 32000)
    ids = checkpoint_ids("anygpt", vocabulary, tokens)
    assert ids[:32000].tolist() == list(range(32000))
    controls = vocabulary.controls
    assert ids[controls["user"]] == 32000 and ids[controls["eos"]] == 32003 and ids[controls["bos"]] == 1
    assert ids[controls["pad"]] == -1
    names = {value: token for token, value in tokens.items()}
    span = vocabulary.span("music", np.array([[5], [6], [7], [8]]))
    assert "".join(names[int(i)] for i in ids[span]) == ANYGPT.write("music", np.array([[5], [6], [7], [8]]))
    known = ids[ids >= 0]
    assert len(np.unique(known[32000:])) == len(known) - 32000 == 49418 - 32000 - 1 + 1, "all but <eoh>, and <s>"
    del tokens[ANYGPT.form("speech").token(1000)]
    with pytest.raises(ManifestError, match="lacks '<.*1000>'"):
        checkpoint_ids("anygpt", vocabulary, tokens)
    with pytest.raises(ManifestError, match="1 x 8192 codes, emu3 1 x 32768"):
        checkpoint_ids("emu3", vocabulary, tokens)
