"""`PublishedTokenizer`: base of the classes that run codecs published by others.

A published codec loads from its publisher's folder (config.json and safetensors, such as transformers writes) or, once
saved with `save_pretrained`, from our folder form, which holds its whole config. This file knows no codec and never
reads a pickle.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.tokenizer import CONFIG_FILE, Tokenizer, refuse_pickles

FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json", "README.md")


class PublishedTokenizer(Tokenizer):
    """A codec whose weights others published. Encode and decode only; it is not trained here."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: nothing may learn from what it encodes."""
        return super().train(False)

    @classmethod
    @abstractmethod
    def from_published(cls, folder: Path, entries: dict[str, Any], *, license: str) -> Self:
        """Read a folder in the publisher's layout, in eval mode and float32.

        Args:
            folder: holds config.json and weights.
            entries: the content of config.json.
            license: of the weights, as far as known.

        Raises:
            CheckpointError: the config does not fit this class, or weights are missing, damaged or pickled.
        """

    @classmethod
    def fetch(cls, hub_id: str, revision: str | None) -> Path:
        """Download what `from_published` needs from the Hugging Face hub; returns the folder."""
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*FILES, "model-*.safetensors"]))


def read_safetensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors below `prefix` (which is taken off their names) of `model.safetensors` or of its shards.

    Raises CheckpointError for missing, damaged or pickled weights.
    """
    from safetensors import SafetensorError, safe_open

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({shard for name, shard in table.items() if name.startswith(prefix)})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a readable index of shards ({error}); download it again") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            refuse_pickles(folder)
            raise CheckpointError(f"{path}: no such file; download the model again")
        try:
            with safe_open(str(path), framework="pt") as file:
                names_here = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a dict
                tensors |= {key[len(prefix) :]: file.get_tensor(key) for key in names_here}
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the last two: odd dtypes
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    if not tensors:
        raise CheckpointError(f"{folder / CONFIG_FILE}: no weights named {prefix}* beside it; is it another model?")
    return tensors


def fitted_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """`found` in the dtypes of `wanted`.

    Raises CheckpointError unless names and shapes are those of `wanted` and all numbers are finite.
    """
    misfits = [name for name, x in wanted.items() if name not in found or found[name].shape != x.shape]
    if misfits or set(found) - set(wanted):
        raise CheckpointError(
            f"{folder}: weights do not fit {CONFIG_FILE}: missing or of another shape {misfits[:3]}, "
            f"unexpected {sorted(set(found) - set(wanted))[:3]}; is it another model?"
        )
    fitted = {name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}
    for name, tensor in fitted.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite values; download it again")
    return fitted
