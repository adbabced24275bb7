"""Pictures or sounds and texts as vectors of one space: CLIP score, CLAP score, retrieval.

The spaces are `clip.Clip` and `clap.Clap`, or anything with the same two methods. Vectors have length 1.

Shapes: N items, D dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CLIP_FACTOR = 2.5


class JointSpace(Protocol):
    """A model that puts media and texts into one space."""

    name: str
    """Of the weights, for reports."""
    sample_rate: int | None
    """Of the sounds that it hears, Hz; None if it looks at pictures."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 `[N, D]` on the CPU."""
        ...

    def media(self, media: Sequence[Tensor]) -> Tensor:
        """Unit vectors float32 `[N, D]` on the CPU, of pictures `[3, H, W]` in [0, 1] or sounds `[C, samples]`."""
        ...


def cosine(x_D: Tensor, y_D: Tensor) -> float:
    """Of two unit vectors, -1 to 1."""
    return float(x_D @ y_D)


def clip_score(x_D: Tensor, y_D: Tensor) -> float:
    """CLIPScore of Hessel et al. 2021 (arXiv 2104.08718): 2.5 x max(cosine, 0), of an image and a caption."""
    return CLIP_FACTOR * max(cosine(x_D, y_D), 0.0)


def retrieval(query_D: Tensor, keys_ND: Tensor, right_N: NDArray[np.bool_]) -> float:
    """1 if the nearest key is a right one, 0 if not; of keys that are equally near, the share that is right."""
    near_N = (keys_ND @ query_D).numpy()
    nearest_N = near_N >= near_N.max() - 1e-6
    return float((nearest_N & right_N).sum() / nearest_N.sum())
