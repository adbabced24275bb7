"""Reconstruction losses and measures for images and audio. No models, no training loop, no weights.

Shapes: B items, H x W pixels, S samples, T frames, F frequency bins, M mels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.audio import mel_filters


class ImageLoss(nn.Module):
    """Weighted L1 + L2 with an edge term, for pictures that are mostly background.

    A pixel's weight is `1 + foreground_weight * d`, with d its mean absolute distance from the image's median
    colour; the loss is the weighted mean. Without it, small things on a plain ground are a few per cent of
    the loss and vanish first.

    Args:
        foreground_weight: 0 gives the plain mean.
        l2_weight: weight of the squared error beside the absolute error.
        edge_weight: weight of the absolute error of horizontal and vertical differences.
    """

    def __init__(self, foreground_weight: float = 20.0, l2_weight: float = 1.0, edge_weight: float = 0.5) -> None:
        super().__init__()
        self.foreground_weight = foreground_weight
        self.l2_weight = l2_weight
        self.edge_weight = edge_weight

    def forward(self, output_BCHW: Tensor, target_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and its parts `l1`, `l2`, `edge` with `psnr` (dB, unweighted, of the output clamped to [0, 1])."""
        output_BCHW, target_BCHW = output_BCHW.float(), target_BCHW.float()
        weight_B1HW = self.weights(target_BCHW)
        error_BCHW = output_BCHW - target_BCHW
        l1 = (weight_B1HW * error_BCHW.abs()).mean()
        l2 = (weight_B1HW * error_BCHW.square()).mean()
        edge = error_BCHW.diff(dim=2).abs().mul(weight_B1HW[:, :, 1:]).mean()
        edge = edge + error_BCHW.diff(dim=3).abs().mul(weight_B1HW[:, :, :, 1:]).mean()
        parts = {
            "l1": l1.detach(),
            "l2": l2.detach(),
            "edge": edge.detach(),
            "psnr": psnr(output_BCHW, target_BCHW),
        }
        return l1 + self.l2_weight * l2 + self.edge_weight * edge, parts

    @torch.no_grad()
    def weights(self, target_BCHW: Tensor) -> Tensor:
        """Pixel weights `[B, 1, H, W]`, of mean 1 per image."""
        median_BC11 = target_BCHW.flatten(2).median(dim=2).values[..., None, None]
        weight_B1HW = 1 + self.foreground_weight * (target_BCHW - median_BC11).abs().mean(1, keepdim=True)
        return weight_B1HW / weight_B1HW.mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over the whole batch, values in [0, 1], output clamped."""
    return -10 * (output.clamp(0, 1) - target).square().mean().clamp(min=1e-10).log10()


class SpectralLoss(nn.Module):
    """Multi-scale spectral distance of two waveforms, always in float32.

    Per window size: L1 between log-mel spectra (DAC, arXiv 2306.06546), L1 between log magnitudes, and spectral
    convergence (Parallel WaveGAN, arXiv 1910.11480). Magnitudes are divided by the window's sum, so a
    full-scale sine is 0.5; below `floor` (-80 dB) nothing counts, otherwise digital silence would rule the
    loss.

    Args:
        sample_rate: Hz.
        windows: samples; the hop is a quarter of each.
        mels: mel bands, one count per window.
        stft_weight: weight of the two linear-frequency terms beside the mel term.
        floor: smallest magnitude told apart.
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (256, 512, 1024, 2048),
        mels: Sequence[int] = (20, 40, 80, 120),
        stft_weight: float = 0.5,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.stft_weight = stft_weight
        self.floor = floor
        for window, count in zip(windows, mels, strict=True):
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mel_{window}", mel_filters(window, count, sample_rate), persistent=False)

    def forward(self, output_BS: Tensor, target_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and its parts `mel`, `log_stft`, `convergence`, each a mean over scales."""
        with torch.autocast(output_BS.device.type, enabled=False):
            zero = torch.zeros((), device=output_BS.device)
            mel, log_stft, convergence = zero, zero, zero
            for window in self.windows:
                output_BFT = self._magnitude(output_BS.float(), window)
                with torch.no_grad():
                    target_BFT = self._magnitude(target_BS.float(), window)
                    target_mel_BMT = self._log(self._mel(target_BFT, window))
                mel = mel + F.l1_loss(self._log(self._mel(output_BFT, window)), target_mel_BMT)
                log_stft = log_stft + F.l1_loss(self._log(output_BFT), self._log(target_BFT))
                norm = target_BFT.norm().clamp(min=self.floor)
                convergence = convergence + (output_BFT - target_BFT).square().sum().clamp(min=1e-12).sqrt() / norm
            scales = len(self.windows)
            mel, log_stft, convergence = mel / scales, log_stft / scales, convergence / scales
            parts = {"mel": mel.detach(), "log_stft": log_stft.detach(), "convergence": convergence.detach()}
            return mel + self.stft_weight * (log_stft + convergence), parts

    def _magnitude(self, x_BS: Tensor, size: int) -> Tensor:
        window: Tensor = getattr(self, f"window_{size}")
        spectrum = torch.stft(x_BS, size, size // 4, window=window, pad_mode="constant", return_complex=True)
        power_BFT = torch.view_as_real(spectrum).square().sum(-1)
        return (power_BFT + 1e-12).sqrt() / window.sum()

    def _mel(self, magnitude_BFT: Tensor, size: int) -> Tensor:
        filters_FM: Tensor = getattr(self, f"mel_{size}")
        return filters_FM.T @ magnitude_BFT

    def _log(self, magnitude: Tensor) -> Tensor:
        return magnitude.clamp(min=self.floor).log()
