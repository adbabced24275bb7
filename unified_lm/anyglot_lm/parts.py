"""The parts of a model folder beside the language model, and what they do: media to codes, answers to media.

`UnifiedModel` adds the language model and answers; `processor.AnyglotProcessor` serves one that runs elsewhere. This
file makes no ids (`vocabulary.py`, `segments.py`) and reads no language model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anyglot_lm.adapter import read_settings, text_of
from anyglot_lm.grammar import TEXT, Request, RequestError, Span, SpanGrammar
from anyglot_lm.hf_text import AnyText, load_text
from anyglot_lm.segments import Role, Segment, Template
from anyglot_lm.vocabulary import Block, Vocabulary
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, MediaError
from anyglot_tokenizers.media import MediaBytes, read_audio, read_image
from anyglot_tokenizers.tokenizer import Tokenizer, load

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_FILE = "vocabulary.json"
TEMPLATE_FILE = "template.json"
TOKENIZERS_FOLDER = "tokenizers"

MEDIA_BATCH = 32
"""Items per call of a media tokenizer."""


@dataclass(frozen=True, eq=False)
class Output:
    """One span of an answer.

    Attributes:
        modality: `"text"` or a modality of the vocabulary.
        text: the text of a text span, else None.
        codes: int64 `[K, *grid]` of a media span, else None.
        media: float32 without a batch axis (image `[3, H, W]` in [0, 1]; audio `[C, samples]`), else None;
            also None where decoding was not asked for.
    """

    modality: str
    text: str | None = None
    codes: Tensor | None = None
    media: Tensor | None = None

    @property
    def content(self) -> str | Tensor | None:
        """The text of a text span, the media of any other."""
        return self.text if self.modality == TEXT else self.media


class Parts:
    """Vocabulary, template, text tokenizer and media tokenizers that were trained together.

    Args:
        vocabulary: the manifest.
        template: how samples become prompts.
        text: the text tokenizer.
        tokenizers: media tokenizers by modality. Blocks without one can be written, but not decoded.
        where: names the origin in errors, for example the folder.

    Raises:
        FingerprintError: a tokenizer is not the one that the vocabulary was made for.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: Template,
        text: AnyText,
        tokenizers: Mapping[str, Tokenizer],
        *,
        where: str = "model",
    ) -> None:
        self.vocabulary, self.template, self.text = vocabulary, template, text
        self.tokenizers = dict(tokenizers)
        self.grammar = SpanGrammar(vocabulary)
        if vocabulary.text_fingerprint not in ("", self.text.fingerprint):
            raise FingerprintError(
                f"{where}/{self.text.file_name} has fingerprint {self.text.fingerprint[:12]}, but "
                f"{VOCABULARY_FILE} was made for {vocabulary.text_fingerprint[:12]}; put the text "
                "tokenizer of the training back"
            )
        for modality, tokenizer in self.tokenizers.items():
            block = vocabulary.block(modality)
            if tokenizer.fingerprint != block.fingerprint:
                raise FingerprintError(
                    f"{where}/{TOKENIZERS_FOLDER}/{modality} has fingerprint {tokenizer.fingerprint[:12]}, "
                    f"but {VOCABULARY_FILE} was made for {block.fingerprint[:12]}; put the tokenizer of the "
                    "training back, or prepare the data and train again with this one"
                )

    def check_request(self, request: Request) -> None:
        """Raises `RequestError` for two texts in a row where the template cannot tell them apart."""
        order = request.order or ()
        if (TEXT, TEXT) in pairwise(order) and not self.template.tells_texts_apart:
            raise RequestError(
                f"order has two texts in a row, which template {self.template.name} version {self.template.version} of "
                "this model writes as one; name it once, or train a model with version 2 (anyglot train nano_chat)"
            )

    def encode_media(self, modality: str, media: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Codes int64 `[K, *grid]` of each item, with the quantizers that the language model uses.

        Args:
            modality: of all items.
            media: images float32 `[3, H, W]` in [0, 1]; audio float32 `[C, samples]` or `[samples]` at the
                tokenizer's rate. A batch tensor, or a list of items of any lengths.
        """
        tokenizer, block = self._tokenizer(modality), self.vocabulary.block(modality)
        timed = tokenizer.spec.axes == ("time",)
        items = [item[None] if timed and item.ndim == 1 else item for item in media]
        found: list[Tensor] = [torch.empty(0)] * len(items)
        for group in _batches([tuple(item.shape) for item in items], timed):
            if timed:
                lengths = torch.tensor([items[i].shape[-1] for i in group])
                batch = torch.zeros(len(group), items[group[0]].shape[0], int(lengths.max()))
                for row, i in enumerate(group):
                    batch[row, :, : lengths[row]] = items[i]
                codes = tokenizer.encode(batch, lengths, num_quantizers=block.num_quantizers)
            else:
                batch = torch.stack([items[i] for i in group])
                codes = tokenizer.encode(batch, num_quantizers=block.num_quantizers)
            for row, i in enumerate(group):
                found[i] = codes.item(row).cpu()
        return found

    def decode_media(self, modality: str, codes: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
        """Media of each item, on the CPU: inverse of `encode_media`, up to the tokenizer's loss.

        Args:
            modality: of all items.
            codes: int64 `[k, *grid]` for each item, of the first `k` quantizers.
        """
        tokenizer = self._tokenizer(modality)
        spec = tokenizer.spec
        timed = spec.axes == ("time",)
        items = [torch.as_tensor(item, dtype=torch.int64) for item in codes]
        found: list[Tensor] = [torch.empty(0)] * len(items)
        for group in _batches([tuple(item.shape) for item in items], timed):
            if timed:
                lengths = torch.tensor([items[i].shape[-1] for i in group])
                batch = torch.zeros(len(group), items[group[0]].shape[0], int(lengths.max()), dtype=torch.int64)
                for row, i in enumerate(group):
                    batch[row, :, : lengths[row]] = items[i]
                media = _decode(tokenizer, Codes(batch, lengths, spec))
                for row, i in enumerate(group):
                    found[i] = media[row, ..., : int(lengths[row]) * spec.hop_length]
            else:
                media = _decode(tokenizer, Codes(torch.stack([items[i] for i in group]), None, spec))
                for row, i in enumerate(group):
                    found[i] = media[row]
        return found

    def _tokenizer(self, modality: str) -> Tokenizer:
        self.vocabulary.block(modality)
        if modality not in self.tokenizers:
            raise AnyglotError(f"this model was made without a tokenizer for {modality!r}; pass it to UnifiedModel")
        return self.tokenizers[modality]

    def segment(self, modality: str, value: Any, role: Role = "user") -> Segment:
        """What somebody says in one modality: text, media, codes, or a file of media."""
        if modality == TEXT:
            return Segment(TEXT, str(value), role)
        if isinstance(value, str | os.PathLike | MediaBytes):
            value = self.read_media(modality, value)
        value = torch.as_tensor(value)
        if not value.is_floating_point():
            return Segment(modality, value.cpu().numpy(), role)
        return Segment(modality, self.encode_media(modality, [value])[0].numpy(), role)

    def read_media(
        self,
        modality: str,
        path: str | os.PathLike[str] | MediaBytes,
        *,
        max_seconds: float = 600.0,
        max_pixels: int = 64_000_000,
    ) -> Tensor:
        """A file, or its bytes, as the modality's tokenizer takes it: size, rate and channels fitted.

        Raises MediaError for what is no sound or picture, or larger than the limits.
        """
        spec = self._tokenizer(modality).spec
        if spec.sample_rate is not None:
            return read_audio(path, sample_rate=spec.sample_rate, channels=spec.channels, max_seconds=max_seconds)
        return read_image(path, size=self.image_size(modality), max_pixels=max_pixels)

    def image_size(self, modality: str) -> int | None:
        """Pixels per side where the vocabulary fixes a square grid, else None (any size)."""
        return _image_size(self.vocabulary.block(modality), self._tokenizer(modality).spec.strides, modality)

    def output(self, span: Span, media: Tensor | None = None) -> Output:
        """A span of an answer as the user gets it."""
        if span.modality == TEXT:
            known = [i for i in span.content if i < self.text.size]  # rows of a backbone may be padded
            return Output(TEXT, text=self.text.decode(known))
        return Output(span.modality, codes=torch.from_numpy(span.content), media=media)

    def with_media(self, outputs: list[list[Output]]) -> list[list[Output]]:
        """The same outputs with their media, decoded in batches across answers."""
        places: dict[str, list[tuple[int, int]]] = {}
        for i, answer in enumerate(outputs):
            for j, output in enumerate(answer):
                if output.modality != TEXT:
                    places.setdefault(output.modality, []).append((i, j))
        for modality, where in places.items():
            media = self.decode_media(modality, [_codes(outputs[i][j]) for i, j in where])
            for (i, j), item in zip(where, media, strict=True):
                outputs[i][j] = replace(outputs[i][j], media=item)
        return outputs


def read_parts(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[Vocabulary, Template, AnyText, dict[str, Tokenizer]]:
    """What `Parts` is made of, from a model folder or that of an adapter (`adapter.py`).

    Args:
        directory: the folder.
        device: where the media tokenizers go.

    Raises:
        CheckpointError: missing or unreadable weights.
        ManifestError: a broken vocabulary, template or text tokenizer.
    """
    folder = Path(directory)
    if not (folder / VOCABULARY_FILE).is_file():
        raise CheckpointError(f"{folder}: holds no {VOCABULARY_FILE}; give the folder of a unified model")
    vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
    template = Template.load(folder / TEMPLATE_FILE)
    adapter = read_settings(folder)
    text = load_text(folder) if adapter is None else text_of(adapter)
    place = folder / ((adapter or {}).get("tokenizers") or TOKENIZERS_FOLDER)
    tokenizers = {}
    for block in vocabulary.blocks:
        path = place / block.modality
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; copy the whole model folder again")
        tokenizers[block.modality] = load(path).to(device)
    return vocabulary, template, text, tokenizers


def _image_size(block: Block, strides: tuple[int | None, ...], modality: str) -> int | None:
    """Pixels per side where the vocabulary fixes a square grid, else None (the file's own size)."""
    if block.grid is None or len(block.grid) != len(strides):
        return None
    sides = {cells * stride for cells, stride in zip(block.grid, strides, strict=True) if stride}
    if not sides:
        return None
    if len(sides) > 1:
        raise MediaError(
            modality, f"the model takes images of {block.grid} codes", "crop the image and pass it as a tensor"
        )
    return sides.pop()


def _codes(output: Output) -> Tensor:
    assert output.codes is not None
    return output.codes


@torch.inference_mode()
def _decode(tokenizer: Tokenizer, codes: Codes) -> Tensor:
    return tokenizer.decode(codes).cpu()


def _batches(shapes: list[tuple[int, ...]], timed: bool) -> Iterable[list[int]]:
    """Items that go through a tokenizer at once: of like length if it pads (`timed`), else of equal shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(shapes)), key=lambda i: (shapes[i], i)):
        groups.setdefault(shapes[i][:-1] if timed else shapes[i], []).append(i)
    for group in groups.values():
        for start in range(0, len(group), MEDIA_BATCH):
            yield group[start : start + MEDIA_BATCH]
