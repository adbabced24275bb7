"""SEANet, the convolutional encoder and decoder of EnCodec (Tagliasacchi et al., arXiv 2009.02095), to run only.

What makes it fast on a CPU: activations are `[items, time, channels]`, the order in which convolutions need no copies;
the activation writes straight into the padded input of the next convolution; layers near the samples run over tiles
that stay in the cache; weight norm is folded when weights are read; the LSTM's matrices lie as its products need them.

Items of a batch may differ in length: each is padded at its own ends, by reflection, as when it is alone. This file
knows nothing of codes, files or streams.

Shapes: B items, T steps, I inputs, O outputs, k taps, G = 4 * O gates, D latent dims.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.errors import CheckpointError

Reach = tuple[int, int]  # first and last row that something depends on, relative to its own
State = tuple[Tensor, Tensor]  # of an LSTM: hidden and cell, [layers, B, O]
TILE = 2**18  # numbers in an activation that stays in the cache of a CPU


@dataclass(frozen=True)
class Shape:
    """What config.json of transformers' `EncodecModel` says of the network; defaults as there (the 24 kHz model)."""

    sampling_rate: int = 24000
    audio_channels: int = 1
    normalize: bool = False
    chunk_length_s: float | None = None
    overlap: float | None = None
    target_bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)
    hidden_size: int = 128
    num_filters: int = 32
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    norm_type: str = "weight_norm"
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "reflect"
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 1024
    use_conv_shortcut: bool = True

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> Shape:
        """From config.json; entries that say nothing of the network are left out. Raises ValueError."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = entries.get(field.name, field.default)
            kind = {"int": int, "bool": bool, "str": str}.get(str(field.type))
            if kind is not None and type(value) is not kind:
                raise ValueError(f"{field.name} must be {field.type}, got {value!r}")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        shape = cls(**values)
        if entries.get("codebook_dim") not in (None, shape.hidden_size):
            raise ValueError(f"codebook_dim {entries['codebook_dim']!r} must be hidden_size {shape.hidden_size}")
        shape.check()
        return shape

    def check(self) -> None:
        """Raises ValueError for values that no network can have, or that this class does not run."""
        ratios, widths = self.upsampling_ratios, self.target_bandwidths
        if not ratios or not all(type(ratio) is int and 2 <= ratio <= 64 for ratio in ratios) or len(ratios) > 8:
            raise ValueError(f"upsampling_ratios {ratios!r} must be 1 to 8 integers in 2..64")
        if not widths or not all(type(width) in (int, float) and 0 < width < 1e6 for width in widths):
            raise ValueError(f"target_bandwidths {widths!r} must be positive numbers (kbit/s)")
        for name, top in (
            ("sampling_rate", 10**6),
            ("audio_channels", 2),
            ("hidden_size", 2**14),
            ("num_filters", 2**10),
            ("num_residual_layers", 8),
            ("kernel_size", 64),
            ("last_kernel_size", 64),
            ("residual_kernel_size", 64),
            ("dilation_growth_rate", 8),
            ("compress", self.num_filters),
            ("num_lstm_layers", 8),
            ("codebook_size", 2**20),
        ):
            if not 1 <= getattr(self, name) <= top:
                raise ValueError(f"{name} {getattr(self, name)} is outside 1..{top}")
        if self.norm_type not in ("weight_norm", "time_group_norm") or self.pad_mode != "reflect":
            raise ValueError(f"norm_type {self.norm_type!r} or pad_mode {self.pad_mode!r} is not known here")
        if self.trim_right_ratio != 1.0 or (self.use_causal_conv and self.norm_type != "weight_norm"):
            raise ValueError("need trim_right_ratio 1.0, and weight_norm if causal")
        if (self.chunk_length_s is None) != (self.norm_type == "weight_norm") or self.normalize != bool(self.segment):
            raise ValueError("need chunk_length_s and normalize with time_group_norm, and with nothing else")
        if self.segment and not (self.hop <= self.segment <= 10**8 and 0 <= (self.overlap or 0) < 0.5):
            raise ValueError(f"impossible chunk_length_s {self.chunk_length_s!r} or overlap {self.overlap!r}")
        if not 1 <= self.num_quantizers <= 1024:
            raise ValueError(f"target_bandwidths {widths!r} make {self.num_quantizers} quantizers, need 1..1024")
        if self.hop > 2**16 or self.dilation_growth_rate ** (self.num_residual_layers - 1) > 2**10:
            raise ValueError(f"a hop of {self.hop} samples or dilation beyond 1024 is more than any codec has")

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def num_quantizers(self) -> int:
        """K: as many as the highest bandwidth pays for, with a rounded frame rate as the publishers have it."""
        rate, bits = math.ceil(self.sampling_rate / self.hop), math.ceil(math.log2(self.codebook_size))
        return int(1000 * self.target_bandwidths[-1] // (rate * max(bits, 1)))

    @property
    def segment(self) -> int:
        """Samples that are coded by themselves; 0 = all."""
        return int(float(self.chunk_length_s or 0) * self.sampling_rate)

    @property
    def segment_frames(self) -> int:
        """Codes of a whole segment."""
        return -(-self.segment // self.hop)

    @property
    def advance(self) -> int:
        """Samples from the start of one segment to the next."""
        return max(1, int((1.0 - (self.overlap or 0.0)) * self.segment))


class Weights:
    """Named tensors that are taken one by one, so that what nobody asked for can be told.

    Args:
        tensors: by the names that transformers gives them.
        origin: where they are from, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self.rest, self.origin = dict(tensors), origin

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name, float32. Raises CheckpointError if it is missing, misshapen or not finite."""
        if name not in self.rest:
            raise CheckpointError(f"{self.origin}: {name} is missing; does config.json belong to these weights?")
        tensor = self.rest.pop(name)
        if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
            found = f"{tensor.dtype}{list(tensor.shape)}"
            raise CheckpointError(f"{self.origin}: {name} is {found}, the config needs finite numbers {list(shape)}")
        return tensor.float()

    def folded(self, prefix: str, *shape: int) -> Tensor:
        """`prefix.weight`, or the product of its weight norm `g * v / |v|` (Salimans & Kingma, arXiv 1602.07868)."""
        new = f"{prefix}.parametrizations.weight.original"
        for g, v in ((f"{prefix}.weight_g", f"{prefix}.weight_v"), (f"{new}0", f"{new}1")):
            if v in self.rest:
                direction, length = self.take(v, *shape), self.take(g, shape[0], 1, 1)
                return direction * (length / torch.norm_except_dim(direction, 2, 0))
        return self.take(f"{prefix}.weight", *shape)


class Layer(nn.Module, ABC):
    """What convolutions share: weights, padding, and where the model has it a group norm over channels and time.

    Args:
        source: transformers' name of the layer.
        shape: of the weight, `[outputs, taps, inputs]`.
        outputs: channels.
        norm: with group norm.
    """

    def __init__(self, source: str, shape: tuple[int, int, int], outputs: int, norm: bool) -> None:
        super().__init__()
        self.source, self.outputs = source, outputs
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.scale = nn.Parameter(torch.empty(outputs)) if norm else None
        self.shift = nn.Parameter(torch.empty(outputs)) if norm else None

    def read(self, weights: Weights) -> None:
        """Take this layer's tensors."""
        self.weight.copy_(self._kernel(weights))
        self.bias.copy_(weights.take(f"{self.source}.conv.bias", self.outputs))
        if self.scale is not None and self.shift is not None:
            self.scale.copy_(weights.take(f"{self.source}.norm.weight", self.outputs))
            self.shift.copy_(weights.take(f"{self.source}.norm.bias", self.outputs))

    @abstractmethod
    def _kernel(self, weights: Weights) -> Tensor:
        """The weight in the order that `shape` says."""

    def _normalised(self, y_BTO: Tensor) -> Tensor:
        """Group norm with one group, in place."""
        if self.scale is None or self.shift is None:
            return y_BTO
        variance, mean = torch.var_mean(y_BTO, dim=(1, 2), correction=0, keepdim=True)
        return y_BTO.sub_(mean).mul_(torch.rsqrt(variance + 1e-5) * self.scale).add_(self.shift)


class Conv(Layer):
    """ELU, padding by reflection, convolution, norm: `[B, T, I]` to `[B, ceil(T / stride), O]`.

    With `causal` the padding is on the left (and on the right only what the last stride lacks); `elu` says whether the
    activation comes first.
    """

    def __init__(
        self,
        source: str,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        causal: bool,
        norm: bool,
        stride: int = 1,
        dilation: int = 1,
        elu: bool = True,
    ) -> None:
        super().__init__(source, (outputs, kernel, inputs), outputs, norm)
        self.inputs, self.kernel, self.stride, self.dilation, self.elu = inputs, kernel, stride, dilation, elu
        self.span = (kernel - 1) * dilation + 1
        total = self.span - stride
        self.left = total if causal else total - total // 2
        self.right = self.span - 1 - self.left  # at most

    def _kernel(self, weights: Weights) -> Tensor:
        return weights.folded(f"{self.source}.conv", self.outputs, self.inputs, self.kernel).transpose(1, 2)

    def needs(self, reach: Reach) -> Reach:
        """Input rows that output rows `reach` depend on."""
        return reach[0] * self.stride - self.left, reach[1] * self.stride + self.right

    def out_lengths(self, lengths_B: Tensor) -> Tensor:
        """Output rows of items of so many input rows."""
        return -(-lengths_B // self.stride)

    def forward(self, x_BTI: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """`lengths_B`: int64 rows of each item, None = all."""
        if self.kernel == 1:
            y_BTO = torch.addmm(self.bias, self._activated(x_BTI).flatten(0, 1), self.weight[:, 0].T)
            return self._normalised(y_BTO.view(*x_BTI.shape[:2], -1))
        batch, time, _ = x_BTI.shape
        right = self.right if lengths_B is not None else self._lacking(time)
        padded_BTI = x_BTI.new_empty(batch, self.left + time + right, self.inputs)
        body_BTI = padded_BTI[:, self.left : self.left + time]
        self._activated(x_BTI, body_BTI)
        if lengths_B is not None or time <= max(self.left, right):
            ends_B = torch.full((batch,), time, device=x_BTI.device) if lengths_B is None else lengths_B
            self._reflect(padded_BTI, ends_B, right)
        else:
            padded_BTI[:, : self.left] = body_BTI[:, 1 : self.left + 1].flip(1)
            if right:
                padded_BTI[:, self.left + time :] = body_BTI[:, time - 1 - right : time - 1].flip(1)
        y_BTO = convolve(padded_BTI, self.weight, self.bias, self.stride, self.dilation)
        return self._normalised(y_BTO[:, : -(-time // self.stride)])

    def _activated(self, x_BTI: Tensor, out_BTI: Tensor | None = None) -> Tensor:
        if self.elu:
            return elu(x_BTI, torch.empty_like(x_BTI) if out_BTI is None else out_BTI)
        return x_BTI if out_BTI is None else out_BTI.copy_(x_BTI)

    def _lacking(self, time: Any) -> Any:
        """Rows that the last window of items of so many rows (int, or int64 tensor) lacks on the right."""
        return (-(-time // self.stride) - 1) * self.stride + self.span - self.left - time

    def _reflect(self, padded_BTI: Tensor, ends_B: Tensor, right: int) -> None:
        """Pad each item at its own ends; one that is shorter than its padding is first continued with zeros."""
        device, ends_B1 = padded_BTI.device, ends_B[:, None]
        most_B1 = self._lacking(ends_B1).clamp(min=self.left)
        whole_B1 = torch.where(ends_B1 > most_B1, ends_B1, most_B1 + 1)
        before_P, after_P = torch.arange(-self.left, 0, device=device), torch.arange(right, device=device)
        into_BP = torch.cat([before_P.expand(len(ends_B), -1), ends_B1 + after_P], 1)
        from_BP = torch.where(into_BP < whole_B1, into_BP.abs(), 2 * (whole_B1 - 1) - into_BP)
        known_BP = (from_BP >= 0) & (from_BP < ends_B1)
        from_BPI = (from_BP.clamp(min=0).minimum(ends_B1 - 1) + self.left)[..., None].expand(-1, -1, self.inputs)
        values_BPI = padded_BTI.gather(1, from_BPI) * known_BP[..., None]
        padded_BTI.scatter_(1, (into_BP + self.left)[..., None].expand(-1, -1, self.inputs), values_BPI)


class Up(Layer):
    """ELU, transposed convolution of kernel 2 * ratio and stride `ratio`, norm: `[B, T, I]` to `[B, T * ratio, O]`.

    Block t of `ratio` outputs comes from inputs t - 1 and t, so it is a convolution of kernel 2 with `ratio` times the
    outputs. Without causality the result starts half a block later.
    """

    def __init__(self, source: str, inputs: int, outputs: int, ratio: int, *, causal: bool, norm: bool) -> None:
        super().__init__(source, (ratio * outputs, 2, inputs), outputs, norm)
        self.inputs, self.ratio = inputs, ratio
        self.cut = 0 if causal else ratio - ratio // 2

    def _kernel(self, weights: Weights) -> Tensor:
        kernel_IOk = weights.folded(f"{self.source}.conv", self.inputs, self.outputs, 2 * self.ratio)
        kernel_IO2r = kernel_IOk.unflatten(2, (2, self.ratio)).flip(2)  # for input t - 1, then for input t
        return kernel_IO2r.permute(3, 1, 2, 0).flatten(0, 1)

    def needs(self, reach: Reach) -> Reach:
        """Input rows that output rows `reach` depend on."""
        return (reach[0] + self.cut) // self.ratio - 1, (reach[1] + self.cut) // self.ratio

    def out_lengths(self, lengths_B: Tensor) -> Tensor:
        """Output rows of items of so many input rows."""
        return lengths_B * self.ratio

    def forward(self, x_BTI: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """`lengths_B`: int64 rows of each item, None = all."""
        batch, time, _ = x_BTI.shape
        padded_BTI = x_BTI.new_empty(batch, time + 2, self.inputs)
        elu(x_BTI, padded_BTI[:, 1 : time + 1])
        padded_BTI[:, :: time + 1] = 0
        if lengths_B is not None:
            padded_BTI[torch.arange(batch, device=lengths_B.device), lengths_B + 1] = 0
        y_BTO = convolve(padded_BTI, self.weight, self.bias.repeat(self.ratio), 1, 1)
        y_BTO = self._normalised(y_BTO.view(batch, -1, self.outputs))  # the norm sees the rows that are cut off
        return y_BTO[:, self.cut : self.cut + time * self.ratio]


class Residual(nn.Module):
    """Two convolutions beside a third or nothing: `[B, T, O]` to the same."""

    def __init__(self, source: str, width: int, dilation: int, config: Shape) -> None:
        super().__init__()
        causal, norm = config.use_causal_conv, config.norm_type != "weight_norm"
        hidden, kernel = width // config.compress, config.residual_kernel_size
        self.first = Conv(f"{source}.block.1", width, hidden, kernel, causal=causal, norm=norm, dilation=dilation)
        self.second = Conv(f"{source}.block.3", hidden, width, 1, causal=causal, norm=norm)
        self.shortcut: Conv | None = None
        if config.use_conv_shortcut:
            self.shortcut = Conv(f"{source}.shortcut", width, width, 1, causal=causal, norm=norm, elu=False)

    def needs(self, reach: Reach) -> Reach:
        """Input rows that output rows `reach` depend on."""
        return self.first.needs(reach)

    def out_lengths(self, lengths_B: Tensor) -> Tensor:
        """Output rows of items of so many input rows."""
        return lengths_B

    def forward(self, x_BTO: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """`lengths_B`: int64 rows of each item, None = all."""
        h_BTO = self.first(x_BTO, lengths_B)
        if self.shortcut is None or self.second.scale is not None:
            return self.second(h_BTO) + (x_BTO if self.shortcut is None else self.shortcut(x_BTO))
        bias_O = self.shortcut.bias + self.second.bias
        y_RO = torch.addmm(bias_O, x_BTO.flatten(0, 1), self.shortcut.weight[:, 0].T)
        y_RO.addmm_(elu(h_BTO, torch.empty_like(h_BTO)).flatten(0, 1), self.second.weight[:, 0].T)
        return y_RO.view(x_BTO.shape)


class Convs(nn.ModuleList):
    """Convolutions one after the other.

    Args:
        layers: `Conv`, `Up`, `Residual` and `Convs`.
        rows_in: input rows per frame, a unit of time that suits all layers.
        rows_out: output rows per frame.
        tile: frames that a CPU computes at a time, so that all of it stays in the cache; 0 = all.

    Attributes:
        reach: (before, after) frames on each side of a frame that it depends on, and enough of them for the padding
            at an item's end to mirror no row that a window lacks.
    """

    def __init__(self, layers: Iterable[nn.Module], rows_in: int, rows_out: int, tile: int = 0) -> None:
        super().__init__(layers)
        self.rows_in, self.rows_out, self.tile = rows_in, rows_out, tile
        first, last = self.needs((0, rows_out - 1))
        self.reach: Reach = max(-(first // rows_in), 2), last // rows_in

    def needs(self, reach: Reach) -> Reach:
        """Input rows that output rows `reach` depend on."""
        for layer in reversed(self):
            reach = layer.needs(reach)  # type: ignore[operator]
        return reach

    def out_lengths(self, lengths_B: Tensor) -> Tensor:
        """Output rows of items of so many input rows."""
        for layer in self:
            lengths_B = layer.out_lengths(lengths_B)  # type: ignore[operator]
        return lengths_B

    def forward(self, x_BTI: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """`lengths_B`: int64 rows of each item, None = all."""
        count = -(-x_BTI.shape[1] // self.rows_in)
        if not 0 < self.tile < count or lengths_B is not None or x_BTI.device.type != "cpu":
            return self._whole(x_BTI, lengths_B)
        before, after = self.reach
        parts = []
        for start in range(0, count, self.tile):
            low = max(start - before, 0)
            y_BTO = self._whole(x_BTI[:, low * self.rows_in : (start + self.tile + after) * self.rows_in], None)
            parts.append(y_BTO[:, (start - low) * self.rows_out : (start - low + self.tile) * self.rows_out])
        return torch.cat(parts, 1)

    def _whole(self, x_BTI: Tensor, lengths_B: Tensor | None) -> Tensor:
        for layer in self:
            x_BTI = layer(x_BTI, lengths_B)
            lengths_B = None if lengths_B is None else layer.out_lengths(lengths_B)  # type: ignore[operator]
        return x_BTI


class Recurrent(nn.Module):
    """LSTM layers with a residual connection around them: `[T, B, O]` to the same.

    Gates come in the order input, forget, output, candidate (transformers: candidate before output).
    """

    def __init__(self, source: str, width: int, layers: int) -> None:
        super().__init__()
        self.source = source
        self.inward_LOG = nn.Parameter(torch.empty(layers, width, 4 * width))
        self.onward_LOG = nn.Parameter(torch.empty(layers, width, 4 * width))
        self.bias_LG = nn.Parameter(torch.empty(layers, 4 * width))

    def read(self, weights: Weights) -> None:
        """Take the LSTM's tensors."""
        layers, width, gates = self.inward_LOG.shape
        order_G = torch.arange(gates).view(4, width)[[0, 1, 3, 2]].flatten()
        for layer in range(layers):
            name = f"{self.source}.lstm"
            self.inward_LOG[layer] = weights.take(f"{name}.weight_ih_l{layer}", gates, width)[order_G].T
            self.onward_LOG[layer] = weights.take(f"{name}.weight_hh_l{layer}", gates, width)[order_G].T
            bias_G = weights.take(f"{name}.bias_ih_l{layer}", gates) + weights.take(f"{name}.bias_hh_l{layer}", gates)
            self.bias_LG[layer] = bias_G[order_G]

    def forward(self, x_TBO: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Output, and the state to go on from.

        One item is run as two: a matrix times a single vector is summed in another order, and then an item alone would
        differ in its last bits from the same item in a batch.
        """
        time, batch, width = x_TBO.shape
        layers, rows = len(self.bias_LG), max(batch, 2)
        start_LBO = x_TBO.new_zeros(layers, batch, width)
        hidden_LBO, cell_LBO = (part.expand(-1, rows, -1).clone() for part in state or (start_LBO, start_LBO))
        h_TBO = x_TBO.expand(-1, rows, -1).clone(memory_format=torch.contiguous_format)
        for layer in range(layers):
            onward_OG, hidden_BO, cell_BO = self.onward_LOG[layer], hidden_LBO[layer], cell_LBO[layer]
            gates_RG = torch.addmm(self.bias_LG[layer], h_TBO.view(-1, width), self.inward_LOG[layer])
            gates_TBG = gates_RG.view(time, rows, 4 * width)
            steps = [part.unbind(0) for part in gates_TBG.split(width, 2)]  # views, made all at once
            logistic = gates_TBG[:, :, : 3 * width].unbind(0)
            for gates_BG, logistic_BG, enter_BO, keep_BO, show_BO, new_BO, out_BO in zip(
                gates_TBG.unbind(0), logistic, *steps, h_TBO.unbind(0), strict=True
            ):
                gates_BG.addmm_(hidden_BO, onward_OG)
                logistic_BG.sigmoid_()
                cell_BO.mul_(keep_BO).addcmul_(enter_BO, new_BO.tanh_())
                hidden_BO = torch.mul(cell_BO.tanh(), show_BO, out=out_BO)
            hidden_LBO[layer] = hidden_BO
        return h_TBO[:, :batch] + x_TBO, (hidden_LBO[:, :batch], cell_LBO[:, :batch])


def near_samples(config: Shape) -> tuple[int, int, int]:
    """How many layers count as near the samples, how many samples make a row beyond them, and rows of a tile."""
    ratios = config.upsampling_ratios[(len(config.upsampling_ratios) + 1) // 2 :]
    rows = math.prod(ratios)
    tile = max(TILE // (config.num_filters * rows), 1) if config.norm_type == "weight_norm" else 0
    return 1 + len(ratios) * (1 + config.num_residual_layers), rows, tile


class Encoder(nn.Module):
    """Samples `[B, T * hop, channels]` to latents `[B, T, D]` in three parts: `front`, `recurrent`, `last`."""

    def __init__(self, config: Shape) -> None:
        super().__init__()
        how = {"causal": config.use_causal_conv, "norm": config.norm_type != "weight_norm"}
        width = config.num_filters
        layers: list[nn.Module] = [
            Conv("encoder.layers.0", config.audio_channels, width, config.kernel_size, elu=False, **how)
        ]
        index = 1  # transformers counts the activations, too
        for ratio in reversed(config.upsampling_ratios):
            for depth in range(config.num_residual_layers):
                name = f"encoder.layers.{index}"
                layers.append(Residual(name, width, config.dilation_growth_rate**depth, config))
                index += 1
            layers.append(Conv(f"encoder.layers.{index + 1}", width, 2 * width, 2 * ratio, stride=ratio, **how))
            index, width = index + 2, 2 * width
        self.width = width
        count, rows, tile = near_samples(config)
        near = Convs(layers[:count], rows, 1, tile)
        self.front = Convs([near, *layers[count:]], math.prod(config.upsampling_ratios), 1)
        self.recurrent = Recurrent(f"encoder.layers.{index}", width, config.num_lstm_layers)
        self.last = Conv(f"encoder.layers.{index + 2}", width, config.hidden_size, config.last_kernel_size, **how)


class Decoder(nn.Module):
    """Latents `[B, T, D]` to samples `[B, T * hop, channels]` in three parts: `first`, `recurrent`, `back`."""

    def __init__(self, config: Shape) -> None:
        super().__init__()
        how = {"causal": config.use_causal_conv, "norm": config.norm_type != "weight_norm"}
        width = config.num_filters * 2 ** len(config.upsampling_ratios)
        self.width = width
        self.first = Conv("decoder.layers.0", config.hidden_size, width, config.kernel_size, elu=False, **how)
        self.recurrent = Recurrent("decoder.layers.1", width, config.num_lstm_layers)
        layers: list[nn.Module] = []
        index = 2
        for ratio in config.upsampling_ratios:
            layers.append(Up(f"decoder.layers.{index + 1}", width, width // 2, ratio, **how))
            index, width = index + 2, width // 2
            for depth in range(config.num_residual_layers):
                name = f"decoder.layers.{index}"
                layers.append(Residual(name, width, config.dilation_growth_rate**depth, config))
                index += 1
        name = f"decoder.layers.{index + 1}"
        layers.append(Conv(name, width, config.audio_channels, config.last_kernel_size, **how))
        count, rows, tile = near_samples(config)
        near = Convs(layers[-count:], 1, rows, tile)
        self.back = Convs([*layers[:-count], near], 1, math.prod(config.upsampling_ratios))


def elu(x: Tensor, out: Tensor) -> Tensor:
    """`x` where positive, else `exp(x) - 1`, into `out`; in the cache, these passes are faster than `F.elu`."""
    if x.device.type != "cpu":
        return out.copy_(F.elu(x))
    torch.clamp(x, max=0, out=out).exp_().sub_(1)
    return torch.maximum(out, x, out=out)


def convolve(x_BTI: Tensor, weight_OkI: Tensor, bias_O: Tensor, stride: int, dilation: int) -> Tensor:
    """Convolution without padding, `[B, T', O]`, as one over a picture of height 1 whose channels come last."""
    weight_OI1k = weight_OkI.transpose(1, 2)[:, :, None]
    y_BO1T = F.conv2d(x_BTI.transpose(1, 2)[:, :, None], weight_OI1k, bias_O, (1, stride), dilation=(1, dilation))
    return y_BO1T[:, :, 0].transpose(1, 2)
