"""`PublishedAudio`: what the published audio codecs share: checks, batches of equal length, loading of weights.

Items of a batch are computed in groups of the same number of hops, each padded with silence to whole hops and nothing
more. So an item meets in a batch what it meets alone, whatever the codec does at its edges, and no time goes into
padding. This file knows no architecture.

Shapes: B items, S samples, N codes, K quantizers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.convs import fold_weight_norm
from anyglot_tokenizers.errors import CheckpointError, CodesError, MediaError
from anyglot_tokenizers.published import PublishedTokenizer, read_safetensors
from anyglot_tokenizers.tokenizer import CONFIG_FILE, check_media, full_precision


class PublishedAudio(PublishedTokenizer):
    """Mono audio float32 `[B, 1, samples]` to codes int64 `[B, K, ceil(samples / hop_length)]` and back.

    Subclasses set the attributes below and give `_encode` and `_decode`.

    Args:
        model: the entries of the publisher's config.json that shape the codec.
        license: of the weights.
        modality: name of the modality in the spec.
    """

    sample_rate: int
    hop_length: int
    num_quantizers: int
    codebook_size: int
    max_samples = 2**18
    """Samples that are computed at once, if the codec can: it bounds the memory."""

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", modality: str = "speech") -> None:
        super().__init__({"model": model, "license": license, "modality": modality})
        self.modality = modality

    @abstractmethod
    def _encode(self, x_BS: Tensor, num_quantizers: int) -> Tensor:
        """Codes `[B, k, N]` of N whole hops each."""

    @abstractmethod
    def _decode(self, codes_BKN: Tensor) -> Tensor:
        """Audio `[B, N * hop_length]`."""

    def _published_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The publisher's tensors under our names."""
        return fold_weight_norm(tensors)

    @classmethod
    def from_published(cls, folder: Path, entries: dict[str, Any], *, license: str) -> Self:
        """Read a folder in transformers' layout; see `PublishedTokenizer.from_published`."""
        try:
            with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
                tokenizer = cls(model=entries, license=license)
        except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: does not describe a {cls.__name__} ({error}); download it again"
            ) from error
        found = tokenizer._published_weights(read_safetensors(folder))
        wanted = tokenizer.state_dict()
        misfits = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
        if misfits or set(found) - set(wanted):
            raise CheckpointError(
                f"{folder}: weights do not fit {CONFIG_FILE}: missing or of another shape {misfits[:3]}, "
                f"unexpected {sorted(set(found) - set(wanted))[:3]}; download them again"
            )
        for name, tensor in found.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder}: {name} holds NaN or infinite values; download it again")
        tokenizer.to_empty(device="cpu").load_state_dict(found)
        return tokenizer

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: published codecs are not trained here."""
        return super().train(False)

    def _spec_entries(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "codebook_sizes": (self.codebook_size,) * self.num_quantizers,
            "axes": ("time",),
            "strides": (self.hop_length,),
            "sample_rate": self.sample_rate,
            "license": self.config["license"],
        }

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of audio; `lengths` are int64 `[B]` samples per item (None = all), the result's are codes per item.

        The last partial hop of an item is filled with silence. Raises MediaError for empty, non-finite or misshapen
        audio, CodesError for an impossible number of quantizers.
        """
        media = check_media("audio batch", media, "float32[batch, 1, samples]", 3, 1)
        lengths = _checked_lengths(media, lengths)
        used = self.num_quantizers if num_quantizers is None else num_quantizers
        if not 1 <= used <= self.num_quantizers:
            raise CodesError(f"num_quantizers {used} is outside 1..{self.num_quantizers}")
        counts = (lengths + self.hop_length - 1) // self.hop_length
        total = -(-media.shape[2] // self.hop_length)
        codes_BKN = torch.zeros(len(media), used, total, dtype=torch.int64, device=self.device)
        with full_precision(self.device):
            for rows, count in self._groups(counts):
                samples = count * self.hop_length
                x_BS = media[rows, 0, :samples]
                x_BS = x_BS * (torch.arange(x_BS.shape[1], device=x_BS.device) < lengths[rows, None].to(x_BS.device))
                x_BS = F.pad(x_BS, (0, samples - x_BS.shape[1])).to(self.device)
                codes_BKN[rows, :, :count] = self._encode(x_BS, used)
        return Codes(codes_BKN, counts.to(self.device), self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Audio float32 `[B, 1, N * hop_length]` of codes `[B, k, N]`, any k <= K.

        Silence beyond an item's length. Raises CodesError for codes that do not fit, FingerprintError for those of
        another tokenizer.
        """
        self._check_origin(codes)
        lengths = codes.lengths if isinstance(codes, Codes) else None
        codes_BKN = codes.codes if isinstance(codes, Codes) else codes
        self._check_codes(codes_BKN)
        batch, _, total = codes_BKN.shape
        counts = torch.full((batch,), total) if lengths is None else lengths.cpu()
        x_BS = torch.zeros(batch, total * self.hop_length, device=self.device)
        with full_precision(self.device):
            for rows, count in self._groups(counts):
                part_BKN = codes_BKN[rows, :, :count].to(self.device)
                x_BS[rows, : count * self.hop_length] = self._decode(part_BKN)
        return x_BS[:, None]

    def _groups(self, counts: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Rows of the batch with equally many codes, and how many; no more rows at once than memory is meant for."""
        for count in counts[counts > 0].unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            for part in rows.split(max(self.max_samples // (count * self.hop_length), 1)):
                yield part, count

    def _check_codes(self, codes_BKN: Tensor) -> None:
        if codes_BKN.ndim != 3 or not 1 <= codes_BKN.shape[1] <= self.num_quantizers or 0 in codes_BKN.shape:
            raise CodesError(
                f"codes of shape {list(codes_BKN.shape)} do not fit: "
                f"need [batch, 1..{self.num_quantizers} quantizers, time >= 1]"
            )
        if codes_BKN.dtype != torch.int64:
            raise CodesError(f"codes must be int64, got {codes_BKN.dtype}")
        low, high = (int(value) for value in torch.aminmax(codes_BKN))
        if low < 0 or high >= self.codebook_size:
            raise CodesError(
                f"code {low if low < 0 else high} is outside 0..{self.codebook_size - 1}; is this another tokenizer's?"
            )


def check_sizes(settings: Mapping[str, Any], **most: int) -> None:
    """Raises ValueError unless entries are whole numbers in 1..most (2**16 if not said), or lists of up to 16 such."""
    for name, value in settings.items():
        numbers, high = value if isinstance(value, list) else [value], most.get(name, 2**16)
        if not 1 <= len(numbers) <= 16 or not all(type(number) is int and 1 <= number <= high for number in numbers):
            raise ValueError(f"{name} must be whole numbers in 1..{high}, got {str(value)[:80]}")


def _checked_lengths(media: Tensor, lengths: Tensor | None) -> Tensor:
    batch, _, samples = media.shape
    if lengths is None:
        return torch.full((batch,), samples)
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise MediaError(
            "audio batch", f"lengths are {lengths.dtype}{list(lengths.shape)}", f"need int64[{batch}], in samples"
        )
    if int(lengths.min()) < 1 or int(lengths.max()) > samples:
        raise MediaError(
            "audio batch", f"lengths {lengths.tolist()[:8]} leave 1..{samples}", "drop empty items, in samples"
        )
    return lengths.cpu()
