"""`LookVQ`: codes that say which known pictures a picture is likest, learnt from about a thousand, without descent.

A picture is known by its look: where edges of which direction lie (histograms of oriented gradients, Dalal & Triggs,
CVPR 2005) and where which colors are (color histograms, Swain & Ballard, IJCV 1991). Kernel ridge regression leads from
there to a vector that stands for its name; somebody else gives the vectors of the names. The codes are the names that
are nearest to what it finds: a new picture is said to be somewhat like this one and somewhat like that one. With so few
pictures this finds more than a convolutional encoder trained on them (docs/log.md). Nothing can be decoded.

Shapes: B pictures of H x W pixels, h x w places, n examples, F features, C names, D dims of a vector, K codes a place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.checks import check_count, check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.image import image_entries
from anyglot_tokenizers.meaning import MeaningTokenizer
from anyglot_tokenizers.tokenizer import full_precision

SIDE = 64
"""Pixels of a place."""
BINS, EDGE_CELLS = 9, (4, 8)
"""Directions of an edge, and cells a side in which they are counted."""
TONES, COLOR_CELLS = 4, (1, 3)
"""Levels of each color channel, and cells a side."""
RIDGE = 0.5


class LookVQ(MeaningTokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, K, H/64, W/64]`, for H, W divisible by 64.

    All K codes are of one codebook, the nearest name first. `fit` comes before `encode`.

    Args:
        modality: name in the spec.
        num_quantizers: K.
        codebook_size: C; `fit` sets it.
        codebook_dim: D; `fit` sets it.
        examples: n; `fit` sets it.
        license: of the weights, among them the look of the examples.
    """

    example_nF: Tensor
    weight_nD: Tensor
    mean_D: Tensor
    codebook_CD: Tensor
    known_C: Tensor

    def __init__(
        self,
        *,
        modality: str = "seen",
        num_quantizers: int = 4,
        codebook_size: int = 16,
        codebook_dim: int = 1,
        examples: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if not 1 <= num_quantizers <= codebook_size:
            raise ValueError(f"num_quantizers must be between 1 and codebook_size {codebook_size}: {num_quantizers}")
        self.modality = modality
        features = BINS * sum(c * c for c in EDGE_CELLS) + TONES**3 * sum(c * c for c in COLOR_CELLS)
        self.register_buffer("example_nF", torch.zeros(examples, features))
        self.register_buffer("weight_nD", torch.zeros(examples, codebook_dim))
        self.register_buffer("mean_D", torch.zeros(codebook_dim))
        self.register_buffer("codebook_CD", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("known_C", torch.ones(codebook_size))

    @property
    def device(self) -> torch.device:
        """Where the weights are; encode moves its input here."""
        return self.mean_D.device

    def _spec_entries(self) -> dict[str, Any]:
        sizes = (self.config["codebook_size"],) * self.config["num_quantizers"]
        return image_entries(sizes, SIDE, self.config["license"]) | {"modality": self.modality, "decodes": False}

    @torch.no_grad()
    def fit(self, x_nCHW: Tensor, name_n: Tensor, vector_CD: Tensor) -> None:
        """Learn the names of pictures, in place of all that was learnt before.

        Args:
            x_nCHW: float32 `[n, 3, 64, 64]` in [0, 1].
            name_n: the name of each, int64 `[n]`; those that no picture has are never given.
            vector_CD: of each name, float32 `[C, D]`, of length 1.

        Raises ValueError for other shapes, and where fewer than K names have a picture.
        """
        x_nCHW, name_n, vector_CD = (given.to(self.device) for given in (x_nCHW, name_n, vector_CD))
        count, (names, dims) = len(x_nCHW), vector_CD.shape
        if x_nCHW.shape[1:] != (3, SIDE, SIDE) or name_n.shape != (count,):
            raise ValueError(f"needs [n, 3, {SIDE}, {SIDE}] and [n]: {list(x_nCHW.shape)} and {list(name_n.shape)}")
        known_C = torch.zeros(names, device=self.device).index_fill_(0, name_n, 1.0)
        if int(known_C.sum()) < self.config["num_quantizers"]:
            raise ValueError(f"{int(known_C.sum())} names with a picture; needs {self.config['num_quantizers']}")
        example_nF, target_nD = look(x_nCHW), vector_CD.double()[name_n]
        mean_D = target_nD.mean(0)
        likeness_nn = _likeness(example_nF.double(), example_nF.double())
        doubted_nn = likeness_nn + RIDGE * torch.eye(count, dtype=torch.double, device=self.device)
        self.weight_nD = torch.linalg.solve(doubted_nn, target_nD - mean_D).float()
        self.example_nF, self.mean_D, self.known_C = example_nF, mean_D.float(), known_C
        self.codebook_CD = vector_CD.float().clone()
        self.config |= {"codebook_size": names, "codebook_dim": dims, "examples": count}
        self._fingerprint = None

    @torch.no_grad()
    def latents(self, x_BCHW: Tensor) -> Tensor:
        """What pictures could be called: vectors of length 1, float32 `[B, D, h, w]`."""
        batch, _, height, width = x_BCHW.shape
        rows, columns = height // SIDE, width // SIDE
        tile_BChSwS = x_BCHW.unflatten(2, (rows, SIDE)).unflatten(4, (columns, SIDE))
        look_PF = look(tile_BChSwS.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        z_PD = F.normalize(_likeness(look_PF, self.example_nF) @ self.weight_nD + self.mean_D, dim=1)
        return z_PD.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of one size. Raises MediaError for wrong sizes, ranges, and lengths (images have none)."""
        x_BCHW = check_images(media, lengths, factor=SIDE).to(self.device)
        used = check_count(num_quantizers, self.config["num_quantizers"])
        with full_precision(self.device):
            near_BChw = torch.einsum("bdhw,cd->bchw", self.latents(x_BCHW), self.codebook_CD)
        near_BChw = near_BChw.masked_fill(self.known_C[:, None, None] == 0, -2.0)
        return Codes(near_BChw.topk(used, dim=1).indices, None, self.spec)


def _likeness(a_mF: Tensor, b_nF: Tensor) -> Tensor:
    """`[m, n]`: 1 for the same look, exp(-8) for looks that share nothing."""
    return (a_mF.square().sum(1)[:, None] + b_nF.square().sum(1) - 2 * a_mF @ b_nF.T).neg().exp()


def look(x_BCHW: Tensor) -> Tensor:
    """Features float32 `[B, F]` of pictures in [0, 1]: four histograms, square roots of their shares."""
    return torch.cat([*_edges(x_BCHW, EDGE_CELLS), *_colors(x_BCHW, COLOR_CELLS)], 1)


def _edges(x_BCHW: Tensor, cells: Sequence[int]) -> list[Tensor]:
    """Strength of edges by direction, in each of `cells` x `cells`."""
    gray_BHW = x_BCHW.mean(1)
    across_BHW = gray_BHW[:, 1:-1, 2:] - gray_BHW[:, 1:-1, :-2]
    down_BHW = gray_BHW[:, 2:, 1:-1] - gray_BHW[:, :-2, 1:-1]
    place_BHW = torch.atan2(down_BHW, across_BHW) % math.pi / math.pi * BINS
    low_BHW = place_BHW.floor()
    share_BHW, bin_BHW = place_BHW - low_BHW, low_BHW.long() % BINS
    strength_BHW = (across_BHW.square() + down_BHW.square()).sqrt()
    strength_BbHW = strength_BHW.new_zeros(len(x_BCHW), BINS, *strength_BHW.shape[1:])
    strength_BbHW.scatter_add_(1, bin_BHW[:, None], (strength_BHW * (1 - share_BHW))[:, None])
    strength_BbHW.scatter_add_(1, (bin_BHW[:, None] + 1) % BINS, (strength_BHW * share_BHW)[:, None])
    return [_shares(F.adaptive_avg_pool2d(strength_BbHW, count).flatten(1)) for count in cells]


def _colors(x_BCHW: Tensor, cells: Sequence[int]) -> list[Tensor]:
    """Pixels by color, in each of `cells` x `cells`."""
    tone_BCHW = (x_BCHW * TONES).long().clamp(max=TONES - 1)
    color_BHW = (tone_BCHW[:, 0] * TONES + tone_BCHW[:, 1]) * TONES + tone_BCHW[:, 2]
    size = x_BCHW.shape[-1]
    found = []
    for count in cells:
        cell_S = torch.arange(size, device=x_BCHW.device) * count // size
        place_BP = ((cell_S[:, None] * count + cell_S) * TONES**3 + color_BHW).flatten(1)
        pixels_BF = x_BCHW.new_zeros(len(x_BCHW), count * count * TONES**3)
        found.append(_shares(pixels_BF.scatter_add_(1, place_BP, torch.ones_like(place_BP, dtype=x_BCHW.dtype))))
    return found


def _shares(amount_BF: Tensor) -> Tensor:
    """Square roots of shares, of length 1: their products compare histograms (Bhattacharyya)."""
    return F.normalize(amount_BF.sqrt(), dim=1)
