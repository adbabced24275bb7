"""Where matrix products in bfloat16 are native; a CPU that emulates them is many times slower than in float32."""

from __future__ import annotations

from functools import cache

import torch

from anyglot_tokenizers.errors import ManifestError


@cache
def native_bf16(device: str) -> bool:
    """Whether devices of this type are known to multiply matrices of bfloat16 natively.

    "cuda" where the GPU does, "cpu" with AVX512-BF16; of other processors and devices nothing is known here.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def resolve_precision(precision: str) -> str:
    """ "auto" becomes "bf16-mixed" where matrix products in bfloat16 are native, else "32-true".

    Raises ManifestError for other names than "auto", "bf16-mixed" and "32-true".
    """
    if precision not in ("auto", "32-true", "bf16-mixed"):
        raise ManifestError(f"precision {precision!r} is not one of auto, 32-true, bf16-mixed")
    if precision != "auto":
        return precision
    return "bf16-mixed" if native_bf16("cuda" if torch.cuda.is_available() else "cpu") else "32-true"
