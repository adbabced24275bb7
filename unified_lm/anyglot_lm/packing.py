"""Drawing and packing: pure functions on arrays, behind `plan`.

Best-fit decreasing (Johnson 1974): documents from the longest to the shortest, each into the fullest row that
has room. A search over the length of the draw makes the number of rows come out exactly; it counts rows
without assigning documents, at the cost of one small step per distinct length. This file reads no files.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.patterns import Int64


def draw(
    lengths: Int64,
    fits: NDArray[np.bool_],
    source_of_doc: Int64,
    share: NDArray[np.float64],
    budget: int,
    seq_len: int,
    seed: int,
) -> Int64:
    """Documents in drawing order: shuffled epochs per source, merged so that every prefix has the shares.

    Args:
        lengths: ids per document, int64 `[D]`.
        fits: which documents may be drawn, bool `[D]`.
        source_of_doc: source of every document, int64 `[D]`.
        share: wanted share of ids per source, float64 `[S]`, sums to 1.
        budget: ids wanted; what is drawn holds at least one row more.
        seq_len: ids of a row.
        seed: seed of the shuffling.

    Returns:
        Documents, int64 `[N]`, repeated where the budget asks for it.
    """
    docs, times = [], []
    horizon = budget + (len(share) + 1) * seq_len
    for source in np.flatnonzero(share > 0):
        mine = np.flatnonzero(fits & (source_of_doc == source))
        per_epoch = int(lengths[mine].sum())
        epochs = int(np.ceil(share[source] * horizon / per_epoch))
        rng = np.random.default_rng([seed, int(source), 0])
        order = np.concatenate([rng.permutation(mine) for _ in range(epochs)])
        taken = np.cumsum(lengths[order])
        order = order[: int(np.searchsorted(taken, share[source] * horizon)) + 1]
        docs.append(order)
        times.append((taken[: len(order)] - lengths[order] / 2) / share[source])
    merged = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(docs)[merged]


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


def pack(drawn: Int64, lengths: Int64, seq_len: int, num_packs: int, seed: int) -> tuple[Int64, Int64]:
    """Packs a prefix of `drawn` into exactly `num_packs` packs and shuffles them.

    Returns:
        `(offsets int64 [P + 1], docs int64 [N])`: pack p holds `docs[offsets[p] : offsets[p + 1]]`.
    """
    sizes = lengths[drawn]

    def packs_of(n: int) -> int:
        return count_packs(np.bincount(sizes[:n]), seq_len)

    low, high = 0, len(drawn)  # packs_of(low) <= num_packs < packs_of(high), for high by the sum of lengths
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
    bins, pack_of = assign(drawn[:low], lengths, seq_len)
    docs = drawn[:low]
    if bins < num_packs:  # one more document may open several packs at once: fill up one document each
        extra = num_packs - bins
        docs = np.concatenate([docs, drawn[low : low + extra]])
        pack_of = np.concatenate([pack_of, np.arange(bins, num_packs)])
    rng = np.random.default_rng([seed, 0, 1])
    place = rng.permutation(num_packs)[pack_of]
    order = np.lexsort((rng.random(len(docs)), place))
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=num_packs), out=offsets[1:])
    return offsets, docs[order]
