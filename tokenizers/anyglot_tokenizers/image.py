"""`ImageVQ`: a small convolutional image tokenizer with a residual quantizer.

Encoder and decoder are residual convolutions (layer norm, SiLU) after VQGAN (Esser et al., arXiv 2012.09841),
residual codes after RQ-VAE (Lee et al., arXiv 2203.01941). The first stage is a pixel-unshuffle, which keeps
full-resolution convolutions, the costly part on a CPU, out of the network. Beside both runs a linear map of whole
patches: it learns what principal components would within a few hundred steps, and the convolutions the rest.
This file holds no losses and reads no files.

Shapes: B items, H x W pixels, h x w codes, D latent dims, K quantizers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.quantizers import make_quantizer
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, full_precision, seeded

ADDED = {"quantizer": "rvq", "quantizer_options": {}}
"""Options younger than the first checkpoints: left out of the configuration, and so of the fingerprint, by default."""


def image_entries(codebook_sizes: Sequence[int], factor: int, license: str) -> dict[str, Any]:
    """Entries of the `CodeSpec` of images with one code for every `factor` x `factor` pixels."""
    return {
        "modality": "image",
        "codebook_sizes": codebook_sizes,
        "axes": ("height", "width"),
        "strides": (factor, factor),
        "channels": 3,
        "license": license,
    }


class GridImage(Tokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, K, H/f, W/f]`: what tokenizers with a grid share.

    Subclasses build `factor` (f), `quantizer`, and give `_latents` and `_pixels`.
    """

    mean_C11: Tensor
    deviation: Tensor
    factor: int
    quantizer: Any
    modality = "image"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.register_buffer("mean_C11", torch.full((3, 1, 1), 0.5))
        self.register_buffer("deviation", torch.tensor(0.5))

    @abstractmethod
    def _latents(self, x_BCHW: Tensor) -> Tensor:
        """Latents `[B, D, h, w]` of pixels."""

    @abstractmethod
    def _pixels(self, z_BDhw: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]`, not clamped, of quantized latents."""

    def _spec_entries(self) -> dict[str, Any]:
        return image_entries(self.quantizer.codebook_sizes, self.factor, self.config["license"])

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of one size.

        Raises MediaError for wrong sizes, ranges, and lengths (images have none).
        """
        x_BCHW = check_images(media, lengths, factor=self.factor).to(self.device)
        with full_precision(self.device):
            z_BDhw = self._latents(x_BCHW)
            codes_BKN = self.quantizer.encode(z_BDhw.flatten(2), num_quantizers)
        return Codes(codes_BKN.unflatten(2, z_BDhw.shape[2:]), None, self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Images float32 `[B, 3, H, W]` in [0, 1] of codes `[B, k, h, w]`, any k <= K."""
        codes_BKhw, _ = self._unpack(codes)
        with full_precision(self.device):
            z_BDN = self.quantizer.decode(codes_BKhw.flatten(2))
            x_BCHW = self._pixels(z_BDN.unflatten(2, codes_BKhw.shape[2:]))
        return x_BCHW.clamp(0, 1)

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        """Reconstruct with gradients; the reconstruction is not clamped to [0, 1]."""
        z_BDhw = self._latents(media)
        q_BDN, codes_BKN, commit, stats = self.quantizer(z_BDhw.flatten(2))
        x_BCHW = self._pixels(q_BDN.unflatten(2, z_BDhw.shape[2:]))
        return Reconstruction(x_BCHW, codes_BKN.unflatten(2, z_BDhw.shape[2:]), commit, stats)

    def to_latents(self, media: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents `[B, D, h, w]` with gradient; all positions count."""
        z_BDhw = self._latents(media)
        return z_BDhw, torch.ones_like(z_BDhw[:, 0], dtype=torch.bool)

    def from_latents(self, q_BDN: Tensor, counts_BN: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` with gradient, not clamped."""
        return self._pixels(q_BDN)

    @torch.no_grad()
    def fit_statistics(self, media: Tensor) -> None:
        """Centre and scale the input by the mean colour and the deviation of typical images.

        A common colour far from the centre would otherwise rule the norms of the first layers.
        """
        if int(self.quantizer.steps) == 0:
            self.mean_C11.copy_(media.float().mean(dim=(0, 2, 3))[:, None, None])
            self.deviation.copy_((media.float() - self.mean_C11).std().clamp(min=0.05))


class ImageVQ(GridImage):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, K, H/f, W/f]`, for any H, W divisible by f.

    Args:
        channels: width of each stage, from fine to coarse; each stage after the first halves the resolution,
            so `patch * 2 ** (len(channels) - 1)` must be `downsample_factor`.
        depth: residual blocks per stage, in encoder and decoder each.
        patch: pixels per side folded into channels first.
        encoder_kernel: side of the encoder's convolutions. With 1 a code is a function of its own f x f pixels and of
            nothing else, so equal patches have equal codes wherever they are: far easier for a language model.
        downsample_factor: f, pixels per code on each side.
        num_quantizers: K.
        codebook_size: entries per codebook.
        codebook_dim: latent dims D.
        dropout: see `make_quantizer`.
        stage_steps: see `make_quantizer`.
        seed: of the initial weights.
        license: of the weights.
        quantizer: kind, see `make_quantizer`: "rvq", "fsq", "lfq" or "simvq".
        quantizer_options: further options of that kind, such as `decay` or `codebook_dim`.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (64, 128, 192),
        depth: int = 1,
        patch: int = 4,
        encoder_kernel: int = 3,
        downsample_factor: int = 16,
        num_quantizers: int = 2,
        codebook_size: int = 512,
        codebook_dim: int = 32,
        dropout: float = 0.1,
        stage_steps: int = 50,
        seed: int = 0,
        license: str = "apache-2.0",
        quantizer: str = "rvq",
        quantizer_options: Mapping[str, Any] | None = None,
    ) -> None:
        quantizer_options = dict(quantizer_options or {})
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({name: value for name, value in options.items() if ADDED.get(name, ...) != value})
        if patch * 2 ** (len(channels) - 1) != downsample_factor:
            raise ValueError(
                f"patch {patch} and {len(channels)} stages reduce by {patch * 2 ** (len(channels) - 1)}, not by "
                f"downsample_factor {downsample_factor}"
            )
        self.factor = downsample_factor
        first, last = channels[0], channels[-1]
        with seeded(seed):
            encoder: list[nn.Module] = [
                nn.PixelUnshuffle(patch),
                nn.Conv2d(3 * patch**2, first, encoder_kernel, padding=encoder_kernel // 2),
            ]
            for index, width in enumerate(channels):
                if index:
                    encoder += [nn.Conv2d(channels[index - 1], width, 2, stride=2)]
                encoder += [ResidualBlock(width, encoder_kernel) for _ in range(depth)]
            self.encoder = nn.Sequential(*encoder, *_head(last, codebook_dim, 1))
            self.quantizer = make_quantizer(
                quantizer,
                codebook_dim,
                num_quantizers,
                codebook_size,
                dropout=dropout,
                stage_steps=stage_steps,
                **quantizer_options,
            )
            self.decoder = decoder_of(codebook_dim, channels, patch, depth)
            self.linear_in = nn.Conv2d(3, codebook_dim, self.factor, stride=self.factor)
            self.linear_out = nn.Sequential(
                nn.Conv2d(codebook_dim, 3 * self.factor**2, 1), nn.PixelShuffle(self.factor)
            )

    def _latents(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = (x_BCHW - self.mean_C11) / self.deviation
        z_BDhw: Tensor = self.encoder(x_BCHW) + self.linear_in(x_BCHW)
        return z_BDhw

    def _pixels(self, z_BDhw: Tensor) -> Tensor:
        x_BCHW = (self.decoder(z_BDhw) + self.linear_out(z_BDhw)).float()
        return x_BCHW * self.deviation + self.mean_C11


def decoder_of(dim: int, channels: Sequence[int], patch: int, depth: int) -> nn.Sequential:
    """Latents `[B, dim, h, w]` to `[B, 3, H, W]` by residual blocks of 3 x 3; `channels` from fine to coarse."""
    layers: list[nn.Module] = [nn.Conv2d(dim, channels[-1], 3, padding=1)]
    for index in reversed(range(len(channels))):
        layers += [ResidualBlock(channels[index], 3) for _ in range(depth)]
        if index:
            layers += [nn.Conv2d(channels[index], 4 * channels[index - 1], 1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers, *_head(channels[0], 3 * patch**2, 3), nn.PixelShuffle(patch))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), convolutions of one kernel size at constant width."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_head(width, width, kernel), *_head(width, width, kernel))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.body(x_BCHW)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position: no position learns anything of another one here."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _head(width: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
    return ChannelNorm(width), nn.SiLU(), nn.Conv2d(width, outputs, kernel, padding=kernel // 2)
