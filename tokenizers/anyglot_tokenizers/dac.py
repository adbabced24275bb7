"""`Dac`: the Descript Audio Codec (Kumar et al., arXiv 2306.06546), for weights published in transformers' layout.

A stack of strided convolutions with Snake activations, a residual quantizer that looks entries up by their direction in
8 dims, and the mirror image of the stack. Weight norms are folded at load. transformers itself is not needed.

What holds: every layer sees zeros beyond an item's ends and no farther than `spec.context` codes, so alone == padded ==
chunked == streamed. Audio is padded with silence to whole hops before it is encoded. Where strides are odd, the decoder
as published stops a few samples short of N hops (8 of them at 24 kHz); these are silence here.

Shapes: B items, S samples, T positions, C channels, N codes, K quantizers, D dims of an entry.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.convs import Conv1d, ConvTranspose1d, Snake, decoder_context, encoder_context
from anyglot_tokenizers.published_audio import PublishedAudio, check_sizes
from anyglot_tokenizers.tokenizer import seeded

DILATIONS = (1, 3, 9)


class Dac(PublishedAudio):
    """DAC for audio at 16, 24 or 44.1 kHz; see `PublishedAudio`.

    Args:
        model: the content of a DAC config.json, as transformers writes it.
        license: of the weights.
        modality: name of the modality in the spec; "" = "speech" up to 24 kHz, "music" above.
    """

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "") -> None:
        settings = dac_settings(model)
        usual = "speech" if settings["sampling_rate"] <= 24000 else "music"
        super().__init__(model=settings, license=license, modality=modality or usual)
        self.sample_rate = settings["sampling_rate"]
        self.hop_length = math.prod(settings["downsampling_ratios"])
        self.num_quantizers, self.codebook_size = settings["n_codebooks"], settings["codebook_size"]
        with seeded(0):
            self.encoder = Encoder(settings)
            self.quantizer = Quantizer(settings)
            self.decoder = Decoder(settings)
        self.requires_grad_(False).eval()

    def _spec_entries(self) -> dict[str, Any]:
        encoder = encoder_context(self.encoder.modules(), self.hop_length)
        decoder = decoder_context(self.decoder.modules(), self.hop_length)
        return {**super()._spec_entries(), "context": (max(encoder[0], decoder[0]), max(encoder[1], decoder[1]))}

    def _encode(self, x_BS: Tensor, num_quantizers: int) -> Tensor:
        chunk = self._chunk_codes(x_BS.shape[1])
        if chunk:
            return encode_chunked(self, x_BS[:, None], num_quantizers=num_quantizers, chunk_codes=chunk).codes
        return self.quantizer.encode(self.encoder(x_BS[..., None]), num_quantizers)

    def _decode(self, codes_BKN: Tensor) -> Tensor:
        samples = codes_BKN.shape[2] * self.hop_length
        chunk = self._chunk_codes(samples)
        if chunk:
            return decode_chunked(self, codes_BKN, chunk_codes=chunk)[:, 0].to(self.device)
        x_BS = self.decoder(self.quantizer.decode(codes_BKN))[..., 0].tanh()
        return F.pad(x_BS, (0, samples - x_BS.shape[1]))

    def _chunk_codes(self, samples: int) -> int:
        """Codes per chunk for items that are too long to be computed at once, else 0."""
        context = sum(self._spec_entries()["context"])
        most = max(self.max_samples // self.hop_length, 3 * context)
        return most - context if samples > most * self.hop_length else 0


def dac_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The entries of a DAC config.json that shape the codec, with the publisher's defaults for those left out.

    Raises ValueError for impossible ones.
    """
    down = list(model.get("downsampling_ratios", (2, 4, 8, 8)))
    width = model.get("encoder_hidden_size", 64)
    defaults = {
        "sampling_rate": 16000,
        "encoder_hidden_size": width,
        "decoder_hidden_size": 1536,
        "hidden_size": width * 2 ** len(down),
        "downsampling_ratios": down,
        "upsampling_ratios": down[::-1],
        "n_codebooks": 9,
        "codebook_size": 1024,
        "codebook_dim": 8,
    }
    settings = {name: model.get(name, default) for name, default in defaults.items()}
    check_sizes(settings, sampling_rate=10**6, n_codebooks=1024)
    hops = math.prod(settings["downsampling_ratios"]), math.prod(settings["upsampling_ratios"])
    if (
        hops[0] != hops[1]
        or hops[0] > 2**16
        or settings["decoder_hidden_size"] % 2 ** len(settings["upsampling_ratios"])
    ):
        raise ValueError(f"downsampling_ratios {down} do not fit upsampling_ratios or decoder_hidden_size")
    return settings


class Encoder(nn.Module):
    """Audio `[B, S, 1]` to latents `[B, N, hidden_size]`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width = settings["encoder_hidden_size"]
        self.conv1 = Conv1d(1, width, 7, padding=3)
        self.block = nn.ModuleList()
        for stride in settings["downsampling_ratios"]:
            self.block.append(EncoderBlock(width, stride))
            width *= 2
        self.snake1 = Snake(width)
        self.conv2 = Conv1d(width, settings["hidden_size"], 3, padding=1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.conv1(x_BTC)
        for block in self.block:
            x_BTC = block(x_BTC)
        return self.conv2(self.snake1(x_BTC, inplace=True))


class EncoderBlock(nn.Module):
    """Three residual units, then one position for `stride` of them, with twice the channels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(width, dilation) for dilation in DILATIONS)
        self.snake1 = Snake(width)
        self.conv1 = Conv1d(width, 2 * width, 2 * stride, stride=stride, padding=math.ceil(stride / 2))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.res_unit3(self.res_unit2(self.res_unit1(x_BTC)))
        return self.conv1(self.snake1(x_BTC, inplace=True))


class Decoder(nn.Module):
    """Latents `[B, N, hidden_size]` to audio before its final tanh, `[B, S, 1]`.

    Args:
        settings: see `dac_settings`.
        whole: whether odd strides give whole hops (X-Codec) or stop short of them (DAC as published).
    """

    def __init__(self, settings: dict[str, Any], whole: bool = False) -> None:
        super().__init__()
        width = settings["decoder_hidden_size"]
        self.conv1 = Conv1d(settings["hidden_size"], width, 7, padding=3)
        self.block = nn.ModuleList()
        for stride in settings["upsampling_ratios"]:
            self.block.append(DecoderBlock(width, stride, stride % 2 if whole else 0))
            width //= 2
        self.snake1 = Snake(width)
        self.conv2 = Conv1d(width, 1, 7, padding=3)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.conv1(x_BTC)
        for block in self.block:
            x_BTC = block(x_BTC)
        return self.conv2(self.snake1(x_BTC, inplace=True))


class DecoderBlock(nn.Module):
    """`stride` times the positions, half the channels, then three residual units."""

    def __init__(self, width: int, stride: int, extra: int) -> None:
        super().__init__()
        self.snake1 = Snake(width)
        self.conv_t1 = ConvTranspose1d(width, width // 2, stride, padding=math.ceil(stride / 2), output_padding=extra)
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(width // 2, dilation) for dilation in DILATIONS)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.conv_t1(self.snake1(x_BTC, inplace=True))
        return self.res_unit3(self.res_unit2(self.res_unit1(x_BTC)))


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, each after a Snake, added to the input in its place."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(width)
        self.conv1 = Conv1d(width, width, 7, padding=3 * dilation, dilation=dilation)
        self.snake2 = Snake(width)
        self.conv2 = Conv1d(width, width, 1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.conv1(self.snake1(x_BTC))
        return self.conv2.add_to(x_BTC, self.snake2(h_BTC, inplace=True))


class Quantizer(nn.Module):
    """Residual quantizer whose codebooks are looked up by cosine in few dims (Yu et al., arXiv 2110.04627)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Codebook(settings) for _ in range(settings["n_codebooks"]))

    def encode(self, rest_BTC: Tensor, num_quantizers: int) -> Tensor:
        """Codes int64 `[B, k, N]` of latents."""
        codes = []
        for codebook in self.quantizers[:num_quantizers]:
            assert isinstance(codebook, Codebook)
            codes.append(codebook.nearest(rest_BTC))
            rest_BTC = rest_BTC - codebook(codes[-1])
        return torch.stack(codes, 1)

    def decode(self, codes_BKN: Tensor) -> Tensor:
        """Latents `[B, N, C]`: the sum over quantizers."""
        parts = (codebook(codes_BN) for codebook, codes_BN in zip(self.quantizers, codes_BKN.unbind(1), strict=False))
        return functools.reduce(Tensor.add_, parts)


class Codebook(nn.Module):
    """Entries of few dims, with projections from and to the latents."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        latent, dim = settings["hidden_size"], settings["codebook_dim"]
        self.in_proj = Conv1d(latent, dim, 1)
        self.out_proj = Conv1d(dim, latent, 1)
        self.codebook = nn.Embedding(settings["codebook_size"], dim)

    def forward(self, codes_BN: Tensor) -> Tensor:
        """Latents `[B, N, C]` of codes."""
        return self.out_proj(self.codebook(codes_BN))

    def nearest(self, x_BTC: Tensor) -> Tensor:
        """Codes `[B, N]` of the entries of nearest direction."""
        x_MD = F.normalize(self.in_proj(x_BTC).flatten(0, 1))
        entries_ED = F.normalize(self.codebook.weight)
        return torch.addmm(entries_ED.square().sum(1), x_MD, entries_ED.T, alpha=2).argmax(1).view(x_BTC.shape[:2])
