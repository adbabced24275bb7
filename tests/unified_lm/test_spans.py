"""Ids as HTML: every id is in one box, open spans are, and nothing that somebody says becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.serve.spans import MEDIA_COLORS, IdSpan, read_spans, spans_html
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(
    50,
    BlockSpec("image", "a", 16, pattern="raster", grid=(2, 2)),
    BlockSpec("speech", "b", 16, num_quantizers=2, max_frames=9),
)
CONTROLS = VOCABULARY.controls


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in ids)


def image(*codes: int) -> list[int]:
    return VOCABULARY.span("image", np.array(codes).reshape(1, 2, 2)).tolist()


def speech(frames: int) -> list[int]:
    return VOCABULARY.span("speech", np.ones((2, frames), dtype=np.int64)).tolist()


class Read(HTMLParser):
    """Tags, attributes and text of HTML."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data


def test_a_prompt_and_its_answer() -> None:
    prompt = [CONTROLS["bos"], CONTROLS["user"], *image(1, 2, 3, 4), 7, 4, 11, *speech(2), CONTROLS["assistant"]]
    spans = read_spans(VOCABULARY, letters, prompt)
    assert [span.kind for span in spans] == ["control", "image", "text", "speech", "control"]
    assert [len(span.ids) for span in spans] == [2, 6, 3, 6, 1]
    assert [span.text for span in spans] == ["bos user", "", "hel", "", "assistant"]
    content = Read(spans_html(VOCABULARY, [("Prompt", spans)]))
    boxes = [attributes for tag, attributes in content.tags if tag == "details"]
    assert [box["data-kind"] for box in boxes] == ["control", "image", "text", "speech", "control"]
    assert f"--c:{MEDIA_COLORS[0]}" in str(boxes[1]["style"]) and f"--c:{MEDIA_COLORS[1]}" in str(boxes[3]["style"])
    assert "18 ids" in content.said and "hel" in content.said
    assert "image 6" in content.said and "speech 6" in content.said and "control 3" in content.said


def test_whatever_is_written_so_far_can_be_read() -> None:
    whole = [3, 4, *image(0, 0, 0, 0), *speech(3), 5, *image(1, 1, 1, 1), CONTROLS["eos"]]
    ends = {VOCABULARY.block(name).end_id for name in VOCABULARY.modalities}
    for count in range(1, len(whole) + 1):
        ids = whole[:count]
        spans = read_spans(VOCABULARY, letters, ids)
        assert [token for span in spans for token in span.ids] == ids
        assert all(span.whole for span in spans[:-1])
        assert spans[-1].whole == (spans[-1].kind in ("text", "control") or ids[-1] in ends)
    assert read_spans(VOCABULARY, letters, []) == []


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    known = {"div", "ul", "li", "b", "section", "h4", "i", "details", "summary", "small", "q", "em", "code"}
    span = IdSpan("text", tuple(range(100)), text)
    for said in (text, f"{text}</q><script>x</script>", f"' onclick='x' {text}", f'"><img src=x onerror=x>{text}'):
        content = Read(spans_html(VOCABULARY, [(said, [IdSpan("text", span.ids, said)])]))
        assert {tag for tag, _ in content.tags} <= known
        names = {name for _, attributes in content.tags for name in attributes}
        assert names <= {"class", "style", "title", "data-kind"}
    assert "and 52 more" in content.said
