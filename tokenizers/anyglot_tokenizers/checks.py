"""What every tokenizer asks of its input, in one place: the same mistake is the same error of one line everywhere.

This file knows types, shapes and ranges, and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyglot_tokenizers.errors import CodesError, MediaError

AUDIO = "float32[batch, channels, samples]"


def check_media(name: str, media: Tensor, form: str, ndim: int, channels: int, *, empty: bool = False) -> Tensor:
    """Media as float32. Raises MediaError if they are not finite floats `[batch, channels, ...]`.

    Args:
        name: of the media, for messages.
        media: to check.
        form: what is needed, for messages.
        ndim: number of axes.
        channels: size of the second axis.
        empty: whether other axes may be empty.
    """
    if not isinstance(media, Tensor):
        raise MediaError(name, f"is of type {type(media).__name__}", f"need a tensor {form}")
    if media.ndim != ndim or media.shape[1] != channels:
        raise MediaError(name, f"shape {list(media.shape)} does not fit", f"need {form} with {channels} channels")
    if not media.is_floating_point():
        raise MediaError(name, f"dtype {media.dtype} is not floating point", f"need {form}")
    if media.numel() == 0 and not empty:
        raise MediaError(name, f"shape {list(media.shape)} is empty", "drop empty items before encoding")
    media = media.float()
    if not bool(torch.isfinite(media).all()):
        raise MediaError(name, "holds NaN or infinite values", "clean the item before encoding")
    return media


def check_lengths(name: str, lengths: Tensor | None, media: Tensor) -> Tensor:
    """Samples per item of `[batch, channels, samples]`, int64 `[batch]` in 1..samples; None = all.

    On the device they come on, or that of the media. Raises MediaError.
    """
    batch, _, samples = media.shape
    if lengths is None:
        return torch.full((batch,), samples, device=media.device)
    if not isinstance(lengths, Tensor) or lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise MediaError(name, f"lengths are {_kind(lengths)}", f"need int64[{batch}], in samples")
    if int(lengths.min()) < 1 or int(lengths.max()) > samples:
        found = f"lengths {lengths.tolist()[:8]} leave 1..{samples}"
        raise MediaError(name, found, "drop empty items, in samples")
    return lengths


def check_audio(
    media: Tensor, lengths: Tensor | None, channels: int, name: str = "audio batch"
) -> tuple[Tensor, Tensor]:
    """Audio float32 `[batch, channels, samples]` and its lengths; see `check_media` and `check_lengths`."""
    media = check_media(name, media, AUDIO, 3, channels)
    return media, check_lengths(name, lengths, media)


def check_images(
    media: Tensor, lengths: Tensor | None, *, factor: int = 1, size: tuple[int, int] | None = None
) -> Tensor:
    """Images float32 `[batch, 3, height, width]` in [0, 1], or a little beyond.

    Args:
        media: to check.
        lengths: None; images have none.
        factor: that must divide height and width.
        size: (height, width), None = any.

    Raises:
        MediaError: they are not.
    """
    name = "image batch"
    if lengths is not None:
        raise MediaError(name, "lengths were given", "images of a batch share one size; pass no lengths")
    height, width = size or ("height", "width")
    media = check_media(name, media, f"float32[batch, 3, {height}, {width}] in [0, 1]", 4, 3)
    found = f"size {media.shape[2]}x{media.shape[3]}"
    if size and media.shape[2:] != size:
        raise MediaError(name, f"{found} is not {height}x{width}", "resize or crop, see read_image(size=)")
    if media.shape[2] % factor or media.shape[3] % factor:
        raise MediaError(name, f"{found} is not divisible by {factor}", "resize or crop, see read_image(size=)")
    low, high = (float(value) for value in torch.aminmax(media))
    if low < -0.1 or high > 1.1:
        raise MediaError(name, f"values span {low:.3g}..{high:.3g}", "scale images to [0, 1] (bytes: divide by 255)")
    return media


def check_count(num_quantizers: int | None, most: int) -> int:
    """How many quantizers to use, None = all `most`. Raises CodesError outside 1..most."""
    if num_quantizers is None:
        return most
    if num_quantizers not in range(1, most + 1):
        raise CodesError(f"num_quantizers {num_quantizers} is outside 1..{most}")
    return int(num_quantizers)


def check_ids(codes: Tensor, sizes: Sequence[int], axes: Sequence[str] | None, *, empty: bool = False) -> Tensor:
    """Ids int64 `[batch, k, *grid]` of the first k codebooks; returned as they are. Raises CodesError.

    Args:
        codes: to check.
        sizes: of the codebooks.
        axes: of the grid; None = any.
        empty: whether batch and grid may be empty.
    """
    need = f"need int64 [batch, 1..{len(sizes)} quantizers, {', '.join(axes or ['positions'])}]"
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise CodesError(f"codes are {_kind(codes)}; {need}")
    fits = codes.ndim == 2 + len(axes) if axes else codes.ndim > 2
    if not fits or not 1 <= codes.shape[1] <= len(sizes) or (codes.numel() == 0 and not empty):
        raise CodesError(f"codes of shape {list(codes.shape)} do not fit: {need}{'' if empty else ', none of them 0'}")
    low, high = (int(value) for value in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < 0 or high >= min(sizes[: codes.shape[1]]):
        for size, ids in zip(sizes, codes.unbind(1), strict=False):
            low, high = (int(value) for value in torch.aminmax(ids))
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise CodesError(f"code {wrong} is outside 0..{size - 1}; is this another tokenizer's?")
    return codes


def _kind(value: Any) -> str:
    """What somebody gave, in a word."""
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
