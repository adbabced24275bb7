"""Blocks: the ids and the patterns of one modality, and the requests they are made from.

`Vocabulary.build` decides where a block lies; this file knows no other block and no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anyglot_lm.patterns import Pattern
from anyglot_lm.patterns import pattern as find_pattern
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.spec import CodeSpec

Direction = Literal["input", "output"]


@dataclass(frozen=True)
class BlockSpec:
    """A request for a block: what `Vocabulary.build` turns into a `Block`.

    Args:
        modality: name of the modality, e.g. "image".
        fingerprint: the tokenizer's fingerprint.
        codebook_size: codes per codebook.
        num_quantizers: how many of the tokenizer's codebooks the LM writes (the first ones).
        pattern: pattern of output spans.
        input_pattern: pattern of input spans; the output's by default.
        grid: the grid of every span where it is fixed (images), e.g. (16, 16).
        max_frames: the most frames an output span may have where the grid is not fixed.
    """

    modality: str
    fingerprint: str
    codebook_size: int
    num_quantizers: int = 1
    pattern: str = "frame_major"
    input_pattern: str | None = None
    grid: tuple[int, ...] | None = None
    max_frames: int | None = None

    @classmethod
    def from_code_spec(
        cls,
        spec: CodeSpec,
        *,
        num_quantizers: int | None = None,
        pattern: str = "frame_major",
        input_pattern: str | None = None,
        grid: Sequence[int] | None = None,
        max_frames: int | None = None,
    ) -> BlockSpec:
        """The block of a tokenizer; by default the LM writes all quantizers that `pattern` holds."""
        if num_quantizers is not None and not 1 <= num_quantizers <= spec.num_quantizers:
            raise ManifestError(
                f"{spec.modality}: num_quantizers={num_quantizers}, but the tokenizer has "
                f"{spec.num_quantizers}; use 1 to {spec.num_quantizers}"
            )
        return cls(
            modality=spec.modality,
            fingerprint=spec.fingerprint,
            codebook_size=spec.codebook_size,
            num_quantizers=num_quantizers or find_pattern(pattern).num_codebooks(spec.num_quantizers),
            pattern=pattern,
            input_pattern=input_pattern,
            grid=tuple(grid) if grid is not None else None,
            max_frames=max_frames,
        )


@dataclass(frozen=True)
class Block:
    """The ids of one modality.

    `num_quantizers` is how many codebooks output spans hold; `grid` is the fixed grid of its codes or None;
    `length` the number of flat codes of an output span where it is fixed; `max_length` the most flat codes
    of one where it is not. Ids of codes are `first_id + codebook * codebook_size + code`, `end_id` is
    `first_id - 1`.
    """

    modality: str
    fingerprint: str
    num_quantizers: int
    codebook_size: int
    first_id: int
    start_id: int
    end_id: int
    pattern: str
    input_pattern: str
    grid: tuple[int, ...] | None
    length: int | None
    max_length: int | None

    @property
    def stop_id(self) -> int:
        """One past the last id of the block."""
        return self.first_id + self.num_quantizers * self.codebook_size

    def pattern_of(self, direction: Direction) -> Pattern:
        """The pattern of input or of output spans."""
        if direction not in ("input", "output"):
            raise ManifestError(f"direction must be 'input' or 'output', got {direction!r}")
        return find_pattern(self.pattern if direction == "output" else self.input_pattern)

    def codebook_slice(self, codebook: int) -> tuple[int, int]:
        """The ids `[lo, hi)` of a codebook, without the end id."""
        lo = self.first_id + codebook * self.codebook_size
        return lo, lo + self.codebook_size

    def span_length(self, direction: Direction) -> int | None:
        """Flat codes of a span where the grid is fixed, else None."""
        if self.grid is None:
            return None
        return self.pattern_of(direction).num_flat(int(np.prod(self.grid)), self.num_quantizers)


def make_block(spec: BlockSpec, *, start_id: int, end_id: int) -> Block:
    """Places a block. Raises `ManifestError` for sizes or patterns that make no sense."""
    what = f"block {spec.modality!r}"
    if spec.codebook_size < 1 or spec.num_quantizers < 1:
        raise ManifestError(
            f"{what}: codebook_size={spec.codebook_size}, num_quantizers={spec.num_quantizers}; both must be at least 1"
        )
    grid = tuple(int(n) for n in spec.grid) if spec.grid is not None else None
    if grid is not None and (not grid or min(grid) < 1):
        raise ManifestError(f"{what}: grid={grid}; every axis must be at least 1")
    out = find_pattern(spec.pattern)
    find_pattern(spec.input_pattern or spec.pattern)
    if grid is None and not out.variable:
        raise ManifestError(
            f"{what}: pattern {spec.pattern!r} cannot write spans of unknown length; fix the grid or use 'frame_major'"
        )
    if spec.max_frames is not None and spec.max_frames < 1:
        raise ManifestError(f"{what}: max_frames={spec.max_frames}; use at least 1, or None for no limit")
    num_quantizers = out.num_codebooks(spec.num_quantizers)
    if num_quantizers != spec.num_quantizers:
        raise ManifestError(
            f"{what}: the output pattern {spec.pattern!r} holds {num_quantizers} codebook, but "
            f"num_quantizers is {spec.num_quantizers}; set it to {num_quantizers} or choose 'frame_major'"
        )
    length = out.num_flat(int(np.prod(grid)), num_quantizers) if grid is not None else None
    most = out.num_flat(spec.max_frames, num_quantizers) if spec.max_frames is not None else None
    return Block(
        modality=spec.modality,
        fingerprint=spec.fingerprint,
        num_quantizers=num_quantizers,
        codebook_size=spec.codebook_size,
        first_id=end_id + 1,
        start_id=start_id,
        end_id=end_id,
        pattern=spec.pattern,
        input_pattern=spec.input_pattern or spec.pattern,
        grid=grid,
        length=length,
        max_length=length if length is not None else most,
    )


def spec_of(entry: Mapping[str, Any]) -> BlockSpec:
    """The request that a block of a JSON manifest was made from."""
    grid = entry["grid"]
    max_frames = None
    if grid is None and entry["max_length"] is not None and entry["num_quantizers"]:  # `make_block` says what 0 is
        max_frames = find_pattern(entry["pattern"]).num_frames(entry["max_length"], entry["num_quantizers"])
    return BlockSpec(
        modality=entry["modality"],
        fingerprint=entry["fingerprint"],
        codebook_size=entry["codebook_size"],
        num_quantizers=entry["num_quantizers"],
        pattern=entry["pattern"],
        input_pattern=entry["input_pattern"],
        grid=tuple(grid) if grid is not None else None,
        max_frames=max_frames,
    )
