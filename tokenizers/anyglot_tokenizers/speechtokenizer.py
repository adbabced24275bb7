"""`SpeechTokenizer`: the speech codec of Zhang et al. (arXiv 2308.16692), from its published weights.

Convolutions and LSTMs as in EnCodec (arXiv 2210.13438) with residual codebooks, the first of which was distilled from
HuBERT: `codes[:, :1]` says what is spoken, the other columns how. Written after the layout of the published checkpoints
(github.com/ZhangXInFD/SpeechTokenizer): weight norm is folded away when they are read, what only training needs is left
out. The publisher gives `config.json` and a pickle, of which `convert.py` makes safetensors once.

Codes are `[B, K, T]` (the original gives `[K, B, T]`). The encoder's LSTM runs both ways, so every code depends on the
whole item: there are no chunks and no streams. Ends are mirrored, and the last hop need not be full; so only items of
the same length run together, and neighbours in a batch never change a code.

Shapes: B items, S samples, L positions at any rate, T codes, K quantizers, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_audio, check_count
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.convs import Codebooks, Conv1d, ConvTranspose1d, Snake, fold_weight_norm
from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.published_audio import PublishedAudio, check_sizes
from anyglot_tokenizers.tokenizer import full_precision, seeded

KERNEL = 7  # of the first and last convolution of encoder and decoder
EMBED = "quantizer.vq.layers.{}._codebook.embed"
TRAINING = ("inited", "cluster_size", "embed_avg")  # of a codebook


class SpeechTokenizer(PublishedAudio):
    """Speech float32 `[B, 1, samples]` to codes int64 `[B, K, ceil(samples / hop_length)]` and back.

    Args:
        model: the publisher's config.json; what it says of training is left out.
        license: of the weights.
        modality: name of the modality in the spec.
    """

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "speech") -> None:
        settings = speechtokenizer_settings(model)
        super().__init__(model=settings, license=license, modality=modality)
        self.sample_rate = settings["sample_rate"]
        self.hop_length = math.prod(settings["strides"])
        self.num_quantizers, self.codebook_size = settings["n_q"], settings["codebook_size"]
        with seeded(0):
            self.encoder, self.decoder = Encoder(settings), Decoder(settings)
            self.quantizer = Codebooks(self.num_quantizers, self.codebook_size, settings["dimension"])
        self.requires_grad_(False).eval()

    def _published_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {
            name.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv."): tensor
            for name, tensor in fold_weight_norm(tensors).items()
            if not name.startswith("transform.") and not name.endswith(TRAINING)
        }
        books = [kept.pop(name) for name in map(EMBED.format, range(len(kept))) if name in kept]
        if not books or any(book.shape != books[0].shape for book in books):
            raise CheckpointError(f"no codebooks of one shape named {EMBED.format('N')}; is it another model?")
        return {**kept, "quantizer.embed": torch.stack(books)}

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of speech; `lengths` are int64 `[B]` samples per item (None = all), the result's are codes per item.

        Raises MediaError for empty, non-finite or misshapen audio, CodesError for an impossible number of quantizers.
        """
        media, lengths = check_audio(media, lengths, 1)
        lengths = lengths.cpu()
        used = check_count(num_quantizers, self.num_quantizers)
        counts = -(-lengths // self.hop_length)
        total = -(-media.shape[2] // self.hop_length)
        codes_BKT = torch.zeros(len(media), used, total, dtype=torch.int64, device=self.device)
        with full_precision(self.device):
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero()[:, 0]
                for part in rows.split(max(self.max_samples // length, 1)):
                    codes_BKt = self._encode(media[part, 0, :length].to(self.device), used)
                    codes_BKT[part, :, : codes_BKt.shape[2]] = codes_BKt
        return Codes(codes_BKT, counts.to(self.device), self.spec)

    def _encode(self, x_BS: Tensor, num_quantizers: int) -> Tensor:
        return self.quantizer.encode(self.encoder(x_BS[..., None]), num_quantizers)

    def _decode(self, codes_BKN: Tensor) -> Tensor:
        x_BS: Tensor = self.decoder(self.quantizer.decode(codes_BKN))[..., 0]
        return x_BS


def speechtokenizer_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that shape the codec. Raises ValueError."""
    names = (
        "sample_rate",
        "strides",
        "n_filters",
        "dimension",
        "n_residual_layers",
        "residual_kernel_size",
        "dilation_base",
        "lstm_layers",
        "n_q",
        "codebook_size",
    )
    settings: dict[str, Any] = {name: model.get(name) for name in names}
    small = {"n_residual_layers": 8, "residual_kernel_size": 64, "dilation_base": 4, "lstm_layers": 8, "n_q": 1024}
    check_sizes(settings, sample_rate=10**6, strides=64, **small)
    settings |= {"bidirectional": bool(model.get("bidirectional")), "activation": model.get("activation")}
    if settings["activation"] not in ("ELU", "Snake"):
        raise ValueError(f"activation {settings['activation']!r} must be 'ELU' or 'Snake'")
    if settings["n_filters"] * 2 ** len(settings["strides"]) > 2**14:
        raise ValueError(f"n_filters {settings['n_filters']} is too wide for strides {settings['strides']}")
    return settings


class Encoder(nn.Module):
    """Audio `[B, S, 1]` to latents `[B, T, C]`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width, both_ways = settings["n_filters"], settings["bidirectional"]
        layers: list[nn.Module] = [Conv(1, width, KERNEL)]
        for stride in reversed(settings["strides"]):
            layers += _residuals(width, settings)
            layers += [_activation(width, settings), Conv(width, 2 * width, 2 * stride, stride)]
            width *= 2
        layers.append(Recurrent(width, settings["lstm_layers"], both_ways))
        width *= 1 + both_ways
        layers += [_activation(width, settings), Conv(width, settings["dimension"], KERNEL)]
        self.model = nn.Sequential(*layers)

    def forward(self, x_BLC: Tensor) -> Tensor:
        z_BTC: Tensor = self.model(x_BLC)
        return z_BTC


class Decoder(nn.Module):
    """Latents `[B, T, C]` to audio `[B, S, 1]`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width = settings["n_filters"] * 2 ** len(settings["strides"])
        layers: list[nn.Module] = [Conv(settings["dimension"], width, KERNEL)]
        layers.append(Recurrent(width, settings["lstm_layers"], both_ways=False))
        for stride in settings["strides"]:
            layers += [_activation(width, settings), Up(width, width // 2, stride)]
            width //= 2
            layers += _residuals(width, settings)
        self.model = nn.Sequential(*layers, _activation(width, settings), Conv(width, 1, KERNEL))

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.model(x_BLC)
        return y_BLC


class Conv(nn.Module):
    """Convolution to ceil(L / stride) positions, the ends mirrored."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = Conv1d(inputs, outputs, kernel, stride=stride, dilation=dilation)
        padding = (kernel - 1) * dilation - (stride - 1)
        self.left, self.right, self.stride = padding - padding // 2, padding // 2, stride

    def forward(self, x_BLC: Tensor) -> Tensor:
        left, right = self.left, self.right + -x_BLC.shape[1] % self.stride
        y_BLC: Tensor = self.conv(_mirrored(x_BLC, left, right))
        return y_BLC


class Up(nn.Module):
    """Transposed convolution to L * stride positions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        padding, extra = math.ceil(stride / 2), stride % 2
        self.conv = ConvTranspose1d(inputs, outputs, stride, padding=padding, output_padding=extra)

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.conv(x_BLC)
        return y_BLC


class Residual(nn.Module):
    """shortcut(x) + pointwise(act(dilated(act(x)))), half as wide inside."""

    def __init__(self, width: int, dilation: int, settings: dict[str, Any]) -> None:
        super().__init__()
        inner = width // 2
        dilated = Conv(width, inner, settings["residual_kernel_size"], dilation=dilation)
        last = Conv(inner, width, 1)
        self.block = nn.Sequential(_activation(width, settings), dilated, _activation(inner, settings), last)
        self.shortcut = Conv(width, width, 1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.shortcut(x_BLC)
        return y_BLC.add_(self.block(x_BLC))


class Recurrent(nn.Module):
    """LSTM over time, its input added to what each direction says."""

    def __init__(self, width: int, layers: int, both_ways: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, bidirectional=both_ways, batch_first=True)

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC: Tensor = self.lstm(x_BLC)[0]
        return y_BLC + x_BLC.repeat(1, 1, y_BLC.shape[2] // x_BLC.shape[2])


def _mirrored(x_BLC: Tensor, left: int, right: int) -> Tensor:
    """With so many positions more at each end, mirrored at the first and last.

    Mirroring n positions takes n + 1: what is shorter is first filled up with zeros, whose surplus is cut off again.
    """
    lacking = max(max(left, right) + 1 - x_BLC.shape[1], 0)
    x_BLC = F.pad(x_BLC, (0, 0, 0, lacking))
    last = x_BLC.shape[1] - 1
    before, after = x_BLC[:, 1 : left + 1].flip(1), x_BLC[:, last - right : last].flip(1)
    return torch.cat([before, x_BLC, after], 1)[:, : left + last + 1 + right - lacking]


def _activation(width: int, settings: dict[str, Any]) -> nn.Module:
    return Snake(width) if settings["activation"] == "Snake" else nn.ELU()


def _residuals(width: int, settings: dict[str, Any]) -> list[nn.Module]:
    dilations = [settings["dilation_base"] ** index for index in range(settings["n_residual_layers"])]
    return [Residual(width, dilation, settings) for dilation in dilations]
