"""A `SlotCache` as the `past_key_values` of a transformers model. Imports transformers; see `decoder.HFDecoder`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from anyglot_lm.cache import SlotCache


class HFCache(Cache):
    """One pass that `slots.begin_rows` or `slots.begin_step` has announced."""

    def __init__(self, slots: SlotCache) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `[S, N, Q, D]`; returns all columns that the pass may see."""
        return self.slots.append(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the pass."""
        return self.slots.stop - self.slots.positions_SQ.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns after the pass, offset)."""
        return self.slots.stop, 0
