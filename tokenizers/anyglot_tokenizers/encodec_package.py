"""The `encodec` package beside `Encodec`: import it without torchaudio, read its `.th` checkpoints and its models.

The package (PyPI release 0.1.1, CC-BY-NC-4.0, not a dependency: `pip install --no-deps encodec einops`) imports
torchaudio at its top but uses two names of it when it runs, `transforms.Resample` and `transforms.Spectrogram`.
`import_encodec` gives it a stand-in with these two, in `sys.modules` only while it is imported and only where
torchaudio is not installed; afterwards only the package has it. Reading checkpoints needs no package at all.

This file knows names and layouts; the network is in `encodec.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from anyglot_tokenizers.encodec import Encodec
from anyglot_tokenizers.errors import AnyglotError, CheckpointError

BANDWIDTHS = (1.5, 3.0, 6.0, 12.0, 24.0)  # kbit/s that the package names
RENAMED = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.(conv|convtr)\.", ".conv."),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
)
"""The package's names of tensors -> those of transformers."""


def import_encodec() -> ModuleType:
    """The `encodec` package and its discriminators, with a stand-in for torchaudio where that is not installed.

    Raises AnyglotError if the package, or what else it needs, is missing or does not import.
    """
    names = ("torchaudio", "torchaudio.transforms")
    absent = importlib.util.find_spec("torchaudio") is None if "torchaudio" not in sys.modules else False
    if absent and "encodec" not in sys.modules:
        sys.modules.update(zip(names, _stand_in(), strict=True))
    try:
        importlib.import_module("encodec.msstftd")
        return importlib.import_module("encodec")
    except (ImportError, OSError, RuntimeError) as error:
        raise AnyglotError(
            f"the encodec package does not import ({error}); pip install --no-deps encodec einops, "
            "and remove a torchaudio that does not fit torch"
        ) from error
    finally:
        if absent:
            for name in names:
                sys.modules.pop(name, None)


def load_th(path: str | os.PathLike[str], *, license: str = "unknown", **model: Any) -> Encodec:
    """Read a `.th` checkpoint of the package, such as torch.hub keeps as `encodec_24khz-d7cc33bc.th`.

    Sizes are read off the tensors. What these cannot tell is taken to be that of the package's two models: 24 kHz and
    causal with weight norm, 48 kHz in segments of 1 s with group norm.

    Args:
        path: file; if its name ends in eight hex digits, these are the beginning of its sha256.
        license: of the weights.
        model: entries of `Encodec`'s config that are known better.

    Raises:
        CheckpointError: missing or damaged file, or other content. Nothing in the file is run (`weights_only`).
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    named = re.search(r"-([0-9a-f]{8})$", file.stem)
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if named and not digest.startswith(named[1]):
        raise CheckpointError(f"{file}: sha256 is {digest[:8]}..., the name says {named[1]}; download it again")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{file}: not a readable checkpoint of tensors ({reason}); download it again") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file}: not a table of tensors; is it a checkpoint of the encodec package?")
    return _build(tensors, str(file), license, model)


def from_package(model: nn.Module, *, license: str = "unknown") -> Encodec:
    """Our form of an `encodec.EncodecModel`, with its weights. Raises CheckpointError for another network."""
    known: Any = model
    try:
        entries = {
            "sampling_rate": known.sample_rate,
            "audio_channels": known.channels,
            "normalize": known.normalize,
            "chunk_length_s": known.segment,
            "overlap": known.overlap if known.segment else None,
            "target_bandwidths": [float(width) for width in known.target_bandwidths],
            "use_causal_conv": known.encoder.model[0].causal,
        }
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{type(model).__name__} is not an encodec.EncodecModel ({error})") from error
    return _build(model.state_dict(), type(model).__name__, license, entries)


def _build(tensors: Mapping[str, Tensor], origin: str, license: str, known: Mapping[str, Any]) -> Encodec:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    try:
        tokenizer = Encodec(model={**_sizes(renamed), **known}, license=license)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{origin}: not a checkpoint of the encodec package ({error!r})") from error
    tokenizer.read_tensors(renamed, origin)
    return tokenizer.eval()


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of the config that shapes of tensors tell. Raises KeyError or IndexError if some are not there."""

    def kernels(pattern: str) -> list[torch.Size]:
        found = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(pattern + r"\.conv\.weight(_v)?", name)
            if match:
                found[int(match[1])] = tensor.shape
        return [found[index] for index in sorted(found)]

    encoder, decoder = kernels(r"encoder\.layers\.(\d+)"), kernels(r"decoder\.layers\.(\d+)")
    blocks = kernels(r"encoder\.layers\.(\d+)\.block\.1")
    ratios = [shape[2] // 2 for shape in decoder[1:-1]]
    size, dim = tensors["quantizer.layers.0.codebook.embed"].shape
    books = sum(name.endswith(".codebook.embed") for name in tensors)
    group_norm = "encoder.layers.0.norm.weight" in tensors
    rate = 48000 if group_norm else 24000
    bits = books * math.ceil(rate / math.prod(ratios)) * math.ceil(math.log2(size))
    total = bits / 1000 if 1000 * (bits / 1000) >= bits else math.nextafter(bits / 1000, math.inf)
    return {
        "sampling_rate": rate,
        "audio_channels": encoder[0][1],
        "normalize": group_norm,
        "chunk_length_s": 1.0 if group_norm else None,
        "overlap": 0.01 if group_norm else None,
        "target_bandwidths": [width for width in BANDWIDTHS[group_norm:] if width < total] + [total],
        "hidden_size": dim,
        "num_filters": encoder[0][0],
        "num_residual_layers": len(blocks) // len(ratios),
        "upsampling_ratios": ratios,
        "norm_type": "time_group_norm" if group_norm else "weight_norm",
        "kernel_size": encoder[0][2],
        "last_kernel_size": encoder[-1][2],
        "residual_kernel_size": blocks[0][2],
        "use_causal_conv": not group_norm,
        "compress": blocks[0][1] // blocks[0][0],
        "num_lstm_layers": sum(".lstm.weight_ih_l" in name for name in tensors) // 2,
        "codebook_size": size,
    }


def _stand_in() -> tuple[ModuleType, ModuleType]:
    """`torchaudio` and `torchaudio.transforms`, with no more than the package uses."""
    package, transforms = ModuleType("torchaudio"), ModuleType("torchaudio.transforms")
    transforms.Resample, transforms.Spectrogram = Resample, Spectrogram  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    return package, transforms


class Resample(nn.Module):
    """Audio `[..., samples]` from one rate to another (Hz), by soxr."""

    def __init__(self, orig_freq: int, new_freq: int) -> None:
        super().__init__()
        self.orig_freq, self.new_freq = orig_freq, new_freq

    def forward(self, audio: Tensor) -> Tensor:
        import soxr

        rows = audio.reshape(-1, audio.shape[-1]).T.cpu().numpy()
        resampled = torch.from_numpy(soxr.resample(rows, self.orig_freq, self.new_freq).T.copy())
        return resampled.reshape(*audio.shape[:-1], -1).to(audio)


class Spectrogram(nn.Module):
    """Complex spectrogram `[..., n_fft / 2 + 1, frames]` without padding, over the root of the window's energy."""

    def __init__(self, n_fft: int, hop_length: int, win_length: int, window_fn: Any, **fixed: Any) -> None:
        super().__init__()
        assert fixed == {"normalized": True, "center": False, "pad_mode": None, "power": None}, fixed
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.register_buffer("window", window_fn(win_length))

    def forward(self, audio: Tensor) -> Tensor:
        window: Any = self.window
        rows = torch.stft(
            audio.reshape(-1, audio.shape[-1]),
            self.n_fft,
            self.hop_length,
            self.win_length,
            window,
            center=False,
            return_complex=True,
        )
        return (rows / window.square().sum().sqrt()).reshape(*audio.shape[:-1], *rows.shape[1:])
