"""Answers while they are written: ids of a row in, events out.

Text comes as it is written, sound in chunks as soon as its samples are certain (the codec's streams give exactly what
decoding at the end would), a picture when it is whole, with a preview of its first rows where one is asked for. An
`AnswerReader` reads one row; where the ids come from (`engine.py`) and where events go is not its business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from anyglot_lm.blocks import Block
from anyglot_lm.engine import GenerationError
from anyglot_lm.grammar import TEXT, GrammarError, Span
from anyglot_tokenizers.errors import CodesError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from anyglot_lm.engine import Engine, Row
    from anyglot_lm.unified import Output, UnifiedModel


@dataclass(frozen=True, eq=False)
class Event:
    """Something new in an answer.

    Attributes:
        kind: "start" of a span; "text": more of a text span; "audio": more samples; "preview" of a picture; "end" of a
            span; "done", once, at the end of the answer.
        modality: of the span, `"text"` included; "" when done.
        text: the new text.
        media: float32 (made in inference mode), the new samples `[C, n]`, or the picture's first rows `[3, h, W]`.
        output: the whole span, at its end.
    """

    kind: Literal["start", "text", "audio", "preview", "end", "done"]
    modality: str = ""
    text: str = ""
    media: Tensor | None = None
    output: Output | None = None


def follow(engine: Engine, row: Row, reader: AnswerReader) -> Iterator[Event]:
    """Events of one row while the engine writes it. Where the caller stops listening, the row is cancelled.

    Others may step the engine meanwhile, and write rows of their own with it.

    Raises GenerationError when the engine ended the row before its answer was whole, as it does after an error.
    """
    read = 0
    try:
        while not reader.whole:
            if read == len(row.ids):
                if row.done:
                    raise GenerationError("the engine ended this answer before it was whole; ask again")
                engine.step()
            new = row.ids[read:]
            read += len(new)
            yield from reader.read(new)
    finally:
        engine.cancel(row)


class AnswerReader:
    """Turns the ids of one answer into events, in order.

    Args:
        model: whose vocabulary and tokenizers read.
        chunk_seconds: of sound in an "audio" event at least (the last one of a span may be shorter).
        previews: also give previews of pictures, one per finished row of codes.

    Attributes:
        outputs: the whole spans so far.
        whole: whether the answer's end was read.
    """

    def __init__(self, model: UnifiedModel, *, chunk_seconds: float = 0.5, previews: bool = False) -> None:
        self.model, self.chunk_seconds, self.previews = model, chunk_seconds, previews
        self.outputs: list[Output] = []
        self.whole = False
        self._ids: list[int] = []  # of the open span
        self._said = ""
        self._span: _Media | None = None
        self._in_text = False

    def read(self, ids: Iterable[int]) -> list[Event]:
        """Events of the next ids of the answer, eos included.

        Raises:
            GrammarError: an id that no answer holds there.
        """
        vocabulary, events = self.model.vocabulary, list[Event]()
        for token in ids:
            if self._span is not None:
                events += self._span.read(token)
                if self._span.output is not None:
                    self.outputs.append(self._span.output)
                    self._span = None
                continue
            block = vocabulary.block_of_start(token)
            if token < vocabulary.text_size:
                if not self._in_text:
                    self._in_text, self._ids, self._said = True, [], ""
                    events.append(Event("start", TEXT))
                self._ids.append(token)
                continue
            marker = self._in_text and token == vocabulary.controls["assistant"]  # another text follows
            events += self._end_text()
            if marker:
                continue
            if block is not None:
                self._span = _Media(self.model, block, self.chunk_seconds, self.previews)
                events.append(Event("start", block.modality))
            elif token == vocabulary.controls["eos"]:
                self.whole = True
                events.append(Event("done"))
            else:
                raise GrammarError(f"id {token} is no text, start of a span or eos; an answer holds nothing else")
        return events + (self._more_text(whole=False) if self._in_text else [])

    def _more_text(self, *, whole: bool) -> list[Event]:
        said = self._text()
        if not whole:  # a character may need more ids
            said = said.rstrip("\ufffd")
        new, self._said = said[len(self._said) :], max(said, self._said, key=len)
        return [Event("text", TEXT, text=new)] if new else []

    def _text(self) -> str:
        text = self.model.text
        return text.decode([i for i in self._ids if i < text.size])  # rows of a backbone may be padded

    def _end_text(self) -> list[Event]:
        if not self._in_text:
            return []
        events = self._more_text(whole=True)
        self._in_text = False
        self.outputs.append(self.model.output(Span(TEXT, np.array(self._ids))))
        return [*events, Event("end", TEXT, output=self.outputs[-1])]


class _Media:
    """One open span of codes."""

    def __init__(self, model: UnifiedModel, block: Block, chunk_seconds: float, previews: bool) -> None:
        self.model, self.block, self.pattern = model, block, block.pattern_of("output")
        self.tokenizer = model.tokenizers.get(block.modality)
        self.previews = previews and block.grid is not None and self.pattern.variable
        self.ids: list[int] = []
        self.output: Output | None = None
        self.heard: list[Tensor] = []
        self.given = self.rows = 0  # frames that a stream or a preview has seen
        self.stream: Any = None
        spec = None if self.tokenizer is None else self.tokenizer.spec
        if self.tokenizer is None or spec is None or spec.axes != ("time",) or not self.pattern.variable:
            return
        try:
            self.stream = self.tokenizer.stream(1)
        except UnsupportedError:  # codes of unbounded context: all at the end
            return
        assert spec.frame_rate is not None
        self.chunk = max(1, round(chunk_seconds * spec.frame_rate))
        self.behind = spec.context[1] if spec.context is not None else 0

    def read(self, token: int) -> list[Event]:
        if token == self.block.end_id:
            return self._end()
        self.ids.append(token)
        if self.stream is not None:
            frames = self._frames()
            return self._hear(frames) if frames - self.given >= self.chunk + (0 if self.given else self.behind) else []
        if self.previews and self.tokenizer is not None:
            assert self.block.grid is not None
            rows = self._frames() // math.prod(self.block.grid[1:])
            if self.rows < rows < self.block.grid[0]:
                self.rows = rows
                codes = self._codes(rows * math.prod(self.block.grid[1:]), (rows, *self.block.grid[1:]))
                picture = self._preview(codes)
                return [] if picture is None else [Event("preview", self.block.modality, media=picture)]
        return []

    def _frames(self) -> int:
        """Whole frames so far."""
        quantizers = self.block.num_quantizers
        one, two = (self.pattern.num_flat(n, quantizers) for n in (1, 2))
        return 0 if len(self.ids) < one else 1 + (len(self.ids) - one) // (two - one)

    def _codes(self, frames: int, grid: tuple[int, ...] | None = None) -> np.ndarray:
        """int64 `[k, frames]`, or `[k, *grid]`, of the first frames."""
        block, quantizers = self.block, self.block.num_quantizers
        length = self.pattern.num_flat(frames, quantizers)
        codebooks = self.pattern.codebooks(length, quantizers)
        flat = np.array(self.ids[:length]) - block.first_id - codebooks * block.codebook_size
        return self.pattern.unflatten(flat, quantizers, grid)

    def _preview(self, codes: np.ndarray) -> Tensor | None:
        try:
            return self.model.decode_media(self.block.modality, [codes])[0]
        except (CodesError, UnsupportedError):  # a tokenizer of whole grids only
            self.previews = False
            return None

    @torch.inference_mode()
    def _hear(self, frames: int, *, last: bool = False) -> list[Event]:
        parts = []
        if frames > self.given:
            codes = torch.from_numpy(self._codes(frames)[None, :, self.given :])
            parts.append(self.stream.decode(codes)[0].cpu())
            self.given = frames
        if last:
            parts.append(self.stream.flush()[0].cpu())
        audio = torch.cat(parts, 1)
        self.heard.append(audio)
        return [Event("audio", self.block.modality, media=audio)] if audio.shape[1] else []

    def _end(self) -> list[Event]:
        modality = self.block.modality
        codes = self.model.vocabulary.codes(modality, np.array(self.ids), "output")
        events = self._hear(codes.shape[-1], last=True) if self.stream is not None else []
        media = None
        if self.heard:
            media = torch.cat(self.heard, 1)
        elif self.tokenizer is not None:
            media = self.model.decode_media(modality, [codes])[0]
        self.output = self.model.output(Span(modality, codes), media)
        return [*events, Event("end", modality, output=self.output)]
