"""The grammar as masks over logits: what the processors of transformers and of vLLM share.

`Answer` is one answer as another engine writes it, `Masks` applies what the answers of a batch may say next to their
logits, by one bool tensor on their device. This file knows neither of the engines; `engine.py` multiplies only the
legal slice of the head and needs no masks.

Shape suffixes: B rows, V vocabulary, M different masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from anyglot_lm.grammar import Ranges, Request, SpanGrammar
from anyglot_lm.sampling import join_ends
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FREE: Ranges = ((0, 2**62),)
"""Every id is legal: a row that is no answer of ours."""


class Answer:
    """One answer that is being written; `count` ids so far.

    Args:
        grammar: of the vocabulary.
        request: what the answer may look like.

    Raises:
        RequestError: a request that the vocabulary cannot fulfil.
    """

    def __init__(self, grammar: SpanGrammar, request: Request) -> None:
        self.grammar, self.count = grammar, 0
        self.state = self._start = grammar.start(request)
        pad = grammar.vocabulary.pad_id
        self._pad: Ranges = ((pad, pad + 1),)

    @property
    def done(self) -> bool:
        """Whether eos is written."""
        return self.grammar.finished(self.state)

    def legal(self) -> Ranges:
        """What may come next; only pad after the end."""
        return self._pad if self.done else self.grammar.allowed(self.state)

    def feed(self, ids: Iterable[int]) -> None:
        """Takes what was written. After the end anything goes. Raises `GrammarError` if an id was not legal."""
        for token in ids:
            if not self.done:
                self.state = self.grammar.advance(self.state, token)
            self.count += 1

    def rewind(self, count: int) -> None:
        """To be called with how many ids are written: back to the first one if some were taken back."""
        if count < self.count:
            self.state, self.count = self._start, 0


class Masks:
    """Masks of illegal ids. Each set of ranges is laid out once; there are few, as they follow from the vocabulary.

    Args:
        vocabulary: whose ids the logits are of. Rows of the head beyond it are always illegal.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.size = vocabulary.size
        self._eos, self._user = vocabulary.controls["eos"], vocabulary.controls["user"]
        self._places: dict[Ranges, int] = {}
        self._table_MV: Tensor | None = None

    def fill_(self, legal: Sequence[Ranges], logits: Tensor) -> Tensor:
        """Logits float `[B, V]` of the next ids, in place: -inf where illegal, the chance of eos as in `join_ends`.

        Args:
            legal: of each row.
            logits: of the model.

        Raises:
            CheckpointError: there are fewer logits than ids.
        """
        illegal = self.illegal(legal, logits)
        ours = [row for row, ranges in enumerate(legal) if ranges is not FREE]
        if len(ours) == len(legal):
            join_ends(logits, self._eos, self._user)
        else:
            at = torch.tensor(ours, device=logits.device)
            logits[at, self._eos] = torch.logaddexp(logits[at, self._eos], logits[at, self._user])
        return logits.masked_fill_(illegal, -torch.inf)

    def illegal(self, legal: Sequence[Ranges], logits: Tensor) -> Tensor:
        """What to fill with -inf: bool `[B, V]`, or `[1, V]` where all rows may say the same.

        Args:
            legal: of each row.
            logits: gives V and the device.

        Raises:
            CheckpointError: there are fewer logits than ids.
        """
        table_MV = self._table(set(legal), logits)
        places = [self._places[ranges] for ranges in legal]
        if len(set(places)) == 1:
            return table_MV[places[0]][None]
        return table_MV[torch.tensor(places, device=table_MV.device)]

    def _table(self, needed: set[Ranges], logits: Tensor) -> Tensor:
        """bool [M, V] with rows for all of `needed`."""
        width = logits.shape[-1]
        if width < self.size:
            raise CheckpointError(
                f"the model has {width} logits and the vocabulary {self.size} ids; use the vocabulary.json of the "
                "model's own folder"
            )
        table_MV = self._table_MV
        if table_MV is None or table_MV.shape[1] != width or table_MV.device != logits.device:
            self._places.clear()
            table_MV = torch.empty(0, width, dtype=torch.bool, device=logits.device)
        new = [ranges for ranges in needed if ranges not in self._places]
        if new:
            rows = torch.ones(len(new), width, dtype=torch.bool, device=logits.device)
            for row, ranges in zip(rows, new, strict=True):
                self._places[ranges] = len(self._places)
                for low, high in ranges:
                    row[low:high] = False
            table_MV = torch.cat([table_MV, rows])
        self._table_MV = table_MV
        return table_MV
