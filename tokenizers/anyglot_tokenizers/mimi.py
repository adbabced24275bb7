"""`Mimi`: Kyutai's streaming speech codec (Defossez et al., arXiv 2410.00037), for weights in transformers' layout.

SEANet convolutions (Tagliasacchi et al., arXiv 2009.02095) and a transformer with a sliding window, all causal, on each
side of two residual quantizers that see the same latents: one for the first, semantic codebook and one for all others.
transformers itself is not needed.

What holds: nothing depends on later input, and what a layer keeps of earlier input is explicit (`Memory`), so the whole
pass is a stream given in one go: alone == padded == streamed == chunked. Audio is padded with silence to whole hops
before it is encoded, as the authors' own code does; transformers pads the input of every convolution instead, so the
codes of a last, partial hop differ there.

Shapes: B items, S samples, T positions, C channels, N codes, K quantizers, H heads, D dims of a head or an entry.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.chunks import Stream
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.convs import Codebooks, Conv1d, ConvTranspose1d, fold_weight_norm
from anyglot_tokenizers.published_audio import PublishedAudio, check_sizes
from anyglot_tokenizers.tokenizer import full_precision, seeded

Memory = dict[nn.Module, Tensor]
"""What the layers of a stream keep of their past input; empty at its start. One for each way."""

QUERIES = 256
"""Positions that attend at once."""


class Mimi(PublishedAudio):
    """Speech at 24 kHz, 12.5 codes per second and quantizer; see `PublishedAudio`. `stream` lags by no more than a hop.

    Whatever the length of the audio, it is computed in pieces, like a stream, in bounded memory.

    Args:
        model: the content of a Mimi config.json, as transformers writes it.
        license: of the weights.
        modality: name of the modality in the spec.
    """

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "speech") -> None:
        settings = mimi_settings(model)
        super().__init__(model=settings, license=license, modality=modality)
        self.sample_rate = settings["sampling_rate"]
        frame_rate = math.ceil(self.sample_rate / math.prod(settings["upsampling_ratios"]))
        self.stride = int(frame_rate / settings["frame_rate"])  # frames of the transformers per code
        self.hop_length = math.prod(settings["upsampling_ratios"]) * self.stride
        self.num_quantizers, self.codebook_size = settings["num_quantizers"], settings["codebook_size"]
        dim = settings["hidden_size"]
        with seeded(0):
            self.encoder = Seanet(encoder_layers(settings))
            self.encoder_transformer = Transformer(settings)
            self.downsample = CausalConv(dim, dim, 2 * self.stride, self.stride, bias=False, elu=False, repeat=True)
            self.quantizer = SplitQuantizer(settings)
            self.upsample = Upsample(dim, self.stride)
            self.decoder_transformer = Transformer(settings)
            self.decoder = Seanet(decoder_layers(settings))
        self.requires_grad_(False).eval()

    def _spec_entries(self) -> dict[str, Any]:
        first = -self.downsample.reach - self.encoder_transformer.reach  # frame, then sample, that a code depends on
        for layer in reversed(self.encoder.causal_layers()):
            first = first * layer.stride - layer.reach
        before = 0  # sample, then frame, then code, that a sample depends on
        for layer in reversed(self.decoder.causal_layers()):
            before = before // layer.stride - 1 if isinstance(layer, CausalTranspose) else before - layer.reach
        before = (before - self.decoder_transformer.reach) // self.stride - 1
        context = (max(-(first // self.hop_length), -before), 0)
        return {**super()._spec_entries(), "causal": True, "context": context}

    def stream(self, batch_size: int = 1, *, num_quantizers: int | None = None) -> MimiStream:
        """A stream that carries the memory of all layers, so that nothing is computed twice."""
        return MimiStream(self, batch_size, num_quantizers=num_quantizers)

    def _encode(self, x_BS: Tensor, num_quantizers: int, memory: Memory | None = None) -> Tensor:
        memory = {} if memory is None else memory
        codes = []
        for piece_BS in x_BS.split(self._piece_codes(len(x_BS)) * self.hop_length, 1):
            h_BTC = self.encoder_transformer(self.encoder(piece_BS[..., None], memory), memory)
            codes.append(self.quantizer.encode(self.downsample(h_BTC, memory), num_quantizers))
        return torch.cat(codes, 2)

    def _decode(self, codes_BKN: Tensor, memory: Memory | None = None) -> Tensor:
        memory = {} if memory is None else memory
        parts = []
        for piece_BKN in codes_BKN.split(self._piece_codes(len(codes_BKN)), 2):
            h_BTC = self.upsample(self.quantizer.decode(piece_BKN), memory)
            parts.append(self.decoder(self.decoder_transformer(h_BTC, memory), memory)[..., 0])
        return torch.cat(parts, 1)

    def _piece_codes(self, batch: int) -> int:
        return max(self.max_samples // (batch * self.hop_length), 1)

    def _published_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codebooks are published as sums and counts of what fell to each entry; the entries are their quotients."""
        weights = fold_weight_norm(tensors)
        found: dict[str, dict[int, Tensor]] = {}
        for name in tensors:
            match = re.fullmatch(r"(quantizer\.\w+)\.layers\.(\d+)\.codebook\.(\w+)", name)
            if match:
                part = weights.pop(name)
                if match[3] == "embed_sum":
                    counts = tensors.get(name.replace("embed_sum", "cluster_usage"), torch.ones(len(part)))
                    found.setdefault(match[1], {})[int(match[2])] = part.float() / counts.clamp(min=1e-5)[:, None]
        for stem, entries in found.items():
            weights[f"{stem}.embed"] = torch.stack([entries[index] for index in sorted(entries)])
        return weights


class MimiStream(Stream):
    """See `Stream`; made by `Mimi.stream`."""

    tokenizer: Mimi

    def __init__(self, tokenizer: Mimi, batch_size: int = 1, *, num_quantizers: int | None = None) -> None:
        super().__init__(tokenizer, batch_size, num_quantizers=num_quantizers)
        self.memory: Memory = {}

    @torch.no_grad()
    def _encode(self, until: int) -> Codes:
        count, hop = until - self.done, self.spec.hop_length
        if not count:
            return self._no_codes()
        x_BCS = self._take(count * hop)
        x_BS = F.pad(x_BCS[:, 0], (0, count * hop - x_BCS.shape[2]))
        with full_precision(x_BS.device):
            codes_BKN = self.tokenizer._encode(x_BS, self.num_quantizers, self.memory)
        self.done = self.start = until
        return Codes(codes_BKN, None, self.spec)

    @torch.no_grad()
    def _decode(self, until: int) -> Tensor:
        if until == self.done:
            return self._no_audio()
        with full_precision(self.tokenizer.device):
            x_BS = self.tokenizer._decode(self._take(until - self.done), self.memory)
        self.done = self.start = until
        return x_BS[:, None]

    def _take(self, size: int) -> Tensor:
        assert self.buffer is not None
        taken, self.buffer = self.buffer[:, :, :size], self.buffer[:, :, size:].clone()
        return taken


def mimi_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The entries of a Mimi config.json that shape the codec, with the publisher's defaults for those left out.

    Raises ValueError for variants that were never published (not causal, other activations).
    """
    fixed = {
        "audio_channels": 1, "use_causal_conv": True, "pad_mode": "constant", "use_conv_shortcut": False,
        "trim_right_ratio": 1.0, "hidden_act": "gelu", "attention_bias": False,
    }  # fmt: skip
    for name, value in fixed.items():
        if model.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {model[name]!r}")
    dim, ratios = model.get("hidden_size", 512), list(model.get("upsampling_ratios") or (8, 6, 5, 4))
    heads = model.get("num_attention_heads", 8)
    defaults = {
        "sampling_rate": 24000, "hidden_size": dim, "num_filters": 64, "num_residual_layers": 1,
        "upsampling_ratios": ratios, "kernel_size": 7, "last_kernel_size": 3, "residual_kernel_size": 3,
        "dilation_growth_rate": 2, "compress": 2, "codebook_size": 2048, "codebook_dim": 256, "num_quantizers": 32,
        "num_semantic_quantizers": 1, "num_hidden_layers": 8, "intermediate_size": 2048,
        "num_attention_heads": heads, "num_key_value_heads": heads, "sliding_window": 250,
        "vector_quantization_hidden_dimension": 256, "upsample_groups": dim,
    }  # fmt: skip
    settings = {name: model.get(name, default) for name, default in defaults.items()}
    check_sizes(
        settings, sampling_rate=10**6, num_quantizers=1024, num_hidden_layers=256, num_residual_layers=8,
        dilation_growth_rate=8,
    )  # fmt: skip
    rope = dict(model.get("rope_parameters") or {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type must be 'default', got {rope['rope_type']!r}")
    settings["rope_theta"] = float(rope.get("rope_theta", model.get("rope_theta", 10000.0)))
    settings["norm_eps"] = float(model.get("norm_eps", 1e-5))
    frame_rate = model.get("frame_rate", model.get("_frame_rate"))  # transformers reads the one and writes the other
    frames = math.ceil(settings["sampling_rate"] / math.prod(ratios))  # per second, in the transformers
    settings["frame_rate"] = float(
        settings["sampling_rate"] / math.prod(ratios) / 2 if frame_rate is None else frame_rate
    )
    same = {
        "num_key_value_heads": heads, "upsample_groups": dim, "head_dim": dim // heads,
        "codebook_dim": settings["vector_quantization_hidden_dimension"],
    }  # fmt: skip
    for name, value in same.items():
        if (model.get(name) or value) != value:
            raise ValueError(f"{name} must be {value} beside the other entries, got {model[name]}")
    if not 2 <= frames / max(settings["frame_rate"], 1e-9) < 17 or math.prod(ratios) > 2**16:
        raise ValueError(f"impossible frame_rate {settings['frame_rate']} (Hz) beside upsampling_ratios {ratios}")
    if settings["num_semantic_quantizers"] >= settings["num_quantizers"] or dim % (2 * heads):
        raise ValueError("impossible num_semantic_quantizers or num_attention_heads")
    return settings


class CausalConv(nn.Module):
    """Convolution over what was and is.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: positions.
        stride: positions per output.
        dilation: positions between taps.
        bias: whether there is one.
        elu: convolve `elu(x)`, not x.
        repeat: begin with the first position repeated, not with zeros.

    Attributes:
        reach: how many positions before those of its own stride an output depends on.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        elu: bool = True,
        repeat: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, bias=bias)
        self.stride, self.elu, self.repeat = stride, elu, repeat
        self.reach = (kernel - 1) * dilation + 1 - stride

    def forward(self, x_BTC: Tensor, memory: Memory) -> Tensor:
        return self.conv(with_past(self, x_BTC, memory, self.elu, self.repeat))


class CausalTranspose(nn.Module):
    """Transposed convolution of `elu(x)` whose kernel is twice its stride, cut at the right."""

    reach = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = ConvTranspose1d(inputs, outputs, stride)
        self.stride = stride

    def forward(self, x_BTC: Tensor, memory: Memory) -> Tensor:
        return self.conv.between(with_past(self, x_BTC, memory, elu=True))


def with_past(
    layer: CausalConv | CausalTranspose | Upsample, x_BTC: Tensor, memory: Memory, elu: bool, repeat: bool = False
) -> Tensor:
    """`x_BTC`, or its ELU, after the `layer.reach` positions before it, which are zeros (or the first one) at first."""
    if not layer.reach:
        return F.elu(x_BTC) if elu else x_BTC
    batch, length, width = x_BTC.shape
    whole_BTC = x_BTC.new_empty(batch, layer.reach + length, width)
    past_BTC, now_BTC = whole_BTC[:, : layer.reach], whole_BTC[:, layer.reach :]
    if elu:
        torch.ops.aten.elu.out(x_BTC, out=now_BTC)
    else:
        now_BTC.copy_(x_BTC)
    if layer in memory:
        past_BTC.copy_(memory[layer])
    elif repeat:
        past_BTC.copy_(now_BTC[:, :1])
    else:
        past_BTC.zero_()
    memory[layer] = whole_BTC[:, length:].clone()
    return whole_BTC


class ResidualUnit(nn.Module):
    """A dilated convolution to fewer channels and a pointwise one back, added to the input in its place."""

    def __init__(self, settings: dict[str, Any], width: int, dilation: int) -> None:
        super().__init__()
        hidden, kernel = width // settings["compress"], settings["residual_kernel_size"]
        self.block = nn.ModuleDict(
            {"1": CausalConv(width, hidden, kernel, dilation=dilation), "3": CausalConv(hidden, width, 1)}
        )

    def forward(self, x_BTC: Tensor, memory: Memory) -> Tensor:
        pointwise = self.block["3"]
        assert isinstance(pointwise, CausalConv)
        return pointwise.conv.add_to(x_BTC, F.elu_(self.block["1"](x_BTC, memory)))


class Seanet(nn.Module):
    """Causal layers in a row, `[B, T, C]` to the same; None stands for an activation, which has a number as well."""

    def __init__(self, layers: list[nn.Module | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): layer for number, layer in enumerate(layers) if layer is not None})

    def forward(self, x_BTC: Tensor, memory: Memory) -> Tensor:
        for layer in self.layers.values():
            x_BTC = layer(x_BTC, memory)
        return x_BTC

    def causal_layers(self) -> list[CausalConv | CausalTranspose]:
        """In running order."""
        return [layer for layer in self.modules() if isinstance(layer, CausalConv | CausalTranspose)]


def encoder_layers(settings: dict[str, Any]) -> list[nn.Module | None]:
    """From audio `[B, S, 1]` to frames `[B, T, hidden_size]`."""
    width = settings["num_filters"]
    layers: list[nn.Module | None] = [CausalConv(1, width, settings["kernel_size"], elu=False)]
    for ratio in reversed(settings["upsampling_ratios"]):
        layers += residual_units(settings, width)
        layers += [None, CausalConv(width, 2 * width, 2 * ratio, ratio)]
        width *= 2
    return [*layers, None, CausalConv(width, settings["hidden_size"], settings["last_kernel_size"])]


def decoder_layers(settings: dict[str, Any]) -> list[nn.Module | None]:
    """From frames `[B, T, hidden_size]` to audio `[B, S, 1]`."""
    width = settings["num_filters"] * 2 ** len(settings["upsampling_ratios"])
    layers: list[nn.Module | None] = [CausalConv(settings["hidden_size"], width, settings["kernel_size"], elu=False)]
    for ratio in settings["upsampling_ratios"]:
        layers += [None, CausalTranspose(width, width // 2, ratio)]
        width //= 2
        layers += residual_units(settings, width)
    return [*layers, None, CausalConv(width, 1, settings["last_kernel_size"])]


def residual_units(settings: dict[str, Any], width: int) -> list[nn.Module]:
    """The units of one rate, of growing dilation."""
    growth = settings["dilation_growth_rate"]
    return [ResidualUnit(settings, width, growth**index) for index in range(settings["num_residual_layers"])]


class Upsample(nn.Module):
    """Transposed convolution of each channel for itself, to `stride` frames per code."""

    reach = 1

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, dim, 2 * stride, stride, groups=dim, bias=False)

    def forward(self, x_BNC: Tensor, memory: Memory) -> Tensor:
        x_BNC = with_past(self, x_BNC, memory, elu=False)
        now_sC, before_sC = self.conv.weight.view(x_BNC.shape[2], 2, -1).permute(1, 2, 0)
        return (x_BNC[:, 1:, None] * now_sC + x_BNC[:, :-1, None] * before_sC).flatten(1, 2)


class Transformer(nn.Module):
    """Pre-norm layers with rotary positions (Su et al., arXiv 2104.09864), `[B, T, C]` to the same."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(settings) for _ in range(settings["num_hidden_layers"]))
        self.reach = settings["num_hidden_layers"] * (settings["sliding_window"] - 1)
        self.head_dim = settings["hidden_size"] // settings["num_attention_heads"]
        self.theta = settings["rope_theta"]

    def forward(self, x_BTC: Tensor, memory: Memory) -> Tensor:
        positions_T = torch.arange(x_BTC.shape[1], device=x_BTC.device)
        if self in memory:
            positions_T = positions_T + memory[self]
        memory[self] = positions_T[-1] + 1
        exponent_D = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x_BTC.device) / self.head_dim
        angles_TD = (positions_T[:, None].float() * (1.0 / self.theta**exponent_D)).repeat(1, 2)
        cos_TD, sin_TD = angles_TD.cos(), angles_TD.sin()
        for layer in self.layers:
            x_BTC = layer(x_BTC, cos_TD, sin_TD, memory)
        return x_BTC


class TransformerLayer(nn.Module):
    """Attention, then an MLP, each scaled per channel (Touvron et al., arXiv 2103.17239) before it is added."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        dim = settings["hidden_size"]
        self.self_attn = Attention(dim, settings["num_attention_heads"], settings["sliding_window"])
        self.mlp = Mlp(dim, settings["intermediate_size"])
        self.input_layernorm = nn.LayerNorm(dim, eps=settings["norm_eps"])
        self.post_attention_layernorm = nn.LayerNorm(dim, eps=settings["norm_eps"])
        self.self_attn_layer_scale = Scale(dim)
        self.mlp_layer_scale = Scale(dim)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, memory: Memory) -> Tensor:
        h_BTC = self.self_attn(self.input_layernorm(x_BTC), cos_TD, sin_TD, memory)
        x_BTC = x_BTC + self.self_attn_layer_scale(h_BTC)
        return x_BTC + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x_BTC)))


class Attention(nn.Module):
    """Each position attends to itself and the `window - 1` before it; keys and values of the latter are its memory."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, memory: Memory) -> Tensor:
        projections = (project(x_BTC) for project in (self.q_proj, self.k_proj, self.v_proj))
        q_BHTD, k_BHTD, v_BHTD = (h_BTC.unflatten(2, (self.heads, -1)).transpose(1, 2) for h_BTC in projections)
        q_BHTD, k_BHTD = rotate(q_BHTD, cos_TD, sin_TD), rotate(k_BHTD, cos_TD, sin_TD)
        if self in memory:
            k_BHTD, v_BHTD = (torch.cat(pair, 2) for pair in zip(memory[self], (k_BHTD, v_BHTD), strict=True))
        count, total = x_BTC.shape[1], k_BHTD.shape[2]
        kept = slice(max(total - self.window + 1, 0), total)
        memory[self] = torch.stack([k_BHTD[:, :, kept], v_BHTD[:, :, kept]])
        parts = []
        for first in range(total - count, total, QUERIES):  # of the keys, the queries are the last ones
            last = min(first + QUERIES, total)
            low = max(first - self.window + 1, 0)
            query = slice(first - total + count, last - total + count)
            positions_T = torch.arange(low, last, device=x_BTC.device)
            distance_TT = positions_T[first - low :, None] - positions_T
            seen_TT = (distance_TT >= 0) & (distance_TT < self.window)
            key = k_BHTD[:, :, low:last], v_BHTD[:, :, low:last]
            parts.append(F.scaled_dot_product_attention(q_BHTD[:, :, query], *key, attn_mask=seen_TT))
        return self.o_proj(torch.cat(parts, 2).transpose(1, 2).flatten(2))


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions for heads whose dims come as two halves."""
    left, right = x_BHTD.chunk(2, -1)
    return x_BHTD * cos_TD + torch.cat([-right, left], -1) * sin_TD


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTC)))


class Scale(nn.Module):
    """One factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.01))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.scale * x_BTC


class SplitQuantizer(nn.Module):
    """The semantic codebooks and the acoustic ones, both of the same latents."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.num_semantic = settings["num_semantic_quantizers"]
        self.semantic_residual_vector_quantizer = Quantizer(settings, self.num_semantic)
        self.acoustic_residual_vector_quantizer = Quantizer(settings, settings["num_quantizers"] - self.num_semantic)

    def encode(self, x_BNC: Tensor, num_quantizers: int) -> Tensor:
        """Codes int64 `[B, k, N]` of latents."""
        codes = [self.semantic_residual_vector_quantizer.encode(x_BNC, min(num_quantizers, self.num_semantic))]
        if num_quantizers > self.num_semantic:
            rest = num_quantizers - self.num_semantic
            codes.append(self.acoustic_residual_vector_quantizer.encode(x_BNC, rest))
        return torch.cat(codes, 1)

    def decode(self, codes_BKN: Tensor) -> Tensor:
        """Latents `[B, N, C]`."""
        x_BNC = self.semantic_residual_vector_quantizer.decode(codes_BKN[:, : self.num_semantic])
        if codes_BKN.shape[1] > self.num_semantic:
            x_BNC = x_BNC + self.acoustic_residual_vector_quantizer.decode(codes_BKN[:, self.num_semantic :])
        return x_BNC


class Quantizer(Codebooks):
    """Codebooks between two projections."""

    def __init__(self, settings: dict[str, Any], num_quantizers: int) -> None:
        dim, inner = settings["hidden_size"], settings["codebook_dim"]
        super().__init__(num_quantizers, settings["codebook_size"], inner)
        self.input_proj = Conv1d(dim, inner, 1, bias=False)
        self.output_proj = Conv1d(inner, dim, 1, bias=False)

    def encode(self, x_BTD: Tensor, num_quantizers: int) -> Tensor:
        """Codes int64 `[B, k, N]` of latents."""
        return super().encode(self.input_proj(x_BTD), num_quantizers)

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """Latents `[B, N, C]`."""
        return self.output_proj(super().decode(codes_BKT))
