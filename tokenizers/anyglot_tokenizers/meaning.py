"""`HeardVQ` and `SeenVQ`: codes that a model only reads, for what is said or shown and not for how it sounds or looks.

A codec's codes must rebuild the signal, so most of what they say is voice and recording, or light and background. A
quantizer inside an encoder that learns to recognise things keeps what tells them apart: the supervised semantic
tokenizer of CosyVoice (Du et al., arXiv 2407.05407) for speech; two encoders, one to understand pictures and one to
draw them, as in Janus (Wu et al., arXiv 2410.13848). Whoever trains one gives the head and the labels (`forward` gives
the quantized latents); the head is no part of what is saved. Nothing can be decoded. No losses, no files here.

Codes of audio are the same whether an item comes alone or padded in a batch. The level, or the mean spectrum as well
(microphone, part of the voice), is taken off each item by itself.

Shapes: B items, S samples, t frames of 10 ms, M mels, N codes, H x W pixels, D latent dims, E width.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.audio import mel_filters
from anyglot_tokenizers.checks import check_audio, check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import UnsupportedError
from anyglot_tokenizers.image import ChannelNorm, image_entries
from anyglot_tokenizers.quantizers import make_quantizer
from anyglot_tokenizers.tokenizer import Tokenizer, full_precision, seeded

RATE = 16_000
HOP = 160
FRAMES = 4  # of a code
FLOOR = 1e-4  # of an item's mean power: what is softer counts as silence
SPREAD = 2.0  # nats: deviation of log power, roughly
DOUBT = 0.7  # nats: deviation of a level, in training
Normalize = Literal["level", "spectrum"]


class MeaningTokenizer(Tokenizer):
    """What is only read. `HeardVQ` and `SeenVQ` build `quantizer` and give `latents`."""

    quantizer: Any

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Raises UnsupportedError: these codes hold too little to rebuild anything."""
        raise UnsupportedError(f"codes of {type(self).__name__} are only read; answer in another block")

    def quantize(self, z_BDN: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents as the codebooks have them, with straight-through gradients, and the commitment loss.

        Until the first codebook starts, latents pass through as they are.
        """
        q_BDN, _, commit, _ = self.quantizer(z_BDN, mask=mask)
        return q_BDN, commit


class HeardVQ(MeaningTokenizer):
    """Audio float32 `[B, 1, S]` at 16 kHz to codes int64 `[B, K, ceil(S / 640)]`, 25 a second.

    Args:
        modality: name in the spec.
        dim: width of the convolutions over time.
        depth: convolutions over time, of 5 codes each.
        channels: of the convolutions over time and frequency that come before.
        num_mels: mel bands, divisible by 8.
        top_hz: of the highest band: recordings with less bandwidth than others are heard alike.
        normalize: "level" counts log power from `FLOOR` of the item's mean power, so that silence is 0; "spectrum"
            takes the mean of each mel band off and divides by its deviation, so that microphones matter less and
            steady sounds are lost. Of single words by new speakers more are understood with "level" (docs/log.md,
            2026-11-30).
        num_quantizers: K.
        codebook_size: C.
        codebook_dim: D.
        stage_steps: training steps before each codebook starts.
        seed: of the initial weights.
        license: of the weights.
    """

    mel_FM: Tensor
    window: Tensor
    hop_length = HOP * FRAMES
    sample_rate = RATE

    def __init__(
        self,
        *,
        modality: str = "heard",
        dim: int = 128,
        depth: int = 4,
        channels: int = 32,
        num_mels: int = 40,
        top_hz: int = 4000,
        normalize: Normalize = "level",
        num_quantizers: int = 1,
        codebook_size: int = 256,
        codebook_dim: int = 32,
        stage_steps: int = 300,
        seed: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if num_mels % 8 or not 0 < top_hz <= RATE // 2 or RATE // 2 % top_hz:
            raise ValueError(f"need num_mels divisible by 8 and top_hz a part of {RATE // 2}: {num_mels}, {top_hz}")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize {normalize!r} must be one of {', '.join(get_args(Normalize))}")
        self.modality = modality
        size = 512
        part = RATE // 2 // top_hz
        mel_FM = torch.zeros(size // 2 + 1, num_mels)
        mel_FM[: size // part // 2 + 1] = mel_filters(size // part, num_mels, 2 * top_hz, 100.0)
        self.register_buffer("mel_FM", mel_FM, persistent=False)
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        with seeded(seed):
            self.patches = nn.ModuleList(
                [
                    nn.Conv2d(1, channels, (3, 5), stride=(2, 2), padding=(1, 2)),
                    nn.Conv2d(channels, channels, 3, stride=(1, 2), padding=1),
                    nn.Conv2d(channels, channels, 3, stride=(2, 2), padding=1),
                ]
            )
            self.norms = nn.ModuleList(ChannelNorm(channels) for _ in self.patches)
            self.embed = nn.Linear(channels * num_mels // 8, dim)
            self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 5, padding=2) for _ in range(depth))
            self.mid = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
            self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, codebook_dim))
            self.quantizer = make_quantizer(
                "rvq", codebook_dim, num_quantizers, codebook_size, dropout=0.0, stage_steps=stage_steps
            )

    def _spec_entries(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "codebook_sizes": self.quantizer.codebook_sizes,
            "axes": ("time",),
            "strides": (self.hop_length,),
            "sample_rate": RATE,
            "channels": 1,
            "license": self.config["license"],
            "decodes": False,
        }

    def power(self, x_BS: Tensor) -> Tensor:
        """Mel power `[B, 4 * N, M]`, frame t centred on sample `160 t + 80`."""
        count = -(-x_BS.shape[1] // self.hop_length) * FRAMES
        margin = len(self.window) - HOP
        x_BS = F.pad(x_BS, (margin // 2, count * HOP - x_BS.shape[1] + margin - margin // 2))
        return torch.fft.rfft(x_BS.unfold(1, len(self.window), HOP) * self.window).abs().square() @ self.mel_FM

    def latents(self, power_BtM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[B, D, N]` of mel power of `frames_B` frames each, and which codes count, bool `[B, N]`."""
        valid_Bt1 = (torch.arange(power_BtM.shape[1], device=power_BtM.device) < frames_B[:, None])[..., None].float()
        total_B11 = valid_Bt1.sum(1, keepdim=True)
        mean_B11 = (power_BtM * valid_Bt1).sum((1, 2), keepdim=True) / total_B11 / power_BtM.shape[2]
        log_BtM = (power_BtM + FLOOR * mean_B11 + 1e-10).log()
        if self.config["normalize"] == "level":
            silence_B11 = (FLOOR * mean_B11 + 1e-10).log()
            if self.training:  # nobody knows how loud a clip would be as part of a longer one
                silence_B11 = silence_B11 + DOUBT * torch.randn_like(silence_B11)
            log_BtM = (log_BtM - silence_B11) * valid_Bt1 / SPREAD
        else:
            log_BtM = (log_BtM - (log_BtM * valid_Bt1).sum(1, keepdim=True) / total_B11) * valid_Bt1
            spread_B1M = (log_BtM.square().sum(1, keepdim=True) / total_B11).sqrt()
            log_BtM = log_BtM / spread_B1M.clamp(min=0.3)
        if self.training:
            log_BtM = mask_spans(mask_spans(log_BtM, 1, 8), 2, 5)
        h_BEtm = log_BtM[:, None]
        for conv, norm in zip(self.patches, self.norms, strict=True):
            h_BEtm = F.gelu(norm(conv(h_BEtm)))
            valid_Bt1 = valid_Bt1[:, :: conv.stride[0]]  # type: ignore[index]
            h_BEtm = h_BEtm * valid_Bt1[:, None]
        h_BNE = self.embed(h_BEtm.transpose(1, 2).flatten(2))
        for conv, norm in zip(self.convs, self.mid, strict=True):
            h_BNE = h_BNE + F.gelu(norm(conv((h_BNE * valid_Bt1).transpose(1, 2)).transpose(1, 2)))
        return self.out(h_BNE).transpose(1, 2), valid_Bt1[..., 0] > 0

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of audio; `lengths` are int64 `[B]` samples per item (None = all), the result's are codes per item.

        Raises MediaError for empty, non-finite or misshapen audio.
        """
        media, lengths = check_audio(media, lengths, 1)
        media, lengths = media.to(self.device), lengths.to(self.device)
        with full_precision(self.device):
            x_BS = media[:, 0] * (torch.arange(media.shape[2], device=self.device) < lengths[:, None])
            z_BDN, valid_BN = self.latents(self.power(x_BS), -(-lengths // HOP))
            codes_BKN = self.quantizer.encode(z_BDN, num_quantizers)
        return Codes(codes_BKN * valid_BN[:, None], valid_BN.sum(1), self.spec)


class SeenVQ(MeaningTokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, K, H/f, W/f]`, for H, W divisible by f = 16.

    Args:
        modality: name in the spec.
        channels: width of the four stages, each of which halves the resolution.
        num_quantizers: K.
        codebook_size: C.
        codebook_dim: D.
        stage_steps: training steps before each codebook starts.
        seed: of the initial weights.
        license: of the weights.
    """

    def __init__(
        self,
        *,
        modality: str = "seen",
        channels: tuple[int, int, int, int] = (32, 64, 96, 128),
        num_quantizers: int = 1,
        codebook_size: int = 512,
        codebook_dim: int = 32,
        stage_steps: int = 300,
        seed: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self.modality = modality
        with seeded(seed):
            layers: list[nn.Module] = []
            for inputs, outputs in zip((3, *channels[:-1]), channels, strict=True):
                layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
            layers.append(nn.Conv2d(channels[-1], codebook_dim, 1))
            self.encoder = nn.Sequential(*layers)
            self.quantizer = make_quantizer(
                "rvq", codebook_dim, num_quantizers, codebook_size, dropout=0.0, stage_steps=stage_steps
            )

    def _spec_entries(self) -> dict[str, Any]:
        entries = image_entries(self.quantizer.codebook_sizes, 16, self.config["license"])
        return entries | {"modality": self.modality, "decodes": False}

    def latents(self, x_BCHW: Tensor) -> Tensor:
        """Latents `[B, D, H/f, W/f]`."""
        z_BDhw: Tensor = self.encoder(2 * x_BCHW - 1)
        return z_BDhw

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of one size. Raises MediaError for wrong sizes, ranges, and lengths (images have none)."""
        x_BCHW = check_images(media, lengths, factor=16).to(self.device)
        with full_precision(self.device):
            codes_BKhw = self.quantizer.encode(self.latents(x_BCHW), num_quantizers)
        return Codes(codes_BKhw, None, self.spec)


def mask_spans(x_BtM: Tensor, axis: int, most: int) -> Tensor:
    """Zero a random span of up to `most` places along an axis of each item (SpecAugment, arXiv 1904.08779)."""
    size = x_BtM.shape[axis]
    start_B1 = torch.randint(0, size, (len(x_BtM), 1))
    length_B1 = torch.randint(0, most + 1, (len(x_BtM), 1))
    place_P = torch.arange(size)
    hidden_BP = (place_P >= start_B1) & (place_P < start_B1 + length_B1)
    return x_BtM * ~hidden_BP.unsqueeze(3 - axis).to(x_BtM.device)  # drawn on the CPU: the same on every device
