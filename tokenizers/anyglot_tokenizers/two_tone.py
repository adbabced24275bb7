"""`TwoToneVQ`: an image tokenizer whose codes say apart which pattern a patch has and in which two colors.

Every patch is seen twice: as a pattern, its luma stretched from its own darkest to its own lightest pixel, and as two
tones, the mean color of its dark and of its light pixels. That is block truncation coding (Delp and Mitchell 1979, doi
10.1109/TCOM.1979.1094560) with both halves learnt and quantized: pattern and tones have a codebook each, and an id is a
combination (`product.py`). A red and a green corner are the same pattern, so a language model that keeps the digits
apart can draw and read a shape in a color that it never met it in; codes of `ImageVQ`, which mix both, do not allow
that (docs/log.md has the figures). The price: a patch has two colors at most, and a shape with the luma of
what is around it is not seen.

A code depends on its own patch and on nothing else. This file holds no losses and reads no files.

Shapes: B items, H x W pixels, f pixels a side of a patch, h x w patches, P = f * f.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.image import GridImage, decoder_of
from anyglot_tokenizers.product import ProductQuantizer
from anyglot_tokenizers.tokenizer import seeded

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (BT.601)."""
FLAT = 0.06
"""Patches with less luma between darkest and lightest, of 1, are stretched less."""


class TwoToneVQ(GridImage):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, 1, H/f, W/f]`, for any H, W divisible by f.

    A code is `tones + num_tones * pattern`.

    Args:
        downsample_factor: f, pixels per code on each side.
        num_patterns: entries of the codebook of patterns.
        num_tones: entries of the codebook of pairs of colors.
        pattern_dim: dims of patterns' entries.
        tone_dim: dims of tones' entries.
        width: of the encoders, two layers on a patch each.
        channels: widths of the decoder's stages, from fine to coarse, as in `ImageVQ`.
        patch: pixels per side that the decoder's last layer paints.
        stage_steps: see `ResidualQuantizer`.
        seed: of the initial weights.
        license: of the weights.
    """

    def __init__(
        self,
        *,
        downsample_factor: int = 8,
        num_patterns: int = 256,
        num_tones: int = 16,
        pattern_dim: int = 24,
        tone_dim: int = 8,
        width: int = 128,
        channels: Sequence[int] = (96, 192),
        patch: int = 4,
        stage_steps: int = 50,
        seed: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if patch * 2 ** (len(channels) - 1) != downsample_factor:
            raise ValueError(
                f"patch {patch} and {len(channels)} stages enlarge by {patch * 2 ** (len(channels) - 1)}, not by "
                f"downsample_factor {downsample_factor}"
            )
        self.factor = downsample_factor
        pixels = downsample_factor**2
        with seeded(seed):
            self.pattern_in, self.tones_in = _Encoder(pixels, width, pattern_dim), _Encoder(6, width, tone_dim)
            self.quantizer = ProductQuantizer(
                (tone_dim, pattern_dim), (num_tones, num_patterns), stage_steps=stage_steps
            )
            self.pattern_out, self.tones_out = nn.Conv2d(pattern_dim, pixels, 1), nn.Conv2d(tone_dim, 6, 1)
            self.decoder = decoder_of(tone_dim + pattern_dim, channels, patch, depth=1)

    def _views(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Patterns `[B, P, h, w]` in [0, 1], and dark and light colors `[B, 6, h, w]`."""
        luma_BHW = torch.einsum("bchw,c->bhw", x_BCHW, x_BCHW.new_tensor(LUMA))
        luma_BPhw = F.pixel_unshuffle(luma_BHW[:, None], self.factor)
        darkest_B1hw, lightest_B1hw = luma_BPhw.aminmax(dim=1, keepdim=True)
        pattern_BPhw = (luma_BPhw - darkest_B1hw) / (lightest_B1hw - darkest_B1hw).clamp(min=FLAT)
        x_BCPhw = F.pixel_unshuffle(x_BCHW, self.factor).unflatten(1, (3, -1))
        tones = []
        for share_BPhw in (1 - pattern_BPhw, pattern_BPhw):
            weight_BPhw = share_BPhw**4 + 1e-3  # pixels on an edge have neither color
            tones.append((x_BCPhw * weight_BPhw[:, None]).sum(2) / weight_BPhw.sum(1, keepdim=True))
        return pattern_BPhw, torch.cat(tones, 1)

    def _latents(self, x_BCHW: Tensor) -> Tensor:
        with torch.autocast(x_BCHW.device.type, enabled=False):
            pattern_BPhw, tones_B6hw = self._views(x_BCHW.float())
        standard_B6hw = (tones_B6hw - self.mean_C11.repeat(2, 1, 1)) / self.deviation
        return torch.cat([self.tones_in(standard_B6hw), self.pattern_in(2 * pattern_BPhw - 1)], 1)

    def _pixels(self, z_BDhw: Tensor) -> Tensor:
        tones_BDhw, pattern_BDhw = z_BDhw.split(self.quantizer.dims, 1)
        dark_BChw, light_BChw = self.tones_out(tones_BDhw).chunk(2, 1)
        share_BPhw = torch.sigmoid(4 * self.pattern_out(pattern_BDhw))
        plain_BCPhw = dark_BChw[:, :, None] + share_BPhw[:, None] * (light_BChw - dark_BChw)[:, :, None]
        x_BCHW = F.pixel_shuffle(plain_BCPhw.flatten(1, 2), self.factor) + self.decoder(z_BDhw)
        return x_BCHW.float() * self.deviation + self.mean_C11


class _Encoder(nn.Module):
    """A network of one patch beside a linear map, as in `ImageVQ`."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, outputs, 1)
        )
        self.linear = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BIhw: Tensor) -> Tensor:
        z_BDhw: Tensor = self.body(x_BIhw) + self.linear(x_BIhw)
        return z_BDhw
