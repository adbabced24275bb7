"""Backbones from their published form: any Hugging Face causal language model with rotary positions of text.

Safetensors or GGUF; code from a repository is never run and pickled weights are never read. `load_backbone` also
stretches the positions (RoPE scaling). What packed rows need of a backbone is refused here by its config, and proved by
`model.assert_no_leak`. Knows nothing of vocabularies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from anyglot_lm.files import read_json
from anyglot_tokenizers.errors import CheckpointError, ManifestError, UnsupportedError

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
"""Types of RoPE scaling, and what each takes beside its factor."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OTHER_PARTS = ("text_config", "vision_config", "audio_config")


def load_backbone(
    path_or_name: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    rope_scaling: Mapping[str, Any] | None = None,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A pretrained causal language model, in evaluation mode.

    Args:
        path_or_name: a folder, or a hub name such as `Qwen/Qwen3-0.6B`.
        gguf_file: name of a GGUF file in it, which is read instead of safetensors; its weights become plain ones.
        dtype: of the weights.
        rope_scaling: `{"type": "yarn", "factor": 2.0}` stretches the positions `factor` times, see `scale_rope`.
        attn_implementation: sdpa, eager, flex_attention, or flash_attention_2 on a GPU.

    Raises:
        CheckpointError: it is not there, has no safetensors, or weights are missing.
        UnsupportedError: no RoPE, multi-axis RoPE (M-RoPE), several modalities, or an encoder and a decoder.
        ManifestError: a `rope_scaling` that is not possible.
    """
    where = os.fspath(path_or_name)
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{where}: {_reason(error)}; {_way_out(gguf_file)}") from error
    check_text_rope(config, where)
    if rope_scaling is not None:
        scale_rope(config, rope_scaling)
    model = load_causal_lm(
        where, dtype=dtype, config=config, attn_implementation=attn_implementation, gguf_file=gguf_file
    )
    if gguf_file is not None:
        _forget_gguf(model)
    _check_head(model, where)
    return model


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of the weights in a model folder, as its config.json says. Raises ManifestError if it has none."""
    config = read_json(Path(folder) / "config.json")
    dtype: torch.dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    return dtype


def load_causal_lm(where: str | os.PathLike[str], *, gguf_file: str | None = None, **options: Any) -> PreTrainedModel:
    """The language model of a folder or hub name. transformers fills missing weights at random; here that is an error.

    Args:
        where: folder or hub name.
        gguf_file: see `load_backbone`.
        **options: of transformers' `from_pretrained`.

    Raises:
        CheckpointError: it does not load, or weights are missing or of another shape.
    """
    from safetensors import SafetensorError

    options["gguf_file" if gguf_file is not None else "use_safetensors"] = gguf_file or True
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            where, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{where}: the language model does not load ({_reason(error)}); {_way_out(gguf_file)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise CheckpointError(
            f"{where}: weights are missing or of another shape "
            f"({', '.join([*missing, *map(str, report['mismatched_keys'])][:3])}); save or copy the model again"
        )
    backbone: PreTrainedModel = model.eval()
    return backbone


def check_text_rope(config: PreTrainedConfig, where: str) -> None:
    """Raises `UnsupportedError` unless positions are rotary and have one axis, and there is one decoder of text."""
    way_out = "use a decoder of text with rotary positions, such as Llama, Qwen3, Mistral or SmolLM2"
    content = config.to_dict()
    parts = [name for name in _OTHER_PARTS if name in content]
    if parts or config.is_encoder_decoder:
        raise UnsupportedError(
            f"{where}: {config.model_type} is no plain decoder of text ({', '.join(parts) or 'it has an encoder'}); "
            f"{way_out}"
        )
    rope = content.get("rope_parameters")
    if not rope:
        raise UnsupportedError(f"{where}: {config.model_type} has no rotary positions; {way_out}")
    if "mrope" in str(rope):
        raise UnsupportedError(
            f"{where}: {config.model_type} has positions of several axes (M-RoPE), in which packed documents are not "
            f"found; {way_out}"
        )


def scale_rope(config: PreTrainedConfig, scaling: Mapping[str, Any]) -> None:
    """Stretches the positions of a config `factor` times, in place: `max_position_embeddings` rises with it.

    Types: `linear` divides positions; `ntk` raises the base (by a fixed factor); `yarn` (arXiv 2309.00071) and `llama3`
    treat slow and fast rotations differently, by the further keys in `ROPE_TYPES`. "dynamic" is refused: its angles
    depend on the longest row at hand, so a document's output would depend on what it is packed with.

    Raises:
        ManifestError: another type, a factor that is not above 1, unknown keys, or positions that are scaled already.
    """
    kind, factor = scaling.get("type", scaling.get("rope_type")), scaling.get("factor")
    if kind not in ROPE_TYPES:
        also = " (it would make a document's output depend on its neighbours)" if kind == "dynamic" else ""
        raise ManifestError(f"rope_scaling: type {kind!r} is not one of {', '.join(ROPE_TYPES)}{also}")
    if not isinstance(factor, int | float) or not factor > 1:
        raise ManifestError(f"rope_scaling: factor {factor!r}; give a number above 1, or leave rope_scaling out")
    rope = dict(config.rope_parameters)
    if rope.get("rope_type") != "default":
        raise ManifestError(
            f"rope_scaling: positions of this backbone are of type {rope.get('rope_type', 'one per layer')!r} already; "
            "leave rope_scaling out"
        )
    longest = int(config.max_position_embeddings)
    more = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "factor")}
    unknown = sorted(set(more) - set(ROPE_TYPES[kind]))
    if unknown:
        takes = ", ".join(("type", "factor", *ROPE_TYPES[kind]))
        raise ManifestError(f"rope_scaling: {kind} takes no {', '.join(unknown)}; it takes {takes}")
    if kind == "ntk":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(head * rope.get("partial_rotary_factor", 1.0))
        rope["rope_theta"] *= float(factor) ** (turned / (turned - 2))
    else:
        rope |= {"rope_type": kind, "factor": float(factor)}
    if kind in ("yarn", "llama3"):
        rope |= {"original_max_position_embeddings": longest, **(_LLAMA3 if kind == "llama3" else {}), **more}
    config.rope_parameters = rope
    config.max_position_embeddings = int(longest * factor)
    config.validate_rope()


@torch.no_grad()
def _check_head(model: PreTrainedModel, where: str) -> None:
    """Raises `UnsupportedError` unless logits are hidden states times the head, which is all a loss here multiplies."""
    ids = torch.arange(4)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits.float()
    plain = (hidden @ model.get_output_embeddings().weight.T).float()
    if (logits - plain).abs().max() > 0.02 * plain.square().mean().sqrt():
        raise UnsupportedError(
            f"{where}: {model.config.model_type} adds a bias to its logits, or scales or caps them; use a backbone "
            "with a plain head, such as Llama, Qwen3, Mistral or SmolLM2"
        )


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are plain by now; with these marks transformers would refuse to save or train them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _way_out(gguf_file: str | None) -> str:
    if gguf_file is not None:
        return "check the folder and the name of the GGUF file, and that gguf is installed (pip install gguf)"
    return "give a folder or hub name with config.json and safetensors (convert pickled weights first)"
