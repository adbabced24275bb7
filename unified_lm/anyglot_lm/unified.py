"""`UnifiedModel`: a folder with a language model and its tokenizers, and what a user does with it.

    DIR/config.json  model.safetensors                  a plain Hugging Face causal language model
        vocabulary.json  template.json                  ids, layout of samples
        text.model  or  tokenizer.json                  text tokenizer: sentencepiece, or of a pretrained model
        tokenizers/<modality>/                          one tokenizer of anyglot_tokenizers per block

It loads and saves that folder, turns media into codes and back in batches, and answers samples with outputs.
Which ids are legal is `grammar.py`, how they are chosen `engine.py`; training is elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from anyglot_lm.engine import Guidance, Sampling, generate
from anyglot_lm.grammar import TEXT, Request, Span, SpanGrammar
from anyglot_lm.hf_text import EXPORTED_FOLDER, AnyText, HFTextTokenizer, load_text
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.text import TextTokenizer
from anyglot_lm.vocabulary import Block, Vocabulary
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, MediaError
from anyglot_tokenizers.media import read_audio, read_image
from anyglot_tokenizers.tokenizer import Tokenizer, load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

VOCABULARY_FILE = "vocabulary.json"
TEMPLATE_FILE = "template.json"
TOKENIZERS_FOLDER = "tokenizers"

MAX_TEXT = 256
"""Most text ids of an answer of `UnifiedModel.generate`, unless told otherwise."""

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


class UnifiedModel:
    """A language model with the vocabulary, the template and the tokenizers that it was trained with.

    Args:
        model: a causal language model with a row for each id.
        vocabulary: the manifest.
        template: how samples become prompts.
        text: the text tokenizer.
        tokenizers: media tokenizers by modality. Blocks without one can be written, but not decoded.
        where: names the origin in errors, for example the folder.

    Raises:
        FingerprintError: a tokenizer is not the one that the vocabulary was made for.
        CheckpointError: the model has fewer rows than the vocabulary has ids.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        template: Template,
        text: AnyText,
        tokenizers: Mapping[str, Tokenizer],
        *,
        where: str = "model",
    ) -> None:
        self.model, self.vocabulary, self.template, self.text = model, vocabulary, template, text
        self.tokenizers = dict(tokenizers)
        self.grammar = SpanGrammar(vocabulary)
        self._check(where)

    def _check(self, where: str) -> None:
        vocabulary = self.vocabulary
        rows = self.model.get_input_embeddings().weight.shape[0]
        if rows < vocabulary.size:
            raise CheckpointError(
                f"{where}: the model has {rows} rows, its {VOCABULARY_FILE} {vocabulary.size} ids; one of "
                "them is from another model, copy the whole folder again"
            )
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

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> UnifiedModel:
        """Reads a model folder. Weights are safetensors; code from the folder is never run.

        Args:
            directory: the folder.
            dtype: of the language model: float32, or bfloat16 for half the memory (an answer may then depend
                on the batch it is in). Tokenizers stay float32.
            device: where model and tokenizers go.

        Raises:
            CheckpointError: missing or unreadable weights.
            ManifestError: a broken vocabulary, template or text tokenizer.
            FingerprintError: a tokenizer is not the one that the vocabulary was made for.
        """
        from anyglot_lm.backbone import load_causal_lm

        folder = Path(directory)
        if not (folder / VOCABULARY_FILE).is_file():
            raise CheckpointError(f"{folder}: holds no {VOCABULARY_FILE}; give the folder of a unified model")
        vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
        template = Template.load(folder / TEMPLATE_FILE)
        text = load_text(folder)
        tokenizers = {}
        for block in vocabulary.blocks:
            path = folder / TOKENIZERS_FOLDER / block.modality
            if not path.is_dir():
                raise CheckpointError(f"{path}: no such folder; copy the whole model folder again")
            tokenizers[block.modality] = load(path).to(device)
        # PreTrainedModel.to is a decorated method, which type checkers lose
        model: Any = load_causal_lm(folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa")
        model = model.to(device)
        return cls(model, vocabulary, template, text, tokenizers, where=str(folder))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model folder; each file is complete before it takes its name.

        Tokenizers whose weights are exact in float16 are stored so.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            temporary = Path(name)
            was = self.model.config.use_cache
            self.model.config.use_cache = True
            try:
                self.model.save_pretrained(temporary)
            finally:
                self.model.config.use_cache = was
            self.vocabulary.save(temporary / VOCABULARY_FILE)
            self.template.save(temporary / TEMPLATE_FILE)
            self.text.save(temporary / self.text.file_name)
            for modality, tokenizer in self.tokenizers.items():
                place = temporary / TOKENIZERS_FOLDER / modality
                if tokenizer.save_pretrained(place, dtype=torch.float16) != tokenizer.fingerprint:
                    tokenizer.save_pretrained(place)  # half precision would make it another tokenizer
            for path in sorted(file for file in temporary.rglob("*") if file.is_file()):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        for kind in (TextTokenizer, HFTextTokenizer):  # of an earlier model in this folder
            if kind.file_name != self.text.file_name:
                (folder / kind.file_name).unlink(missing_ok=True)
        (folder / EXPORTED_FOLDER / HFTextTokenizer.file_name).unlink(missing_ok=True)

    @property
    def max_length(self) -> int:
        """Most ids of prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    # media <-> codes ----------------------------------------------------------------------------------------

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

    # answers ------------------------------------------------------------------------------------------------

    def respond(
        self,
        samples: Sequence[Sample],
        requests: Sequence[Request] | Request,
        sampling: Mapping[str, Sampling] | None = None,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 64,
        guidance: Mapping[str, float] | None = None,
        decode: bool = True,
    ) -> list[list[Output]]:
        """Answers each sample.

        Args:
            samples: what was said so far; segments of the assistant at the end are left out of the prompt.
            requests: what the answers may look like: one for each sample, or one for all.
            sampling: settings by modality, `"text"` included.
            seed: one for all, or one for each sample (see `engine.generate`).
            batch_size: answers in flight at once.
            guidance: scales of classifier-free guidance by modality; the unconditional prompt is the empty
                sample.
            decode: also turn codes into media.

        Returns:
            The spans of each answer.
        """
        prompts = [self.template.prompt(sample, self.vocabulary, self.text).tolist() for sample in samples]
        guide = None
        if guidance is not None:
            empty = self.template.prompt(Sample([]), self.vocabulary, self.text).tolist()
            guide = Guidance([empty] * len(prompts), guidance)
        answers = generate(
            self.model,
            self.vocabulary,
            prompts,
            requests,
            sampling,
            seed,
            batch_size=batch_size,
            guidance=guide,
        )
        outputs = [[self._output(span) for span in self.grammar.parse(ids)] for ids in answers]
        return self._with_media(outputs) if decode else outputs

    def _output(self, span: Span) -> Output:
        if span.modality == TEXT:
            known = [i for i in span.content if i < self.text.size]  # rows of a backbone may be padded
            return Output(TEXT, text=self.text.decode(known))
        return Output(span.modality, codes=torch.from_numpy(span.content))

    def _with_media(self, outputs: list[list[Output]]) -> list[list[Output]]:
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

    @overload
    def generate(self, to: str = ..., /, **options: Any) -> Output: ...
    @overload
    def generate(self, to: Sequence[str], /, **options: Any) -> list[Output]: ...

    def generate(
        self,
        to: str | Sequence[str] = TEXT,
        /,
        *,
        sampling: Mapping[str, Sampling] | Sampling | None = None,
        seed: int = 0,
        max_ids: int | None = None,
        guidance: Mapping[str, float] | None = None,
        **inputs: str | os.PathLike[str] | Tensor,
    ) -> Output | list[Output]:
        """One answer to one prompt: `model.generate("image", text="a red circle").media`.

        Args:
            to: modality of the answer, or several in order.
            sampling: settings for all modalities, or by modality.
            seed: of the answer.
            max_ids: most ids of the answer; by default what the model has room for, text no more than
                `MAX_TEXT`.
            guidance: scales of classifier-free guidance by modality.
            **inputs: what the user says, in the order of the arguments: `text="..."`, and for any modality of
                the model a tensor (as for `encode_media`), integer codes `[K, *grid]`, or a file.

        Returns:
            One output, or a list of them if `to` is a sequence.
        """
        order = (to,) if isinstance(to, str) else tuple(to)
        sample = Sample([self._segment(name, value) for name, value in inputs.items()])
        prompt = self.template.prompt(sample, self.vocabulary, self.text)
        room = self.max_length - len(prompt) if max_ids is None else max_ids
        request = Request(
            order=order,
            max_ids=room,
            max_length={TEXT: min(MAX_TEXT, max(room, 1))} if max_ids is None else {},
        )
        settings = (
            dict.fromkeys({TEXT, *self.vocabulary.modalities}, sampling) if isinstance(sampling, Sampling) else sampling
        )
        answer = self.respond([sample], request, settings, seed, guidance=guidance)[0]
        return answer[0] if isinstance(to, str) else answer

    def _segment(self, modality: str, value: Any) -> Segment:
        """What the user says in one modality: text, media, codes, or a file of media."""
        if modality == TEXT:
            return Segment(TEXT, str(value), "user")
        if isinstance(value, str | os.PathLike):
            value = self.read_media(modality, value)
        value = torch.as_tensor(value)
        if not value.is_floating_point():
            return Segment(modality, value.cpu().numpy(), "user")
        return Segment(modality, self.encode_media(modality, [value])[0].numpy(), "user")

    def read_media(self, modality: str, path: str | os.PathLike[str]) -> Tensor:
        """A file as the modality's tokenizer takes it: size, rate and channels fitted."""
        spec, block = self._tokenizer(modality).spec, self.vocabulary.block(modality)
        if spec.sample_rate is not None:
            return read_audio(path, sample_rate=spec.sample_rate, channels=spec.channels)
        return read_image(path, size=_image_size(block, spec.strides, path))


def _image_size(block: Block, strides: tuple[int | None, ...], path: str | os.PathLike[str]) -> int | None:
    """Pixels per side where the vocabulary fixes a square grid, else None (the file's own size)."""
    if block.grid is None or len(block.grid) != len(strides):
        return None
    sides = {cells * stride for cells, stride in zip(block.grid, strides, strict=True) if stride}
    if not sides:
        return None
    if len(sides) > 1:
        raise MediaError(
            path, f"the model takes images of {block.grid} codes", "crop the image and pass it as a tensor"
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
