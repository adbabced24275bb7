"""`AnyglotProcessor`: media and text in, ids out, and back, for a language model that runs in transformers or vLLM.

    model, processor = AutoModelForCausalLM.from_pretrained(folder), AnyglotProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "path": "cat.png"}]}])
    grammar = SpanLogitsProcessor(processor.vocabulary, Request(order=("text",)))
    ids = model.generate(**inputs, logits_processor=[grammar], max_new_tokens=grammar.max_new_tokens)
    processor.post_process_multimodal_output(ids, generation_mode="text")

Its methods are those of the processors of transformers 5 (Emu3, Janus). It is no `ProcessorMixin`: that class writes
placeholders into a string and tokenizes it with special tokens on, while here every part becomes ids on its own, so
that no text of a user becomes a control or a code. It reads no language model, and fetches nothing from the network.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anyglot_lm.grammar import TEXT
from anyglot_lm.parts import Output, Parts, read_parts
from anyglot_lm.patterns import Int64
from anyglot_lm.segments import Sample, Segment
from anyglot_tokenizers.errors import AnyglotError, CodesError
from anyglot_tokenizers.media import MediaBytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature


class ConversationError(AnyglotError):
    """A conversation that is not one: a part of unknown type, without content, or for several modalities."""


class AnyglotProcessor(Parts):
    """The parts of an exported folder (or of any model folder) around a language model.

    Arguments are those of `Parts`; `from_pretrained` is the usual way.
    """

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> AnyglotProcessor:
        """Reads a folder; media tokenizers go to `device`.

        Raises:
            CheckpointError: missing or unreadable weights.
            ManifestError: a broken vocabulary, template or text tokenizer.
            FingerprintError: a tokenizer is not the one that the vocabulary was made for.
        """
        return cls(*read_parts(directory, device=device), where=str(Path(directory)))

    # in -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        audio: Any = None,
        *,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prompts of one turn each: first the images, then the sounds, then the text.

        Args:
            text: one, or one for each prompt.
            images: one or a list of them (as in `apply_chat_template`); for several texts one entry for each.
            audio: likewise.
            return_tensors: "pt" is all there is.

        Returns:
            As `apply_chat_template`.
        """
        single = text is None or isinstance(text, str)
        texts: list[Any] = [text] if single else list(text or ())
        contents: list[list[dict[str, Any]]] = [[] for _ in texts]
        for kind, given in (("image", images), ("audio", audio), (TEXT, texts)):
            column = [given] if single and kind != TEXT else [None] * len(texts) if given is None else given
            if not texts or len(column) != len(texts):
                raise ConversationError(
                    f"{len(column)} of {kind} for {len(texts)} texts; give one text at least, and one entry (or None) "
                    "for each"
                )
            for content, entry in zip(contents, column, strict=True):
                many = entry if isinstance(entry, list | tuple) else [] if entry is None else [entry]
                content += [{"type": kind, kind: value} for value in many]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        found: BatchFeature = self.apply_chat_template(conversations, return_tensors=return_tensors)
        return found

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> Any:
        """Conversations as ids, in the layout of the training.

        A conversation is a list of messages `{"role": "user" | "assistant", "content": TEXT or parts}`. A part is
        `{"type": "text", "text": ...}`, or media: its type is `"image"`, `"audio"` (if the model has one kind of sound
        only) or a modality of the model, and beside it stands, under the name of the type or as `"path"`, a file, its
        bytes, a PIL image, floats as `encode_media` takes them (a sound also at another `"sampling_rate"`; a file says
        its own), or integer codes. Files are read wherever they are: check the paths in what strangers send.

        Args:
            conversation: one, or a list of them.
            add_generation_prompt: end with the marker of the assistant's turn, see `Template.prompt` (the default,
                unless a message is continued); else the document ends with eos, see `Template.render`.
            continue_final_message: end with the last message, so that it can go on.
            tokenize: there are no strings of media, so this must be true.
            return_dict: false gives `input_ids` alone.
            return_tensors: "pt" is all there is.

        Returns:
            `input_ids` int64 `[B, T]`, padded on the left, and `attention_mask` int64 `[B, T]`.

        Raises:
            ConversationError: a part that cannot be read.
            ManifestError: an unknown role.
        """
        from transformers import BatchFeature

        if not tokenize or return_tensors != "pt":
            raise ConversationError("this processor gives tensors of ids; use tokenize=True and return_tensors='pt'")
        if add_generation_prompt and continue_final_message:
            raise ConversationError("either add_generation_prompt, or continue_final_message")
        prompt = add_generation_prompt is not False and not continue_final_message
        batch = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
        rows = [self._row(messages, prompt, continue_final_message) for messages in batch]
        ids_BT = torch.full((len(rows), max(map(len, rows))), self.vocabulary.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            ids_BT[i, ids_BT.shape[1] - len(row) :] = torch.from_numpy(row)
            mask_BT[i, ids_BT.shape[1] - len(row) :] = 1
        return BatchFeature({"input_ids": ids_BT, "attention_mask": mask_BT}) if return_dict else ids_BT

    def _row(self, messages: Sequence[Mapping[str, Any]], prompt: bool, cut: bool) -> Int64:
        segments: list[Segment] = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise ConversationError(f"a message is {message!r}; give an object with role and content")
            content = message.get("content")
            parts = [{"type": TEXT, TEXT: content}] if isinstance(content, str) else content
            if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
                raise ConversationError(f"content of a message is {content!r}; give a text or a list of parts")
            segments += [self._part(part, message.get("role")) for part in parts]
        sample = Sample(segments)
        if prompt:
            return self.template.prompt(sample, self.vocabulary, self.text)
        ids, _ = self.template.render(sample, self.vocabulary, self.text)
        return ids[:-1] if cut else ids

    def _part(self, part: Mapping[str, Any], role: Any) -> Segment:
        kind = part.get("type")
        modalities = self._modalities(kind)
        if len(modalities) > 1:
            raise ConversationError(f"{kind} may be {' or '.join(modalities)} here; name it, as 'type': 'NAME'")
        if kind == TEXT:
            if not isinstance(part.get(TEXT), str):
                raise ConversationError(f"a text is {part.get(TEXT)!r}; give a string")
            return self.segment(TEXT, part[TEXT], role)
        value = next((part[key] for key in (str(kind), "path", "url") if part.get(key) is not None), None)
        if value is None:
            raise ConversationError(f"a part of type {kind!r} holds nothing under {kind!r} or 'path'")
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            raise ConversationError(f"{value}: is not fetched; download it and give the file")
        if isinstance(value, bytes):
            value = MediaBytes(f"{kind} of {len(value)} bytes", value)
        elif hasattr(value, "getbands"):
            value = _file(value)
        elif part.get("sampling_rate") is not None and not isinstance(value, str | os.PathLike):
            value = _wav(value, part["sampling_rate"])
        return self.segment(modalities[0], value, role)

    def _modalities(self, kind: Any) -> list[str]:
        """What a type of part may stand for: itself, or all modalities of that kind of media."""
        if kind == TEXT or kind in self.vocabulary.modalities:
            return [kind]
        specs = {name: tokenizer.spec for name, tokenizer in self.tokenizers.items()}
        kinds = {
            "image": [name for name, spec in specs.items() if spec.axes != ("time",)],
            "audio": [name for name, spec in specs.items() if spec.sample_rate is not None],
        }
        if not kinds.get(kind):
            more = [name for name, names in kinds.items() if names and name not in specs]
            known = ", ".join([TEXT, *self.vocabulary.modalities, *more])
            raise ConversationError(f"a part of type {kind!r}; this model has {known}")
        return kinds[kind]

    # out ----------------------------------------------------------------------------------------------------

    def parse(self, generated: Any, *, decode: bool = True) -> list[list[Output]]:
        """The spans of each answer.

        Args:
            generated: ids int `[B, T]` or `[T]`, or a list of lists; with the prompt or without, with padding or not.
            decode: also turn codes into media.

        Raises:
            GrammarError, CodesError: an answer that was cut, or written without a `SpanLogitsProcessor`.
        """
        rows = generated.tolist() if hasattr(generated, "tolist") else list(generated)
        rows = [rows] if rows and isinstance(rows[0], int) else rows
        outputs = [[self.output(span) for span in self.grammar.parse(self._answer(row))] for row in rows]
        return self.with_media(outputs) if decode else outputs

    def _answer(self, row: Sequence[int]) -> list[int]:
        """The ids behind the marker that begins the assistant's last turn, up to eos."""
        ids, controls = list(row), self.vocabulary.controls
        begun = max((i for i, token in enumerate(ids) if token in (controls["bos"], controls["user"])), default=None)
        if begun is not None and controls["assistant"] in ids[begun:]:  # a later one stands between texts of an answer
            ids = ids[ids.index(controls["assistant"], begun) + 1 :]
        if controls["eos"] in ids:
            return ids[: ids.index(controls["eos"]) + 1]
        while ids and ids[-1] == controls["pad"]:
            ids.pop()
        return ids

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
    ) -> list[Any]:
        """One result for each row, named as in transformers.

        Args:
            generated_outputs: as for `parse`, which gives all spans.
            skip_special_tokens: must be true: spans hold none.
            generation_mode: `"text"` (the default): all text of the answer. `"image"`: its first picture, a PIL image.
                `"audio"`: its first sound, float32 `[channels, samples]`; or a modality of the model.

        Raises:
            CodesError: an answer without a span of that kind.
        """
        mode = generation_mode or TEXT
        if not skip_special_tokens:
            raise ConversationError("skip_special_tokens=False: spans hold no special tokens; leave it out")
        wanted = self._modalities(mode)
        answers = self.parse(generated_outputs, decode=False)
        if mode == TEXT:
            return ["".join(output.text or "" for output in answer) for answer in answers]
        chosen = []
        for row, answer in enumerate(answers):
            found = [output for output in answer if output.modality in wanted]
            if not found:
                said = ", ".join(output.modality for output in answer) or "nothing"
                raise CodesError(f"answer {row} holds no {mode}, but {said}; ask for it with Request(order=...)")
            chosen.append(found[:1])
        results: list[Any] = []
        for [output] in self.with_media(chosen):
            assert output.media is not None
            timed = self.tokenizers[output.modality].spec.axes == ("time",)
            results.append(output.media.numpy() if timed else _pil(output.media))
        return results


def _file(image: Image) -> MediaBytes:
    """A PIL image as a file, as it would be read from one: upright, with its transparency and its depth."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
    elif upright.mode not in ("L", "RGB", "I", "I;16", "F"):
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, format="TIFF")
    return MediaBytes(f"PIL image of {image.width}x{image.height}", file.getvalue())


def _wav(samples: Any, rate: Any) -> MediaBytes:
    """Floats `[samples]` or `[channels, samples]` as a file, which keeps every bit; reading it resamples."""
    import soundfile

    if not isinstance(rate, int | float | np.integer) or not 1 <= rate < 2**31:
        raise ConversationError(f"sampling_rate is {rate!r}; give samples a second")
    samples_CS = np.atleast_2d(np.asarray(samples))
    if not np.issubdtype(samples_CS.dtype, np.floating):
        raise ConversationError(f"samples at a sampling_rate are {samples_CS.dtype}; give floats in [-1, 1]")
    file = io.BytesIO()
    soundfile.write(file, samples_CS.T.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return MediaBytes(f"sound of {samples_CS.shape[1]} samples", file.getvalue())


def _pil(image_CHW: Tensor) -> Image:
    from PIL import Image

    return Image.fromarray((image_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
