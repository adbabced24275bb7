"""Patterns: codes `[K, *grid]` to one flat sequence of codes, and back.

A language model reads and writes one id after the other; a tokenizer with `K` quantizers gives `K` codes per
frame. A pattern fixes the order. It says, position by position, which codebook is legal there and where a
span may end, which is all that a grammar has to know. Every pattern has an exact inverse.

    codes (K=2, T=3)      first     frame_major     layer_major     delay (. = filler, code 0)
    a b c                 a b c     a x b y c z     a b c x y z     a . b x c y . z
    x y z

Nothing here knows ids, offsets or modalities: that is `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from anyglot_tokenizers.errors import CodesError, ManifestError

Int64 = NDArray[np.int64]


@runtime_checkable
class Pattern(Protocol):
    """An order of the codes of one span. `K` is the number of quantizers, a *frame* one cell of the grid."""

    name: str
    variable: bool
    """Whether `codebook_at` needs no total length, so that a span of unknown length can be generated."""

    def num_codebooks(self, num_quantizers: int) -> int:
        """How many of the `num_quantizers` codebooks the flat sequence holds."""
        ...

    def num_flat(self, num_frames: int, num_quantizers: int) -> int:
        """Length of the flat sequence of `num_frames` frames."""
        ...

    def num_frames(self, num_flat: int, num_quantizers: int) -> int:
        """Inverse of `num_flat`.

        Raises `CodesError` if no whole number of frames (at least one) has that length.
        """
        ...

    def may_end(self, num_flat: int, num_quantizers: int) -> bool:
        """Whether a span of `num_flat` flat codes is whole."""
        ...

    def codebook_at(self, position: int, num_quantizers: int, num_flat: int | None = None) -> int:
        """The codebook that is legal at `position`. `num_flat` is needed only if not `variable`."""
        ...

    def codebooks(self, num_flat: int, num_quantizers: int) -> Int64:
        """`codebook_at` of every position: int64 `[num_flat]`."""
        ...

    def flatten(self, codes: Int64) -> Int64:
        """Codes int64 `[K, *grid]` -> flat codes int64 `[num_flat]`."""
        ...

    def unflatten(self, flat: Int64, num_quantizers: int, grid: Sequence[int] | None = None) -> Int64:
        """Flat codes int64 `[num_flat]` -> codes int64 `[num_codebooks, *grid]` (or `[.., frames]`)."""
        ...


def _check_codes(codes: Any) -> Int64:
    array = np.asarray(codes)
    if array.ndim < 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise CodesError(
            f"codes must be a non-empty integer array [quantizers, *grid], got {array.dtype} of shape "
            f"{array.shape}; add the quantizer axis with codes[None] if it is missing"
        )
    return array.astype(np.int64, copy=False)


def _check_flat(flat: Any) -> Int64:
    array = np.asarray(flat)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise CodesError(f"flat codes must be a one-dimensional integer array, got {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=False)


class _Base:
    """What the patterns share: a flat sequence of `groups * num_codebooks` codes, groups outermost."""

    name: str
    variable: bool = True
    grid_ndim: int | None = None

    def num_codebooks(self, num_quantizers: int) -> int:
        return num_quantizers

    def num_flat(self, num_frames: int, num_quantizers: int) -> int:
        return num_frames * self.num_codebooks(num_quantizers)

    def num_frames(self, num_flat: int, num_quantizers: int) -> int:
        if not self.may_end(num_flat, num_quantizers):
            raise CodesError(
                f"{num_flat} flat codes are no whole number of frames in pattern {self.name!r} with "
                f"{num_quantizers} quantizers; cut or regenerate the span"
            )
        return num_flat // self.num_codebooks(num_quantizers)

    def may_end(self, num_flat: int, num_quantizers: int) -> bool:
        return num_flat > 0 and num_flat % self.num_codebooks(num_quantizers) == 0

    def codebook_at(self, position: int, num_quantizers: int, num_flat: int | None = None) -> int:
        return position % self.num_codebooks(num_quantizers)

    def codebooks(self, num_flat: int, num_quantizers: int) -> Int64:
        return np.arange(num_flat, dtype=np.int64) % self.num_codebooks(num_quantizers)

    def flatten(self, codes: Int64) -> Int64:
        codes_KT = self._frames(codes)
        return np.ascontiguousarray(codes_KT.T).reshape(-1)

    def unflatten(self, flat: Int64, num_quantizers: int, grid: Sequence[int] | None = None) -> Int64:
        flat = _check_flat(flat)
        num_frames = self.num_frames(len(flat), num_quantizers)
        codes_KT = flat.reshape(num_frames, self.num_codebooks(num_quantizers)).T
        return self._grid(codes_KT, grid)

    def _frames(self, codes: Int64) -> Int64:
        codes = _check_codes(codes)
        if self.grid_ndim is not None and codes.ndim - 1 != self.grid_ndim:
            raise CodesError(
                f"pattern {self.name!r} is for grids of {self.grid_ndim} axes, got codes of shape "
                f"{codes.shape}; use 'frame_major' for other grids"
            )
        return codes.reshape(codes.shape[0], -1)

    def _grid(self, codes_KT: Int64, grid: Sequence[int] | None) -> Int64:
        shape = tuple(grid) if grid is not None else (codes_KT.shape[1],)
        if self.grid_ndim is not None and len(shape) != self.grid_ndim:
            raise CodesError(f"pattern {self.name!r} needs a grid of {self.grid_ndim} axes to unflatten, got {grid}")
        if int(np.prod(shape)) != codes_KT.shape[1]:
            raise CodesError(f"{codes_KT.shape[1]} frames do not fill the grid {shape}; the span is cut or too long")
        return np.ascontiguousarray(codes_KT).reshape(codes_KT.shape[0], *shape)

    def __repr__(self) -> str:
        return f"Pattern({self.name!r})"


class _First(_Base):
    """Only the first codebook: what an LM reads when the other codebooks carry timbre it does not need."""

    name = "first"

    def num_codebooks(self, num_quantizers: int) -> int:
        return 1

    def flatten(self, codes: Int64) -> Int64:
        return np.ascontiguousarray(self._frames(codes)[0])


class _FrameMajor(_Base):
    """All codes of a frame, then the next frame."""

    name = "frame_major"


class _Raster(_Base):
    """Image grids `[K, H, W]` row by row, all codes of a cell together."""

    name = "raster"
    grid_ndim = 2


class _LayerMajor(_Base):
    """All frames of codebook 0, then all of codebook 1.

    Where a codebook starts depends on the length of the span.
    """

    name = "layer_major"
    variable = False

    def codebook_at(self, position: int, num_quantizers: int, num_flat: int | None = None) -> int:
        if num_flat is None:
            raise CodesError("pattern 'layer_major' needs the length of the span; use it for fixed lengths only")
        return position // self.num_frames(num_flat, num_quantizers)

    def codebooks(self, num_flat: int, num_quantizers: int) -> Int64:
        return np.arange(num_flat, dtype=np.int64) // self.num_frames(num_flat, num_quantizers)

    def flatten(self, codes: Int64) -> Int64:
        return self._frames(codes).reshape(-1).copy()

    def unflatten(self, flat: Int64, num_quantizers: int, grid: Sequence[int] | None = None) -> Int64:
        flat = _check_flat(flat)
        self.num_frames(len(flat), num_quantizers)
        return self._grid(flat.reshape(num_quantizers, -1).copy(), grid)


class _Delay(_Base):
    """Codebook `k` is `k` frames late (MusicGen, Copet et al. 2023, arXiv:2306.05284), then frame-major.

    `T` frames become `T + K - 1` steps of `K` codes. A slot before the start or after the end of its
    codebook holds *filler*: code 0 of the slot's own codebook, so that every position keeps exactly one
    legal codebook (`position % K`) and a grammar needs no extra ids. `unflatten` drops the slots whatever
    they hold, so that whatever a model writes there decodes; `flatten` always writes 0, and `is_forced` tells a
    loss which labels to leave out.
    """

    name = "delay"
    grid_ndim = 1

    def num_flat(self, num_frames: int, num_quantizers: int) -> int:
        return (num_frames + num_quantizers - 1) * num_quantizers if num_frames else 0

    def num_frames(self, num_flat: int, num_quantizers: int) -> int:
        return super().num_frames(num_flat, num_quantizers) - (num_quantizers - 1)

    def may_end(self, num_flat: int, num_quantizers: int) -> bool:
        return num_flat % num_quantizers == 0 and num_flat // num_quantizers >= num_quantizers

    def is_filler(self, num_flat: int, num_quantizers: int) -> NDArray[np.bool_]:
        """Which positions of a span of `num_flat` flat codes hold filler: bool `[num_flat]`."""
        num_frames = self.num_frames(num_flat, num_quantizers)
        steps, codebooks = np.divmod(np.arange(num_flat), num_quantizers)
        frames = steps - codebooks
        return (frames < 0) | (frames >= num_frames)

    def is_forced(self, num_flat: int, num_quantizers: int, *, fixed: bool) -> NDArray[np.bool_]:
        """Which filler no decoder chooses, bool `[num_flat]`: all of it in a span of fixed length.

        Else only that before a codebook starts: after its end the span might as well go on.
        """
        filler = self.is_filler(num_flat, num_quantizers)
        steps, codebooks = np.divmod(np.arange(num_flat), num_quantizers)
        return filler & (fixed | (steps < codebooks))

    def flatten(self, codes: Int64) -> Int64:
        codes_KT = self._frames(codes)
        num_quantizers, num_frames = codes_KT.shape
        delayed_SK = np.zeros((num_frames + num_quantizers - 1, num_quantizers), dtype=np.int64)
        for k in range(num_quantizers):
            delayed_SK[k : k + num_frames, k] = codes_KT[k]
        return delayed_SK.reshape(-1)

    def unflatten(self, flat: Int64, num_quantizers: int, grid: Sequence[int] | None = None) -> Int64:
        flat = _check_flat(flat)
        num_frames = self.num_frames(len(flat), num_quantizers)
        delayed_SK = flat.reshape(-1, num_quantizers)
        codes_KT = np.stack([delayed_SK[k : k + num_frames, k] for k in range(num_quantizers)])
        return self._grid(codes_KT, grid)


FIRST = _First()
FRAME_MAJOR = _FrameMajor()
LAYER_MAJOR = _LayerMajor()
DELAY = _Delay()
RASTER = _Raster()
PATTERNS: dict[str, Pattern] = {p.name: p for p in (FIRST, FRAME_MAJOR, LAYER_MAJOR, DELAY, RASTER)}


def pattern(name: str) -> Pattern:
    """The pattern called `name`. Raises `ManifestError` for an unknown one."""
    if name not in PATTERNS:
        raise ManifestError(f"unknown pattern {name!r}; use one of {', '.join(PATTERNS)}")
    return PATTERNS[name]
