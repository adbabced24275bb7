"""Keys and values of many streams in one tensor: each stream has a slot, and grows at its own pace.

transformers' caches keep a batch together: all rows as long as the longest, padded on the left, none may join or
leave. Here a stream takes a free slot whenever there is one, its columns are its own positions from 0 on, and a slot is
copied, moved or given back without touching the others. Attention sees the columns in use; a mask hides what lies
beyond a stream's own length. A pass through a model is announced by `begin_rows` (several new positions of some
streams) or `begin_step` (one of every stream), then each layer calls `append`.

It knows nothing of prompts, models or sampling.

Shape suffixes: L layers, S streams, N heads of keys and values, T columns, Q new columns, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SlotCache:
    """Room for `slots` streams of `capacity` positions. Slots in use are always the first ones.

    Args:
        num_layers, num_heads, head_size: of the model's keys and values.
        slots: streams at most.
        capacity: positions of a stream at most.
        dtype, device: of keys and values.

    Attributes:
        lengths: positions of each stream so far; one entry per slot in use.
        mask: additive, for the pass that was begun: `[S or 1, 1, Q, T]`, or None where every stream sees all columns
            (one position) or the usual causal triangle from column 0 (several).
        positions_SQ: of the new columns, int64 `[S or 1, Q]`.
        stop: columns that the pass may see, the new ones included.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, slots, num_heads, capacity, head_size)
        self.kv_L2SNTD = torch.zeros(shape, dtype=dtype, device=device)  # a hidden column must still be a number
        self.hidden_S11T = torch.full((slots, 1, 1, capacity), -torch.inf, dtype=dtype, device=device)
        self.columns_T = torch.arange(capacity, device=device)
        self.slots_S = torch.arange(slots, device=device)
        self.slots, self.capacity = slots, capacity
        self.lengths: list[int] = []
        self.lengths_S = torch.zeros(slots, dtype=torch.long, device=device)  # the same, where the keys are
        self.mask: Tensor | None = None
        self.positions_SQ = self.columns_T[None, :0]
        self._streams = slice(0, 0)
        self._columns: slice | Tensor = slice(0, 0)
        self.stop = 0

    @property
    def free(self) -> int:
        """Slots that are not in use."""
        return self.slots - len(self.lengths)

    def open(self, count: int) -> int:
        """Takes `count` slots; returns the first one's number."""
        assert count <= self.free, "no free slot"
        first = len(self.lengths)
        self.lengths += [0] * count
        self.lengths_S[first : first + count] = 0
        self.hidden_S11T[first : first + count] = -torch.inf
        return first

    def close(self, slot: int) -> int:
        """Gives a slot back; the last one moves into its place. Returns the number that the moved one had."""
        last = len(self.lengths) - 1
        if slot != last:
            self.copy(last, slot)
        self.lengths.pop()
        return last

    def clear(self) -> None:
        """Gives all slots back, and forgets what they hold."""
        self.lengths = []
        self.kv_L2SNTD.zero_()

    def copy(self, source: int, target: int) -> None:
        """A slot becomes equal to another one."""
        length = self.lengths[source]
        self.kv_L2SNTD[:, :, target, :, :length] = self.kv_L2SNTD[:, :, source, :, :length]
        self._set_length(target, length)

    def read(self, slot: int) -> Tensor:
        """A copy of the columns of a slot, `[L, 2, N, T, D]`."""
        return self.kv_L2SNTD[:, :, slot, :, : self.lengths[slot]].clone()

    def restore(self, slot: int, kv_L2NTD: Tensor) -> None:
        """Puts what `read` gave, or its first columns, into a slot."""
        self.kv_L2SNTD[:, :, slot, :, : kv_L2NTD.shape[3]] = kv_L2NTD
        self._set_length(slot, kv_L2NTD.shape[3])

    def begin_rows(self, first: int, lengths: list[int]) -> None:
        """A pass over new positions of the slots `first ...`, which are equally long so far.

        Args:
            first: the first slot.
            lengths: new positions of each; rows are padded on the right to the longest.
        """
        start, width = self.lengths[first], max(lengths)
        self._streams = slice(first, first + len(lengths))
        self._columns, self.stop = slice(start, start + width), start + width
        self.positions_SQ = self.columns_T[None, start : start + width]
        self.mask = None
        if start:
            seen_QT = self.columns_T[: start + width] <= self.columns_T[start : start + width, None]
            self.mask = torch.zeros_like(seen_QT, dtype=self.hidden_S11T.dtype)
            self.mask = self.mask.masked_fill_(~seen_QT, -torch.inf)[None, None]
        for slot, length in enumerate(lengths, first):
            self._set_length(slot, start + length)

    def begin_step(self) -> None:
        """A pass over one new position of every stream."""
        streams, shortest, longest = len(self.lengths), min(self.lengths), max(self.lengths)
        self._streams, self.stop = slice(0, streams), longest + 1
        if shortest == longest:
            self._columns = slice(longest, longest + 1)
            self.positions_SQ = self.columns_T[None, longest : longest + 1].expand(streams, 1)
            self.hidden_S11T[:streams, ..., longest] = 0
            self.mask = None
        else:
            self._columns = self.lengths_S[:streams].clone()
            self.positions_SQ = self._columns[:, None]
            self.hidden_S11T[self.slots_S[:streams], 0, 0, self._columns] = 0
            self.mask = self.hidden_S11T[:streams, ..., : longest + 1]
        self.lengths = [length + 1 for length in self.lengths]
        self.lengths_S[:streams] += 1

    def append(self, layer: int, keys_SNQD: Tensor, values_SNQD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new columns of a layer; returns views `[S, N, T, D]` of all columns that the pass may see."""
        keys, values = self.kv_L2SNTD[layer, :, self._streams].unbind(0)
        if isinstance(self._columns, slice):
            keys[:, :, self._columns], values[:, :, self._columns] = keys_SNQD, values_SNQD
        else:
            streams_S = self.slots_S[: len(keys)]
            keys[streams_S, :, self._columns] = keys_SNQD[:, :, 0]
            values[streams_S, :, self._columns] = values_SNQD[:, :, 0]
        return keys[:, :, : self.stop], values[:, :, : self.stop]

    def _set_length(self, slot: int, length: int) -> None:
        self.hidden_S11T[slot, ..., :length] = 0
        self.hidden_S11T[slot, ..., length:] = -torch.inf
        self.lengths[slot] = length
        self.lengths_S[slot] = length
