"""`XCodec`: X-Codec (Ye et al., arXiv 2408.17175), for weights published in transformers' layout.

The encoder of a DAC beside a self-supervised speech model (HuBERT or WavLM, run through transformers), whose hidden
layers are averaged and refined; one residual quantizer for both; the decoder of a DAC. What serves training only (the
decoder of the semantic half) is left out.

What holds: alone == padded, because items are encoded in groups of equal length. Chunks and streams cannot hold: the
speech model attends to the whole item and HuBERT normalises over it, so `spec.context` is None.

Shapes: B items, S samples, T frames, C channels, N codes, K quantizers.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.convs import Codebooks, Conv1d, fold_weight_norm
from anyglot_tokenizers.dac import Decoder, Encoder, dac_settings
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.published_audio import PublishedAudio, check_sizes
from anyglot_tokenizers.tokenizer import seeded

ACOUSTIC = {
    "encoder_hidden_size": 64, "downsampling_ratios": [8, 5, 4, 2], "decoder_hidden_size": 1024,
    "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 256,
}  # fmt: skip
TRAINING_ONLY = ("decoder_semantic.", "fc1.")


class XCodec(PublishedAudio):
    """X-Codec for speech or any audio at 16 kHz, 50 codes per second and quantizer; see `PublishedAudio`.

    Args:
        model: the content of an X-Codec config.json, as transformers writes it.
        license: of the weights.
        modality: name of the modality in the spec.

    Raises:
        AnyglotError: transformers is not installed.
    """

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "speech") -> None:
        settings = xcodec_settings(model)
        super().__init__(model=settings, license=license, modality=modality)
        acoustic = settings["acoustic_model_config"]
        self.sample_rate = settings["sample_rate"]
        self.hop_length = math.prod(acoustic["downsampling_ratios"])
        self.num_quantizers, self.codebook_size = settings["num_quantizers"], settings["codebook_size"]
        with seeded(0):
            self.semantic_model = speech_model(settings["semantic_model_config"])
            speech: Any = self.semantic_model.config
            if any(
                frames_of(speech, hops * self.hop_length + self.hop_length // 2 * 2) != hops for hops in (1, 2, 100)
            ):
                raise ValueError("the frames of semantic_model_config and acoustic_model_config do not coincide")
            semantic = speech.hidden_size
            width = acoustic["hidden_size"] + semantic
            self.acoustic_encoder = Encoder(acoustic)
            self.encoder_semantic = SemanticEncoder(settings, semantic)
            self.fc = nn.Linear(width, width)
            self.quantizer = Codebooks(self.num_quantizers, self.codebook_size, width)
            self.fc2 = nn.Linear(width, acoustic["hidden_size"])
            self.acoustic_decoder = Decoder(acoustic, whole=True)
        self.requires_grad_(False).eval()

    def _encode(self, x_BS: Tensor, num_quantizers: int) -> Tensor:
        acoustic_BNC = self.acoustic_encoder(x_BS[..., None])
        padded_BS = F.pad(x_BS, (self.hop_length // 2, self.hop_length // 2))
        layers = self.semantic_model(padded_BS, output_hidden_states=True).hidden_states
        semantic_BNC = self.encoder_semantic(torch.stack(layers).mean(0))
        return self.quantizer.encode(self.fc(torch.cat([acoustic_BNC, semantic_BNC], 2)), num_quantizers)

    def _decode(self, codes_BKN: Tensor) -> Tensor:
        return self.acoustic_decoder(self.fc2(self.quantizer.decode(codes_BKN)))[..., 0]

    def _published_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        semantic = {name: tensor for name, tensor in tensors.items() if name.startswith("semantic_model.")}
        rest = {name: tensor for name, tensor in tensors.items() if name not in semantic}
        weights = fold_weight_norm({name: rest[name] for name in rest if not name.startswith(TRAINING_ONLY)})
        entries = {}
        for name in rest:
            match = re.fullmatch(r"quantizer\.quantizers\.(\d+)\.codebook\.(\w+)", name)
            if match:
                part = weights.pop(name)
                if match[2] == "embed":
                    entries[int(match[1])] = part
        if entries:
            weights["quantizer.embed"] = torch.stack([entries[index] for index in sorted(entries)])
        # weight norm by its older names, which transformers' own layers do not have any more
        newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        for name, tensor in semantic.items():
            stem, _, last = name.rpartition(".")
            weights[f"{stem}.{newer.get(last, last)}"] = tensor
        return weights


def xcodec_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The entries of an X-Codec config.json that shape the codec, with the publisher's defaults for those left out.

    Raises ValueError for variants that were never published (strides in the semantic half).
    """
    acoustic = dac_settings({**ACOUSTIC, **(model.get("acoustic_model_config") or {})})
    sizes = {"sample_rate": model.get("sample_rate", 16000), "codebook_size": model.get("codebook_size", 1024)}
    check_sizes(sizes, sample_rate=10**6)
    frame_rate = math.ceil(sizes["sample_rate"] / math.prod(acoustic["downsampling_ratios"]))
    bandwidth = (model.get("target_bandwidths") or (4,))[-1]  # kbit/s with all codebooks
    most = int(1000 * bandwidth // (frame_rate * math.ceil(math.log2(sizes["codebook_size"]))))
    strides = list(model.get("strides", (1, 1)))
    settings = {
        **sizes,
        "num_quantizers": model.get("num_quantizers", most),
        "kernel_size": model.get("kernel_size", 3),
        "unit_kernel_size": model.get("unit_kernel_size", 3),
        "channel_ratios": list(model.get("channel_ratios", (1, 1))),
        "block_dilations": list(model.get("block_dilations", (1, 1))),
    }
    check_sizes(settings, sample_rate=10**6, num_quantizers=1024)
    if set(strides) != {1} or len(strides) != len(settings["channel_ratios"]) or settings["channel_ratios"][-1] != 1:
        raise ValueError(f"impossible strides {strides} or channel_ratios {settings['channel_ratios']}")
    semantic = dict(model.get("semantic_model_config") or {"model_type": "hubert"})
    for name in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
        semantic.pop(name, None)
    checked = ("hidden_size", "intermediate_size", "num_hidden_layers", "conv_dim", "num_conv_pos_embeddings")
    check_sizes({name: semantic[name] for name in checked if name in semantic}, num_hidden_layers=256)
    return {**settings, "acoustic_model_config": acoustic, "semantic_model_config": semantic}


def speech_model(settings: dict[str, Any]) -> nn.Module:
    """The self-supervised half, with random weights."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise AnyglotError("XCodec needs transformers: pip install 'anyglot[lm]'") from error
    from huggingface_hub.errors import StrictDataclassError

    kind = settings.get("model_type")
    if kind not in ("hubert", "wavlm"):
        raise ValueError(f"semantic_model_config: model_type must be 'hubert' or 'wavlm', got {kind!r}")
    try:
        model: nn.Module = AutoModel.from_config(AutoConfig.for_model(**settings))
    except (StrictDataclassError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"semantic_model_config: {error}") from error
    return model


def frames_of(settings: Any, samples: int) -> int:
    """Frames that a speech model of these settings gives for audio."""
    for kernel, stride in zip(settings.conv_kernel, settings.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


class SemanticEncoder(nn.Module):
    """Convolutions over the frames of the speech model, `[B, T, C]` to the same."""

    def __init__(self, settings: dict[str, Any], width: int) -> None:
        super().__init__()
        kernel = settings["kernel_size"]
        self.conv = Conv1d(width, width, kernel, padding=kernel // 2, bias=False)
        self.conv_blocks = nn.ModuleList()
        inner = width
        for ratio in settings["channel_ratios"]:
            self.conv_blocks.append(SemanticBlock(settings, inner, width * ratio))
            inner = width * ratio

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.conv(x_BTC)
        for block in self.conv_blocks:
            x_BTC = block(x_BTC)
        return x_BTC


class SemanticBlock(nn.Module):
    """Residual units, then a convolution."""

    def __init__(self, settings: dict[str, Any], inputs: int, outputs: int) -> None:
        super().__init__()
        kernel, dilations = settings["unit_kernel_size"], settings["block_dilations"]
        self.res_units = nn.ModuleList(SemanticUnit(inputs, kernel, dilation) for dilation in dilations)
        self.conv = Conv1d(inputs, outputs, 3, padding=1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        for unit in self.res_units:
            x_BTC = unit(x_BTC)
        return self.conv(x_BTC)


class SemanticUnit(nn.Module):
    """A dilated convolution and a pointwise one, each after an ELU, added to the input."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Conv1d(width, width, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
        self.conv2 = Conv1d(width, width, 1, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.conv2(F.elu(self.conv1(F.elu(x_BTC))))
