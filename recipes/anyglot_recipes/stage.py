"""`Stage`: the model's side of a stage of training, from a model folder to a model folder.

It takes plain values only, so every key of a recipe is an argument documented here. Its data are `stage_data.py`'s, the
program that runs both is `stage_cli.py`; preferences are `dpo.py`'s, the loss and the log `anyglot_lm.train`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from anyglot_lm.adapter import ADAPTER_FILE, adapter_weights
from anyglot_lm.backbone import load_backbone
from anyglot_lm.hf_text import load_text
from anyglot_lm.segments import Template
from anyglot_lm.train import LitUnified
from anyglot_lm.trained import trained_weights
from anyglot_lm.tuning import Lora, Preset, choose_trained, merge
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers import load
from anyglot_tokenizers.errors import CheckpointError, ManifestError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": None}


class Stage(LitUnified):
    """The model's side of a stage.

    Args:
        start: model folder to start from (`anyglot expand` makes the first one).
        preset: what trains: "rows" (new rows only), "lora" (new rows and LoRA) or "full".
        lora: adapters of preset lora.
        weights_from: `last.ckpt` (one file) of an earlier run that began at the same `start` and trained the same
            parameters, or the folder of an adapter of the same vocabulary, whose backbone `start` is with new rows and
            nothing else (this is not checked): this one begins with its weights, but with a schedule, an optimizer,
            factors of the loss and data of its own. It has to stay until the run is done.
        freeze: regular expressions; parameters whose name one of them finds do not train.
        train_old_rows: preset full: text rows train too.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more work.
        rope_scaling: RoPE scaling for inputs longer than the model knows, e.g. {"type": "yarn", "factor": 2.0}.
        frozen_dtype: of weights that do not train: fp32, bf16 (half the memory, and layers run in it), or auto, that of
            the arithmetic.
        lr: peak learning rate.
        rows_lr: peak learning rate of the rows of ids, default lr.
        warmup_steps: linear warm-up.
        cooldown: share of the run, at its end, in which the rate falls linearly to 2 %.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices, else AdamW.
        modality_weights: factor of the loss per modality ("text" included) or codebook ("speech/1"), default 1.
        learned_weights: learn a factor per modality and codebook (uncertainty weighting).
        z_loss: factor of logsumexp squared.
        keep_text: preset lora: plain text is not learnt but kept: an id costs this factor times KL(start || model),
            logged as `kept/text`; the start says nothing but text there. 0: it is learnt like all else.
        history_noise: share of the codes of answers, by modality, that half of the documents read back as others: what
            is asked for then counts for more than what was said so far (`history.py`).
        sliced: softmax over the grammar's legal slice, else over the whole vocabulary.
        compile: torch.compile the decoder.
        log_every: steps between log lines.
    """

    def __init__(
        self,
        start: str,
        preset: Preset = "full",
        lora: Lora | None = None,
        weights_from: str | None = None,
        freeze: list[str] | None = None,
        train_old_rows: bool = False,
        gradient_checkpointing: bool = False,
        rope_scaling: dict[str, Any] | None = None,
        frozen_dtype: Literal["fp32", "bf16", "auto"] = "fp32",
        lr: float = 1e-3,
        rows_lr: float | None = None,
        warmup_steps: int = 20,
        cooldown: float = 0.6,
        weight_decay: float = 0.0,
        muon: bool = False,
        modality_weights: dict[str, float] | None = None,
        learned_weights: bool = False,
        z_loss: float = 0.0,
        keep_text: float = 0.0,
        history_noise: dict[str, float] | None = None,
        sliced: bool = True,
        compile: bool = False,
        log_every: int = 10,
    ) -> None:
        self.start = Path(start)
        if not (self.start / "vocabulary.json").is_file():
            raise ManifestError(
                f"model.start {start!r} is no model folder (it holds no vocabulary.json); anyglot expand makes the "
                "first one, every stage another (RUN_DIR/model)"
            )
        if keep_text and preset != "lora":
            raise ManifestError(
                f"model.keep_text compares the model with itself without LoRA, and preset {preset!r} has none; leave "
                "model.keep_text out"
            )
        super().__init__(
            self.build,
            Vocabulary.load(self.start / "vocabulary.json"),
            lr=lr,
            rows_lr=rows_lr,
            warmup_steps=warmup_steps,
            cooldown=cooldown,
            weight_decay=weight_decay,
            muon=muon,
            modality_weights=modality_weights,
            learned_weights=learned_weights,
            z_loss=z_loss,
            keep_text=keep_text,
            history_noise=history_noise,
            sliced=sliced,
            compile=compile,
            log_every=log_every,
        )
        self.preset, self.lora, self.weights_from, self.frozen = preset, lora, weights_from, list(freeze or [])
        self.began_with: str | None = None
        self.train_old_rows, self.gradient_checkpointing = train_old_rows, gradient_checkpointing
        self.keep_text = keep_text
        self.rope_scaling, self.frozen_dtype = rope_scaling, DTYPES[frozen_dtype]

    def build(self) -> PreTrainedModel:
        """The model that this run begins with."""
        model = self._prepare()
        if self.weights_from is not None:
            self.began_with = self._take(model, self.weights_from)
        return model

    def _prepare(self) -> PreTrainedModel:
        """The model of the start folder, in float32, with what trains chosen."""
        model = load_backbone(self.start, rope_scaling=self.rope_scaling)
        self.started_from = _identity(model, self.rope_scaling, self.lora if self.preset == "lora" else None)
        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        choose_trained(
            model,
            self.preset,
            first_new=self.vocabulary.text_size,
            lora=self.lora,
            freeze=self.frozen,
            train_old_rows=self.train_old_rows,
        )
        if self.keep_text:
            model.get_input_embeddings().remember()  # before `weights_from`
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.frozen_dtype or torch.float32)
        return model

    @torch.no_grad()
    def _take(self, model: PreTrainedModel, path: str) -> str:
        """Copy the weights of a checkpoint or adapter into the parameters that train here; the sha256 of what they are.

        Raises `CheckpointError` and `ManifestError`.
        """
        if (Path(path) / ADAPTER_FILE).is_file():
            saved, settings = adapter_weights(path)
            alpha = (self.lora or Lora()).alpha
            if settings["alpha"] != alpha:
                raise CheckpointError(
                    f"model.weights_from {path}: its LoRA has alpha {settings['alpha']}, model.lora {alpha}; give its"
                )
            if Vocabulary.load(Path(path) / "vocabulary.json").fingerprint != self.vocabulary.fingerprint:
                raise CheckpointError(f"model.weights_from {path}: has another vocabulary than {self.start}")
        else:
            saved, own = trained_weights(path)
            if own.get("start") != self.started_from:
                raise CheckpointError(
                    f"model.weights_from {path}: started from another model than {self.start}, or with another "
                    "model.lora.alpha or model.rope_scaling; give the model.start and the settings of that run"
                )
        named = model.named_parameters(remove_duplicate=False)  # tied rows have two names in a checkpoint
        trained = {name: p for name, p in named if p.requires_grad}
        for name in sorted(saved.keys() | trained.keys()):
            shapes = [tuple(part[name].shape) if name in part else None for part in (saved, trained)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"model.weights_from {path}: {name} has shape {shapes[0]}, this run trains {shapes[1]}; give the "
                    "model.preset, model.lora and model.freeze of that run"
                )
            trained[name].copy_(saved[name])
        return _digest(trained.items())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["anyglot"] |= {"start": self.started_from, "began_with": self.began_with}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises `CheckpointError` if what trains was trained on top of other weights, or began with other ones."""
        if checkpoint.get("anyglot", {}).get("start", self.started_from) != self.started_from:
            raise CheckpointError(
                f"the checkpoint of this run folder was started from another model than {self.start}, or with another "
                "model.lora.alpha or model.rope_scaling; give another --run_dir, or the old settings back"
            )
        if checkpoint.get("anyglot", {}).get("began_with") != self.began_with:
            raise CheckpointError(
                "the checkpoint of this run folder began with other weights than those of model.weights_from "
                f"{self.weights_from}; give the old ones back, or another --run_dir"
            )
        super().on_load_checkpoint(checkpoint)

    def export(self, out: Path, dtype: torch.dtype) -> None:
        """Write the merged model as a model folder; called on every rank, rank 0 writes."""
        model = self.model
        if self._sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = get_model_state_dict(model, options=options)
            if not self.trainer.is_global_zero:
                return
            model = self._prepare()
            model.load_state_dict(whole)
        if not self.trainer.is_global_zero:
            return
        plain = merge(model.float().cpu()).to(dtype)
        tokenizers = {name: load(self.start / "tokenizers" / name) for name in self.vocabulary.modalities}
        template, text = Template.load(self.start / "template.json"), load_text(self.start)
        UnifiedModel(plain, self.vocabulary, template, text, tokenizers, where=str(out)).save_pretrained(out)


def _identity(model: PreTrainedModel, rope_scaling: dict[str, Any] | None, lora: Lora | None) -> str:
    """sha256 of what a checkpoint leaves out and its weights depend on: sums of the start's bits, positions, scale."""
    return _digest(model.named_parameters(), rope_scaling, lora and lora.alpha)


def _digest(parameters: Iterable[tuple[str, Tensor]], *more: Any) -> str:
    sums = [(name, int(p.detach().view(torch.int32).sum(dtype=torch.int64))) for name, p in parameters]
    return hashlib.sha256(repr((sums, *more)).encode()).hexdigest()
