"""Discriminators of images and sounds: they say how real a piece looks, and what they saw on the way.

All return one `Judgement` per sub-discriminator: a map of scores (higher = more real) and the features of every layer
before it. No losses, no training, no batch statistics (group norm or weight norm), so that real and generated batches
and different devices never mix.

Shapes: B items, C channels, H x W pixels, S samples, F frequency bins, T frames, P period.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from anyglot_tokenizers.errors import ManifestError

Judgement = tuple[Tensor, list[Tensor]]


def _judge(x: Tensor, layers: nn.ModuleList) -> Judgement:
    """Scores of the last layer, features of all before it."""
    features = []
    for layer in layers[:-1]:
        x = layer(x)
        features.append(x)
    return layers[-1](x), features


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): one score per patch of an image, group norm for batch norm.

    Args:
        channels: of the images.
        width: of the first layer; doubled by every following one up to eightfold.
        depth: layers that halve the resolution; a score sees 34, 70, 142 pixels for a depth of 2, 3, 4.
    """

    def __init__(self, channels: int = 3, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))]
        inputs = width
        for index in range(1, depth + 1):
            outputs = width * min(2**index, 8)
            convolution = nn.Conv2d(inputs, outputs, 4, 2 if index < depth else 1, 1)
            layers.append(nn.Sequential(convolution, nn.GroupNorm(1, outputs), nn.LeakyReLU(0.2)))
            inputs = outputs
        self.layers = nn.ModuleList([*layers, nn.Conv2d(inputs, 1, 4, 1, 1)])

    def forward(self, x_BCHW: Tensor) -> list[Judgement]:
        """Images in [0, 1] to a list of one judgement. The side must be at least `2 ** (depth + 2)` pixels."""
        return [_judge(x_BCHW * 2 - 1, self.layers)]


class PeriodDiscriminator(nn.Module):
    """Sees a sound folded into rows of `period` samples (HiFi-GAN, Kong et al., arXiv 2010.05646).

    Args:
        channels: of the sounds.
        period: samples per row, P.
        width: of the first layer; 4, 16 and 32 times as wide at the end.
    """

    def __init__(self, channels: int, period: int, width: int = 32) -> None:
        super().__init__()
        self.period = period
        widths = [channels, width, 4 * width, 16 * width, 32 * width]
        layers: list[nn.Module] = [
            nn.Sequential(weight_norm(nn.Conv2d(i, o, (5, 1), (3, 1), (2, 0))), nn.LeakyReLU(0.1))
            for i, o in pairwise(widths)
        ]
        last = widths[-1]
        layers.append(nn.Sequential(weight_norm(nn.Conv2d(last, last, (5, 1), 1, (2, 0))), nn.LeakyReLU(0.1)))
        self.layers = nn.ModuleList([*layers, weight_norm(nn.Conv2d(last, 1, (3, 1), 1, (1, 0)))])

    def forward(self, x_BCS: Tensor) -> list[Judgement]:
        """Sounds to a list of one judgement."""
        missing = -x_BCS.shape[2] % self.period
        rows_BCTP = F.pad(x_BCS, (0, missing)).unflatten(2, (-1, self.period))
        return [_judge(rows_BCTP, self.layers)]


class STFTDiscriminator(nn.Module):
    """Sees the complex spectrogram at one resolution, whole or in bands.

    Whole as in EnCodec (Défossez et al., arXiv 2210.13438); with `bands` as in DAC (Kumar et al., arXiv 2306.06546),
    where every band of frequencies has layers of its own.

    Args:
        channels: of the sounds.
        window: samples; the hop is a quarter.
        width: of all layers.
        bands: limits of the bands as shares of the spectrum, such as `(0, 0.1, 0.25, 0.5, 0.75, 1)`.
    """

    window: Tensor

    def __init__(self, channels: int, window: int, width: int = 32, bands: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        bins = window // 2 + 1
        limits = [round(share * bins) for share in bands]
        self.bands = list(pairwise(limits))
        if len(limits) < 2 or limits[0] != 0 or limits[-1] != bins or any(low >= high for low, high in self.bands):
            raise ManifestError(f"bands {tuple(bands)} of a window of {window} must rise from 0 to 1, none empty")
        self.stacks = nn.ModuleList(_spectral_layers(2 * channels, width) for _ in self.bands)
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x_BCS: Tensor) -> list[Judgement]:
        """Sounds to a list of one judgement, its scores over frames and (bands of) frequencies."""
        spectrum_BXFT = self._spectrum(x_BCS)
        outputs, features = [], []
        for (low, high), stack in zip(self.bands, self.stacks, strict=True):
            h = spectrum_BXFT[:, :, low:high]
            for layer in stack:  # type: ignore[attr-defined]
                h = layer(h)
                features.append(h)
            outputs.append(h)
        return [(self.last(torch.cat(outputs, dim=2)), features)]

    def _spectrum(self, x_BCS: Tensor) -> Tensor:
        """Real and imaginary parts as channels, float32 `[B, 2C, F, T]`."""
        size = len(self.window)
        with torch.autocast(x_BCS.device.type, enabled=False):
            x_MS = x_BCS.float().flatten(0, 1)
            spectrum_MFT = torch.stft(
                x_MS, size, size // 4, window=self.window, normalized=True, pad_mode="constant", return_complex=True
            )
            parts_BCFTX = torch.view_as_real(spectrum_MFT).unflatten(0, x_BCS.shape[:2])
            return parts_BCFTX.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _spectral_layers(inputs: int, width: int) -> nn.ModuleList:
    """Frequency by 9, time by 3; frequency halves three times while time dilates (EnCodec's layout)."""
    layers: list[nn.Module] = [weight_norm(nn.Conv2d(inputs, width, (9, 3), padding=(4, 1)))]
    for dilation in (1, 2, 4):
        layers.append(weight_norm(nn.Conv2d(width, width, (9, 3), (2, 1), (4, dilation), (1, dilation))))
    layers.append(weight_norm(nn.Conv2d(width, width, 3, padding=1)))
    return nn.ModuleList(nn.Sequential(layer, nn.LeakyReLU(0.2)) for layer in layers)


class Discriminators(nn.Module):
    """Several discriminators of the same media as one."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Judgement]:
        """All judgements, one after another."""
        return [judgement for part in self.parts for judgement in part(x)]


def image_discriminator(channels: int = 3, **options: Any) -> nn.Module:
    """`PatchDiscriminator` with its options."""
    return PatchDiscriminator(channels, **options)


def audio_discriminator(
    channels: int = 1,
    *,
    periods: Sequence[int] = (2, 3, 5, 7, 11),
    period_width: int = 32,
    windows: Sequence[int] = (2048, 1024, 512, 256, 128),
    width: int = 32,
    bands: Sequence[float] = (0.0, 1.0),
) -> nn.Module:
    """Multi-period (HiFi-GAN) and multi-scale STFT (EnCodec; DAC with `bands`) discriminators; either may be none."""
    parts: list[nn.Module] = [PeriodDiscriminator(channels, period, period_width) for period in periods]
    parts += [STFTDiscriminator(channels, window, width, bands) for window in windows]
    if not parts:
        raise ManifestError("an audio discriminator needs at least one of periods and windows")
    return Discriminators(parts)
