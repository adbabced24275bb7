"""`Chat`: a conversation with a unified model, turn after turn.

It keeps what was said as segments, and what the model computed for it (`engine.Memory`), so that a turn costs what is
new in it. When the conversation outgrows the model, its oldest turns are left out. It reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from anyglot_lm.engine import Engine, GenerationError, Memory, Sampling, row_seeds
from anyglot_lm.grammar import TEXT, Request
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.stream import AnswerReader, Event, follow
from anyglot_lm.unified import Output, UnifiedModel

CAPACITY = 4096
"""Ids of a conversation that the model sees at most, unless an engine is given."""


class Chat:
    """A conversation.

    Args:
        model: the unified model.
        engine: an engine of the same model, default one of its own with `CAPACITY` positions (or all, if fewer).
        segments: what was said before.

    Attributes:
        segments: what was said, by both.
        left_out: how many segments, the oldest ones, the model no longer sees.
    """

    def __init__(self, model: UnifiedModel, engine: Engine | None = None, segments: Sequence[Segment] = ()) -> None:
        self.model = model
        self.engine = engine or Engine(model.model, model.vocabulary, streams=2, capacity=CAPACITY)
        self.segments: list[Segment] = list(segments)
        self.left_out = 0
        self._memory: Memory | None = None

    def say(
        self,
        segments: Sequence[Segment],
        request: Request,
        sampling: Mapping[str, Sampling] | None = None,
        seed: int = 0,
        *,
        guidance: Mapping[str, float] | None = None,
        chunk_seconds: float = 0.5,
        previews: bool = False,
    ) -> Iterator[Event]:
        """Says `segments` as the user and answers. What is said counts once the answer is whole.

        Args:
            segments: of the user.
            request, sampling, seed, guidance: as for `UnifiedModel.respond`.
            chunk_seconds, previews: see `stream.AnswerReader`.

        Raises:
            GenerationError: the turn alone is too long for the model.
            RequestError: a request that this model cannot fulfil.
        """
        self.model.check_request(request)
        said = [*self.segments, *segments]
        prompt, left_out = self._fit(said, self.engine.grammar.longest(request), self.left_out)
        row = self.engine.submit(
            prompt,
            request,
            sampling=sampling,
            seed=row_seeds(seed, 1)[0],
            unconditional=None if guidance is None else self.model.prompt(Sample([])),
            scales=guidance,
            memory=self._memory,
            keep=True,
        )
        reader = AnswerReader(self.model, chunk_seconds=chunk_seconds, previews=previews)
        try:
            yield from follow(self.engine, row, reader)
        finally:  # also where the caller looks no further than the event "done"
            if reader.whole:
                self.segments, self.left_out = [*said, *map(answered, reader.outputs)], left_out
                self._memory = row.memory

    def _fit(self, said: list[Segment], room: int, left_out: int) -> tuple[list[int], int]:
        """The prompt, and how many segments had to be left out of it."""
        while True:
            prompt = self.model.prompt(Sample(said[left_out:]))
            if len(prompt) + room <= self.engine.capacity:
                return prompt, left_out
            later = [i for i in turns(said) if i > left_out]
            if not later:
                raise GenerationError(
                    f"this turn has {len(prompt)} ids and its answer up to {room}, but the model has "
                    f"{self.engine.capacity} positions; say less, or lower max_ids"
                )
            left_out = later[0]


def turns(said: Sequence[Segment]) -> list[int]:
    """Where the turns of the user begin."""
    return [i for i, s in enumerate(said) if s.role == "user" and (i == 0 or said[i - 1].role != "user")]


def answered(output: Output) -> Segment:
    """What the model said, as a segment."""
    if output.modality == TEXT:
        return Segment(TEXT, output.text or "", "assistant")
    assert output.codes is not None
    return Segment(output.modality, output.codes.numpy(), "assistant")
