"""The grammar as masks over logits: what the processors of transformers and of vLLM share.

`Answer` is one answer as another engine writes it, `Masks` applies what the answers of a batch may say next to their
logits, by one bool tensor on their device. This file knows neither of the engines; `engine.py` multiplies only the
legal slice of the head and needs no masks.

Shape suffixes: B rows, V vocabulary, M different masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from anyglot_lm.grammar import TEXT, Ranges, Request, SpanGrammar
from anyglot_lm.sampling import join_all_ends, join_ends
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Legal(NamedTuple):
    """What may come next, and whether that goes on with a text or ends it; of a full one only the end is open."""

    ranges: Ranges
    in_text: bool = False


FREE = Legal(((0, 2**62),))
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
        self._pad = Legal(((pad, pad + 1),))

    @property
    def done(self) -> bool:
        """Whether eos is written."""
        return self.grammar.finished(self.state)

    def legal(self) -> Legal:
        """What may come next; only pad after the end."""
        if self.done:
            return self._pad
        ranges = self.grammar.allowed(self.state)
        goes_on = ranges[0][0] < self.grammar.vocabulary.text_size
        return Legal(ranges, goes_on and self.state.modality == TEXT and self.state.position >= 0)

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
        self._ends = slice(self._eos, vocabulary.open_size)
        self._places: dict[Ranges, int] = {}
        self._table_MV: Tensor | None = None

    def fill_(self, legal: Sequence[Legal], logits: Tensor) -> Tensor:
        """Logits float `[B, V]` of the next ids, in place: -inf where illegal, ends as in `join_ends`, `join_all_ends`.

        Args:
            legal: of each row.
            logits: of the model.

        Raises:
            CheckpointError: there are fewer logits than ids.
        """
        illegal = self._illegal([row.ranges for row in legal], logits)
        texts = [row for row, (_, in_text) in enumerate(legal) if in_text]
        others = [row for row, found in enumerate(legal) if not found.in_text and found is not FREE]
        for rows, all_ends in ((texts, True), (others, False)):
            if not rows:
                continue
            at = slice(None) if len(rows) == len(legal) else torch.tensor(rows, device=logits.device)
            found_RV = logits[at]
            if all_ends:
                masked = found_RV.new_zeros(()).masked_fill(illegal if len(illegal) == 1 else illegal[at], -torch.inf)
                join_all_ends(found_RV, self._ends, masked)
            else:
                join_ends(found_RV, self._eos, self._user)
            logits[at] = found_RV
        return logits.masked_fill_(illegal, -torch.inf)

    def _illegal(self, legal: Sequence[Ranges], logits: Tensor) -> Tensor:
        """What to fill with -inf: bool `[B, V]`, or `[1, V]` where all rows may say the same."""
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
