"""What trains: new rows only, new rows and LoRA, or everything; and back to a plain model.

    preset    input rows and head              layers            frozen by `freeze` in any preset
    rows      new rows                         nothing
    lora      new rows                         LoRA (peft)
    full      all rows, or new ones only       all weights

Rows that must not move are not merely masked: `SplitRows` holds them in a matrix of their own without a gradient, so no
optimizer, momentum or weight decay ever sees them, and neither the loss nor the embedding spends time on their
gradient. Tied models keep one pair of matrices for both ends. `merge` undoes all of it: LoRA is added to its weights,
rows become one matrix, and what is left is the plain Hugging Face model that any library loads.

It neither trains nor saves. (peft's own `trainable_token_indices` is right for tied and untied models too, but builds
the whole matrix anew in each forward; vLLM does not load such adapters, so exports are merged anyway.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyglot_lm.factored import FactoredRows, unfactor_rows
from anyglot_lm.int8 import Int8Linear
from anyglot_lm.model import make_rows_plain
from anyglot_tokenizers.errors import ManifestError

Preset = Literal["rows", "lora", "full"]


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: of the adapter's input.
        targets: names of the layers, or "all-linear" for every linear layer but the head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


class SplitRows(nn.Module):
    """A matrix `[V, D]` in two parts: `old` `[V0, D]` stays, `new` `[V - V0, D]` trains.

    `first_new` is V0; a tied head takes the parameters of its embedding through `share`.
    """

    def __init__(self, weight_VD: Tensor, first_new: int, share: SplitRows | None = None) -> None:
        super().__init__()
        if share is None:
            self.old = nn.Parameter(weight_VD[:first_new].detach().clone(), requires_grad=False)
            self.new = nn.Parameter(weight_VD[first_new:].detach().clone())
        else:
            self.old, self.new = share.old, share.new

    def remember(self) -> None:
        """Keep the new rows as they are now, for `before_training`; once."""
        if not hasattr(self, "first"):
            self.register_buffer("first", self.new.detach().clone(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix `[V, D]`, made anew: for what only reads it."""
        return torch.cat([self.old, self.new])


class SplitEmbedding(SplitRows):
    """ids int64 `[*]` -> rows `[*, D]`, in the dtype of the rows that stay: with bf16 ones all layers run in bf16."""

    def forward(self, ids: Tensor) -> Tensor:
        first_new = len(self.old)
        old = F.embedding(ids.clamp(max=first_new - 1), self.old)
        new = F.embedding((ids - first_new).clamp(min=0), self.new).to(old.dtype)
        return torch.where((ids >= first_new)[..., None], new, old)


class SplitHead(SplitRows):
    """Hidden states `[*, D]` -> logits `[*, V]`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([F.linear(hidden, self.old), F.linear(hidden, self.new)], -1)


def choose_trained(
    model: PreTrainedModel,
    preset: Preset,
    *,
    first_new: int,
    lora: Lora | None = None,
    freeze: Sequence[str] = (),
    train_old_rows: bool = False,
) -> None:
    """Make `model` train what the preset says, in place.

    Args:
        model: plain, with all its rows.
        preset: see the module docstring.
        first_new: rows from here on are new: the vocabulary's `text_size`.
        lora: adapters of preset "lora"; the others do not read it, so one configuration serves all.
        freeze: regular expressions; parameters whose name one of them finds anywhere do not train.
        train_old_rows: preset "full" only: the rows below `first_new` train too.

    Raises:
        ManifestError: an unknown preset, `train_old_rows` with another than "full", factored rows where old ones must
            stay, a pattern that fits no parameter, a layer that the model lacks, or nothing left to train.
    """
    if preset not in ("rows", "lora", "full"):
        raise ManifestError(f"preset {preset!r}; use rows, lora or full")
    if train_old_rows and preset != "full":
        raise ManifestError(f"train_old_rows is for preset full; preset {preset!r} leaves old rows as they are")
    if not 0 < first_new <= model.get_input_embeddings().weight.shape[0]:
        rows = model.get_input_embeddings().weight.shape[0]
        raise ManifestError(f"first_new={first_new}, but the model has {rows} rows; give the vocabulary's text_size")
    if not train_old_rows and isinstance(model.get_input_embeddings(), FactoredRows):
        raise ManifestError(
            f"preset {preset!r} keeps old rows apart from new ones, which factored rows are not; call "
            "unfactor_rows(model) first, or train all rows (preset full with train_old_rows)"
        )
    if preset != "full":
        model.requires_grad_(False)
    if preset == "lora":
        _add_lora(model, lora or Lora())
    if not train_old_rows:
        _split(model, first_new)
    names = dict(model.named_parameters())
    for pattern in freeze:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ManifestError(f"freeze: {pattern!r} is found in no parameter's name; one is {next(iter(names))!r}")
        for name in found:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise ManifestError(f"nothing is left to train with preset {preset!r} and freeze {list(freeze)}")


def _add_lora(model: PreTrainedModel, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.r, lora_alpha=cast(int, lora.alpha), lora_dropout=lora.dropout, target_modules=lora.targets
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ManifestError(f"lora.targets {lora.targets!r}: {str(error).splitlines()[0]}") from error


def lora_layers(model: PreTrainedModel) -> list[Any]:
    """Its layers of peft."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def before_training(model: PreTrainedModel) -> Iterator[None]:
    """The decoder without LoRA, and with the new input rows that its embedding remembers. For forward passes only."""
    layers, embedding = lora_layers(model), model.get_input_embeddings()
    now = embedding.new.data
    for layer in layers:
        layer.scale_layer(0.0)
    embedding.new.data = embedding.first
    try:
        yield
    finally:
        embedding.new.data = now
        for layer in layers:
            layer.unscale_layer()


def _split(model: PreTrainedModel, first_new: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = SplitEmbedding(embedding.weight, first_new)
    tied = head.weight is embedding.weight
    if getattr(head, "bias", None) is not None:
        raise ManifestError(f"{type(model).__name__}: its head has a bias; only heads without one can be split")
    model.set_input_embeddings(rows)
    model.set_output_embeddings(SplitHead(head.weight, first_new, rows if tied else None))


def output_rows(model: PreTrainedModel) -> Tensor | tuple[Tensor, Tensor]:
    """The output matrix `[V, D]`, or its parts `(old, new)`, as the loss takes them; of an int8 head unpacked."""
    head = model.get_output_embeddings()
    if isinstance(head, Int8Linear):
        return head.weight.to(head.scales.dtype) * head.scales[:, None]
    return (head.old, head.new) if isinstance(head, SplitRows) else head.weight


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Back to a plain model, in place: LoRA added to its weights, rows in one matrix, all parameters trainable."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            lora: Any = module
            lora.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, lora.get_base_layer())
    model.__dict__.pop("peft_config", None)  # what peft leaves behind
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, SplitRows) and isinstance(head, SplitRows):
        make_rows_plain(model, tied=head.new is embedding.new)
    unfactor_rows(model).requires_grad_(True)
    return model
