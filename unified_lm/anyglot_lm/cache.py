"""A key/value cache that is written in place and loses rows as they finish.

transformers' `DynamicCache` copies the whole past at every step, and its `StaticCache` attends to all of its
columns from the first step on. This one has room for the longest answer from the start, and attention sees
only the columns in use.

It imports transformers, so import it where it is used. It knows nothing of masks, positions or sampling.

Shape suffixes: S streams (rows of the batch), N heads, T columns in use, Q new columns, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values `[S, N, capacity, D]` of one layer; the first `length` columns are in use."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the room, once shapes and dtype are known."""
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, like_SNQD: Tensor) -> Tensor:
        return like_SNQD.new_empty(*like_SNQD.shape[:2], self.capacity, like_SNQD.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends Q columns `[S, N, Q, D]`; returns views `[S, N, T, D]` of all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows_S: Tensor, shift: int) -> None:
        """Keeps the given rows only, and drops the first `shift` columns."""
        self.capacity -= shift
        self.keys, self.values = self._kept(self.keys, rows_S, shift), self._kept(self.values, rows_S, shift)
        self.length -= shift

    def _kept(self, old_SNTD: Tensor, rows_S: Tensor, shift: int) -> Tensor:
        used_SNTD = old_SNTD[:, :, shift : self.length][rows_S]
        room_SNTD = self._room(used_SNTD)
        room_SNTD[:, :, : used_SNTD.shape[2]] = used_SNTD
        return room_SNTD

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after `query_length` more, offset)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.capacity


class PreallocatedCache(Cache):
    """The layers of one model, as its `past_key_values`."""

    layers: list[PreallocatedLayer]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Columns in use."""
        return self.layers[0].length

    def keep(self, rows_S: Tensor, shift: int) -> None:
        """Keeps the given rows of every layer only, and drops the first `shift` columns."""
        for layer in self.layers:
            layer.keep(rows_S, shift)
