"""The span grammar for `model.generate` of transformers: `SpanLogitsProcessor`.

    processor = SpanLogitsProcessor(vocabulary, Request(order=("image",)))
    ids = model.generate(**inputs, logits_processor=[processor], max_new_tokens=processor.max_new_tokens)

Each row of a batch has its own request and its own state, which advances by the one id that was written; the only
transfer from the device in a step is that id of each row. Greedy decoding and sampling work; what reorders rows or
takes ids back (beams, assisted generation) is an error. Classifier-free guidance, seeds by row and the sliced head are
`engine.py`, which is also faster.

Shape suffixes: B rows, T columns so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from anyglot_lm.constrain import Answer, Masks
from anyglot_lm.grammar import GrammarError, Request, RequestError, SpanGrammar
from anyglot_lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


class SpanLogitsProcessor(LogitsProcessor):
    """Lets each row write only what its request's grammar allows, and pad after eos. For one call of `generate`.

    Args:
        vocabulary: the vocabulary that the model was trained with.
        requests: one for all rows, or one for each prompt (with `num_return_sequences` each counts for all its rows).
        prompt_length: columns of the prompt, padding on the left included: one number, or one for each row. By default
            all that is there when generation begins; fewer where a prompt ends with the beginning of its answer.

    Raises:
        RequestError: a request that this vocabulary cannot fulfil.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        vocabulary: Vocabulary,
        requests: Request | Sequence[Request],
        prompt_length: int | Sequence[int] | None = None,
    ) -> None:
        self.grammar = SpanGrammar(vocabulary)
        self.requests = [requests] if isinstance(requests, Request) else list(requests)
        if not self.requests:
            raise RequestError("requests is empty; give one for all rows, or one for each prompt")
        self.prompt_length = prompt_length
        self.max_new_tokens = max(self.grammar.longest(request) for request in self.requests)
        """What `generate` needs as `max_new_tokens`, so that no answer is cut."""
        self._masks = Masks(vocabulary)
        self._answers: list[Answer] = []
        self._seen_BT: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores float `[B, V]` with -inf where an id is not legal.

        Args:
            input_ids: int64 `[B, T]`.
            scores: float `[B, V]`.

        Raises:
            GrammarError: the rows do not go on from those of the step before.
        """
        if self._seen_BT is None:
            self._begin(input_ids)
        else:
            self._follow(input_ids, self._seen_BT)
        self._seen_BT = input_ids
        return self._masks.fill_([answer.legal() for answer in self._answers], scores.clone())

    def _begin(self, ids_BT: Tensor) -> None:
        num_rows, num_columns = ids_BT.shape
        copies, rest = divmod(num_rows, len(self.requests))
        if rest:
            raise RequestError(f"{num_rows} rows and {len(self.requests)} requests; give one for all, or one for each")
        self._answers = [Answer(self.grammar, request) for request in self.requests for _ in range(copies)]
        if self.prompt_length is None:
            return
        lengths = [self.prompt_length] * num_rows if isinstance(self.prompt_length, int) else list(self.prompt_length)
        if len(lengths) != num_rows or min(lengths) < 0 or max(lengths) > num_columns:
            raise RequestError(
                f"prompt_length {lengths} for {num_rows} rows of {num_columns} columns; give one for each"
            )
        for row, (answer, ids, length) in enumerate(zip(self._answers, ids_BT.tolist(), lengths, strict=True)):
            self._feed(row, answer, ids[length:])

    def _follow(self, ids_BT: Tensor, seen_BT: Tensor) -> None:
        if ids_BT.shape != (seen_BT.shape[0], seen_BT.shape[1] + 1):
            raise GrammarError(
                f"rows of shape {tuple(ids_BT.shape)} after {tuple(seen_BT.shape)}, not one more id for each row; make "
                "a new SpanLogitsProcessor for each call of generate, and use no assisted generation"
            )
        same_B = (ids_BT[:, :-1] == seen_BT).all(1)
        new, same = torch.stack([ids_BT[:, -1], same_B.long()]).tolist()
        if not all(same):
            raise GrammarError(
                f"row {same.index(0)} does not go on from the step before: rows were reordered, as beam search does; "
                "use greedy decoding or sampling (num_beams=1)"
            )
        for row, (answer, token) in enumerate(zip(self._answers, new, strict=True)):
            self._feed(row, answer, [token])

    def _feed(self, row: int, answer: Answer, ids: list[int]) -> None:
        try:
            answer.feed(ids)
        except GrammarError as error:
            raise GrammarError(
                f"row {row}: {error}; what was written is not what was allowed: use greedy decoding or sampling "
                "(num_beams=1), and no other processor that forbids ids"
            ) from error
