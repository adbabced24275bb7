"""`CodeSpec`: all that a vocabulary or a data set needs to know about a tokenizer, without its weights.

This file does not import torch and knows no concrete tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from anyglot_tokenizers.errors import ManifestError


@dataclass(frozen=True)
class CodeSpec:
    """Description of the codes `int64[batch, num_quantizers, *grid]` that a tokenizer writes.

    Attributes:
        modality: `"image"`, `"speech"`, `"music"`, ...
        codebook_sizes: number of entries of each quantizer.
        axes: names of the grid axes: `("time",)`, `("height", "width")`, `("query",)`.
        strides: input samples or pixels per code on each grid axis; None = not aligned (queries).
        sample_rate: Hz, or None for media without a sample rate.
        channels: channels of the media.
        causal: whether a code depends on no later input.
        context: (left, right) codes that suffice for exact chunked encoding and decoding; None = unbounded.
        chunk_multiple: chunks must start at a multiple of so many codes, where attention has windows of its own.
        license: licence of the weights.
        fingerprint: sha256 over configuration and weights; equal fingerprints mean equal tokenizers.
        fixed_grid: the grid where it does not depend on the input, such as `(32,)` for 32 queries; else empty.
        decodes: whether there is a decoder (some published tokenizers only encode).
        extras: names of tensors that `encode` gives and `decode` can use beside the codes (`Codes.extras`).
    """

    modality: str
    codebook_sizes: tuple[int, ...]
    axes: tuple[str, ...]
    strides: tuple[int | None, ...]
    sample_rate: int | None = None
    channels: int = 1
    causal: bool = False
    context: tuple[int, int] | None = None
    license: str = ""
    fingerprint: str = ""
    fixed_grid: tuple[int, ...] = ()
    decodes: bool = True
    extras: tuple[str, ...] = ()
    chunk_multiple: int = 1

    def __post_init__(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ManifestError(
                f"code spec: codebook_sizes {self.codebook_sizes} must hold one positive size per quantizer"
            )
        if not self.axes or len(self.axes) != len(self.strides) or any(s is not None and s < 1 for s in self.strides):
            raise ManifestError(
                f"code spec: axes {self.axes} need one positive stride (or null) each, got strides {self.strides}"
            )
        if self.chunk_multiple < 1:
            raise ManifestError(f"code spec: chunk_multiple {self.chunk_multiple} must be at least 1")
        if self.fixed_grid and (len(self.fixed_grid) != len(self.axes) or min(self.fixed_grid) < 1):
            raise ManifestError(f"code spec: fixed_grid {self.fixed_grid} needs one positive size per axis {self.axes}")
        if None in self.strides and not self.fixed_grid:
            raise ManifestError(f"code spec: strides {self.strides} need a fixed_grid, as the input says nothing of it")
        if self.sample_rate is not None and self.sample_rate < 1:
            raise ManifestError(f"code spec: sample_rate {self.sample_rate} must be positive (Hz) or null")

    @property
    def num_quantizers(self) -> int:
        """Number of codebooks, the size of the second axis of the codes."""
        return len(self.codebook_sizes)

    @property
    def codebook_size(self) -> int:
        """The size that all codebooks share. Raises ManifestError if they differ."""
        if len(set(self.codebook_sizes)) != 1:
            raise ManifestError(
                f"code spec: codebooks differ in size {self.codebook_sizes}; use codebook_sizes instead"
            )
        return self.codebook_sizes[0]

    @property
    def hop_length(self) -> int:
        """Samples per code (audio only)."""
        if self.axes != ("time",) or self.strides[0] is None:
            raise ManifestError(f"code spec: hop_length exists for axes ('time',) only, not {self.axes}; use strides")
        return self.strides[0]

    @property
    def frame_rate(self) -> float:
        """Codes per second of each quantizer (audio only), never rounded."""
        if self.sample_rate is None:
            raise ManifestError(f"code spec: {self.modality} has no sample rate and so no frame_rate; use strides")
        return self.sample_rate / self.hop_length

    @property
    def downsample_factor(self) -> int:
        """Pixels per code on each side (images only)."""
        if self.axes != ("height", "width") or self.strides[0] != self.strides[1] or self.strides[0] is None:
            raise ManifestError(
                f"code spec: downsample_factor exists for square image codes only; "
                f"axes {self.axes}, strides {self.strides}"
            )
        return self.strides[0]

    @property
    def bitrate(self) -> float:
        """Bits per second over all quantizers (audio only)."""
        return self.frame_rate * sum(math.log2(size) for size in self.codebook_sizes)

    def num_codes(self, length: int) -> int:
        """Positions on the first grid axis for `length` samples or pixels (a last partial hop counts).

        EnCodec at 48 kHz, whose segments overlap, has about 1 % more: see `Encodec.num_codes`.
        """
        return self.fixed_grid[0] if self.fixed_grid else -(-length // (self.strides[0] or 1))

    def grid(self, *size: int) -> tuple[int, ...]:
        """Grid for an input of `size` samples or pixels per axis: `grid(64, 64) == (4, 4)` for factor 16."""
        if len(size) != len(self.axes) and not self.fixed_grid:
            raise ManifestError(f"code spec: {len(self.axes)} sizes needed for axes {self.axes}, got {size}")
        if self.fixed_grid:
            return self.fixed_grid
        return tuple(-(-length // (stride or 1)) for length, stride in zip(size, self.strides, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its exact inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> CodeSpec:
        """Read `to_dict` output. Raises ManifestError for unknown, missing or mistyped entries."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(entries) - known)
        if unknown:
            raise ManifestError(f"code spec: unknown entries {unknown}; known are {sorted(known)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise ManifestError(f"code spec: {error}; entries given: {sorted(entries)}") from error
