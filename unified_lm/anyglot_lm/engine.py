"""Batched, grammar-constrained decoding of a Hugging Face causal language model.

Three small steps, as in pytorch-labs/gpt-fast: prefill the prompts, choose one id per row, feed it. What is
special here:

- Rows of a batch may be in different states. Rows that may say the same things are one *group*; only that
  group's slice of the LM head is multiplied, and only over that group's rows. A row with a single legal id
  needs no logits at all.
- The key/value cache is preallocated, and compacted when enough rows are done.
- Every row has random numbers of its own (counter-based: Philox keyed by the row's seed), one per id. What a
  row says does not depend on which rows share its batch, up to the rounding of the matrix products.

This file knows nothing of text, media or model folders (`unified.py` does), and nothing of which ids are
legal (`grammar.py` does).

Shape suffixes: B rows in flight, S streams (= B, or 2B with guidance), T columns of the cache, H hidden size,
V vocabulary, G rows of a group, C width of the group's slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from anyglot_lm.grammar import Ranges, Request, SpanGrammar, State
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from anyglot_lm.cache import PreallocatedCache

PREFILL_MASK_ELEMENTS = 2**23
"""Prompts are prefilled in chunks of columns, so that no attention mask has more elements than this."""

COMPACT_FRACTION = 8
"""Finished rows leave the batch as soon as they are one in so many."""


class GenerationError(AnyglotError):
    """The model, the prompts or the settings do not allow generation."""


@dataclass(frozen=True)
class Sampling:
    """How to choose among the legal ids of one modality.

    Filters apply in the order repetition penalty, temperature, top-k, min-p, top-p.

    Args:
        temperature: divides the logits; 0 is greedy (filters are then ignored).
        top_k: keep only the k likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids up to this much probability (nucleus sampling, Holtzman et al. 2019).
        min_p: drop ids less likely than this share of the likeliest (Nguyen et al. 2024).
        repetition_penalty: divides positive and multiplies negative logits of ids that the row has already
            written in this answer (CTRL, Keskar et al. 2019); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps every id)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0 (1 is off)"),
        ]
        for name, value, good, rule in checks:
            if not good:
                raise GenerationError(f"Sampling.{name} is {value}; it must be {rule}")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022).

    logits = unconditional + scale * (conditional - unconditional)

    Args:
        prompts: one unconditional prompt for each row (for example the prompt with its content left out).
        scales: scale for each modality (`"text"` included); those not named use 1, which is no guidance.
    """

    prompts: Sequence[Sequence[int]]
    scales: Mapping[str, float]


def row_seeds(seed: int, num_rows: int) -> list[int]:
    """Seeds of the rows of `generate(..., seed=seed)`: pass one of them alone to repeat one row alone."""
    return [int(value) for value in np.random.SeedSequence(seed).generate_state(num_rows, np.uint64)]


@torch.inference_mode()
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
) -> list[list[int]]:
    """Continues each prompt with ids that its request's grammar allows, eos included.

    Args:
        model: `LlamaForCausalLM` or alike, in float32 or bfloat16, with "sdpa" or "eager" attention.
        vocabulary: the vocabulary that the model was trained with.
        prompts: ids of each row; lengths may differ.
        requests: one request for each row, or one for all.
        sampling: settings by modality, `"text"` for text; `"text"` also governs what stands between spans (a
            start id or eos). Modalities left out use `Sampling()`.
        seed: one seed (row i then draws from `row_seeds(seed, n)[i]`) or one for each row.
        batch_size: rows in flight at once.
        guidance: classifier-free guidance; doubles the work of a batch.
        on_row: called with (row, ids) as soon as a row is done; rows finish in any order.

    Returns:
        The new ids of each row, in the order of the prompts, without the prompt.

    Raises:
        GenerationError: the model, prompts or settings do not fit; or the model's logits are not finite.
        RequestError: a request that this vocabulary cannot fulfil.
    """
    per_row = [requests] * len(prompts) if isinstance(requests, Request) else list(requests)
    seeds = row_seeds(seed, len(prompts)) if isinstance(seed, int) else list(seed)
    lengths = {"requests": len(per_row), "seed": len(seeds)}
    if guidance is not None:
        lengths["guidance.prompts"] = len(guidance.prompts)
    for name, length in lengths.items():
        if length != len(prompts):
            raise GenerationError(f"{name} has {length} entries for {len(prompts)} prompts; give one for each")
    if batch_size < 1:
        raise GenerationError(f"batch_size is {batch_size}; it must be at least 1")
    grammar = SpanGrammar(vocabulary)
    decoder = _Decoder(model, vocabulary, grammar, dict(sampling or {}), guidance.scales if guidance else None)

    rows = []
    for i, (prompt, request, row_seed) in enumerate(zip(prompts, per_row, seeds, strict=True)):
        streams = [list(prompt)] + ([list(guidance.prompts[i])] if guidance else [])
        for stream in streams:
            decoder.check_prompt(i, stream, grammar.longest(request))
        draws = _uniform(row_seed, grammar.longest(request))
        rows.append(_Row(index=i, streams=streams, state=grammar.start(request), draws=draws))

    # Rows with equal requests walk through the same states together: they share slices, and finish together.
    first_with: dict[str, int] = {}
    kinds = [first_with.setdefault(repr(request), i) for i, request in enumerate(per_row)]
    order = sorted(rows, key=lambda row: (kinds[row.index], len(row.streams[0]), row.index))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            decoder.run(order[start : start + batch_size], on_row)
    finally:
        model.train(was_training)
    return [row.ids for row in rows]


def _uniform(seed: int, count: int) -> np.ndarray:
    """float64[count] in [0, 1): the row's random numbers, a multiple of 2**-32 each.

    The coarse step makes u * total < total exactly: inverse-CDF sampling can never land behind the last id.
    """
    bits = np.random.Philox(key=seed % 2**128).random_raw(count)
    return (bits >> np.uint64(32)).astype(np.float64) * 2.0**-32


@dataclass
class _Row:
    index: int
    streams: list[list[int]]  # the prompt, and with guidance the unconditional prompt
    state: State
    draws: np.ndarray
    ids: list[int] = field(default_factory=list)
    done: bool = False


class _Decoder:
    """What stays the same for all batches of one call of `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        grammar: SpanGrammar,
        sampling: dict[str, Sampling],
        scales: Mapping[str, float] | None,
    ) -> None:
        known = {"text"} | {block.modality for block in vocabulary.blocks}
        for name in [*sampling, *(scales or {})]:
            if name not in known:
                raise GenerationError(f"settings for unknown modality {name!r}; this model has {sorted(known)}")
        implementation = model.config._attn_implementation
        if "flex" in implementation or "flash" in implementation:
            raise GenerationError(
                f"attention {implementation!r} is not supported here; load the model with attn_implementation='sdpa'"
            )
        head: Any = model.get_output_embeddings()
        if head.weight.shape[0] < vocabulary.size:
            raise GenerationError(
                f"the model has {head.weight.shape[0]} rows in its LM head and the vocabulary "
                f"{vocabulary.size} ids; use the vocabulary.json of the model's own folder"
            )
        self.backbone: Any = model.get_decoder()
        self.weight_VH: Tensor = head.weight
        self.bias_V: Tensor | None = head.bias
        self.num_layers: int = model.config.num_hidden_layers
        self.max_positions: int = model.config.max_position_embeddings
        self.vocabulary, self.grammar, self.sampling, self.scales = vocabulary, grammar, sampling, scales
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self.num_streams = 1 if scales is None else 2
        self.penalised = any(s.repetition_penalty != 1 for s in sampling.values())
        self._slices: dict[Ranges, tuple[int, int, Tensor | None]] = {}

    def check_prompt(self, row: int, prompt: Sequence[int], longest: int) -> None:
        """Raises GenerationError if the row cannot be generated at all."""
        if not prompt:
            raise GenerationError(f"prompt {row} is empty; a prompt holds at least the bos id")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary.size:
            raise GenerationError(f"prompt {row} has ids outside 0..{self.vocabulary.size - 1}: another vocabulary?")
        if len(prompt) + longest > self.max_positions:
            raise GenerationError(
                f"prompt {row} has {len(prompt)} ids and the answer up to {longest}, but the model has "
                f"{self.max_positions} positions; shorten the prompt or lower max_ids"
            )

    def run(self, rows: list[_Row], on_row: Callable[[int, list[int]], None] | None) -> None:
        """Generates all of `rows` as one batch; fills `row.ids`."""
        hidden_SH, batch = self._prefill(rows)
        pad = self.vocabulary.controls["pad"]
        seen_BV = None
        if self.penalised:
            seen_BV = torch.zeros(len(rows), self.vocabulary.size, dtype=torch.bool, device=self.device)
        while True:
            chosen = self._choose(rows, hidden_SH, seen_BV)
            num_done = 0
            for row, token in zip(rows, chosen, strict=True):
                if not row.done and self._write(row, token) and on_row is not None:
                    on_row(row.index, row.ids)
                num_done += row.done
            if num_done == len(rows):
                return
            next_B = torch.tensor([pad if row.done else row.ids[-1] for row in rows], device=self.device)
            if seen_BV is not None:
                seen_BV[torch.arange(len(rows), device=self.device), next_B] = True
            if num_done * COMPACT_FRACTION >= len(rows):
                keep = [slot for slot, row in enumerate(rows) if not row.done]
                keep_B = torch.tensor(keep, device=self.device)
                keep_S = torch.cat([keep_B + stream * len(rows) for stream in range(self.num_streams)])
                batch.keep(keep_S)
                next_B = next_B[keep_B]
                rows = [rows[slot] for slot in keep]
                seen_BV = None if seen_BV is None else seen_BV[keep_B]
            hidden_SH = batch.feed(self.backbone, next_B.repeat(self.num_streams)[:, None])

    def _prefill(self, rows: list[_Row]) -> tuple[Tensor, _Batch]:
        from anyglot_lm.cache import PreallocatedCache

        streams = [row.streams[s] for s in range(self.num_streams) for row in rows]
        length = max(map(len, streams))
        capacity = length + max(len(row.draws) for row in rows)
        ids = torch.full((len(streams), length), self.vocabulary.controls["pad"], dtype=torch.long)
        for slot, stream in enumerate(streams):
            ids[slot, length - len(stream) :] = torch.tensor(stream)
        pads_S = torch.tensor([length - len(stream) for stream in streams], device=self.device)
        batch = _Batch(PreallocatedCache(self.num_layers, capacity), pads_S, capacity, self.dtype)
        ids = ids.to(self.device)
        chunk = max(1, PREFILL_MASK_ELEMENTS // (len(streams) * length))
        for start in range(0, length, chunk):
            hidden_SH = batch.feed(self.backbone, ids[:, start : start + chunk])
        return hidden_SH, batch

    def _choose(self, rows: list[_Row], hidden_SH: Tensor, seen_BV: Tensor | None) -> list[int]:
        """The next id of every row; -1 for rows that are done."""
        chosen = [-1] * len(rows)
        groups: dict[tuple[Ranges, str], list[int]] = {}
        for slot, row in enumerate(rows):
            if row.done:
                continue
            ranges = self.grammar.allowed(row.state)
            if len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1:
                chosen[slot] = ranges[0][0]
            else:
                groups.setdefault((ranges, row.state.modality), []).append(slot)
        for (ranges, modality), slots in groups.items():
            settings = self.sampling.get(modality, Sampling())
            low, high, mask_C = self._slice(ranges)
            everyone = len(slots) == len(rows)
            slots_G = None if everyone else torch.tensor(slots, device=self.device)
            logits_GC = self._logits(hidden_SH, slots_G, len(rows), low, high, modality)
            if mask_C is not None:
                logits_GC = logits_GC + mask_C
            if seen_BV is not None and settings.repetition_penalty != 1:
                seen_GC = (seen_BV if slots_G is None else seen_BV[slots_G])[:, low:high]
                logits_GC = penalise(logits_GC, seen_GC, settings.repetition_penalty)
            if not bool(torch.isfinite(logits_GC.amax(-1)).all()):
                raise GenerationError(f"the model's logits for {modality} are not finite; check its weights and dtype")
            draws = np.fromiter((rows[slot].draws[len(rows[slot].ids)] for slot in slots), np.float64, len(slots))
            picked = sample(logits_GC, torch.from_numpy(draws).to(self.device), settings)
            for slot, offset in zip(slots, picked.tolist(), strict=True):
                chosen[slot] = low + offset
        return chosen

    def _logits(
        self, hidden_SH: Tensor, slots_G: Tensor | None, num_rows: int, low: int, high: int, modality: str
    ) -> Tensor:
        """float32[G, C]: the slice of the head over the rows of a group, guided where asked."""

        def head(stream: int) -> Tensor:
            hidden_BH = hidden_SH[stream * num_rows : (stream + 1) * num_rows]
            hidden_GH = hidden_BH if slots_G is None else hidden_BH[slots_G]
            bias_C = None if self.bias_V is None else self.bias_V[low:high]
            return F.linear(hidden_GH, self.weight_VH[low:high], bias_C).float()

        scale = 1.0 if self.scales is None else float(self.scales.get(modality, 1.0))
        if scale == 1.0:
            return head(0)
        unconditional = head(1)
        return unconditional + scale * (head(0) - unconditional)

    def _slice(self, ranges: Ranges) -> tuple[int, int, Tensor | None]:
        """(low, high, additive mask or None) of the smallest slice that holds all ranges."""
        if ranges not in self._slices:
            low, high = ranges[0][0], ranges[-1][1]
            mask_C = None
            if len(ranges) > 1:
                mask_C = torch.full((high - low,), -torch.inf, device=self.device)
                for start, stop in ranges:
                    mask_C[start - low : stop - low] = 0
            self._slices[ranges] = (low, high, mask_C)
        return self._slices[ranges]

    def _write(self, row: _Row, token: int) -> bool:
        """Appends the id, and the whole rest of the answer if it is forced. True when the row is done."""
        row.ids.append(token)
        row.state = self.grammar.advance(row.state, token)
        state, tail = row.state, []
        while not self.grammar.finished(state):
            ranges = self.grammar.allowed(state)
            if len(ranges) > 1 or ranges[0][1] - ranges[0][0] > 1:
                return False
            tail.append(ranges[0][0])
            state = self.grammar.advance(state, tail[-1])
        row.ids, row.state, row.done = row.ids + tail, state, True
        return True


class _Batch:
    """The cache of the rows in flight, with what attention needs to know of the padding on their left."""

    def __init__(self, cache: PreallocatedCache, pads_S: Tensor, capacity: int, dtype: torch.dtype) -> None:
        self.cache, self.pads_S = cache, pads_S
        # Finite: a query on padding sees only padding, and must not become NaN.
        self.blocked = torch.finfo(dtype).min
        columns_T = torch.arange(capacity, device=pads_S.device)
        self.mask_S11T = torch.zeros(len(pads_S), 1, 1, capacity, dtype=dtype, device=pads_S.device)
        self.mask_S11T.masked_fill_((columns_T < pads_S[:, None])[:, None, None], self.blocked)

    def feed(self, backbone: Any, ids_SQ: Tensor) -> Tensor:
        """Runs Q more ids of every stream through the model; [S, H] of the last one."""
        start, stop = self.cache.length, self.cache.length + ids_SQ.shape[1]
        mask = self.mask_S11T[..., :stop]
        columns_Q = torch.arange(start, stop, device=ids_SQ.device)
        if stop - start > 1:
            later_QT = torch.arange(stop, device=ids_SQ.device) > columns_Q[:, None]
            mask = mask.masked_fill(later_QT, self.blocked)
        output = backbone(
            input_ids=ids_SQ,
            attention_mask=mask,
            position_ids=(columns_Q - self.pads_S[:, None]).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def keep(self, rows_S: Tensor) -> None:
        """Drops all other streams, and the columns that are padding for all that stay."""
        pads_S = self.pads_S[rows_S]
        shift = int(pads_S.min())
        self.cache.keep(rows_S, shift)
        self.pads_S = pads_S - shift
        self.mask_S11T = self.mask_S11T[rows_S][..., shift:]


def penalise(logits_GC: Tensor, seen_GC: Tensor, penalty: float) -> Tensor:
    """Makes ids already seen less likely (penalty > 1): divides positive logits, multiplies negative ones."""
    lower = torch.where(logits_GC > 0, logits_GC / penalty, logits_GC * penalty)
    return torch.where(seen_GC, lower, logits_GC)


def sample(logits_GC: Tensor, draws_G: Tensor, settings: Sampling) -> Tensor:
    """One id per row by inverse-CDF sampling: one random number per row and id, whatever the slice's width.

    Args:
        logits_GC: float32, -inf where illegal; at least one finite entry per row.
        draws_G: float64 in [0, 1), multiples of 2**-32.
        settings: temperature and filters.

    Returns:
        int64[G], offsets into the slice.
    """
    if settings.temperature == 0:
        return logits_GC.argmax(-1)
    logits_GC = (logits_GC - logits_GC.amax(-1, keepdim=True)) / settings.temperature
    if 0 < settings.top_k < logits_GC.shape[-1]:
        least_G1 = logits_GC.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_GC = logits_GC.masked_fill(logits_GC < least_G1, -torch.inf)
    if settings.min_p > 0:
        logits_GC = logits_GC.masked_fill(logits_GC < np.log(settings.min_p), -torch.inf)  # the best logit is 0
    if settings.top_p < 1:
        sorted_GC, order_GC = logits_GC.sort(-1, descending=True)
        shares_GC = sorted_GC.softmax(-1)
        before_GC = shares_GC.cumsum(-1) - shares_GC
        logits_GC = logits_GC.scatter(-1, order_GC, sorted_GC.masked_fill(before_GC >= settings.top_p, -torch.inf))
    total_GC = logits_GC.double().exp().cumsum(-1)
    return torch.searchsorted(total_GC, draws_G[:, None] * total_GC[:, -1:], right=True)[:, 0]
