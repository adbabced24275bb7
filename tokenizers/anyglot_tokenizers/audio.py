"""`AudioCodec`: a small speech or music codec, log-mel frames in, inverse STFT out.

Log-mel frames -> ConvNeXt blocks -> strided fold -> residual quantizer -> unfold -> ConvNeXt blocks ->
inverse-STFT head. The decoder is Vocos (Siuzdak, arXiv 2306.00814), the codec built around it follows
WavTokenizer (Ji et al., arXiv 2408.16532). All frame-rate work happens at 50 to 100 Hz, which is what makes
it usable on a CPU.

Alignment: frame t is centred on samples [t * hop, (t + 1) * hop) in analysis and synthesis alike, so T frames mean
exactly T * hop samples. Padding: everything beyond an item's end is zero before every convolution, which is what an
item meets when it is alone; so neighbours in a batch never change its codes. This file holds no losses and reads no
files.

Shapes: B items, S samples, T frames, N codes (N = T / stride), M mels, F = n_fft / 2 + 1 bins, C channels, K
quantizers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CodesError, MediaError
from anyglot_tokenizers.quantize import ResidualQuantizer
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, check_media, full_precision, seeded

KERNEL = 7  # of the depthwise convolutions, frames


class AudioCodec(Tokenizer):
    """Audio float32 `[B, 1, samples]` at `sample_rate` to codes int64 `[B, K, ceil(samples / hop_length)]`.

    Args:
        modality: name of the modality in the spec, `"speech"` or `"music"`.
        sample_rate: Hz.
        n_fft: analysis and synthesis window, samples.
        hop: samples between frames.
        stride: frames per code; `hop_length = hop * stride` samples per code.
        num_mels: mel bands of the input.
        dim: width of the blocks.
        encoder_depth: ConvNeXt blocks before the quantizer.
        decoder_depth: ConvNeXt blocks after it.
        num_quantizers: K.
        codebook_size: entries per codebook.
        codebook_dim: latent dims.
        dropout: see `ResidualQuantizer`.
        stage_steps: see `ResidualQuantizer`.
        seed: of the initial weights.
        license: of the weights.
    """

    mel_FM: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        modality: str = "speech",
        sample_rate: int = 16000,
        n_fft: int = 1280,
        hop: int = 320,
        stride: int = 2,
        num_mels: int = 80,
        dim: int = 256,
        encoder_depth: int = 3,
        decoder_depth: int = 4,
        num_quantizers: int = 4,
        codebook_size: int = 512,
        codebook_dim: int = 64,
        dropout: float = 0.1,
        stage_steps: int = 50,
        seed: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if min(sample_rate, n_fft, hop, stride) < 1 or (n_fft - hop) % 2 or n_fft < 2 * hop:
            raise ValueError(
                f"need n_fft >= 2 * hop and n_fft - hop even, got n_fft {n_fft}, hop {hop}, stride {stride}"
            )
        self.modality = modality
        self.sample_rate = sample_rate
        self.n_fft, self.hop, self.stride = n_fft, hop, stride
        self.hop_length = hop * stride
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("mel_FM", mel_filters(n_fft, num_mels, sample_rate), persistent=False)
        with seeded(seed):
            self.encoder = Backbone(num_mels, dim, encoder_depth)
            self.fold = nn.Linear(dim * stride, codebook_dim)
            self.quantizer = ResidualQuantizer(
                codebook_dim, num_quantizers, codebook_size, dropout=dropout, stage_steps=stage_steps
            )
            self.unfold = nn.Linear(codebook_dim, dim * stride)
            self.decoder = Backbone(dim, dim, decoder_depth)
            self.head = nn.Linear(dim, n_fft + 2)
            nn.init.normal_(self.head.weight, std=0.02)

    def _spec_entries(self) -> dict[str, Any]:
        # frames that reach a code: the depthwise kernels and the analysis window; likewise back to samples
        overlap = math.ceil((self.n_fft - self.hop) / 2 / self.hop)
        reach = max(self.encoder.reach, self.decoder.reach) + overlap
        context = math.ceil(reach / self.stride) + 1
        return {
            "modality": self.modality,
            "codebook_sizes": (self.quantizer.codebook_size,) * self.quantizer.num_quantizers,
            "axes": ("time",),
            "strides": (self.hop_length,),
            "sample_rate": self.sample_rate,
            "channels": 1,
            "causal": False,
            "context": (context, context),
            "license": self.config["license"],
        }

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of audio; `lengths` are int64 `[B]` samples per item (None = all), the result's are codes per item.

        The last partial hop of an item is filled with silence. Raises MediaError for empty, non-finite or
        misshapen audio.
        """
        media = check_media("audio batch", media, "float32[batch, 1, samples]", 3, 1).to(self.device)
        lengths = self._checked_lengths(media, lengths)
        with full_precision(self.device):
            z_BND, valid_BN = self._encode(media[:, 0], lengths)
            codes_BKN = self.quantizer.encode(z_BND.transpose(1, 2), num_quantizers)
        return Codes(codes_BKN * valid_BN[:, None], valid_BN.sum(1), self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Audio float32 `[B, 1, N * hop_length]` of codes `[B, k, N]`, any k <= K.

        Silence beyond an item's length.
        """
        self._check_origin(codes)
        lengths = codes.lengths if isinstance(codes, Codes) else None
        codes_BKN = (codes.codes if isinstance(codes, Codes) else codes).to(self.device)
        if codes_BKN.ndim != 3 or codes_BKN.shape[2] == 0:
            raise CodesError(f"audio codes must be [batch, quantizers, time >= 1], got {list(codes_BKN.shape)}")
        batch, _, count = codes_BKN.shape
        positions = torch.arange(count, device=self.device)
        ends = torch.full((batch,), count, device=self.device) if lengths is None else lengths.to(self.device)
        with full_precision(self.device):
            q_BND = self.quantizer.decode(codes_BKN).transpose(1, 2)
            x_BS = self._decode(q_BND, positions < ends[:, None])
        return x_BS[:, None].clamp(-1, 1)

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        """Reconstruct with gradients, `[B, 1, ceil(samples / hop_length) * hop_length]`, not clamped."""
        lengths = self._checked_lengths(media, lengths)
        z_BND, valid_BN = self._encode(media[:, 0], lengths)
        q_BDN, codes_BKN, commit, stats = self.quantizer(z_BND.transpose(1, 2), mask=valid_BN)
        x_BS = self._decode(q_BDN.transpose(1, 2), valid_BN)
        return Reconstruction(x_BS[:, None], codes_BKN, commit, stats)

    def _checked_lengths(self, media: Tensor, lengths: Tensor | None) -> Tensor:
        batch, _, samples = media.shape
        if lengths is None:
            return torch.full((batch,), samples, dtype=torch.int64, device=media.device)
        if lengths.shape != (batch,) or lengths.dtype != torch.int64:
            raise MediaError(
                "audio batch",
                f"lengths are {lengths.dtype}{list(lengths.shape)}",
                f"need int64[{batch}], in samples",
            )
        if int(lengths.min()) < 1 or int(lengths.max()) > samples:
            raise MediaError(
                "audio batch",
                f"lengths {lengths.tolist()[:8]} leave 1..{samples}",
                "drop empty items, in samples",
            )
        return lengths.to(media.device)

    def _encode(self, x_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[B, N, D]` and validity `[B, N]`."""
        batch, samples = x_BS.shape
        count = -(-samples // self.hop_length)
        x_BS = x_BS * (torch.arange(samples, device=x_BS.device) < lengths_B[:, None])
        x_BS = F.pad(x_BS, (0, count * self.hop_length - samples))
        valid_BN = torch.arange(count, device=x_BS.device) * self.hop_length < lengths_B[:, None]
        frames_BT1 = valid_BN.repeat_interleave(self.stride, 1)[..., None]
        h_BTC = self.encoder(self._log_mel(x_BS), frames_BT1)
        return self.fold(h_BTC.reshape(batch, count, -1)), valid_BN

    def _decode(self, q_BND: Tensor, valid_BN: Tensor) -> Tensor:
        """Waveform `[B, N * hop_length]`, float32, zero where not valid."""
        batch, count, _ = q_BND.shape
        frames_BT1 = valid_BN.repeat_interleave(self.stride, 1)[..., None]
        h_BTC = self.decoder(self.unfold(q_BND).reshape(batch, count * self.stride, -1), frames_BT1)
        x_BS = self._synthesise(self.head(h_BTC), frames_BT1)
        return x_BS * valid_BN.repeat_interleave(self.hop_length, 1)

    def _log_mel(self, x_BS: Tensor) -> Tensor:
        """Log-mel frames `[B, T, M]`, roughly in [-1, 2]."""
        with torch.autocast(x_BS.device.type, enabled=False):
            margin = (self.n_fft - self.hop) // 2
            frames_BTn = F.pad(x_BS.float(), (margin, margin)).unfold(1, self.n_fft, self.hop)
            power_BTF = torch.fft.rfft(frames_BTn * self.window).abs()
            return ((power_BTF @ self.mel_FM).clamp(min=1e-3).log() + 3) / 4

    def _synthesise(self, h_BTn: Tensor, frames_BT1: Tensor) -> Tensor:
        """Vocos head: magnitude and phase -> windowed frames -> overlap-add, divided by the window's own overlap."""
        with torch.autocast(h_BTn.device.type, enabled=False):
            magnitude_BTF, phase_BTF = h_BTn.float().chunk(2, dim=-1)
            magnitude_BTF = magnitude_BTF.clamp(max=6.0).exp() * frames_BT1
            frames_BTn = torch.fft.irfft(torch.polar(magnitude_BTF, phase_BTF), n=self.n_fft) * self.window
            count = frames_BTn.shape[1]
            weight_BnT = self.window.square()[:, None] * frames_BT1.float().transpose(1, 2)
            x_BS = self._overlap_add(frames_BTn.transpose(1, 2), count)
            return x_BS / self._overlap_add(weight_BnT, count).clamp(min=1e-6)

    def _overlap_add(self, frames_BnT: Tensor, count: int) -> Tensor:
        margin = (self.n_fft - self.hop) // 2
        size = (count - 1) * self.hop + self.n_fft
        x_BS = F.fold(frames_BnT, (1, size), (1, self.n_fft), stride=(1, self.hop))[:, 0, 0]
        return x_BS[:, margin : size - margin]


class Backbone(nn.Module):
    """Depthwise-separable embedding, ConvNeXt blocks, final norm: `[B, T, inputs]` to `[B, T, dim]`.

    `reach` is how many frames to each side can influence a frame.
    """

    def __init__(self, inputs: int, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, 1 / max(depth, 1)) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.reach = depth * (KERNEL // 2)

    def forward(self, x_BTC: Tensor, valid_BT1: Tensor) -> Tensor:
        h_BTC = self.norm_in(self.embed(x_BTC))
        for block in self.blocks:
            h_BTC = block(h_BTC, valid_BT1)
        return self.norm_out(h_BTC)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise MLP, with a scaled residual (Liu et al., arXiv 2201.03545)."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x_BTC: Tensor, valid_BT1: Tensor) -> Tensor:
        h_BTC = self.depthwise((x_BTC * valid_BT1).transpose(1, 2)).transpose(1, 2)
        return x_BTC + self.scale * self.down(F.gelu(self.up(self.norm(h_BTC))))


def mel_filters(n_fft: int, num_mels: int, sample_rate: int, low_hz: float = 0.0) -> Tensor:
    """Triangular mel filters, float32 `[n_fft / 2 + 1, num_mels]`, each summing to at most one.

    HTK mel scale, mel = 2595 log10(1 + f / 700) (O'Shaughnessy 1987). A filter narrower than a bin keeps its
    nearest bin.
    """
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    bottom = 2595 * np.log10(1 + low_hz / 700)
    edges_hz = 700 * (10 ** (np.linspace(bottom, top, num_mels + 2) / 2595) - 1)
    bins_hz = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    left, centre, right = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    filters = np.minimum((bins_hz - left) / (centre - left), (right - bins_hz) / (right - centre)).clip(min=0)
    empty = filters.sum(0) == 0
    filters[np.abs(bins_hz - centre).argmin(0)[empty], np.nonzero(empty)[0]] = 1.0
    return torch.from_numpy(filters / filters.sum(0).clip(min=1.0)).float()
