"""One turn of a conversation on the page: what the user gives in, what is to be shown out, while it is written.

A turn takes a place of the same queue as a request of the API, and the same limits hold for it. Media are shown as
HTML that carries them (data: URIs), so nothing of a conversation is ever a file. This file knows no gradio, that is
`page.py`, and keeps no conversation: its caller does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from anyglot_lm.chat import answered
from anyglot_lm.grammar import TEXT
from anyglot_lm.segments import Segment
from anyglot_lm.serve import answers
from anyglot_lm.serve.batcher import Ticket
from anyglot_lm.serve.protocol import Sampled
from anyglot_lm.serve.refusal import Refusal
from anyglot_lm.stream import AnswerReader

if TYPE_CHECKING:
    from torch import Tensor

    from anyglot_lm.serve.app import Service
    from anyglot_lm.unified import UnifiedModel

REFRESH_SECONDS = 0.15
"""Between two looks at an answer that is being written."""
SHOWN_PIXELS = 256
"""Width to which small pictures are enlarged, in whole steps."""

PLAY = " autoplay"
"""Makes a sound play when it appears."""

Shown = tuple[Literal["text", "html"], str]
"""A piece of a message: plain text, or HTML of ours."""


@dataclass
class Conversation:
    """What was said, as far as the model still sees it, and the place of the answer that is being written."""

    said: list[Segment] = field(default_factory=list)
    ticket: Ticket | None = None

    def stop(self) -> None:
        """Ends the answer that is being written, also in the engine. On the event loop."""
        if self.ticket is not None:
            self.ticket.close()


@dataclass(frozen=True)
class Given:
    """What the user says: a text, or a medium as bytes of a file or as the tokenizer takes it."""

    modality: str
    content: str | bytes | Tensor
    name: str = "the file"


@dataclass(frozen=True)
class Example:
    """Something to try: what is said in a new conversation, and what the answer shall hold.

    Attributes:
        title: a few words for a button.
        given: of the user.
        order: modalities of the answer.
    """

    title: str
    given: tuple[Given, ...]
    order: tuple[str, ...]


@dataclass
class Turn:
    """What there is to see of a turn.

    Attributes:
        asked, answer: pieces of both messages.
        prompt, ids: what the model saw, and what it wrote so far.
        left_out: how many segments of the conversation no longer fit.
        whole: whether the answer is.
    """

    model: UnifiedModel
    asked: list[Shown] = field(default_factory=list)
    answer: list[Shown] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    left_out: int = 0
    whole: bool = False
    _open: str = ""  # the modality that is being written, its first id, what can be heard or seen of it
    _began: int = 0
    _seconds: float = 0.0
    _preview: str = ""

    def read(self, reader: AnswerReader, ids: Sequence[int]) -> None:
        """Takes in the next ids of the answer."""
        self.ids += ids
        for event in reader.read(ids):
            if event.kind == "start":
                self._open, self._began, self._seconds, self._preview = event.modality, len(self.ids), 0.0, ""
                self.answer.append(("text" if event.modality == TEXT else "html", ""))
            elif event.kind == "text":
                self.answer[-1] = ("text", self.answer[-1][1] + event.text)
            elif event.kind == "audio" and event.media is not None:
                self._seconds += event.media.shape[-1] / (_rate(self.model, event.modality) or 1)
            elif event.kind == "preview" and event.media is not None:
                self._preview = medium_html(self.model, event.modality, event.media, label=False)
            elif event.kind == "end":
                self._open = ""
                if event.output is not None and event.output.media is not None:
                    play = not any(PLAY in shown for kind, shown in self.answer if kind == "html")
                    self.answer[-1] = ("html", medium_html(self.model, event.modality, event.output.media, play=play))
        if self._open not in ("", TEXT):
            self.answer[-1] = ("html", self._progress())

    def _progress(self) -> str:
        block, count = self.model.vocabulary.block(self._open), len(self.ids) - self._began
        seconds = f"{self._seconds:.1f} s, " if self._seconds else ""
        of = f" of {block.length} ids" if block.length else f" ids, at most {block.max_length or 'what fits'}"
        bar = f"<progress max='{block.length}' value='{count}'></progress>" if block.length else ""
        said = f"writing {escape(self._open)}: {seconds}{count}{of}"
        return f"<div class='ag-progress'>{self._preview}<p>{said}</p>{bar}</div>"


async def answer(
    service: Service,
    conversation: Conversation,
    take: Callable[[], Awaitable[Sequence[Given]]],
    order: Sequence[str],
    how: Sampled,
    most: int | None = None,
) -> AsyncIterator[Turn]:
    """Says something and answers; yields the same turn again and again while it grows, until it is whole or stopped.

    Args:
        service: the model and its queue.
        conversation: what was said before. What is said now counts once the answer is whole.
        take: gives what the user says, in order; called once there is a place.
        order: modalities of the answer; none leaves them to the model.
        how: temperature and seed.
        most: ids of the answer, or None for what fits.

    Raises:
        Refusal: no place, or a mistake of the user.
        EngineFailure: a defect.
    """
    if conversation.ticket is not None:
        raise Refusal(409, "the answer before this one is still being written; stop it, or wait")
    model, turn = service.model, Turn(service.model)
    with service.batcher.take(1) as ticket:
        conversation.ticket = ticket
        try:
            given, said = await take(), []
            if not given:
                raise Refusal(400, "nothing was said; write something, or add a file")
            if len(given) > service.limits.max_parts:
                raise Refusal(400, f"{len(given)} parts; at most {service.limits.max_parts} are read: send fewer")
            for part in given:
                if ticket.closed:
                    return
                segment, shown = await service.theirs(_take_in, service, part)
                said.append(segment)
                turn.asked.append(shown)
            yield turn
            work, turn.left_out = await service.theirs(
                service.prepare.turn, [*conversation.said, *said], order, how, most
            )
            service.metrics.tokens("prompt", answers.counts(model.vocabulary, work.prompt))
            if ticket.closed:
                return
            turn.prompt = work.prompt
            (row,) = ticket.start(work, live=True)
            yield turn
            reader, shown_at = AnswerReader(model, previews=True), time.perf_counter()
            async for ids in row:
                await service.aside(turn.read, reader, ids)
                if time.perf_counter() - shown_at > REFRESH_SECONDS:
                    yield turn
                    shown_at = time.perf_counter()
            turn.whole = model.grammar.eos in turn.ids[-1:]
            if turn.whole:
                service.counted(turn.ids)
                conversation.said = [*conversation.said, *said, *map(answered, reader.outputs)][turn.left_out :]
            yield turn
        finally:
            conversation.ticket = None


def _take_in(service: Service, part: Given) -> tuple[Segment, Shown]:
    """What the user gives as a segment, and how it is shown: a medium as the tokenizer got it."""
    if isinstance(part.content, str):
        return Segment(TEXT, part.content, "user"), ("text", part.content)
    segment, medium = service.prepare.medium(part.modality, part.content, part.name)
    return segment, ("html", medium_html(service.model, part.modality, medium))


def quiet(shown: Sequence[Shown]) -> list[Shown]:
    """Pieces of a message whose sounds do not play by themselves (again)."""
    return [(kind, content.replace(PLAY, "") if kind == "html" else content) for kind, content in shown]


def medium_html(model: UnifiedModel, modality: str, media: Tensor, *, label: bool = True, play: bool = False) -> str:
    """A picture float `[3, H, W]` or a sound float `[C, samples]` as HTML that needs nothing else.

    A sound plays by itself with `play`, and only once it is touched without.
    """
    rate, name = _rate(model, modality), escape(modality)
    if rate is None:
        content, (height, width) = answers.base64_of(answers.png(media)), media.shape[-2:]
        scale = max(1, SHOWN_PIXELS // width)
        sharp = " ag-sharp" if scale > 1 else ""
        medium = (
            f"<img class='ag-picture{sharp}' width='{width * scale}' height='{height * scale}' "
            f"src='data:image/png;base64,{content}' alt='{name}'>"
        )
        said = f"{name} · {width} × {height}"
    else:
        content = answers.base64_of(answers.sound_bytes(media, rate, "wav"))
        medium = f"<audio controls{PLAY if play else ''} preload='auto' src='data:audio/wav;base64,{content}'></audio>"
        said = f"{name} · {media.shape[-1] / rate:.1f} s"
    caption = f"<figcaption>{said}</figcaption>" if label else ""
    return f"<figure class='ag-medium' data-modality='{name}'>{medium}{caption}</figure>"


def _rate(model: UnifiedModel, modality: str) -> int | None:
    return model.tokenizers[modality].spec.sample_rate


STYLE = """
.ag-medium { margin: 0; display: flex; flex-direction: column; gap: .3rem; }
.ag-medium figcaption, .ag-progress p { margin: 0; font-size: .8rem; color: var(--body-text-color-subdued); }
.ag-medium img.ag-picture { display: block; margin: 0; max-width: 100%; height: auto; border-radius: 6px; }
.ag-medium img.ag-sharp { image-rendering: pixelated; }
.ag-medium audio { display: block; width: 320px; max-width: 100%; height: 40px; }
.ag-progress { display: flex; flex-direction: column; gap: .35rem; width: 256px; max-width: 100%; }
.ag-progress progress { width: 100%; height: .4rem; appearance: none; border: 0; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.ag-progress ::-webkit-progress-bar { background: var(--border-color-primary); }
.ag-progress ::-webkit-progress-value { background: var(--color-accent); }
.ag-progress ::-moz-progress-bar { background: var(--color-accent); }
"""
