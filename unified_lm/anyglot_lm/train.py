"""LitUnified: the LightningModule that trains a unified LM on packed batches, and `fit_lm`, which runs it to a folder.

The loss is the grammar's cross-entropy (`loss.py`) normalised by a constant, the plan's mean number of target ids in a
pack, so gradients do not depend on how packs fall into micro-batches, accumulation steps or ranks. Logs per modality:
loss, accuracy and the uniform baseline ln(slice size). It does not build data, vocabularies or evaluations.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import PreTrainedModel

from anyglot_lm.loss import SliceTable, span_cross_entropy
from anyglot_lm.model import hidden_states
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, ManifestError
from anyglot_tokenizers.optim import MuonAdamW


class LitUnified(L.LightningModule):
    """Next-id training of a causal LM under the span grammar.

    Args:
        model: Hugging Face causal LM whose rows are those of `vocabulary`.
        vocabulary: gives the legal slices and the names of the logs.
        max_steps: optimizer steps of the whole run (the schedule ends there).
        targets_per_pack: mean number of target ids in a pack; the constant that normalises the loss.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices (True) or AdamW everywhere.
        modality_weights: factor of the loss per modality ("text" included), default 1.
        z_loss: factor of logsumexp².
        sliced: compete inside the grammar's slice, or over the whole vocabulary.
        compile: run the decoder through torch.compile.
        log_every: steps between log lines.
    """

    _class_of_id: Tensor
    _class_weights: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        max_steps: int,
        targets_per_pack: float,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        muon: bool = True,
        modality_weights: dict[str, float] | None = None,
        z_loss: float = 0.0,
        sliced: bool = True,
        compile: bool = False,
        log_every: int = 50,
    ) -> None:
        super().__init__()
        self.model = model
        self.model.train()
        self.model.config.use_cache = False
        self.max_steps, self.targets_per_pack = max_steps, targets_per_pack
        self.lr, self.warmup_steps, self.weight_decay, self.muon = lr, warmup_steps, weight_decay, muon
        self.z_loss, self.sliced, self.log_every = z_loss, sliced, log_every
        lo, hi, class_of_id = vocabulary.slice_table()
        self.register_buffer("_class_of_id", torch.tensor(class_of_id, dtype=torch.long), persistent=False)
        self._lo, self._hi = [int(i) for i in lo], [int(i) for i in hi]
        self.class_names = ["text" if name == "open" else name for name in vocabulary.slice_names()]
        weights = modality_weights or {}
        modalities = ["text" if name == "open" else name.partition("/")[0] for name in self.class_names]
        unknown = sorted(weights.keys() - set(modalities))
        if unknown:
            known = ", ".join(dict.fromkeys(modalities))
            raise ManifestError(f"modality_weights: no modality {unknown[0]!r}; there are {known}")
        factors = [weights.get(modality, 1.0) for modality in modalities]
        self.register_buffer("_class_weights", torch.tensor(factors), persistent=False)
        # Not a registered submodule: checkpoints hold the plain model's names.
        decoder = model.base_model
        self.__dict__["_decoder"] = torch.compile(decoder) if compile else decoder
        self._vocabulary_fingerprint = vocabulary.fingerprint
        self.last_loss = math.nan
        self._window: list[Tensor] = []
        self._window_ids = 0
        self._closed = 0  # the step of the last log
        self._metrics: dict[str, float] = {}
        self._started = time.perf_counter()

    def on_train_start(self) -> None:
        self._window, self._window_ids, self._closed = [], 0, self.global_step
        self._started = time.perf_counter()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden_BTD = hidden_states(self.__dict__["_decoder"], batch["input_ids"], batch["position_ids"])
        head = self.model.get_output_embeddings()
        sums = span_cross_entropy(
            hidden_BTD.flatten(0, 1),
            head.weight,
            batch["labels"].flatten(),
            SliceTable(self._lo, self._hi, self._class_of_id),
            class_weights=self._class_weights,
            sliced=self.sliced,
            z_loss=self.z_loss,
        )
        self._window.append(torch.stack([sums.nll, sums.count, sums.correct]))
        self._window_ids += batch["input_ids"].numel()
        return sums.total / (self.targets_per_pack * len(batch["input_ids"]))

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._close_window()
        if not self._metrics:
            return
        metrics, self._metrics = self._metrics, {}
        self.log_dict(metrics)
        if self.trainer.is_global_zero:
            parts = " ".join(f"{k[5:]} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/"))
            message = f"step {self.global_step}/{self.max_steps} loss {metrics['loss']:.6f} | {parts}"
            print(f"{message} | {metrics['ids_per_s']:.0f} ids/s", file=sys.stderr, flush=True)

    def _close_window(self) -> None:
        """At a step that is to be logged: sums since the last log become `_metrics`, once."""
        due = self.global_step % self.log_every == 0 or self.global_step == self.max_steps
        if not due or self.global_step == self._closed or not self._window:
            return
        sums = torch.stack(self._window).sum(0)
        if self.trainer.world_size > 1:
            sums = torch.as_tensor(self.all_gather(sums)).sum(0)
        nll, count, correct = sums
        metrics: dict[str, float] = {"loss": (nll.sum() / count.sum().clamp_min(1)).item()}
        for c, name in enumerate(self.class_names):
            if count[c]:
                metrics[f"loss/{name}"] = (nll[c] / count[c]).item()
                metrics[f"accuracy/{name}"] = (correct[c] / count[c]).item()
                metrics[f"uniform/{name}"] = math.log(self._hi[c] - self._lo[c])
        if not math.isfinite(metrics["loss"]):
            raise AnyglotError(f"step {self.global_step}: loss is {metrics['loss']}; start again with a lower lr")
        now = time.perf_counter()
        metrics["ids_per_s"] = self._window_ids * self.trainer.world_size / (now - self._started)
        self._metrics, self.last_loss = metrics, metrics["loss"]
        self._window, self._window_ids, self._closed, self._started = [], 0, self.global_step, now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._close_window()  # callbacks save before this module's own hook at the end of a step
        checkpoint["anyglot"] = {"vocabulary": self._vocabulary_fingerprint, "last_loss": self.last_loss}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("anyglot", {})
        made_for = own.get("vocabulary", self._vocabulary_fingerprint)
        if made_for != self._vocabulary_fingerprint:
            raise FingerprintError(
                f"the checkpoint was trained with the vocabulary {made_for[:12]}, this run has "
                f"{self._vocabulary_fingerprint[:12]}; use another run_dir, or give the old vocabulary back"
            )
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        needed = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        for name in sorted(saved.keys() | needed.keys()):
            if saved.get(name) != needed.get(name):
                raise CheckpointError(
                    f"the checkpoint is of another model: {name} has shape {saved.get(name)}, this model needs "
                    f"{needed.get(name)}; use another run_dir, or give the old settings back"
                )
        self.last_loss = own.get("last_loss", math.nan)

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self.model, self.lr, weight_decay=self.weight_decay, muon=self.muon)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, step: int) -> float:
        """Linear warm-up, constant, then linear to 2 % over the last 60 % of the run."""
        cooldown = 0.6 * self.max_steps
        return min((step + 1) / max(self.warmup_steps, 1), 1.0, max(0.02, (self.max_steps - step) / cooldown))


def fit_lm(
    module: LitUnified,
    data: L.LightningDataModule,
    *,
    run_dir: str | Path,
    precision: str = "bf16-mixed",
    accumulate: int = 1,
    clip: float = 1.0,
    checkpoint_every: int = 200,
    strategy: str = "auto",
    devices: int | str = 1,
    accelerator: str = "auto",
) -> float:
    """Train `module` on `data` for `module.max_steps` steps; continue from `run_dir/last.ckpt` when it is there.

    Every start logs to its own `run_dir/logs/version_*/metrics.csv`.

    Returns:
        The last logged mean training loss (nats per target id).

    Raises:
        AnyglotError: `checkpoint_every` is no multiple of `module.log_every`.
        FingerprintError: the checkpoint is of another vocabulary or plan.
        CheckpointError: the checkpoint is of another model.
    """
    from anyglot_lm.checkpoint import AtomicCheckpoint

    if checkpoint_every < 1 or checkpoint_every % module.log_every:
        raise AnyglotError(
            f"checkpoint_every {checkpoint_every} is no multiple of log_every {module.log_every}, so a resumed run "
            f"would log other losses; use for example checkpoint_every {module.log_every}"
        )
    run_dir = Path(run_dir)
    checkpoint = AtomicCheckpoint(run_dir / "last.ckpt", every=checkpoint_every)
    trainer = L.Trainer(
        max_steps=module.max_steps,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        strategy=strategy,
        devices=devices,
        accelerator=accelerator,
        logger=CSVLogger(run_dir, name="logs"),
        callbacks=[checkpoint],
        log_every_n_steps=module.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    resume = checkpoint.path if checkpoint.path.exists() else None
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.last_loss
