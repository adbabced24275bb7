"""`UnifiedModel`: a folder with a language model and its tokenizers, and what a user does with it.

    DIR/config.json  model.safetensors                  a plain Hugging Face causal language model
        vocabulary.json  template.json                  ids, layout of samples
        text.model  or  tokenizer.json                  text tokenizer: sentencepiece, or of a pretrained model
        tokenizers/<modality>/                          one tokenizer of anyglot_tokenizers per block

It loads and saves that folder, and answers samples with outputs. What does not need the language model is `parts.py`,
which ids are legal `grammar.py`, how they are chosen `engine.py`; training is elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from anyglot_lm.adapter import load_adapted, read_settings
from anyglot_lm.decoder import window_of
from anyglot_lm.engine import Engine, GenerationError, Guidance, Sampling, generate, row_seeds
from anyglot_lm.grammar import TEXT, Request
from anyglot_lm.hf_text import EXPORTED_FOLDER, AnyText, HFTextTokenizer
from anyglot_lm.parts import TEMPLATE_FILE, TOKENIZERS_FOLDER, VOCABULARY_FILE, Parts, read_parts
from anyglot_lm.parts import Output as Output
from anyglot_lm.segments import Role, Sample, Segment, Template, with_examples
from anyglot_lm.text import TextTokenizer
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from anyglot_lm.stream import Event

MAX_TEXT = 256
"""Most text ids of a text span of an answer of `UnifiedModel.generate`, unless told otherwise."""

Given = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""What one side says: modality -> content, or pairs of them where a modality comes twice; see `Parts.segment`."""


class UnifiedModel(Parts):
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
        super().__init__(vocabulary, template, text, tokenizers, where=where)
        self.model = model
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < vocabulary.size:
            raise CheckpointError(
                f"{where}: the model has {rows} rows, its {VOCABULARY_FILE} {vocabulary.size} ids; one of "
                "them is from another model, copy the whole folder again"
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> UnifiedModel:
        """Reads a model folder, or that of an adapter (`adapter.py`) with the backbone that it names. Weights are
        safetensors; code from the folder is never run.

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
        parts = read_parts(folder, device=device)
        # PreTrainedModel.to is a decorated method, which type checkers lose
        model: Any
        if adapter := read_settings(folder):
            model = load_adapted(folder, adapter, parts[0], dtype=dtype)
        else:
            model = load_causal_lm(folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa")
        model = model.to(device)
        return cls(model, *parts, where=str(folder))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model folder; each file is complete before it takes its name.

        Tokenizers whose weights are exact in float16 are stored so.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            temporary = Path(name)
            self.model.save_pretrained(temporary)
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
        """Most ids of prompt and answer together: the engine keeps to the window of a model that has one."""
        config = self.model.config
        return int(min(config.max_position_embeddings, window_of(config) or config.max_position_embeddings))

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
        for request in [requests] if isinstance(requests, Request) else requests:
            self.check_request(request)
        prompts = [self.prompt(sample) for sample in samples]
        guide = None
        if guidance is not None:
            guide = Guidance([self.prompt(Sample([]))] * len(prompts), guidance)
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
        outputs = [[self.output(span) for span in self.grammar.parse(ids)] for ids in answers]
        return self.with_media(outputs) if decode else outputs

    def stream(
        self,
        sample: Sample,
        request: Request,
        sampling: Mapping[str, Sampling] | None = None,
        seed: int = 0,
        *,
        guidance: Mapping[str, float] | None = None,
        chunk_seconds: float = 0.5,
        previews: bool = False,
    ) -> Iterator[Event]:
        """The answer to one sample while it is written. Puts the language model into evaluation mode.

        Args:
            sample, request, sampling, seed, guidance: as for `respond`.
            chunk_seconds, previews: see `stream.AnswerReader`.
        """
        from anyglot_lm.stream import AnswerReader, follow

        self.check_request(request)
        prompts = [self.prompt(sample)] + ([] if guidance is None else [self.prompt(Sample([]))])
        capacity = max(map(len, prompts)) + self.grammar.longest(request)
        engine = Engine(self.model, self.vocabulary, streams=len(prompts), capacity=capacity)
        row = engine.submit(
            prompts[0],
            request,
            sampling=sampling,
            seed=row_seeds(seed, 1)[0],
            unconditional=prompts[1] if guidance is not None else None,
            scales=guidance,
        )
        yield from follow(engine, row, AnswerReader(self, chunk_seconds=chunk_seconds, previews=previews))

    def prompt(self, sample: Sample) -> list[int]:
        """The ids that an answer to `sample` continues."""
        ids: list[int] = self.template.prompt(sample, self.vocabulary, self.text).tolist()
        return ids

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
        examples: Sequence[tuple[Given, Given]] = (),
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
            examples: what the user gave and what the answer was, in earlier turns of the conversation; for instance
                `[({"image": "a.png"}, {"text": "red"}), ({"image": "b.png"}, {"text": "blue"})]`.
            **inputs: what the user says, in the order of the arguments: `text="..."`, and for any modality of
                the model a tensor (as for `encode_media`), integer codes `[K, *grid]`, or a file.

        Returns:
            One output, or a list of them if `to` is a sequence.

        Raises:
            GenerationError: prompt and answer are longer than the model.
        """
        order = (to,) if isinstance(to, str) else tuple(to)
        query = Sample(self._said(inputs, "user"))
        shots = [Sample(self._said(given, "user") + self._said(answer, "assistant")) for given, answer in examples]
        sample = with_examples(shots, query)
        prompt = self.prompt(sample)
        needed = self.grammar.shortest(Request(order=order))
        if max_ids is None and len(prompt) + needed > self.max_length:
            shown = len(prompt) - len(self.prompt(query))
            raise GenerationError(
                f"the prompt has {len(prompt)} ids ({shown} of them {len(shots)} examples) and "
                f"{' + '.join(order)} at least {needed}, but the model has {self.max_length} positions; give "
                f"{'fewer examples' if shots else 'less'}"
            )
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

    def _said(self, given: Given, role: Role) -> list[Segment]:
        pairs = given.items() if isinstance(given, Mapping) else given
        return [self.segment(modality, content, role) for modality, content in pairs]
