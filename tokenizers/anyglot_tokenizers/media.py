"""Image and audio files to tensors and back, with limits checked before decoding.

Images are float32 `[3, H, W]` in [0, 1], audio is float32 `[channels, samples]`. Only a short list of image
formats is opened (none that runs an interpreter). This file knows nothing of tokenizers.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.errors import MediaError
from anyglot_tokenizers.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

PathLike = str | os.PathLike[str]
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
AUDIO_SUFFIXES = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3"}
EXACT_LENGTHS = (
    "WAV",
    "WAVEX",
    "RF64",
    "FLAC",
    "AIFF",
    "AU",
    "W64",
    "CAF",
)  # whose headers state the exact frame count
SIZES: dict[bytes, tuple[int, int, Literal["little", "big"], int]] = {
    b"RIFF": (4, 8, "little", 8),
    b"RF64": (20, 28, "little", 8),
    b"riff": (16, 24, "little", 0),  # W64
    b"FORM": (4, 8, "big", 8),  # AIFF
    b".snd": (8, 12, "big", 0),  # AU; bytes 4 to 8 say where these begin
}
"""First bytes of a file -> which bytes (from, to, order) state its size, and how many are not counted there."""
PAGE = 65307  # bytes of an Ogg page, at most


@dataclass(frozen=True)
class MediaBytes:
    """A media file held in memory, such as a member of a tar. `str` of it is its `name`, which errors show."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def read_image(path: PathLike | MediaBytes, *, size: int | None = None, max_pixels: int = 64_000_000) -> Tensor:
    """Read a picture as float32 `[3, H, W]` in [0, 1].

    EXIF orientation is applied, transparency is composited on white, the first frame of an animation is
    taken.

    Args:
        path: PNG, JPEG, WebP, BMP, GIF, TIFF or PPM; a file, or its bytes as `MediaBytes`.
        size: crop the largest centred square and resize it to `size` x `size` (antialiased).
        max_pixels: more than this is refused from the header, before any pixel is decoded.

    Raises:
        MediaError: missing, empty, not a picture, truncated, too large or not finite.
    """
    from PIL import Image, ImageOps

    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    _check_file(path)
    source, path = path, str(path)
    bomb = (f"more than {max_pixels} pixels", "raise max_pixels if you trust the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(_opened(source), formats=IMAGE_FORMATS) as file:
                if file.width * file.height > max_pixels:
                    raise MediaError(path, f"{file.width}x{file.height} is {bomb[0]}", bomb[1])
                file.load()
                image = _to_rgb(ImageOps.exif_transpose(file), path)
    except Image.DecompressionBombError as error:
        raise MediaError(path, bomb[0], "scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise MediaError(path, "not a picture of a known format", f"need one of {', '.join(IMAGE_FORMATS)}") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        struct.error,
        zlib.error,
    ) as error:
        raise MediaError(path, f"truncated or damaged picture ({error})", "get the file again or drop it") from error
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels_HWC = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


def read_audio(
    path: PathLike | MediaBytes, *, sample_rate: int, channels: int = 1, max_seconds: float = 600.0
) -> Tensor:
    """Read a sound as float32 `[channels, samples]`, resampled (soxr, high quality) to `sample_rate` Hz.

    Args:
        path: any format libsndfile reads: WAV, FLAC, Ogg, MP3, ...; a file, or its bytes as `MediaBytes`.
        sample_rate: Hz wanted.
        channels: 1 mixes all channels by their mean; a mono file is repeated to fill more.
        max_seconds: longer files are refused from the header.

    Raises:
        MediaError: missing, empty, not a sound, truncated (MP3 excepted, whose headers may not say how long it is),
            too long, of zero length, with NaN or infinite samples, or with another number of channels.
    """
    import soundfile
    import soxr

    if sample_rate < 1 or channels < 1:
        raise ValueError(f"sample_rate and channels must be positive, got {sample_rate} and {channels}")
    _check_file(path)
    source, path = path, str(path)
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            rate, stated, container = file.samplerate, file.frames, file.format
            limit = int(max_seconds * rate)
            if stated > limit and container in EXACT_LENGTHS:
                raise MediaError(
                    path,
                    f"{stated / rate:.1f} s is longer than {max_seconds:g} s",
                    "cut it or raise max_seconds",
                )
            samples_SC = file.read(min(limit, stated) + 1, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError, MemoryError) as error:
        raise MediaError(
            path, f"not a readable sound file ({error})", "need WAV, FLAC, Ogg or MP3; get the file again"
        ) from error
    count, found = samples_SC.shape
    if count > limit:
        raise MediaError(path, f"longer than {max_seconds:g} s", "cut it or raise max_seconds")
    if _missing_bytes(source) or (container in EXACT_LENGTHS and count < stated):
        raise MediaError(
            path,
            f"truncated: the header promises more than the {count} samples found",
            "get the file again or drop it",
        )
    if count == 0:
        raise MediaError(path, "holds no samples", "drop the file")
    if not np.isfinite(samples_SC).all():
        raise MediaError(path, "holds NaN or infinite samples", "clean the file or drop it")
    if channels == 1:
        samples_SC = samples_SC.mean(axis=1, keepdims=True)
    elif found == 1:
        samples_SC = samples_SC.repeat(channels, axis=1)
    elif found != channels:
        raise MediaError(path, f"has {found} channels, {channels} wanted", "read it with channels=1 to mix them")
    if rate != sample_rate:
        samples_SC = soxr.resample(samples_SC, rate, sample_rate, quality="HQ")
        if len(samples_SC) == 0:
            raise MediaError(path, f"{count} samples at {rate} Hz are none at {sample_rate} Hz", "drop the file")
    return torch.from_numpy(np.ascontiguousarray(samples_SC.T, dtype=np.float32))


def write_image(path: PathLike, image: Tensor) -> None:
    """Write float `[3, H, W]` (clipped to [0, 1]) as PNG, JPEG, WebP or BMP, by suffix.

    Raises MediaError; FileNotFoundError without a folder.
    """
    from PIL import Image

    kind = _kind(path, IMAGE_SUFFIXES)
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0 or not image.is_floating_point():
        raise MediaError(
            path, f"cannot write {image.dtype}{list(image.shape)}", "give float[3, height, width] in [0, 1]"
        )
    _check_finite(path, image)
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(
            temporary, format=kind, **({"quality": 95} if kind == "JPEG" else {})
        )


def write_audio(path: PathLike, audio: Tensor, sample_rate: int) -> None:
    """Write float `[channels, samples]` (clipped to [-1, 1]) as 16-bit WAV or FLAC, or as MP3 (lossy), by suffix.

    Raises MediaError, also where the format lacks that many channels or that rate; FileNotFoundError without a folder.
    """
    import soundfile

    kind = _kind(path, AUDIO_SUFFIXES)
    if audio.ndim != 2 or audio.numel() == 0 or audio.shape[0] > 8 or not audio.is_floating_point():
        raise MediaError(
            path,
            f"cannot write {audio.dtype}{list(audio.shape)}",
            "give float[channels, samples], 1 to 8 channels",
        )
    _check_finite(path, audio)
    samples = audio.detach().float().clamp(-1, 1).T.cpu().numpy()
    with atomic_write(path) as temporary:
        try:
            subtype = "MPEG_LAYER_III" if kind == "MP3" else "PCM_16"
            soundfile.write(str(temporary), samples, sample_rate, format=kind, subtype=subtype)
        except soundfile.LibsndfileError as error:
            raise MediaError(
                path,
                f"cannot write {kind} of {samples.shape[1]} channels at {sample_rate} Hz ({error.error_string})",
                "check the disk, or write .wav, which has every rate and needs no encoder",
            ) from error


def _opened(path: PathLike | MediaBytes) -> str | io.BytesIO:
    return io.BytesIO(path.content) if isinstance(path, MediaBytes) else os.fspath(path)


def _check_file(path: PathLike | MediaBytes) -> None:
    if isinstance(path, MediaBytes):
        if not path.content:
            raise MediaError(path.name, "is empty (0 bytes)", "get the file again or drop it")
        return
    try:
        if not Path(path).is_file():
            problem = "is a folder, not a file" if Path(path).is_dir() else "no such file"
            raise MediaError(path, problem, "check the path")
        if Path(path).stat().st_size == 0:
            raise MediaError(path, "is empty (0 bytes)", "get the file again or drop it")
        with open(path, "rb"):
            return
    except OSError as error:
        raise MediaError(path, f"cannot be opened ({error.strerror})", "check the path and its permissions") from error


def _check_finite(path: PathLike, media: Tensor) -> None:
    if not bool(torch.isfinite(media).all()):
        raise MediaError(path, "the array holds NaN or infinite values", "not written; check what made it")


def _kind(path: PathLike, suffixes: dict[str, str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise MediaError(path, f"cannot write a {suffix or 'suffixless'} file", f"use one of {', '.join(suffixes)}")
    return suffixes[suffix]


def _to_rgb(image: Image, path: PathLike) -> Image:
    """8-bit RGB; 16-bit grey is scaled, transparency goes on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise MediaError(path, "holds NaN or infinite pixels", "clean the file or drop it")
        scale = 255.0 if image.mode == "F" else 255 / 65535
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _missing_bytes(path: PathLike | MediaBytes) -> bool:
    """Whether the header (of WAV, RF64, W64, AIFF or AU) states more bytes than the file has, or an Ogg file does not
    end with a last page. Streamed files state 0 or the maximum.
    """
    with io.BytesIO(path.content) if isinstance(path, MediaBytes) else open(path, "rb") as file:
        head = file.read(28)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 2 * PAGE, 0))
        tail = file.read()
    if head[:4] == b"OggS":
        page = tail[max(tail.rfind(b"OggS"), 0) :]
        return len(page) < 27 or not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    if head[:4] not in SIZES:
        return False
    start, end, order, more = SIZES[head[:4]]
    stated = int.from_bytes(head[start:end], order)
    if head[:4] == b".snd":
        more = int.from_bytes(head[4:8], order)
    unknown = (0, 0x7FFFFFFF, 2 ** (8 * (end - start)) - 1)
    return stated not in unknown and size + 1 < stated + more
