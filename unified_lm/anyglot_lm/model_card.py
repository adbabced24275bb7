"""The model card of an exported folder: front matter of the hub, the id layout, licences, and how to load it.

Text only: it reads a model's manifest and specs, and knows no scores.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyglot_lm.unified import UnifiedModel
    from anyglot_lm.vocabulary import Vocabulary

_CARD = """\
---
{front}
---

# {title}

One causal language model ({architecture}, {parameters} parameters, {dtype}) that reads and writes {media}. Media are
discrete codes of the tokenizers in `tokenizers/`; `vocabulary.json` says which ids they have. Made with
Anyglot. FOLDER below is this one.

## Use

With Anyglot:

```python
from anyglot_lm.unified import UnifiedModel

model = UnifiedModel.from_pretrained("FOLDER")
print(model.generate({first}))
```

With transformers; Anyglot makes the ids, keeps them legal and turns them into media:

```python
from transformers import AutoModelForCausalLM
from anyglot_lm.grammar import Request
from anyglot_lm.hf_processor import SpanLogitsProcessor
from anyglot_lm.processor import AnyglotProcessor

model, processor = AutoModelForCausalLM.from_pretrained("FOLDER"), AnyglotProcessor.from_pretrained("FOLDER")
inputs = processor.apply_chat_template([{{"role": "user", "content": "{prompt}"}}])
grammar = SpanLogitsProcessor(processor.vocabulary, Request(order=("{last}",)))
ids = model.generate(**inputs, logits_processor=[grammar], max_new_tokens=grammar.max_new_tokens)
print(processor.parse(ids)[0])
```

With vLLM 0.33, as ids (`anyglot_lm.vllm_processor` says how requests are written):

```bash
vllm serve FOLDER --logits-processors anyglot_lm.vllm_processor:V2SpanProcessor{vllm_flags}
```

{text}

## Ids

| ids | number | what |
|---|---|---|
{ids}

## Media tokenizers

| modality | tokenizer | codebooks | order | span | license | fingerprint |
|---|---|---|---|---|---|---|
{tokenizers}

Template `{template}` version {template_version}, vocabulary `{fingerprint}`.
"""

_WITH_TOKENIZER = """\
`AutoTokenizer` reads the text tokenizer. Its chat template writes turns of one text each, as in training; the markers
of its control tokens are refused in a text, while every other text is just text."""

_WITHOUT = """\
There is no `AutoTokenizer`: the text tokenizer (`{file}`) has no form in transformers that gives the same ids for every
text. `AnyglotProcessor` makes the ids."""


def model_card(model: UnifiedModel, *, dtype: str, license: str, base_model: str | None, auto_tokenizer: bool) -> str:
    """README.md of an export.

    Args:
        model: what is exported.
        dtype: of its weights.
        license: of the language model, as the hub names it.
        base_model: hub name of what training started from, if known.
        auto_tokenizer: whether transformers reads the text tokenizer.
    """
    vocabulary = model.vocabulary
    front = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        **({"base_model": base_model} if base_model else {}),
        "tags": ["anyglot", *vocabulary.modalities],
    }
    names = ("text", *vocabulary.modalities)
    prompt = "a red circle"
    text = _WITH_TOKENIZER if auto_tokenizer else _WITHOUT.format(file=model.text.file_name)
    return _CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        title=f"{(base_model or 'Anyglot').rpartition('/')[2]} with {', '.join(vocabulary.modalities) or 'text'}",
        architecture=type(model.model).__name__,
        parameters=f"{sum(p.numel() for p in model.model.parameters()):,}",
        dtype=dtype,
        media=" and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "text",
        first=f'"{names[min(1, len(names) - 1)]}", text="{prompt}"',
        prompt=prompt,
        last=names[min(1, len(names) - 1)],
        vllm_flags="" if auto_tokenizer else " --skip-tokenizer-init",
        text=text,
        ids="\n".join(_id_rows(vocabulary)),
        tokenizers="\n".join(_tokenizer_rows(model)),
        template=model.template.name,
        template_version=model.template.version,
        fingerprint=vocabulary.fingerprint[:12],
    )


def _id_rows(vocabulary: Vocabulary) -> list[str]:
    rows = [(0, vocabulary.text_size, "text")]
    rows += [(place, place + 1, f"`{name}`") for name, place in vocabulary.controls.items()]
    rows += [(block.start_id, block.start_id + 1, f"start of {block.modality}") for block in vocabulary.blocks]
    for block in vocabulary.blocks:
        code = f"{block.first_id} + code"
        if block.num_quantizers > 1:
            code = f"{block.first_id} + {block.codebook_size} * codebook + code"
        rows.append((block.end_id, block.end_id + 1, f"end of {block.modality}"))
        rows.append((block.first_id, block.stop_id, f"codes of {block.modality}: {code}"))
    used = rows[-1][1]
    if used < vocabulary.size:
        rows.append((used, vocabulary.size, "unused"))
    return [
        f"| {low}{f' to {high - 1}' if high - low > 1 else ''} | {high - low} | {what} |" for low, high, what in rows
    ]


def _tokenizer_rows(model: UnifiedModel) -> list[str]:
    rows = []
    for block in model.vocabulary.blocks:
        tokenizer = model.tokenizers[block.modality]
        spec = tokenizer.spec
        order = block.pattern if block.pattern == block.input_pattern else f"{block.pattern} ({block.input_pattern} in)"
        if block.grid is not None:
            span = "x".join(map(str, block.grid)) + " cells"
        else:
            span = f"up to {block.max_length} codes" if block.max_length is not None else "any length"
        if spec.sample_rate is not None:
            span += f", {spec.frame_rate:g} frames/s of {spec.sample_rate} Hz"
        rows.append(
            f"| {block.modality} | `{type(tokenizer).__name__}` | {block.num_quantizers} x {block.codebook_size} "
            f"| {order} | {span} | {spec.license or 'unknown'} | `{block.fingerprint[:12]}` |"
        )
    return rows
