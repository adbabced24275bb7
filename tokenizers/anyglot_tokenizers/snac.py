"""`Snac`: the multi-scale neural audio codec of Siuzdak et al. (arXiv 2410.14411), from its published weights.

A coarse code stands for 2, 4 or 8 of the finest. Modules carry the names of the published checkpoints
(github.com/hubertsiuzdak/snac), with weight norm folded away when they are read. The publisher gives `config.json` and
a pickle, of which `convert.py` makes safetensors once.

What differs from the original, and why:

- Codes are one rectangle `[B, K, T]` at the rate of the coarsest codebook: with `vq_strides` 4, 2, 1 there are
  K = 1 + 2 + 4 columns, coarsest codebook first, each codebook in order of time. The first 1 or 3 columns alone are
  valid codes of lower quality. (Models that write frames depth first, such as Orpheus, order the columns 0, 1, 3, 4, 2,
  5, 6.)
- T is ceil(samples / hop_length). The original also keeps what it codes of the silence that fills its last attention
  window.
- Long items are computed piece by piece, with the same result, in memory bounded by `max_samples`.
- Decoding is deterministic. The original multiplies fresh noise into the decoder at every call. Here there is none,
  unless `noise_seed` is set: then it is drawn from that seed, the same for every item.

Shapes: B items, S samples, T coarsest codes, K columns, N codes of one codebook, L positions at any rate (latent frames
where codes are made: T * vq_strides[0]), C channels, W attention window, h attention heads, d dims of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.convs import (
    Conv1d,
    ConvTranspose1d,
    Snake,
    decoder_context,
    encoder_context,
    fold_weight_norm,
)
from anyglot_tokenizers.errors import CodesError
from anyglot_tokenizers.published_audio import PublishedAudio, check_sizes
from anyglot_tokenizers.quantize import nearest
from anyglot_tokenizers.tokenizer import seeded

KERNEL = 7
DILATIONS = (1, 3, 9)
HEAD = 64  # dims of an attention head
NOISE = 2**16  # positions before the noise repeats


class Snac(PublishedAudio):
    """Audio float32 `[B, 1, samples]` to codes int64 `[B, K, ceil(samples / hop_length)]` and back.

    `num_quantizers` of `encode`, and the k of codes given to `decode`, count columns: those of the first codebooks.

    Args:
        model: the publisher's config.json: `sampling_rate`, `encoder_dim`, `encoder_rates`, `decoder_dim`,
            `decoder_rates`, `attn_window_size` (null = no attention), `codebook_size`, `codebook_dim`, `vq_strides`,
            `noise`, `depthwise`; what is missing has the publisher's defaults.
        license: of the weights.
        modality: name of the modality in the spec; "" = speech up to 24 kHz, music above, as the weights were trained.

    Attributes:
        noise_seed: None = decode without noise; a whole number = with noise from this seed, scaled as in training. Not
            part of the tokenizer's identity. With it there are no chunks, which would each begin the noise anew, and
            items are decoded at once.
    """

    noise_seed: int | None = None

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "") -> None:
        settings = snac_settings(model)
        modality = modality or ("speech" if settings["sampling_rate"] <= 24000 else "music")
        super().__init__(model=settings, license=license, modality=modality)
        self.sample_rate = settings["sampling_rate"]
        self.window: int | None = settings["attn_window_size"]
        self.codebook_size = settings["codebook_size"]
        self.coarsest = settings["vq_strides"][0]
        self.frame_hop = math.prod(settings["encoder_rates"])  # samples per latent frame
        self.hop_length = self.frame_hop * self.coarsest
        with seeded(0):
            self.encoder = Encoder(settings)
            self.quantizer = MultiScaleQuantizer(settings)
            self.decoder = Decoder(settings)
        self.num_quantizers = sum(self.quantizer.columns)
        self.requires_grad_(False).eval()

    def _published_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return fold_weight_norm({name: x for name, x in tensors.items() if not name.endswith("rel_pos.inv_freq")})

    def _spec_entries(self) -> dict[str, Any]:
        left, right, multiple = self._reach()
        context = (left, right) if self.noise_seed is None else None  # noise would begin anew in every chunk
        return {**super()._spec_entries(), "context": context, "chunk_multiple": multiple}

    def _reach(self) -> tuple[int, int, int]:
        """(left, right) codes that a code or its samples depend on; chunks start at multiples of the third number."""
        window = self.window or 1
        encoder = encoder_context(self.encoder.modules(), self.frame_hop)
        decoder = decoder_context(self.decoder.modules(), self.frame_hop)
        left, right = (max(pair) + window - 1 for pair in zip(encoder, decoder, strict=True))  # latent frames
        multiple = math.lcm(self.coarsest, window) // self.coarsest
        return math.ceil(left / self.coarsest), math.ceil(right / self.coarsest), multiple

    def _pieces(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, first, last, end): codes first..last come from start..end, no more than memory is meant for."""
        left, right, multiple = self._reach()
        left = -(-left // multiple) * multiple
        size = (
            max(self.max_samples // self.hop_length - left - right, 2 * (left + right), multiple) // multiple * multiple
        )
        if count <= left + size + right:
            size = -(-count // multiple) * multiple
        for first in range(0, count, size):
            last = min(first + size, count)
            yield max(first - left, 0), first, last, min(last + right, count)

    def _encode(self, x_BS: Tensor, num_quantizers: int) -> Tensor:
        depth, hop = self._depth(num_quantizers), self.hop_length
        padded_to = self.frame_hop * math.lcm(self.coarsest, self.window or 1)
        parts = []
        for start, first, last, end in self._pieces(x_BS.shape[1] // hop):
            piece_BS = x_BS[:, start * hop : end * hop]
            piece_BS = F.pad(piece_BS, (0, -piece_BS.shape[1] % padded_to))
            codes_BKT = self.quantizer.encode(self.encoder(piece_BS[..., None]), depth)
            parts.append(codes_BKT[:, :, first - start : last - start])
        return torch.cat(parts, 2)

    def _decode(self, codes_BKN: Tensor) -> Tensor:
        depth, count = self._depth(codes_BKN.shape[1]), codes_BKN.shape[2]
        pieces = self._pieces(count) if self.noise_seed is None else [(0, 0, count, count)]
        parts = []
        for start, first, last, end in pieces:
            z_BLC = self.quantizer.decode(codes_BKN[:, :, start:end], depth)
            x_BS = self.decoder(z_BLC, self.noise_seed)[..., 0].tanh()
            parts.append(x_BS[:, (first - start) * self.hop_length : (last - start) * self.hop_length])
        return torch.cat(parts, 1)

    def _unpack(self, codes: Codes | Tensor, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        codes_BKN, counts_B = super()._unpack(codes, empty=empty)
        self._depth(codes_BKN.shape[1])
        return codes_BKN, counts_B

    def _depth(self, columns: int) -> int:
        """How many codebooks so many columns are. Raises CodesError where the last is not complete."""
        complete = list(itertools.accumulate(self.quantizer.columns))
        if columns not in complete:
            raise CodesError(
                f"{columns} of the {complete[-1]} columns leave a codebook incomplete; need one of {complete}"
            )
        return complete.index(columns) + 1


def snac_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that shape the codec, with the publisher's defaults. Raises ValueError."""
    defaults: dict[str, Any] = {
        "sampling_rate": 44100,
        "encoder_dim": 64,
        "encoder_rates": [3, 3, 7, 7],
        "decoder_dim": 1536,
        "decoder_rates": [7, 7, 3, 3],
        "attn_window_size": 32,
        "codebook_size": 4096,
        "codebook_dim": 8,
        "vq_strides": [8, 4, 2, 1],
    }
    settings = {name: model.get(name, default) for name, default in defaults.items()}
    window = settings["attn_window_size"]
    check_sizes({**settings, "attn_window_size": window or 1}, sampling_rate=10**6)
    settings |= {name: bool(model.get(name, True)) for name in ("noise", "depthwise")}
    down, up, strides = settings["encoder_rates"], settings["decoder_rates"], settings["vq_strides"]
    width, decoder = settings["encoder_dim"] * 2 ** len(down), settings["decoder_dim"]
    if any(strides[0] % stride for stride in strides):
        raise ValueError(f"vq_strides {strides} must all divide the first")
    if math.prod(down) != math.prod(up) or math.prod(down) > 2**16:
        raise ValueError(f"encoder_rates {down} and decoder_rates {up} must have one product, of at most {2**16}")
    if width > 2**14 or decoder % 2 ** len(up) or model.get("latent_dim") not in (None, width):
        raise ValueError(f"impossible widths: encoder {width}, latent {model.get('latent_dim')}, decoder {decoder}")
    if window and (width % HEAD or decoder % HEAD):
        raise ValueError(f"attention needs widths that are multiples of {HEAD}, not {width} and {decoder}")
    return settings


class Encoder(nn.Module):
    """Audio `[B, S, 1]` to latents `[B, L, C]`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width, depthwise, window = settings["encoder_dim"], settings["depthwise"], settings["attn_window_size"]
        layers: list[nn.Module] = [Conv1d(1, width, KERNEL, padding=KERNEL // 2)]
        for rate in settings["encoder_rates"]:
            down = Conv1d(width, 2 * width, 2 * rate, stride=rate, padding=math.ceil(rate / 2))
            layers.append(Stage(*_units(width, depthwise), Snake(width), down))
            width *= 2
        layers += [LocalAttention(width, window)] if window else []
        self.block = nn.Sequential(*layers, _conv(width, depthwise))

    def forward(self, x_BLC: Tensor) -> Tensor:
        z_BLC: Tensor = self.block(x_BLC)
        return z_BLC


class Decoder(nn.Module):
    """Latents `[B, L, C]` to audio before its final tanh, `[B, S, 1]`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        latent, width = settings["encoder_dim"] * 2 ** len(settings["encoder_rates"]), settings["decoder_dim"]
        depthwise, window = settings["depthwise"], settings["attn_window_size"]
        layers: list[nn.Module] = [Conv1d(latent, width, KERNEL, padding=KERNEL // 2)]
        if depthwise:
            layers = [_conv(latent, depthwise), Conv1d(latent, width, 1)]
        layers += [LocalAttention(width, window)] if window else []
        for rate in settings["decoder_rates"]:
            up = ConvTranspose1d(width, width // 2, rate, padding=math.ceil(rate / 2), output_padding=rate % 2)
            noise = [Noise(width // 2)] if settings["noise"] else []
            layers.append(Stage(Snake(width), up, *noise, *_units(width // 2, depthwise)))
            width //= 2
        self.model = nn.Sequential(*layers, Snake(width), Conv1d(width, 1, KERNEL, padding=KERNEL // 2))

    def forward(self, x_BLC: Tensor, noise_seed: int | None) -> Tensor:
        """With noise if there is a seed."""
        for index, layer in enumerate(self.model):
            if isinstance(layer, Stage) and noise_seed is not None:
                x_BLC = layer.with_noise(x_BLC, noise_seed + index)
            else:
                x_BLC = layer(x_BLC)
        return x_BLC


class Stage(nn.Module):
    """Layers around one change of rate."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.block(x_BLC)
        return y_BLC

    def with_noise(self, x_BLC: Tensor, seed: int) -> Tensor:
        """The same, with the noise of a seed where the stage has a place for it."""
        for layer in self.block:
            x_BLC = layer.add(x_BLC, seed) if isinstance(layer, Noise) else layer(x_BLC)
        return x_BLC


class Noise(nn.Module):
    """A place for noise in the decoder, scaled by a product of what is there; by itself it does nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Conv1d(width, width, 1, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return x_BLC

    def add(self, x_BLC: Tensor, seed: int) -> Tensor:
        """With noise, one number per position, which repeats after `NOISE` positions whatever the length."""
        noise_N = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)).to(x_BLC.device)
        noise_L = noise_N.repeat(-(-x_BLC.shape[1] // NOISE))[: x_BLC.shape[1]]
        return x_BLC + noise_L[:, None] * self.linear(x_BLC)


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, each after a Snake, added to the input."""

    def __init__(self, width: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        dilated = _conv(width, depthwise, dilation)
        self.block = nn.Sequential(Snake(width), dilated, Snake(width), Conv1d(width, width, 1))

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.block(x_BLC)
        return y_BLC.add_(x_BLC)


class DepthwiseConv1d(Conv1d):
    """`Conv1d` of each channel by itself."""

    def __init__(self, width: int, kernel: int, *, padding: int, dilation: int) -> None:
        super().__init__(1, width, kernel, padding=padding, dilation=dilation)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BC1L = x_BLC.contiguous()[:, None].permute(0, 3, 1, 2)
        padding, dilation = (0, self.padding), (1, self.dilation)
        weight_C11k, groups = self.weight[:, :, None], len(self.weight)
        y_BC1L = F.conv2d(x_BC1L, weight_C11k, self.bias, padding=padding, dilation=dilation, groups=groups)
        return y_BC1L.permute(0, 2, 3, 1)[:, 0]


class LocalAttention(nn.Module):
    """Self-attention within windows of W positions, counted from the start, rotary (arXiv 2104.09864); plus the input.

    A last window that is not full attends among the positions it has.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        qkv_BLC = self.to_qkv(self.norm(x_BLC))
        full = qkv_BLC.shape[1] // self.window * self.window
        parts = [self._attend(part_BLC) for part_BLC in qkv_BLC.tensor_split([full], 1) if part_BLC.shape[1]]
        return x_BLC + self.to_out(torch.cat(parts, 1))

    def _attend(self, qkv_BLC: Tensor) -> Tensor:
        window = min(self.window, qkv_BLC.shape[1])
        qkv_BwhWd = qkv_BLC.unflatten(1, (-1, window)).unflatten(3, (-1, HEAD)).transpose(2, 3)
        q_BwhWd, k_BwhWd, v_BwhWd = qkv_BwhWd.chunk(3, 2)
        frequencies = 1 / 10000 ** (torch.arange(0, HEAD, 2, device=qkv_BLC.device).float() / HEAD)
        angles_Wd = torch.arange(window, device=qkv_BLC.device)[:, None] * frequencies.repeat(2)
        y_BwhWd = F.scaled_dot_product_attention(_rotate(q_BwhWd, angles_Wd), _rotate(k_BwhWd, angles_Wd), v_BwhWd)
        return y_BwhWd.transpose(2, 3).flatten(3).flatten(1, 2)


class MultiScaleQuantizer(nn.Module):
    """Residual quantizers at rates of their own, and the rectangle of columns that holds their codes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.columns = [settings["vq_strides"][0] // stride for stride in settings["vq_strides"]]  # of each codebook
        self.quantizers = nn.ModuleList(Codebook(settings, stride) for stride in settings["vq_strides"])

    def encode(self, z_BLC: Tensor, depth: int) -> Tensor:
        """Codes `[B, columns, T]` of the first `depth` codebooks."""
        parts = []
        for columns, layer in zip(self.columns[:depth], self.quantizers, strict=False):
            codebook = cast(Codebook, layer)
            codes_BN = codebook.nearest(z_BLC)
            z_BLC = z_BLC - codebook(codes_BN)
            parts.append(codes_BN.unflatten(1, (-1, columns)).transpose(1, 2))
        return torch.cat(parts, 1)

    def decode(self, codes_BKT: Tensor, depth: int) -> Tensor:
        """Latents `[B, L, C]`: the sum over the first `depth` codebooks."""
        parts = codes_BKT.split(self.columns[:depth], 1)
        latents = [book(part.transpose(1, 2).flatten(1)) for book, part in zip(self.quantizers, parts, strict=False)]
        return torch.stack(latents).sum(0)


class Codebook(nn.Module):
    """Entries of few dims, each for `stride` latent frames, with projections from and to the latents."""

    def __init__(self, settings: dict[str, Any], stride: int) -> None:
        super().__init__()
        width, dim = settings["encoder_dim"] * 2 ** len(settings["encoder_rates"]), settings["codebook_dim"]
        self.stride = stride
        self.in_proj = Conv1d(width, dim, 1)
        self.out_proj = Conv1d(dim, width, 1)
        self.codebook = nn.Embedding(settings["codebook_size"], dim)

    def forward(self, codes_BN: Tensor) -> Tensor:
        """Latents `[B, L, C]` of codes."""
        q_BNC: Tensor = self.out_proj(self.codebook(codes_BN))
        return q_BNC.repeat_interleave(self.stride, 1)

    def nearest(self, z_BLC: Tensor) -> Tensor:
        """Codes `[B, N]` of the entries of nearest direction (Yu et al., arXiv 2110.04627) to the means over frames."""
        e_BND = self.in_proj(z_BLC.unflatten(1, (-1, self.stride)).mean(2))
        entries_CD = F.normalize(self.codebook.weight)
        codes_M = nearest(F.normalize(e_BND.flatten(0, 1)), entries_CD, entries_CD.square().sum(1) / 2)
        return codes_M.unflatten(0, e_BND.shape[:2])


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of the last axis by the angles."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def _conv(width: int, depthwise: bool, dilation: int = 1) -> Conv1d:
    padding = KERNEL // 2 * dilation
    if depthwise:
        return DepthwiseConv1d(width, KERNEL, padding=padding, dilation=dilation)
    return Conv1d(width, width, KERNEL, padding=padding, dilation=dilation)


def _units(width: int, depthwise: bool) -> list[nn.Module]:
    return [ResidualUnit(width, dilation, depthwise) for dilation in DILATIONS]
