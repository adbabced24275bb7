"""`NearDuplicateFilter`: dialogues that say again what an earlier one said. Belongs to the source, not to workers.

Whether a dialogue repeats an earlier one depends on all before it, so workers that run side by side would give answers
that change with their number. The filter is therefore `ordered`: it runs in the parent process, in source order, over
every item from the first, before any other stage; the pipeline runs ordered stages there. It needs no state on disk: a
run that goes on reads its source again from the start, and the filter with it, which costs a millisecond an item.
Beside the fixed tables of `dedup.py` it keeps 8 bytes an item.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anyglot_synth import dedup
from anyglot_synth.filters.base import Filter
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store


@dataclass
class NearDuplicateFilter(Filter):
    """Ends a dialogue that is much alike an earlier one, about the same pictures and recordings of the data.

    Args:
        threshold: similarity from which two are duplicates, 0 to 1 (`Deduplicator`).
        n: letters of the grams that are compared.
        capacity: how many texts are remembered.
    """

    name: ClassVar[str] = "near_duplicate"
    ordered: ClassVar[bool] = True
    """Runs in the parent, in source order."""
    threshold: float = 0.7
    n: int = 5
    capacity: int = 1 << 16
    _seen: dedup.Deduplicator | None = field(init=False, repr=False, default=None)
    _indexes: array[int] = field(init=False, repr=False, default_factory=lambda: array("q"))

    def setup(self) -> None:
        """A fresh memory: what is read again from the start is new again."""
        self._seen, self._indexes = dedup.Deduplicator(self.threshold, self.n, self.capacity), array("q")

    def config(self) -> dict[str, Any]:
        return super().config() | {"dedup": dedup.VERSION}

    def run(self, item: Item, store: Store | None = None) -> Item:
        if self._seen is None:
            self.setup()
        assert self._seen is not None
        if self._indexes and item.index <= self._indexes[-1]:
            raise AssertionError(f"item {item.index} after item {self._indexes[-1]}: this filter needs source order")
        match = self._seen.add(dedup.words_of(item.dialogue), dedup.given_of(item.dialogue))
        self._indexes.append(item.index)
        if match is None:
            return item
        earlier = self._indexes[match.number]
        raise Filtered("duplicate", f"as item {earlier} (similarity {match.similarity:.2f})", duplicate_of=earlier)
