"""Miss rates: the share of codes that change although the medium is the same.

The reference is each item encoded alone in float32. Compared with it: the same again, in a padded batch, in a batch
without padding (another batch shape), in chunks, as a stream, and with bfloat16 layers. A language model trained on one
kind of codes and fed another meets codes it has never seen. This file knows the interface of tokenizers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anyglot_tokenizers.chunks import encode_chunked
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.tokenizer import Tokenizer

CHUNK_CODES = 16  # few, so that short items too are cut often


def miss_rates(
    tokenizer: Tokenizer, items: Sequence[Tensor], *, num_quantizers: int | None = None
) -> dict[str, dict[str, Any]]:
    """Miss rate of every way to encode that this tokenizer has.

    Args:
        tokenizer: any.
        items: images `[3, H, W]` or audio `[C, samples]`, a few.
        num_quantizers: use only the first so many.

    Returns:
        way -> `rate`, `changed` and `codes` compared; or `skipped`: why this tokenizer cannot encode so.
    """

    def alone(item: Tensor) -> Tensor:
        return tokenizer.encode(item[None], num_quantizers=num_quantizers).item(0)

    def together(batch: Sequence[Tensor]) -> list[Tensor]:
        return list(tokenizer.encode(torch.stack(list(batch)), num_quantizers=num_quantizers))

    def padded(batch: Sequence[Tensor]) -> list[Tensor]:
        lengths = torch.tensor([item.shape[1] for item in batch])
        rows = [F.pad(item, (0, int(lengths.max()) - item.shape[1])) for item in batch]
        return list(tokenizer.encode(torch.stack(rows), lengths, num_quantizers=num_quantizers))

    def chunked(item: Tensor) -> Tensor:
        return encode_chunked(tokenizer, item[None], num_quantizers=num_quantizers, chunk_codes=CHUNK_CODES).item(0)

    def streamed(item: Tensor) -> Tensor:
        stream = tokenizer.stream(num_quantizers=num_quantizers)
        step = CHUNK_CODES * tokenizer.spec.hop_length
        pieces = [stream.encode(piece) for piece in item[None].split(step, dim=2)]
        last = stream.flush()
        assert isinstance(last, Codes)
        return torch.cat([*(piece.codes for piece in pieces), last.codes], 2)[0]

    def lowered(item: Tensor) -> Tensor:
        with Bfloat16Layers():
            return alone(item)

    def each(encode: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda batch: [encode(item) for item in batch]

    ways = {"again": (items, each(alone)), "bf16 layers": (items, each(lowered))}
    if tokenizer.spec.axes == ("time",):
        ways["padded batch"] = (_ragged(items), padded)
        ways["chunked"] = (items, each(chunked))
        ways["streamed"] = (items, each(streamed))
    ways["batch shape"] = (_equal(items), together)
    known: dict[int, Tensor] = {}  # of each item that is in several ways; `ways` keeps them all, so ids stay theirs

    def reference(item: Tensor) -> Tensor:
        if id(item) not in known:
            known[id(item)] = alone(item)
        return known[id(item)]

    rates: dict[str, dict[str, Any]] = {}
    for way, (batch, encode) in ways.items():
        try:
            pairs = list(zip(map(reference, batch), encode(batch), strict=True))
        except AnyglotError as error:
            rates[way] = {"skipped": str(error)}
            continue
        changed, codes = (sum(numbers) for numbers in zip(*(_difference(*pair) for pair in pairs), strict=True))
        rates[way] = {"rate": changed / codes, "changed": changed, "codes": codes}
    return rates


class Bfloat16Layers(TorchFunctionMode):
    """Inside, convolutions and most matrix products compute in bfloat16 and give float32, as under autocast.

    It reaches where a tokenizer switches autocast off for itself. What stays in float32: LSTMs, products fused with a
    sum (`addmm`, which our own quantizers search with, and some pointwise convolutions of the published codecs).
    """

    LAYERS = frozenset(
        {
            *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d),
            *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, F.scaled_dot_product_attention),
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.LAYERS:
            return func(*args, **kwargs)

        def lower(value: Any) -> Any:
            return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value

        return func(*map(lower, args), **{name: lower(value) for name, value in kwargs.items()}).float()


def _difference(one: Tensor, other: Tensor) -> tuple[int, int]:
    """(codes that differ, codes compared); positions that only one has count as changed."""
    if one.shape == other.shape:
        return int((one != other).sum()), one.numel()
    grid = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    most = max(one.numel(), other.numel())
    return most - int((one[grid] == other[grid]).sum()), most


def _ragged(items: Sequence[Tensor]) -> list[Tensor]:
    """Items of different lengths: as they are, or cut shorter one by one if all are of one length."""
    if len({item.shape[1] for item in items}) > 1:
        return list(items)
    return [item[:, : max(item.shape[1] * (20 - place) // 20, 1)] for place, item in enumerate(items)]


def _equal(items: Sequence[Tensor]) -> list[Tensor]:
    """Items cut to the size of the smallest."""
    smallest = [min(sizes) for sizes in zip(*(item.shape[1:] for item in items), strict=True)]
    return [item[(slice(None), *(slice(size) for size in smallest))] for item in items]
