"""Media that clients send: bytes in, tensors out, and nothing else is ever opened.

A picture or sound is in the request itself: base64, a data: URI or an uploaded file. No other URL, no path and no file
name is looked at. The container is told by its first bytes and must be one of a short list; what its header promises is
checked before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.refusal import Refusal
from anyglot_tokenizers.errors import AnyglotError, MediaError
from anyglot_tokenizers.media import MediaBytes

if TYPE_CHECKING:
    from torch import Tensor

    from anyglot_lm.unified import UnifiedModel

MAX_CHANNELS, MAX_RATE = 2, 192_000
"""Of a sound; together with its seconds they bound what it takes in memory."""
IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM")


def from_data_uri(uri: str, where: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises `Refusal` for any other URL."""
    head, comma, content = uri.partition(",")
    kind, _, encoding = head.removeprefix("data:").rpartition(";")
    if not comma or not head.startswith("data:") or not kind.startswith("image/") or encoding != "base64":
        raise Refusal(
            400,
            f"{where} is no data:image/...;base64,... URI; this server opens no other URL and no file",
            param=where,
        )
    return from_base64(content, where)


def from_base64(text: str, where: str) -> bytes:
    """Bytes of base64 text. Raises `Refusal` for what is none, or empty."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{where} is not base64 ({error}); encode the file's bytes", param=where) from error
    if not content:
        raise Refusal(400, f"{where} is empty; send the file's bytes as base64", param=where)
    return content


def decode(model: UnifiedModel, modality: str, content: bytes, where: str, limits: Limits) -> Tensor:
    """A picture or sound as the tokenizer of `modality` takes it.

    Args:
        model: whose tokenizer.
        modality: of the medium.
        content: a PNG, JPEG, WebP, GIF or BMP; or a WAV, FLAC, MP3 or Ogg.
        where: names it in errors.
        limits: of pixels and seconds.

    Raises:
        Refusal: 400, whatever is wrong with it.
    """
    sound = model.tokenizers[modality].spec.sample_rate is not None
    try:
        (_check_sound if sound else _check_picture)(content, where)
        media = MediaBytes(where, content)
        return model.read_media(modality, media, max_seconds=limits.max_seconds, max_pixels=limits.max_pixels)
    except AnyglotError as error:
        raise Refusal(400, str(error), param=where) from error


def is_picture(content: bytes) -> bool:
    """Whether a file begins as one of the known pictures does."""
    return content.startswith(IMAGE_STARTS) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def _check_picture(content: bytes, where: str) -> None:
    if not is_picture(content):
        raise MediaError(where, "is no picture", "send PNG, JPEG, WebP, GIF or BMP")


def _check_sound(content: bytes, where: str) -> None:
    import soundfile

    wave = content[:4] == b"RIFF" and content[8:12] == b"WAVE"
    mpeg = content[:3] == b"ID3" or (content[:1] == b"\xff" and content[1:2] >= b"\xe0")
    if not (wave or mpeg or content.startswith((b"fLaC", b"OggS"))):
        raise MediaError(where, "is no sound", "send WAV, FLAC, MP3 or Ogg")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, channels = file.samplerate, file.channels
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise MediaError(where, f"is a damaged sound ({error})", "send WAV, FLAC, MP3 or Ogg") from error
    if channels > MAX_CHANNELS or rate > MAX_RATE:
        raise MediaError(
            where,
            f"has {channels} channels at {rate} Hz",
            f"send {MAX_CHANNELS} channels and {MAX_RATE} Hz at most",
        )
