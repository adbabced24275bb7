"""The engine: batched, grammar-constrained decoding of a causal language model, row by row as they come and go.

Three small steps, as in pytorch-labs/gpt-fast: prefill a prompt, choose one id for every row, feed it. What is special
here:

- Rows join when there is room and leave when they are done; each is at a place of its own (`cache.py`).
- Rows of a batch may be in different states. Rows that may say the same things are one *group*; only that group's
  slice of the LM head is multiplied, and only over that group's rows. An id without a choice needs no logits at all.
- Inside a span whose next slices are certain (a picture of fixed size), ids stay on the device: nothing is looked at
  until the last of them.
- Equal prompts that join together, such as those of several candidates, are computed once. What a row computed can be
  kept (`Memory`), and a later prompt that begins with the same ids goes on from there.

`generate` runs a list of prompts to the end. This file knows nothing of text, media or model folders (`unified.py` and
`stream.py` do), of which ids are legal (`grammar.py`), how one is chosen (`sampling.py`) or how layers run
(`decoder.py`).

Shape suffixes: B rows in flight, S streams (one a row, two with guidance), H hidden size, V vocabulary, G rows of a
group, C width of the group's slice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from anyglot_lm.grammar import Ranges, Request, SpanGrammar, State
from anyglot_lm.int8 import Int8Linear, int8_product
from anyglot_lm.sampling import GREEDY as GREEDY
from anyglot_lm.sampling import GenerationError as GenerationError
from anyglot_lm.sampling import Sampling as Sampling
from anyglot_lm.sampling import guided, join_all_ends, join_ends, level_text, penalise, row_draws, sample
from anyglot_lm.sampling import row_seeds as row_seeds
from anyglot_lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PREFILL_IDS = 4096
"""Ids of one pass over prompts, padding included; longer prompts take several."""

JOIN_FRACTION = 8
"""`generate` lets rows join as soon as one in so many is free."""

NO_SAMPLING = Sampling()


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022), among ids that are plausible without it (`sampling.guided`).

    logits = unconditional + scale * (conditional - unconditional)

    Args:
        prompts: one unconditional prompt for each row (for example the prompt with its content left out).
        scales: scale for each modality (`"text"` included); those not named use 1, which is no guidance.
    """

    prompts: Sequence[Sequence[int]]
    scales: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Memory:
    """What a row computed: its ids, and the keys and values `[L, 2, N, T, D]` of the first `T` of them."""

    ids: list[int]
    kv: Tensor

    def shared(self, prompt: Sequence[int]) -> int:
        """How many ids of a prompt need not be computed again; its last one always is."""
        most = min(self.kv.shape[3], len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)


@dataclass(eq=False)
class Row:
    """One answer in the making; made by `Engine.submit`.

    Attributes:
        ids: what is written so far, eos at the end.
        done: whether the answer is whole (or was cancelled).
        memory: where the row starts from; at the end, if `keep` is set, what a later row may start from.
    """

    prompts: list[list[int]]  # with guidance also the unconditional one
    state: State
    draws: np.ndarray
    sampling: Mapping[str, Sampling]
    scales: Mapping[str, float]
    memory: Memory | None = None
    keep: bool = False
    ids: list[int] = field(default_factory=list)
    done: bool = False
    slots: list[int] = field(default_factory=list)
    seen_V: Tensor | None = None

    def settings(self) -> tuple[str, Sampling, float, bool]:
        """What governs the next id: modality, sampling, scale of guidance, and whether it stands between spans."""
        modality = self.state.modality
        scale = float(self.scales.get(modality, 1.0)) if len(self.prompts) > 1 else 1.0
        return modality, self.sampling.get(modality, NO_SAMPLING), scale, self.state.position < 0


class Engine:
    """Decodes rows of one model. Not for several threads at once; between calls it does nothing.

    Args:
        model: a causal language model in float32 or bfloat16, with "sdpa" or "eager" attention; put into evaluation
            mode. `int8.quantize_int8` may have been over it.
        vocabulary: that the model was trained with.
        streams: rows in flight at most (guided rows count twice).
        capacity: ids of prompt and answer at most, default all positions of the model (or of its attention window):
            memory is taken for `streams` times as many.
        compile: run steps through torch.compile.
        join_at: streams that must be free before waiting rows join others in flight.

    Raises:
        GenerationError: the model does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        streams: int = 64,
        capacity: int | None = None,
        compile: bool = False,
        join_at: int = 1,
    ) -> None:
        from anyglot_lm.decoder import decoder_of, window_of

        implementation = model.config._attn_implementation
        if "flex" in implementation or "flash" in implementation:
            raise GenerationError(
                f"attention {implementation!r} is not supported here; load the model with attn_implementation='sdpa'"
            )
        self.head: Any = model.get_output_embeddings()
        self.weight_VH: Tensor = self.head.weight  # of rows in two parts it is made anew at each look
        if len(self.weight_VH) < vocabulary.size:
            raise GenerationError(
                f"the model has {len(self.weight_VH)} rows in its LM head and the vocabulary "
                f"{vocabulary.size} ids; use the vocabulary.json of the model's own folder"
            )
        model.eval()
        self.vocabulary, self.grammar = vocabulary, SpanGrammar(vocabulary)
        self._user = vocabulary.controls["user"]
        self.max_positions: int = model.config.max_position_embeddings
        window = window_of(model.config) or self.max_positions
        self.capacity = min(capacity or self.max_positions, self.max_positions, window)
        self.decoder = decoder_of(model, compile=compile)
        self.device = model.get_input_embeddings().weight.device
        with torch.inference_mode():
            self.cache = self.decoder.new_cache(streams, self.capacity)
        self.join_at = min(join_at, streams)
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self._hidden_SH = torch.empty(0, 0, device=self.device)  # by slot; takes its shape with the first prompt
        self._owners_S, self._in_order = torch.empty(0, dtype=torch.long, device=self.device), True
        self._slices: dict[Ranges, tuple[int, int, Tensor | None]] = {}
        self._known = {"text", *vocabulary.modalities}

    @property
    def busy(self) -> bool:
        """Whether any row is in flight or waiting."""
        return bool(self.rows or self.waiting)

    def submit(
        self,
        prompt: Sequence[int],
        request: Request,
        *,
        sampling: Mapping[str, Sampling] | None = None,
        seed: int = 0,
        unconditional: Sequence[int] | None = None,
        scales: Mapping[str, float] | None = None,
        memory: Memory | None = None,
        keep: bool = False,
        name: str = "the prompt",
    ) -> Row:
        """A row that waits for its turn.

        Args:
            prompt: ids.
            request: what the answer may look like.
            sampling: settings by modality, `"text"` for text; `"text"` also governs what stands between spans (a start
                id or eos). Modalities left out use `Sampling()`.
            seed: of the row's random numbers.
            unconditional, scales: prompt and scales of classifier-free guidance, see `Guidance`.
            memory: of an earlier row; what the prompts share is not computed again.
            keep: leave `row.memory` at the end.
            name: of the prompt in errors.

        Raises:
            GenerationError: prompt or settings do not fit.
            RequestError: a request that this vocabulary cannot fulfil.
        """
        for modality in [*(sampling or {}), *(scales or {})]:
            if modality not in self._known:
                raise GenerationError(
                    f"settings for unknown modality {modality!r}; this model has {sorted(self._known)}"
                )
        prompts = [list(prompt)] + ([list(unconditional)] if unconditional is not None else [])
        longest = self.grammar.longest(request)
        for stream in prompts:
            self._check_prompt(stream, longest, name)
        if len(prompts) > self.cache.slots:
            raise GenerationError("guidance needs two streams; make the engine with streams=2 or more")
        draws = row_draws(seed, longest)
        row = Row(prompts, self.grammar.start(request), draws, sampling or {}, scales or {}, memory, keep)
        self.waiting.append(row)
        return row

    def _check_prompt(self, prompt: list[int], longest: int, name: str) -> None:
        if not prompt:
            raise GenerationError(f"{name} is empty; a prompt holds at least the bos id")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary.size:
            raise GenerationError(f"{name} has ids outside 0..{self.vocabulary.size - 1}: another vocabulary?")
        if len(prompt) + longest > self.capacity:
            raise GenerationError(
                f"{name} has {len(prompt)} ids and the answer up to {longest}, but the model has "
                f"{self.capacity} positions; shorten the prompt or lower max_ids"
            )

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Ends a row where it stands; its room is free."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self._leave(row)
        row.done = True

    @torch.inference_mode()
    def step(self, most: int = 16) -> list[Row]:
        """Lets waiting rows join, and writes at least one id of every row in flight.

        Args:
            most: ids of a row at most. More than one are written only where the legal slices are certain (or the rest
                is forced).

        Returns:
            The rows that were in flight; those that are done have left.

        Raises:
            GenerationError: the logits are not finite. After any error the engine is empty, and all rows are done.
        """
        try:
            return self._step(most)
        except BaseException:
            for row in (*self.rows, *self.waiting):
                row.done = True
            self.rows = []
            self.waiting.clear()
            self.cache.clear()
            raise

    def _step(self, most: int) -> list[Row]:
        self._join()
        rows = self.rows[:]
        if not rows:
            return rows
        certain = [self.grammar.certain(row.state, most) for row in rows]
        steps = min(map(len, certain))
        draws_nB = torch.from_numpy(np.stack([row.draws[len(row.ids) : len(row.ids) + steps] for row in rows], 1)).to(
            self.device
        )
        settings = [row.settings() for row in rows]
        written, finite = [], torch.ones((), dtype=torch.bool, device=self.device)
        for i in range(steps):
            ids_B, good = self._choose([ranges[i] for ranges in certain], settings, draws_nB[i])
            finite &= good
            written.append(ids_B)
            if i + 1 < steps:
                self._feed(ids_B)
        values = torch.stack(written, 1).tolist()
        if not bool(finite):
            raise GenerationError(
                f"the model's logits for {settings[0][0]} are not finite; check its weights and dtype"
            )
        for row, ids in zip(rows, values, strict=True):
            self._write(row, ids)
        for row in rows:
            if row.done:
                self._leave(row)
        if self.rows:
            self._feed(torch.tensor([row.ids[-1] for row in self.rows], device=self.device))
        return rows

    def _join(self) -> None:
        """Prefills waiting rows, as many as there is room for."""
        if not self.waiting or (self.rows and self.cache.free < self.join_at):
            return
        alike: dict[tuple[int, ...], list[tuple[Row, int]]] = {}
        room = self.cache.free
        while self.waiting and len(self.waiting[0].prompts) <= room:
            row = self.waiting.popleft()
            room -= len(row.prompts)
            row.slots = [-1] * len(row.prompts)
            if any(s.repetition_penalty != 1 for s in row.sampling.values()):
                row.seen_V = torch.zeros(self.vocabulary.size, dtype=torch.bool, device=self.device)
            for stream, prompt in enumerate(row.prompts):
                if stream == 0 and row.memory is not None and row.memory.shared(prompt):
                    self._go_on(row, row.memory)
                else:
                    alike.setdefault(tuple(prompt), []).append((row, stream))
            self.rows.append(row)
        distinct = sorted(alike, key=len)
        while distinct:
            count = 1
            while count < len(distinct) and (count + 1) * len(distinct[count]) <= PREFILL_IDS:
                count += 1
            first = self._prefill([list(prompt) for prompt in distinct[:count]])
            for slot, same in enumerate(distinct[:count], first):
                for i, (row, stream) in enumerate(alike[same]):
                    row.slots[stream] = self._twin(slot) if i else slot
            del distinct[:count]
        self._index()

    def _prefill(self, prompts: list[list[int]]) -> int:
        """Runs prompts in slots of their own; returns the first one."""
        first = self.cache.open(len(prompts))
        hidden_SH = (
            self._pieces(first, prompts[0]) if len(prompts) == 1 else self.decoder.prefill(self.cache, first, prompts)
        )
        self._put(first, hidden_SH)
        return first

    def _pieces(self, slot: int, prompt: list[int]) -> Tensor:
        """One prompt of any length."""
        for start in range(0, len(prompt), PREFILL_IDS):
            hidden_SH = self.decoder.prefill(self.cache, slot, [prompt[start : start + PREFILL_IDS]])
        return hidden_SH

    def _go_on(self, row: Row, memory: Memory) -> None:
        """Puts what a row remembers into a slot, and runs the rest of its prompt."""
        slot, shared = self.cache.open(1), memory.shared(row.prompts[0])
        self.cache.restore(slot, memory.kv[..., :shared, :])
        self._put(slot, self._pieces(slot, row.prompts[0][shared:]))
        row.slots[0] = slot

    def _twin(self, slot: int) -> int:
        """Another slot with the same prompt."""
        twin = self.cache.open(1)
        self.cache.copy(slot, twin)
        self._put(twin, self._hidden_SH[slot : slot + 1])
        return twin

    def _put(self, first: int, hidden_SH: Tensor) -> None:
        if len(self._hidden_SH) < self.cache.slots:
            self._hidden_SH = hidden_SH.new_zeros(self.cache.slots, hidden_SH.shape[1])
        self._hidden_SH[first : first + len(hidden_SH)] = hidden_SH

    def _leave(self, row: Row) -> None:
        """Takes a row out of flight."""
        if row.keep:
            ids = row.prompts[0] + row.ids
            row.memory = Memory(ids, self.cache.read(row.slots[0]))
        owners = {slot: (other, stream) for other in self.rows for stream, slot in enumerate(other.slots)}
        for slot in sorted(row.slots, reverse=True):
            moved = self.cache.close(slot)
            if moved != slot:
                other, stream = owners[slot] = owners.pop(moved)
                other.slots[stream] = slot
                self._hidden_SH[slot] = self._hidden_SH[moved]
        self.rows.remove(row)
        row.seen_V = None
        self._index()

    def _index(self) -> None:
        """What depends on which rows are in which slots."""
        owners_S = [0] * len(self.cache.lengths)
        for i, row in enumerate(self.rows):
            for slot in row.slots:
                owners_S[slot] = i
        self._owners_S = torch.tensor(owners_S, device=self.device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._in_order = owners_S == list(range(len(self.rows)))  # slot i is row i

    def _feed(self, ids_B: Tensor) -> None:
        """Runs one more id of every row."""
        ids_S = ids_B if self._in_order else ids_B[self._owners_S]
        hidden_SH = self.decoder.step(self.cache, ids_S)
        self._hidden_SH[: len(hidden_SH)] = hidden_SH

    def _choose(
        self, ranges_B: Sequence[Ranges], settings_B: Sequence[tuple[str, Sampling, float, bool]], draws_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next id of every row, and whether all logits were finite."""
        groups: dict[Any, list[int]] = {}
        for i, (ranges, settings) in enumerate(zip(ranges_B, settings_B, strict=True)):
            groups.setdefault((ranges, *settings), []).append(i)
        ids_B = torch.empty(len(ranges_B), dtype=torch.long, device=self.device)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for (ranges, _, sampling, scale, between), members in groups.items():
            everyone = len(members) == len(ranges_B)
            members_G = slice(None) if everyone else self._on_device(members)
            low, high, mask_C = self._slice(ranges)
            if high - low == 1:
                ids_B[members_G] = low
                continue
            rows = [self.rows[i] for i in members]
            start = between and low < self.vocabulary.text_size < high
            streams = (0,) if scale == 1 else (0, 1)
            found = [self._logits(rows, stream, low, high, mask_C, between) for stream in streams]
            for logits_GC in found if start else ():
                level_text(logits_GC, slice(0, self.vocabulary.text_size - low), sampling.temperature)
            logits_GC = found[0] if scale == 1 else guided(found[0], found[1], scale)
            if sampling.repetition_penalty != 1:
                seen_GC = torch.stack([row.seen_V[low:high] for row in rows if row.seen_V is not None])
                logits_GC = penalise(logits_GC, seen_GC, sampling.repetition_penalty)
            finite &= torch.isfinite(logits_GC.amax(-1)).all()
            ids_B[members_G] = low + sample(logits_GC, draws_B[members_G], sampling)
        for i, row in enumerate(self.rows):
            if row.seen_V is not None:
                row.seen_V.index_fill_(0, ids_B[i : i + 1], True)
        return ids_B, finite

    def _logits(
        self, rows: list[Row], stream: int, low: int, high: int, mask_C: Tensor | None, between: bool
    ) -> Tensor:
        """float32[G, C]: the slice of the head over one stream of a group's rows, -inf where illegal, ends joined."""
        slots = [row.slots[stream] for row in rows]
        first = slots[0]
        consecutive = slots == list(range(first, first + len(slots)))
        where = slice(first, first + len(slots)) if consecutive else self._on_device(slots)
        logits_GC = self._head(self._hidden_SH[where], low, high).float()
        if mask_C is not None and low < self.vocabulary.text_size < high and not between:
            join_all_ends(logits_GC, slice(self.grammar.eos - low, self.vocabulary.open_size - low), mask_C)
        elif low <= self.grammar.eos < high:
            join_ends(logits_GC, self.grammar.eos - low, self._user - low)
        return logits_GC if mask_C is None else logits_GC + mask_C

    def _on_device(self, places: list[int]) -> Tensor:
        """Indices as a tensor, sent once while the same rows are in flight."""
        key = tuple(places)
        if key not in self._indices:
            self._indices[key] = torch.tensor(places, device=self.device)
        return self._indices[key]

    def _head(self, hidden_GH: Tensor, low: int, high: int) -> Tensor:
        bias_V = getattr(self.head, "bias", None)
        bias_C = None if bias_V is None else bias_V[low:high]
        if isinstance(self.head, Int8Linear):
            return int8_product(hidden_GH, self.weight_VH[low:high], self.head.scales[low:high], bias_C)
        return F.linear(hidden_GH, self.weight_VH[low:high].to(hidden_GH.dtype), bias_C)

    def _slice(self, ranges: Ranges) -> tuple[int, int, Tensor | None]:
        """(low, high, additive mask or None) of the smallest slice that holds all ranges; with text and what may end
        it, all that could.
        """
        if ranges not in self._slices:
            low, high = ranges[0][0], ranges[-1][1]
            mask_C = None
            if len(ranges) > 1:
                if low < self.vocabulary.text_size < high:
                    high = max(high, self.vocabulary.open_size)
                elif low <= self.grammar.eos < high:
                    high = max(high, self._user + 1)
                mask_C = torch.full((high - low,), -torch.inf, device=self.device)
                for start, stop in ranges:
                    mask_C[start - low : stop - low] = 0
            self._slices[ranges] = (low, high, mask_C)
        return self._slices[ranges]

    def _write(self, row: Row, ids: list[int]) -> None:
        """Appends ids, and the whole rest of the answer if it is forced."""
        for token in ids:
            row.state = self.grammar.advance(row.state, token)
        row.ids += ids
        state, tail = row.state, []
        while not self.grammar.finished(state):
            ranges = self.grammar.allowed(state)
            if len(ranges) > 1 or ranges[0][1] - ranges[0][0] > 1:
                return
            tail.append(ranges[0][0])
            state = self.grammar.advance(state, tail[-1])
        row.ids, row.state, row.done = row.ids + tail, state, True


def generate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Request] | Request,
    sampling: Mapping[str, Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    guidance: Guidance | None = None,
    on_row: Callable[[int, list[int]], None] | None = None,
    compile: bool = False,
) -> list[list[int]]:
    """Continues each prompt with ids that its request's grammar allows, eos included.

    Args:
        model: as for `Engine`; its mode comes back.
        vocabulary: the vocabulary that the model was trained with.
        prompts: ids of each row; lengths may differ.
        requests: one request for each row, or one for all.
        sampling: settings by modality, see `Engine.submit`.
        seed: one seed (row i then draws from `row_seeds(seed, n)[i]`) or one for each row.
        batch_size: rows in flight at once.
        guidance: classifier-free guidance; doubles the work of a batch.
        on_row: called with (row, ids) as soon as a row is done; rows finish in any order.
        compile: run steps through torch.compile.

    Returns:
        The new ids of each row, in the order of the prompts, without the prompt.

    Raises:
        GenerationError: the model, prompts or settings do not fit; or the model's logits are not finite.
        RequestError: a request that this vocabulary cannot fulfil.
    """
    per_row = [requests] * len(prompts) if isinstance(requests, Request) else list(requests)
    seeds = list(seed) if isinstance(seed, Sequence) else row_seeds(int(seed), len(prompts))
    lengths = {"requests": len(per_row), "seed": len(seeds)}
    if guidance is not None:
        lengths["guidance.prompts"] = len(guidance.prompts)
    for name, length in lengths.items():
        if length != len(prompts):
            raise GenerationError(f"{name} has {length} entries for {len(prompts)} prompts; give one for each")
    if batch_size < 1:
        raise GenerationError(f"batch_size is {batch_size}; it must be at least 1")
    if not prompts:
        return []
    streams = min(batch_size, len(prompts)) * (1 if guidance is None else 2)
    grammar = SpanGrammar(vocabulary)
    given = [*prompts, *(guidance.prompts if guidance else [])]
    capacity = max(map(len, given)) + max(grammar.longest(request) for request in per_row)
    was_training = model.training
    try:
        engine = Engine(
            model,
            vocabulary,
            streams=streams,
            capacity=capacity,
            compile=compile,
            join_at=-(-streams // JOIN_FRACTION),
        )
        # Rows with equal requests walk through the same states together: they share slices, and finish together.
        first_with: dict[str, int] = {}
        kinds = [first_with.setdefault(repr(request), i) for i, request in enumerate(per_row)]
        rows: dict[Row, int] = {}
        for i in sorted(range(len(prompts)), key=lambda i: (kinds[i], len(prompts[i]), i)):
            row = engine.submit(
                prompts[i],
                per_row[i],
                sampling=sampling,
                seed=seeds[i],
                unconditional=guidance.prompts[i] if guidance else None,
                scales=guidance.scales if guidance else None,
                name=f"prompt {i}",
            )
            rows[row] = i
        while engine.busy:
            for row in engine.step():
                if row.done and on_row is not None:
                    on_row(rows[row], row.ids)
    finally:
        model.train(was_training)
    found: list[list[int]] = [[]] * len(prompts)
    for row, i in rows.items():
        found[i] = row.ids
    return found
