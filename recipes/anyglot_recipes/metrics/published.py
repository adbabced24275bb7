"""Checkpoints of transformers as judges: the right kind, whole, and without pickle, or one clear error.

transformers itself only warns where a checkpoint is of another kind or lacks weights, and goes on with random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.errors import AnyglotError

T = TypeVar("T")
BATCH = 32


def load_model(name: str, kind: str, device: str | torch.device) -> Any:
    """`ClipModel` or `ClapModel` in evaluation mode.

    Args:
        name: a local folder or a hub id.
        kind: `model_type` of its configuration, `"clip"` or `"clap"`.
        device: where it runs.

    Raises:
        AnyglotError: no such checkpoint, one of another kind, one without safetensors, or one that lacks weights.
    """
    import transformers

    model_class = {"clip": transformers.CLIPModel, "clap": transformers.ClapModel}[kind]
    found = opened(name, kind, lambda: transformers.AutoConfig.from_pretrained(name)).model_type
    if found != kind:
        raise AnyglotError(f"{name}: is a {found} model, where a {kind} model is wanted; name one with --{kind}")
    load = lambda: model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True)  # noqa: E731
    model, info = opened(name, kind, load)
    missing = sorted(key for key in info["missing_keys"] if key.endswith(".weight"))
    if missing:
        raise AnyglotError(f"{name}: lacks {len(missing)} weights, such as {missing[0]}; get the whole checkpoint")
    return model.to(device).eval()


def opened(name: str, kind: str, load: Callable[[], T]) -> T:
    """`load()`; what goes wrong with a checkpoint becomes an `AnyglotError` that names it."""
    try:
        return load()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise AnyglotError(
            f"{name}: cannot be loaded as a {kind} model of transformers ({error}); give a folder that save_pretrained "
            "wrote, or a hub id, with weights as safetensors"
        ) from error


def tensor_of(output: Any) -> Tensor:
    """What `get_image_features` and its like return: a tensor, or in newer versions an output that holds it."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found


def text_vectors(model: Any, tokenizer: Any, texts: Sequence[str], longest: int) -> Tensor:
    """Unit vectors float32 `[N, D]` of texts, each cut to `longest` ids."""
    found = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        ids = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        output = model.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        found.append(unit(output))
    return torch.cat(found)


def unit(output: Any) -> Tensor:
    """Unit vectors float32 `[N, D]`, on the CPU, of what `get_image_features` and its like return."""
    return F.normalize(tensor_of(output).float(), dim=1).cpu()
