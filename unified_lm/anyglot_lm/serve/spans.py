"""Ids of a prompt or an answer as HTML: a ribbon and one box a span, coloured by what the ids are.

Pure functions of a vocabulary and ids. All that comes from outside (texts, names) is escaped here. Which colour a
modality has follows from its place in the vocabulary, and `STYLE` has them all, for light and dark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from anyglot_lm.grammar import TEXT
from anyglot_lm.vocabulary import Vocabulary

CONTROL = "control"
SHOWN_IDS, SHOWN_TEXT = 48, 2000
"""Ids, and characters of text, that an opened box shows."""
MEDIA_COLORS = ("#0d9488", "#d97706", "#9333ea", "#db2777", "#65a30d", "#dc2626", "#0284c7")
"""Of modalities by their place in the vocabulary, from the first again after the last."""
COLORS = {TEXT: "#4f6bd8", CONTROL: "#7c8594"}


@dataclass(frozen=True)
class IdSpan:
    """Ids that belong together.

    Attributes:
        kind: "text", "control", or the modality.
        ids: of the span, start and end ids included.
        text: of a text span; the names of controls.
        whole: False for a span of media whose end is not written yet.
    """

    kind: str
    ids: tuple[int, ...]
    text: str = ""
    whole: bool = True


def read_spans(vocabulary: Vocabulary, decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[IdSpan]:
    """The spans of ids, in order; controls in a row are one.

    Args:
        vocabulary: of the ids.
        decode: text ids to text.
        ids: of a prompt or an answer, which may still be written.

    Raises:
        CodesError: ids that are no prompt and no answer.
    """
    closed = _closed(vocabulary, ids)
    spans: list[IdSpan] = []
    for run in vocabulary.split(ids[:closed]):
        inside = tuple(int(token) for token in ids[run.start : run.stop])
        if run.kind == "control" and spans and spans[-1].kind == CONTROL:
            spans[-1] = IdSpan(CONTROL, spans[-1].ids + inside, f"{spans[-1].text} {run.name}")
        elif run.kind == "control":
            spans.append(IdSpan(CONTROL, inside, run.name))
        elif run.kind == "text":
            spans.append(IdSpan(TEXT, inside, decode(list(inside))))
        else:
            spans.append(IdSpan(run.name, inside))
    if closed < len(ids):
        block = vocabulary.block_of_start(ids[closed])
        assert block is not None
        spans.append(IdSpan(block.modality, tuple(int(token) for token in ids[closed:]), whole=False))
    return spans


def _closed(vocabulary: Vocabulary, ids: Sequence[int]) -> int:
    """How many ids come before the span that is open at the end."""
    start, end = len(ids), None
    for at, token in enumerate(ids):
        if end is None:
            block = vocabulary.block_of_start(int(token))
            start, end = (at, block.end_id) if block is not None else (start, None)
        elif token == end:
            start, end = len(ids), None
    return start


def spans_html(vocabulary: Vocabulary, parts: Iterable[tuple[str, Sequence[IdSpan]]]) -> str:
    """A panel of several sequences.

    Args:
        vocabulary: whose modalities have the colours.
        parts: what each sequence is called, and its spans.
    """
    parts = list(parts)
    counts = Counter[str]()
    for _, spans in parts:
        for span in spans:
            counts[span.kind] += len(span.ids)
    legend = "".join(
        f"<li style='{_color(vocabulary, kind)}'>{escape(kind)} <b>{counts[kind]}</b></li>"
        for kind in (TEXT, *vocabulary.modalities, CONTROL)
    )
    body = "".join(_sequence(vocabulary, title, spans) for title, spans in parts)
    return f"<div class='ag-spans'><ul class='ag-legend'>{legend}</ul>{body}</div>"


def _sequence(vocabulary: Vocabulary, title: str, spans: Sequence[IdSpan]) -> str:
    total = sum(len(span.ids) for span in spans)
    ribbon = "".join(
        f"<i style='{_color(vocabulary, span.kind)};flex-grow:{len(span.ids)}' title='{escape(_title(span))}'></i>"
        for span in spans
    )
    boxes = "".join(_box(vocabulary, span) for span in spans)
    return (
        f"<section><h4>{escape(title)} <b>{_ids(total)}</b></h4>"
        f"<div class='ag-ribbon'>{ribbon}</div><div class='ag-boxes'>{boxes}</div></section>"
    )


def _box(vocabulary: Vocabulary, span: IdSpan) -> str:
    said = escape(span.text[:SHOWN_TEXT] + ("…" if len(span.text) > SHOWN_TEXT else ""))
    shown = " ".join(map(str, span.ids[:SHOWN_IDS]))
    more = f" … and {len(span.ids) - SHOWN_IDS} more" if len(span.ids) > SHOWN_IDS else ""
    quoted = f"<q>{said}</q>" if span.kind == TEXT else f"<em>{said}</em>" if said else ""
    look = f"style='{_color(vocabulary, span.kind)}' title='{escape(_title(span))}'"
    return (
        f"<details data-kind='{escape(span.kind)}' {look}>"
        f"<summary><b>{escape(span.kind)}</b> <small>{_ids(len(span.ids))}{'' if span.whole else ' …'}</small> {quoted}"
        f"</summary><code>{shown}{more}</code></details>"
    )


def _title(span: IdSpan) -> str:
    first = " ".join(map(str, span.ids[:8])) + (" …" if len(span.ids) > 8 else "")
    return f"{span.kind}: {_ids(len(span.ids))}, {first}"


def _ids(count: int) -> str:
    return f"{count} id" if count == 1 else f"{count} ids"


def _color(vocabulary: Vocabulary, kind: str) -> str:
    color = COLORS.get(kind)
    if color is None:
        color = MEDIA_COLORS[vocabulary.modalities.index(kind) % len(MEDIA_COLORS)]
    return f"--c:{color}"


STYLE = """
.ag-spans { font-size: .84rem; line-height: 1.45; color: var(--body-text-color); }
.ag-spans ul.ag-legend { display: flex; flex-wrap: wrap; gap: .25rem .9rem; margin: 0 0 .9rem; padding: 0;
  list-style: none; }
.ag-spans .ag-legend li { display: flex; align-items: center; gap: .35rem; margin: 0; }
.ag-spans .ag-legend li::before { content: ""; width: .7rem; height: .7rem; border-radius: 3px; background: var(--c); }
.ag-spans section { margin: 0 0 1.1rem; }
.ag-spans h4 { display: flex; justify-content: space-between; margin: 0 0 .35rem; font-size: .84rem; font-weight: 600;
  color: var(--body-text-color); }
.ag-spans h4 b, .ag-spans small { font-weight: 400; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.ag-ribbon { display: flex; gap: 1px; height: .6rem; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }
.ag-ribbon i { flex-basis: 2px; min-width: 2px; background: var(--c); }
.ag-boxes { display: flex; flex-direction: column; gap: .3rem; margin-top: .5rem; }
.ag-boxes details { border-left: 4px solid var(--c); border-radius: 4px; padding: .25rem .55rem;
  background: color-mix(in srgb, var(--c) 11%, transparent); overflow-wrap: anywhere; }
.ag-boxes summary { position: relative; padding-right: 1.2rem; cursor: pointer; list-style: none; }
.ag-boxes summary::-webkit-details-marker { display: none; }
.ag-boxes summary::after { content: "+"; position: absolute; top: 0; right: .1rem; color: var(--c); font-weight: 600; }
.ag-boxes details[open] summary::after { content: "−"; }
.ag-boxes summary b { font-weight: 600; }
.ag-boxes q { font-style: normal; } .ag-boxes em { color: var(--body-text-color-subdued); font-style: normal; }
.ag-boxes code { display: block; margin-top: .3rem; padding: 0; background: none; border: 0; font-size: .76rem;
  color: var(--body-text-color-subdued); white-space: normal; }
"""
