"""The span grammar in vLLM: a logits processor for each of its two model runners, and what a request sends them.

    vllm serve EXPORTED --logits-processors anyglot_lm.vllm_processor:V2SpanProcessor

    params = SamplingParams(temperature=0.0, **sampling_arguments(vocabulary, Request(order=("image",))))
    llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].token_ids      # SpanGrammar.parse reads them

`V2SpanProcessor` is for Model Runner V2, vLLM's default; `V1SpanProcessor` for `VLLM_USE_V2_MODEL_RUNNER=0`. Both are
written against vLLM 0.33.0 and are made when they are first asked for, as their bases are vLLM's own classes: nothing
here needs vLLM before that. The vocabulary is the `vocabulary.json` of the folder that is served. Requests travel as
JSON in `SamplingParams.extra_args["anyglot"]` (over HTTP: `vllm_xargs`); those without are left alone.

A worker must not fail because of one request: what cannot be fulfilled there is logged and ends at once with eos.
`sampling_arguments` refuses it before it is sent.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from anyglot_lm.constrain import FREE, Answer, Masks
from anyglot_lm.grammar import GrammarError, Request, RequestError, SpanGrammar
from anyglot_lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

KEY = "anyglot"
"""Of a request in `extra_args`."""

_LOG = logging.getLogger(__name__)
_HOMES = {
    "V1SpanProcessor": "vllm.v1.sample.logits_processor",
    "V2SpanProcessor": "vllm.v1.worker.gpu.sample.logits_processor",
}


def sampling_arguments(vocabulary: Vocabulary, request: Request) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for a request: the request, and room for the whole answer.

    Raises:
        RequestError: a request that this vocabulary cannot fulfil.
    """
    grammar = SpanGrammar(vocabulary)
    grammar.start(request)
    return {
        "extra_args": {KEY: json.dumps(request.to_dict())},
        "max_tokens": grammar.longest(request),
        "stop_token_ids": [grammar.eos],
        "detokenize": False,
    }


def request_of(params: Any) -> Request | None:
    """The request in some `SamplingParams` (JSON text, or the object itself), capped by its `max_tokens`; or None.

    Raises:
        RequestError: it is none.
    """
    content = (params.extra_args or {}).get(KEY)
    if content is None:
        return None
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise RequestError(f"extra_args[{KEY!r}] is no JSON ({error}); use sampling_arguments") from error
    request = Request.from_dict(content)
    return replace(request, max_ids=min(request.max_ids, params.max_tokens or request.max_ids))


class _Processor:
    """What both runners share."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises `ValueError` for a request that is none. Whether it can be fulfilled only the worker knows."""
        try:
            request_of(sampling_params)
        except RequestError as error:
            raise ValueError(str(error)) from error

    def _open(self, vllm_config: Any) -> None:
        from transformers.utils import cached_file

        served = vllm_config.model_config
        path = cached_file(served.model, "vocabulary.json", revision=served.revision)
        self.vocabulary = Vocabulary.load(path)
        self.grammar = SpanGrammar(self.vocabulary)
        self._masks = Masks(self.vocabulary)

    def _answer(self, params: Any) -> Answer | None:
        try:
            request = request_of(params)
            return None if request is None else Answer(self.grammar, request)
        except RequestError as error:
            return self._ended(error)

    def _feed(self, answer: Answer, ids: list[int]) -> Answer:
        """`answer` with `ids`; one that can only end if they were not legal."""
        written = answer.count + len(ids)
        try:
            answer.feed(ids)
        except GrammarError as error:
            answer = self._ended(error)
            answer.count = written
        return answer

    def _ended(self, error: Exception) -> Answer:
        """An answer that can only end."""
        _LOG.warning("an answer ends with eos at once: %s", error)
        return Answer(self.grammar, Request(max_ids=1))

    def _fill(self, logits: Tensor, legal: list[Any]) -> Tensor:
        return self._masks.fill_(legal, logits)


class _V1(_Processor):
    """State by place in the batch. The lists of output ids are vLLM's own, which it extends in place."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._open(vllm_config)
        self._rows: dict[int, tuple[Answer, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest id may be illegal."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows requests into, out of and within the batch."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._rows.pop(place, None)
        for place, params, _, output_ids in batch_update.added:
            self._rows.pop(place, None)
            answer = self._answer(params)
            if answer is not None:
                self._rows[place] = (answer, output_ids)
        for place, other, direction in batch_update.moved:
            row, displaced = self._rows.pop(place, None), self._rows.pop(other, None)
            if row is not None:
                self._rows[other] = row
            if displaced is not None and direction.name == "SWAP":
                self._rows[place] = displaced

    def apply(self, logits: Tensor) -> Tensor:
        """Logits float32 `[B, V]` with -inf where an id is not legal, in place."""
        if not self._rows:
            return logits
        legal = [FREE] * len(logits)
        for place, (answer, ids) in self._rows.items():
            answer.rewind(len(ids))
            answer = self._feed(answer, ids[answer.count :])
            self._rows[place] = (answer, ids)
            legal[place] = answer.legal()
        return self._fill(logits, legal)


class _V2(_Processor):
    """State by request slot; ids are on the device, and the last one of each row is fetched in each step."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("span grammars need each id before the next: serve without speculative decoding")
        self._open(vllm_config)
        self._states = req_states
        self._answers: dict[int, Answer] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes the slot; whether its logits change."""
        self._answers.pop(req_idx, None)
        answer = self._answer(sampling_params)
        if answer is not None:
            self._answers[req_idx] = answer
        return answer is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Logits float32 `[B, V]` with -inf where an id is not legal, in place."""
        slots = ctx.idx_mapping_np.tolist()
        if not any(slot in self._answers for slot in slots):
            return logits
        legal = [FREE] * len(logits)
        last = ctx.input_ids.tolist()
        for row, (slot, seen) in enumerate(zip(slots, ctx.seq_lens_upper_bound_np.tolist(), strict=True)):
            if slot not in self._answers:
                continue
            answer, prompt = self._answers[slot], int(self._states.prompt_len.np[slot])
            answer.rewind(seen - prompt)
            if seen == prompt + answer.count + 1:
                new = [last[row]]
            else:  # the prompt is read in chunks, or the request comes back after it was preempted
                new = self._states.all_token_ids.gpu[slot, prompt + answer.count : max(prompt, seen)].tolist()
            answer = self._answers[slot] = self._feed(answer, new)
            legal[row] = answer.legal()
        return self._fill(logits, legal)


@cache
def _made(name: str) -> type:
    from importlib import import_module

    base = import_module(_HOMES[name]).LogitsProcessor
    ours = {"V1SpanProcessor": _V1, "V2SpanProcessor": _V2}[name]
    return type(name, (ours, base), {"__module__": __name__, "__doc__": ours.__doc__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)
