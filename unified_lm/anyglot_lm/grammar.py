"""The span grammar: which ids an answer may hold next, so that whatever a model writes decodes.

An answer is a sequence of spans and then eos. A text span is text ids alone; a media span is its start id,
codes in the order of the modality's output pattern, its end id:

    text text text <image> c c c ... c </image> text text <speech> c c ... c </speech> <eos>

Where an order asks for two texts in a row, the assistant's marker stands between them (template version 2).

A `Request` says which modalities an answer must, may and must not hold, and how many ids it may use. The
grammar is a finite-state machine over spans: `start(request)` gives a state, `allowed(state)` the legal ids
as ranges, and `advance(state, id)` the next state. A span opens only if it, all that is required after it,
and eos still fit; so every walk along allowed ids ends in a whole answer within `max_ids`.

Plain Python over a vocabulary. This file knows nothing of models, tensors or sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.patterns import DELAY
from anyglot_lm.vocabulary import Block, Vocabulary
from anyglot_tokenizers.errors import AnyglotError, ManifestError

TEXT = "text"
KNOWN_REQUESTS = 1024
"""Requests whose plan a grammar keeps."""
CHAIN = (TEXT, TEXT, "speech")
"""The order of an answer to a spoken question by way of text: what was heard, the answer, and the answer spoken."""

Ranges = tuple[tuple[int, int], ...]
"""Legal ids as sorted half-open ranges that do not touch."""


def read_order(names: str) -> tuple[str, ...]:
    """Modalities joined by commas, or "chain" for `CHAIN`, as an order."""
    return CHAIN if names == "chain" else tuple(name.strip() for name in names.split(","))


class RequestError(AnyglotError):
    """A request that contradicts itself, or that this vocabulary cannot fulfil."""


class GrammarError(AnyglotError):
    """An id, or a sequence of ids, that is no legal answer."""


@dataclass(frozen=True)
class Request:
    """What an answer may look like.

    Either `order`, or any of `required`, `allowed` and `forbidden`. With `order`, the answer is exactly one
    span of each named modality, in that order. Without, spans of the allowed modalities come in any order and
    number, at least one of each required; the answer is empty only if nothing but eos fits.

    Args:
        order: for example `("image",)` or `CHAIN`.
        required: modalities that must occur.
        allowed: modalities that may occur; None means all of the vocabulary.
        forbidden: modalities that must not occur.
        max_ids: most ids of the whole answer, start ids, end ids and eos included.
        max_length: most ids of one span, by modality: text ids, or flat codes of a media span of variable
            length (rounded down to whole frames).
        min_text: fewest ids of a text span.
        min_frames: fewest frames of a media span of variable length, by modality; 1 if not named.
        max_frames: most frames of a media span of variable length, by modality.
    """

    order: tuple[str, ...] | None = None
    required: frozenset[str] | set[str] = frozenset()
    allowed: frozenset[str] | set[str] | None = None
    forbidden: frozenset[str] | set[str] = frozenset()
    max_ids: int = 512
    max_length: Mapping[str, int] = field(default_factory=dict)
    min_text: int = 1
    min_frames: Mapping[str, int] = field(default_factory=dict)
    max_frames: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without what is as by default; `from_dict` is its inverse."""
        plain, found = Request(), {}
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if value != getattr(plain, name):
                found[name] = sorted(value) if name in _SETS else list(value) if name == "order" else value
        return {name: dict(value) if name in _COUNTS else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Request:
        """Inverse of `to_dict`. Raises `RequestError` naming an unknown entry, or one of the wrong kind."""
        if not isinstance(content, Mapping):
            raise RequestError(f"a request is a JSON object, not {content!r}")
        known = [entry.name for entry in fields(cls)]
        found: dict[str, Any] = {}
        for name, value in content.items():
            if name not in known:
                raise RequestError(f"a request has no entry {name!r}; it has {', '.join(known)}")
            if name in _COUNTS:
                kind = "an object of whole numbers by modality"
                good = isinstance(value, Mapping) and all(type(count) is int for count in value.values())
            elif name in _SETS or name == "order":
                kind = "a list of modalities"
                good = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
            else:
                kind, good = "a whole number", type(value) is int
            if not good:
                raise RequestError(f"{name} of a request is {value!r}; give {kind}")
            found[name] = frozenset(value) if name in _SETS else tuple(value) if name == "order" else value
        return cls(**found)


_SETS = ("required", "allowed", "forbidden")
_COUNTS = ("max_length", "min_frames", "max_frames")


@dataclass(frozen=True)
class Span:
    """One span of an answer.

    `content` is int64 `[N]` text ids for text, else codes int64 `[K, *grid]` in the tokenizer's layout.
    """

    modality: str
    content: NDArray[np.int64]


class _Bounds(NamedTuple):
    """Flat lengths of a media span: `shortest`, `shortest + unit`, ... `longest` (None: only the budget)."""

    shortest: int
    longest: int | None
    unit: int


@dataclass(frozen=True, eq=False)
class _Plan:
    """A request checked against the vocabulary: what all states of one answer share."""

    ordered: bool
    max_ids: int
    first_rest: tuple[str, ...]
    media: tuple[str, ...]
    text: bool
    min_text: int
    max_text: int
    bounds: Mapping[str, _Bounds]
    needs: dict[tuple[tuple[str, ...], bool], int] = field(default_factory=dict)

    def need(self, rest: tuple[str, ...], after_text: bool = False) -> int:
        """Fewest ids that write one span of each modality in `rest`, markers between texts, and eos.

        `after_text`: a text stands before.
        """
        key = rest, after_text
        if key not in self.needs:
            costs = (self.min_text if name == TEXT else self.bounds[name].shortest + 2 for name in rest)
            self.needs[key] = sum(costs) + _markers((TEXT, *rest) if after_text else rest) + 1
        return self.needs[key]

    def after(self, rest: tuple[str, ...], modality: str) -> tuple[str, ...]:
        """What is still required once a span of `modality` is opened."""
        if self.ordered:
            return rest[1:]
        return tuple(name for name in rest if name != modality) if modality in rest else rest


def _markers(order: tuple[str, ...]) -> int:
    """How many markers stand between texts."""
    return sum(pair == (TEXT, TEXT) for pair in pairwise(order))


class State(NamedTuple):
    """Where an answer stands. Immutable: a state may be kept and advanced twice.

    `position` counts the ids of the current span (text ids, or flat codes); it is -1 between spans, where
    `modality` is `"text"`. `limit` is the flat length at which a media span is closed, `left` the budget,
    `rest` what is still required.
    """

    plan: _Plan
    left: int
    rest: tuple[str, ...]
    modality: str
    position: int
    limit: int
    done: bool


class SpanGrammar:
    """The grammar of one vocabulary's answers.

    Args:
        vocabulary: the manifest; its output patterns, grids and lengths say what a media span may hold.

    Raises:
        ManifestError: a modality whose output span has no fixed length and a pattern that needs one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.eos, self.marker = vocabulary.controls["eos"], vocabulary.controls["assistant"]
        self._blocks = {block.modality: block for block in vocabulary.blocks}
        self._shapes = {block.modality: _Shape(block) for block in vocabulary.blocks}
        self._open_ranges: dict[tuple[bool, bool, tuple[str, ...], bool], Ranges] = {}
        self._plans: dict[int, tuple[Request, State]] = {}

    def start(self, request: Request) -> State:
        """The state before the first id. Raises `RequestError` if no answer can fulfil the request."""
        known = self._plans.get(id(request))
        if known is not None and known[0] is request:
            return known[1]
        plan = self._plan(request)
        state = State(plan, request.max_ids, plan.first_rest, TEXT, -1, 0, False)
        needed = plan.need(plan.first_rest)
        if request.max_ids < needed:
            raise RequestError(
                f"max_ids is {request.max_ids}, but {' + '.join([*plan.first_rest, 'eos'])} needs {needed} "
                f"ids at least; set max_ids to {needed} or more"
            )
        if len(self._plans) >= KNOWN_REQUESTS:  # a server meets new ones for ever
            self._plans.clear()
        self._plans[id(request)] = (request, state)
        return state

    def longest(self, request: Request) -> int:
        """Most ids the answer can have, eos included: `max_ids`, or less where an order bounds it."""
        plan = self.start(request).plan
        if not plan.ordered:
            return request.max_ids
        total = 1 + _markers(plan.first_rest)
        for name in plan.first_rest:
            most = plan.max_text if name == TEXT else plan.bounds[name].longest
            if most is None:
                return request.max_ids
            total += most if name == TEXT else most + 2
        return min(total, request.max_ids)

    def shortest(self, request: Request) -> int:
        """Fewest ids of an answer, eos included: the least useful `max_ids`, whatever the request's is."""
        plan = self._plan(request)
        return plan.need(plan.first_rest)

    def finished(self, state: State) -> bool:
        """Whether the answer is whole (eos is written)."""
        return state.done

    def allowed(self, state: State) -> Ranges:
        """The legal ids: sorted half-open ranges `(low, high)` that do not touch; none when finished."""
        plan, left, rest, modality, position, limit, done = state
        if done:
            return ()
        if modality != TEXT:
            shape = self._shapes[modality]
            if position == limit:
                return shape.end_only
            return shape.inside(position, plan.bounds[modality].shortest, limit)
        if 0 <= position < plan.min_text:
            return self._open(True, False, ())
        if position >= 0:
            text = position < plan.max_text and left > plan.need(rest, True)
            if rest[:1] == (TEXT,):  # only an order still wants a text inside of one
                return self._open(text, False, (), marker=True)
        else:
            text = self._may_open(state, TEXT)
        media = tuple(name for name in plan.media if self._may_open(state, name))
        empty = left == plan.max_ids and (text or bool(media))
        return self._open(text, not rest and not empty, media)

    def certain(self, state: State, most: int) -> list[Ranges]:
        """The legal ids of the next steps, as far as they do not depend on which of them are chosen.

        Args:
            state: of an answer that is not finished.
            most: steps at most.

        Returns:
            `allowed` of 1 to `most` steps: more than one only inside a media span, up to where it may end.
        """
        plan, _, _, modality, position, limit, _ = state
        if modality == TEXT or position == limit:
            return [self.allowed(state)]
        shape, shortest = self._shapes[modality], plan.bounds[modality].shortest
        stop = min(position + most, limit if position >= shortest else shortest)
        steps = [shape.inside(position, shortest, limit)]
        while position + len(steps) < stop and shape.end_only[0][0] != steps[-1][0][0]:
            steps.append(shape.inside(position + len(steps), shortest, limit))
        return steps

    def advance(self, state: State, token: int) -> State:
        """The state after one more id. Raises `GrammarError` if the id is not legal here."""
        for low, high in self.allowed(state):
            if low <= token < high:
                break
        else:
            raise GrammarError(self._illegal(state, token))
        plan, left, rest, modality, position, limit, _ = state
        left -= 1
        if modality != TEXT:
            if token == self._blocks[modality].end_id:
                return State(plan, left, rest, TEXT, -1, 0, False)
            return State(plan, left, rest, modality, position + 1, limit, False)
        if token == self.eos:
            return State(plan, left, rest, TEXT, position, 0, True)
        if token == self.marker:
            return State(plan, left, rest, TEXT, -1, 0, False)
        block = self.vocabulary.block_of_start(token)
        if block is not None:
            rest = plan.after(rest, block.modality)
            bounds = plan.bounds[block.modality]
            room = left - 1 - plan.need(rest)
            longest = room if bounds.longest is None else min(room, bounds.longest)
            limit = longest - (longest - bounds.shortest) % bounds.unit
            return State(plan, left, rest, block.modality, 0, limit, False)
        if position < 0:
            return State(plan, left, plan.after(rest, TEXT), TEXT, 1, 0, False)
        return State(plan, left, rest, TEXT, position + 1, 0, False)

    def parse(self, ids: Iterable[int]) -> list[Span]:
        """Splits an answer into its spans; a final eos is optional.

        Raises:
            GrammarError: a control id inside the answer.
            CodesError: a span that was cut, or whose codes are not those of its pattern.
        """
        sequence = np.array(list(ids), dtype=np.int64)
        if len(sequence) and sequence[-1] == self.eos:
            sequence = sequence[:-1]
        spans: list[Span] = []
        runs = self.vocabulary.split(sequence)
        for at, run in enumerate(runs):
            if run.kind == "control":
                beside = [runs[i].kind for i in (at - 1, at + 1) if 0 <= i < len(runs)]
                if run.name == "assistant" and beside == [TEXT, TEXT]:
                    continue
                raise GrammarError(
                    f"control {run.name!r} at position {run.start}; an answer holds only spans, the assistant's marker "
                    "between two texts, and one eos"
                )
            inner = sequence[run.start : run.stop]
            content = inner if run.kind == "text" else self.vocabulary.codes(run.name, inner[1:-1], "output")
            spans.append(Span(run.name, content))
        return spans

    def _may_open(self, state: State, modality: str) -> bool:
        """Whether a span of `modality` may come next, and fits."""
        plan, rest = state.plan, state.rest
        if plan.ordered:
            if not rest or rest[0] != modality:
                return False
        elif modality == TEXT and not plan.text:
            return False
        cost = plan.min_text if modality == TEXT else plan.bounds[modality].shortest + 2
        return state.left >= cost + plan.need(plan.after(rest, modality), modality == TEXT)

    def _open(self, text: bool, eos: bool, media: tuple[str, ...], marker: bool = False) -> Ranges:
        """Ranges of the open slice, made once for each choice."""
        key = (text, eos, media, marker)
        if key not in self._open_ranges:
            parts = [(0, self.vocabulary.text_size)] if text else []
            parts += [(self.eos, self.eos + 1)] if eos else []
            parts += [(self.marker, self.marker + 1)] if marker else []
            parts += [(self._blocks[name].start_id, self._blocks[name].start_id + 1) for name in media]
            merged: list[tuple[int, int]] = []
            for low, high in sorted(parts):
                if merged and merged[-1][1] == low:
                    merged[-1] = (merged[-1][0], high)
                else:
                    merged.append((low, high))
            self._open_ranges[key] = tuple(merged)
        return self._open_ranges[key]

    def _illegal(self, state: State, token: int) -> str:
        if state.done:
            return f"id {token} comes after eos; the answer is finished"
        where = "between spans" if state.position < 0 else f"at position {state.position} of a {state.modality} span"
        legal = ", ".join(f"{low}..{high - 1}" for low, high in self.allowed(state))
        return f"id {token} is not legal {where}; legal ids: {legal}"

    def _plan(self, request: Request) -> _Plan:
        known = {TEXT, *self._blocks}
        named = {
            "order": request.order or (),
            "required": request.required,
            "allowed": request.allowed or (),
            "forbidden": request.forbidden,
            "max_length": request.max_length,
            "min_frames": request.min_frames,
            "max_frames": request.max_frames,
        }
        for argument, names in named.items():
            for name in names:
                if name not in known:
                    raise RequestError(f"{argument} names {name!r}; this vocabulary has {', '.join(sorted(known))}")
        if request.min_text < 1:
            raise RequestError(f"min_text is {request.min_text}; a text span has at least 1 id")
        max_text = request.max_length.get(TEXT, max(request.max_ids, request.min_text))
        if max_text < request.min_text:
            raise RequestError(f"max_length of text is {max_text}, less than min_text {request.min_text}")

        if request.order is not None:
            if request.required or request.forbidden or request.allowed is not None:
                raise RequestError("give either order, or required, allowed and forbidden")
            if not request.order:
                raise RequestError("order is empty; name at least one modality, or leave it out")
            usable, rest = set(request.order), request.order
        else:
            usable = (known if request.allowed is None else set(request.allowed)) - set(request.forbidden)
            missing = set(request.required) - usable
            if missing:
                raise RequestError(f"{', '.join(sorted(missing))} is required, but not allowed or forbidden")
            if not usable:
                raise RequestError("every modality is forbidden; allow at least one")
            rest = tuple(sorted(request.required))
        media = tuple(block.modality for block in self.vocabulary.blocks if block.modality in usable)
        bounds = {name: self._shapes[name].bounds(request) for name in media}
        return _Plan(
            request.order is not None,
            request.max_ids,
            rest,
            media,
            TEXT in usable,
            request.min_text,
            max_text,
            bounds,
        )


class _Shape:
    """What the ids of one modality's output span look like."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.pattern = block.pattern_of("output")
        quantizers = block.num_quantizers
        if block.length is None and not self.pattern.variable:
            raise ManifestError(
                f"modality {block.modality!r} has spans of variable length and output pattern "
                f"{block.pattern!r}, which needs a fixed one; use "
                "'frame_major' or 'delay', or fix its grid"
            )
        self.unit = self.pattern.num_flat(2, quantizers) - self.pattern.num_flat(1, quantizers)
        end, size = block.end_id, block.codebook_size
        slices = [block.codebook_slice(k) for k in range(quantizers)]
        self.end_only: Ranges = ((end, end + 1),)
        self.codes: list[Ranges] = [(pair,) for pair in slices]
        self.code_or_end: Ranges = ((end, end + 1 + size),)  # the end id lies just before codebook 0
        self.fillers: list[Ranges] = [((low, low + 1),) for low, _ in slices]
        self.filler_or_end: Ranges = ((end, end + 2),)

    def bounds(self, request: Request) -> _Bounds:
        """Lengths that the block and the request allow."""
        block, quantizers, name = self.block, self.block.num_quantizers, self.block.modality
        if block.length is not None:
            return _Bounds(block.length, block.length, self.unit)
        fewest = request.min_frames.get(name, 1)
        most = request.max_frames.get(name)
        if fewest < 1 or (most is not None and most < fewest):
            raise RequestError(f"{name} spans of {fewest} to {most} frames: give 1 <= min_frames <= max_frames")
        shortest = self.pattern.num_flat(fewest, quantizers)
        lengths = [block.max_length, request.max_length.get(name)]
        lengths += [self.pattern.num_flat(most, quantizers)] if most is not None else []
        given = [length for length in lengths if length is not None]
        if given and min(given) < shortest:
            raise RequestError(
                f"{name} spans hold at most {min(given)} flat codes, and {fewest} frames need {shortest}; "
                "raise max_length or lower min_frames"
            )
        return _Bounds(shortest, min(given) if given else None, self.unit)

    def inside(self, position: int, shortest: int, limit: int) -> Ranges:
        """Legal ids at `position < limit` of a span that may end at `shortest`, `shortest + unit`, ..."""
        quantizers = self.block.num_quantizers
        may_end = position >= shortest and (position - shortest) % self.unit == 0
        if self.pattern is DELAY:
            # A slot that is filler at the longest possible length is filler at any: it holds code 0, as in
            # training.
            step, k = divmod(position, quantizers)
            num_frames = self.pattern.num_frames(limit, quantizers)
            if not 0 <= step - k < num_frames:
                return self.filler_or_end if may_end else self.fillers[k]
        elif not may_end:
            k = self.pattern.codebook_at(position, quantizers, limit)
        return self.code_or_end if may_end else self.codes[k]
