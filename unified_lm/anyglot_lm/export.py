"""A model folder as others read it: plain transformers, their kind of text tokenizer, a chat template, a card.

What `export` writes is still a model folder of ours (`UnifiedModel.from_pretrained`), and loads without us:

    config.json  generation_config.json  model.safetensors     `AutoModelForCausalLM`, no remote code
    tokenizer.json  tokenizer_config.json  chat_template.jinja `AutoTokenizer`; text/ then holds the one of training
    text.model                                                 or this: sentencepiece stays what it is
    vocabulary.json  template.json  tokenizers/  README.md

A sentencepiece model is not converted: no fast tokenizer of transformers is known to give the same ids for every text.
Such an export takes ids: `AnyglotProcessor` makes them. Weights are not changed here but in their dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from anyglot_lm.adapter import read_settings
from anyglot_lm.files import new_folder, read_json, write_bytes, write_json
from anyglot_lm.hf_text import EXPORTED_FOLDER, HFTextTokenizer
from anyglot_lm.model_card import model_card
from anyglot_lm.segments import ROLES
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

_PHRASES = ("", " a  b\n\n", "x", "The user's 12.50 \u20ac:\tna\u00efve \u4f60\u597d \U0001f600 ", "<|im_end|><s>")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set turn = namespace(role='') %}
{%- for message in messages %}
    {%- if message['role'] not in ROLES or message['role'] == turn.role %}
        {{- raise_exception("user and assistant take turns, one message each; there is no " + message['role']) }}
    {%- endif %}
    {%- set turn.role = message['role'] %}
    {{- 'MARK' + turn.role + '|>' }}
    {%- if message['content'] is string %}
        {%- set text = message['content'] %}
    {%- elif message['content'] | length == 1 and message['content'][0]['type'] == 'text' %}
        {%- set text = message['content'][0]['text'] %}
    {%- else %}
        {{- raise_exception("a message here is one text; AnyglotProcessor takes media and several parts") }}
    {%- endif %}
    {%- if 'MARK' in text %}
        {{- raise_exception("a text holds MARK, with which control tokens begin; AnyglotProcessor takes any text") }}
    {%- endif %}
    {{- text }}
{%- endfor %}
{%- if not add_generation_prompt %}
    {{- eos_token }}
{%- elif turn.role == 'assistant' %}
    {{- raise_exception("the assistant has the last word already; leave its message out, or add_generation_prompt") }}
{%- else %}
    {{- 'MARKassistant|>' }}
{%- endif %}
"""
"""Layout `anyglot-chat` version 1 for turns of one text each, as `segments.Template` writes it."""

_MARK = "<|anyglot:"


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Literal["bf16", "fp32"] | None = None,
    license: str = "unknown",
    base_model: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model folder for others.

    Args:
        source: a model folder.
        out: the folder to write; it appears when it is whole.
        dtype: of the language model's weights; as they are stored by default.
        license: of the language model, as the hub names it (such as `apache-2.0`), for the card.
        base_model: hub name of the language model that training started from, for the card.
        overwrite: replace `out`.

    Returns:
        `out`, `architecture`, `dtype`, `auto_tokenizer` (whether transformers can make text ids), `modalities`.

    Raises:
        CheckpointError, ManifestError, FingerprintError: a source that does not load.
        ManifestError: `out` exists.
    """
    import torch
    from transformers import GenerationConfig

    adapted = read_settings(Path(source)) is not None
    config = {} if adapted else read_json(Path(source) / "config.json")
    if "auto_map" in config:
        raise CheckpointError(f"{source}: needs code of its own (auto_map); take a model of a class of transformers")
    stored = DTYPES[dtype] if dtype else str(config.get("dtype") or config.get("torch_dtype") or "float32")
    with new_folder(out, overwrite=overwrite) as folder:
        model = UnifiedModel.from_pretrained(source, dtype=getattr(torch, stored))
        controls = model.vocabulary.controls
        ids = {f"{name}_token_id": controls[name] for name in ("bos", "eos", "pad")}
        model.model.config.update(ids)
        # Sampling habits of a backbone, such as a repetition penalty, would spoil codes.
        model.model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(folder)
        automatic = isinstance(model.text, HFTextTokenizer) and _for_transformers(model.text, model.vocabulary, folder)
        card = model_card(model, dtype=stored, license=license, base_model=base_model, auto_tokenizer=automatic)
        write_bytes(folder / "README.md", card.encode())
    return {
        "out": str(out),
        "architecture": type(model.model).__name__,
        "dtype": stored,
        "auto_tokenizer": automatic,
        "modalities": list(model.vocabulary.modalities),
    }


def markers(vocabulary: Vocabulary) -> dict[str, int]:
    """The control ids as special tokens of an exported tokenizer: string -> id."""
    return {f"{_MARK}{name}|>": control for name, control in vocabulary.controls.items()}


def _for_transformers(text: HFTextTokenizer, vocabulary: Vocabulary, folder: Path) -> bool:
    """Writes the files of `AutoTokenizer`, unless they would not give the ids of our template."""
    from tokenizers import Tokenizer

    content = with_markers(read_json(folder / text.file_name), markers(vocabulary))
    if content is None:
        return False
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    probe, controls = Tokenizer.from_str(raw), vocabulary.controls
    user, assistant = (f"{_MARK}{role}|>" for role in ROLES)
    for phrase in _PHRASES:
        wanted = [controls["user"], *text.encode(phrase), controls["assistant"]]
        if probe.encode(f"{user}{phrase}{assistant}", add_special_tokens=False).ids != wanted:
            return False
    text.save(folder / EXPORTED_FOLDER / text.file_name)
    write_bytes(folder / text.file_name, raw.encode())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": f"{_MARK}{name}|>" for name in ("bos", "eos", "pad")},
            "extra_special_tokens": [user, assistant],
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )
    template = CHAT_TEMPLATE.replace("MARK", _MARK).replace("ROLES", str(ROLES))
    write_bytes(folder / "chat_template.jinja", template.encode())
    return True


def with_markers(content: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, Any] | None:
    """A `tokenizer.json` of ours in which `found` (string -> id) are its only special tokens.

    The backbone's own ones go, as a text that spells them is text. Returns None where ids cannot have gaps (Unigram).
    """
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict):
        return None
    plain = [token for token in content["added_tokens"] if not token["special"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": place, "content": name, **flags} for name, place in found.items()]
    # An added token takes its id from the vocabulary, if it is there.
    named = {token["content"]: token["id"] for token in (*plain, *special)}
    return {**content, "model": {**content["model"], "vocab": {**vocab, **named}}, "added_tokens": [*plain, *special]}
