"""Drawing and packing: pure functions on arrays, behind `plan`.

Best-fit decreasing (Johnson 1974): documents from the longest to the shortest, each into the fullest row that
has room. A search over the length of the draw makes the number of rows come out exactly; it counts rows
without assigning documents, at the cost of one small step per distinct length. This file reads no files.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.patterns import Int64
from anyglot_tokenizers.errors import AnyglotError


class PlanError(AnyglotError):
    """A mixture that cannot be had, or a broken plan."""


@dataclass(frozen=True)
class Draw:
    """What may be drawn, and how much of it.

    Attributes:
        lengths: ids per document, int64 `[D]`.
        before: how often every document was drawn by earlier phases, int64 `[D]`.
        source_of_doc: source of every document, -1 for those that may not be drawn: int64 `[D]`.
        share: wanted share of ids per source, float64 `[S]`, sums to 1.
        available: ids that every source may give, counted with their prompts: float64 `[S]`, inf for no limit.
        budget: ids wanted; what is drawn holds at least one row more, unless the sources have no more.
        seq_len: ids of a row.
        seed: seeds of the shuffling.
        dropout: probability of an unconditional document.
        unconditional: lengths of documents without their prompt, int64 `[N] -> [N]`; the whole length if they have
            none to drop.
    """

    lengths: Int64
    before: Int64
    source_of_doc: Int64
    share: NDArray[np.float64]
    available: NDArray[np.float64]
    budget: int
    seq_len: int
    seed: tuple[int, ...]
    dropout: float
    unconditional: Callable[[Int64], Int64]


def draw(wish: Draw) -> tuple[Int64, Int64]:
    """Documents in drawing order: shuffled epochs per source, merged so that every prefix has the shares.

    An epoch goes on where earlier phases stopped: a document is drawn again when all of its source were drawn as often.

    Returns:
        `(docs, sizes)`, int64 `[N]` each: documents, as their complement `~doc` if without prompt, and their ids.
    """
    docs, sizes, times = [], [], []
    horizon = wish.budget + (len(wish.share) + 1) * wish.seq_len
    for source in np.flatnonzero(wish.share > 0):
        mine = np.flatnonzero(wish.source_of_doc == source)
        order, size = _draw_source(
            wish, mine, np.random.default_rng([*wish.seed, 0, int(source)]), int(source), horizon
        )
        docs.append(order)
        sizes.append(size)
        times.append((np.cumsum(size) - size / 2) / wish.share[source])
    merged = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(docs)[merged], np.concatenate(sizes)[merged]


def _draw_source(wish: Draw, mine: Int64, rng: np.random.Generator, source: int, horizon: int) -> tuple[Int64, Int64]:
    """Shuffled epochs of the documents `mine` until their part of `horizon`, or all they may give, is reached."""
    target, available = wish.share[source] * horizon, wish.available[source]
    before = wish.before[mine]
    level, taken, whole = int(before.min()), 0, 0
    docs, sizes = [mine[:0]], [mine[:0]]
    while taken < target and whole < available:
        epoch = rng.permutation(mine[before <= level])
        size = wish.lengths[epoch]
        whole += int(size.sum())
        if wish.dropout:
            chosen = np.flatnonzero(rng.random(len(epoch)) < wish.dropout)
            size[chosen] = wish.unconditional(epoch[chosen])
            epoch = np.where(size < wish.lengths[epoch], ~epoch, epoch)
        docs.append(epoch)
        sizes.append(size)
        taken += int(size.sum())
        level += 1
    order, size = np.concatenate(docs), np.concatenate(sizes)
    stop = int(np.searchsorted(np.cumsum(size), target)) + 1
    if whole > available:
        stop = min(stop, int(np.searchsorted(np.cumsum(wish.lengths[numbers_of(order)]), available, side="right")))
    return order[:stop], size[:stop]


def numbers_of(docs: NDArray[Any]) -> Int64:
    """Documents of a plan `[N]` without the mark of those that lost their prompt: `d` for `d` and for `~d`."""
    return np.where(docs < 0, ~docs, docs).astype(np.int64)


def count_packs(counts: Int64, seq_len: int) -> int:
    """How many packs `assign` makes of `counts[n]` documents of each length `n`.

    Packs are kept as a count per free space, so the cost grows with the number of distinct lengths only.
    """
    bins = 0
    free_counts: dict[int, int] = {}
    spaces: list[int] = []

    def put(space: int, count: int) -> None:
        if not space or not count:
            return
        if space not in free_counts:
            insort(spaces, space)
            free_counts[space] = 0
        free_counts[space] += count

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        at = bisect_left(spaces, length)
        while left:
            if at < len(spaces):
                space = spaces.pop(at)
                available = free_counts.pop(space)
            else:
                space = seq_len
                available = -(-left // (seq_len // length))
                bins += available
            each = space // length
            full = min(available, left // each)
            left -= full * each
            put(space - each * length, full)
            if full < available and left:
                put(space - left * length, 1)
                put(space, available - full - 1)
                left = 0
            else:
                put(space, available - full)
            at = bisect_left(spaces, length)
    return bins


def assign(docs: Int64, lengths: Int64, seq_len: int) -> tuple[int, Int64]:
    """Best-fit decreasing of `docs` `[N]`: number of packs, and the pack of every document, int64 `[N]`."""
    order = np.argsort(-lengths[docs], kind="stable")
    pack_of = np.empty(len(docs), dtype=np.int64)
    spaces: list[int] = []
    bins_of: dict[int, list[int]] = {}
    bins = 0
    for i, length in zip(order.tolist(), lengths[docs[order]].tolist(), strict=True):
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            stack = bins_of[space]
            chosen = stack.pop()
            if not stack:
                del bins_of[space]
                spaces.pop(at)
        else:
            space, chosen = seq_len, bins
            bins += 1
        pack_of[i] = chosen
        space -= length
        if space:
            if space not in bins_of:
                insort(spaces, space)
                bins_of[space] = []
            bins_of[space].append(chosen)
    return bins, pack_of


def pack(drawn: Int64, sizes: Int64, seq_len: int, num_packs: int, seed: Sequence[int]) -> tuple[Int64, Int64]:
    """Packs a prefix of `drawn` `[N]`, of `sizes` `[N]` ids, into exactly `num_packs` packs and shuffles them.

    Returns:
        `(offsets int64 [P + 1], docs int64 [M])`: pack p holds `docs[offsets[p] : offsets[p + 1]]`.

    Raises:
        PlanError: what was drawn fills fewer packs.
    """

    def packs_of(n: int) -> int:
        return count_packs(np.bincount(sizes[:n]), seq_len)

    low, high = 0, len(drawn) + 1  # packs_of(low) <= num_packs < packs_of(high), if there is enough
    total = np.cumsum(sizes)
    guess = int(np.searchsorted(total, num_packs * seq_len))
    guesses = 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        made = packs_of(guess)
        if made <= num_packs:
            low = guess
        else:
            high = guess
        guesses += 1
        guess = int(np.searchsorted(total, total[guess - 1] * num_packs / made)) if guesses < 8 else low
        if not low < guess < high:
            guess = (low + high) // 2
    bins, pack_of = assign(np.arange(low), sizes, seq_len)
    # One more document may open several packs at once: fill up one document each.
    count = low + num_packs - bins
    if count > len(drawn):
        raise PlanError(f"all that may be drawn fills {bins} packs instead of {num_packs}; lower num_packs or add data")
    docs = drawn[:count]
    pack_of = np.concatenate([pack_of, np.arange(bins, num_packs)])
    rng = np.random.default_rng([*seed, 1])
    place = rng.permutation(num_packs)[pack_of]
    order = np.lexsort((rng.random(len(docs)), place))
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=num_packs), out=offsets[1:])
    return offsets, docs[order]
