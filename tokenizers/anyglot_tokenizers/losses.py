"""Reconstruction losses and measures for images and audio. No training loop; a perceptual backbone is given, not had.

Shapes: B items, H x W pixels, C channels, S samples, T frames, F frequency bins, M mels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.audio import mel_filters
from anyglot_tokenizers.errors import AnyglotError


class ImageLoss(nn.Module):
    """Weighted L1 + L2 with an edge term; `foreground_weight` is for pictures that are mostly background.

    A pixel's weight is `1 + foreground_weight * d`, with d its mean absolute distance from the image's median
    colour; the loss is the weighted mean. Without it, small things on a plain ground are a few per cent of
    the loss and vanish first.

    Args:
        foreground_weight: 0 gives the plain mean.
        l2_weight: weight of the squared error beside the absolute error.
        edge_weight: weight of the absolute error of horizontal and vertical differences.
        perceptual_weight: weight of `perceptual`; 0 leaves it out.
        perceptual: distance of two batches of images in [0, 1], one number or one per item, such as `PerceptualLoss`;
            None = `load_lpips()` where it has a weight.
    """

    def __init__(
        self,
        foreground_weight: float = 0.0,
        l2_weight: float = 1.0,
        edge_weight: float = 0.5,
        perceptual_weight: float = 0.0,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if perceptual_weight and perceptual is None:
            perceptual = load_lpips()
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
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
        loss = l1 + self.l2_weight * l2 + self.edge_weight * edge
        if self.perceptual is not None and self.perceptual_weight:
            perceptual = self.perceptual(output_BCHW, target_BCHW).mean()
            parts["perceptual"] = perceptual.detach()
            loss = loss + self.perceptual_weight * perceptual
        return loss, parts

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


@torch.no_grad()
def psnr_per_item(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each item, `[B]`, values in [0, 1], output clamped."""
    return -10 * (output.clamp(0, 1) - target).square().flatten(1).mean(1).clamp(min=1e-10).log10()


class PerceptualLoss(nn.Module):
    """Distance of deep features (LPIPS; Zhang et al., arXiv 1801.03924), with any backbone.

    Features are normalised to unit length over channels; their squared differences are weighted per channel, summed
    over channels, averaged over positions and summed over layers.

    Args:
        backbone: images float `[B, 3, H, W]` in [0, 1] to a sequence of feature maps `[B, C, h, w]`. It is frozen.
        weights: non-negative, one vector `[C]` per feature map; None = 1 / C everywhere.
    """

    def __init__(self, backbone: nn.Module, weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.num_weights = 0 if weights is None else len(weights)
        for index, weight_C in enumerate(weights or ()):
            self.register_buffer(f"weight_{index}", weight_C.reshape(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """The backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Distance of each item, `[B]`."""
        output, target = self.backbone(output_BCHW), self.backbone(target_BCHW)
        total = torch.zeros(len(output_BCHW), device=output_BCHW.device)
        for index, (one_BChw, other_BChw) in enumerate(zip(output, target, strict=True)):
            difference_BChw = (_unit(one_BChw) - _unit(other_BChw)).square()
            if self.num_weights:
                distance_B1hw = (difference_BChw * getattr(self, f"weight_{index}")).sum(1, keepdim=True)
            else:
                distance_B1hw = difference_BChw.mean(1, keepdim=True)
            total = total + distance_B1hw.mean(dim=(1, 2, 3))
        return total


def _unit(features_BChw: Tensor) -> Tensor:
    return features_BChw / (features_BChw.square().sum(1, keepdim=True) + 1e-10).sqrt()


def load_lpips(network: str = "vgg") -> nn.Module:
    """The published LPIPS distance of images in [0, 1], from the package `lpips` (which brings torchvision).

    Raises:
        AnyglotError: the package is not installed or does not work with this torch.
    """
    try:
        from lpips import LPIPS

        distance: nn.Module = LPIPS(net=network, verbose=False).eval().requires_grad_(False)
    except Exception as error:  # a torchvision built for another torch, or a failed download, raises many kinds
        raise AnyglotError(
            f"the perceptual loss needs the package lpips and a torchvision that fits this torch ({error}); "
            "run: pip install lpips, set perceptual_weight to 0, or give a `PerceptualLoss` of your own"
        ) from error
    return _Scaled(distance)


class _Scaled(nn.Module):
    """A distance of images in [-1, 1] as one of images in [0, 1]."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        result: Tensor = self.distance(output_BCHW * 2 - 1, target_BCHW * 2 - 1)
        return result


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
        wave_weight: weight of the absolute error of the waveform.
        side_weight: stereo: weight of the same loss on the difference of the channels, half of left minus right.
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (256, 512, 1024, 2048),
        mels: Sequence[int] = (20, 40, 80, 120),
        stft_weight: float = 0.5,
        floor: float = 1e-4,
        wave_weight: float = 0.0,
        side_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.wave_weight = wave_weight
        self.side_weight = side_weight
        self.stft_weight = stft_weight
        self.floor = floor
        for window, count in zip(windows, mels, strict=True):
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mel_{window}", mel_filters(window, count, sample_rate), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of sounds `[B, S]` or `[B, C, S]`, and its parts `mel`, `log_stft`, `convergence`, means over scales.

        With their weights above 0 also `wave` and `side`.
        """
        channels = output.shape[1] if output.ndim == 3 else 1
        output_MS, target_MS = output.reshape(-1, output.shape[-1]), target.reshape(-1, target.shape[-1])
        loss, parts = self._distance(output_MS, target_MS)
        if self.wave_weight:
            parts["wave"] = F.l1_loss(output_MS.float(), target_MS.float())
            loss = loss + self.wave_weight * parts["wave"]
        if self.side_weight and channels == 2:
            parts["side"] = self._distance((output[:, 0] - output[:, 1]) / 2, (target[:, 0] - target[:, 1]) / 2)[0]
            loss = loss + self.side_weight * parts["side"]
        return loss, {name: value.detach() for name, value in parts.items()}

    def _distance(self, output_BS: Tensor, target_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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
            parts = {"mel": mel, "log_stft": log_stft, "convergence": convergence}
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
