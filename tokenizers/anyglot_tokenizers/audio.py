"""`AudioCodec`: a small speech or music codec, log-mel frames in, inverse STFT out.

Log-mel frames -> ConvNeXt blocks -> strided fold -> residual quantizer -> unfold -> ConvNeXt blocks ->
inverse-STFT head. The decoder is Vocos (Siuzdak, arXiv 2306.00814), the codec built around it follows
WavTokenizer (Ji et al., arXiv 2408.16532). All frame-rate work happens at 50 to 100 Hz, which is what makes
it usable on a CPU. Stereo is coded jointly: spectra of left, right, mid and side go in (what is where, and how alike
the sides are), mid and side come out.

Alignment: T frames mean exactly T * hop samples. Frame t is centred on samples [t * hop, (t + 1) * hop) in analysis and
synthesis alike; in a causal codec its analysis window ends with that hop and its synthesis window begins with it, so
codes and audio up to a hop depend on nothing after it. Padding: everything beyond an item's end is zero before every
convolution, which is what an item meets when it is alone; so neighbours in a batch never change its codes. Audio longer
than `max_samples` is encoded and decoded in chunks, with the same result. This file holds no losses, reads no files and
knows no teacher: it only offers what the first codebook gave (`learn_from`).

Shapes: B items, C channels (hidden channels inside blocks), S samples, T frames, N codes (N = T / stride), M mels,
F bins, W samples of a window, K quantizers, V views (left, right, mid and side).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_audio, check_lengths
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.quantizers import make_quantizer
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, full_precision, seeded

if TYPE_CHECKING:
    from anyglot_tokenizers.semantic import Distillation

KERNEL = 7  # of the depthwise convolutions, frames
ADDED = {"channels": 1, "causal": False, "quantizer": "rvq", "semantic_dim": 0}
"""Options younger than the first checkpoints: left out of the configuration, and so of the fingerprint, by default."""


@dataclass
class AudioReconstruction(Reconstruction):
    """With further losses, weighted: all are to be added to the loss of a training step."""

    extra_losses: dict[str, Tensor] = field(default_factory=dict)


class AudioCodec(Tokenizer):
    """Audio float32 `[B, channels, samples]` at `sample_rate` to codes int64 `[B, K, ceil(samples / hop_length)]`.

    Args:
        modality: name of the modality in the spec, `"speech"` or `"music"`.
        sample_rate: Hz.
        n_fft: analysis and synthesis window, samples (in a causal codec, the analysis window).
        hop: samples between frames.
        stride: frames per code; `hop_length = hop * stride` samples per code.
        num_mels: mel bands of the input.
        dim: width of the blocks.
        encoder_depth: ConvNeXt blocks before the quantizer.
        decoder_depth: ConvNeXt blocks after it.
        num_quantizers: K.
        codebook_size: entries per codebook.
        codebook_dim: latent dims.
        dropout: see `make_quantizer`.
        stage_steps: see `make_quantizer`.
        seed: of the initial weights.
        license: of the weights.
        channels: 1 or 2.
        quantizer: kind, see `make_quantizer`.
        causal: codes and decoded audio never depend on later input; streams then lag by no more than a hop.
        semantic_dim: dims of a teacher's features that the first codebook learns to predict (see `learn_from`);
            0 = none.
    """

    max_samples = 2**20
    """Samples of a batch that are computed at once; a longer one goes through in chunks."""

    mel_FM: Tensor
    window: Tensor
    synthesis_window: Tensor

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
        channels: int = 1,
        quantizer: str = "rvq",
        causal: bool = False,
        semantic_dim: int = 0,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({name: value for name, value in options.items() if ADDED.get(name, ...) != value})
        if min(sample_rate, n_fft, hop, stride) < 1 or n_fft % 2 or (n_fft - hop) % 2 or n_fft < 2 * hop:
            raise ValueError(f"need n_fft >= 2 * hop, both even, got n_fft {n_fft}, hop {hop}, stride {stride}")
        if n_fft * num_mels > 2**24:
            raise ValueError(f"n_fft {n_fft} times num_mels {num_mels} is more than {2**24}")
        if channels not in (1, 2) or semantic_dim < 0:
            raise ValueError(f"need 1 or 2 channels and semantic_dim >= 0, got {channels}, {semantic_dim}")
        self.modality = modality
        self.sample_rate = sample_rate
        self.n_fft, self.hop, self.stride = n_fft, hop, stride
        self.hop_length = hop * stride
        self.channels, self.causal = channels, causal
        self.loudest = max(6.0, math.log(n_fft / 3.2))  # log magnitude; a pure tone at full scale has n_fft / 4
        window, synthesis_window = low_delay_windows(n_fft, hop) if causal else (torch.hann_window(n_fft),) * 2
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("synthesis_window", synthesis_window, persistent=False)
        self.register_buffer("mel_FM", mel_filters(n_fft, num_mels, sample_rate), persistent=False)
        self.distillation: Distillation | None = None
        with seeded(seed):
            self.encoder = Backbone(num_mels if channels == 1 else 4 * num_mels, dim, encoder_depth, causal)
            self.fold = nn.Linear(dim * stride, codebook_dim)
            self.quantizer = make_quantizer(
                quantizer, codebook_dim, num_quantizers, codebook_size, dropout=dropout, stage_steps=stage_steps
            )
            self.unfold = nn.Linear(codebook_dim, dim * stride)
            self.decoder = Backbone(dim, dim, decoder_depth, causal)
            self.head = nn.Linear(dim, channels * 2 * (len(synthesis_window) // 2 + 1))
            nn.init.normal_(self.head.weight, std=0.02)
            if semantic_dim:
                self.semantic = nn.Linear(codebook_dim, semantic_dim)

    def _spec_entries(self) -> dict[str, Any]:
        # frames that reach a code: the depthwise kernels and the analysis window; likewise back to samples
        overlap = math.ceil((self.n_fft - self.hop) / (1 if self.causal else 2) / self.hop)
        reach = max(self.encoder.reach, self.decoder.reach) + overlap
        context = math.ceil(reach / self.stride) + 1
        return {
            "modality": self.modality,
            "codebook_sizes": (self.quantizer.codebook_size,) * self.quantizer.num_quantizers,
            "axes": ("time",),
            "strides": (self.hop_length,),
            "sample_rate": self.sample_rate,
            "channels": self.channels,
            "causal": self.causal,
            "context": (context, 0 if self.causal else context),
            "license": self.config["license"],
        }

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of audio; `lengths` are int64 `[B]` samples per item (None = all), the result's are codes per item.

        The last partial hop of an item is filled with silence. Raises MediaError for empty, non-finite or
        misshapen audio.
        """
        media, lengths = check_audio(media, lengths, self.channels)
        most, chunk_codes = self._most_codes(len(media))
        if media.shape[2] > most * self.hop_length:
            return encode_chunked(self, media, lengths, num_quantizers=num_quantizers, chunk_codes=chunk_codes)
        with full_precision(self.device):
            z_BND, valid_BN = self._encode(media.to(self.device), lengths.to(self.device))
            codes_BKN = self.quantizer.encode(z_BND.transpose(1, 2), num_quantizers)
        return Codes(codes_BKN * valid_BN[:, None], valid_BN.sum(1), self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Audio float32 `[B, channels, N * hop_length]` of codes `[B, k, N]`, any k <= K.

        Silence beyond an item's length.
        """
        codes_BKN, lengths_B = self._unpack(codes)
        batch, _, count = codes_BKN.shape
        most, chunk_codes = self._most_codes(batch)
        if count > most:
            return decode_chunked(self, codes, chunk_codes=chunk_codes).to(self.device)
        positions = torch.arange(count, device=self.device)
        with full_precision(self.device):
            q_BND = self.quantizer.decode(codes_BKN).transpose(1, 2)
            return self._decode(q_BND, positions < lengths_B.to(self.device)[:, None]).clamp(-1, 1)

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> AudioReconstruction:
        """Reconstruct with gradients, `[B, channels, ceil(samples / hop_length) * hop_length]`, not clamped."""
        lengths = check_lengths("audio batch", lengths, media).to(media.device)
        z_BND, valid_BN = self._encode(media, lengths)
        q_BDN, codes_BKN, commit, stats = self.quantizer(z_BND.transpose(1, 2), mask=valid_BN)
        x_BCS = self._decode(q_BDN.transpose(1, 2), valid_BN)
        extra_losses = {}
        if self.distillation is not None and self.training:
            with torch.autocast(media.device.type, enabled=False):
                z_BND = z_BND.float()
                first_BND = self.quantizer.decode(codes_BKN[:, :1]).transpose(1, 2)
                first_BND = torch.where(stats["usage"][0] > 0, first_BND, z_BND)  # the codebook may not have started
                guess_BNE = self.semantic(z_BND + (first_BND - z_BND).detach())
            extra_losses["semantic"] = self.distillation(guess_BNE, media, lengths, self)
        return AudioReconstruction(x_BCS, codes_BKN, commit, stats, extra_losses)

    def to_latents(self, media: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents `[B, D, N]` with gradient, and validity bool `[B, N]`."""
        z_BND, valid_BN = self._encode(media, check_lengths("audio batch", lengths, media).to(media.device))
        return z_BND.transpose(1, 2), valid_BN

    def from_latents(self, q_BDN: Tensor, counts_BN: Tensor) -> Tensor:
        """Audio `[B, channels, N * hop_length]` with gradient, not clamped."""
        return self._decode(q_BDN.transpose(1, 2), counts_BN)

    def learn_from(self, distillation: Distillation | None) -> None:
        """From now on `forward` in training also gives `extra_losses["semantic"]`, weighted, to be added to the loss.

        The teacher is no part of this module: it is neither saved nor trained. Raises ValueError if its features are
        not `semantic_dim` wide.
        """
        if distillation is not None and distillation.teacher.dim != self.config.get("semantic_dim", 0):
            raise ValueError(
                f"the teacher's features have {distillation.teacher.dim} dims, "
                f"this codec was built with semantic_dim {self.config.get('semantic_dim', 0)}"
            )
        self.distillation = distillation

    def _most_codes(self, batch: int) -> tuple[int, int]:
        """Codes per item that are computed at once, by `max_samples`, and how many of them are not context."""
        context = sum(self._spec_entries()["context"])
        most = max(self.max_samples // (batch * self.hop_length), 8 * context)
        return most, most - context

    def _encode(self, x_BCS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[B, N, D]` and validity `[B, N]`."""
        batch, _, samples = x_BCS.shape
        count = -(-samples // self.hop_length)
        x_BCS = x_BCS * (torch.arange(samples, device=x_BCS.device) < lengths_B[:, None])[:, None]
        x_BCS = F.pad(x_BCS, (0, count * self.hop_length - samples))
        valid_BN = torch.arange(count, device=x_BCS.device) * self.hop_length < lengths_B[:, None]
        frames_BT1 = valid_BN.repeat_interleave(self.stride, 1)[..., None]
        h_BTC = self.encoder(self._log_mel(x_BCS), frames_BT1)
        return self.fold(h_BTC.reshape(batch, count, -1)), valid_BN

    def _decode(self, q_BND: Tensor, valid_BN: Tensor) -> Tensor:
        """Waveform `[B, channels, N * hop_length]`, float32, zero where not valid."""
        batch, count, _ = q_BND.shape
        frames_BT1 = valid_BN.repeat_interleave(self.stride, 1)[..., None]
        h_BTC = self.decoder(self.unfold(q_BND).reshape(batch, count * self.stride, -1), frames_BT1)
        x_BCS = self._synthesise(self.head(h_BTC), frames_BT1)
        x_BCS = x_BCS if self.channels == 1 else left_right(x_BCS)
        return x_BCS * valid_BN.repeat_interleave(self.hop_length, 1)[:, None]

    def _log_mel(self, x_BCS: Tensor) -> Tensor:
        """Log-mel frames `[B, T, M]`, roughly in [-1, 2]; of stereo `[B, T, 4 * M]`: left, right, mid, side."""
        with torch.autocast(x_BCS.device.type, enabled=False):
            before = (self.n_fft - self.hop) // (1 if self.causal else 2)
            frames_BCTW = F.pad(x_BCS.float(), (before, self.n_fft - self.hop - before)).unfold(2, self.n_fft, self.hop)
            spectra_BVTF = torch.fft.rfft(frames_BCTW * self.window)
            if self.channels == 2:
                spectra_BVTF = torch.cat([spectra_BVTF, mid_side(spectra_BVTF)], 1)
            mel_BVTM = ((spectra_BVTF.abs() @ self.mel_FM).clamp(min=1e-3).log() + 3) / 4
            return mel_BVTM.transpose(1, 2).flatten(2)

    def _synthesise(self, h_BTn: Tensor, frames_BT1: Tensor) -> Tensor:
        """Vocos head: magnitudes and phases -> windowed frames -> overlap-add, `[B, channels, T * hop]`."""
        with torch.autocast(h_BTn.device.type, enabled=False):
            h_BCTn = h_BTn.float().unflatten(2, (self.channels, -1)).transpose(1, 2)
            magnitude_BCTF, phase_BCTF = h_BCTn.chunk(2, dim=-1)
            magnitude_BCTF = magnitude_BCTF.clamp(max=self.loudest).exp() * frames_BT1[:, None]
            size = len(self.synthesis_window)
            frames_BCTW = torch.fft.irfft(torch.polar(magnitude_BCTF, phase_BCTF), n=size) * self.synthesis_window
            x_BCS = overlap_add(frames_BCTW, self.hop)
            if self.causal:  # the windows themselves add up to one
                return x_BCS[..., : frames_BT1.shape[1] * self.hop]
            overlap_B1S = overlap_add(self.window.square() * frames_BT1[:, None], self.hop)
            margin = (size - self.hop) // 2
            inner = slice(margin, margin + frames_BT1.shape[1] * self.hop)
            return x_BCS[..., inner] / overlap_B1S[..., inner].clamp(min=1e-6)


def mid_side(pair_BC: Tensor) -> Tensor:
    """Half sum and half difference of left and right, `[B, 2, ...]`; `left_right` is the inverse."""
    left_B, right_B = pair_BC.unbind(1)
    return torch.stack([(left_B + right_B) / 2, (left_B - right_B) / 2], 1)


def left_right(pair_BC: Tensor) -> Tensor:
    """Left and right of mid and side, `[B, 2, ...]`."""
    mid_B, side_B = pair_BC.unbind(1)
    return torch.stack([mid_B + side_B, mid_B - side_B], 1)


def overlap_add(frames_BCTW: Tensor, hop: int) -> Tensor:
    """Sum of frames laid `hop` samples apart, `[B, C, (T - 1) * hop + W]` (rounded up to whole hops).

    Hop-sized pieces of all frames are added at once, earliest piece first: many times faster than `F.fold` and, on
    the CPU, equal to it bit for bit.
    """
    size = frames_BCTW.shape[3]
    pieces = -(-size // hop)
    pieces_BCTph = F.pad(frames_BCTW, (0, pieces * hop - size)).unflatten(3, (pieces, hop))
    total: Tensor | float = 0.0
    for piece in range(pieces):
        total = total + F.pad(pieces_BCTph[:, :, :, piece], (0, 0, piece, pieces - 1 - piece))
    assert isinstance(total, Tensor)
    return total.flatten(2)


def low_delay_windows(n_fft: int, hop: int) -> tuple[Tensor, Tensor]:
    """Windows of a causal codec, for analysis `[n_fft]` (ends with the hop) and synthesis (begins with it).

    The analysis window rises slowly and falls within half a hop, so that the newest samples count. Synthesis windows
    last a hop and a half and cross-fade over half a hop: a frame says all of its own hop, and extrapolates little.
    """
    fade = hop // 2
    fall = torch.cos((torch.arange(fade) + 0.5) * (math.pi / 2 / fade)).square()
    rise = torch.sin((torch.arange(n_fft - fade) + 0.5) * (math.pi / 2 / (n_fft - fade))).square()
    return torch.cat([rise, fall]), torch.cat([1 - fall, torch.ones(hop - fade), fall])


class Backbone(nn.Module):
    """Depthwise-separable embedding, ConvNeXt blocks, final norm: `[B, T, inputs]` to `[B, T, dim]`.

    `reach` is how many frames to each side (causal: before it) can influence a frame.
    """

    def __init__(self, inputs: int, dim: int, depth: int, causal: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, 1 / max(depth, 1), causal) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.reach = depth * (KERNEL - 1 if causal else KERNEL // 2)

    def forward(self, x_BTC: Tensor, valid_BT1: Tensor) -> Tensor:
        h_BTC = self.norm_in(self.embed(x_BTC))
        for block in self.blocks:
            h_BTC = block(h_BTC, valid_BT1)
        return self.norm_out(h_BTC)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise MLP, with a scaled residual (Liu et al., arXiv 2201.03545)."""

    def __init__(self, dim: int, scale: float, causal: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, KERNEL, padding=KERNEL - 1 if causal else KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x_BTC: Tensor, valid_BT1: Tensor) -> Tensor:
        h_BCT = self.depthwise((x_BTC * valid_BT1).transpose(1, 2))  # a causal one gives KERNEL - 1 frames too many
        h_BTC = h_BCT[:, :, : x_BTC.shape[1]].transpose(1, 2)
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
