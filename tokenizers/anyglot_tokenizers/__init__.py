"""Images and audio to discrete codes and back. Standalone: knows nothing of language models.

Importing this package is cheap; models and trainers are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyglot_tokenizers.audio import AudioCodec as AudioCodec
    from anyglot_tokenizers.chunks import Stream as Stream
    from anyglot_tokenizers.chunks import decode_chunked as decode_chunked
    from anyglot_tokenizers.chunks import encode_chunked as encode_chunked
    from anyglot_tokenizers.codes import Codes as Codes
    from anyglot_tokenizers.denoise import fit_denoising as fit_denoising
    from anyglot_tokenizers.errors import AnyglotError as AnyglotError
    from anyglot_tokenizers.errors import CheckpointError as CheckpointError
    from anyglot_tokenizers.errors import CodesError as CodesError
    from anyglot_tokenizers.errors import FingerprintError as FingerprintError
    from anyglot_tokenizers.errors import LicenseWarning as LicenseWarning
    from anyglot_tokenizers.errors import ManifestError as ManifestError
    from anyglot_tokenizers.errors import MediaError as MediaError
    from anyglot_tokenizers.errors import UnsupportedError as UnsupportedError
    from anyglot_tokenizers.evaluation import evaluate as evaluate
    from anyglot_tokenizers.files import atomic_write as atomic_write
    from anyglot_tokenizers.image import ImageVQ as ImageVQ
    from anyglot_tokenizers.media import read_audio as read_audio
    from anyglot_tokenizers.media import read_image as read_image
    from anyglot_tokenizers.media import write_audio as write_audio
    from anyglot_tokenizers.media import write_image as write_image
    from anyglot_tokenizers.quantize import ResidualQuantizer as ResidualQuantizer
    from anyglot_tokenizers.quantizers import make_quantizer as make_quantizer
    from anyglot_tokenizers.query import QueryImageVQ as QueryImageVQ
    from anyglot_tokenizers.series import SeriesVQ as SeriesVQ
    from anyglot_tokenizers.spec import CodeSpec as CodeSpec
    from anyglot_tokenizers.tokenizer import Tokenizer as Tokenizer
    from anyglot_tokenizers.tokenizer import load as load
    from anyglot_tokenizers.train import LitTokenizer as LitTokenizer
    from anyglot_tokenizers.train import StepBatches as StepBatches
    from anyglot_tokenizers.train import TokenizerDataModule as TokenizerDataModule
    from anyglot_tokenizers.train import fit_tokenizer as fit_tokenizer
    from anyglot_tokenizers.two_tone import TwoToneVQ as TwoToneVQ

_HOMES = {
    "audio": ("AudioCodec",),
    "chunks": ("Stream", "decode_chunked", "encode_chunked"),
    "codes": ("Codes",),
    "denoise": ("fit_denoising",),
    "errors": (
        "AnyglotError",
        "CheckpointError",
        "CodesError",
        "FingerprintError",
        "LicenseWarning",
        "ManifestError",
        "MediaError",
        "UnsupportedError",
    ),
    "evaluation": ("evaluate",),
    "image": ("ImageVQ",),
    "files": ("atomic_write",),
    "media": ("read_audio", "read_image", "write_audio", "write_image"),
    "quantize": ("ResidualQuantizer",),
    "quantizers": ("make_quantizer",),
    "query": ("QueryImageVQ",),
    "series": ("SeriesVQ",),
    "spec": ("CodeSpec",),
    "tokenizer": ("Tokenizer", "load"),
    "train": ("LitTokenizer", "StepBatches", "TokenizerDataModule", "fit_tokenizer"),
    "two_tone": ("TwoToneVQ",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
