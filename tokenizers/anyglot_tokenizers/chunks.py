"""Long and endless audio: exact encoding and decoding in chunks of bounded memory, and streams.

Both rest on `CodeSpec.context`: a code depends on so many codes' worth of input to its left and right and on nothing
beyond, so a chunk computed with that much context and then cropped is what the whole pass would have given. Tokenizers
without such a bound (recurrent ones) are refused here, or bring a `stream` of their own that carries state.
This file knows time axes only, and no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CodesError, MediaError, UnsupportedError

if TYPE_CHECKING:
    from anyglot_tokenizers.tokenizer import Tokenizer


def context_of(tokenizer: Tokenizer) -> tuple[int, int]:
    """(left, right) codes that suffice. Raises UnsupportedError for tokenizers without a bound, or without time."""
    spec = tokenizer.spec
    if spec.axes != ("time",) or spec.context is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} cannot work in chunks: "
            + (f"its axes are {spec.axes}" if spec.axes != ("time",) else "its codes depend on unbounded context")
            + "; encode whole items"
        )
    return spec.context


def encode_chunked(
    tokenizer: Tokenizer,
    media: Tensor,
    lengths: Tensor | None = None,
    *,
    num_quantizers: int | None = None,
    chunk_codes: int = 1000,
) -> Codes:
    """The same codes as `tokenizer.encode`, in memory bounded by the chunk.

    Args:
        media: float `[batch, channels, samples]`.
        lengths: int64 `[batch]` samples; None = all.
        num_quantizers: use only the first so many.
        chunk_codes: codes per chunk, at least 1.

    Raises:
        UnsupportedError: the tokenizer's context is unbounded.
    """
    left, right = context_of(tokenizer)
    if media.ndim != 3 or media.numel() == 0:
        raise MediaError("audio batch", f"shape {list(media.shape)} does not fit", "need [batch, channels, samples]")
    hop = tokenizer.spec.hop_length
    lengths = torch.full((len(media),), media.shape[2]) if lengths is None else lengths.cpu()
    counts = -(-lengths // hop)
    total = -(-media.shape[2] // hop)
    parts = []
    for first in range(0, total, chunk_codes):
        last = min(first + chunk_codes, total)
        start = max(first - left, 0) // tokenizer.spec.chunk_multiple * tokenizer.spec.chunk_multiple
        window = media[:, :, start * hop : (last + right) * hop]
        rows = (counts > first).nonzero()[:, 0]
        got = tokenizer.encode(
            window[rows], (lengths[rows] - start * hop).clamp(max=window.shape[2]), num_quantizers=num_quantizers
        ).codes[:, :, first - start : last - start]
        part = got.new_zeros(len(media), got.shape[1], last - first)
        part[rows.to(got.device), :, : got.shape[2]] = got
        parts.append(part)
    return Codes(torch.cat(parts, 2), counts.to(parts[0].device), tokenizer.spec)


def decode_chunked(tokenizer: Tokenizer, codes: Codes | Tensor, *, chunk_codes: int = 1000) -> Tensor:
    """The same audio as `tokenizer.decode`, `[batch, channels, T * hop_length]` on the CPU, in bounded memory.

    Raises:
        UnsupportedError: the tokenizer's context is unbounded.
    """
    left, right = context_of(tokenizer)
    ids = codes.codes if isinstance(codes, Codes) else codes
    if ids.ndim != 3 or ids.shape[2] == 0:
        raise CodesError(f"audio codes must be [batch, quantizers, time >= 1], got {list(ids.shape)}")
    spec, total = tokenizer.spec, ids.shape[2]
    lengths = codes.lengths.cpu() if isinstance(codes, Codes) and codes.lengths is not None else None
    counts = torch.full((len(ids),), total) if lengths is None else lengths
    audio = torch.zeros(len(ids), spec.channels, total * spec.hop_length)
    theirs = codes.spec if isinstance(codes, Codes) else None
    for first in range(0, total, chunk_codes):
        last = min(first + chunk_codes, total)
        start = max(first - left, 0) // tokenizer.spec.chunk_multiple * tokenizer.spec.chunk_multiple
        window = ids[:, :, start : last + right]
        rows = (counts > first).nonzero()[:, 0]
        part = tokenizer.decode(Codes(window[rows], (counts[rows] - start).clamp(max=window.shape[2]), theirs))
        audio[rows, :, first * spec.hop_length : last * spec.hop_length] = part[
            :, :, (first - start) * spec.hop_length : (last - start) * spec.hop_length
        ].cpu()
    return audio


class Stream:
    """Codes of audio, or audio of codes, as it comes in: `encode` or `decode` any number of times, then `flush`.

    A stream goes one way and over once. What it gives, put together, equals the whole pass; it lags behind its input
    by the right context (and the rest of a hop). All items of the batch advance together.

    Args:
        tokenizer: with bounded `spec.context`; never changed.
        batch_size: items.
        num_quantizers: use only the first so many.

    Raises:
        UnsupportedError: the tokenizer's context is unbounded.
    """

    def __init__(self, tokenizer: Tokenizer, batch_size: int = 1, *, num_quantizers: int | None = None) -> None:
        self.left, self.right = context_of(tokenizer)
        self.tokenizer, self.batch_size, self.num_quantizers = tokenizer, batch_size, num_quantizers
        self.spec = tokenizer.spec
        self.way = ""
        self.buffer: Tensor | None = None  # input from code number `start` on
        self.start = 0
        self.done = 0  # codes given out (encode) or turned into audio (decode)

    def encode(self, media: Tensor) -> Codes:
        """The codes `[batch, k, new]` that became certain with these further samples `[batch, channels, samples]`."""
        self._go("encode", media)
        assert self.buffer is not None
        ready = self.start + self.buffer.shape[2] // self.spec.hop_length - self.right
        return self._encode(max(ready, self.done))

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """The audio `[batch, channels, new samples]` that became certain with these further codes `[batch, k, n]`."""
        ids = codes.codes if isinstance(codes, Codes) else codes
        self._go("decode", ids)
        assert self.buffer is not None
        return self._decode(max(self.start + self.buffer.shape[2] - self.right, self.done))

    def flush(self) -> Codes | Tensor:
        """What is still to come, after the last `encode` (codes) or `decode` (audio). Ends the stream."""
        way, self.way = self.way, "ended"
        if self.buffer is None:
            raise UnsupportedError(f"nothing to flush: the stream has {'ended' if way else 'not begun'}")
        if way == "encode":
            return self._encode(self.start - (-self.buffer.shape[2] // self.spec.hop_length))
        return self._decode(self.start + self.buffer.shape[2])

    def _go(self, way: str, chunk: Tensor) -> None:
        if self.way not in ("", way):
            raise UnsupportedError(
                f"this stream has {'ended' if self.way == 'ended' else 'gone the other way'}; open another"
            )
        if chunk.ndim != 3 or len(chunk) != self.batch_size:
            raise (
                MediaError(
                    "audio chunk",
                    f"shape {list(chunk.shape)} does not fit",
                    f"need [{self.batch_size}, channels, samples]",
                )
                if way == "encode"
                else CodesError(f"codes must be [{self.batch_size}, quantizers, n], got {list(chunk.shape)}")
            )
        self.way = way
        self.buffer = chunk.clone() if self.buffer is None else torch.cat([self.buffer, chunk], 2)

    def _encode(self, until: int) -> Codes:
        count = self.num_quantizers or self.spec.num_quantizers
        assert self.buffer is not None
        if until == self.done:
            return Codes(torch.zeros(self.batch_size, count, 0, dtype=torch.int64), None, self.spec)
        codes = self.tokenizer.encode(self.buffer, num_quantizers=self.num_quantizers).codes
        codes = codes[:, :, self.done - self.start : until - self.start]
        self._advance(until, self.spec.hop_length)
        return Codes(codes, None, self.spec)

    def _decode(self, until: int) -> Tensor:
        hop = self.spec.hop_length
        assert self.buffer is not None
        if until == self.done:
            return torch.zeros(self.batch_size, self.spec.channels, 0)
        audio = self.tokenizer.decode(self.buffer)[:, :, (self.done - self.start) * hop : (until - self.start) * hop]
        self._advance(until, 1)
        return audio

    def _advance(self, until: int, size: int) -> None:
        """Forget the input that no later code can depend on; `size` is the buffer's length per code."""
        assert self.buffer is not None
        self.done = until
        multiple = self.spec.chunk_multiple
        drop = max(until - self.left - self.start, 0) // multiple * multiple
        self.buffer = self.buffer[:, :, drop * size :].clone() if drop else self.buffer
        self.start += drop
