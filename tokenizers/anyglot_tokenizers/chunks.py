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

from anyglot_tokenizers.checks import AUDIO, check_audio, check_count, check_media
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CodesError, MediaError, UnsupportedError

if TYPE_CHECKING:
    from anyglot_tokenizers.tokenizer import Tokenizer

MOST_ITEMS = 2**20  # in a stream


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
        MediaError: audio or lengths do not fit.
        CodesError: num_quantizers or chunk_codes is impossible.
    """
    left, right = context_of(tokenizer)
    _check_chunk(chunk_codes)
    spec = tokenizer.spec
    media, lengths = check_audio(media, lengths, spec.channels)
    used, lengths, hop = check_count(num_quantizers, spec.num_quantizers), lengths.cpu(), spec.hop_length
    counts, total = -(-lengths // hop), -(-media.shape[2] // hop)
    codes = torch.zeros(len(media), used, total, dtype=torch.int64, device=tokenizer.device)
    for first in range(0, int(counts.max()), chunk_codes):
        last = min(first + chunk_codes, total)
        start = max(first - left, 0) // spec.chunk_multiple * spec.chunk_multiple
        window = media[:, :, start * hop : (last + right) * hop]
        rows = (counts > first).nonzero()[:, 0]
        part = tokenizer.encode(
            window[rows], (lengths[rows] - start * hop).clamp(max=window.shape[2]), num_quantizers=used
        )
        codes[rows, :, first:last] = part.codes[:, :, first - start : last - start]
    return Codes(codes, counts.to(codes.device), spec)


def decode_chunked(tokenizer: Tokenizer, codes: Codes | Tensor, *, chunk_codes: int = 1000) -> Tensor:
    """The same audio as `tokenizer.decode`, `[batch, channels, T * hop_length]` on the CPU, in bounded memory.

    Raises:
        UnsupportedError: the tokenizer's context is unbounded.
        CodesError: the codes do not fit, or chunk_codes is impossible.
        FingerprintError: the codes are of another tokenizer.
    """
    left, right = context_of(tokenizer)
    _check_chunk(chunk_codes)
    ids, counts = tokenizer._unpack(codes)
    spec, total = tokenizer.spec, ids.shape[2]
    audio = torch.zeros(len(ids), spec.channels, total * spec.hop_length)
    for first in range(0, int(counts.max()), chunk_codes):
        last = min(first + chunk_codes, total)
        start = max(first - left, 0) // spec.chunk_multiple * spec.chunk_multiple
        window = ids[:, :, start : last + right]
        rows = (counts > first).nonzero()[:, 0]
        part = tokenizer.decode(Codes(window[rows], (counts[rows] - start).clamp(max=window.shape[2])))
        audio[rows, :, first * spec.hop_length : last * spec.hop_length] = part[
            :, :, (first - start) * spec.hop_length : (last - start) * spec.hop_length
        ].cpu()
    return audio


def _check_chunk(chunk_codes: int) -> None:
    if not isinstance(chunk_codes, int) or chunk_codes < 1:
        raise CodesError(f"chunk_codes {chunk_codes} must be a whole number, at least 1")


class Stream:
    """Codes of audio, or audio of codes, as it comes in: `encode` or `decode` any number of times, then `flush`.

    A stream goes one way and over once. What it gives, put together, equals the whole pass; it lags behind its input
    by the right context (and the rest of a hop). All items of the batch advance together.

    Args:
        tokenizer: never changed.
        batch_size: items.
        num_quantizers: use only the first so many.
        context: (left, right) codes that suffice; None = as the tokenizer's spec has it.

    Raises:
        UnsupportedError: the tokenizer's context is unbounded.
        MediaError: batch_size is impossible.
        CodesError: num_quantizers is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int = 1,
        *,
        num_quantizers: int | None = None,
        context: tuple[int, int] | None = None,
    ) -> None:
        self.left, self.right = context or context_of(tokenizer)
        if batch_size not in range(1, MOST_ITEMS + 1):
            raise MediaError("stream", f"batch_size {batch_size} is outside 1..{MOST_ITEMS}", "open several streams")
        self.tokenizer, self.batch_size, self.spec = tokenizer, batch_size, tokenizer.spec
        self.num_quantizers = check_count(num_quantizers, self.spec.num_quantizers)
        self.way = ""
        self.buffer: Tensor | None = None  # input from code number `start` on
        self.start = 0
        self.done = 0  # codes given out (encode) or turned into audio (decode)

    def encode(self, media: Tensor) -> Codes:
        """The codes `[batch, k, new]` that became certain with these further samples `[batch, channels, samples]`."""
        media = check_media("audio chunk", media, AUDIO, 3, self.spec.channels, empty=True)
        self._go("encode", media.to(self.tokenizer.device))
        assert self.buffer is not None
        ready = self.start + self.buffer.shape[2] // self.spec.hop_length - self.right
        return self._encode(max(ready, self.done))

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """The audio `[batch, channels, new samples]` that became certain with these further codes `[batch, k, n]`.

        Raises CodesError for items of unequal length: those of a stream end together.
        """
        ids_BKN, lengths_B = self.tokenizer._unpack(codes, empty=True)
        if isinstance(codes, Codes) and codes.lengths is not None and bool((lengths_B < ids_BKN.shape[2]).any()):
            raise CodesError(
                f"a stream takes as many codes of each item, got {lengths_B.tolist()}; open one for each, or use decode"
            )
        self._go("decode", ids_BKN)
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
        if len(chunk) != self.batch_size:
            problem = f"the stream has {self.batch_size} items, now come {len(chunk)}"
            raise CodesError(problem) if way == "decode" else MediaError("audio chunk", problem, "give all of them")
        if self.buffer is not None and self.buffer.shape[1] != chunk.shape[1]:
            raise CodesError(f"the stream began with {self.buffer.shape[1]} quantizers, now come {chunk.shape[1]}")
        self.way = way
        self.buffer = chunk.clone() if self.buffer is None else torch.cat([self.buffer, chunk], 2)

    def _encode(self, until: int) -> Codes:
        assert self.buffer is not None
        if until == self.done:
            return self._no_codes()
        codes = self.tokenizer.encode(self.buffer, num_quantizers=self.num_quantizers).codes
        codes = codes[:, :, self.done - self.start : until - self.start]
        self._advance(until, self.spec.hop_length)
        return Codes(codes, None, self.spec)

    def _decode(self, until: int) -> Tensor:
        hop = self.spec.hop_length
        assert self.buffer is not None
        if until == self.done:
            return self._no_audio()
        audio = self.tokenizer.decode(self.buffer)[:, :, (self.done - self.start) * hop : (until - self.start) * hop]
        self._advance(until, 1)
        return audio

    def _no_codes(self) -> Codes:
        none = torch.zeros(self.batch_size, self.num_quantizers, 0, dtype=torch.int64, device=self.tokenizer.device)
        return Codes(none, None, self.spec)

    def _no_audio(self) -> Tensor:
        return torch.zeros(self.batch_size, self.spec.channels, 0, device=self.tokenizer.device)

    def _advance(self, until: int, size: int) -> None:
        """Forget the input that no later code can depend on; `size` is the buffer's length per code."""
        assert self.buffer is not None
        self.done = until
        multiple = self.spec.chunk_multiple
        drop = max(until - self.left - self.start, 0) // multiple * multiple
        self.buffer = self.buffer[:, :, drop * size :].clone() if drop else self.buffer
        self.start += drop
