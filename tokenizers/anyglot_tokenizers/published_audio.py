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

from anyglot_tokenizers.checks import check_audio, check_count
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.convs import fold_weight_norm
from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.published import PublishedTokenizer, fitted_weights, read_safetensors
from anyglot_tokenizers.tokenizer import CONFIG_FILE, full_precision


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
        """The publisher's tensors under our names. Raises what torch does where shapes do not fit."""
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
        tensors = read_safetensors(folder)
        try:
            found = tokenizer._published_weights(tensors)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: weights of shapes that do not fit ({error}); download them again"
            ) from error
        found = fitted_weights(found, tokenizer.state_dict(), folder)
        tokenizer.to_empty(device="cpu").load_state_dict(found)
        return tokenizer

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
        media, lengths = check_audio(media, lengths, 1)
        used = check_count(num_quantizers, self.num_quantizers)
        counts = (lengths.cpu() + self.hop_length - 1) // self.hop_length
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
        codes_BKN, counts = self._unpack(codes)
        batch, _, total = codes_BKN.shape
        x_BS = torch.zeros(batch, total * self.hop_length, device=self.device)
        with full_precision(self.device):
            for rows, count in self._groups(counts):
                x_BS[rows, : count * self.hop_length] = self._decode(codes_BKN[rows, :, :count])
        return x_BS[:, None]

    def _groups(self, counts: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Rows of the batch with equally many codes, and how many; no more rows at once than memory is meant for."""
        for count in counts[counts > 0].unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            for part in rows.split(max(self.max_samples // (count * self.hop_length), 1)):
                yield part, count


def check_sizes(settings: Mapping[str, Any], **most: int) -> None:
    """Raises ValueError unless entries are whole numbers in 1..most (2**16 if not said), or lists of up to 16 such."""
    for name, value in settings.items():
        numbers, high = value if isinstance(value, list) else [value], most.get(name, 2**16)
        if not 1 <= len(numbers) <= 16 or not all(type(number) is int and 1 <= number <= high for number in numbers):
            raise ValueError(f"{name} must be whole numbers in 1..{high}, got {str(value)[:80]}")
